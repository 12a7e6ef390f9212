"""Road 2, in two stages: pairs -> reward model -> on-policy RL against it, near the reference.

    python train_rlhf.py                                   the built-in map, 30 s on two CPU cores
    python train_rlhf.py --reward local                    comes back to DPO's policy (Theorem 2.2)
    python train_rlhf.py --init FOLDER --data pairs.jsonl  your model and pairs, as in train_dpo.py
    python train_rlhf.py --reward mymodule:myfunction      your function(prompt, response) -> float
    python train_rlhf.py --algo grpo|dr-grpo|dapo|gspo|cispo|online-dpo|rebel|reinforce

Stage 1 maximises the Bradley-Terry likelihood of the pairs over a reward class: `global`, a scalar
head on the reference's trunk, or `local`, beta log pi/pi_ref. Stage 2, with `rloo` (the default),
`reinforce` or `rebel`, maximises E_pi[r] - kl KL(pi || pi_ref); of a local reward, at kl = beta,
DPO's policy is the optimum (Theorem 2.2 of Swamy et al., 2503.01067). The other `--algo` regularise
differently: see the README. Everything else is as in train_dpo.py.
"""

from pathlib import Path

import torch

from nanoroads import loss_variants, losses, score
from nanoroads.batch import pack, upload
from nanoroads.model import LogProbs
from nanoroads.randomness import stream_key
from nanoroads.run.commands import print_next
from nanoroads.run.distributed import batch_means, matched, share
from nanoroads.run.flags import (
    TEMPERATURE,
    model_kind,
    names_of_flags,
    non_negative,
    positive,
    row_limits,
    run_script,
    training_parser,
    use_defaults,
)
from nanoroads.run.inspect import inspect
from nanoroads.run.lora import adapted, adapted_reward_model
from nanoroads.run.optim import Mean, adamw, batch_indices, learning_rate, rank_chunks, total_steps, update
from nanoroads.run.rollouts import sample_responses, score_responses, true_reward
from nanoroads.run.run import Run
from nanoroads.run.samples import show_samples
from nanoroads.text import data, layouts, tokenizer
from nanoroads.weights.checkpoint import load_policy, load_reference, new_reward_model
from nanoroads.world.task import response_length, task_of

# For a small model that is trained from scratch, as the map's is, and for a pretrained one. Stage 1 stands
# first. Stage 2 takes its steps or epochs from here only if the user gives neither.
DEFAULTS = {
    "small": {
        "beta": 0.3, "reward_lr": {"global": 3e-4, "local": 1e-4},
        "reward_epochs": 4.0, "reward_batch_size": 32,
        "lr": 1e-3, "steps": 300, "epochs": None, "batch_size": 32, "micro_batch_size": None,
    },
    "pretrained": {
        "beta": 0.1, "reward_lr": {"global": 3e-6, "local": 1e-6},
        "reward_epochs": 1.0, "reward_batch_size": 32,
        "lr": 1e-6, "steps": None, "epochs": 1.0, "batch_size": 32, "micro_batch_size": 1,
    },
}  # fmt: skip
REWARD_CLASSES = ["global", "local"]
# Flags that a reward class does not use. A reward that is given has no stage 1, and uses none of its flags.
UNUSED = {"global": ["beta"], "local": ["readout"]}
STAGE_1 = ["beta", "readout", "reward_lr", "reward_epochs", "reward_batch_size", "eval_data", "stop_after"]
ALGORITHMS = ["rloo"] + loss_variants.LIKE_GRPO + ["online-dpo", "rebel", "reinforce"]


def add_stage_2_flags(parser):
    """Stage 2's flags, apart from the others: stage 1's run must not depend on them."""
    add = parser.add_argument_group("stage 2: reward -> policy").add_argument
    add("--start", type=Path, help="folder of the policy that RL starts from, e.g. DPO's (default: --init)")
    add("--algo", default="rloo", choices=ALGORITHMS, help="see the README's table (default: rloo)")
    add("--samples", type=positive(int), default=8, help="responses per prompt (default: 8)")
    kl_help = "weight of the KL; 0: none (default: a local reward's beta, else map 0.5, a --data file 0.05)"
    add("--kl", type=non_negative(float), help=kl_help)
    add("--updates", type=positive(int), default=1, help="steps per batch of samples (default: 1)")
    clip_help = "the ratio pi/pi_old is clipped at 1 {} this, with --updates above 1 (default: of --algo)"
    add("--clip-low", type=positive(float), help=clip_help.format("-"))
    add("--clip-high", type=positive(float), help=clip_help.format("+"))
    temperature_help = "of samples and of log-probs in loss, KL and local reward; evaluations: 1 (default: 1)"
    add("--temperature", type=TEMPERATURE, default=1.0, help=temperature_help)
    add("--max-new-tokens", type=positive(int), help="per sample (default: longest route, 64 for a file)")
    add("--compare", type=Path, help="policy to record KL(it || ours) of, e.g. DPO's (default: none)")


