"""Local rewards generalise better than DPO's implicit one, but global ones no better than local (H5).

    python experiments/reward_classes.py --seeds 0 1 2    about 110 seconds a seed on two cores

Swamy et al., 2503.01067, H5: in held-out likelihood and best of N, DPO's implicit reward < local
< global. The notebook of their code has three classes more; PAPER below has its held-out
accuracies. Here all six are trained by Bradley-Terry on the same 5,000 pairs for four epochs, from
the same SFT policy on:

global  a scalar head (train_rlhf.py)
local   beta log pi, without a reference (train_dpo.py --loss reference-free)
last    beta log pi of the last token, EOS, alone: is this a place to stop?
prefix  beta log pi of all tokens before it, so local is the sum of these two. They do not say what
        their "prefix" is; this is our reading. Both are trained by the loop below.
length  beta log pi / length (train_dpo.py --loss simpo, no target margin)
dpo     beta log pi / pi_ref (train_dpo.py)

Tuned on seed 100 by held-out loss, three settings a class (rates and betas; global: rates), but
DPO by true reward, nine settings (sweep.md).

Result, three seeds: local is better than DPO by each measure but accuracy on noisy labels (+.015
± .014); global is not better than local by any. The best of all in best of 16 is a local class:
local / length has .567, global .489, the truth .584. The two parts of local alone are worth little
there (.115, .205; one sample .183): less than log pi_ref, the reference's row (.295).
"""

import torch

from nanoroads import losses
from nanoroads.batch import pack
from nanoroads.report import evidence
from nanoroads.report.drawing import INK, new_figure
from nanoroads.report.evidence import differences, is_above, over_seeds, values_of, with_errors
from nanoroads.report.figures import label_ends
from nanoroads.report.judged import WORLD, pair_measures, pairs_of, samples_of
from nanoroads.report.measures import BEST_OF, best_of_n
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.report.write import plus_minus, table
from nanoroads.run.flags import run_script
from nanoroads.run.optim import adamw, batch_indices, learning_rate, total_steps, update
from nanoroads.score import GROUPS_PER_PASS, batches, scalar_rewards
from nanoroads.weights.checkpoint import load_policy, load_reward_model

PAPER = {"global": 0.633, "local": 0.618, "last": 0.595, "prefix": 0.574, "length": 0.570, "dpo": 0.526}
LADDER = list(PAPER)  # the classes, the paper's best first
BETA = {"local": 0.1, "last": 0.33, "prefix": 0.1, "length": 2.0, "dpo": 0.3, "reference": 1.0}
LR = 1e-4
EPOCHS = 4
BATCH = 32  # pairs a step
SAMPLES = 64  # of the SFT policy for each held-out prompt
COLUMNS = {  # of the table, and where a class's row has them
    "nll": ["nll"],
    "nll, rescaled": ["nll_rescaled"],
    "accuracy": ["accuracy"],
    "true order": ["true_order"],
}
for n in BEST_OF:
    COLUMNS[f"best of {n}"] = ["best_of_n", str(n)]
LADDER_COLOURS = ["#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#0072b2"]


def phases_of(folder, seed):
    """The shared runs, and the two local classes that train_dpo.py knows."""
    train = ["train_dpo.py", "--seed", seed, "--data", "roadmap", "--init", folder / "sft"] + evidence.DPO
    local = train + ["--loss", "reference-free", "--beta", BETA["local"]]
    length = train + ["--loss", "simpo", "--gamma", 0, "--beta", BETA["length"]]
    pairs = ["sft/pairs.jsonl"]
    return evidence.shared_phases(folder, seed, "dpo", "rlhf_global") + [
        new_phase(folder, "local_beta_0.1", local, pairs),
        new_phase(folder, "length_beta_2", length, pairs),
    ]


def local_reward(name, policy, batch):
    """What a local class says of S responses, (S,); of DPO's policy without the reference's part."""
    logps = policy(batch)
    last = logps.token[batch.cu_seqlens[1:].long() - 1]
    if name == "last":
        return BETA[name] * last
    if name == "prefix":
        return BETA[name] * (logps.sequence - last)
    if name == "length":
        return BETA[name] * logps.sequence / batch.lengths
    return BETA[name] * logps.sequence


def train(name, policy, pairs, seed):
    """Bradley-Terry on a local class: train_dpo.py's loop with another reward."""
    optimizer = adamw(policy, LR, weight_decay=0.0)
    steps = total_steps(len(pairs), BATCH, EPOCHS)
    for step in range(steps):
        prompts, responses = pairs.take(batch_indices(len(pairs), BATCH, step, seed))
        batch = pack(prompts, responses)
        chosen, rejected = local_reward(name, policy, batch).view(-1, 2).unbind(1)  # (P,) each
        losses.bradley_terry(chosen, rejected).mean().backward()
        update(policy, optimizer, learning_rate(LR, step, steps, 10, "cosine"), clip=1.0)
    return policy


