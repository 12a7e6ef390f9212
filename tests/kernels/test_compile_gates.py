"""Every Triton kernel compiled for the chips of kernels/tiles.json, without a GPU.

No register is spilled, nothing is computed in fp64, shared memory is within the chip's limit, and
matrix products are on the tensor cores. Triton ships the compiler and the disassembler."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels of the interpreter do not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import tiles, triton_backward, triton_forward  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# KiB of shared memory that a program may use. sm_80 has 163, but its tiles serve sm_86 and sm_89.
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": r"UTC\w*MMA", "sm_120": "HMMA"}
# The types of the kernels' arguments, by name; pointers in MATRIX are to the inputs' dtype.
MATRIX = "x w bias store out logits".split()
FP32_POINTERS = "reference2 peak2 total moment2 target_z2 logp rest lse entropy share g of_p of_target h".split()
NUMBERS = "scale softcap ratio".split()
INTEGERS = "N V D width slice_start slots stats_stride store_stride out_stride stride".split()
MULTIPLES_OF_16 = "D slice_start store_stride out_stride stride".split()  # as in a real call; pointers, too


def argument_type(name, dtype, tile):
    if name in ("x", "w") and tile.get("TMA"):
        rows = tile["BLOCK_N" if name == "x" else "BLOCK_V"]
        return f"tensordesc<{dtype}[{rows},{tile['BLOCK_D']}]>"
    if name in MATRIX:
        return f"*{dtype}"
    if name in FP32_POINTERS:
        return "*fp32"
    if name in NUMBERS:
        return "fp32"
    if name in INTEGERS:
        return "i32"
    return {"target": "*i64", "cu_seqlens": "*i32"}[name]


def built(kernel, chip, dtype, tile, **constants):
    """Compile -> (SASS, shared memory in bytes)."""
    options = dict(triton_forward.FUSE)
    for name, value in tile.items():
        if name in ("num_warps", "num_stages"):
            options[name] = value
        else:
            constants[name] = value
    if constants.get("BIAS") is False:
        constants["bias"] = None
    signature, attrs = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = argument_type(name, dtype, tile)
        if name in MULTIPLES_OF_16 or signature[name].startswith("*"):
            attrs[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", int(chip[3:]), 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [TOOLS / "nvdisasm", "-c", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sass, binary.metadata.shared


def gate(kernel, chip, dtype, tile, **constants):
    sass, shared = built(kernel, chip, dtype, tile, **constants)
    assert not re.search(r"\b(STL|LDL)\b", sass), "registers spill"
    assert not re.search(r"\bD(FMA|ADD|MUL|SETP)\b", sass), (
        "fp64, at a 64th of the speed of fp32 on many chips"
    )
    assert shared <= SHARED[chip] * 1024
    return sass


EXTRAS = {
    "plain": {"BIAS": False, "SOFTCAP": False, "ENTROPY": False},
    "softcap": {"BIAS": False, "SOFTCAP": True, "ENTROPY": False},
    "bias and entropy": {"BIAS": True, "SOFTCAP": False, "ENTROPY": True},
}
# What passes with extras passes without them, and fp16 has the tiles of bf16: each is tried once.
CASES = [("sm_90", "bf16", "plain"), ("sm_90", "fp16", "plain")]
for _chip in SHARED:
    CASES += [
        (_chip, "bf16", "softcap"),
        (_chip, "bf16", "bias and entropy"),
        (_chip, "fp32", "bias and entropy"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("chip, dtype, extras", CASES)
def test_products(chip, dtype, extras):
    entry = tiles.chip_tiles(chip, dtype)
    constants = EXTRAS[extras] | {"PRECISION": "tf32x3" if dtype == "fp32" else "ieee"}
    for kernel, kind, more in (
        (triton_forward.logits_kernel, "forward", {"STORE": True}),
        (triton_backward.slice_kernel, "backward", {}),
    ):
        sass = gate(kernel, chip, dtype, entry[kind], **constants, **more)
        assert re.search(rf"\b{TENSOR_CORE[chip]}\b", sass), "no tensor core"
        assert re.search(r"UTMALDG" if entry[kind]["TMA"] else r"LDGSTS", sass), "loads are not pipelined"
        assert not re.search(r"STG\.E\.U16", sass), (
            "stores of one element"
        )  # V is no multiple of 16, as in GPT-2


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_the_rest(chip):
    width = tiles.chip_tiles(chip, "bf16")["forward"]["BLOCK_V"] // 2
    gate(triton_forward.merge_kernel, chip, "bf16", {}, ENTROPY=True, BLOCK_N=32, BLOCK_T=32)
    sass = gate(
        triton_backward.kept_kernel, chip, "bf16", {}, SOFTCAP=True, ENTROPY=True, BLOCK_N=32, WIDTH=width
    )
    assert not re.search(r"(LDG|STG)\.E\.U16", sass), "loads or stores of one element"
    gate(triton_forward.row_kernel, chip, "bf16", {"num_warps": 8}, BLOCK_V=4096)
    gate(triton_backward.row_grad_kernel, chip, "bf16", {"num_warps": 8}, BLOCK_V=4096)
    gate(triton_forward.segment_kernel, chip, "fp32", {}, BLOCK=512)


@pytest.mark.slow
def test_one_token():
    """Triton makes a constant of V = 1: the kernels compile then, too. N is never made one."""
    tile, extras = (
        tiles.chip_tiles("sm_90", "bf16")["forward"],
        EXTRAS["bias and entropy"] | {"PRECISION": "ieee", "V": 1},
    )
    built(triton_forward.logits_kernel, "sm_90", "bf16", tile, **extras, STORE=True)
    built(triton_forward.merge_kernel, "sm_90", "bf16", {}, V=1, ENTROPY=True, BLOCK_N=32, BLOCK_T=32)
    built(triton_backward.slice_kernel, "sm_90", "bf16", tile, **extras)


def test_the_gate_can_fail():
    """A tile too large for its warps spills."""
    tile = tiles.chip_tiles("sm_90", "bf16")["forward"] | {"num_warps": 4}
    with pytest.raises(AssertionError, match="spill"):
        gate(
            triton_forward.logits_kernel,
            "sm_90",
            "bf16",
            tile,
            **EXTRAS["plain"],
            PRECISION="ieee",
            STORE=True,
        )


def test_table():
    """An unknown chip takes the nearest lower one's tiles, whatever N; an older one has none."""
    assert tiles.chip_tiles("sm_89", "bf16") == tiles.table()["sm_80"]["bf16"]
    assert tiles.chip_tiles("sm_103", "fp32") == tiles.table()["sm_100"]["fp32"]
    with pytest.raises(ValueError, match="hidden"):
        tiles.chip_tiles("sm_75", "fp16")
    assert tiles.tile_for("forward", torch.empty(3, 4)) == tiles.tile_for("forward", torch.empty(300, 4))
