"""Time, memory and error of linear_logp, forward and backward, beside other implementations.

    python -m kernels.bench           on a GPU: heads of GPT-2, Pythia and Llama, 1k .. 32k tokens
    python -m kernels.bench --quick   a minute, on a CPU as well
    python -m kernels.bench --shape 8192 4096 131072 --dtype bf16

Prints its figures and writes them to out/bench.json and, as a roofline, out/bench.png. A contender
that is not installed, or fails, is left out with a line that says why; peers.py has those of others.

All contenders of a shape run in turn, round after round; figures are medians over the rounds. On
CUDA, times come from CUDA events, and the L2 cache is flushed before each run. TFLOP/s counts
6 N D V operations, whatever an implementation computes again, and 4 N D V for a frozen head, whose
weight needs no gradient. The ceiling is the speed of the three (or two) bare matrix products in the
same rounds, into memory that is there already. Extra memory is the peak
beyond the inputs, gradients included (on a CPU, of the resident set). Errors are against fp64: for
log-probs the largest, in nats; for 64 rows of each gradient the norm of the error over that of the
gradient.
"""

import io
import json
import platform
import statistics
from datetime import date
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels
from kernels.measuring import (
    CHECKED_ROWS,
    DTYPES,
    Clock,
    Parser,
    one_line,
    peak_memory,
    problem,
    reference,
    write,
)
from kernels.peers import NEED_CUDA, PARITY, PARITY_SHAPE, PEERS

HEADS = {"GPT-2": (768, 50257), "Pythia-1.4B": (2048, 50304), "Llama-8B": (4096, 128256)}  # D, V
CPU_QUICK = [(2000, 64, 98), (512, 768, 8192), (256, 768, 50257)]  # N, D, V
CPU = [*CPU_QUICK, (1024, 768, 50257), (512, 2048, 50304)]
GPU_QUICK = [(4096, d, v) for d, v in HEADS.values()]
GPU = [(1024 << i, d, v) for d, v in HEADS.values() for i in range(6)] + [(8192, 4096, 131072)]
MOST_ROUNDS = 200
COLUMNS = [
    "forward_ms", "total_ms", "tflops", "of_ceiling", "extra_mib",
    "logp_error", "d_hidden_error", "d_weight_error",
]  # fmt: skip


# --- contenders


def implementation(name):
    """-> f(hidden, weight, target) -> log-probs (N,), or their sum if it gives no more.

    Raises whatever its import raises."""
    if name.endswith(FROZEN):
        return with_frozen_head(implementation(name.removesuffix(FROZEN)))
    if name == "naive logits":
        return naive
    if name == "torch linear_cross_entropy":
        return torch_fused(None)
    if name == "torch linear_cross_entropy chunked":
        return torch_fused(torch.nn.LinearCrossEntropyOptions())
    if name in PEERS:
        return PEERS[name]()
    _, backend, *recompute = name.split()
    budget = 0 if recompute else None

    def ours(hidden, weight, target):
        return kernels.linear_logp(hidden, weight, target, backend=backend, budget=budget)

    return ours


def with_frozen_head(f):
    """f with a weight that needs no gradient, as LoRA has it."""

    def logp(hidden, weight, target):
        return f(hidden, weight.detach(), target)

    return logp


def naive(hidden, weight, target):
    return torch.log_softmax(F.linear(hidden, weight), 1).gather(1, target[:, None])[:, 0]


def torch_fused(options):
    """Of torch 2.13 and later. Without options it has all logits in memory."""
    fused = F.linear_cross_entropy

    def logp(hidden, weight, target):
        return -fused(hidden, weight, target, reduction="none", options=options)

    return logp


CONTENDERS = [
    "nanoroads torch",
    "nanoroads torch recompute",
    "nanoroads triton",
    "nanoroads triton recompute",
    "nanoroads torch frozen head",
    "nanoroads triton frozen head",
    "naive logits",
    "torch linear_cross_entropy",
    "torch linear_cross_entropy chunked",
    *PEERS,
    "trl frozen head",
]
FROZEN = " frozen head"  # hidden alone needs a gradient: two of the three matrix products


