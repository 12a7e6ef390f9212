"""PPO with a critic (Schulman et al., 1707.06347): stage 2 of train_rlhf.py with another baseline.

    python experiments/ppo.py                                         about 30 s on two CPU cores
    python experiments/ppo.py --init out/sft --reward out/rlhf/reward --kl 0.5 --updates 2

RLOO's baseline is the mean reward of a prompt's other samples. PPO's is a second network, the
critic. That takes more code and more memory; does it earn more?

What differs from `train_rlhf.py --algo rloo`:

    KL term       paid token by token, where RLOO charges the whole response at once
    critic        V(s_t), the expected reward from here on; it starts as the reward model
    advantage     of each token, by GAE, then whitened over the batch
    clipping      of each token's ratio, so that one batch of samples serves `--updates` steps
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from nanoroads import losses, randomness
from nanoroads.batch import Batch, pack
from nanoroads.errors import InputError
from nanoroads.generate import generate
from nanoroads.model import LogProbs
from nanoroads.run.commands import data_flag, make_if_missing, print_next
from nanoroads.run.flags import SEED, Parser, add_machine_flags, non_negative, positive, run_script
from nanoroads.run.optim import Mean, adamw, batch_indices, learning_rate, update
from nanoroads.run.run import Run
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_policy, load_reward_model
from nanoroads.world import roadmap
from nanoroads.world.task import task_of


def flags(argv):
    """The command line -> args."""
    parser = Parser(description=__doc__)
    add_run_flags(parser.add_argument_group("the run"))
    add_algorithm_flags(parser.add_argument_group("the algorithm"))
    add_optimizer_flags(parser.add_argument_group("the optimizers, of policy and critic"))
    add_machine_flags(parser.add_argument_group("the machine"))

    # What Run can do and this experiment does not offer. To resume, it would have to save the
    # critic and the critic's optimizer as well.
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(inspect=False, compile=False, fsdp=False, profile=False, export_hf=None, track=None)
    parser.set_defaults(lora=None, checkpoint_activations=False)
    args = parser.parse_args(argv)
    if args.resume:
        parser.error(
            "--resume: not in this experiment, which runs from the beginning to the end in one piece"
        )
    if args.data not in roadmap.WORLDS:
        parser.error(f"--data {args.data}: this experiment runs on the built-in map")
    return args


def add_run_flags(group):
    """What goes in, and where the result goes."""
    add = group.add_argument
    out, init, reward = Path("out/ppo"), Path("out/sft"), Path("out/rlhf/reward")
    add("--out", type=Path, default=out, help="directory of the run (default: %(default)s)")
    add("--data", default="roadmap", help="a world of the map: roadmap[-short|-hidden] (default: roadmap)")
    add("--init", type=Path, default=init, help="reference and first policy (default: %(default)s)")
    add("--reward", type=Path, default=reward, help="folder of the reward model (default: %(default)s)")
    add("--seed", type=SEED, default=0, help="seed of data order and samples (default: 0)")
    add("--log-every", type=positive(int), default=10, help="steps per line of metrics.jsonl (default: 10)")
    add("--eval-every", type=positive(int), default=100, help="steps between evaluations (default: 100)")


def add_algorithm_flags(group):
    """PPO's own numbers."""
    add = group.add_argument
    add("--samples", type=positive(int), default=8, help="responses per prompt (default: 8)")
    add("--kl", type=positive(float), default=0.5, help="strength of the regulariser (default: 0.5)")
    add("--updates", type=positive(int), default=1, help="optimizer steps per batch of samples (default: 1)")
    add("--gamma", type=positive(float), default=1.0, help="discount per token (default: 1)")
    add("--gae-lambda", type=positive(float), default=0.95, help="lambda of gae (default: 0.95)")


