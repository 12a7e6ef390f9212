"""The search for the fastest tiles of the Triton kernels on the GPU at hand. Needs CUDA and Triton.

    python -m kernels.tune                  the tiles of bf16
    python -m kernels.tune --dtype fp32     the tiles of fp32

Each kernel's tile is searched a few numbers at a time and checked against the torch backend. A tile
that is faster is in kernels/tiles.json at once, so the search may be stopped at any time.
"""

import json
import re
import statistics
from functools import partial
from itertools import product

import torch

from kernels import api, tiles, torch_backend
from kernels.measuring import DTYPES, Clock, Parser, one_line, problem, write

if api.HAS_TRITON:
    from kernels import triton_backward, triton_forward

SHAPES = {  # (N, D, V) of the problems that a tile is searched with, by the end of its name
    "": [(8192, 2048, 50257), (8192, 4096, 50257)],
    " narrow": [(8192, 768, 50257)],
}
SWEEPS = [  # the numbers of a tile that are searched together
    # Small enough for two programs on a processor: one reduces its tile while the other multiplies.
    {"BLOCK_N": (128,), "BLOCK_V": (128,), "num_warps": (4,), "num_stages": (2, 3)},
    {"BLOCK_N": (64, 128, 256), "BLOCK_V": (64, 128, 256), "num_warps": (4, 8)},
    {"BLOCK_D": (32, 64, 128), "num_stages": (2, 3, 4, 5)},
    {"TMA": (False, True), "GROUP": (4, 8, 16, 32)},
]
ACCUMULATOR = 32 * 128  # fp32 values of a tile that fit the registers of a warp
REPEATS = 10  # of each timing; the median counts
ROOM = 8 << 30  # a budget under which the forward keeps E


@torch.no_grad()
def tune(dtype, name, device="cuda"):
    """Searches the tiles of each kernel for a dtype and its name, such as torch.float32 and "fp32".

    The forward has one tile whether it keeps E or not: two would sum in two orders, and an
    on-policy ratio would not be exactly 1."""
    major, minor = torch.cuda.get_device_capability()
    chip, clock = f"sm_{major}{minor}", Clock(device)
    entry = {key: dict(tile) for key, tile in tiles.chip_tiles(chip, name).items()}
    tiles.table().setdefault(chip, {})[name] = entry
    save()
    for width, shapes in SHAPES.items():
        cases = [with_expected(*problem(*shape, dtype, device)) for shape in shapes]
        for kind in ("forward", "backward"):
            key = kind + width
            entry.setdefault(key, dict(entry[kind]))
            best_ms = search(kind, key, entry, cases, clock)
            print(f"{chip} {name} {key}: {best_ms:.3f} ms with {entry[key]}", flush=True)


def search(kind, key, entry, cases, clock):
    """Replaces entry[key], a tile of kernel kind, by faster ones -> ms of the fastest."""
    best_ms = mean_ms(kind, entry[key], cases, clock)
    for sweep in SWEEPS:
        for tile in neighbours(entry[key], sweep):
            ms = mean_ms(kind, tile, cases, clock)
            if ms < best_ms:
                best_ms, entry[key] = ms, tile
                save()
    return best_ms


def neighbours(tile, sweep):
    """-> the tiles that differ from this one in the numbers of a sweep and fit the registers."""
    found = []
    for values in product(*sweep.values()):
        other = tile | dict(zip(sweep, values, strict=True))
        fits = other["BLOCK_N"] * other["BLOCK_V"] <= ACCUMULATOR * other["num_warps"]
        if other != tile and fits:
            found.append(other)
    return found


def with_expected(hidden, weight, target):
    """-> a case: the inputs, and the torch backend's logp and d_hidden of its sum."""
    output = torch_backend.forward(hidden, weight, None, target, 1.0, 0.0, False, -1)
    logp = output[0]
    d_hidden, _, _ = torch_backend.backward(
        torch.ones_like(logp), None, None,
        hidden, weight, None, target, *output, 1.0, 0.0, [True, False, False],
    )  # fmt: skip
    return hidden, weight, target, logp, d_hidden.double()


def mean_ms(kind, tile, cases, clock):
    """-> geometric mean of the ms of all cases; infinite if the tile fails or is wrong."""
    ms, note = float("inf"), ""
    try:
        times = []
        for case in cases:
            times += check_and_time(kind, tile, *case, clock)
        ms = statistics.geometric_mean(times)
    except Exception as error:  # for one, more shared memory or registers than there are
        note = one_line(error)
    numbers = [f"{key}={value}" for key, value in tile.items()]
    print(kind, " ".join(numbers), f"{ms:.3f} ms", note, flush=True)
    return ms


def check_and_time(kind, tile, hidden, weight, target, expected_logp, expected_d_hidden, clock):
    """-> ms of the forward without and with E, or of d logits computed again.

    Raises ValueError if logp or d_hidden are wrong."""
    ones = torch.ones_like(expected_logp)

    def forward(budget):
        forward_tile = tile if kind == "forward" else None
        return triton_forward.forward(hidden, weight, None, target, 1.0, 0.0, False, budget, forward_tile)

    def gradient(output, need_hidden):
        need = [need_hidden, False, False]
        d_hidden, _, _ = triton_backward.backward(
            ones, None, None, hidden, weight, None, target, *output, 1.0, 0.0, need, tile
        )
        return d_hidden

    output = forward(ROOM if kind == "forward" else 0)
    logp_error = (output[0] - expected_logp).abs().max()
    d_hidden_error = (gradient(output, True).double() - expected_d_hidden).norm()
    # loose: it catches wrong tiles, not rounding
    if not (logp_error < 1e-4 and d_hidden_error < 0.01 * expected_d_hidden.norm()):
        raise ValueError("wrong results")
    if kind == "forward":
        return [median_ms(partial(forward, -1), clock), median_ms(partial(forward, ROOM), clock)]
    return [median_ms(partial(gradient, output, False), clock)]


def median_ms(function, clock):
    return statistics.median([timed(function, clock) for _ in range(REPEATS)])


def timed(function, clock):
    clock.start()
    function()
    clock.mark()
    return clock.ms()[0]


def save():
    write(tiles.PATH, one_tile_per_line(tiles.table()).encode())


def one_tile_per_line(table):
    def on_one_line(match):
        return "{" + re.sub(r"\s+", " ", match[1]) + "}"

    return re.sub(r"\{\s*(\"BLOCK_N\"[^}]*?)\s*\}", on_one_line, json.dumps(table, indent=2)) + "\n"


def main():
    parser = Parser("kernels.tune", __doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="dtype of hidden and weight")
    args = parser.parse_args()
    if not api.HAS_TRITON:
        parser.error("triton is not installed; pip install triton, on Linux")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    with parser.refusing():
        tune(DTYPES[args.dtype], args.dtype)


if __name__ == "__main__":
    main()
