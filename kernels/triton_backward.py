"""The Triton backend, backward: d logits in the inputs' dtype, then one cuBLAS product for d hidden
and one for d weight.

With p = softmax(z), upstream gradients g of logp, l of lse and h of the entropy H, and 1[t] the
true class:

    dz = g 1[t] - (g - l) p - h p (log p + H),    times 1 - tanh^2 with a softcap
    d hidden = dz W,    d weight = dz^T X,    d bias = dz^T 1

kept:        the forward's e = 2^(z2 - peak2) becomes dz in place: 6 N D V FLOPs for forward and
             backward, N V elements of memory
recomputed:  dz from hidden @ weight^T, a slice of the vocabulary at a time: 8 N D V FLOPs,
             N x SLICE elements of memory

In both each row of d weight is one product over all N, and d hidden is summed in fp32. The true
class's 1 - p is -expm1(logp), without cancellation. Units are named as in triton_forward.py.
"""

import torch
import triton
import triton.language as tl

from kernels.tiles import tile_for
from kernels.triton_forward import (
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

SLICE = 8192  # columns of d logits in memory at a time, when recomputed
KEPT_ROWS = 32  # rows of a program of kept_kernel


# --- kernels
#
# "The rows' data" are lse, entropy and h, all (N,), and p_and_target (2, N): its first row is g - l,
# the factor of -p, its second the target's whole dz, g - (g - l) p[target]. g, l and h are the
# upstream gradients over the temperature. p_and_target is one tensor because with one more pointer
# slice_kernel spills registers on sm_90.


@triton.jit
def dlogits(
    # of a tile
    log2_p, p, rows, cols,
    # pointers to the rows' data
    target, entropy, p_and_target, h,
    # sizes
    N, slice_start,
    # meta-parameters
    ENTROPY: tl.constexpr,
):  # fmt: skip
    """log2 p and p of a tile -> dz, fp32, before the slope of a softcap. cols count from column
    slice_start of the vocabulary."""
    live = rows < N
    row_of_p = tl.load(p_and_target + rows, mask=live, other=0.0)
    targets = (tl.load(target + rows, mask=live, other=-1) - slice_start).to(tl.int32)
    is_target = cols[None, :] == targets[:, None]
    row_target_dz = tl.load(p_and_target + N + rows, mask=live, other=0.0)
    dz = tl.where(is_target, row_target_dz[:, None], -row_of_p[:, None] * p)
    if ENTROPY:
        row_h = tl.load(h + rows, mask=live, other=0.0)
        row_entropy = tl.load(entropy + rows, mask=live, other=0.0)
        dz -= row_h[:, None] * p * (log2_p * LN2 + row_entropy[:, None])
    return dz


@triton.jit(do_not_specialize=PER_BATCH)
def kept_kernel(
    # pointers: store (N, V), peak2 (slots, N), target, logp and the rows' data
    store, peak2, target, logp, lse, entropy, p_and_target, h,
    # sizes
    N, V,
    # strides
    peak_stride, store_stride,
    # numbers: ratio = temperature / softcap
    ratio,
    # meta-parameters; WIDTH: columns that share a row of peak2
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """store: e = 2^(z2 - peak2) -> dz in place."""
    slots = tl.cdiv(V, WIDTH)
    rows = tl.program_id(0) // slots * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.program_id(0) % slots
    cols = slot * WIDTH + tl.arange(0, WIDTH)
    address = store + rows.to(tl.int64)[:, None] * store_stride + cols[None, :]
    inside = (rows < N)[:, None] & (cols < store_stride)[None, :]
    e = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    log2_share = tl.load(peak2 + slot.to(tl.int64) * peak_stride + rows, mask=rows < N, other=0.0)
    row_lse = tl.load(lse + rows, mask=rows < N, other=0.0)
    log2_share -= row_lse * LOG2E
    p = e * tl.exp2(log2_share)[:, None]
    # The bound is a normal fp32 number: Triton 3.6 would compute in fp64 with a smaller one.
    log2_p = tl.log2(tl.maximum(e, 1.2e-38)) + log2_share[:, None]
    is_target = cols[None, :] == tl.load(target + rows, mask=rows < N, other=-1).to(tl.int32)[:, None]
    # The target's own log-prob, for where e is 0. A banned target has p log p = 0.
    target_logp = tl.maximum(tl.load(logp + rows, mask=rows < N, other=0.0), LOG_ZERO)
    log2_p = tl.where(is_target, target_logp[:, None] * LOG2E, log2_p)
    dz = dlogits(log2_p, p, rows, cols, target, entropy, p_and_target, h, N, 0, ENTROPY)
    if SOFTCAP:  # e is too coarse for this where the softcap is small: api.py keeps nothing then
        tanh = (log2_p * LN2 + row_lse[:, None]) * ratio
        dz *= 1 - tanh * tanh
    # Columns V .. stride too, so that stores are whole vectors.
    tl.store(address, dz.to(store.dtype.element_ty), mask=inside)


@triton.jit
def write_tile(
    # the product of half a tile
    z,
    # pointers, as in slice_kernel
    bias, target, lse, entropy, p_and_target, h, out,
    # the half tile's first row and column
    row, col,
    # sizes
    N, V, slice_start,
    # strides
    out_stride,
    # numbers
    scale, softcap, ratio,
    # meta-parameters; WIDTH: columns of a half tile
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The product of half a tile -> its dz, in out."""
    rows, cols = row + tl.arange(0, BLOCK_N), col + tl.arange(0, WIDTH)
    z2 = logits_of(z, bias, cols, V, scale, softcap, BIAS, SOFTCAP)
    log2_p = z2 - tl.load(lse + rows, mask=rows < N, other=0.0)[:, None] * LOG2E
    if BIAS:  # a banned token: p log p = 0
        log2_p = tl.maximum(log2_p, LOG_ZERO, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(log2_p)
    dz = dlogits(log2_p, p, rows, cols, target, entropy, p_and_target, h, N, slice_start, ENTROPY)
    if SOFTCAP:  # d/du softcap tanh(u / softcap) = 1 - tanh^2
        tanh = z2 * (LN2 * ratio)
        dz *= 1 - tanh * tanh
    address = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
    inside = (rows < N)[:, None] & (cols < out_stride)[None, :]
    tl.store(address, dz.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PER_BATCH)
def slice_kernel(
    # pointers, read: x (N, D), w (V, D), bias (V,), target (N,) and the rows' data
    x, w, bias, target, lse, entropy, p_and_target, h,
    # pointer, written: (N, V)
    out,
    # sizes; V is that of the slice, which starts at column slice_start of the vocabulary
    N, V, D, slice_start,
    # strides
    out_stride,
    # numbers
    scale, softcap, ratio,
    # meta-parameters
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz of a slice of the vocabulary; w and bias are the slice's."""
    row_block, col_block = tile_of(tl.program_id(0), N, V, BLOCK_N, BLOCK_V, GROUP)
    row, col = row_block * BLOCK_N, col_block * BLOCK_V
    left, right = product(x, w, row, col, N, V, D, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
    write_tile(
        left, bias, target, lse, entropy, p_and_target, h, out, row, col, N, V, slice_start,
        out_stride, scale, softcap, ratio, BIAS, SOFTCAP, ENTROPY, BLOCK_N, BLOCK_V // 2,
    )  # fmt: skip
    write_tile(
        right, bias, target, lse, entropy, p_and_target, h, out, row, col + BLOCK_V // 2, N, V, slice_start,
        out_stride, scale, softcap, ratio, BIAS, SOFTCAP, ENTROPY, BLOCK_N, BLOCK_V // 2,
    )  # fmt: skip


@triton.jit
def row_grad_kernel(
    # pointers: logits (N, V), target, rest = 1 - p[target], lse, g (N,); written: out (N, V)
    logits, target, rest, lse, g, out,
    # sizes, strides
    V, stride, out_stride,
    # meta-parameters
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """d logits of existing logits, g (1[t] - p): one program per row and block of columns."""
    blocks = tl.cdiv(V, BLOCK_V)
    row = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.load(logits + row.to(tl.int64) * stride + cols, mask=cols < V, other=0.0).to(tl.float32)
    p = tl.exp2((z - tl.load(lse + row)) * LOG2E)
    true_class = tl.load(target + row)
    is_target = cols == true_class.to(tl.int32)
    dz = tl.load(g + row) * tl.where(is_target, tl.load(rest + row), -p)
    dz = tl.where(true_class == IGNORE, 0.0, dz)  # also if such a row holds NaN
    tl.store(out + row.to(tl.int64) * out_stride + cols, dz.to(out.dtype.element_ty), mask=cols < V)


# --- what calls the kernels


def product_into(out, a, b, accumulate):
    """out = a @ b, or out += a @ b to accumulate; summed in fp32.

    In place, because autocast leaves such calls alone."""
    if a.dtype != out.dtype and not out.is_cuda:  # the CPU has no out_dtype
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def upstream(g, ignored, temperature):
    """g / temperature in fp32, 0 where the target is ignored."""
    return (g.float() / temperature).masked_fill_(ignored, 0.0)


def backward(
    g_logp, g_entropy, g_lse, hidden, weight, bias, target,
    logp, entropy, lse, peak2, store, temperature, softcap, need, tile=None,
):  # fmt: skip
    """-> d_hidden, d_weight, d_bias of the inputs' dtypes; empty where need says no.

    Overwrites store. tile: the forward's, if store is not empty."""
    need_hidden, need_weight, need_bias = need
    n, v = hidden.shape[0], weight.shape[0]
    d_hidden = hidden.new_empty(hidden.shape if need_hidden else 0, dtype=torch.float32)
    d_weight = weight.new_empty(weight.shape if need_weight else 0)
    d_bias = weight.new_empty(v if need_bias else 0)
    if not n:
        return d_hidden.to(hidden.dtype), d_weight.zero_(), d_bias.zero_()

    ignored = target == -100
    target = target.long().contiguous()
    g = upstream(g_logp, ignored, temperature)
    target_dz = -torch.expm1(logp) * g
    of_p = g
    if g_lse is not None:
        from_lse = upstream(g_lse, ignored, temperature)
        target_dz += logp.exp() * from_lse
        of_p = g - from_lse
    p_and_target = torch.stack([of_p, target_dz])
    h = torch.zeros_like(lse) if g_entropy is None else upstream(g_entropy, ignored, temperature)
    ratio = temperature / softcap if softcap else 0.0
    options = {"SOFTCAP": softcap > 0, "ENTROPY": g_entropy is not None} | FUSE
    is_kept = store.numel() > 0
    tile = tile or tile_for("forward" if is_kept else "backward", hidden)
    if is_kept:  # one slice: the whole vocabulary
        step = v
        width = tile["BLOCK_V"] // 2
        kept_kernel[(triton.cdiv(n, KEPT_ROWS) * triton.cdiv(v, width),)](
            store, peak2, target, logp, lse, entropy, p_and_target, h,
            n, v, peak2.stride(0), store.stride(0), ratio,
            BLOCK_N=KEPT_ROWS, WIDTH=width, **options,
        )  # fmt: skip
    else:
        # Fewer columns for more than 65,536 rows, in multiples of 1024.
        fitting = SLICE * 65536 // n
        step = min(SLICE, max(1024, fitting // 1024 * 1024))
        store = hidden.new_empty(n, min(step, (v + 63) // 64 * 64))
        x, w = aligned(hidden), aligned(weight)

    for start in range(0, v, step):
        cols = slice(start, min(start + step, v))
        count = cols.stop - start
        dz = store[:, :count]
        if not is_kept:
            x_tiles, w_tiles = operands(x, w[cols], tile)
            slice_kernel[(triton.cdiv(n, tile["BLOCK_N"]) * triton.cdiv(count, tile["BLOCK_V"]),)](
                x_tiles, w_tiles, None if bias is None else bias[cols].contiguous(),
                target, lse, entropy, p_and_target, h, dz,
                n, count, x.shape[1], start, dz.stride(0),
                LOG2E.value / temperature, softcap, ratio,
                BIAS=bias is not None, PRECISION=precision(hidden.dtype), **options, **tile,
            )  # fmt: skip
        if need_hidden:
            product_into(d_hidden, dz, weight[cols], accumulate=start > 0)
        if need_weight:
            product_into(d_weight[cols], dz.T, hidden, accumulate=False)
        if need_bias:
            d_bias[cols] = dz.sum(0, dtype=torch.float32)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def logits_backward(g_logp, logits, target, logp, lse):
    """-> d_logits (N, V), contiguous, of the logits' dtype."""
    n, v = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    g = g_logp.float().masked_fill(target == -100, 0.0).contiguous()
    if n:
        row_grad_kernel[(n * triton.cdiv(v, 4096),)](
            logits, target.long().contiguous(), -torch.expm1(logp), lse, g, d_logits, v, logits.stride(0), v,
            BLOCK_V=4096, num_warps=8, **FUSE,
        )  # fmt: skip
    return d_logits
