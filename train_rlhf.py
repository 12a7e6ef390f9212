"""Road 2, in two stages: preference pairs -> reward model -> on-policy RL against it, held near the reference by a KL term.

    python train_rlhf.py                                   the built-in map: about 20 s on two CPU cores
    python train_rlhf.py --reward local                    the reward class is the policies' own log-probs: Theorem 2.2,
                                                           the result comes back to DPO's
    python train_rlhf.py --init FOLDER --data pairs.jsonl --lr 1e-6 --reward-lr 3e-6 --samples 8 --kl 0.05
    python train_rlhf.py --reward mymodule:myfunction      a rule instead of a model: function(prompt, response) -> float
    python train_rlhf.py --algo grpo|online-dpo|rebel|reinforce

Stage 1 maximises the Bradley-Terry likelihood of the pairs over a reward class: `global`, a scalar head on the reference's
trunk, or `local`, beta log pi/pi_ref. Stage 2 maximises E_pi[r] - kl KL(pi || pi_ref). All else is the same.
"""

from argparse import Namespace
from pathlib import Path

import torch

from nanoroads import common, data, evaluate, losses, roadmap, tokenizer
from nanoroads.batch import pack, upload
from nanoroads.checkpoint import finish, is_finished, load_fitting, load_model, load_state, save_config, save_state
from nanoroads.generate import generate
from nanoroads.hf import export

PRETRAINED = {"lr": 1e-6, "epochs": 1.0, "reward_epochs": 1.0, "beta": 0.1, "micro_batch_size": 1}
ALGOS = ["rloo", "grpo", "online-dpo", "rebel", "reinforce"]
CLASSES = ["global", "local"]  # of reward models
RL_FLAGS = ("start", "algo", "samples", "kl", "updates", "temperature", "compare", "max_new_tokens", "steps", "epochs")


def flags(argv):
    p = common.parser(__doc__, PRETRAINED, out=Path("out/rlhf"), lr=1e-3, batch_size=32)
    p.add_argument("--init", type=Path, default=Path("out/sft"), help="the reference policy (default: %(default)s)")
    p.add_argument("--start", type=Path, help="policy that RL starts from, e.g. DPO's (default: --init)")
    p.add_argument("--reward", default="global", help="global | local | a run of either | module:function (default: %(default)s)")
    p.add_argument("--readout", default="last", choices=["last", "sum"], help="global: read at the last token, or summed")
    p.add_argument("--beta", type=common.positive(float), default=0.3, help="local: scale of the reward (default: %(default)s)")
    p.add_argument("--reward-epochs", type=common.positive(float), default=4.0, help="stage 1 (default: %(default)s)")
    p.add_argument("--reward-lr", type=common.positive(float), help="stage 1 (default: local as in DPO, global thrice that)")
    p.add_argument("--reward-batch-size", type=common.positive(int), default=32, help="pairs a step (default: %(default)s)")
    p.add_argument("--stop-after", choices=["reward"], help="stop when stage 1 is done")
    p.add_argument("--eval-data", type=Path, help="held-out pairs (default: the last 5 %% of --data)")
    p.add_argument("--algo", default="rloo", choices=ALGOS, help="(default: %(default)s)")
    p.add_argument("--samples", type=common.positive(int), default=8, help="responses a prompt (default: %(default)s)")
    p.add_argument("--kl", type=common.positive(float), help="regulariser (default: 0.5, on a file 0.05; local: --beta)")
    p.add_argument("--updates", type=common.positive(int), default=1, help="optimizer steps on each batch of samples")
    p.add_argument("--temperature", type=common.positive(float), default=1.0, help="of samples and of all log-probs")
    p.add_argument("--compare", type=Path, help="a policy, e.g. DPO's: log KL(it || ours) at each evaluation")
    p.add_argument("--max-new-tokens", type=common.positive(int), help="(default: the map's longest route; 64 elsewhere)")
    args = p.parse_args(argv)
    rates = (1e-4, 1e-6) if args.reward == "local" else (3e-4, 3e-6)  # of the map's small model, of a pretrained one
    args.reward_lr = args.reward_lr or rates[args.data not in roadmap.WORLDS]
    args.steps = args.steps or (None if args.epochs else 300)
    if args.algo != "reinforce" and args.samples < 2 or args.algo == "rebel" and args.samples % 2:
        p.error(
            f"--samples {args.samples}: --algo {args.algo} takes {'an even number' if args.algo == 'rebel' else 'at least 2'}"
        )
    if args.algo == "reinforce" and (args.micro_batch_size or args.batch_size) < args.batch_size:
        p.error("--micro-batch-size: the baseline of --algo reinforce is the mean of the whole batch, give it the --batch-size")
    for flag in ("stop_after", "eval_data"):
        if getattr(args, flag) and args.reward not in CLASSES:
            p.error(f"--{flag.replace('_', '-')}: --reward {args.reward} has no stage 1")
    return args


