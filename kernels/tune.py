"""The tiles of the Triton kernels, searched on the GPU at hand: `python -m kernels.bench --tune`."""

import json
import re
import statistics
from functools import partial
from itertools import product

import torch

from kernels import backward, logp, torch_backend
from kernels.bench import Clock, fail, one_line, problem

TUNE = [(8192, 768, 50257), (8192, 4096, 50257)]  # N, D, V
SWEEP = [  # the tiles' numbers that are searched together
    {"BLOCK_N": (64, 128, 256), "BLOCK_V": (64, 128, 256), "num_warps": (4, 8)},
    {"BLOCK_D": (32, 64, 128), "num_stages": (2, 3, 4, 5)},
    {"TMA": (False, True), "GROUP": (4, 8, 16, 32)},
]
ACCUMULATOR = 32 * 128  # fp32 values of a tile that fit the registers of a warp


@torch.no_grad()
def tune(dtype, name, device="cuda"):
    """Searches each kernel's tiles, a few numbers at a time; a faster one is in kernels/tiles.json at once.

    The forward has one tile whether it keeps E or not: two would sum in two orders, and a ratio would not be exactly 1."""
    chip, clock = "sm_{}{}".format(*torch.cuda.get_device_capability()), Clock(device)
    entry = {kind: dict(tile) for kind, tile in logp.chip_tiles(chip, name).items()}
    logp.table().setdefault(chip, {})[name] = entry
    save()
    cases = [solved(*problem(*shape, dtype, device)) for shape in TUNE]
    for kind in entry:
        best = trial(kind, entry[kind], cases, clock)
        for axes in SWEEP:
            base = entry[kind]
            for values in product(*axes.values()):
                tile = base | dict(zip(axes, values, strict=True))
                if tile != base and tile["BLOCK_N"] * tile["BLOCK_V"] <= ACCUMULATOR * tile["num_warps"]:
                    ms = trial(kind, tile, cases, clock)
                    if ms < best:
                        best, entry[kind] = ms, tile
                        save()
        print(f"{chip} {name} {kind}: {best:.3f} ms with {entry[kind]}", flush=True)


def solved(x, w, t):
    """-> a case: the inputs, and what the torch backend makes of them, logp and d_hidden of its sum."""
    out = torch_backend.forward(x, w, None, t, 1.0, 0.0, False, -1)
    d_hidden, *_ = torch_backend.backward(torch.ones_like(out[0]), None, x, w, None, t, *out, 1.0, 0.0, [True, False, False])
    return x, w, t, out[0], d_hidden.double()


def trial(kind, tile, cases, clock):
    """-> geometric mean in ms over the cases; infinite where the tile does not fit the chip or its results are wrong."""
    try:
        ms, note = statistics.geometric_mean([x for case in cases for x in attempt(kind, tile, *case, clock)]), ""
    except Exception as error:  # more shared memory or registers than there are
        ms, note = float("inf"), one_line(error)
    print(kind, *(f"{key}={value}" for key, value in tile.items()), f"{ms:.3f} ms", note, flush=True)
    return ms


def attempt(kind, tile, x, w, t, logp, d_hidden, clock):
    """-> ms of the forward without and with E, or of d logits computed again. Raises ValueError where they are wrong."""

    def forward(budget):
        return backward.forward(x, w, None, t, 1.0, 0.0, False, budget, tile if kind == "forward" else None)

    def grad(saved, need):
        ones = torch.ones_like(logp)
        return backward.backward(ones, None, x, w, None, t, *saved, 1.0, 0.0, [need, False, False], tile)[0]

    out = forward(8 << 30 if kind == "forward" else 0)
    wrong = grad(out, True).double() - d_hidden
    if not ((out[0] - logp).abs().max() < 1e-4 and wrong.norm() < 0.01 * d_hidden.norm()):
        raise ValueError("wrong results")
    runs = [partial(forward, -1), partial(forward, 8 << 30)] if kind == "forward" else [partial(grad, out, False)]
    return [statistics.median(timed(f, clock) for _ in range(10)) for f in runs]


def timed(f, clock):
    clock.start()
    f()
    clock.mark()
    return clock.ms()[0]


def save():
    """The table, whole or not at all."""
    part = logp.TILES.with_suffix(".part")
    try:
        part.write_text(one_tile_a_line(logp.table()))
        part.replace(logp.TILES)
    except OSError as error:
        fail(f"--tune: {error}")


def one_tile_a_line(table):
    text = json.dumps(table, indent=2)
    return re.sub(r"\{\s*(\"BLOCK_N\"[^}]*?)\s*\}", lambda tile: "{" + re.sub(r"\s+", " ", tile[1]) + "}", text) + "\n"
