"""PPO with a critic (Schulman et al., 1707.06347): stage 2 of train_rlhf.py with a second network in place of the other
samples of a prompt as the baseline. It needs more code and more memory; does it earn more?

    python experiments/ppo.py                                         about 25 s on two CPU cores
    python experiments/ppo.py --init out/sft --reward out/rlhf/reward --kl 0.5 --updates 2

What differs from train_rlhf.py --algo rloo: the KL term is paid token by token, the critic V(s_t) starts as the reward
model, advantages are GAE's and whitened, and a batch of samples serves `updates` clipped steps.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanoroads import common, evaluate, losses, roadmap, tokenizer  # noqa: E402
from nanoroads.batch import pack  # noqa: E402
from nanoroads.checkpoint import finish, load_fitting, load_model, save_config  # noqa: E402
from nanoroads.generate import generate  # noqa: E402


def gae(reward, value, gamma, lam):
    """Generalised advantage estimates (Schulman et al., 1506.02438, eq. 16). reward, value (S, L), zero behind each
    response's end -> advantage (S, L), zero there too."""
    advantage, running, following = torch.zeros_like(value), 0.0, 0.0
    for t in reversed(range(value.shape[1])):
        delta = reward[:, t] + gamma * following - value[:, t]
        running = delta + gamma * lam * running
        advantage[:, t], following = running, value[:, t]
    return advantage


def values(critic, batch):
    """V(s_t) of the state before each response token, (R,)."""
    hidden = critic.trunk(batch.tokens, batch.position, batch.mask()).flatten(0, 1)  # (B*T, D)
    return (torch.nn.functional.embedding(batch.rows, hidden) * critic.scalar_head.weight).sum(-1)  # fp32, also under autocast


def flags(argv):
    p = common.parser(__doc__, {}, out=Path("out/ppo"), lr=1e-3, batch_size=32)
    p.add_argument("--init", type=Path, default=Path("out/sft"), help="reference and first policy (default: %(default)s)")
    p.add_argument("--reward", type=Path, default=Path("out/rlhf/reward"), help="reward model (default: %(default)s)")
    p.add_argument("--samples", type=common.positive(int), default=8, help="responses a prompt (default: %(default)s)")
    p.add_argument("--kl", type=common.positive(float), default=0.5, help="strength of the regulariser (default: %(default)s)")
    p.add_argument("--updates", type=common.positive(int), default=1, help="steps on each batch (default: %(default)s)")
    p.add_argument("--critic-lr", type=common.positive(float), default=1e-3, help="(default: %(default)s)")
    p.add_argument("--gamma", type=common.positive(float), default=1.0, help="discount (default: %(default)s)")
    p.add_argument("--gae-lambda", type=common.positive(float), default=0.95, help="(default: %(default)s)")
    args = p.parse_args(argv)
    for flag in ("resume", "inspect", "epochs", "micro_batch_size", "compile", "profile", "export_hf"):
        if getattr(args, flag):
            p.error(f"--{flag.replace('_', '-')}: not in this experiment, which runs from the beginning to the end in one piece")
    args.steps = args.steps or 300
    return args


def main(argv=None):
    args = flags(argv)
    device, world = common.pick_device(args), roadmap.WORLDS.get(args.data)
    if world is None:
        raise common.InputError(f"--data {args.data}: this experiment runs on the built-in map")
    common.make_map_inputs(args)
    stage_1 = ["train_rlhf.py", "--data", args.data, "--init", args.init, "--stop-after", "reward", "--out", args.reward.parent]
    if args.reward.name == "reward":  # what train_rlhf.py calls it
        common.make_with([*stage_1, "--resume", "--seed", args.seed], args.reward / "model.safetensors")
    out = common.open_run(args, "ppo")
    torch.manual_seed(args.seed)
    policy, reference = (load_model(args.init, device=device) for _ in range(2))
    critic, reward_model = (load_fitting(args.reward, device, like=policy, head="scalar") for _ in range(2))
    save_config(out, args, "ppo", policy, "roadmap", kl=args.kl, reference=str(args.init))
    optimizers = [(policy, common.make_optimizer(args, policy))]
    critic_args = argparse.Namespace(**vars(args) | {"lr": args.critic_lr})
    optimizers.append((critic, common.make_optimizer(critic_args, critic)))
    encoding, prompts = tokenizer.get("roadmap"), roadmap.prompts(world, "train")
    ids, eos, k = [tokenizer.encode(encoding, p) for p in prompts], tokenizer.eos_id(encoding), args.samples

    for step in (bar := common.progress(0, args.steps, "ppo")):
        if step % args.updates == 0:
            round_ = step // args.updates
            some = common.batch_indices(len(ids), args.batch_size, round_, args.seed)
            seed = args.seed * 1_000_003 + round_
            with common.autocast(args, device):
                responses = generate(policy, [ids[i] for i in some], k, world.max_moves + 1, eos=eos, seed=seed)
            batch = pack([ids[i] for i in some], responses, device=device)
            lengths, real = batch.lengths.tolist(), pad_sequence([torch.ones(n) for n in batch.lengths], batch_first=True) > 0
            with torch.no_grad(), common.autocast(args, device):
                old, ref, value = policy(batch)[1], reference(batch)[1], values(critic, batch)  # (R,)
                score = reward_model(batch)  # (S,)
            reward = -args.kl * losses.kl_k1(old, ref)  # (R,): each token pays for itself
            reward[batch.cu_seqlens[1:].long() - 1] += score  # the last one is paid
            padded = [pad_sequence(x.split(lengths), batch_first=True) for x in (reward, value)]  # (S, L)
            advantage = gae(*padded, args.gamma, args.gae_lambda)[real.to(device)]  # (R,)
            wanted = advantage + value
            advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        with common.autocast(args, device):
            logp, token_logp = policy(batch)
            loss, clipped = losses.clipped_policy_gradient(token_logp, old, advantage)  # (R,)
            critic_loss = 0.5 * (values(critic, batch) - wanted) ** 2  # (R,)
        (loss.mean() + critic_loss.mean()).backward()
        norms = [common.update(args, *pair, step, args.steps) for pair in optimizers]

        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            kl = losses.kl_k1(old, ref).sum() / len(lengths)
            row = {"loss": loss.detach().mean(), "critic_loss": critic_loss.detach().mean(), "reward": score.mean(), "kl": kl}
            row |= {"clip_fraction": clipped.mean(), "grad_norm": norms[0]}
            if done % args.eval_every == 0 or done == args.steps:
                test = roadmap.prompts(world, "test")
                seen = evaluate.on_map(policy, reference, world, encoding, test, args, device)
                row |= {f"map_{name}": sum(v) / len(v) for name, v in seen.items()}
            row = common.log_metrics(out, done, row)
            bar.set_postfix(reward=row["reward"], kl=row["kl"])
    finish(out, policy)
    print(f"on the map: true reward {row['map_reward']:.3f}, greedy {row['map_greedy_reward']:.3f}, KL {row['map_kl']:.2f}")
    print(f"next: python train_rlhf.py --init {args.init} --reward {args.reward}    or: python sample.py --model {out}")


if __name__ == "__main__":
    common.run_script(main)
