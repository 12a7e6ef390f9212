"""What the scripts of experiments/ share: their flags, the runs they start from, and their results.

Their runs lie in one folder, OUT/seedS/..., so that what one script has trained, the next one does not
train again (see ledger.py). Each writes what it found to OUT/NAME/.
"""

import time
from argparse import Namespace
from pathlib import Path

from matplotlib.figure import Figure

from nanoroads.report.cells import plus_minus
from nanoroads.report.drawing import save
from nanoroads.report.phases import Phase, new_phase
from nanoroads.run.flags import SEED, Parser, positive
from nanoroads.score import mean_se
from nanoroads.weights.files import write_json, write_text

# More flags for the shared runs: none, so that they have the scripts' defaults. Tests make them tiny here.
SFT, DPO, RLHF = [], [], []
PAIRS, TEST_PAIRS = 5000, 1000  # of SFT's samples
BEGIN = time.monotonic()


def parse_flags(doc: str, argv: list[str] | None = None) -> Namespace:
    """The command line of an experiment -> args.out, args.seeds, args.jobs.

    doc: the script's docstring."""
    parser = Parser(description=doc)
    add = parser.add_argument_group("what is run").add_argument
    runs = "folder of the runs and results, shared by all experiments (default: %(default)s)"
    add("--out", type=Path, default=Path("out/experiments"), help=runs)
    add("--seeds", type=SEED, nargs="+", default=[0], metavar="SEED", help="the seeds (default: 0)")
    add("--jobs", type=positive(int), default=2, help="commands at a time (default: 2)")
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))  # the same seed twice would be one run counted twice
    return args


def sft_phase(folder: Path, seed: int) -> Phase:
    """The main world's reference, folder/sft, with the script's defaults."""
    return new_phase(folder, "sft", ["train_sft.py", "--seed", seed, "--data", "roadmap"] + SFT)


def shared_phases(folder: Path, seed: int, *names: str) -> list[Phase]:
    """The runs of the main world that most experiments start from, with the scripts' defaults.

    sft and sft/pairs.jsonl, with sft/pairs_test.jsonl, always; `names`: which of dpo and rlhf_global."""
    sft = folder / "sft"
    flags = ["--seed", seed, "--data", "roadmap"]
    sample_pairs = ["-m", "nanoroads.world.pairs", "--policy", sft, "--seed", seed, "--n", PAIRS]
    sample_pairs += ["--test-out", sft / "pairs_test.jsonl", "--test-n", TEST_PAIRS]
    from_sft = flags + ["--init", sft]  # whose pairs lie beside it
    roads = {"dpo": ["train_dpo.py"] + from_sft + DPO, "rlhf_global": ["train_rlhf.py"] + from_sft + RLHF}
    phases = [sft_phase(folder, seed), new_phase(folder, "sft/pairs.jsonl", sample_pairs, ["sft"])]
    for name in names:
        phases.append(new_phase(folder, name, roads[name], ["sft/pairs.jsonl"]))
    return phases


def dpo_run(beta: float) -> str:
    """The name of DPO's run at a beta; at .3 it is the shared one."""
    return "dpo" if beta == 0.3 else f"dpo_beta_{beta}"


def rlhf_run(kl: float) -> str:
    """The name of RL's run at a kl; at .5 it is the shared one, whose reward model the others climb."""
    return "rlhf_global" if kl == 0.5 else f"rlhf_kl_{kl}"


def regularised_phases(folder: Path, seed: int, betas: list[float], kls: list[float]) -> list[Phase]:
    """Both roads with weak and strong regularisers: DPO at each of `betas`, RL at each of `kls`.

    And what they start from: sft, its pairs, dpo, and rlhf_global with its reward model."""
    phases = shared_phases(folder, seed, "dpo", "rlhf_global")
    from_sft = ["--seed", seed, "--data", "roadmap", "--init", folder / "sft"]
    for beta in betas:
        if dpo_run(beta) != "dpo":
            dpo = ["train_dpo.py"] + from_sft + DPO + ["--beta", beta]
            phases.append(new_phase(folder, dpo_run(beta), dpo, ["sft/pairs.jsonl"]))
    for kl in kls:
        if rlhf_run(kl) != "rlhf_global":
            rl = ["train_rlhf.py"] + from_sft + ["--reward", folder / "rlhf_global/reward"]
            if kl <= 0.1:
                rl += ["--steps", 150]  # on seed 100 true reward and KL stand still from step 80 on
            phases.append(new_phase(folder, rlhf_run(kl), rl + RLHF + ["--kl", kl], ["rlhf_global"]))
    return phases


# ---------------------------------------------------------------- several seeds


def over_seeds(by_seed: list[dict], *path: str | int) -> dict[str, float]:
    """{"mean", "se"} over seeds of by_seed[i][path[0]][path[1]]..."""
    return mean_se(values_of(by_seed, *path))


def values_of(rows: list[dict], *path: str | int) -> list[float]:
    """rows[i][path[0]][path[1]]... for each i. rows: one for each seed, or any others."""
    values = list(rows)
    for name in path:
        values = [value[name] for value in values]
    return values


def means_with_errors(by_seed: list[dict], path: tuple, names: tuple, digits: int = 3) -> list[str]:
    """`0.512 ± 0.008` for each of `names`, over seeds of by_seed[i][path[0]]...[name]."""
    return [plus_minus(over_seeds(by_seed, *path, name), digits) for name in names]


def differences(one: list[float], other: list[float]) -> dict[str, float]:
    """{"mean", "se"} over seeds of one - other, seed by seed: both start from the same policy and pairs."""
    return mean_se([a - b for a, b in zip(one, other, strict=True)])


def lead(by_seed: list[dict], one: str, other: str, *path: str | int) -> dict[str, float]:
    """{"mean", "se"} over seeds of by_seed[i][one] - by_seed[i][other], each at [path[0]][path[1]]..."""
    return differences(values_of(by_seed, one, *path), values_of(by_seed, other, *path))


# ---------------------------------------------------------------- the results


def write_results(
    args: Namespace, name: str, doc: str, by_seed: list[dict], table: str, verdict: list[str], figure: Figure
):
    """Print the table and the verdict; write OUT/NAME/table.md, figure.svg and results.json.

    doc: the script's docstring, whose first line is the claim. by_seed: a row of numbers for each of
    args.seeds. verdict: a line for each claim."""
    write_files(args.out / name, doc, {"seeds": args.seeds, "by_seed": by_seed}, table, verdict, figure)


def write_files(folder: Path, doc: str, numbers: dict, table: str, verdict: list[str], figure: Figure):
    """The same for a script without seeds, whose results are `numbers`."""
    text = table + "".join(f"\n{line}\n" for line in verdict)
    print(text)
    folder.mkdir(parents=True, exist_ok=True)
    save(figure, folder / "figure.svg")
    seconds = round(time.monotonic() - BEGIN, 1)  # of this call: what is finished is not run again
    claim_line = doc.strip().splitlines()[0]
    results = {"claim": claim_line, "verdict": verdict, "seconds": seconds, **numbers}
    write_json(folder / "results.json", results)
    write_text(folder / "table.md", text)
    print(f"{folder}: table.md, figure.svg and results.json ({seconds:.0f} s)")
