"""Every road on the built-in map: SFT, DPO, RLHF and best-of-N; Theorem 2.2; and worlds in which
the gap between verifying and generating is closed, or smaller.

    python all_roads.py --quick              a first look: a minute on two CPU cores
    python all_roads.py                      one seed: about two minutes
    python all_roads.py --seeds 0 1 2        the seeds 0, 1 and 2: means and standard errors

It prints and runs the commands that you would type, two at a time. A finished phase is not run
again; a phase that was killed goes on from its checkpoint. Results: OUT/report.md, OUT/results.json
and the figures beside them; OUT/report.html is the same as a page, with a map to click on.

Start it again whenever you like. It makes again what is missing, and what was made from something
that has changed since; a result that somebody has changed is refused by name. It does not notice
changed code: choose another --out after a change.
"""

import time
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path

from nanoroads.report.gap_closed import FEW_MOVES, RL_STEPS, world_folder
from nanoroads.report.ledger import Ledger
from nanoroads.report.measures import combine, measures_file, without_routes
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.report.write import report_files, verdict
from nanoroads.run.commands import print_next
from nanoroads.run.flags import SEED, Parser, positive, run_script
from nanoroads.run.made_from import make_or_keep
from nanoroads.weights.files import read_json_object
from nanoroads.weights.identity import of_file
from nanoroads.world.roadmap import WORLDS

# What experiments/sweep.md found best in each world. The scripts' defaults are what it found in the
# main world, so that needs no flag.
DPO = {
    "roadmap": [],
    "roadmap-short": FEW_MOVES["dpo"] + ["--lr", 3e-4],
    "roadmap-2": FEW_MOVES["dpo"] + ["--lr", 3e-4],
    "roadmap-hidden": ["--lr", 1e-3],
}
FEW_MOVES_RLHF = FEW_MOVES["rl"] + FEW_MOVES["reward"]
RLHF = {
    "roadmap": [],
    "roadmap-short": FEW_MOVES_RLHF + ["--reward-lr", 1e-3, "--steps", RL_STEPS["roadmap-short"]],
    "roadmap-2": FEW_MOVES_RLHF + ["--reward-lr", 1e-3, "--steps", RL_STEPS["roadmap-2"]],
    "roadmap-hidden": ["--kl", 0.3, "--reward-lr", 1e-3],
}

# A quick look has fewer steps; otherwise the scripts' own numbers of steps stand. DPO and the
# reward models need the same number of epochs, since Theorem 2.2 compares where they end.
FULL = {"sft": [], "dpo": [], "rlhf": []}
QUICK = {"sft": ["--steps", 700], "dpo": ["--epochs", 2], "rlhf": ["--reward-epochs", 2, "--steps", 120]}


def seed_type(text):
    """The type of --seeds."""
    try:
        return SEED(text)
    except ValueError:
        form = "a list of whole numbers with spaces between them, as in --seeds 0 1 2"
        raise ArgumentTypeError(f"{text} is no seed; the flag takes {form}") from None