# ---------------------------------------------------------------- stage 1: pairs -> reward


def reward_of(model, logp_or_reward, ref_logp, beta):
    """The two reward classes: a scalar head's output as it is, or a policy's beta log pi/pi_ref (the paper's local reward)."""
    return logp_or_reward if model.config.head == "scalar" else losses.implicit_reward(logp_or_reward[0], ref_logp, beta)


def train_reward(args, out, train, test, tokenizer_name, device):
    """Bradley-Terry maximum likelihood over the class --reward. Writes a run of its own, OUT/reward."""
    (prompts, pairs), (test_prompts, test_pairs) = train, test
    flags = {name: value for name, value in vars(args).items() if name not in RL_FLAGS}
    flags |= {"out": out / "reward", "lr": args.reward_lr, "batch_size": args.reward_batch_size}
    args = Namespace(**flags, steps=None, epochs=args.reward_epochs)
    out = common.open_run(args, "reward")
    if is_finished(out):
        return
    torch.manual_seed(args.seed)
    model = load_model(args.init, device=device, head="scalar" if args.reward == "global" else None, readout=args.readout)
    ref_logp = test_ref_logp = torch.zeros(len(pairs), 2)  # the global class needs no reference
    if args.reward == "local":
        ref_logp, test_ref_logp = (evaluate.score(model, *rows, args, device) for rows in (train, test))
    save_config(out, args, "reward", model, tokenizer_name, beta=args.beta, reference=str(args.init))
    optimizer = common.make_optimizer(args, model)
    steps = common.total_steps(args, len(prompts))
    start = load_state(out, model, optimizer)
    common.compile_trunk(args, model)
    for step in (bar := common.progress(start, steps, f"{args.reward} reward")):
        some = common.batch_indices(len(prompts), args.batch_size, step, args.seed)
        loss, margins = 0.0, []
        for micro in common.chunks(some, args.micro_batch_size):
            batch = pack([prompts[i] for i in micro], [pairs[i] for i in micro], device=device)
            ref = upload(ref_logp[micro], device).flatten()
            with common.autocast(args, device):
                reward = reward_of(model, model(batch), ref, args.beta).view(-1, 2)  # (P, 2): chosen, rejected
            part = losses.bradley_terry(*reward.unbind(1)).sum() / len(some)
            part.backward()
            loss = loss + part.detach()
            margins.append((reward[:, 0] - reward[:, 1]).detach())
        grad_norm = common.update(args, model, optimizer, step, steps)
        done = step + 1
        row = {"loss": loss, "accuracy": evaluate.accuracy(torch.cat(margins)), "grad_norm": grad_norm}
        if done % args.eval_every == 0 or done == steps:
            value = evaluate.score(model, test_prompts, test_pairs, args, device)
            value = reward_of(model, value if model.config.head == "scalar" else [value], test_ref_logp, args.beta)
            row["eval_loss"] = losses.bradley_terry(*value.unbind(1)).mean()
            row["eval_accuracy"] = evaluate.accuracy(value[:, 0] - value[:, 1])
        if done % args.log_every == 0 or "eval_loss" in row:
            row = common.log_metrics(out, done, row)
            bar.set_postfix(loss=row["loss"], accuracy=row["accuracy"])
        if done % args.save_every == 0 and done < steps:
            save_state(out, model, optimizer, done)
    finish(out, model)
    print(f"{out}: held-out loss {row['eval_loss']:.4f}, accuracy {row['eval_accuracy']:.3f}")


# ---------------------------------------------------------------- stage 2: reward -> policy


