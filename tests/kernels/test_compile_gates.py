"""Every Triton kernel compiled for the chips of kernels/tiles.json, without a GPU.

No register is spilled, nothing is computed in fp64, shared memory is within the chip's limit, matrix
products are on the tensor cores, no exponential is computed twice, and a row is summed in one order
whether its e is kept or not. Triton ships the compiler and the disassembler."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels of the interpreter do not compile", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import tiles, triton_backward, triton_forward, triton_frozen, triton_rows, triton_tile  # noqa: E402

VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# KiB of shared memory that a program may use. sm_80 has 163, but its tiles serve sm_86 and sm_89.
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}
TENSOR_CORE = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": r"UTC\w*MMA", "sm_120": "HMMA"}
# The types of the kernels' arguments, by name; pointers in MATRIX are to the inputs' dtype.
MATRIX = "x w bias store out logits".split()
FP32_POINTERS = "reference2 peak2 total moment2 target_z2 logp rest lse entropy share".split()
FP32_POINTERS += "g of_p of_target h sums".split()
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


class Built(NamedTuple):
    sass: str
    ttgir: str  # Triton's own last form: the layout of each tensor over the threads
    shared: int  # bytes of shared memory


def built(kernel, chip, dtype, tile, **constants):
    """Compile -> Built."""
    options = dict(triton_tile.FUSE)
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
    return Built(sass, binary.asm["ttgir"], binary.metadata.shared)


def gate(kernel, chip, dtype, tile, may_spill=False, **constants):
    """-> Built."""
    result = built(kernel, chip, dtype, tile, **constants)
    spills = len(re.findall(r"\b(?:STL|LDL)\b", result.sass))
    assert may_spill or not spills, "registers spill"
    fp64 = len(re.findall(r"\bD(?:FMA|ADD|MUL|SETP)\b", result.sass))
    assert not fp64, "fp64, at a 64th of the speed of fp32 on many chips"
    assert result.shared <= SHARED[chip] * 1024
    return result


def gate_product(kernel, kind, chip, dtype, extras, tile=None, **more):
    """gate of a kernel that begins with a product -> Built."""
    tile = tile or tiles.chip_tiles(chip, dtype)[kind]
    precision = "tf32x3" if dtype == "fp32" else "ieee"
    doubled = is_doubled(chip, dtype, more)
    may_spill = doubled and extras == "bias" and VERSION < (3, 9)
    result = gate(kernel, chip, dtype, tile, may_spill, **EXTRAS[extras], PRECISION=precision, **more)
    assert re.search(rf"\b{TENSOR_CORE[chip]}\b", result.sass), "no tensor core"
    assert re.search(r"UTMALDG" if tile["TMA"] else r"LDGSTS", result.sass), "loads are not pipelined"
    # V is no multiple of 16, as in GPT-2. Only the target's element is stored alone.
    assert len(re.findall(r"STG\.E\.U16", result.sass)) <= 8, "stores of one element"
    elements = tile["BLOCK_N"] * tile["BLOCK_V"] // (32 * tile["num_warps"])  # of a thread
    expected = elements * (2 if EXTRAS[extras]["SOFTCAP"] else 1)
    found = result.sass.count("MUFU.EX2")
    # Each row has one or two more, and a thread up to 8 rows of a half tile.
    assert expected <= found, "some exponentials are not in base 2"
    if not doubled:
        assert found <= 1.6 * expected, "exponentials are computed twice"
    return result


def is_doubled(chip, dtype, more):
    """Where Triton computes e once for the sums and once, in another layout, for the store."""
    return chip == "sm_100" and more.get("STORE", False) and (dtype == "fp32" or VERSION < (3, 9))


EXTRAS = {
    "plain": {"BIAS": False, "SOFTCAP": False, "ENTROPY": False},
    "bias": {"BIAS": True, "SOFTCAP": False, "ENTROPY": False},
    "softcap": {"BIAS": False, "SOFTCAP": True, "ENTROPY": False},
    "bias and entropy": {"BIAS": True, "SOFTCAP": False, "ENTROPY": True},
}
# fp16 has the tiles of bf16: it is tried once.
CASES = [("sm_90", "fp16", "plain")]
for _chip in SHARED:
    CASES += [(_chip, "bf16", extras) for extras in EXTRAS]
    CASES += [(_chip, "fp32", "bias"), (_chip, "fp32", "bias and entropy")]


@pytest.mark.slow
@pytest.mark.parametrize("chip, dtype, extras", CASES)
def test_products(chip, dtype, extras):
    gate_product(triton_backward.slice_kernel, "backward", chip, dtype, extras)
    without = gate_product(triton_forward.logits_kernel, "forward", chip, dtype, extras, STORE=False)
    if extras not in ("plain", "bias") or dtype == "fp16":
        return  # nothing is kept
    store = gate_product(triton_forward.logits_kernel, "forward", chip, dtype, extras, STORE=True)
    assert sums(store.ttgir) == sums(without.ttgir), "the log-prob would depend on what is kept"
    if not is_doubled(chip, dtype, {"STORE": True}) and dtype == "bf16":
        fused = [result.sass.count("FFMA") for result in (store, without)]
        assert fused[0] == fused[1], "a b + c is rounded once in one and twice in the other"


def sums(ttgir):
    """-> the types, layouts included, of the tensors that are summed, in order."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    found = []
    for reduction in re.findall(r'"tt\.reduce".*?\}\) : \((.*?)\) ->', ttgir, re.DOTALL):
        found.append(re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), reduction))
    bodies = re.findall(r'"tt\.reduce".*?tt\.reduce\.return', ttgir, re.DOTALL)
    return [kind for kind, body in zip(found, bodies, strict=True) if "arith.addf" in body]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_90"])
