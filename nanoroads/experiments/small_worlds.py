"""What experiments/horizon.py and data_size.py train on: a world's reference, and files of pairs, which
theorem_3_1.py has, too.

Their worlds have routes of few moves, and 200 prompts."""

from pathlib import Path

from nanoroads.report.phases import Phase, new_phase
from nanoroads.weights.files import write_text

SFT = ["--rows", 10_000, "--steps", 150, "--lr", 1e-3]


def reference_phase(out: Path, seed: int, here: str, world: str) -> Phase:
    """OUT/HERE/sft: the main world's SFT policy goes on with this world's demonstrations.

    Without them a policy of routes of 11 moves hardly ever stops after one."""
    train_sft = ["train_sft.py", "--seed", seed, "--data", world, "--init", out / f"seed{seed}/sft"] + SFT
    return new_phase(out, f"{here}/sft", train_sft, [f"seed{seed}/sft"])


def pairs_phase(out: Path, seed: int, here: str, pairs: str, n: int, flags: list) -> Phase:
    """OUT/PAIRS: n pairs of the samples of OUT/HERE/sft, and pairs_test.jsonl beside them.

    flags: more of nanoroads.world.pairs'."""
    draw = ["-m", "nanoroads.world.pairs", "--policy", out / here / "sft", "--seed", seed, "--n", n]
    draw += ["--test-out", (out / pairs).with_name("pairs_test.jsonl")]
    return new_phase(out, pairs, draw + flags, [f"{here}/sft"])


def write_subsets(pairs: Path, folder: Path, sizes: list[int]):
    """The first n rows of the file `pairs` as folder/pairs_n.jsonl, for each n of `sizes`."""
    rows = pairs.read_text().splitlines(keepends=True)
    for n in sizes:
        write_text(folder / f"pairs_{n}.jsonl", "".join(rows[:n]))
