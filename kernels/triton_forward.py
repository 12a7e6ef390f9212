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
    No N V of memory, unless the backward can use e: then one, written once.

z stays fp32 from the accumulator on. The tile depends on device, dtype, D and kernel, never on N, so
a row's log-prob does not depend on what else is in the batch. See README.md.

Words:

    tile, half tile  BLOCK_N rows and BLOCK_V columns of logits, of one program; half of its columns
    slot             the place of a half tile's statistics: half tile j of a row is its slot j
    peak, top        the largest logit of a slot, of a row
    total, moment    sums of a slot over e and e (z - peak)
    reference        of a row, what the e that is kept is relative to: its target's logit, about
    share            of a row: p = share e

There are two units, told apart by name. A name that ends in 2 or starts with log2 is in base 2:
z2 = z / ln 2, because exp(z) = 2^z2 is then one instruction; also peak2, target_z2, moment2 and
log2_total. Other logarithms are in nats: logp, lse, entropy. e and total are the same in both.
"""

import triton
import triton.language as tl
from torch import float16, float32

from kernels.tiles import tile_for
from kernels.triton_tile import (
    FUSE,
    IGNORE,
    LN2,
    LOG2E,
    LOG_ZERO,
    PER_BATCH,
    aligned,
    logits_of,
    operands,
    precision,
    product,
    tile_of,
)

CHUNK = 16384  # rows per launch: bounds the memory of the tiles' statistics
MERGE = {"BLOCK_N": 8, "BLOCK_T": 256}  # rows of a program of merge_kernel, slots that it reads at a time
RANGE2 = tl.constexpr(64.0)  # e relative to a row's reference2 is at most 2^64


# --- kernels


@triton.jit
def reduce_tile(
    # the product of half a tile
    z,
    # pointers, as in logits_kernel
    bias, target, reference2, peak2, total, moment2, target_z2, store,
    # the first row, and which half tile of the vocabulary this is
    row, slot,
    # sizes
    N, V,
    # strides
    stats_stride, store_stride,
    # numbers
    scale, softcap,
    # meta-parameters; WIDTH: columns of a half tile
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The statistics of half a tile, and its e if STORE.

    An exponential takes the time of eight multiplications, and what else is done to an element should
    not take much more. So what few half tiles need is in a branch."""
    first_col = slot * WIDTH
    rows, cols = row + tl.arange(0, BLOCK_N), first_col + tl.arange(0, WIDTH)
    live = rows < N
    z2 = logits_of(z, bias, cols, V, scale, softcap, BIAS, SOFTCAP)
    if SOFTCAP or not BIAS:
        # Adding 0 is free, in one instruction with the scale. A branch for the last tile alone is not:
        # Triton 3.6 would compute the exponentials twice.
        z2 += tl.where(cols < V, 0.0, -float("inf"))[None, :]
    targets = tl.load(target + rows, mask=live, other=-1).to(tl.int32)
    holds_target = (targets >= first_col) & (targets < first_col + WIDTH)
    if tl.max(holds_target.to(tl.int32), 0) > 0:
        of_target = tl.where(cols[None, :] == targets[:, None], z2, 0.0)
        tl.store(target_z2 + rows, tl.sum(of_target, 1), mask=holds_target)
    # Never -inf, as that of banned tokens (bias -inf) would be, so that it can be subtracted from them.
    top2 = tl.maximum(tl.max(z2, 1), LOG_ZERO)
    z2 -= top2[:, None]
    e = tl.exp2(z2)
    offset = slot.to(tl.int64) * stats_stride + rows
    tl.store(peak2 + offset, top2, mask=live)
    tl.store(total + offset, tl.sum(e, 1), mask=live)
    if ENTROPY:
        moment = e * tl.maximum(z2, LOG_ZERO)  # 0 for a banned token
        tl.store(moment2 + offset, tl.sum(moment, 1), mask=live)
    if STORE:
        above2 = top2 - tl.load(reference2 + rows, mask=live, other=0.0)
        # Out of range, e stays relative to top2, for merge_kernel to mend.
        e *= tl.exp2(tl.where(above2 > RANGE2, 0.0, above2))[:, None]
        offsets = rows.to(tl.int64)[:, None] * store_stride + cols[None, :]
        inside = live[:, None] & (cols < store_stride)[None, :]
        tl.store(store + offsets, e.to(store.dtype.element_ty), mask=inside)


