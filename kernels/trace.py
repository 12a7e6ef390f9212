"""Where the time of linear_logp goes, forward and backward.

    python -m kernels.trace         a table by kernel, and out/trace.json for https://ui.perfetto.dev
    python -m kernels.trace --shape 8192 4096 131072 --dtype bf16 --budget 0

It also prints the command line for ncu, which measures each kernel on a GPU by running this script
with --bare.
"""

import shlex
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import kernels
from kernels.measuring import DTYPES, Parser, problem, write_trace

PASSES = 3  # forward and backward, in the trace
NCU = "ncu --set full --clock-control none --profile-from-start off -o ncu python -m kernels.trace --bare"


def flags(parser, on_cuda):
    device = "cuda" if on_cuda else "cpu"
    shape = [8192, 4096, 128256] if on_cuda else [256, 768, 50257]
    dtype = "bf16" if on_cuda else "fp32"
    add = parser.add_argument
    add("--shape", type=int, nargs=3, metavar=("N", "D", "V"), default=shape, help="rows, width, classes")
    add("--dtype", choices=DTYPES, default=dtype, help="dtype of hidden and weight")
    add("--backend", choices=kernels.BACKENDS, default="auto", help="backend of linear_logp")
    add("--budget", type=int, metavar="BYTES", help="probabilities that the backward may keep, in bytes")
    add("--out", type=Path, metavar="FILE", default=Path("out/trace.json"),
        help="file for the trace (default: %(default)s)")  # fmt: skip
    add("--bare", action="store_true", help="one pass after the mark that ncu waits for, no trace")
    args = parser.parse_args()
    parser.check_shape(args.shape, device, multiplies=False)
    parser.check_file("--out", args.out)
    example = torch.empty(0, dtype=DTYPES[args.dtype], device=device)
    try:
        kernels.pick(args.backend, example)
    except ValueError as error:
        parser.error(f"--{error}")
    return args


def main():
    parser = Parser("kernels.trace", __doc__)
    with parser.refusing():
        trace(parser)


def trace(parser):
    on_cuda = torch.cuda.is_available()
    args = flags(parser, on_cuda)
    hidden, weight, target = problem(*args.shape, DTYPES[args.dtype], "cuda" if on_cuda else "cpu")

    def one_pass():
        hidden.grad = weight.grad = None
        logp = kernels.linear_logp(hidden, weight, target, backend=args.backend, budget=args.budget)
        logp.sum().backward()
        if on_cuda:
            torch.cuda.synchronize()

    one_pass()  # compiles
    if args.bare:
        if on_cuda:
            torch.cuda.profiler.start()
        one_pass()
        return

    activities = [ProfilerActivity.CPU]
    if on_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiled:
        for _ in range(PASSES):
            one_pass()
    write_trace(args.out, profiled)
    order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60))
    print(f"{PASSES} passes; the trace is in {args.out}, for https://ui.perfetto.dev.")
    print("The counters of each kernel, on a GPU:")
    print(NCU, shlex.join(sys.argv[1:]))


if __name__ == "__main__":
    main()
