"""DPO on pairs of the policy's own samples, drawn anew in rounds: the loop of experiments/on_policy.py.

No command does this: train_dpo.py takes pairs that were drawn before it starts."""

from argparse import Namespace

from nanoroads import losses
from nanoroads.batch import pack
from nanoroads.experiments.own_pairs import draw_labelled
from nanoroads.progress import tracked
from nanoroads.report.evidence import PAIRS
from nanoroads.report.judged import pairs_as_tokens, read_pairs
from nanoroads.run.optim import adamw, batch_indices, learning_rate, total_steps, update
from nanoroads.score import sequence_logps
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import read_config


def train_on_policy(folder, seed, rounds, run):
    """DPO whose pairs are drawn from the policy itself, anew at the start of each round.

    The first round has the first of SFT's pairs, so one round is `run`, DPO on SFT's samples, whose
    flags and budget this has. Returns (policy, all pairs, round after round)."""
    flags = Namespace(**read_config(folder / run)["args"])
    reference = load_policy(folder / "sft").requires_grad_(False)
    policy = load_policy(folder / "sft")
    optimizer = adamw(policy, flags.lr, flags.weight_decay)  # one over all rounds
    total = total_steps(PAIRS, flags.batch_size, flags.epochs, flags.steps)
    used = []
    # The rounds share the pairs and the steps of one run.
    for round_index in tracked(range(rounds), f"seed {seed}, {rounds} rounds", "round"):
        n = PAIRS * (round_index + 1) // rounds - len(used)
        if round_index == 0:
            pairs = read_pairs(folder / "sft/pairs.jsonl")[:n]
        else:
            pairs = draw_labelled(policy, n, "train", seed, rounds, round_index)
        used += pairs

        prompts, responses = pairs_as_tokens(pairs)
        ref_logp = sequence_logps(reference, prompts, responses, flags.batch_size)  # (n, 2)
        begin = total * round_index // rounds
        end = total * (round_index + 1) // rounds
        for step in range(begin, end):
            indices = batch_indices(n, flags.batch_size, step - begin, flags.seed)
            batch = pack([prompts[i] for i in indices], [responses[i] for i in indices])
            chosen, rejected = policy(batch).sequence.view(-1, 2).unbind(1)  # (B,) each
            ref_chosen, ref_rejected = ref_logp[indices].unbind(1)
            loss = losses.dpo(chosen, rejected, ref_chosen, ref_rejected, flags.beta)  # (B,)
            loss.mean().backward()
            lr = learning_rate(flags.lr, step, total, flags.warmup, flags.schedule)
            update(policy, optimizer, lr, flags.clip)
    return policy, used