def rl_loss(args, kl, logp, token_logp, old, ref, reward, lengths):
    """One loss for each sequence (S,), S = prompts x k. logp (S,), token_logp (R,); old and ref are (logp, token_logp) of
    the policy that sampled and of the reference; reward (S,). Returns (loss (S,), share that is clipped)."""
    k, none = args.samples, logp.new_zeros(())
    # k1 inside the reward: its gradient is that of the KL (Ahmadian et al., 2402.14740). Never whitened: that would change
    # the balance of reward and KL, and with it the optimum of Theorem 2.2.
    regularised = (reward - kl * losses.kl_k1(old[0], ref[0])).view(-1, k)
    if args.algo == "online-dpo":
        return losses.online_dpo(logp.view(-1, k), ref[0].view(-1, k), reward.view(-1, k), kl).repeat_interleave(k), none
    if args.algo == "rebel":
        pair = lambda x: x.reshape(-1, 2)  # noqa: E731
        return losses.rebel(pair(logp), pair(old[0]), pair(regularised), 1.0).repeat_interleave(2), none
    if args.algo == "grpo":
        advantage = losses.grpo_advantage(reward.view(-1, k)).flatten()
        loss, clipped = losses.grpo(token_logp, old[1], ref[1], advantage, lengths, kl)
        return loss, clipped.mean()
    advantage = losses.rloo_advantage(regularised) if args.algo == "rloo" else losses.reinforce_advantage(regularised)
    if args.updates == 1:
        return losses.policy_gradient(logp, advantage.flatten()), none
    loss, clipped = losses.clipped_policy_gradient(logp, old[0], advantage.flatten())  # the ratio of whole responses
    return loss, clipped.mean()


def load_reward(args, out, reference, device):
    """(model or None, beta of a local reward, function or None)."""
    if ":" in args.reward:
        return None, None, evaluate.rule(args.reward)
    folder = out / "reward" if args.reward in CLASSES else Path(args.reward)
    config = common.read_config(folder)
    model = load_fitting(folder, device, like=reference, head=None).requires_grad_(False)
    if model.config.head == "lm":
        evaluate.check_local(folder, config, args.init)
    return model, config.get("beta"), None


