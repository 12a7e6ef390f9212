"""What was tuned: in each world, for each road, the same number of settings, on a seed that no reported result uses.

    python experiments/sweep.py                 about ten minutes on two CPU cores; writes experiments/sweep.md

Each road has nine settings to choose from. DPO: beta x learning rate. RLHF: three learning rates of the reward model, by
held-out likelihood, then kl x learning rate of RLOO on the best one. Policies are chosen by true reward at temperature 1.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from all_roads import READOUT, run_phases  # noqa: E402
from nanoroads import common, roadmap  # noqa: E402
from nanoroads.checkpoint import write_atomic  # noqa: E402
from nanoroads.report import table  # noqa: E402

SEED = 100
MEASURES = {"map_reward": "reward (T = 1)", "map_greedy_reward": "greedy reward", "map_legal": "legal", "map_kl": "KL to SFT"}


def last(folder, name):
    return [row[name] for row in common.read_metrics(folder) if name in row][-1]


def sweep(out, world):
    """Run one world's settings in out -> the lines of its report."""
    sft, phases = out / "sft", []

    def add(name, needs, *command):
        phases.append((f"{out}/{name}", [f"{out}/{n}" for n in needs], [str(w) for w in (*command, "--out", out / name)]))

    data = ["--data", world, "--seed", SEED]
    add("sft", [], "train_sft.py", *data)
    pairs = ["-m", "nanoroads.pairs", "--policy", sft, "--seed", SEED]
    add("sft/pairs.jsonl", ["sft"], *pairs)
    add("sft/pairs_test.jsonl", ["sft"], *pairs, "--split", "test", "--n", 1000)
    known = ["sft/pairs.jsonl", "sft/pairs_test.jsonl"]
    rates = ("3e-4", "1e-3", "2e-3")
    for lr in rates:
        rm = ["train_rlhf.py", *data, "--init", sft, "--stop-after", "reward", "--readout", READOUT[world], "--reward-lr", lr]
        add(f"rm_{lr}", known, *rm)
    for beta in (0.1, 0.3, 1.0):
        for lr in ("1e-4", "3e-4", "1e-3"):
            add(f"dpo_{beta}_{lr}", known, "train_dpo.py", *data, "--init", sft, "--beta", beta, "--lr", lr)
    run_phases(phases, out, 2)

    nll = {lr: last(out / f"rm_{lr}/reward", "eval_loss") for lr in rates}
    best = min(nll, key=nll.get)
    for kl in (0.3, 0.5, 0.8):
        for lr in ("5e-4", "1e-3"):
            rl = ["train_rlhf.py", *data, "--init", sft, "--reward", out / f"rm_{best}/reward", "--kl", kl, "--lr", lr]
            add(f"rlhf_{kl}_{lr}", [], *rl)
    run_phases(phases, out, 2)

    def rows(road):
        runs = sorted(f for f in out.glob(f"{road}_*"))
        return [[*run.name.split("_")[1:], *(f"{last(run, name):.3f}" for name in MEASURES)] for run in runs]

    prompts = len(roadmap.prompts(roadmap.WORLDS[world], "test"))
    return [
        f"\n## {world}\n\nOne sample of each of {prompts} held-out prompts. DPO:\n",
        table(["beta", "lr", *MEASURES.values()], rows("dpo")),
        "Reward model:\n",
        table(["lr", "held-out nll"], [[lr, f"{value:.4f}"] for lr, value in nll.items()]),
        f"RLOO on the reward model of lr {best}:\n",
        table(["kl", "lr", *MEASURES.values()], rows("rlhf")),
    ]


def main(argv=None):
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out/sweep"), help="runs (default: %(default)s)")
    p.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".md"), help="(default: %(default)s)")
    p.add_argument("--worlds", nargs="+", default=list(roadmap.WORLDS), choices=list(roadmap.WORLDS))
    args = p.parse_args(argv)
    text = [
        f"# What was tuned\n\n`python experiments/sweep.py`, seed {SEED}. In each world nine settings for DPO; for RLHF three "
        "for its reward\nmodel and six for RL. The main world's rewards have a standard error of 0.025. The prompts are those\n"
        "that the results are reported on; policies, pairs and samples are not.\n"
    ]
    for world in args.worlds:
        text += sweep(args.out / world, world)
    write_atomic(args.report, lambda path: path.write_text("\n".join(text)))
    print("\n".join(text))


if __name__ == "__main__":
    common.run_script(main)
