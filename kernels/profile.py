"""Where the time of linear_logp goes, forward and backward.

    python -m kernels.profile                                 a table by kernel, and trace.json for https://ui.perfetto.dev
    python -m kernels.profile --shape 8192 4096 131072 --dtype bf16 --budget 0

Prints the command line for ncu as well, which measures each kernel on a GPU; it runs this script with --bare.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import kernels
from kernels.bench import DTYPES, problem

STEPS = 3  # forward and backward passes in the trace


def fail(message):
    print(f"kernels.profile: {message}", file=sys.stderr)
    sys.exit(2)


def main():
    cuda = torch.cuda.is_available()
    shape = [8192, 4096, 128256] if cuda else [256, 768, 50257]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), default=shape)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if cuda else "fp32", help="of hidden and weight")
    parser.add_argument("--backend", choices=kernels.BACKENDS, default="auto")
    parser.add_argument("--budget", type=int, help="bytes that the backward may keep of the probabilities")
    parser.add_argument("--out", type=Path, metavar="FILE", default=Path("trace.json"), help="the trace")
    parser.add_argument("--bare", action="store_true", help="one pass between the marks that ncu looks for, and no trace")
    args = parser.parse_args()
    if min(args.shape) < 1:
        fail("--shape takes positive numbers")
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        fail(f"--out {args.out}: no such folder, or a folder itself")
    hidden, weight, target = problem(*args.shape, DTYPES[args.dtype], "cuda" if cuda else "cpu")
    try:
        kernels.pick(args.backend, hidden)
    except ValueError as error:
        fail(f"--{error}")

    def step():
        hidden.grad = weight.grad = None
        kernels.linear_logp(hidden, weight, target, backend=args.backend, budget=args.budget).sum().backward()
        if cuda:
            torch.cuda.synchronize()

    step()  # compiles
    if args.bare:
        if cuda:
            torch.cuda.profiler.start()
        step()
        return
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as trace:
        for _ in range(STEPS):
            step()
    trace.export_chrome_trace(str(args.out))
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))
    print(f"{STEPS} passes; the trace is in {args.out}, for https://ui.perfetto.dev. Each kernel's counters, on a GPU:")
    again = shlex.join(sys.argv[1:])
    print(f"ncu --set full --clock-control none --profile-from-start off -o ncu python -m kernels.profile --bare {again}")


if __name__ == "__main__":
    main()