def main(argv=None):
    args = flags(argv)
    device = common.pick_device(args)
    common.set_kernel(args, device)
    out = common.open_run(args, "rlhf")
    if is_finished(out):
        print(f"{out} is finished")
        return export(out, args.export_hf)

    world = roadmap.WORLDS.get(args.data)
    train_path, test_path = common.make_map_inputs(args) if world else (Path(args.data), args.eval_data)
    reference = load_fitting(args.init, device).requires_grad_(False)
    for folder in filter(None, (args.start, args.compare)):
        load_fitting(folder, like=reference)  # what is wrong with it is said now, not after stage 1
    tokenizer_name, encoding = tokenizer.of(args.init, reference)
    limits = reference.config.block_size, args.max_prompt_tokens, args.max_response_tokens, args.skip_bad_rows
    read = data.preference_texts if args.reward in CLASSES else data.prompt_texts
    prompts, pairs, texts = data.load(train_path, read, encoding, *limits)
    if args.inspect:
        return data.inspect(prompts, pairs, encoding)
    room = limits[0] - max(map(len, prompts))
    length = args.max_new_tokens or min(room, world.max_moves + 1 if world else 64)
    if not 0 < length <= room:
        raise common.InputError(
            f"prompt and --max-new-tokens {length} exceed the model's context of {limits[0]} tokens by {length - room}"
        )
    if args.reward in CLASSES:
        test = data.load(test_path, data.preference_texts, encoding, *limits)[:2] if test_path else None
        rows = ((prompts, pairs), test) if test else data.hold_out(prompts, pairs, train_path)
        train_reward(args, out, *rows, tokenizer_name, device)
        if args.stop_after == "reward":
            return
    reward_model, beta, function = load_reward(args, out, reference, device)
    kl = args.kl or (beta if reward_model is not None and reward_model.config.head == "lm" else 0.5 if world else 0.05)

    texts, prompts = zip(*dict(zip(texts, prompts, strict=True)).items(), strict=True)  # RL: each prompt of the pairs once
    torch.manual_seed(args.seed)
    policy = load_model(args.start or args.init, device=device)
    save_config(out, args, "rlhf", policy, tokenizer_name, kl=kl, reference=str(args.init))
    optimizer = common.make_optimizer(args, policy)
    steps = common.total_steps(args, len(prompts)) * (1 if args.steps else args.updates)  # an epoch samples each prompt once
    start = load_state(out, policy, optimizer)
    common.compile_trunk(args, policy)
    eos, k = tokenizer.eos_id(encoding), args.samples
    test_texts = roadmap.prompts(world, "test") if world else []
    if args.compare:  # KL(other || ours) is the mean of log other - log ours on samples of the other
        other, asked_of = load_model(args.compare, device=device), prompts[:256]
        theirs = generate(other, asked_of, 4, length, eos=eos, seed=args.seed)
        their_logp = evaluate.score(other, asked_of, theirs, args, device)
    print(f"{args.algo}: {len(prompts):,} prompts x {k} samples, {steps} steps, kl {kl}, {device}")

    with common.profiled(args, device) as profile_step:
        timer = common.Timer()
        for step in (bar := common.progress(start, steps, args.algo)):
            if step % args.updates == 0 or step == start:  # sample and score: the batch serves `updates` optimizer steps
                sample_round = step // args.updates
                some = common.batch_indices(len(prompts), args.batch_size, sample_round, args.seed)
                with timer("sampling"), common.autocast(args, device):
                    seed = args.seed * 1_000_003 + sample_round
                    responses = []  # eight micro-batches at a time: the cache of all responses would be larger than the model
                    for part, rows in enumerate(common.chunks(some, args.micro_batch_size and 8 * args.micro_batch_size)):
                        few, own_seed = [prompts[i] for i in rows], seed + (part << 53)  # seed itself is below 2^53
                        responses += generate(policy, few, k, length, args.temperature, eos=eos, seed=own_seed)
                micros = []
                with timer("scoring"), torch.no_grad(), common.autocast(args, device):
                    for micro in common.chunks(range(len(some)), args.micro_batch_size):
                        batch = pack([prompts[some[i]] for i in micro], [responses[i] for i in micro], device=device)
                        ref = reference(batch, args.temperature)  # (S,), (R,)
                        if function:
                            asked = [texts[some[i]] for i in micro for _ in range(k)]
                            answers = evaluate.texts(encoding, [r for i in micro for r in responses[i]])
                            reward = function(asked, answers).to(device)  # (S,)
                        else:
                            reward = reward_of(reward_model, reward_model(batch, args.temperature), ref[0], beta)  # (S,)
                        micros.append([batch, ref, reward, None])

            with timer("training"):
                totals = torch.zeros(5, device=device)
                for micro in micros:
                    batch, ref, reward, old = micro
                    with common.autocast(args, device):
                        logp, token_logp = policy(batch, args.temperature)
                    if old is None:  # on the first update the sampler is the policy itself: the ratio is exactly 1
                        old = micro[3] = logp.detach(), token_logp.detach()
                    loss, clipped = rl_loss(args, kl, logp, token_logp, old, ref, reward, batch.lengths)
                    loss = loss.sum() / (len(some) * k)
                    loss.backward()
                    sums = loss.detach(), reward.sum(), losses.kl_k1(logp.detach(), ref[0]).sum(), -token_logp.detach().sum()
                    totals += torch.stack([*sums, clipped * len(token_logp)])
                grad_norm = common.update(args, policy, optimizer, step, steps)
            profile_step()

            done = step + 1
            evaluating = done % args.eval_every == 0 or done == steps
            if done % args.log_every == 0 or done == steps or evaluating:
                count, tokens = len(some) * k, sum(len(r) for g in responses for r in g)
                per = totals.new_tensor([1, count, count, tokens, tokens])
                row = dict(zip(("loss", "reward", "kl", "entropy", "clip_fraction"), totals / per, strict=True))
                row |= {"length": tokens / count, "grad_norm": grad_norm}
                row |= {f"seconds_{name}": seconds for name, seconds in timer.seconds.items()}
                if world:  # the true reward of the samples at hand: what the reward model is a model of
                    said = [(texts[i], a) for i, g in zip(some, responses, strict=True) for a in evaluate.texts(encoding, g)]
                    row["true_reward"] = sum(world.reward(p, a) for p, a in said) / len(said)
                if evaluating and args.compare:
                    row["kl_compare"] = (their_logp - evaluate.score(policy, asked_of, theirs, args, device)).mean()
                if evaluating and world:
                    seen = evaluate.on_map(policy, reference, world, encoding, test_texts, args, device)
                    row |= {f"map_{name}": sum(v) / len(v) for name, v in seen.items()}
                row = common.log_metrics(out, done, row)
                bar.set_postfix(reward=row["reward"], kl=row["kl"])
            if done % args.updates == 0 and done % args.save_every < args.updates and done < steps:  # between two batches
                save_state(out, policy, optimizer, done)
    finish(out, policy)
    export(out, args.export_hf)
    print(f"reward {row['reward']:.3f}, KL {row['kl']:.2f}, entropy {row['entropy']:.2f} nats a token")
    if world:
        print(f"on the map: true reward {row['map_reward']:.3f}, greedy {row['map_greedy_reward']:.3f}, KL {row['map_kl']:.2f}")
    print(f"next: python sample.py --model {out}")


if __name__ == "__main__":
    common.run_script(main)
