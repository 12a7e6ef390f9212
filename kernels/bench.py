"""Time, memory and error of linear_logp, forward and backward, beside every other implementation that is installed.

    python -m kernels.bench                              on a GPU: GPT-2, Pythia and Llama heads, 1k .. 32k tokens
    python -m kernels.bench --quick                      a minute, on a CPU as well
    python -m kernels.bench --shape 8192 4096 131072 --dtype bf16
    python -m kernels.bench --tune                       GPU only: writes the fastest tiles to kernels/tiles.json

It prints its figures and writes them to out/bench.json and out/bench.png, a roofline.

All contenders of a shape run in turn, round after round; figures are medians over the rounds. On CUDA: events, the L2 cache
flushed before each run. TFLOP/s counts 6 N D V operations, whatever an implementation computes again. The ceiling is the time
of the three bare matrix products in the same rounds, into memory that is there already. Extra memory is the peak beyond the
inputs, the gradients included (CPU: of the resident set). Errors are against fp64: the largest of the log-probs in nats, those of
the gradients relative to their norm, over 64 rows of hidden and of weight.
"""

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels

HEADS = {"GPT-2": (768, 50257), "Pythia-1.4B": (2048, 50304), "Llama-8B": (4096, 128256)}  # D, V
CPU_QUICK = [(2000, 64, 98), (512, 768, 8192), (256, 768, 50257)]  # N, D, V
CPU = [*CPU_QUICK, (1024, 768, 50257), (512, 2048, 50304)]
GPU_QUICK = [(4096, *head) for head in HEADS.values()]
GPU = [(1024 << i, *head) for head in HEADS.values() for i in range(6)] + [(8192, 4096, 131072)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = ["forward_ms", "total_ms", "tflops", "of_ceiling", "extra_mib", "logp_error", "d_hidden_error", "d_weight_error"]
ROWS = 64  # of a gradient that are compared


def fail(message):
    print(f"kernels.bench: {message}", file=sys.stderr)
    sys.exit(2)


# --- contenders


def implementation(name):
    """-> f(hidden, weight, target) -> log-probs (N,), or their sum where it knows no more. Raises whatever its import raises."""
    if name == "naive logits":
        return lambda x, w, t: torch.log_softmax(F.linear(x, w), 1).gather(1, t[:, None])[:, 0]
    if name.startswith("torch linear_cross_entropy"):  # since torch 2.13; without options it has all logits in memory
        fused, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions() if "chunked" in name else None
        return lambda x, w, t: -fused(x, w, t, reduction="none", options=options)
    if name == "trl":
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction

        return lambda x, w, t: ChunkedLogProbFunction.apply(x, w, None, t, 1.0, 32768, None, 1.0, ())[0]
    if name == "liger-kernel":
        from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

        return lambda x, w, t: -LigerFusedLinearCrossEntropyFunction.apply(x, w, t, None, None, -100, 0.0, 0.0, "none")[0]
    if name == "cut-cross-entropy":
        from cut_cross_entropy import linear_cross_entropy

        return lambda x, w, t: -linear_cross_entropy(x, w, t, reduction="none", filter_eps=None)
    if name == "quack-kernels":
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        return lambda x, w, t: -chunked_linear_cross_entropy(x, w, t, reduction="sum")
    _, backend, *recompute = name.split()
    return lambda x, w, t: kernels.linear_logp(x, w, t, backend=backend, budget=0 if recompute else None)


OURS = [f"nanoroads {backend}{how}" for backend in kernels.BACKENDS[1:] for how in ("", " recompute")]
TORCH = ["torch linear_cross_entropy", "torch linear_cross_entropy chunked"]
CUDA_PEERS = ["liger-kernel", "cut-cross-entropy", "quack-kernels"]


def contenders(cuda):
    """-> {name: f}; says in a line each what is not there."""
    found = {}
    for name in (*OURS, "naive logits", *TORCH, "trl", *CUDA_PEERS):
        if not cuda and (name in CUDA_PEERS or "triton" in name):
            print(f"{name}: left out, needs a CUDA device")
            continue
        try:
            found[name] = implementation(name)
        except Exception as error:  # a peer may fail to import in many ways
            print(f"{name}: left out, {one_line(error)}")
    return found


def one_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


# --- measurements


class Clock:
    """Marks on the device's own time line."""

    def __init__(self, device):
        self.cuda = device == "cuda"
        self.flush = torch.empty(256 << 20 if self.cuda else 0, dtype=torch.int8, device=device)

    def start(self):
        self.flush.zero_()
        self.marks = []
        self.mark()

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def ms(self):
        """From the start to each mark."""
        first, *rest = self.marks
        if not self.cuda:
            return [1e3 * (m - first) for m in rest]
        torch.cuda.synchronize()
        return [first.elapsed_time(m) for m in rest]


def step(f, x, w, t, clock):
    """One forward and backward of the sum -> (forward, total) ms, and the output."""
    x.grad = w.grad = None
    clock.start()
    out = f(x, w, t)
    clock.mark()
    out.sum().backward()
    clock.mark()
    return clock.ms(), out.detach()


def products(x, w, t):
    """The three bare matrix products -> f(clock), its time in ms."""
    x, w = x.detach(), w.detach()
    z, dx, dw = x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    def run(clock):
        clock.start()
        torch.mm(x, w.T, out=z)
        torch.mm(z, w, out=dx)
        torch.mm(z.T, x, out=dw)
        clock.mark()
        return clock.ms()[0]

    return run


def status(field):
    """Of this process, in bytes: VmRSS, resident now; VmHWM, its peak."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) << 10


def extra_memory(f, x, w, t, clock):
    """Peak bytes beyond the inputs; None where they cannot be measured."""
    x.grad = w.grad = None
    if clock.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(f, x, w, t, clock)
        peak = torch.cuda.max_memory_allocated()
    else:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have left
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
            before = status("VmRSS")
            step(f, x, w, t, clock)
            peak = status("VmHWM")
        except (OSError, AttributeError, StopIteration):
            return None
    return max(0, peak - before)


def problem(n, d, v, dtype, device):
    """hidden, weight, target: logits of deviation 2."""
    torch.manual_seed(0)
    x = torch.randn(n, d, device=device).to(dtype).requires_grad_()
    w = torch.randn(v, d, device=device).mul_(2 / d**0.5).to(dtype).requires_grad_()
    return x, w, torch.randint(v, (n,), device=device)


def reference(x, w, t):
    """fp64 -> logp (N,), rows 0 .. 63 of d_hidden, and rows t[:64] of d_weight, of the sum of logp."""
    x, w = x.detach(), w.detach()
    rows, lse, some = slice(ROWS), [], w[t[:ROWS]].double()
    for a in range(0, len(x), 4096):
        z = [x[a : a + 4096].double() @ part.double().T for part in w.split(8192)]
        lse.append(torch.stack([part.logsumexp(1) for part in z]).logsumexp(0))
    lse = torch.cat(lse)
    logp = torch.cat([(a.double() * w[b].double()).sum(1) for a, b in zip(x.split(4096), t.split(4096), strict=True)]) - lse
    d_hidden = some.clone()
    for part in w.split(8192):
        part = part.double()
        d_hidden -= (x[rows].double() @ part.T - lse[rows, None]).exp() @ part
    q = (t[:, None] == t[rows]).double() - (x.double() @ some.T - lse[:, None]).exp()  # (N, 64)
    return logp, d_hidden, q.T @ x.double()


def errors(out, x, w, t, expected):
    logp, d_hidden, d_weight = expected
    relative = [float((a.double() - b).norm() / b.norm()) for a, b in ((x.grad[:ROWS], d_hidden), (w.grad[t[:ROWS]], d_weight))]
    return [float((out.double() - logp).abs().max()) if out.ndim else None, *relative]


def measure(shape, dtype, device, found, reps):
    """-> the ceiling in TFLOP/s, and a dict of COLUMNS for each contender that ran."""
    x, w, t = problem(*shape, dtype, device)
    clock, expected, rows, ready = Clock(device), reference(x, w, t), {}, {}
    for name, f in found.items():
        try:
            _, out = step(f, x, w, t, clock)  # compiles, too
            rows[name] = dict.fromkeys(COLUMNS) | dict(zip(COLUMNS[5:], errors(out, x, w, t, expected), strict=True))
            del out
            extra = extra_memory(f, x, w, t, clock)
            rows[name]["extra_mib"] = extra if extra is None else extra / 2**20
            ready[name] = f
        except Exception as error:  # out of memory, a shape or dtype that a peer does not take
            rows.pop(name, None)
            print(f"{name}: left out at {shape}, {one_line(error)}")
        x.grad = w.grad = None
    bare = products(x, w, t)
    times, bare_times = {name: [] for name in ready}, []
    first = bare(clock)
    for _ in range(min(200, max(reps, int(500 / first)))):  # at least half a second each
        bare_times.append(bare(clock))
        for name, f in ready.items():
            times[name].append(step(f, x, w, t, clock)[0])
    ceiling, work = statistics.median(bare_times), 6e-9 * shape[0] * shape[1] * shape[2]  # ms, 10^9 operations
    for name, pairs in times.items():
        forward, total = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows[name] |= {"forward_ms": forward, "total_ms": total, "tflops": work / total, "of_ceiling": ceiling / total}
    return work / ceiling, rows


def show(shape, ceiling, rows):
    print(f"\nN {shape[0]}, D {shape[1]}, V {shape[2]}: bare matrix products {ceiling:.4g} TFLOP/s")
    print(f"{'':36}" + "".join(f"{name:>16}" for name in COLUMNS))
    for name, row in rows.items():
        print(f"{name:36}" + "".join(f"{'-' if row[c] is None else format(row[c], '.3g'):>16}" for c in COLUMNS), flush=True)


def draw(results, path):
    """TFLOP/s over tokens, a panel for each head; dashed: the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = list(dict.fromkeys((r["D"], r["V"]) for r in results))
    figure, axes = plt.subplots(1, len(heads), figsize=(4 * len(heads), 3.6), squeeze=False, layout="constrained")
    for axis, head in zip(axes[0], heads, strict=True):
        here = [r for r in results if (r["D"], r["V"]) == head]
        axis.plot([r["N"] for r in here], [r["ceiling_tflops"] for r in here], "k--", marker="_", label="matrix products")
        for name in dict.fromkeys(name for r in results for name in r["rows"]):
            points = [(r["N"], r["rows"][name]["tflops"]) for r in here if name in r["rows"]]
            axis.plot(*(zip(*points, strict=True) if points else ([], [])), marker="o", label=name)
        axis.set(title=f"D {head[0]}, V {head[1]}", xlabel="tokens", ylabel="TFLOP/s", ylim=(0, None))
        axis.set_xscale("log", base=2)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(heads)), fontsize=8)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--shape", type=int, nargs=3, action="append", metavar=("N", "D", "V"), help="this one; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, help="of hidden and weight (default: bf16 on CUDA, fp32 on a CPU)")
    parser.add_argument("--json", type=Path, default=Path("out/bench.json"), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--figure", type=Path, default=Path("out/bench.png"), metavar="FILE", help="(default: %(default)s)")
    parser.add_argument("--tune", action="store_true", help="time the Triton kernels' tiles and write kernels/tiles.json")
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if args.tune and not cuda:
        fail("--tune: there is no CUDA device")
    Path("out").mkdir(exist_ok=True)
    for path in (args.json, args.figure):
        if path.is_dir() or not path.absolute().parent.is_dir():
            fail(f"{path}: no such folder, or a folder itself")
    if args.figure.suffix not in (".png", ".pdf", ".svg"):
        fail(f"--figure {args.figure}: must end in .png, .pdf or .svg")
    if any(min(shape) < 1 for shape in args.shape or []):
        fail("--shape takes positive numbers")
    dtype, reps = args.dtype or ("bf16" if cuda else "fp32"), 3 if args.quick else 20 if cuda else 7
    if args.tune:
        from kernels.tune import tune  # needs triton

        return tune(DTYPES[dtype], dtype)
    shapes = args.shape or {(0, 0): CPU, (0, 1): CPU_QUICK, (1, 0): GPU, (1, 1): GPU_QUICK}[cuda, args.quick]
    chip = torch.cuda.get_device_name() if cuda else f"{cpu_name()}, {torch.get_num_threads()} threads"
    head = {"date": str(date.today()), "device": chip, "torch": torch.__version__, "dtype": dtype}
    print(", ".join(head.values()))
    found, results = contenders(cuda), []
    for shape in shapes:
        ceiling, rows = measure(tuple(shape), DTYPES[dtype], "cuda" if cuda else "cpu", found, reps)
        show(shape, ceiling, rows)
        results.append(dict(zip("NDV", shape, strict=True)) | {"ceiling_tflops": ceiling, "rows": rows})
        args.json.write_text(json.dumps(head | {"results": results}, indent=1) + "\n")
    draw(results, args.figure)
    print(f"{args.json} and {args.figure} hold these figures")


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