def contenders(on_cuda):
    """-> {name: f}; prints a line for each contender that is left out."""
    functions = {}
    for name in CONTENDERS:
        needs_cuda = name in NEED_CUDA or "triton" in name
        if needs_cuda and not on_cuda:
            print(f"{name}: left out, needs a CUDA device")
            continue
        try:
            functions[name] = implementation(name)
        except Exception as error:  # a peer may fail to import in many ways
            print(f"{name}: left out, {one_line(error)}")
    return functions


# --- measurements


def step(f, hidden, weight, target, clock):
    """One forward and backward of the sum -> [forward, total] in ms, and the output."""
    hidden.grad = weight.grad = None
    clock.start()
    output = f(hidden, weight, target)
    clock.mark()
    output.backward(torch.ones_like(output))  # not output.sum(): some kernels refuse an expanded gradient
    clock.mark()
    return clock.ms(), output.detach()


def bare_products(hidden, weight):
    """-> f(clock), times in ms of the matrix products that nobody can do without.

    Of the two without the weight's gradient, and of all three."""
    hidden, weight = hidden.detach(), weight.detach()
    z = hidden.new_empty(len(hidden), len(weight))
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weight)

    def run(clock):
        clock.start()
        torch.mm(hidden, weight.T, out=z)
        torch.mm(z, weight, out=d_hidden)
        clock.mark()
        torch.mm(z.T, hidden, out=d_weight)
        clock.mark()
        return clock.ms()

    return run


def extra_memory(f, hidden, weight, target, clock):
    """Peak bytes beyond the inputs; None where they cannot be measured."""
    hidden.grad = weight.grad = None
    return peak_memory(partial(step, f, hidden, weight, target, clock), clock.on_cuda)


def relative_error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


def errors(output, hidden, weight, target, expected):
    """The three error columns, after a backward; expected: from reference."""
    logp, d_hidden, d_weight = expected
    logp_error = None
    if output.ndim:  # else it is only the sum
        logp_error = float((output.double() - logp).abs().max())
    d_weight_error = None
    if weight.grad is not None:  # else the head is frozen
        d_weight_error = relative_error(weight.grad[target[:CHECKED_ROWS]], d_weight)
    return {
        "logp_error": logp_error,
        "d_hidden_error": relative_error(hidden.grad[:CHECKED_ROWS], d_hidden),
        "d_weight_error": d_weight_error,
    }


def measure(shape, dtype, device, functions, rounds):
    """-> the ceiling in TFLOP/s, and {name: {column: figure}} of each contender that ran.

    functions: from contenders."""
    hidden, weight, target = inputs = problem(*shape, dtype, device)
    clock, expected = Clock(device), reference(*inputs)
    bare = bare_products(hidden, weight)  # before the rest: a contender must fit beside its memory
    rows = {}
    for name, f in functions.items():
        try:
            _, output = step(f, *inputs, clock)  # compiles, too
            row = dict.fromkeys(COLUMNS) | errors(output, *inputs, expected)
            del output
            extra = extra_memory(f, *inputs, clock)
            row["extra_mib"] = None if extra is None else extra / 2**20
            rows[name] = row
        except Exception as error:  # out of memory, a shape or dtype that a peer does not take
            print(f"{name}: left out at {shape}, {one_line(error)}")
        hidden.grad = weight.grad = None

    # half a second of bare products, if MOST_ROUNDS allows
    rounds = min(MOST_ROUNDS, max(rounds, int(500 / bare(clock)[-1])))
    bare_times, times = [], {name: [] for name in rows}
    for _ in range(rounds):
        bare_times.append(bare(clock))
        for name in rows:
            ms, _ = step(functions[name], *inputs, clock)
            times[name].append(ms)

    n, d, v = shape
    two_products_ms = statistics.median([two for two, _ in bare_times])
    three_products_ms = statistics.median([three for _, three in bare_times])
    for name, row in rows.items():
        work, bare_ms = 6e-9 * n * d * v, three_products_ms  # 10^9 operations: work / ms is TFLOP/s
        if name.endswith(FROZEN):
            work, bare_ms = 4e-9 * n * d * v, two_products_ms
        total_ms = statistics.median([total for _, total in times[name]])
        row["forward_ms"] = statistics.median([forward for forward, _ in times[name]])
        row["total_ms"] = total_ms
        row["tflops"] = work / total_ms
        row["of_ceiling"] = bare_ms / total_ms
    return 6e-9 * n * d * v / three_products_ms, rows


# --- what comes out


