"""Every road on the built-in map, and where they meet: SFT, DPO, RLHF, best-of-N, Theorem 2.2, the
gap closed both ways.

    python all_roads.py --quick              a first look: about a minute on two CPU cores
    python all_roads.py                      one seed: two and a half minutes
    python all_roads.py --seeds 0 1 2        means and standard errors

It runs the commands that you would type and prints them, two at a time. A finished phase is not run
again; a phase that was killed goes on from its checkpoint. Results: OUT/report.md, OUT/results.json
and the figures beside them.
"""

import time
from pathlib import Path

from tqdm import tqdm

from nanoroads.report.gap_closed import world_folder
from nanoroads.report.measures import combine, measure
from nanoroads.report.phases import new_phase, run_phases
from nanoroads.report.write import verdict, write_report
from nanoroads.run.flags import SEED, Parser, positive, run_script
from nanoroads.weights.files import read_json_object, write_json
from nanoroads.world.roadmap import WORLDS

# What experiments/sweep.md found best in each world. Where a list is empty, that is the scripts'
# default: they were tuned in the main world.
DPO = {"roadmap": [], "roadmap-short": ["--lr", 3e-4], "roadmap-hidden": ["--lr", 1e-3]}
RLHF = {
    "roadmap": [],
    "roadmap-short": ["--kl", 0.3, "--lr", 5e-4],
    "roadmap-hidden": ["--kl", 0.3, "--reward-lr", 1e-3],
}

# A quick look has about half of the steps. Otherwise the scripts' own numbers of steps stand. DPO and
# the reward models need the same number of epochs, since Theorem 2.2 compares their results.
FULL = {"sft": [], "dpo": [], "rlhf": []}
QUICK = {"sft": ["--steps", 700], "dpo": ["--epochs", 2], "rlhf": ["--reward-epochs", 2, "--steps", 120]}

LOW_BETA = 0.05  # too weak a regulariser on either road, to show over-optimisation
LOW_KL = 0.05


def parse_flags(argv):
    p = Parser(description=__doc__)
    p.add_argument(
        "--out", type=Path, help="folder of runs and report (default: out/all_roads; with --quick out/quick)"
    )
    p.add_argument("--seeds", type=SEED, nargs="+", default=[0], help="one seed or several (default: 0)")
    p.add_argument(
        "--quick", action="store_true", help="a first look: half of the steps, the main world only"
    )
    p.add_argument(
        "--jobs",
        type=positive(int),
        default=2,
        help="number of commands at a time, on shared cores (default: 2)",
    )
    p.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        help="device of the training scripts (default: auto)",
    )
    p.add_argument(
        "--kernel",
        choices=["auto", "torch", "triton"],
        help="log-prob kernels of the training scripts (default: auto)",
    )
    args = p.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))  # the same seed twice would be two runs in one folder
    if args.out is None:
        args.out = Path("out/quick") if args.quick else Path("out/all_roads")
    return args


def plan(seed_folder, seed, world, quick, machine=()):
    """The phases of one seed in one world, each behind those that it needs.

    seed_folder: where the seed's runs go. machine: more flags for the training scripts."""
    folder = world_folder(seed_folder, world)
    sft = folder / "sft"
    steps = QUICK if quick else FULL
    flags = ["--seed", seed, "--data", world] + list(machine)
    sample_pairs = ["-m", "nanoroads.world.pairs", "--policy", sft, "--seed", seed]
    train_dpo = ["train_dpo.py"] + flags + ["--init", sft]
    train_rlhf = ["train_rlhf.py"] + flags + ["--init", sft]
    pairs = ["sft/pairs.jsonl", "sft/pairs_test.jsonl"]
    phases = []

    def add(name, command, needs):
        phases.append(new_phase(folder, name, command, needs))

    # The reference policy, and pairs of its own samples.
    add("sft", ["train_sft.py"] + flags + steps["sft"], needs=[])
    add("sft/pairs.jsonl", sample_pairs, needs=["sft"])
    add("sft/pairs_test.jsonl", sample_pairs + ["--split", "test", "--n", 1000], needs=["sft"])

    # Both roads, from the same pairs.
    scalar_head = ["--readout", WORLDS[world].readout]
    add("rlhf_global", train_rlhf + scalar_head + RLHF[world] + steps["rlhf"], pairs)
    add("dpo", train_dpo + DPO[world] + steps["dpo"], pairs)
    if world != "roadmap":
        return phases

    # Theorem 2.2: RLHF on the local reward, on its way towards DPO. And DPO without its reference, as
    # the paper's local reward model.
    local_reward = ["--reward", "local", "--compare", folder / "dpo"]
    add("rlhf_local", train_rlhf + local_reward + steps["rlhf"], pairs + ["dpo"])
    add("local", train_dpo + ["--loss", "reference-free"] + steps["dpo"], pairs)
    if quick:
        return phases

    # Over-optimisation: too little KL on either road. RLHF takes the reward model that is there.
    given_reward = ["--reward", folder / "rlhf_global/reward"]
    add("dpo_low_beta", train_dpo + ["--beta", LOW_BETA], pairs)
    add("rlhf_low_kl", train_rlhf + given_reward + ["--kl", LOW_KL], ["rlhf_global"])
    return phases


def main(argv=None):
    """Run, measure, report."""
    args = parse_flags(argv)
    begin = time.time()
    folders = {seed: args.out / f"seed{seed}" for seed in args.seeds}
    worlds = ["roadmap"] if args.quick else list(WORLDS)
    machine = []
    if args.device:
        machine += ["--device", args.device]
    if args.kernel:
        machine += ["--kernel", args.kernel]

    # 1. The runs of all seeds in all worlds, as commands. What is finished is not run again.
    phases = []
    for seed, folder in folders.items():
        for world in worlds:
            phases += plan(folder, seed, world, args.quick, machine)
    seconds = run_phases(phases, args.out, args.jobs)

    # 2. The measures of each seed. They are kept in its folder, until a phase is run again.
    ledger = args.out / "phases.json"
    measures = []
    for folder in tqdm(folders.values(), desc="measuring", unit="seed", disable=None):
        path = folder / "measures.json"
        if not path.exists() or path.stat().st_mtime < ledger.stat().st_mtime:
            write_json(path, measure(folder, args.quick))
        measures.append(read_json_object(path))
    seconds["total"] = round(time.time() - begin, 1)

    # 3. The report. Figures of a training's course are of the first seed.
    first_folder = folders[args.seeds[0]]
    pairs = len((first_folder / "sft/pairs.jsonl").read_text().splitlines())
    results = {"seeds": args.seeds, "seconds": seconds, "pairs": pairs}
    results.update(combine(measures))
    write_json(args.out / "results.json", results)
    write_report(results, args.out, first_folder)
    for line in verdict(results):
        print(line)
    print(f"\n{args.out}/report.md has the tables and figures, {args.out}/results.json the numbers", end=" ")
    print(
        f"({seconds['total']:.0f} s)\nnext: python sample.py --model {first_folder}/rlhf_global --prompt 'WA>FL:'"
    )


if __name__ == "__main__":
    run_script(main)