def add_optimizer_flags(group):
    """The flags of both optimizers, which differ in their peak rate alone."""
    add = group.add_argument
    rates = ["cosine", "constant"]
    add("--steps", type=positive(int), default=300, help="number of optimizer steps (default: 300)")
    add("--batch-size", type=positive(int), default=32, help="prompts per optimizer step (default: 32)")
    add("--lr", type=positive(float), default=1e-3, help="the policy's peak learning rate (default: 0.001)")
    add("--critic-lr", type=positive(float), default=1e-3, help="the critic's (default: 0.001)")
    add("--schedule", default="cosine", choices=rates, help="after the warm-up (default: cosine)")
    add("--warmup", type=non_negative(int), default=10, help="steps of linear warm-up (default: 10)")
    add("--weight-decay", type=non_negative(float), default=0.0, help="weight decay of AdamW (default: 0)")
    add("--clip", type=positive(float), default=1.0, help="largest gradient norm (default: 1)")


# ---------------------------------------------------------------- advantages


def gae(reward, value, gamma, lam):
    """Generalised advantage estimates (Schulman et al., 1506.02438, eq. 16):

        A_t = delta_t + gamma lam A_(t+1),    delta_t = r_t + gamma V(s_(t+1)) - V(s_t)

    reward, value (S, L), zero behind each response's end -> advantage (S, L), zero there too."""
    advantage = torch.zeros_like(value)
    next_advantage = 0.0
    next_value = 0.0
    for t in reversed(range(value.shape[1])):
        delta = reward[:, t] + gamma * next_value - value[:, t]  # (S,)
        next_advantage = delta + gamma * lam * next_advantage
        next_value = value[:, t]
        advantage[:, t] = next_advantage
    return advantage


def values(critic, batch):
    """V(s_t) of the state before each response token, (R,) fp32 whatever the compute dtype."""
    with critic.autocast():
        hidden = critic.trunk(batch.tokens, batch.position, batch.attend)  # (N, D)
        states = torch.nn.functional.embedding(batch.rows, hidden)  # (R, D), hidden[batch.rows]
        return (states * critic.scalar_head.weight).sum(-1)


def padded(token_values, is_token):
    """Values of the tokens of S responses (R,) -> (S, L), zero where is_token (S, L) is False."""
    rows = token_values.new_zeros(is_token.shape)
    rows[is_token] = token_values
    return rows


# ---------------------------------------------------------------- the run


@dataclass
class Rollout:
    """Samples of a batch of prompts, k of each, and all that both losses know of them."""

    batch: Batch  # S responses with R tokens, S = prompts x k
    old: LogProbs  # of the policy that sampled
    ref: LogProbs  # of the reference
    reward: torch.Tensor  # (S,) what the reward model says
    advantage: torch.Tensor  # (R,) whitened
    value_target: torch.Tensor  # (R,) what the critic should say


@torch.no_grad()
def score(run, policy, reference, critic, reward_model, prompts, responses):
    """Prompts and their responses, as tokens -> a Rollout."""
    args = run.args
    batch = pack(prompts, responses, device=run.device)
    old = policy(batch)
    ref = reference(batch)
    value = values(critic, batch)  # (R,)
    response_reward = reward_model(batch)  # (S,)

    # Each token pays for its own log-ratio to the reference. The last one of a response also earns
    # the response's whole reward.
    token_reward = -args.kl * losses.kl_k1(old.token, ref.token)  # (R,)
    last_token = batch.cu_seqlens[1:].long() - 1  # (S,)
    token_reward[last_token] += response_reward

    column = torch.arange(int(batch.lengths.max()), device=run.device)
    is_token = column < batch.lengths[:, None]  # (S, L), False behind each response's end
    reward_rows = padded(token_reward, is_token)  # (S, L)
    value_rows = padded(value, is_token)  # (S, L)
    advantage = gae(reward_rows, value_rows, args.gamma, args.gae_lambda)[is_token]  # (R,)
    whitened = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    return Rollout(batch, old, ref, response_reward, whitened, value_target=advantage + value)


