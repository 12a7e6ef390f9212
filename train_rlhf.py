"""Road 2, in two stages: preference pairs -> reward model -> on-policy RL against it, held near the reference by a KL term.

    python train_rlhf.py                                   the built-in map: about 20 s on two CPU cores
    python train_rlhf.py --reward local                    the reward class is the policies' own log-probs: Theorem 2.2,
                                                           the result comes back to DPO's
    python train_rlhf.py --init FOLDER --data pairs.jsonl  your model, your rows {"prompt", "chosen", "rejected"}
    python train_rlhf.py --reward mymodule:myfunction      a rule instead of a model: function(prompt, response) -> float
    python train_rlhf.py --algo grpo|online-dpo|rebel|reinforce

Stage 1 maximises the Bradley-Terry likelihood of the pairs over a reward class: `global`, a scalar head on the reference's
trunk, or `local`, beta log pi/pi_ref. Stage 2 maximises E_pi[r] - kl KL(pi || pi_ref). All else is the same.
"""

from argparse import ArgumentParser
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from nanoroads import losses
from nanoroads.batch import Batch, pack, upload
from nanoroads.errors import InputError
from nanoroads.generate import generate
from nanoroads.model import LogProbs
from nanoroads.run.flags import model_kind, positive, run_script, training_parser, use_defaults
from nanoroads.run.inspect import inspect
from nanoroads.run.optim import Mean, adamw, batch_indices, chunks, learning_rate, total_steps, update
from nanoroads.run.run import Run
from nanoroads.score import load_judge, ranked_right, scalar_rewards, sequence_logps
from nanoroads.text import data, layouts, tokenizer
from nanoroads.weights.checkpoint import load_policy, new_reward_model
from nanoroads.world.task import task_of

# For a small model that is trained from scratch, as the map's is, and for a pretrained one. lr and epochs are of stage 2,
# whose length is --steps unless --epochs is given.
DEFAULTS = {
    "map": {
        "reward_lr": {"global": 3e-4, "local": 1e-4},  # local as in DPO, global three times that
        "reward_epochs": 4.0,
        "reward_batch_size": 32,
        "beta": 0.3,
        "lr": 1e-3,
        "epochs": None,
        "steps": 300,
        "batch_size": 32,
        "micro_batch_size": None,
    },
    "file": {
        "reward_lr": {"global": 3e-6, "local": 1e-6},
        "reward_epochs": 1.0,
        "reward_batch_size": 32,
        "beta": 0.1,
        "lr": 1e-6,
        "epochs": 1.0,
        "steps": None,
        "batch_size": 32,
        "micro_batch_size": 1,
    },
}
CLASSES = ["global", "local"]  # of reward models
ALGORITHMS = ["rloo", "grpo", "online-dpo", "rebel", "reinforce"]


def stage_2_flags():
    """The flags of stage 2 alone, as a parser of their own: stage 1 is the same run whatever they are."""
    p = ArgumentParser(add_help=False)
    rl = p.add_argument_group("stage 2: reward -> policy")
    rl.add_argument(
        "--start", type=Path, help="folder of the policy that RL starts from, e.g. DPO's (default: --init)"
    )
    rl.add_argument("--algo", default="rloo", choices=ALGORITHMS, help="see rl_loss (default: rloo)")
    rl.add_argument("--samples", type=positive(int), default=8, help="responses per prompt (default: 8)")
    rl.add_argument(
        "--kl",
        type=positive(float),
        help="strength of the regulariser (default: --beta of a local reward; else .5, a file .05)",
    )
    rl.add_argument(
        "--updates", type=positive(int), default=1, help="optimizer steps per batch of samples (default: 1)"
    )
    rl.add_argument(
        "--temperature",
        type=positive(float),
        default=1.0,
        help="of samples and of all log-probs (default: 1)",
    )
    rl.add_argument(
        "--max-new-tokens",
        type=positive(int),
        help="length of a sample (default: the longest route; 64 for a file)",
    )
    rl.add_argument(
        "--compare", type=Path, help="folder of a policy, e.g. DPO's: also record KL(that policy || ours)"
    )
    return p