def flags(argv):
    """The command line -> args."""
    parser = training_parser(__doc__, Path("out/rlhf"), DEFAULTS)
    add = parser.add_argument_group("stage 1: pairs -> reward").add_argument
    add("--init", type=Path, default=Path("out/sft"), help="reference policy (default: %(default)s)")
    add("--reward", default="global", help="global|local|folder of either|module:function (default: global)")
    readout_help = "global: read at the last token, or summed over all (default: last)"
    add("--readout", default="last", choices=["last", "sum"], help=readout_help)
    add("--beta", type=positive(float), help="local: scale of the reward (default: 0.3; pretrained 0.1)")
    add("--reward-epochs", type=positive(float), help="passes over the pairs (default: 4; pretrained 1)")
    add("--reward-lr", type=positive(float), help="(default: local 1e-4, global 3e-4; pretrained 1e-6, 3e-6)")
    add("--reward-batch-size", type=positive(int), help="pairs per optimizer step (default: 32)")
    add("--eval-data", type=Path, help="file of held-out pairs (default: 5 %% of --data)")
    add("--stop-after", choices=["reward"], help="stop when stage 1 is done (default: do not stop)")
    add_stage_2_flags(parser)
    args = parser.parse_args(argv)

    # Refuse a reward that is not there, and given flags that it ignores. DEFAULTS are filled in after that.
    if args.reward not in REWARD_CLASSES and ":" not in args.reward and not Path(args.reward).is_dir():
        parser.error(f"--reward {args.reward}: not a folder; or global, local or module:function")
    unused = UNUSED.get(args.reward, STAGE_1)
    for name in unused:
        if getattr(args, name) != parser.get_default(name):
            reason = "does not use it" if args.reward in REWARD_CLASSES else "has no stage 1"
            parser.error(f"--{name.replace('_', '-')}: --reward {args.reward} {reason}")

    kind = model_kind(args.init)
    defaults = dict(DEFAULTS[kind])
    defaults["reward_lr"] = defaults["reward_lr"]["local" if args.reward == "local" else "global"]
    if args.steps or args.epochs:  # the user chose the length of stage 2
        del defaults["steps"], defaults["epochs"]
    use_defaults(args, defaults, kind, unused)

    # Refuse what does not go together.
    if (args.clip_low or args.clip_high) and (args.updates == 1 or args.algo in ["online-dpo", "rebel"]):
        parser.error("--clip-low, --clip-high: nothing is clipped with --updates 1, nor by online-dpo, rebel")
    args.clip_low, args.clip_high = loss_variants.ratio_limits(args.algo, args.clip_low, args.clip_high)
    if args.algo == "online-dpo" and args.kl == 0:
        parser.error("--kl 0: --algo online-dpo takes it as DPO's beta, which is above 0")
    if args.algo != "reinforce" and args.samples < 2:
        parser.error(f"--samples {args.samples}: --algo {args.algo} takes at least 2")
    if args.algo == "rebel" and args.samples % 2:
        parser.error(f"--samples {args.samples}: --algo rebel takes an even number")
    if args.algo == "reinforce" and args.micro_batch_size and args.micro_batch_size < args.batch_size:
        parser.error("--micro-batch-size: --algo reinforce needs the whole --batch-size for its baseline")
    return args