def main(argv=None):
    """A reference policy and a reward model -> a policy in --out."""
    args = flags(argv)
    run = Run(args, stage="ppo")  # the device, the seed, --out (refused if it holds another run)

    # The reference and the reward model, made if they are missing, as train_rlhf.py makes them.
    task = task_of(args.data)
    task.reference(args.init, args.seed)
    if args.reward.name == "reward":  # what train_rlhf.py calls it
        stage_1 = ["train_rlhf.py", "--data", args.data, "--init", args.init, "--stop-after", "reward"]
        stage_1 += ["--out", args.reward.parent, "--resume", "--seed", args.seed]
        make_if_missing(args.reward / "model.safetensors", stage_1)

    reference = load_policy(args.init, run.device, run.compute_dtype).requires_grad_(False)
    reward_model = load_scalar(args.reward, reference).requires_grad_(False)
    for folder in (args.init, args.reward):
        tokenizer.check_same(folder, tokenizer.get("roadmap"), "the map")
    train_policy(run, task, reference, reward_model)
    rloo = ["train_rlhf.py", "--init", args.init, "--reward", args.reward]  # the same with RLOO
    print_next(rloo + data_flag(args.data), ["sample.py", "--model", run.out])


def load_scalar(folder, reference):
    """A reward model with a scalar head that can read the reference's batches.

    Raises InputError for any other."""
    device = reference.embedding.weight.device
    model = load_reward_model(folder, device, reference.compute_dtype, like=reference)
    if model.config.head != "scalar":
        raise InputError(f"{folder}: not a reward model")
    return model


def train_policy(run, task, reference, reward_model):
    """On-policy RL: sample, score, update the policy and the critic."""
    args = run.args
    policy = load_policy(args.init, run.device, run.compute_dtype)
    critic = load_scalar(args.reward, reference)
    run.describe(policy, "roadmap", kl=args.kl, reference=str(args.init))  # config.json
    optimizer = adamw(policy, args.lr, args.weight_decay)
    critic_optimizer = adamw(critic, args.critic_lr, args.weight_decay)

    encoding = tokenizer.get("roadmap")
    eos = tokenizer.stop_ids(encoding)
    length = task.world.max_moves + 1  # of a sample, in tokens
    prompts = [tokenizer.encode(encoding, text) for text in roadmap.prompts(task.world, "train")]

    for step in run.steps(policy, optimizer, args.steps):
        # Sample and score. One batch of samples serves --updates optimizer steps.
        if step % args.updates == 0:
            batch_number = step // args.updates
            indices = batch_indices(len(prompts), args.batch_size, batch_number, args.seed)
            step_prompts = [prompts[i] for i in indices]
            seed = randomness.stream_key("responses", args.seed, batch_number)
            responses = generate(policy, step_prompts, args.samples, length, eos=eos, seed=seed)
            rollout = score(run, policy, reference, critic, reward_model, step_prompts, responses)

        # One optimizer step of both networks. Each loss is a mean over the tokens of all samples.
        metrics = Mean()
        now = policy(rollout.batch)
        # (R,) each: the ratio of single tokens, where train_rlhf.py has that of whole responses.
        loss, clipped = losses.clipped_policy_gradient(now.token, rollout.old.token, rollout.advantage)
        value = values(critic, rollout.batch)  # (R,)
        critic_loss = 0.5 * (value - rollout.value_target) ** 2  # (R,)
        (loss.mean() + critic_loss.mean()).backward()  # the two networks share no parameter
        k1 = losses.kl_k1(rollout.old.sequence, rollout.ref.sequence)  # (S,)
        metrics.add(loss=loss, critic_loss=critic_loss, reward=rollout.reward, kl=k1, clip_fraction=clipped)
        lr = learning_rate(args.lr, step, args.steps, args.warmup, args.schedule)
        grad_norm = update(policy, optimizer, lr, args.clip)
        critic_lr = learning_rate(args.critic_lr, step, args.steps, args.warmup, args.schedule)
        update(critic, critic_optimizer, critic_lr, args.clip)

        # Write down what happened.
        row = {**metrics.means(), "grad_norm": grad_norm}
        if run.evaluates(step):
            row.update(task.measure(policy, reference, encoding, args.batch_size))
        run.log(step, row, show=("reward", "kl"))

    run.finish(policy)  # model.safetensors
    task.report(run.last_row)


if __name__ == "__main__":
    run_script(main, resumes=False, less_memory="a smaller --batch-size")