def flags(argv):
    """The command line -> args."""
    p = training_parser(__doc__, Path("out/rlhf"), DEFAULTS, parents=[stage_2_flags()])
    p.add_argument(
        "--init",
        type=Path,
        default=Path("out/sft"),
        help="folder of the reference policy (default: %(default)s)",
    )
    p.add_argument(
        "--reward",
        default="global",
        help="global | local | the folder of either | module:function (default: global)",
    )
    stage_1 = p.add_argument_group("stage 1: pairs -> reward model")
    stage_1.add_argument(
        "--readout",
        default="last",
        choices=["last", "sum"],
        help="global: at the last token, or summed (last)",
    )
    stage_1.add_argument(
        "--beta", type=positive(float), help="local: scale of the reward (default: 0.3; 0.1 pretrained)"
    )
    stage_1.add_argument(
        "--reward-epochs", type=positive(float), help="passes over the pairs (default: 4; 1 pretrained)"
    )
    stage_1.add_argument(
        "--reward-lr", type=positive(float), help="default: local 1e-4, global 3e-4; pretrained 1e-6, 3e-6"
    )
    stage_1.add_argument(
        "--reward-batch-size", type=positive(int), help="pairs per optimizer step (default: 32)"
    )
    stage_1.add_argument(
        "--eval-data", type=Path, help="file of held-out pairs (default: the last 5 %% of --data)"
    )
    stage_1.add_argument("--stop-after", choices=["reward"], help="stop when stage 1 is done")
    args = p.parse_args(argv)

    kind = model_kind(args.init)
    defaults = dict(DEFAULTS[kind])
    defaults["reward_lr"] = defaults["reward_lr"]["local" if args.reward == "local" else "global"]
    if args.steps or args.epochs:  # how long stage 2 is has been said
        del defaults["steps"], defaults["epochs"]
    use_defaults(args, defaults, kind)
    check(p, args)
    return args


def check(parser, args):
    """Refuse flags that do not go together."""
    if args.algo != "reinforce" and args.samples < 2:
        parser.error(f"--samples {args.samples}: --algo {args.algo} takes at least 2")
    if args.algo == "rebel" and args.samples % 2:
        parser.error(f"--samples {args.samples}: --algo rebel takes an even number")
    if args.algo == "reinforce" and args.micro_batch_size and args.micro_batch_size < args.batch_size:
        parser.error(
            "--micro-batch-size: --algo reinforce needs the whole --batch-size at once, for its mean is the baseline"
        )
    if args.reward not in CLASSES:
        if args.stop_after:
            parser.error(f"--stop-after: --reward {args.reward} has no stage 1")
        if args.eval_data:
            parser.error(f"--eval-data: --reward {args.reward} has no stage 1")


def main(argv=None):
    """Pairs -> a reward model in OUT/reward -> a policy in OUT."""
    args = flags(argv)
    run = Run(args, stage="rlhf")  # the device, the seed, --out (refused if it holds another run)
    if run.finished:
        print(f"{run.out} is finished")
        return run.export()

    # The reference policy, and the rows as tokens: pairs, or for a given reward prompts alone.
    task = task_of(args.data)
    train_path, test_path = task.pairs(args.init, args.seed, args.eval_data)
    reference = load_policy(args.init, run.device, run.compute_dtype).requires_grad_(False)
    tokenizer_name, encoding = tokenizer.of(args.init, reference)
    limits = data.Limits(
        reference.config.block_size, args.max_prompt_tokens, args.max_response_tokens, args.skip_bad_rows
    )
    layout = layouts.preference_texts if args.reward in CLASSES else layouts.prompt_texts
    rows = data.load(train_path, layout, encoding, limits)
    if args.inspect:
        return inspect(rows, encoding)
    length = response_length(args, task, reference, rows)  # fail now, not after stage 1
    for folder in (args.start, args.compare):
        if folder:
            load_policy(folder, like=reference)

    # Stage 1: pairs -> reward.
    reward = args.reward
    if args.reward in CLASSES:
        test = data.load(test_path, layout, encoding, limits) if test_path else None
        train, test = (rows, test) if test else data.hold_out(rows, train_path)
        # A run of its own in OUT/reward. It is the same run whatever the flags of stage 2 are.
        stage_1 = run.inside(
            "reward",
            without=vars(stage_2_flags().parse_args([])),
            steps=None,
            epochs=args.reward_epochs,
            lr=args.reward_lr,
            batch_size=args.reward_batch_size,
        )
        train_reward(stage_1, tokenizer_name, train, test)
        if args.stop_after == "reward":
            return
        reward = stage_1.out

    # Stage 2: reward -> policy.
    judge = load_judge(reward, reference, args.init, encoding, args.temperature)
    train_policy(run, task, reference, judge, rows.without_duplicates(), length, tokenizer_name, encoding)