def parse_flags(argv):
    """The command line -> args."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("what is run").add_argument
    seeds_help = "the seeds themselves: 0 1 2 are three seeds, 3 is seed 3 alone (default: 0)"
    add("--out", type=Path, help="folder of the results (default: out/all_roads, or out/quick)")
    add("--seeds", type=seed_type, nargs="+", default=[0], metavar="SEED", help=seeds_help)
    add("--quick", action="store_true", help="a first look: fewer steps, one world")

    add = parser.add_argument_group("the machine").add_argument
    add("--jobs", type=positive(int), default=2, help="number of commands at a time (default: 2)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], help="training device (default: auto)")
    add("--kernel", choices=["auto", "torch", "triton"], help="log-prob kernels (default: auto)")
    args = parser.parse_args(argv)
    # The same seed twice would be two runs in one folder.
    args.seeds = list(dict.fromkeys(args.seeds))
    if args.out is None:
        args.out = Path("out/quick") if args.quick else Path("out/all_roads")
    return args


def plan(seed_folder, seed, world, quick, machine_flags=()):
    """The phases of one seed in one world, each after those that it needs.

    seed_folder: where the seed's runs go. machine_flags: more flags for the training scripts."""
    folder = world_folder(seed_folder, world)
    here = ""  # before the names of this world's phases
    if world != "roadmap":
        here = f"{world}/"
    sft = folder / "sft"  # both roads start here, and are held near it
    steps = QUICK if quick else FULL
    flags = ["--seed", seed, "--data", world] + list(machine_flags)
    at_the_end = ["--eval-every", 1000]  # this job measures what is finished
    train_sft = ["train_sft.py"] + flags + at_the_end + steps["sft"]
    sample_pairs = ["-m", "nanoroads.world.pairs", "--policy", sft, "--seed", seed]
    sample_pairs += ["--test-out", sft / "pairs_test.jsonl"]
    train_dpo = ["train_dpo.py"] + flags + at_the_end + ["--init", sft]
    train_rlhf = ["train_rlhf.py"] + flags + ["--init", sft]
    sft_needs = []
    if world in RL_STEPS:  # a world of few moves: SFT goes on from the main world's policy
        sft_needs = ["sft"]
        train_sft += ["--init", seed_folder / "sft"] + FEW_MOVES["sft"]
        sample_pairs += FEW_MOVES["pairs"]
    pairs = [f"{here}sft/pairs.jsonl"]  # the scripts find both files beside --init
    phases = []

    def add(name, command, needs):
        phases.append(new_phase(seed_folder, here + name, command, needs))

    # The reference policy, and pairs of its own samples.
    add("sft", train_sft, needs=sft_needs)
    add("sft/pairs.jsonl", sample_pairs, needs=[f"{here}sft"])

    # The two roads from these pairs. RLHF's reward is global here: a model with a scalar head,
    # which reads the last hidden state or sums over all, as the world's reward does.
    scalar_head = at_the_end + ["--readout", WORLDS[world].readout]
    add("rlhf_global", train_rlhf + scalar_head + RLHF[world] + steps["rlhf"], needs=pairs)
    add("dpo", train_dpo + DPO[world] + steps["dpo"], needs=pairs)
    if world != "roadmap":
        return phases

    # Theorem 2.2: RLHF on the local reward. Its first stage has DPO's loss, and its second should
    # come back to DPO's policy; --compare records how far it still is.
    local_reward = ["--reward", "local", "--compare", folder / "dpo"]
    add("rlhf_local", train_rlhf + local_reward + steps["rlhf"], needs=pairs + ["dpo"])

    # The paper's local reward model, beta log pi. To train it is to train DPO without a reference.
    add("local", train_dpo + ["--loss", "reference-free"] + steps["dpo"], needs=pairs)
    return phases


def main(argv=None):
    """Run, measure, report."""
    args = parse_flags(argv)
    begin = time.monotonic()
    folders = {seed: args.out / f"seed{seed}" for seed in args.seeds}
    worlds = ["roadmap"] if args.quick else list(DPO)
    machine_flags = []  # what is not given is left to the training scripts' defaults
    if args.device:
        machine_flags += ["--device", args.device]
    if args.kernel:
        machine_flags += ["--kernel", args.kernel]

    # 1. The runs of all seeds in all worlds, as commands. They are planned as one job, so that no
    # core is idle while a seed waits for its last phase.
    phases = []
    for seed, folder in folders.items():
        for world in worlds:
            phases += plan(folder, seed, world, args.quick, machine_flags)
    lock = claim_folder(args.out)  # held to the end
    seconds = run_phases(phases, args.out, args.jobs, lock)

    # 2. The measures of each seed. They are kept in its folder as long as its runs are what they were.
    ledger = Ledger(args.out)
    made_from = {"seeds": args.seeds}
    measures = []
    for folder in folders.values():
        print(f"measuring {folder}", flush=True)
        names = [phase.name for phase in phases if folder in phase.result.parents]  # of this seed
        run_hashes = ledger.hashes(names)
        path = folder / "measures.json"
        make_or_keep(path, {"quick": args.quick, **run_hashes}, partial(measures_file, folder, args.quick))
        measures.append(read_json_object(path))
        made_from.update({**run_hashes, str(path): of_file(path)})
    # Of this call alone: phases overlap, and finished ones are not run again.
    seconds["total"] = round(time.monotonic() - begin, 1)

    # 3. The report, from results.json alone except the equivalence figure.
    # Tables are means over seeds; curves along training are the first seed's. It is written again
    # only if what it was made from has changed, so the seconds in it are those of the work.
    first_folder = folders[args.seeds[0]]
    pair_count = len((first_folder / "sft/pairs.jsonl").read_text().splitlines())
    results = {"seeds": args.seeds, "seconds": seconds, "pairs": pair_count}
    results.update(combine(measures))
    results["by_seed"] = [without_routes(row) for row in measures]
    make_or_keep(args.out / "results.json", made_from, partial(report_files, results, first_folder))
    results = read_json_object(args.out / "results.json")
    print("\n".join(verdict(results)))
    total = f"{results['seconds']['total']:.0f} s"
    print(f"\n{args.out}/report.md, report.html: tables and figures; results.json: the numbers ({total})")
    prompt = results["routes"]["prompts"][0]["prompt"]  # the policies differ most on this one
    sample = ["sample.py", "--prompt", prompt, "--num-samples", 4, "--model"]
    print_next(sample + [first_folder / "sft"], sample + [first_folder / "rlhf_global"])


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
