"""The Triton backend, forward. It replaces these six lines, each of which goes through memory:

    z = hidden @ weight.T                               # reads N D + V D   writes N V
    peak = z.amax(1, keepdim=True)                      # reads N V         writes N
    e = torch.exp(z - peak)                             # reads 2 N V       writes 2 N V
    total = e.sum(1, keepdim=True)                      # reads N V         writes N
    lse = (peak + total.log())[:, 0]                    # N elements from here on
    logp = z.gather(1, target[:, None])[:, 0] - lse

    In all N D + V D + 4 N V reads and 3 N V writes, and z, z - peak and e take 3 N V of memory.

The kernels keep a tile of z in registers and write two numbers per row and half tile:

    logits_kernel    a tile (BLOCK_N, BLOCK_V) of z on the tensor cores -> for each row and half of
                     it peak, total and, for the entropy, moment = sum of e (z - peak)
    merge_kernel     the statistics of a row, in a fixed order -> logp, lse, entropy

    In all N D + V D + 6 N V / BLOCK_V reads (V D again for every GROUP x BLOCK_N rows) and
    4 N V / BLOCK_V writes. With BLOCK_V = 256 that is N V / 26 where it was 7 N V.
    No N V of memory, unless the backward wants e: then one, written once.

z stays fp32 from the accumulator on. The tile depends on device, dtype and kernel, never on N, so a
row's log-prob does not depend on what else is in the batch. See README.md.

There are two units, told apart by name. A name that ends in 2 or starts with log2 is in base 2:
z2 = z / ln 2, because exp(z) = 2^z2 is then one instruction; also peak2, target_z2, moment2 and
log2_total. Other logarithms are in nats: logp, lse, entropy. e and total are the same in both.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.tiles import tile_for
from kernels.torch_backend import wide

LOG2E = tl.constexpr(1.4426950408889634)  # nats -> base 2
LN2 = tl.constexpr(0.6931471805599453)  # base 2 -> nats
LOG_ZERO = tl.constexpr(-1e30)  # stands for log 0: unlike -inf, it can be subtracted from itself
IGNORE = tl.constexpr(-100)
CHUNK = 16384  # rows per launch: bounds the memory of the tiles' statistics
MERGE_ROWS = 32  # rows of a program of merge_kernel
# Arguments that change with the batch: Triton must not specialize on their values.
PER_BATCH = ("N", "peak_stride", "stats_stride")
FUSE = {"enable_fp_fusion": True}  # a b + c in one rounding: Triton's default until 3.9


# --- kernels


@triton.jit
def tile_of(program, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """-> row block, column block.

    GROUP row blocks take each block of the weight one after the other, while it is in the L2 cache."""
    row_blocks = tl.cdiv(N, BLOCK_N)
    band = GROUP * tl.cdiv(V, BLOCK_V)  # the programs of a group
    group_start = (program // band) * GROUP
    group_size = min(row_blocks - group_start, GROUP)
    return group_start + (program % band) % group_size, (program % band) // group_size


@triton.jit
def product(
    # pointers, or descriptors for the tensor memory accelerator: x (N, D), w (V, D)
    x, w,
    # the tile's first row and column
    row, col,
    # sizes
    N, V, D,
    # meta-parameters
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x w^T of a tile, in two (BLOCK_N, BLOCK_V / 2) fp32 halves: what follows has few registers.

    A descriptor loads zeros outside x and w. Pointers wrap around to valid rows, whose results are
    masked out later."""
    z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if not TMA:
        lanes = tl.arange(0, BLOCK_D)
        x += ((row + tl.arange(0, BLOCK_N)) % N).to(tl.int64)[:, None] * D + lanes[None, :]
        w += ((col + tl.arange(0, BLOCK_V)) % V).to(tl.int64)[None, :] * D + lanes[:, None]
    for d in range(0, D, BLOCK_D):
        if TMA:
            z = tl.dot(x.load([row, d]), w.load([col, d]).T, z, input_precision=PRECISION)
        else:
            inside = d + lanes < D
            x_block = tl.load(x + d, mask=inside[None, :], other=0.0)
            w_block = tl.load(w + d, mask=inside[:, None], other=0.0)
            z = tl.dot(x_block, w_block, z, input_precision=PRECISION)
    # columns 0 .. BLOCK_V / 2 - 1, and the rest
    return tl.split(tl.permute(tl.reshape(z, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))


@triton.jit
def softcapped(z, softcap):
    """softcap tanh(z / softcap), with a relative error of at most 5e-7.

    tanh(a) = 1 - 2 / (exp(2a) + 1) cancels near 0: by 1e-3 nats at a softcap of 10^4. Where exp(2a) is
    between 1/2 and 2, a series, z (1 - a^2 / 3 + 2 a^4 / 15 - ...), has coefficients good to 4e-8."""
    a2 = z * (2 * LOG2E / softcap)  # exp(2a) = 2^a2
    square = a2 * a2
    series = square * (-0.040036991 + square * (0.0019189699 + square * -8.5321415e-05))
    near_zero = z + z * series  # z itself at a softcap so large that a2 is 0
    elsewhere = softcap * (1 - 2 / (tl.exp2(a2) + 1))
    return tl.where(square < 1.0, near_zero, elsewhere)  # NaN stays NaN


@triton.jit
def logits_of(z, bias, cols, V, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The product of a tile -> its logits z2, in base 2; scale = 1 / (temperature ln 2)."""
    if BIAS:
        z += tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        z = softcapped(z, softcap)
    return z * scale


@triton.jit
def reduce_tile(
    # the product of half a tile
    z,
    # pointers, as in logits_kernel
    bias, target, peak2, total, moment2, target_z2, store,
    # the first row, and which half tile of the vocabulary this is
    row, slot,
    # sizes
    N, V,
    # strides
    peak_stride, stats_stride, store_stride,
    # numbers
    scale, softcap,
    # meta-parameters; WIDTH: columns of a half tile
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The statistics of half a tile, and its e if STORE.

    What few half tiles need is in branches, because an exponential costs as much as four other
    operations of an element: with those of the branches, these would be what takes the time."""
    first_col = slot * WIDTH
    rows, cols = row + tl.arange(0, BLOCK_N), first_col + tl.arange(0, WIDTH)
    live = rows < N
    z2 = logits_of(z, bias, cols, V, scale, softcap, BIAS, SOFTCAP)
    targets = tl.load(target + rows, mask=live, other=-1).to(tl.int32)
    holds_target = (targets >= first_col) & (targets < min(first_col + WIDTH, V))
    if tl.max(holds_target.to(tl.int32), 0) > 0:
        of_target = tl.where(cols[None, :] == targets[:, None], z2, 0.0)
        tl.store(target_z2 + rows, tl.sum(of_target, 1), mask=holds_target)
    if first_col + WIDTH > V:  # the last tile
        z2 = tl.where((cols < V)[None, :], z2, -float("inf"))
    # Never -inf, as that of banned tokens (bias -inf) would be, so that it can be subtracted from them.
    top2 = tl.maximum(tl.max(z2, 1), LOG_ZERO)
    z2 -= top2[:, None]
    e = tl.exp2(z2)
    tl.store(peak2 + slot.to(tl.int64) * peak_stride + rows, top2, mask=live)
    offset = slot.to(tl.int64) * stats_stride + rows
    tl.store(total + offset, tl.sum(e, 1), mask=live)
    if ENTROPY:
        moment = e * tl.maximum(z2, LOG_ZERO)  # 0 for a banned token
        tl.store(moment2 + offset, tl.sum(moment, 1), mask=live)
    if STORE:
        offsets = rows.to(tl.int64)[:, None] * store_stride + cols[None, :]
        inside = live[:, None] & (cols < store_stride)[None, :]
        tl.store(store + offsets, e.to(store.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PER_BATCH)
def logits_kernel(
    # pointers, read: x (N, D), w (V, D), bias (V,), target (N,)
    x, w, bias, target,
    # pointers, written: peak2, total, moment2 (slots, N), target_z2 (N,), store (N, V)
    peak2, total, moment2, target_z2, store,
    # sizes
    N, V, D,
    # strides; peak2 may be the one kept for the backward, with rows of all N
    peak_stride, stats_stride, store_stride,
    # numbers
    scale, softcap,
    # meta-parameters
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of logits -> its statistics. A slot is half a tile, BLOCK_V / 2 columns:

    peak2 = max z2, total = sum of e = 2^(z2 - peak2), moment2 = sum of e (z2 - peak2);
    target_z2 = z2[target], written by the slot that holds it; store = e."""
    row_block, col_block = tile_of(tl.program_id(0), N, V, BLOCK_N, BLOCK_V, GROUP)
    row = row_block * BLOCK_N
    halves = product(x, w, row, col_block * BLOCK_V, N, V, D, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
    for half in tl.static_range(2):
        reduce_tile(
            halves[half], bias, target, peak2, total, moment2, target_z2, store,
            row, 2 * col_block + half, N, V, peak_stride, stats_stride, store_stride, scale, softcap,
            BIAS, SOFTCAP, ENTROPY, STORE, BLOCK_N, BLOCK_V // 2,
        )  # fmt: skip


@triton.jit(do_not_specialize=PER_BATCH)
def merge_kernel(
    # pointers, read: peak2, total, moment2 (slots, N), target_z2, target (N,)
    peak2, total, moment2, target_z2, target,
    # pointers, written: (N,)
    logp, lse, entropy,
    # sizes
    N, V, slots,
    # strides
    peak_stride, stats_stride,
    # meta-parameters; BLOCK_T: slots that are read at a time
    ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The statistics of all slots of a row, read first to last -> logp, lse, entropy in nats."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    top2 = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    for slot in range(0, slots, BLOCK_T):
        block = slot + tl.arange(0, BLOCK_T)
        peak_offsets = block.to(tl.int64)[:, None] * peak_stride + rows[None, :]
        inside = (block < slots)[:, None] & live[None, :]
        peaks2 = tl.load(peak2 + peak_offsets, mask=inside, other=LOG_ZERO)
        top2 = tl.maximum(top2, tl.max(peaks2, 0))
    top2 = tl.where(top2 == LOG_ZERO, float("nan"), top2)  # every class is banned: no distribution
    row_total = tl.zeros((BLOCK_N,), tl.float32)
    row_moment2 = tl.zeros((BLOCK_N,), tl.float32)
    for slot in range(0, slots, BLOCK_T):
        block = slot + tl.arange(0, BLOCK_T)
        peak_offsets = block.to(tl.int64)[:, None] * peak_stride + rows[None, :]
        stats_offsets = block.to(tl.int64)[:, None] * stats_stride + rows[None, :]
        inside = (block < slots)[:, None] & live[None, :]
        below_top2 = tl.load(peak2 + peak_offsets, mask=inside, other=LOG_ZERO) - top2[None, :]
        share = tl.exp2(below_top2)
        totals = tl.load(total + stats_offsets, mask=inside, other=0.0) * share
        row_total += tl.sum(totals, 0)
        if ENTROPY:
            moments2 = tl.load(moment2 + stats_offsets, mask=inside, other=0.0)
            row_moment2 += tl.sum(moments2 * share + totals * below_top2, 0)
    log2_total = tl.log2(row_total)
    targets = tl.load(target + rows, mask=live, other=0)
    # NaN for a target outside 0..V-1
    z2 = tl.load(target_z2 + rows, mask=live & (targets >= 0) & (targets < V), other=float("nan"))
    tl.store(logp + rows, tl.where(targets == IGNORE, 0.0, (z2 - top2 - log2_total) * LN2), mask=live)
    tl.store(lse + rows, (top2 + log2_total) * LN2, mask=live)
    if ENTROPY:  # H = log total - E[z - top]
        nats = (log2_total - row_moment2 / row_total) * LN2
        tl.store(entropy + rows, tl.where(targets == IGNORE, 0.0, nats), mask=live)


@triton.jit
def row_kernel(
    # pointers: logits (N, V), target (N,); written: logp, lse (N,)
    logits, target, logp, lse,
    # sizes, strides
    V, stride,
    # meta-parameters
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Log-prob and log-sum-exp of existing logits in one pass: one program per row."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    lanes = tl.arange(0, BLOCK_V)
    # A running maximum and sum per lane, merged at the end.
    peak2 = tl.full((BLOCK_V,), LOG_ZERO, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    for col in range(0, V, BLOCK_V):
        z2 = tl.load(line + col + lanes, mask=col + lanes < V, other=-float("inf")).to(tl.float32) * LOG2E
        z2 = tl.where(z2 < LOG_ZERO, LOG_ZERO, z2)
        higher2 = tl.maximum(peak2, z2)
        # A lane that saw only LOG_ZERO must not count 2^0.
        total = total * tl.exp2(peak2 - higher2) + tl.where(z2 == LOG_ZERO, 0.0, tl.exp2(z2 - higher2))
        peak2 = higher2
    top2 = tl.max(peak2, 0)
    log2_total = tl.log2(tl.sum(total * tl.exp2(peak2 - top2), 0))
    true_class = tl.load(target + row)
    inside = (true_class >= 0) & (true_class < V)
    target_z2 = tl.load(line + true_class, mask=inside, other=0.0).to(tl.float32) * LOG2E
    nats = tl.where(inside, (target_z2 - top2 - log2_total) * LN2, float("nan"))
    tl.store(logp + row, tl.where(true_class == IGNORE, 0.0, nats))
    tl.store(lse + row, (top2 + log2_total) * LN2)


@triton.jit
def segment_kernel(x, cu_seqlens, out, BLOCK: tl.constexpr):
    """One program per sequence: lane i sums elements i, i + BLOCK, ...; then lanes are summed."""
    start = tl.load(cu_seqlens + tl.program_id(0))
    end = tl.load(cu_seqlens + tl.program_id(0) + 1)
    sums = tl.zeros((BLOCK,), out.dtype.element_ty)
    for block in range(start, end, BLOCK):
        element = block + tl.arange(0, BLOCK)
        sums += tl.load(x + element, mask=element < end, other=0.0).to(out.dtype.element_ty)
    tl.store(out + tl.program_id(0), tl.sum(sums, 0))


# --- what calls the kernels


def aligned(x):
    """x (rows, D), contiguous, D padded so that base and rows are on 16 bytes, as TMA wants."""
    x = x.contiguous()
    pad = -x.shape[1] % (16 // x.itemsize)
    if pad:
        return F.pad(x, (0, pad))
    return x if x.data_ptr() % 16 == 0 else x.clone()


def slots_of(v, tile):
    """How many half tiles v columns take."""
    return 2 * ((v - 1) // tile["BLOCK_V"] + 1)


def kept(hidden, weight, budget, tile=None):
    """Empty (peak2, store) of the shapes that forward keeps within budget; -1: no backward."""
    n, v = hidden.shape[0], weight.shape[0]
    width = (v + 63) // 64 * 64  # rows on 128 bytes for cuBLAS
    if budget <= 0 or n * width * hidden.dtype.itemsize > budget:
        return hidden.new_empty((0, 0), dtype=torch.float32), hidden.new_empty((0, 0))
    tile = tile or tile_for("forward", hidden)
    peak2 = hidden.new_empty((slots_of(v, tile), n), dtype=torch.float32)
    return peak2, hidden.new_empty((n, width))


def operands(hidden, weight, tile):
    """hidden (N, D) and weight (V, D), both aligned; with TMA, descriptors of their blocks."""
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
    """-> logp, entropy, lse (N,) fp32 in nats, and what the backward can use, empty beyond budget:
    peak2 (slots, N) and store (N, V) of e."""
    hidden, weight, target = aligned(hidden), aligned(weight), target.long().contiguous()
    bias = None if bias is None else bias.contiguous()
    n, d = hidden.shape
    v = weight.shape[0]
    tile = tile or tile_for("forward", hidden)
    peak2, store = kept(hidden, weight, budget, tile)
    is_kept = store.numel() > 0
    slots = slots_of(v, tile)
    kinds = 3 if with_entropy else 2  # peak2, total and moment2
    statistics = hidden.new_empty((kinds, slots, min(n, CHUNK)), dtype=torch.float32)
    # Without entropy nobody reads or writes moment2, and total stands in for it.
    total, moment2 = statistics[1], statistics[-1]
    logp = statistics.new_empty(n)
    lse = statistics.new_empty(n)
    target_z2 = statistics.new_empty(n)
    entropy = statistics.new_empty(n)
    for start in range(0, n, CHUNK):
        rows = slice(start, min(start + CHUNK, n))
        count = rows.stop - start
        chunk_peak2 = peak2[:, rows] if is_kept else statistics[0]
        chunk_store = store[rows] if is_kept else store
        x, w = operands(hidden[rows], weight, tile)
        logits_kernel[(triton.cdiv(count, tile["BLOCK_N"]) * slots // 2,)](
            x, w, bias, target[rows],
            chunk_peak2, total, moment2, target_z2[rows], chunk_store,
            count, v, d,
            chunk_peak2.stride(0), total.stride(0), store.stride(0),
            LOG2E.value / temperature, softcap,
            BIAS=bias is not None, SOFTCAP=softcap > 0, ENTROPY=with_entropy, STORE=is_kept,
            PRECISION=precision(hidden.dtype), **tile, **FUSE,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(count, MERGE_ROWS),)](
            chunk_peak2, total, moment2, target_z2[rows], target[rows],
            logp[rows], lse[rows], entropy[rows],
            count, v, slots,
            chunk_peak2.stride(0), total.stride(0),
            ENTROPY=with_entropy, BLOCK_N=MERGE_ROWS, BLOCK_T=32, **FUSE,
        )  # fmt: skip
    if not with_entropy:
        entropy = statistics.new_empty(0)
    return logp, entropy, lse, peak2, store


def logits_forward(logits, target):
    """logits (N, V) -> logp, lse (N,) fp32."""
    n, v = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    logp = logits.new_empty(n, dtype=torch.float32)
    lse = logits.new_empty(n, dtype=torch.float32)
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