def show(shape, ceiling, rows):
    n, d, v = shape
    print(f"\nN {n}, D {d}, V {v}: bare matrix products {ceiling:.4g} TFLOP/s")
    print(f"{'':36}" + "".join([f"{name:>16}" for name in COLUMNS]))
    for name, row in rows.items():
        figures = ["-" if row[column] is None else format(row[column], ".3g") for column in COLUMNS]
        print(f"{name:36}" + "".join([f"{figure:>16}" for figure in figures]), flush=True)


def draw(results, path):
    """TFLOP/s over tokens, a panel for each head; dashed: the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = list(dict.fromkeys((result["D"], result["V"]) for result in results))
    names = list(dict.fromkeys(name for result in results for name in result["rows"]))
    size = (4 * len(heads), 3.6)
    figure, axes = plt.subplots(1, len(heads), figsize=size, squeeze=False, layout="constrained")
    for axis, (d, v) in zip(axes[0], heads, strict=True):
        panel = [result for result in results if (result["D"], result["V"]) == (d, v)]
        tokens = [result["N"] for result in panel]
        ceilings = [result["ceiling_tflops"] for result in panel]
        axis.plot(tokens, ceilings, "k--", marker="_", label="matrix products")
        for name in names:
            present = [result for result in panel if name in result["rows"]]
            tokens = [result["N"] for result in present]
            tflops = [result["rows"][name]["tflops"] for result in present]
            axis.plot(tokens, tflops, marker="o", label=name)
        axis.set(title=f"D {d}, V {v}", xlabel="tokens", ylabel="TFLOP/s", ylim=(0, None))
        axis.set_xscale("log", base=2)
    lines, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=min(4, len(heads)), fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=150)
    write(path, image.getvalue())


def device_name(on_cuda):
    if on_cuda:
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    return f"{name}, {torch.get_num_threads()} threads"


def default_shapes(on_cuda, quick):
    if on_cuda:
        return GPU_QUICK if quick else GPU
    return CPU_QUICK if quick else CPU


def default_rounds(on_cuda, quick):
    if quick:
        return 3
    return 20 if on_cuda else 7


def flags(parser, device):
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer shapes and rounds")
    add("--shape", type=int, nargs=3, action="append", metavar=("N", "D", "V"), help="shape; may be repeated")
    add("--dtype", choices=DTYPES, help="dtype of hidden and weight (default: bf16 on CUDA, fp32 on a CPU)")
    add("--json", type=Path, default=Path("out/bench.json"), metavar="FILE",
        help="file for the figures (default: %(default)s)")  # fmt: skip
    add("--figure", type=Path, default=Path("out/bench.png"), metavar="FILE",
        help="file for the roofline plot (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    for shape in args.shape or []:
        parser.check_shape(shape, device, multiplies=True)
    if args.figure.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"--figure {args.figure}: must end in .png, .pdf or .svg")
    if args.json.absolute() == args.figure.absolute():
        parser.error(f"--json and --figure are one file, {args.json}")
    parser.check_file("--json", args.json)
    parser.check_file("--figure", args.figure)
    return args


def main():
    parser = Parser("kernels.bench", __doc__)
    with parser.refusing():
        bench(parser)


def bench(parser):
    on_cuda = torch.cuda.is_available()
    device = "cuda" if on_cuda else "cpu"
    args = flags(parser, device)
    dtype = args.dtype or ("bf16" if on_cuda else "fp32")
    rounds = default_rounds(on_cuda, args.quick)
    header = {
        "date": str(date.today()),
        "device": device_name(on_cuda),
        "torch": torch.__version__,
        "dtype": dtype,
    }
    print(", ".join(header.values()))
    functions = contenders(on_cuda)
    results = []
    for shape in args.shape or default_shapes(on_cuda, args.quick):
        n, d, v = shape
        ceiling, rows = measure((n, d, v), DTYPES[dtype], device, functions, rounds)
        show(shape, ceiling, rows)
        if on_cuda and (n, d, v) == PARITY_SHAPE:
            print(PARITY)
        results.append({"N": n, "D": d, "V": v, "ceiling_tflops": ceiling, "rows": rows})
        text = json.dumps(header | {"results": results}, indent=1) + "\n"
        write(args.json, text.encode())  # after each shape
    draw(results, args.figure)
    print(f"{args.json} and {args.figure} hold these figures")


if __name__ == "__main__":
    main()