@pytest.mark.parametrize("store", [False, True])
def test_two_programs_share_a_processor(chip, store):
    """With this tile, a candidate of kernels.tune: the epilogue of one under the product of the other."""
    tile = tiles.chip_tiles(chip, "bf16")["forward"]
    tile = tile | {"BLOCK_V": 128, "num_warps": 4, "num_stages": 3}
    result = gate_product(triton_forward.logits_kernel, "", chip, "bf16", "plain", tile, STORE=store)
    assert 2 * (result.shared + 1024) <= 228 * 1024  # of a processor; 128 threads have registers for two


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_the_rest(chip):
    merge = triton_forward.MERGE | {"WIDTH": 128}
    for dtype in ("bf16", "fp32"):
        gate(triton_forward.merge_kernel, chip, dtype, {}, ENTROPY=True, STORE=False, **merge)
        store = gate(triton_forward.merge_kernel, chip, dtype, {}, ENTROPY=False, STORE=True, **merge)
        without = gate(triton_forward.merge_kernel, chip, dtype, {}, ENTROPY=False, STORE=False, **merge)
        assert sums(store.ttgir) == sums(without.ttgir)
        gate(triton_frozen.raise_kernel, chip, dtype, {}, BLOCK_D=256, **merge)
        gate(triton_forward.reference_kernel, chip, dtype, {}, BIAS=True, BLOCK_D=1024)
    gate(triton_rows.row_kernel, chip, "bf16", triton_rows.ROW)
    gate(triton_rows.row_grad_kernel, chip, "bf16", triton_rows.ROW)
    gate(triton_rows.segment_kernel, chip, "fp32", {}, BLOCK=512)


@pytest.mark.slow
def test_one_token():
    """Triton makes a constant of V = 1: the kernels compile then, too. N is never made one."""
    tile = tiles.chip_tiles("sm_90", "bf16")["forward"]
    precise = {"PRECISION": "ieee"}
    extras = EXTRAS["bias and entropy"] | precise
    built(triton_forward.logits_kernel, "sm_90", "bf16", tile, V=1, **extras, STORE=False)
    built(triton_forward.logits_kernel, "sm_90", "bf16", tile, V=1, **EXTRAS["bias"], **precise, STORE=True)
    merge = triton_forward.MERGE | {"WIDTH": 128}
    built(triton_forward.merge_kernel, "sm_90", "bf16", {}, V=1, ENTROPY=True, STORE=True, **merge)
    built(triton_forward.reference_kernel, "sm_90", "bf16", {}, V=1, BIAS=True, BLOCK_D=1024)
    built(triton_backward.slice_kernel, "sm_90", "bf16", tile, width=1, **extras)


def test_an_odd_width_is_padded():
    """To a multiple of 16, which is what Triton knows of D, and without which it loads bf16 one by one."""
    for dtype in (torch.bfloat16, torch.float32):
        for width in (1, 8, 1000, 1024):
            x = triton_tile.aligned(torch.ones(3, width, dtype=dtype))
            assert x.shape[1] % 16 == 0 and x.data_ptr() % 16 == 0 and x.sum() == 3 * width
    x = torch.ones(3, 1024)
    assert triton_tile.aligned(x) is x


@pytest.mark.slow
def test_the_gate_sees_loads_of_one_element(monkeypatch):
    """Of a D that is not known to be a multiple of 16."""
    names = [name for name in MULTIPLES_OF_16 if name != "D"]
    monkeypatch.setattr(__import__(__name__), "MULTIPLES_OF_16", names)
    with pytest.raises(AssertionError, match="not pipelined"):
        gate_product(triton_forward.logits_kernel, "forward", "sm_80", "bf16", "plain", STORE=False)


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


def test_the_gate_sees_other_sums():
    """Two layouts of one sum are told apart, whatever their names are."""
    reduction = '#a = {}\n"tt.reduce"(%x) <{{}}> ({{ arith.addf tt.reduce.return }}) : (tensor<4x#a>) -> f32'
    assert sums(reduction.format("one")) == ["tensor<4xone>"] != sums(reduction.format("two"))


def test_table():
    """An unknown chip takes the nearest lower one's tiles, whatever N; an older one has none."""
    assert tiles.chip_tiles("sm_89", "bf16") == tiles.table()["sm_80"]["bf16"]
    assert tiles.chip_tiles("sm_103", "fp32") == tiles.table()["sm_100"]["fp32"]
    with pytest.raises(ValueError, match="hidden"):
        tiles.chip_tiles("sm_75", "fp16")
    assert tiles.tile_for("forward", torch.empty(3, 4)) == tiles.tile_for("forward", torch.empty(300, 4))


def test_a_tile_of_its_own_for_narrow_rows(monkeypatch):
    table = {"interpreter": {"fp32": {"forward": "wide", "forward narrow": "narrow", "backward": "any"}}}
    monkeypatch.setattr(tiles, "table", lambda: table)
    assert tiles.tile_for("forward", torch.empty(3, 1024)) == "narrow"
    assert tiles.tile_for("forward", torch.empty(3, 1025)) == "wide"
    assert tiles.tile_for("backward", torch.empty(3, 4)) == "any"