@triton.jit
def reference_kernel(
    # pointers, read: x (N, D), w (V, D), bias (V,), target (N,); written: reference2 (N,)
    x, w, bias, target, reference2,
    # sizes
    V, D,
    # numbers, meta-parameters
    scale,
    BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The logit of each row's target in base 2, before any other is known: one program per row.

    Rounded otherwise than on the tensor cores, which does not matter to a reference."""
    row = tl.program_id(0).to(tl.int64)
    true_class = tl.minimum(tl.maximum(tl.load(target + row), 0), V - 1)  # any class for one outside
    products = tl.zeros((BLOCK_D,), tl.float32)
    for d in range(0, D, BLOCK_D):
        lanes = d + tl.arange(0, BLOCK_D)
        x_block = tl.load(x + row * D + lanes, mask=lanes < D, other=0.0).to(tl.float32)
        w_block = tl.load(w + true_class * D + lanes, mask=lanes < D, other=0.0).to(tl.float32)
        products += x_block * w_block
    z = tl.sum(products, 0)
    if BIAS:
        z += tl.load(bias + true_class).to(tl.float32)
    tl.store(reference2 + row, tl.maximum(z * scale, LOG_ZERO))


@triton.jit(do_not_specialize=PER_BATCH)
def logits_kernel(
    # pointers, read: x (N, D), w (V, D), bias (V,), target and reference2 (N,)
    x, w, bias, target, reference2,
    # pointers, written: peak2, total, moment2 (slots, N), target_z2 (N,), store (N, V)
    peak2, total, moment2, target_z2, store,
    # sizes
    N, V, D,
    # strides
    stats_stride, store_stride,
    # numbers
    scale, softcap,
    # meta-parameters
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, STORE: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A tile of logits -> its statistics. A slot is half a tile, BLOCK_V / 2 columns:

    peak2 = max z2, total = sum of e = 2^(z2 - peak2), moment2 = sum of e (z2 - peak2);
    target_z2 = z2[target], written by the slot that holds it; store = e, but relative to the row's
    reference2 in place of peak2, as far as that is in range."""
    row_block, col_block = tile_of(tl.program_id(0), N, V, BLOCK_N, BLOCK_V, GROUP)
    row = row_block * BLOCK_N
    halves = product(x, w, row, col_block * BLOCK_V, N, V, D, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
    for half in tl.static_range(2):
        reduce_tile(
            halves[half], bias, target, reference2, peak2, total, moment2, target_z2, store,
            row, 2 * col_block + half, N, V, stats_stride, store_stride, scale, softcap,
            BIAS, SOFTCAP, ENTROPY, STORE, BLOCK_N, BLOCK_V // 2,
        )  # fmt: skip


@triton.jit
def minus_one(log2_x):
    """2^log2_x - 1 without the cancellation near 1: there, x - 1 is in proportion to the logarithm of
    the rounded x (W. Kahan's way to compute expm1)."""
    x = tl.exp2(log2_x)
    log2_rounded = tl.log2(x)
    near_1 = tl.where(log2_rounded == 0.0, log2_x * LN2, (x - 1) * (log2_x / log2_rounded))
    return tl.where(x < 0.5, x - 1, near_1)


@triton.jit
def rebase(
    # pointers: store (N, V); read: peak2 (slots, N)
    store, peak2,
    # the rows, what their e is relative to, and to be relative to; which rows to change
    rows, reference2, new_base2, changes,
    # sizes, strides
    V, stats_stride, store_stride,
    # meta-parameters; WIDTH: columns of a slot
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Makes the e of whole rows relative to new_base2; it is p if that is the row's log-sum-exp."""
    for slot in range(0, tl.cdiv(V, WIDTH)):
        cols = slot * WIDTH + tl.arange(0, WIDTH)
        top2 = tl.load(peak2 + slot * stats_stride.to(tl.int64) + rows, mask=changes, other=0.0)
        base2 = tl.where(top2 - reference2 > RANGE2, top2, reference2)
        address = store + rows.to(tl.int64)[:, None] * store_stride + cols[None, :]
        inside = changes[:, None] & (cols < V)[None, :]
        e = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        e *= tl.exp2(base2 - new_base2)[:, None]
        tl.store(address, e.to(store.dtype.element_ty), mask=inside)


@triton.jit
def finish_kept(
    # pointers: store (N, V); written: share (N,); read: peak2 (slots, N)
    store, share, peak2,
    # of the rows: what e is relative to, and the results of merge_kernel
    rows, base2, top2, log2_total, targets, log2_p, live, in_vocabulary,
    # sizes, strides
    V, stats_stride, store_stride,
    # meta-parameters; WIDTH: columns of a slot
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The share of each row, its target's e, and the e of rows out of range."""
    out_of_range = live & (top2 - base2 > RANGE2)
    if tl.max(out_of_range.to(tl.int32), 0) > 0:
        rebase(
            store, peak2, rows, base2, top2 + log2_total, out_of_range,
            V, stats_stride, store_stride, WIDTH,
        )  # fmt: skip
        tl.debug_barrier()  # before the target's element is written once more
    # The bound keeps it finite where a logit's rounding error alone is of that size. NaN, where every
    # class is banned, stays NaN.
    log2_share = tl.minimum(base2 - top2 - log2_total, 32.0, propagate_nan=tl.PropagateNan.ALL)
    row_share = tl.where(out_of_range, 1.0, tl.exp2(log2_share))
    tl.store(share + rows, row_share, mask=live)
    of_target = minus_one(log2_p) / row_share
    address = store + rows.to(tl.int64) * store_stride + targets
    tl.store(address, of_target.to(store.dtype.element_ty), mask=in_vocabulary)


@triton.jit
def highest(
    # pointer, read: peak2 (slots, N)
    peak2,
    # the rows, and which of them there are
    rows, live,
    # sizes, strides
    slots, stats_stride,
    # meta-parameters; BLOCK_T: slots that are read at a time
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The largest peak2 of each row, LOG_ZERO if there is none."""
    top2 = tl.full((BLOCK_N,), LOG_ZERO, tl.float32)
    for slot in range(0, slots, BLOCK_T):
        block = slot + tl.arange(0, BLOCK_T)
        offsets = block.to(tl.int64)[:, None] * stats_stride + rows[None, :]
        inside = (block < slots)[:, None] & live[None, :]
        peaks2 = tl.load(peak2 + offsets, mask=inside, other=LOG_ZERO)
        top2 = tl.maximum(top2, tl.max(peaks2, 0))
    return top2


@triton.jit(do_not_specialize=PER_BATCH)
def merge_kernel(
    # pointers, read: peak2, total, moment2 (slots, N), target_z2, target and reference2 (N,)
    peak2, total, moment2, target_z2, target, reference2,
    # pointers, written: logp, lse, entropy, share (N,); store (N, V)
    logp, lse, entropy, share, store,
    # sizes
    N, V, slots,
    # strides
    stats_stride, store_stride,
    # meta-parameters; BLOCK_T: slots that are read at a time; WIDTH: columns of a slot
    ENTROPY: tl.constexpr, STORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The statistics of all slots of a row, read first to last -> logp, lse, entropy in nats.

    If STORE, also what the backward needs of it: share, so that p = share e; and in the place of the
    target's e, (p - 1) / share."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    top2 = highest(peak2, rows, live, slots, stats_stride, BLOCK_N, BLOCK_T)
    top2 = tl.where(top2 == LOG_ZERO, float("nan"), top2)  # every class is banned: no distribution
    row_total = tl.zeros((BLOCK_N,), tl.float32)
    row_moment2 = tl.zeros((BLOCK_N,), tl.float32)
    for slot in range(0, slots, BLOCK_T):
        block = slot + tl.arange(0, BLOCK_T)
        offsets = block.to(tl.int64)[:, None] * stats_stride + rows[None, :]
        inside = (block < slots)[:, None] & live[None, :]
        below_top2 = tl.load(peak2 + offsets, mask=inside, other=LOG_ZERO) - top2[None, :]
        to_top = tl.exp2(below_top2)
        totals = tl.load(total + offsets, mask=inside, other=0.0) * to_top
        row_total += tl.sum(totals, 0)
        if ENTROPY:
            moments2 = tl.load(moment2 + offsets, mask=inside, other=0.0)
            row_moment2 += tl.sum(moments2 * to_top + totals * below_top2, 0)
    log2_total = tl.log2(row_total)
    targets = tl.load(target + rows, mask=live, other=0)
    in_vocabulary = live & (targets >= 0) & (targets < V)
    # NaN for a target outside 0..V-1
    z2 = tl.load(target_z2 + rows, mask=in_vocabulary, other=float("nan"))
    log2_p = z2 - top2 - log2_total
    tl.store(logp + rows, tl.where(targets == IGNORE, 0.0, log2_p * LN2), mask=live)
    tl.store(lse + rows, (top2 + log2_total) * LN2, mask=live)
    if ENTROPY:  # H = log total - E[z - top]
        nats = (log2_total - row_moment2 / row_total) * LN2
        tl.store(entropy + rows, tl.where(targets == IGNORE, 0.0, nats), mask=live)
    if STORE:
        base2 = tl.load(reference2 + rows, mask=live, other=0.0)
        finish_kept(
            store, share, peak2, rows, base2, top2, log2_total, targets, log2_p, live, in_vocabulary,
            V, stats_stride, store_stride, WIDTH,
        )  # fmt: skip


# --- what calls the kernels


def slots_of(v, tile):
    """How many half tiles v columns take."""
    return 2 * ((v - 1) // tile["BLOCK_V"] + 1)


def kept(hidden, weight, budget):
    """Empty (share, store) of the shapes that forward keeps within budget; -1: no backward."""
    n, v = hidden.shape[0], weight.shape[0]
    width = (v + 63) // 64 * 64  # rows on 128 bytes for cuBLAS
    fits = n * width * hidden.dtype.itemsize <= budget
    if budget <= 0 or not fits or hidden.dtype == float16:  # whose range is too small
        return hidden.new_empty(0, dtype=float32), hidden.new_empty((0, 0))
    return hidden.new_empty(n, dtype=float32), hidden.new_empty((n, width))


def forward(hidden, weight, bias, target, temperature, softcap, with_entropy, budget, tile=None):
    """-> logp, entropy, lse (N,) fp32 in nats, and what the backward can use, empty beyond budget:
    share (N,) and store (N, V) of e, with p = share e but for the target's."""
    hidden, weight, target = aligned(hidden), aligned(weight), target.long().contiguous()
    bias = None if bias is None else bias.contiguous()
    n, d = hidden.shape
    v = weight.shape[0]
    tile = tile or tile_for("forward", hidden)
    share, store = kept(hidden, weight, budget)
    is_kept = store.numel() > 0
    scale = LOG2E.value / temperature
    slots = slots_of(v, tile)
    kinds = 3 if with_entropy else 2  # peak2, total and moment2
    statistics = hidden.new_empty((kinds, slots, min(n, CHUNK)), dtype=float32)
    # Without entropy nobody reads or writes moment2, and total stands in for it.
    peak2, total, moment2 = statistics[0], statistics[1], statistics[-1]
    logp = statistics.new_empty(n)
    lse = statistics.new_empty(n)
    target_z2 = statistics.new_empty(n)
    entropy = statistics.new_empty(n)
    reference2 = statistics.new_empty(n)
    if is_kept:
        reference_kernel[(n,)](
            hidden, weight, bias, target, reference2, v, d, scale,
            BIAS=bias is not None, BLOCK_D=1024, **FUSE,
        )  # fmt: skip
    for start in range(0, n, CHUNK):
        rows = slice(start, min(start + CHUNK, n))
        count = rows.stop - start
        x, w = operands(hidden[rows], weight, tile)
        logits_kernel[(triton.cdiv(count, tile["BLOCK_N"]) * slots // 2,)](
            x, w, bias, target[rows], reference2[rows],
            peak2, total, moment2, target_z2[rows], store[rows],
            count, v, d, total.stride(0), store.stride(0), scale, softcap,
            BIAS=bias is not None, SOFTCAP=softcap > 0, ENTROPY=with_entropy, STORE=is_kept,
            PRECISION=precision(hidden.dtype), **tile, **FUSE,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(count, MERGE["BLOCK_N"]),)](
            peak2, total, moment2, target_z2[rows], target[rows], reference2[rows],
            logp[rows], lse[rows], entropy[rows], share[rows], store[rows],
            count, v, slots, total.stride(0), store.stride(0),
            ENTROPY=with_entropy, STORE=is_kept, WIDTH=tile["BLOCK_V"] // 2, **MERGE, **FUSE,
        )  # fmt: skip
    if not with_entropy:
        entropy = statistics.new_empty(0)
    return logp, entropy, lse, share, store