@torch.no_grad()
def rewards(name, models, prompts, responses):
    """Rewards (G, K) of G groups of K responses by a class; "reference": log pi_ref."""
    if name == "global":
        return scalar_rewards(models[name], prompts, responses)
    parts = []
    for batch in batches(models[name], prompts, responses, GROUPS_PER_PASS):
        parts.append(local_reward(name, models[name], batch))
    reward = torch.cat(parts).view(len(prompts), -1)
    if name == "dpo":
        reward -= BETA[name] * rewards("reference", models, prompts, responses)
    return reward


def measure(folder, seed):
    """{class: measures on held-out pairs, and the best of N of SFT's samples for held-out prompts}."""
    sft = folder / "sft"
    context = load_policy(sft).config.block_size
    pairs, _ = pairs_of(sft / "pairs.jsonl", context)
    models = {
        "reference": load_policy(sft),
        "global": load_reward_model(folder / "rlhf_global/reward"),
        "local": load_policy(folder / "local_beta_0.1"),
        "last": train("last", load_policy(sft), pairs, seed),
        "prefix": train("prefix", load_policy(sft), pairs, seed),
        "length": load_policy(folder / "length_beta_2"),
        "dpo": load_policy(folder / "dpo"),
    }

    test, true_margin = pairs_of(sft / "pairs_test.jsonl", context)
    prompts, samples, truth = samples_of(models["reference"], SAMPLES, seed)
    row = {"truth": pair_measures(WORLD.bt_scale * true_margin, true_margin)}
    row["truth"]["best_of_n"] = best_of_n(truth, truth)
    for name in LADDER + ["reference"]:
        chosen, rejected = rewards(name, models, test.prompts, test.responses).unbind(1)  # (P,) each
        row[name] = pair_measures(chosen - rejected, true_margin)
        row[name]["best_of_n"] = best_of_n(rewards(name, models, prompts, samples), truth)
    return row


def lead(by_seed, one, other, column):
    """{"mean", "se"} over seeds of how much better one class is; of a loss, less is better."""
    ours = values_of(by_seed, one, *COLUMNS[column])
    theirs = values_of(by_seed, other, *COLUMNS[column])
    if column.startswith("nll"):
        return differences(theirs, ours)
    return differences(ours, theirs)


def ordered(by_seed, column):
    """The classes, that with the largest mean over seeds first."""
    means = {name: over_seeds(by_seed, name, *COLUMNS[column])["mean"] for name in LADDER}
    return sorted(LADDER, key=means.get, reverse=True)


def verdict(by_seed):
    """A line for each claim."""
    lines = []
    for column in ("nll", "nll, rescaled", "best of 16"):
        over_dpo = lead(by_seed, "local", "dpo", column)
        over_local = lead(by_seed, "global", "local", column)
        text = f"H5 by {column}: local is better than DPO by {with_errors(over_dpo)}, and global "
        text += f"than local by {with_errors(over_local)}."
        lines.append(evidence.claim(is_above(over_dpo) and is_above(over_local), text))
    order = ordered(by_seed, "accuracy")
    text = f"held-out accuracy has the order of the paper's ladder; here it is {', '.join(order)}."
    lines.append(evidence.claim(order == LADDER, text))
    best = ordered(by_seed, "best of 16")[0]
    ahead = with_errors(lead(by_seed, best, "global", "best of 16"))
    text = f"global is the best of the six in best of 16; here {best} is, ahead of it by {ahead}."
    lines.append(evidence.claim(best == "global", text))
    return lines


def table_of(by_seed):
    """A line a class."""
    lines = []
    for name in LADDER + ["reference", "truth"]:
        cells = [plus_minus(over_seeds(by_seed, name, *path)) for path in COLUMNS.values()]
        lines.append([name] + cells)
    return table(["reward"] + list(COLUMNS), lines)


def figure_of(by_seed):
    """The ladder's accuracies, and best of N."""
    fig, (ladder, best) = new_figure(11, 4.2, ncols=2)
    ends = {}  # {class: (where its line ends, colour)}
    for name, colour in zip(LADDER + ["truth"], LADDER_COLOURS + [INK], strict=True):
        means = [over_seeds(by_seed, name, "best_of_n", str(n))["mean"] for n in BEST_OF]
        best.plot(BEST_OF, means, "o-", ms=3, color=colour)
        ends[name] = (means[-1], colour)
        cell = over_seeds(by_seed, name, "accuracy")
        ladder.errorbar(name, cell["mean"], cell["se"], fmt="o", color=colour, capsize=3)
    ladder.plot(LADDER, list(PAPER.values()), ":", color=INK, label="the paper's, on summaries")
    ladder.set(ylabel="accuracy on held-out labels", title="The ladder")
    ladder.legend()
    best.set_xscale("log", base=2)
    best.set_xticks(BEST_OF, [str(n) for n in BEST_OF])
    best.set(xlabel="N samples of the SFT policy", ylabel="true reward of the favourite", title="Best of N")
    label_ends(best, BEST_OF[-1], ends)
    return fig


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    by_seed = []
    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        run_phases(phases_of(folder, seed), args.out, args.jobs, lock)
        by_seed.append(measure(folder, seed))
    results = table_of(by_seed), verdict(by_seed), figure_of(by_seed)
    evidence.write_results(args, "reward_classes", __doc__, by_seed, *results)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
