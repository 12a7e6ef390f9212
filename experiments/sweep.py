"""What was tuned, for each road the same number of settings, on a seed that no reported result uses.

    python experiments/sweep.py                 about five minutes on two CPU cores; writes experiments/sweep.md

Each road has nine settings to choose from. DPO: beta x learning rate. RLHF: three learning rates of the reward model, by
held-out likelihood, then kl x learning rate of RLOO on the best one. Policies are chosen by true reward at temperature 1.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from all_roads import run_phases, table  # noqa: E402
from nanoroads import common  # noqa: E402
from nanoroads.checkpoint import write_atomic  # noqa: E402

SEED = 100


def main(argv=None):
    p = common.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path("out/sweep"), help="runs (default: %(default)s)")
    p.add_argument("--report", type=Path, default=Path(__file__).with_suffix(".md"), help="(default: %(default)s)")
    out = p.parse_args(argv).out
    report = p.parse_args(argv).report
    sft, phases = out / "sft", []

    def add(name, needs, *command):
        phases.append((name, needs, [str(w) for w in (*command, "--seed", SEED)]))

    add("sft", [], "train_sft.py", "--out", sft)
    pairs = ["-m", "nanoroads.pairs", "--policy", sft]
    add("pairs", ["sft"], *pairs, "--out", sft / "pairs.jsonl")
    add("pairs_test", ["sft"], *pairs, "--split", "test", "--n", 1000, "--out", sft / "pairs_test.jsonl")
    known = ["pairs", "pairs_test"]
    for lr in ("3e-4", "1e-3", "2e-3"):
        rm = ["train_rlhf.py", "--init", sft, "--stop-after", "reward", "--reward-lr", lr]
        add(f"rm {lr}", known, *rm, "--out", out / f"rm_{lr}")
    for beta in (0.1, 0.3, 1.0):
        for lr in ("1e-4", "3e-4", "1e-3"):
            dpo = ["train_dpo.py", "--init", sft, "--beta", beta, "--lr", lr]
            add(f"dpo {beta} {lr}", known, *dpo, "--out", out / f"dpo_{beta}_{lr}")
    run_phases(phases, out, 2)

    def last(folder, name):
        return [row[name] for row in common.read_metrics(out / folder) if name in row][-1]

    nll = {lr: last(f"rm_{lr}/reward", "eval_loss") for lr in ("3e-4", "1e-3", "2e-3")}
    best = min(nll, key=nll.get)
    for kl in (0.3, 0.5, 0.8):
        for lr in ("5e-4", "1e-3"):
            rl = ["train_rlhf.py", "--init", sft, "--reward", out / f"rm_{best}/reward", "--kl", kl, "--lr", lr]
            add(f"rlhf {kl} {lr}", [], *rl, "--out", out / f"rlhf_{kl}_{lr}")
    run_phases(phases, out, 2)

    names = ["map_reward", "map_greedy_reward", "map_legal", "map_kl"]
    head = ["reward (T = 1)", "greedy reward", "legal", "KL to SFT"]
    rows = {}
    for road in ("dpo", "rlhf"):
        runs = sorted(f.name for f in out.glob(f"{road}_*"))
        rows[road] = [[*run.split("_")[1:], *(f"{last(run, n):.3f}" for n in names)] for run in runs]
    text = [
        f"# What was tuned\n\n`python experiments/sweep.py`, seed {SEED}, 256 held-out prompts, 256 samples: a standard error of the",
        "reward is about 0.025. DPO has nine settings, RLHF three for its reward model and six for RL.\n",
        "## DPO\n",
        table(["beta", "lr", *head], rows["dpo"]),
        "## Reward model\n",
        table(["lr", "held-out nll"], [[lr, f"{value:.4f}"] for lr, value in nll.items()]),
        f"## RLOO on the reward model of lr {best}\n",
        table(["kl", "lr", *head], rows["rlhf"]),
    ]
    write_atomic(report, lambda path: path.write_text("\n".join(text)))
    print("\n".join(text))


if __name__ == "__main__":
    common.run_script(main)