def response_length(args, task, reference, rows):
    """Tokens of a sampled response: --max-new-tokens, or what suits the task. Raises InputError where it does not fit."""
    context = reference.config.block_size
    room = context - max(len(prompt) for prompt in rows.prompts)
    length = args.max_new_tokens or task.max_new_tokens(room)
    if not 0 < length <= room:
        too_many = f"by {length - room} tokens"
        raise InputError(
            f"prompt and --max-new-tokens {length} exceed the model's context of {context} {too_many}"
        )
    return length


# ---------------------------------------------------------------- stage 1: pairs -> reward


def pair_rewards(args, model, batch, ref_logp):
    """The two reward classes, of P pairs -> (P, 2), chosen first. ref_logp (P, 2): the reference's, for the local one."""
    if args.reward == "global":
        return model(batch).view(-1, 2)  # a scalar head's output as it is
    return losses.implicit_reward(model(batch).sequence.view(-1, 2), ref_logp, args.beta)


def held_out_measures(args, model, rows, ref_logp, groups_per_pass):
    """{"eval_loss", "eval_accuracy"} of a reward model on held-out pairs."""
    if args.reward == "global":
        reward = scalar_rewards(model, rows.prompts, rows.responses, groups_per_pass)  # (P, 2)
    else:
        logp = sequence_logps(model, rows.prompts, rows.responses, groups_per_pass)  # (P, 2)
        reward = losses.implicit_reward(logp, ref_logp, args.beta)
    chosen, rejected = reward.unbind(1)
    loss = losses.bradley_terry(chosen, rejected)
    return {"eval_loss": loss.mean(), "eval_accuracy": ranked_right(chosen - rejected).mean()}


def train_reward(run, tokenizer_name, train, test):
    """Bradley-Terry maximum likelihood over the class --reward. run: OUT/reward; train, test: pairs as data Rows.

    This is train_dpo.py's loop with another loss, and for the local class not even that: DPO's loss is the Bradley-Terry
    loss of beta log pi/pi_ref, so `--reward local` ends in the very weights that train_dpo.py ends in."""
    if run.finished:
        return
    args = run.args
    groups_per_pass = args.micro_batch_size or args.batch_size

    if args.reward == "global":
        model = new_reward_model(args.init, run.device, run.compute_dtype, args.readout)
        ref_logp = torch.zeros(len(train), 2)  # this class needs no reference
        test_ref_logp = torch.zeros(len(test), 2)
    else:
        model = load_policy(args.init, run.device, run.compute_dtype)

        def reference_logps(rows):
            return sequence_logps(
                model, rows.prompts, rows.responses, groups_per_pass
            )  # (P, 2), before training

        ref_logp = run.once("ref_logp", partial(reference_logps, train), of=[model, train])
        test_ref_logp = run.once("ref_logp_test", partial(reference_logps, test), of=[model, test])

    run.describe(model, tokenizer_name, beta=args.beta, reference=str(args.init))  # config.json
    optimizer = adamw(model, args.lr, args.weight_decay)
    total = total_steps(len(train), args.batch_size, args.epochs, args.steps)
    print(f"{args.reward} reward: {len(train):,} pairs, {total} steps, {run.device}")

    for step in run.steps(model, optimizer, total):  # from the last checkpoint on
        indices = batch_indices(len(train), args.batch_size, step, args.seed)
        metrics = Mean()
        for chunk in chunks(indices, args.micro_batch_size):
            prompts, pairs = train.take(chunk)
            batch = pack(prompts, pairs, device=run.device)  # P prompts, 2P responses in the order given
            ref = upload(ref_logp[chunk], run.device)  # (P, 2)
            chosen, rejected = pair_rewards(args, model, batch, ref).unbind(1)  # (P,) each
            loss = losses.bradley_terry(chosen, rejected)  # (P,)
            (loss.sum() / len(indices)).backward()  # a mean over the pairs of the whole step
            metrics.add(loss=loss, accuracy=ranked_right(chosen - rejected))
        lr = learning_rate(args.lr, step, total, args.warmup, args.schedule)
        grad_norm = update(model, optimizer, lr, args.clip)

        row = {**metrics.means(), "grad_norm": grad_norm}
        if run.evaluates(step):
            row.update(held_out_measures(args, model, test, test_ref_logp, groups_per_pass))
        run.log(step, row, show=("loss", "accuracy"))
        run.save(step, model, optimizer)

    run.finish(model)
    last = run.last_row
    print(f"{run.out}: held-out loss {last['eval_loss']:.4f}, accuracy {last['eval_accuracy']:.3f}")


