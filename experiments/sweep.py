"""Tune each road in each world, on a seed that no reported result uses.

    python experiments/sweep.py                 about six minutes on two CPU cores
    PYTHONPATH=. python experiments/sweep.py    the same in a checkout that is not installed

Each road has the same number of settings to choose from, nine. DPO: beta x learning rate. RLHF:
three learning rates of the reward model, by held-out likelihood, then kl x learning rate of RLOO on
the best one. In the worlds of one and two moves, where both roads have the same beta = kl, each has
three: learning rates, of DPO and of the reward model. SFT's length there is the shortest
whose held-out loss is within 0.01 of the best length's in both worlds. Policies are chosen by true
reward at temperature 1, and by hand, from the tables in experiments/sweep.md that this writes.
"""

from pathlib import Path

from nanoroads.errors import InputError
from nanoroads.report.cells import plus_minus
from nanoroads.report.gap_closed import FEW_MOVES, RL_STEPS, gap_closed_row
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.report.write import table
from nanoroads.run.flags import Parser, run_script
from nanoroads.run.folder import read_metrics
from nanoroads.weights.files import write_text
from nanoroads.world.roadmap import WORLDS, prompts

SEED = 100
JOBS = 2  # commands at a time

# The settings, nine for each road. The defaults of the scripts are those chosen in the main world;
# all_roads.py holds what was chosen in the others.
DPO_BETAS = (0.1, 0.3, 1.0)
DPO_RATES = ("1e-4", "3e-4", "1e-3")
REWARD_RATES = ("3e-4", "1e-3", "2e-3")
RL_KLS = (0.3, 0.5, 0.8)
RL_RATES = ("5e-4", "1e-3")
FEW_MOVES_RL_RATE = "1e-3"  # what the main world's sweep chose
SFT_STEPS = (150, 300, 600, 1200)  # in the worlds of few moves

# The last evaluation's entries in metrics.jsonl -> columns of the tables.
MEASURES = {
    "map_reward": "reward (T = 1)",
    "map_greedy_reward": "greedy reward",
    "map_legal": "legal",
    "map_kl": "KL to SFT",
}
HEAD = f"""# What was tuned

`python experiments/sweep.py`, seed {SEED}. In the main and in the hidden world nine settings for DPO; for
RLHF three for its reward model and six for RL. In the worlds of one and two moves three for DPO and
three for RLHF's reward model. The main world's rewards have a standard error of 0.025. The prompts are
those that the results are reported on; policies, pairs and samples are not.
"""