def main(argv=None):
    """Pairs -> a reward model in OUT/reward -> a policy in OUT."""
    args = flags(argv)
    run = Run(args, stage="rlhf")  # the device, the seed, --out (refused if it holds another run)
    if run.finished:
        return run.export()

    # The reference policy, and the rows as tokens: pairs, or, where the reward is given, prompts alone.
    task = task_of(args.data)
    train_path, test_path = task.pairs(args.init, args.seed, args.eval_data)
    reference = run.place(load_reference(args.init, run.compute_dtype, run.frozen_dtype))
    tokenizer_name, encoding = tokenizer.of(args.init, reference)
    limits = row_limits(args, reference)
    layout = layouts.preference_texts if args.reward in REWARD_CLASSES else layouts.prompt_texts
    if args.inspect:
        return inspect(train_path, test_path, layout, encoding, limits)
    if args.reward in REWARD_CLASSES or test_path:  # neither stage trains on test
        train, test = data.load_split(train_path, test_path, layout, encoding, limits)
    else:  # a file of yours for a given reward: all of its prompts are trained on, and the first ones shown
        train = test = data.load(train_path, layout, encoding, limits)

    # What stage 2 could not use is refused now, not after stage 1.
    max_new_tokens = response_length(task, args.max_new_tokens, limits.context, train.prompts)
    for folder in (args.start, args.compare):
        if folder:
            load_policy(folder, like=reference)
            tokenizer.check_same(folder, encoding, args.init)

    # Stage 1: pairs -> reward, a run of its own in OUT/reward.
    judge_source = args.reward  # a folder, or module:function; for a class stage 1 replaces it
    if args.reward in REWARD_CLASSES:
        # It has none of stage 2's flags, and --reward-lr as its lr. So with another --kl, --resume keeps the
        # reward model until stage 2 has begun; later a new run takes it, by --reward OUT/reward --out NEW.
        renamed = {"epochs": args.reward_epochs, "lr": args.reward_lr, "batch_size": args.reward_batch_size}
        reward_run = run.inside("reward", names_of_flags(add_stage_2_flags), steps=None, **renamed)
        train_reward(reward_run, reference, tokenizer_name, train, test)
        if args.stop_after == "reward":
            return
        judge_source = reward_run.out

    # Stage 2: reward -> policy.
    judge = score.load_judge(judge_source, reference, args.init, encoding, args.temperature)
    train_policy(run, task, reference, judge, tokenizer_name, encoding, train, test, max_new_tokens)
    words = "last batch: reward {reward:.3f}, KL {kl:.2f} nats, entropy {entropy:.2f} nats per token"
    print(words.format(**run.last_row))
    task.report(run.last_row)
    print_next(["sample.py", "--model", run.out])


# ---------------------------------------------------------------- stage 1: pairs -> reward


def pair_rewards(args, model, batch, ref_logp, chunk):
    """Rewards (P, 2) of the P pairs `chunk`, chosen first. ref_logp (N, 2): of all pairs; global: None."""
    if args.reward == "global":
        return model(batch).view(-1, 2)  # a scalar head's output as it is
    logp = model(batch).sequence.view(-1, 2)  # (P, 2)
    return losses.implicit_reward(logp, upload(ref_logp[chunk], logp.device), args.beta)


def held_out_measures(args, model, rows, ref_logp, groups_per_pass):
    """{"eval_loss", "eval_accuracy"} of a reward model on held-out pairs."""
    if args.reward == "global":
        reward = score.scalar_rewards(model, rows.prompts, rows.responses, groups_per_pass)  # (P, 2)
    else:
        logp = score.sequence_logps(model, rows.prompts, rows.responses, groups_per_pass)  # (P, 2)
        reward = losses.implicit_reward(logp, ref_logp, args.beta)
    chosen, rejected = reward.unbind(1)
    loss = losses.bradley_terry(chosen, rejected)
    return {"eval_loss": loss.mean(), "eval_accuracy": score.ranked_right(chosen - rejected).mean()}


