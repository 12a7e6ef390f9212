"""Steps that are timed in turns, and their table: helpers of experiments/bench_step.py."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kernels.measuring import peak_memory
from nanoroads import randomness
from nanoroads.report.write import table
from nanoroads.run.speed import PEAKS

HEAD = ["step", "by", "s", "pairs or samples/s", "tokens/s", "MFU", "MiB", "loss", "gradient norm"]


@dataclass
class Step:
    """What is timed, and what came of it."""

    name: str
    by: str  # whose step it is; the first of a name is ours
    run: Callable  # () -> (loss, gradient norm), if it is a training step
    count: int  # pairs or samples
    tokens: int
    operations: float | None = None  # that a training step cannot do without
    extra_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)
    outcome: tuple | None = None  # what `run` has returned


def bare_product(device, dtype):
    """A step that is one matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    # A GPU multiplies ones with less power, so faster.
    normal = randomness.generator("bare product").standard_normal((n, n), dtype="float32")
    a = torch.from_numpy(normal).to(device, dtype)
    product = torch.empty_like(a)

    def run():
        torch.mm(a, a, out=product)

    return Step("bare product", "torch", run, 1, n, 2 * n**3)


def measure(steps, rounds, device, bound):
    """Fill in memory, seconds and outcome of each step. Raises AssertionError if they do not do the same
    work, see check_same."""
    on_cuda = device.type == "cuda"
    for step in steps:
        step.outcome = step.run()  # compiles; makes the optimizer's moments
        step.extra_bytes = peak_memory(step.run, on_cuda)
    check_same(steps, bound)
    for _ in range(rounds):
        for step in steps:
            begun = time.perf_counter()
            step.outcome = step.run()
            if on_cuda:
                torch.cuda.synchronize()
            step.seconds.append(time.perf_counter() - begun)
    check_same(steps, bound)


def check_same(steps, bound):
    """Raises AssertionError unless training steps of one name have the same loss and gradient norm.

    bound: of the difference to the first one's figure, relative to it where it is above 1."""
    first = {}
    for step in steps:
        ours = first.setdefault(step.name, step)
        if step.operations is None or step.outcome is None:  # it trains nothing
            continue
        for name, mine, theirs in zip(("loss", "gradient norm"), ours.outcome, step.outcome, strict=True):
            apart = abs(mine - theirs) / max(1.0, abs(mine))
            if not apart <= bound:  # nor is NaN
                raise AssertionError(f"{step.name}: {name} {mine} by {ours.by}, {theirs} by {step.by}")


def peak_rate(device, bare):
    """device: its name. bare: a measured bare product. -> operations per second, and where they are from."""
    for name, tflops in PEAKS.items():
        if name in device:
            return 1e12 * tflops, "the data sheet's"
    return bare.operations / statistics.median(bare.seconds), "a bare product's"


def row_of(step, peak):
    """peak: operations per second. -> the figures under HEAD, None where there is none."""
    seconds = statistics.median(step.seconds)
    row = dict.fromkeys(HEAD)
    row.update({"step": step.name, "by": step.by, "s": seconds})
    row.update({"pairs or samples/s": step.count / seconds, "tokens/s": step.tokens / seconds})
    if step.extra_bytes is not None:
        row["MiB"] = step.extra_bytes / 2**20
    if step.operations is not None:
        row["MFU"] = step.operations / seconds / peak
        row["loss"], row["gradient norm"] = step.outcome
    return row


def steps_table(rows):
    """Rows of `row_of` as a Markdown table."""
    cells = []
    for row in rows:
        figures = ["-" if row[column] is None else f"{row[column]:.4g}" for column in HEAD[2:]]
        cells.append([row["step"], row["by"], *figures])
    return table(HEAD, cells)


def steps_verdict(rows):
    """How many times the pairs or samples per second of another step the first of the same name makes."""
    first, lines = {}, []
    for row in rows:
        ours = first.setdefault(row["step"], row)
        if row is not ours:
            times = row["s"] / ours["s"]
            unit = "pairs" if row["step"] == "DPO" else "samples"
            lines.append(f"{row['step']}: {times:.2f} times the {unit}/s of {row['by']}")
    return "\n".join(lines)