# ---------------------------------------------------------------- stage 2: reward -> policy


@dataclass
class Rollout:
    """Samples of a micro-batch of prompts, k of each, and all that the losses know of them. S = prompts x k."""

    batch: Batch  # S responses with R tokens
    ref: LogProbs  # of the reference
    reward: torch.Tensor  # (S,)
    old: LogProbs | None = None  # of the policy that sampled, from the first update on


def rl_loss(args, kl, now, rollout):
    """One loss for each response, (S,), and 1 where it is clipped, else 0: (S,), or (R,) where tokens are clipped.

    now: LogProbs of the policy, with gradient; kl: the strength of the regulariser.

        --algo       advantage of a sample, of its prompt's k         loss                                the KL is in
        reinforce    reward - mean of all samples of the batch        -A log pi, clipped if --updates     the reward
        rloo         reward - mean of the other k - 1                 the same                            the reward
        grpo         (reward - mean) / std                            clipped, per token, / length        the loss, k3 per token
        online-dpo   none: the best of the k against the worst        DPO at beta = kl                    DPO's loss
        rebel        none: sample 1 against 2, 3 against 4, ...       (log-ratio gap - reward gap)^2      the reward
    """
    k = args.samples
    never_clipped = torch.zeros_like(rollout.reward)
    # k1 inside the reward: its gradient is that of the KL (Ahmadian et al., 2402.14740). Never whitened: that would change
    # the balance of reward and KL, and with it the optimum of Theorem 2.2.
    regularised = rollout.reward - kl * losses.kl_k1(rollout.old.sequence, rollout.ref.sequence)  # (S,)

    if args.algo == "online-dpo":
        logp, ref_logp = now.sequence.view(-1, k), rollout.ref.sequence.view(-1, k)
        loss = losses.online_dpo(logp, ref_logp, rollout.reward.view(-1, k), kl)  # (prompts,)
        return loss.repeat_interleave(k), never_clipped
    if args.algo == "rebel":
        logp, old_logp = now.sequence.view(-1, 2), rollout.old.sequence.view(-1, 2)
        loss = losses.rebel(logp, old_logp, regularised.view(-1, 2), eta=1.0)  # (S / 2,)
        return loss.repeat_interleave(2), never_clipped
    if args.algo == "grpo":
        advantage = losses.grpo_advantage(rollout.reward.view(-1, k)).flatten()
        return losses.grpo(
            now.token, rollout.old.token, rollout.ref.token, advantage, rollout.batch.lengths, kl
        )

    if args.algo == "rloo":
        advantage = losses.rloo_advantage(regularised.view(-1, k)).flatten()
    else:
        advantage = losses.reinforce_advantage(regularised.view(-1, k)).flatten()
    if args.updates == 1:
        return losses.policy_gradient(now.sequence, advantage), never_clipped
    return losses.clipped_policy_gradient(
        now.sequence, rollout.old.sequence, advantage
    )  # the ratio of whole responses


def sample(args, policy, prompts, length, eos, batch_number):
    """k responses to each prompt: lists of tokens. Eight micro-batches at a time, since the cache of all responses at once
    could be larger than the model."""
    seed = args.seed * 1_000_003 + batch_number  # below 2^53
    size = 8 * args.micro_batch_size if args.micro_batch_size else None
    responses = []
    for part, chunk in enumerate(chunks(prompts, size)):
        part_seed = seed + (part << 53)
        responses += generate(policy, chunk, args.samples, length, args.temperature, eos=eos, seed=part_seed)
    return responses


@torch.no_grad()
def score(run, reference, judge, prompts, texts, responses):
    """Prompts as tokens and as texts, and their responses -> a Rollout for each micro-batch of prompts."""
    args = run.args
    rollouts = []
    for chunk in chunks(range(len(prompts)), args.micro_batch_size):
        groups = [responses[i] for i in chunk]
        batch = pack([prompts[i] for i in chunk], groups, device=run.device)
        ref = reference(batch, args.temperature)
        asked = [texts[i] for i in chunk for _ in range(args.samples)]  # S texts
        answers = [response for group in groups for response in group]  # S responses
        rollouts.append(Rollout(batch, ref, judge(batch, ref, asked, answers)))
    return rollouts