def train_reward(run, reference, tokenizer_name, train, test):
    """Bradley-Terry maximum likelihood over the class --reward. train, test: pairs as data Rows.

    This is train_dpo.py's loop with another loss, or for the local class with the same: DPO's is that of
    beta log pi/pi_ref. So equal flags end in equal weights (not with --lora: other random numbers)."""
    if run.finished:
        return
    args = run.args
    groups_per_pass = args.micro_batch_size or args.batch_size
    ref_logp = test_ref_logp = None  # a global reward knows of no reference
    scale = {}  # nor of a beta
    if args.reward == "local":
        scale["beta"] = args.beta
        ref_logp = score.reference_logps(run, "ref_logp", reference, train, groups_per_pass)  # (N, 2)
        test_ref_logp = score.reference_logps(run, "ref_logp_test", reference, test, groups_per_pass)
        model = adapted(run, reference) or run.place(load_policy(args.init, compute_dtype=run.compute_dtype))
    else:
        model = adapted_reward_model(run, reference)  # with --lora; otherwise None
        model = model or run.place(new_reward_model(args.init, "cpu", run.compute_dtype, args.readout))
    run.describe(model, tokenizer_name, **scale, reference=str(args.init))  # config.json
    optimizer = adamw(model, args.lr, args.weight_decay)
    total = total_steps(len(train), args.batch_size, args.epochs, args.steps)
    print(f"{args.reward} reward: {len(train):,} pairs, {total} steps, {run.device}")

    for step in run.steps(model, optimizer, total):  # from the last checkpoint on
        indices = batch_indices(len(train), args.batch_size, step, args.seed)
        metrics = Mean()
        for chunk in rank_chunks(indices, args.micro_batch_size, model):
            prompts, pairs = train.take(chunk)  # tokens; two responses per prompt, chosen first
            batch = run.counted(pack(prompts, pairs, device=run.device))  # P prompts, 2P responses in order
            chosen, rejected = pair_rewards(args, model, batch, ref_logp, chunk).unbind(1)  # (P,) each
            loss = losses.bradley_terry(chosen, rejected)  # (P,)
            (loss.sum() / len(indices)).backward()  # a mean over the pairs of the whole step
            metrics.add(loss=loss, accuracy=score.ranked_right(chosen - rejected))
        lr = learning_rate(args.lr, step, total, args.warmup, args.schedule)
        grad_norm = update(model, optimizer, lr, args.clip)  # clips and steps; the norm before clipping

        # Write down what happened. Nothing here waits for the device, unless the step is logged.
        row = {**metrics.means(), "grad_norm": grad_norm}
        if run.evaluates(step):
            row.update(held_out_measures(args, model, test, test_ref_logp, groups_per_pass))
        run.log(step, row, show=("loss", "accuracy"))  # every --log-every steps
        run.save(step, model, optimizer)  # every --save-every steps

    run.finish(model)
    print("{}: held-out loss {eval_loss:.4f}, accuracy {eval_accuracy:.3f}".format(run.out, **run.last_row))


# ---------------------------------------------------------------- stage 2: reward -> policy


def rl_loss(args, kl_weight, max_new_tokens, now, rollout):
    """Loss (S,), and what was clipped: 1 or 0 for each response (S,) or token (R,).

    now: LogProbs of the policy, with gradient. kl_weight: of the regulariser. k samples per prompt.

        --algo      advantage A                       loss                                    the KL is in
        reinforce   reward - mean of the batch        -A log pi; --updates > 1: clipped       the reward
        rloo        reward - mean of the other k - 1  the same                                the reward
        grpo        (reward - mean) / std             clipped per token, mean over tokens     the loss (k3)
        its kin     as loss_variants.like_grpo says
        online-dpo  the best of k against the worst   DPO at beta = kl_weight                 DPO's loss
        rebel       samples 1 and 2, 3 and 4, ...     (log w_1 - log w_2 - (r_1 - r_2))^2     the reward

    w = pi/pi_old of a response, where pi_old is the policy that sampled. Where the KL is in the reward, the
    reward, here also r, is that of the judge less kl_weight log(pi_old/pi_ref)."""
    k = args.samples
    never_clipped = torch.zeros_like(rollout.reward)
    # For reinforce, rloo and rebel: with the estimator k1 inside the reward the policy gradient is the KL's
    # (Ahmadian et al., 2402.14740). Not whitened: that would change the optimum of Theorem 2.2.
    regularised = rollout.reward - kl_weight * rollout.kl  # (S,)

    if args.algo == "online-dpo":
        logp, ref_logp = now.sequence.view(-1, k), rollout.ref.sequence.view(-1, k)  # (prompts, k)
        loss = losses.online_dpo(logp, ref_logp, rollout.reward.view(-1, k), kl_weight)  # (prompts,)
        # Repeated, so that the mean over samples is the mean over prompts.
        return loss.repeat_interleave(k), never_clipped
    if args.algo == "rebel":
        logp, old_logp = now.sequence.view(-1, 2), rollout.old.sequence.view(-1, 2)  # (S / 2, 2)
        loss = losses.rebel(logp, old_logp, regularised.view(-1, 2), eta=1.0)  # (S / 2,); their code's eta
        return loss.repeat_interleave(2), never_clipped
    limits = {"clip": args.clip_low, "clip_high": args.clip_high}
    if args.algo in loss_variants.LIKE_GRPO:
        options = {"samples": k, "beta": kl_weight, "longest": max_new_tokens, **limits}
        return loss_variants.like_grpo(args.algo, now.token, rollout, **options)
    if args.algo == "rloo":
        advantage = losses.rloo_advantage(regularised.view(-1, k)).flatten()
    else:
        # With torchrun these are a part of the batch: batch_means is then the mean over all ranks, else {}.
        advantage = losses.reinforce_advantage(regularised, **batch_means(baseline=regularised))
    if args.updates == 1:
        return losses.policy_gradient(now.sequence, advantage), never_clipped
    # More than one update on the same samples: clip the probability ratio of whole responses.
    return losses.clipped_policy_gradient(now.sequence, rollout.old.sequence, advantage, **limits)


