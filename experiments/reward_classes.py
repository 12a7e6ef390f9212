"""Rewards generalise better from DPO's implicit one to local to global ones, as a ladder (H5).

    python experiments/reward_classes.py --seeds 0 1 2    about 45 s a seed after hypotheses.py

Swamy et al., 2503.01067, H5: in held-out likelihood and best of N, DPO's implicit reward < local
< global. The notebook of their code has three classes more; PAPER below has its held-out
accuracies. Here all six are trained by Bradley-Terry on the same 5,000 pairs for four epochs, from
the same SFT policy on: a scalar head (global), log pi without a reference (local), log pi of the
last token alone and of all before it (prefix), log pi / length, and DPO's. Their formulas and the
loop that trains the parts are in nanoroads/experiments/local_rewards.py.

Result, three seeds: local is better than DPO by nll and best of 16. That global is better than
local is undecided (nll +.007 ± .007, best of 16 -.053 ± .029). The ladder is refuted in accuracy,
and in best of 16 local / length is ahead of global by .078 ± .031.

Settings that were tried, and what it does not show: experiments/README.md
"""

from nanoroads.experiments.local_rewards import rewards, train
from nanoroads.experiments.reward_classes import better_by, figure_of, neighbours, ordered, table_of
from nanoroads.report import evidence
from nanoroads.report.cells import above, claim, every, least_sure, with_errors
from nanoroads.report.judged import WORLD, pair_measures, pairs_of, samples_of
from nanoroads.report.measures import best_of_n
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.run.flags import run_script
from nanoroads.weights.checkpoint import load_policy, load_reward_model

# The paper's held-out accuracies on summaries, best first.
PAPER = {"global": 0.633, "local": 0.618, "last": 0.595, "prefix": 0.574, "length": 0.570, "dpo": 0.526}
LADDER = list(PAPER)
BETA = {"local": 0.1, "last": 0.33, "prefix": 0.1, "length": 2.0, "dpo": 0.3, "reference": 1.0}  # log pi_ref
# Of last and prefix, which no other script trains: the same as train_dpo.py's defaults.
LR, EPOCHS = 1e-4, 4
SAMPLES = 64  # of the SFT policy for each held-out prompt


def phases_of(folder, seed):
    """The shared runs, and the two local classes that train_dpo.py knows."""
    dpo = ["train_dpo.py", "--seed", seed, "--data", "roadmap", "--init", folder / "sft"] + evidence.DPO
    local = dpo + ["--loss", "reference-free", "--beta", BETA["local"]]
    length = dpo + ["--loss", "simpo", "--gamma", 0, "--beta", BETA["length"]]
    pairs = ["sft/pairs.jsonl"]
    return evidence.shared_phases(folder, seed, "dpo", "rlhf_global") + [
        new_phase(folder, "local_beta_0.1", local, pairs),
        new_phase(folder, "length_beta_2", length, pairs),
    ]


def measure(folder, seed):
    """{class: measures on held-out pairs, and the best of N of SFT's samples for held-out prompts}."""
    sft = folder / "sft"
    context = load_policy(sft).config.block_size
    pairs, _ = pairs_of(sft / "pairs.jsonl", context)
    models = {
        "reference": load_policy(sft),
        "global": load_reward_model(folder / "rlhf_global/reward"),
        "local": load_policy(folder / "local_beta_0.1"),
        "length": load_policy(folder / "length_beta_2"),
        "dpo": load_policy(folder / "dpo"),
    }
    for name in ("last", "prefix"):
        models[name] = train(name, BETA[name], load_policy(sft), pairs, seed, LR, EPOCHS)

    test, true_margin = pairs_of(sft / "pairs_test.jsonl", context)
    prompts, samples, truth = samples_of(models["reference"], SAMPLES, seed)
    row = {"truth": pair_measures(WORLD.bt_scale * true_margin, true_margin)}
    row["truth"]["best_of_n"] = best_of_n(truth, truth)
    for name in LADDER + ["reference"]:
        chosen, rejected = rewards(name, BETA, models, test.prompts, test.responses).unbind(1)  # (P,) each
        row[name] = pair_measures(chosen - rejected, true_margin)
        row[name]["best_of_n"] = best_of_n(rewards(name, BETA, models, prompts, samples), truth)
    return row


def verdict(by_seed):
    """A line for each claim."""
    lines = []
    for one, other in (("local", "dpo"), ("global", "local")):
        for column in ("nll", "nll, rescaled", "best of 16"):
            better = better_by(by_seed, one, other, column)
            text = f"H5: {one} is better than {other} by {column}: {with_errors(better)}."
            lines.append(claim(above(better), text))
    steps = neighbours(by_seed, LADDER, "accuracy")
    text = "H5: held-out accuracy has the order of the paper's ladder, each step by "
    text += "; ".join(f"{pair} {with_errors(cell)}" for pair, cell in steps.items())
    text += f". Here it is {', '.join(ordered(by_seed, LADDER, 'accuracy'))}."
    lines.append(claim(every(map(above, steps.values())), text))
    ahead = {name: better_by(by_seed, "global", name, "best of 16") for name in LADDER[1:]}
    least = least_sure(ahead)
    text = f"H5: global is the best of the six in best of 16: its least sure lead, over {least}: "
    lines.append(claim(every(map(above, ahead.values())), f"{text}{with_errors(ahead[least])}."))
    return lines


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    by_seed = []
    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        run_phases(phases_of(folder, seed), args.out, args.jobs, lock)
        by_seed.append(measure(folder, seed))
    results = table_of(by_seed, LADDER), verdict(by_seed), figure_of(by_seed, PAPER)
    evidence.write_results(args, "reward_classes", __doc__, by_seed, *results)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