def train_policy(run, task, reference, judge, prompts, length, tokenizer_name, encoding):
    """On-policy RL: sample, score, update. prompts: data Rows, each prompt once; length: tokens of a sample, at most."""
    args = run.args
    kl = args.kl or judge.beta or task.kl  # Theorem 2.2 holds for a local reward at kl = beta
    policy = load_policy(args.start or args.init, run.device, run.compute_dtype)
    run.describe(policy, tokenizer_name, kl=kl, reference=str(args.init))  # config.json
    eos = tokenizer.eos_id(encoding)
    optimizer = adamw(policy, args.lr, args.weight_decay)
    total = total_steps(len(prompts), args.batch_size, args.epochs, args.steps)
    if not args.steps:
        total *= args.updates  # an epoch samples each prompt once
    other = samples_of_another(run, prompts, length, eos)
    print(
        f"{args.algo}: {len(prompts):,} prompts x {args.samples} samples, {total} steps, kl {kl}, {run.device}"
    )

    for step in run.steps(policy, optimizer, total):  # from the last checkpoint on
        # Sample and score. One batch of samples serves --updates optimizer steps.
        if step % args.updates == 0:
            indices = batch_indices(len(prompts), args.batch_size, step // args.updates, args.seed)
            asked, _ = prompts.take(indices)
            texts = [prompts.texts[i] for i in indices]
            with run.timed("sampling"):
                responses = sample(args, policy, asked, length, eos, step // args.updates)
            with run.timed("scoring"):
                rollouts = score(run, reference, judge, asked, texts, responses)

        # One optimizer step on all of them.
        with run.timed("training"):
            metrics = Mean()
            for rollout in rollouts:
                now = policy(rollout.batch, args.temperature)
                if (
                    rollout.old is None
                ):  # on the first update the sampler is this very policy: the ratio is exactly 1
                    rollout.old = LogProbs(now.sequence.detach(), now.token.detach())
                loss, clipped = rl_loss(args, kl, now, rollout)
                (
                    loss.sum() / (len(indices) * args.samples)
                ).backward()  # a mean over the samples of the whole step
                k1 = losses.kl_k1(now.sequence, rollout.ref.sequence)
                metrics.add(loss=loss, reward=rollout.reward, kl=k1, length=rollout.batch.lengths.float())
                metrics.add(entropy=-now.token, clip_fraction=clipped)
            lr = learning_rate(args.lr, step, total, args.warmup, args.schedule)
            grad_norm = update(policy, optimizer, lr, args.clip)

        # Write down what happened.
        row = {**metrics.means(), "grad_norm": grad_norm}
        if run.logs(step):
            row.update({f"seconds_{name}": seconds for name, seconds in run.seconds.items()})
            row.update(task.true_reward(texts, responses, encoding))  # what the reward model is a model of
        if run.evaluates(step):
            row.update(task.measure(policy, reference, encoding, args.micro_batch_size or args.batch_size))
            row.update(kl_from_another(args, policy, other))
        run.log(step, row, show=("reward", "kl"))
        if (step + 1) % args.updates == 0:  # never between two updates on the same samples
            run.save(step, policy, optimizer)

    run.finish(policy)  # model.safetensors, --export-hf
    last = run.last_row
    print(f"reward {last['reward']:.3f}, KL {last['kl']:.2f}, entropy {last['entropy']:.2f} nats per token")
    task.report(last)
    print(f"next: python sample.py --model {run.out}")


def samples_of_another(run, prompts, length, eos):
    """Of the policy --compare: (prompts, responses, log-probs), or None. KL(it || ours) needs samples of it alone."""
    args = run.args
    if not args.compare:
        return None
    policy = load_policy(args.compare, run.device, run.compute_dtype)
    asked = prompts.prompts[:256]
    responses = generate(policy, asked, 4, length, eos=eos, seed=args.seed)
    return (
        asked,
        responses,
        sequence_logps(policy, asked, responses, args.micro_batch_size or args.batch_size),
    )


def kl_from_another(args, policy, other):
    """{"kl_compare"}: KL(the policy --compare || ours) in nats, the mean of log other - log ours on samples of the other."""
    if other is None:
        return {}
    asked, responses, logp = other
    ours = sequence_logps(policy, asked, responses, args.micro_batch_size or args.batch_size)
    return {"kl_compare": losses.kl_k1(logp, ours).mean()}


if __name__ == "__main__":
    run_script(main)
