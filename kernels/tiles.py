"""The block sizes of the Triton kernels: tiles.json, by chip, dtype and kernel.

A tile is a dict of BLOCK_N, BLOCK_V, BLOCK_D, GROUP, TMA, num_warps and num_stages. A kernel may have
a second one for hidden states of at most 1024 numbers. None depends on how many rows there are.
"""

import json
from functools import cache
from pathlib import Path

import torch

PATH = Path(__file__).with_name("tiles.json")
NARROW = 1024  # numbers of a hidden state up to which the tile "forward narrow" is taken, if there is one
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@cache
def table():
    """-> {chip: {dtype: {"forward": tile, "backward": tile[, "forward narrow": tile, ...]}}}"""
    return json.loads(PATH.read_text())


def number(chip):
    """ "sm_90" -> 90."""
    return int(chip.removeprefix("sm_"))


@cache
def chip_tiles(chip, dtype):
    """The table's entry for a chip, "sm_90", or for the nearest lower one that has the dtype."""
    chips = [name for name, entry in table().items() if name.startswith("sm_") and dtype in entry]
    older = [name for name in chips if number(name) <= number(chip)]
    if not older:
        raise ValueError(f"hidden is on {chip}, older than any chip in tiles.json")
    return table()[max(older, key=number)][dtype]


def tile_for(kernel, hidden):
    """The tile of "forward" or "backward" for hidden (N, D), by its device, dtype and D."""
    if hidden.device.type == "cpu":
        entry = table()["interpreter"]["fp32"]
    else:
        major, minor = torch.cuda.get_device_capability(hidden.device)
        entry = chip_tiles(f"sm_{major}{minor}", DTYPE_NAMES[hidden.dtype])
    narrow = f"{kernel} narrow"
    return entry[narrow] if hidden.shape[1] <= NARROW and narrow in entry else entry[kernel]
