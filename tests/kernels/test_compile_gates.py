"""Every Triton kernel compiled for the chips of kernels/tiles.json, without a GPU: no spilled register, shared memory within the
chip's limit, and the matrix products on the tensor cores. Triton ships the compiler and the disassembler."""

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
SHARED = {
    "sm_80": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
}  # KiB a program may use; sm_80 (163): its tiles serve sm_86, 89
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": r"UTC\w*MMA", "sm_120": "HMMA"}
FP32 = "peak2 total moment2 target_z2 logp rest lse entropy g h x".split()
NUMBERS = "scale softcap ratio".split()
INT32 = "N V D slice_start slots peak_stride stats_stride store_stride out_stride stride".split()
EVEN = "D slice_start store_stride out_stride stride".split()
MATRIX = "x w bias store out logits".split()  # of the inputs' dtype


def built(kernel, chip, dtype, tile, **constants):
    """Compile -> (SASS, shared memory in bytes). Pointers and what is in EVEN are multiples of 16, as in a real call."""
    tile = dict(tile)
    options = triton_forward.FUSE | {
        name: tile.pop(name) for name in ("num_warps", "num_stages") if name in tile
    }
    constants |= tile
    types = (
        {"target": "*i64", "cu_seqlens": "*i32"}
        | {name: "i32" for name in INT32}
        | {name: "*fp32" for name in FP32}
    )
    types |= {name: "fp32" for name in NUMBERS} | {name: f"*{dtype}" for name in MATRIX}
    if constants.get("TMA"):
        types["x"] = f"tensordesc<{dtype}[{tile['BLOCK_N']},{tile['BLOCK_D']}]>"
        types["w"] = f"tensordesc<{dtype}[{tile['BLOCK_V']},{tile['BLOCK_D']}]>"
    if constants.get("BIAS") is False:
        constants["bias"] = None
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    even = [t[0] == "*" or t == "i32" and name in EVEN for name, t in signature.items()]
    attrs = {(i,): [["tt.divisibility", 16]] for i, yes in enumerate(even) if yes}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
    binary = triton.compile(source, target=GPUTarget("cuda", int(chip[3:]), 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        sass = subprocess.run(
            [TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    return sass, binary.metadata.shared


def gate(kernel, chip, dtype, tile, **constants):
    sass, shared = built(kernel, chip, dtype, tile, **constants)
    assert not re.search(r"\b(STL|LDL)\b", sass), "registers spill"
    assert shared <= SHARED[chip] * 1024
    return sass


EXTRAS = {
    "plain": {"BIAS": False, "SOFTCAP": False, "ENTROPY": False},
    "softcap": {"BIAS": False, "SOFTCAP": True, "ENTROPY": False},
    "bias and entropy": {"BIAS": True, "SOFTCAP": False, "ENTROPY": True},
}
CASES = [
    (chip, dtype, extras)
    for chip in SHARED
    for dtype, extra_names in (("bf16", EXTRAS), ("fp16", ["plain"]), ("fp32", ["plain", "bias and entropy"]))
    for extras in extra_names
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
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
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
    """An unknown chip takes the nearest lower one's tiles, whatever N; a chip older than all has none."""
    assert tiles.chip_tiles("sm_89", "bf16") == tiles.table()["sm_80"]["bf16"]
    assert tiles.chip_tiles("sm_103", "fp32") == tiles.table()["sm_100"]["fp32"]
    with pytest.raises(ValueError, match="hidden"):
        tiles.chip_tiles("sm_75", "fp16")
    assert tiles.tile_for("forward", torch.empty(3, 4)) == tiles.tile_for("forward", torch.empty(300, 4))