def train_policy(run, task, reference, judge, tokenizer_name, encoding, train, test, max_new_tokens):
    """On-policy RL: sample, score, update. train, test: data Rows, to sample from and to show answers of."""
    args = run.args
    groups_per_pass = args.micro_batch_size or args.batch_size
    # --kl, else a local reward's beta, at which Theorem 2.2 holds (2503.01067), else the task's default.
    kl_weight = args.kl if args.kl is not None else judge.beta or task.kl
    policy = adapted(run, reference)
    policy = policy or run.place(load_policy(args.start or args.init, compute_dtype=run.compute_dtype))
    eos = tokenizer.stop_ids(encoding)
    prompt_rows = train.unique_prompts()
    compared = score.other_samples(run, policy, prompt_rows.prompts, max_new_tokens, eos, groups_per_pass)
    run.describe(policy, tokenizer_name, kl=kl_weight, reference=str(args.init))  # config.json
    optimizer = adamw(policy, args.lr, args.weight_decay)
    total = total_steps(len(prompt_rows), args.batch_size, args.epochs, args.steps, args.updates)
    print(f"{args.algo}: {len(prompt_rows):,} prompts x {args.samples}, {total} steps, kl {kl_weight}")

    for step in run.steps(policy, optimizer, total):  # from the last checkpoint on
        # Sample and score. One batch of samples serves --updates optimizer steps.
        if step % args.updates == 0:
            batch_number = step // args.updates
            indices = batch_indices(len(prompt_rows), args.batch_size, batch_number, args.seed)
            batch_rows = prompt_rows.select(share(indices))  # this rank's
            seed = stream_key("responses", args.seed, batch_number)
            with run.timed("sampling"):
                responses, logps = sample_responses(args, policy, batch_rows, max_new_tokens, eos, seed)
            with run.timed("scoring"):
                rollouts = score_responses(args, reference, judge, batch_rows, responses, logps, eos)

        with run.timed("training"):  # one optimizer step on all rollouts
            metrics = Mean()
            for rollout in matched(rollouts, policy, takes_mean=args.algo == "reinforce"):
                now = policy(run.counted(rollout.batch), args.temperature)  # sequence (S,), token (R,)
                if rollout.old is None:  # the first update: this very policy has sampled, so pi/pi_old is 1
                    rollout.old = LogProbs(now.sequence.detach(), now.token.detach())
                loss, clipped = rl_loss(args, kl_weight, max_new_tokens, now, rollout)  # (S,), (S,) or (R,)
                (loss.sum() / (len(indices) * args.samples)).backward()  # a mean over the step's samples
                metrics.add(loss=loss, clip_fraction=clipped, reward=rollout.reward, cut=rollout.cut)
                # KL and entropy of the policy that sampled: its samples say little about a later one.
                metrics.add(kl=rollout.kl, length=rollout.batch.lengths.float(), entropy=-rollout.old.token)
                # In nats. Rounding; if it is more, sampling and training are not of the same policy.
                metrics.add_largest(sampling_gap=(rollout.old.token - rollout.drawn_logp).abs())
            lr = learning_rate(args.lr, step, total, args.warmup, args.schedule)
            grad_norm = update(policy, optimizer, lr, args.clip)  # clips and steps; the norm before clipping

        # Write down what happened. Nothing here waits for the device, unless the step is logged.
        row = {**metrics.means(), "grad_norm": grad_norm}
        if run.will_log(step):
            row.update(true_reward(task, batch_rows, responses, encoding))  # {} where it is not known
        if run.evaluates(step):
            row.update(task.measure(policy, reference, encoding, groups_per_pass))
            if compared:
                row["kl_compare"] = compared.kl(policy, groups_per_pass)
            show_samples(run, step, policy, test, encoding, task, judge, reference, max_new_tokens)
        run.log(step, row, show=("loss", "reward", "kl", "entropy", "length"))  # every --log-every steps
        if (step + 1) % args.updates == 0:  # never between two updates on the same samples
            run.save(step, policy, optimizer)

    run.finish(policy)  # model.safetensors, --export-hf


if __name__ == "__main__":
    run_script(main, many_ranks=True)