def main(argv=None):
    """Run all settings in each world, then write the tables."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("the sweep").add_argument
    out = Path("out/sweep")
    report = Path(__file__).with_suffix(".md")
    worlds = ["roadmap", *RL_STEPS, "roadmap-hidden"]
    add("--out", type=Path, default=out, help="folder of the runs (default: %(default)s)")
    add("--report", type=Path, default=report, help="Markdown file to write (default: %(default)s)")
    add("--worlds", nargs="+", default=worlds, choices=worlds, metavar="WORLD", help="(default: all)")
    args = parser.parse_args(argv)
    title = HEAD.splitlines()[0]
    if args.report.exists() and not args.report.read_text(errors="replace").startswith(title):
        raise InputError(f"--report {args.report}: exists, and is no report of this script; choose another")
    parts = [HEAD]
    for world in args.worlds:
        if world in RL_STEPS:
            parts += few_moves_sweep(args.out, world)
        else:
            parts += sweep(args.out / world, world)
    text = "\n".join(parts)
    write_text(args.report, text)
    print(text)


def sweep(folder, world):
    """Run one world's settings in `folder` -> the parts of its section in the report.

    What is finished is not run again, unless it was made from something that has changed since."""
    lock = claim_folder(folder)
    sft = folder / "sft"
    data = ["--data", world, "--seed", SEED]  # another seed has other pairs and samples
    pairs = ["sft/pairs.jsonl"]
    sample_pairs = ["-m", "nanoroads.world.pairs", "--policy", sft, "--seed", SEED]
    sample_pairs += ["--test-out", sft / "pairs_test.jsonl"]
    train_dpo = ["train_dpo.py"] + data + ["--init", sft]
    train_rlhf = ["train_rlhf.py"] + data + ["--init", sft]
    reward_only = ["--stop-after", "reward", "--readout", WORLDS[world].readout]

    # 1. The reference policy and its pairs, then everything that needs no reward model: each
    # learning rate of the reward model itself, and all of DPO.
    phases = [
        new_phase(folder, "sft", ["train_sft.py"] + data),
        new_phase(folder, "sft/pairs.jsonl", sample_pairs, ["sft"]),
    ]
    for lr in REWARD_RATES:
        command = train_rlhf + reward_only + ["--reward-lr", lr]
        phases.append(new_phase(folder, f"rm_{lr}", command, pairs))
    for beta in DPO_BETAS:
        for lr in DPO_RATES:
            command = train_dpo + ["--beta", beta, "--lr", lr]
            phases.append(new_phase(folder, f"dpo_{beta}_{lr}", command, pairs))
    run_phases(phases, folder, JOBS, lock)

    # 2. RL, on the reward model of the best held-out likelihood: a choice that a user without the
    # true reward could make too. What ran above is done and is not run again.
    nll = {lr: last(folder / f"rm_{lr}/reward", "eval_loss") for lr in REWARD_RATES}
    best = min(nll, key=nll.get)
    for kl in RL_KLS:
        for lr in RL_RATES:
            command = train_rlhf + ["--reward", folder / f"rm_{best}/reward", "--kl", kl, "--lr", lr]
            phases.append(new_phase(folder, f"rlhf_{kl}_{lr}", command, [f"rm_{best}"]))
    run_phases(phases, folder, JOBS, lock)

    # 3. The tables. The choice from them is made by hand.
    count = len(prompts(WORLDS[world], "test"))
    columns = list(MEASURES.values())
    return [
        f"\n## {world}\n\nOne sample of each of {count} held-out prompts. DPO:\n",
        table(["beta", "lr"] + columns, results(folder, "dpo", DPO_BETAS, DPO_RATES)),
        "Reward model:\n",
        table(["lr", "held-out nll"], [[lr, f"{value:.4f}"] for lr, value in nll.items()]),
        f"RLOO on the reward model of lr {best}:\n",
        table(["kl", "lr"] + columns, results(folder, "rlhf", RL_KLS, RL_RATES)),
    ]


def few_moves_sweep(out, world):
    """The same for a world of one or two moves, whose runs begin at the main world's SFT policy.

    The folder `few_moves` is of both worlds, which share that policy."""
    folder = out / f"few_moves/{world}"
    sft = folder / "sft"
    data = ["--data", world, "--seed", SEED, "--eval-every", 1000]  # at the end
    from_sft = data + ["--init", sft]
    sample_pairs = ["-m", "nanoroads.world.pairs", "--policy", sft, "--seed", SEED] + FEW_MOVES["pairs"]
    sample_pairs += ["--test-out", sft / "pairs_test.jsonl"]
    train_sft = ["train_sft.py"] + data + ["--init", out / "few_moves/sft"] + FEW_MOVES["sft"]
    train_dpo = ["train_dpo.py"] + from_sft + FEW_MOVES["dpo"]
    train_rlhf = ["train_rlhf.py"] + from_sft + FEW_MOVES["rl"] + ["--steps", RL_STEPS[world]]
    phases = [new_phase(out / "few_moves", "sft", ["train_sft.py", "--data", "roadmap", "--seed", SEED])]

    def add(name, command, needs):
        phases.append(new_phase(out / "few_moves", f"{world}/{name}", command, needs))

    # 1. The reference policy, its pairs, and every learning rate of either road.
    add("sft", train_sft, ["sft"])
    for steps in SFT_STEPS:
        add(f"sft_{steps}", train_sft + ["--steps", steps], ["sft"])  # the last --steps counts
    add("sft/pairs.jsonl", sample_pairs, [f"{world}/sft"])
    pairs = [f"{world}/sft/pairs.jsonl"]
    for lr in DPO_RATES:
        add(f"dpo_{lr}", train_dpo + ["--lr", lr], pairs)
    for lr in REWARD_RATES:
        reward = FEW_MOVES["reward"] + ["--reward-lr", lr]
        add(f"rlhf_{lr}", train_rlhf + reward + ["--lr", FEW_MOVES_RL_RATE], pairs)
    lock = claim_folder(out / "few_moves")
    run_phases(phases, out / "few_moves", JOBS, lock)
    lock.release()  # the next world needs it

    # 2. The tables. The reward model is chosen by its held-out likelihood, DPO by its true reward.
    flags = {f"dpo_{lr}": "beta" for lr in DPO_RATES} | {f"rlhf_{lr}": "kl" for lr in REWARD_RATES}
    measured = gap_closed_row(folder, world, flags)
    rows = []
    for name in flags:
        road, lr = name.split("_")
        nll = ""
        if road == "rlhf":
            nll = f"{last(folder / name / 'reward', 'eval_loss'):.4f}"
        row = measured[name]
        rows.append([road, lr, nll, plus_minus(row), plus_minus(row["kl_to_optimum"], digits=2)])
    lengths = []
    for steps in SFT_STEPS:
        lengths.append([str(steps), f"{last(folder / f'sft_{steps}', 'eval_loss'):.4f}"])
    columns = ["road", "lr", "reward model's held-out nll", "reward (T = 1)", "KL to the optimum"]
    return [
        f"\n## {world}\n\nSFT:\n",
        table(["steps", "held-out nll per token"], lengths),
        f"The lr is DPO's, or the reward model's; RLOO's is {FEW_MOVES_RL_RATE}. SFT: "
        f"{plus_minus(measured['sft'])}, the soft optimum {plus_minus(measured['optimum'])}, both exact.\n",
        table(columns, rows),
    ]


def results(folder, road, strengths, rates):
    """A table row for each run of a road: its two settings and its measures."""
    rows = []
    for strength in strengths:
        for lr in rates:
            run = folder / f"{road}_{strength}_{lr}"
            rows.append([str(strength), lr] + [f"{last(run, name):.3f}" for name in MEASURES])
    return rows


def last(run, name):
    """The last value of a measure in a run's metrics.jsonl."""
    return [row[name] for row in read_metrics(run) if name in row][-1]


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
