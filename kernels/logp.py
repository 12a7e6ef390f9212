"""The Triton backend, forward: tiles of hidden @ weight^T live in registers and only their softmax statistics are written.

    logits   tile (BLOCK_N, BLOCK_V) of z on the tensor cores -> its row max, sum of exp and, for entropy, sum of exp times z
    merge    the tiles of a row, in a fixed order -> log-prob, log-sum-exp, entropy

z stays fp32 from the accumulator on. Inside the kernels it is in units of ln 2, where exp is one instruction. The tile depends
on device, dtype and kernel, never on N, so a row's log-prob does not depend on what else is in the batch. See README.md.
"""

import json
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.torch_backend import wide

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOW = tl.constexpr(-1e30)  # stands for log 0: unlike -inf, it can be subtracted from itself
TILES = Path(__file__).with_name("tiles.json")
CHUNK = 16384  # rows per launch: bounds the memory of the tiles' statistics
IGNORE = tl.constexpr(-100)
PER_BATCH = ("N", "peak_stride", "stats_stride")  # arguments for whose values Triton must not make another binary
FUSE = {"enable_fp_fusion": True}  # a b + c in one rounding: Triton's default until 3.9
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


# --- kernels


@triton.jit
def tile_of(pid, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """-> row block, vocabulary tile: GROUP row blocks take each weight tile one after the other, while it is in the L2 cache."""
    row_blocks = tl.cdiv(N, BLOCK_N)
    band = GROUP * tl.cdiv(V, BLOCK_V)
    first = pid // band * GROUP
    rows = min(row_blocks - first, GROUP)
    return first + pid % band % rows, pid % band // rows


@triton.jit
def product(
    x, w, row, col, N, V, D, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x w^T of rows row.. and columns col.. in two (BLOCK_N, BLOCK_V / 2) fp32 halves: half the registers for what comes next.

    x (N, D), w (V, D): descriptors for the tensor memory accelerator, zero outside, or pointers to rows of length D."""
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if not TMA:  # rows outside read another row: their results are dropped
        d = tl.arange(0, BLOCK_D)
        x += ((row + tl.arange(0, BLOCK_N)) % N).to(tl.int64)[:, None] * D + d[None, :]
        w += ((col + tl.arange(0, BLOCK_V)) % V).to(tl.int64)[None, :] * D + d[:, None]
    for first in range(0, D, BLOCK_D):
        if TMA:
            z = tl.dot(x.load([row, first]), w.load([col, first]).T, z, input_precision=PRECISION)
        else:
            inside = first + d < D
            a = tl.load(x + first, mask=inside[None, :], other=0.0)
            b = tl.load(w + first, mask=inside[:, None], other=0.0)
            z = tl.dot(a, b, z, input_precision=PRECISION)
    return tl.split(tl.permute(tl.reshape(z, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))


@triton.jit
def logits_of(z, bias, cols, V, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The product of a tile -> its logits in units of ln 2; scale = 1 / (temperature ln 2)."""
    if BIAS:
        z += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:  # tanh(a) = 1 - 2 / (exp(2a) + 1)
        z = softcap - 2 * softcap / (tl.exp2(z * (2 * LOG2E / softcap)) + 1)
    return z * scale


@triton.jit
def reduce_tile(
    z, bias, target, peak, total, moment, own, store, row, tile, N, V, peak_stride, stats_stride, store_stride, scale, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows, cols = row + tl.arange(0, BLOCK_N), tile * WIDTH + tl.arange(0, WIDTH)
    live = rows < N
    z = logits_of(z, bias, cols, V, scale, softcap, BIAS, SOFTCAP)
    t = tl.load(target + rows, mask=live, other=-1).to(tl.int32)
    here = live & (t >= tile * WIDTH) & (t < min(tile * WIDTH + WIDTH, V))
    tl.store(own + rows, tl.sum(tl.where(cols[None, :] == t[:, None], z, 0.0), 1), mask=here)
    z = tl.where((cols < V)[None, :] & ~(z < LOW), z, LOW)  # a banned token (bias -inf) is LOW; NaN stays NaN
    m = tl.max(z, 1)
    z -= m[:, None]
    e = tl.exp2(z)
    tl.store(peak + tile.to(tl.int64) * peak_stride + rows, m, mask=live)
    slot = tile.to(tl.int64) * stats_stride + rows
    tl.store(total + slot, tl.sum(e, 1), mask=live)
    if ENTROPY:
        tl.store(moment + slot, tl.sum(e * z, 1), mask=live)
    if STORE:
        at = rows.to(tl.int64)[:, None] * store_stride + cols[None, :]
        tl.store(store + at, e.to(store.dtype.element_ty), mask=live[:, None] & (cols < store_stride)[None, :])


@triton.jit(do_not_specialize=PER_BATCH)
def logits_kernel(
    x, w, bias, target, peak, total, moment, own, store, N, V, D, peak_stride, stats_stride, store_stride, scale, softcap,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """peak, total, moment (tiles, N): max z, sum of e = 2^(z - peak), sum of e (z - peak) over BLOCK_V / 2 columns;
    own (N,): z[target]; store (N, V): e."""
    row_block, tile = tile_of(tl.program_id(0), N, V, BLOCK_N, BLOCK_V, GROUP)
    row = row_block * BLOCK_N
    left, right = product(x, w, row, tile * BLOCK_V, N, V, D, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
    reduce_tile(
        left, bias, target, peak, total, moment, own, store, row, 2 * tile, N, V, peak_stride, stats_stride, store_stride,
        scale, softcap, BIAS, SOFTCAP, ENTROPY, STORE, BLOCK_N, BLOCK_V // 2,
    )  # fmt: skip
    reduce_tile(
        right, bias, target, peak, total, moment, own, store, row, 2 * tile + 1, N, V, peak_stride, stats_stride, store_stride,
        scale, softcap, BIAS, SOFTCAP, ENTROPY, STORE, BLOCK_N, BLOCK_V // 2,
    )  # fmt: skip


@triton.jit(do_not_specialize=PER_BATCH)
def merge_kernel(
    peak, total, moment, own, target, logp, lse, entropy, N, V, tiles, peak_stride, stats_stride,
    ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The statistics of all tiles of a row -> logp, lse, entropy (N,) in nats. Tiles in blocks of BLOCK_T, first to last."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    top = tl.full((BLOCK_N,), LOW, tl.float32)
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        at = t.to(tl.int64)[:, None] * peak_stride + rows[None, :]
        top = tl.maximum(top, tl.max(tl.load(peak + at, mask=(t < tiles)[:, None] & live[None, :], other=LOW), 0))
    s = tl.zeros((BLOCK_N,), tl.float32)
    a = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, tiles, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        at = t.to(tl.int64)[:, None] * stats_stride + rows[None, :]
        inside = (t < tiles)[:, None] & live[None, :]
        lower = tl.load(peak + t.to(tl.int64)[:, None] * peak_stride + rows[None, :], mask=inside, other=LOW) - top[None, :]
        weight = tl.exp2(lower)
        share = tl.load(total + at, mask=inside, other=0.0) * weight
        s += tl.sum(share, 0)
        if ENTROPY:
            a += tl.sum(tl.load(moment + at, mask=inside, other=0.0) * weight + share * lower, 0)
    log_s = tl.log2(s)
    t = tl.load(target + rows, mask=live, other=0)
    z = tl.load(own + rows, mask=live & (t >= 0) & (t < V), other=float("nan"))  # a target outside 0..V-1: NaN
    tl.store(logp + rows, tl.where(t == IGNORE, 0.0, (z - top - log_s) * LN2), mask=live)
    tl.store(lse + rows, (top + log_s) * LN2, mask=live)
    if ENTROPY:  # H = log s - E[z - top]
        tl.store(entropy + rows, tl.where(t == IGNORE, 0.0, (log_s - a / s) * LN2), mask=live)


@triton.jit
def row_kernel(logits, target, logp, lse, V, stride, BLOCK_V: tl.constexpr):
    """One program a row of existing logits (N, V): log-prob and log-sum-exp in one pass."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    cols = tl.arange(0, BLOCK_V)
    top = tl.full((BLOCK_V,), LOW, tl.float32)  # one running max and sum a lane, merged at the end
    s = tl.zeros((BLOCK_V,), tl.float32)
    for col in range(0, V, BLOCK_V):
        z = tl.load(line + col + cols, mask=col + cols < V, other=-float("inf")).to(tl.float32) * LOG2E
        z = tl.where(z < LOW, LOW, z)
        higher = tl.maximum(top, z)
        s = s * tl.exp2(top - higher) + tl.where(z == LOW, 0.0, tl.exp2(z - higher))
        top = higher
    m = tl.max(top, 0)
    log_s = tl.log2(tl.sum(s * tl.exp2(top - m), 0))
    t = tl.load(target + row)
    inside = (t >= 0) & (t < V)
    z = tl.load(line + t, mask=inside, other=0.0).to(tl.float32) * LOG2E
    result = tl.where(inside, (z - m - log_s) * LN2, float("nan"))
    tl.store(logp + row, tl.where(t == IGNORE, 0.0, result))
    tl.store(lse + row, (m + log_s) * LN2)


@triton.jit
def segment_kernel(x, cu_seqlens, out, BLOCK: tl.constexpr):
    """One program a sequence: lane i sums its elements i, i + BLOCK, ..., then the lanes are summed."""
    start = tl.load(cu_seqlens + tl.program_id(0))
    end = tl.load(cu_seqlens + tl.program_id(0) + 1)
    s = tl.zeros((BLOCK,), out.dtype.element_ty)
    for first in range(start, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        s += tl.load(x + i, mask=i < end, other=0.0).to(out.dtype.element_ty)
    tl.store(out + tl.program_id(0), tl.sum(s, 0))


# --- host


@cache
def table():
    return json.loads(TILES.read_text())


@cache
def chip_tiles(chip, dtype):
    """The table's entry for a chip, "sm_90", or for the nearest lower one that has the dtype."""
    known = sorted((int(name[3:]), name) for name, entry in table().items() if name.startswith("sm_") and dtype in entry)
    fits = [name for number, name in known if number <= int(chip[3:])]
    if not fits:
        raise ValueError(f"hidden is on {chip}, older than any chip in tiles.json")
    return table()[fits[-1]][dtype]


def tiles(kind, hidden):
    """The tile of kernel kind ("forward", "backward") for hidden's device and dtype: block sizes, num_warps, num_stages."""
    if hidden.device.type == "cpu":
        return table()["interpreter"]["fp32"][kind]
    major, minor = torch.cuda.get_device_capability(hidden.device)
    return chip_tiles(f"sm_{major}{minor}", DTYPES[hidden.dtype])[kind]


def aligned(x):
    """x (rows, D) contiguous, its base and rows on 16 bytes as the tensor memory accelerator wants; D padded with zeros."""
    x = x.contiguous()
    pad = -x.shape[1] % (16 // x.itemsize)
    return F.pad(x, (0, pad)) if pad else x if x.data_ptr() % 16 == 0 else x.clone()


def kept(hidden, weight, budget, tile=None):
    """Empty (peak, store) of the shapes that forward keeps for the backward under this budget; -1: no backward."""
    n, v = hidden.shape[0], weight.shape[0]
    width = (v + 63) // 64 * 64  # rows on 128 bytes for cuBLAS
    if budget < 0 or n * width * hidden.dtype.itemsize > budget:
        return hidden.new_empty((0, 0), dtype=torch.float32), hidden.new_empty((0, 0))
    slots = 2 * ((v - 1) // (tile or tiles("forward", hidden))["BLOCK_V"] + 1)
    return hidden.new_empty((slots, n), dtype=torch.float32), hidden.new_empty((n, width))


def operands(hidden, weight, tile):
    """Aligned hidden (N, D) and weight (V, D), or descriptors of them that load (BLOCK_N, BLOCK_D) and (BLOCK_V, BLOCK_D)."""
    if not tile["TMA"]:
        return hidden, weight
    return (
        TensorDescriptor.from_tensor(hidden, [tile["BLOCK_N"], tile["BLOCK_D"]]),
        TensorDescriptor.from_tensor(weight, [tile["BLOCK_V"], tile["BLOCK_D"]]),
    )


def precision(dtype):
    """fp32 products in three TF32 ones: within 1e-6 of fp32, on the tensor cores."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def forward(hidden, weight, bias, target, temperature, softcap, with_entropy, budget, tile=None):
    """-> logp, entropy, lse (N,) fp32, and (peak, store) as in kept: the tiles' maxima and 2^(z - peak), if budget allows."""
    hidden, weight, target = aligned(hidden), aligned(weight), target.long().contiguous()
    bias = bias if bias is None else bias.contiguous()
    (n, d), v = hidden.shape, weight.shape[0]
    tile = tile or tiles("forward", hidden)
    peak, store = kept(hidden, weight, budget, tile)
    keep = store.numel() > 0
    slots = 2 * triton.cdiv(v, tile["BLOCK_V"])
    statistics = hidden.new_empty((3 if with_entropy else 2, slots, min(n, CHUNK)), dtype=torch.float32)
    logp, lse, own, entropy = (statistics.new_empty(n) for _ in range(4))
    for a in range(0, n, CHUNK):
        rows = slice(a, min(a + CHUNK, n))
        count, y = rows.stop - a, target[rows]
        m, s, moment = peak[:, rows] if keep else statistics[0], statistics[1], statistics[-1]
        logits_kernel[(triton.cdiv(count, tile["BLOCK_N"]) * slots // 2,)](
            *operands(hidden[rows], weight, tile), bias, y, m, s, moment, own[rows], store[rows] if keep else store,
            count, v, d, m.stride(0), s.stride(0), store.stride(0), LOG2E.value / temperature, softcap,
            BIAS=bias is not None, SOFTCAP=softcap > 0, ENTROPY=with_entropy, STORE=keep,
            PRECISION=precision(hidden.dtype), **tile, **FUSE,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(count, 32),)](
            m, s, moment, own[rows], y, logp[rows], lse[rows], entropy[rows],
            count, v, slots, m.stride(0), s.stride(0), ENTROPY=with_entropy, BLOCK_N=32, BLOCK_T=32, **FUSE,
        )  # fmt: skip
    return logp, entropy if with_entropy else entropy[:0].clone(), lse, peak, store


def logits_forward(logits, target):
    """logits (N, V) -> logp, lse (N,) fp32."""
    n, v = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    logp, lse = (logits.new_empty(n, dtype=torch.float32) for _ in range(2))
    if n:
        target = target.long().contiguous()
        row_kernel[(n,)](logits, target, logp, lse, v, logits.stride(0), BLOCK_V=4096, num_warps=8, **FUSE)
    return logp, lse


def segment_sum(x, cu_seqlens):
    """x (N,), cu_seqlens (B+1,) -> (B,) fp32, fp64 for fp64."""
    out = x.new_empty(cu_seqlens.shape[0] - 1, dtype=wide(x.dtype))
    if len(out):
        segment_kernel[(len(out),)](x.contiguous(), cu_seqlens.contiguous(), out, BLOCK=512, **FUSE)
    return out
