"""The Triton backend, backward: d logits in the inputs' dtype, then one cuBLAS product for d hidden
and one for d weight.

With p = softmax(z), upstream gradients g of logp, l of lse and h of the entropy H, and 1[t] the
true class:

    dz = g 1[t] - (g - l) p - h p (log p + H),    times 1 - tanh^2 with a softcap
    d hidden = dz W,    d weight = dz^T X,    d bias = dz^T 1

kept:        dz = -g share e, with the e of the forward, whose element of the true class stands for
             p - 1, and one share a row. So d hidden is e W with its rows scaled afterwards, d weight
             is e^T times X with its rows scaled before, and dz is never made: 6 N D V FLOPs for
             forward and backward, N V elements of memory. Of logp alone, without a softcap.
recomputed:  dz from hidden @ weight^T, a slice of the vocabulary at a time: 8 N D V FLOPs,
             N x SLICE elements of memory

In both each row of d weight is one product over all N, and d hidden is summed in fp32. The true
class's 1 - p is -expm1(logp), without cancellation. Units are named as in triton_forward.py.
"""

import torch
import triton
import triton.language as tl

from kernels.tiles import tile_for
from kernels.triton_tile import (
    FUSE,
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

SLICE = 16384  # columns of d logits in memory at a time, when recomputed


# --- kernels


@triton.jit
def write_tile(
    # the product of half a tile
    z,
    # pointers, as in slice_kernel
    bias, target, lse, entropy, of_p, of_target, h, out,
    # the half tile's first row and column
    row, first_col,
    # sizes
    N, width, slice_start,
    # strides
    out_stride,
    # numbers
    scale, softcap, ratio,
    # meta-parameters; WIDTH: columns of a half tile
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The product of half a tile -> its dz, in out."""
    rows, cols = row + tl.arange(0, BLOCK_N), first_col + tl.arange(0, WIDTH)
    live = rows < N
    z2 = logits_of(z, bias, cols, width, scale, softcap, BIAS, SOFTCAP)
    log2_p = z2 - (tl.load(lse + rows, mask=live, other=0.0) * LOG2E)[:, None]
    p = tl.exp2(log2_p)
    dz = -tl.load(of_p + rows, mask=live, other=0.0)[:, None] * p
    if ENTROPY:
        row_h = tl.load(h + rows, mask=live, other=0.0)
        row_entropy = tl.load(entropy + rows, mask=live, other=0.0)
        log2_p = tl.maximum(log2_p, LOG_ZERO)  # p log p of a banned token is 0
        dz -= row_h[:, None] * p * (log2_p * LN2 + row_entropy[:, None])
    targets = (tl.load(target + rows, mask=live, other=-1) - slice_start).to(tl.int32)
    if SOFTCAP:  # d/du softcap tanh(u / softcap) = 1 - tanh^2
        target_dz = tl.load(of_target + rows, mask=live, other=0.0)
        dz = tl.where(cols[None, :] == targets[:, None], target_dz[:, None], dz)
        tanh = z2 * (LN2 * ratio)
        dz *= 1 - tanh * tanh
    line = out + rows.to(tl.int64) * out_stride
    inside = live[:, None] & (cols < out_stride)[None, :]
    tl.store(line[:, None] + cols[None, :], dz.to(out.dtype.element_ty), mask=inside)
    if not SOFTCAP:  # the targets' elements once more, in the few half tiles that have some
        # Nothing is written outside the slice, wherever a wrong target points to.
        holds_target = (targets >= first_col) & (targets < min(first_col + WIDTH, width))
        if tl.max(holds_target.to(tl.int32), 0) > 0:
            tl.debug_barrier()  # all of the above is written
            target_dz = tl.load(of_target + rows, mask=live, other=0.0)
            tl.store(line + targets, target_dz.to(out.dtype.element_ty), mask=holds_target)


@triton.jit(do_not_specialize=PER_BATCH)
def slice_kernel(
    # pointers, read: x (N, D), w (width, D), bias (width,); target, lse, entropy (N,) and,
    # over the temperature, of_p = g - l and h (N,); of_target (N,): the targets' dz, before a softcap's slope
    x, w, bias, target, lse, entropy, of_p, of_target, h,
    # pointer, written: (N, width)
    out,
    # sizes; the slice starts at column slice_start of the vocabulary
    N, width, D, slice_start,
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
    row_block, col_block = tile_of(tl.program_id(0), N, width, BLOCK_N, BLOCK_V, GROUP)
    row, col = row_block * BLOCK_N, col_block * BLOCK_V
    halves = product(x, w, row, col, N, width, D, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
    for half in tl.static_range(2):
        write_tile(
            halves[half], bias, target, lse, entropy, of_p, of_target, h, out,
            row, col + half * (BLOCK_V // 2), N, width, slice_start, out_stride, scale, softcap, ratio,
            BIAS, SOFTCAP, ENTROPY, BLOCK_N, BLOCK_V // 2,
        )  # fmt: skip


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


def scaled(x, factor, dtype):
    """x (N, D) with row i times factor[i], computed in fp32 and rounded once to dtype."""
    return torch.mul(x, factor[:, None], out=x.new_empty(x.shape, dtype=dtype))


def from_kept(g, hidden, weight, share, store, gradients):
    """-> d_hidden, d_weight, d_bias, in the memory of gradients but for d_hidden, whose memory is fp32.

    g (N,): upstream over the temperature. What is empty in gradients stays so."""
    d_hidden, d_weight, d_bias = gradients
    e = store[:, : weight.shape[0]]
    # (N,), so that dz = factor e. share is NaN where every class is banned.
    factor = torch.where(g == 0, 0.0, -g * share)
    if d_hidden.numel():
        product_into(d_hidden, e, weight, accumulate=False)
        d_hidden = scaled(d_hidden, factor, hidden.dtype)
    if d_weight.numel():
        product_into(d_weight, e.T, scaled(hidden, factor, hidden.dtype), accumulate=False)
    if d_bias.numel():
        product_into(d_bias[:, None], e.T, factor[:, None].to(hidden.dtype), accumulate=False)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def backward(
    g_logp, g_entropy, g_lse, hidden, weight, bias, target,
    logp, entropy, lse, share, store, temperature, softcap, need, tile=None,
):  # fmt: skip
    """-> d_hidden, d_weight, d_bias of the inputs' dtypes; empty where need says no."""
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
    if store.numel() and g_entropy is None and g_lse is None and not softcap:
        return from_kept(g, hidden, weight, share, store, (d_hidden, d_weight, d_bias))

    of_p, of_target = g, -torch.expm1(logp) * g  # without the cancellation of 1 - p
    h = g
    if g_lse is not None:
        from_lse = upstream(g_lse, ignored, temperature)
        of_p = g - from_lse
        of_target += logp.exp() * from_lse
    if g_entropy is not None:
        h = upstream(g_entropy, ignored, temperature)
        of_target -= h * logp.exp() * (logp.clamp_min(LOG_ZERO.value) + entropy)
    ratio = temperature / softcap if softcap else 0.0
    lse = lse.masked_fill(ignored & lse.isnan(), 0.0)  # a row whose every class is banned
    tile = tile or tile_for("backward", hidden)
    # Fewer columns for more than 32,768 rows, in multiples of 1024.
    fitting = SLICE * 32768 // n
    step = min(SLICE, max(1024, fitting // 1024 * 1024))
    buffer = hidden.new_empty(n, min(step, (v + 63) // 64 * 64))
    x, w = aligned(hidden), aligned(weight)
    for start in range(0, v, step):
        cols = slice(start, min(start + step, v))
        count = cols.stop - start
        dz = buffer[:, :count]
        x_tiles, w_tiles = operands(x, w[cols], tile)
        slice_kernel[(triton.cdiv(n, tile["BLOCK_N"]) * triton.cdiv(count, tile["BLOCK_V"]),)](
            x_tiles, w_tiles, None if bias is None else bias[cols].contiguous(),
            target, lse, entropy, of_p, of_target, h, dz,
            n, count, x.shape[1], start, dz.stride(0),
            LOG2E.value / temperature, softcap, ratio,
            BIAS=bias is not None, SOFTCAP=softcap > 0, ENTROPY=g_entropy is not None,
            PRECISION=precision(hidden.dtype), **tile, **FUSE,
        )  # fmt: skip
        if need_hidden:
            product_into(d_hidden, dz, weight[cols], accumulate=start > 0)
        if need_weight:
            product_into(d_weight[cols], dz.T, hidden, accumulate=False)
        if need_bias:
            d_bias[cols] = dz.sum(0, dtype=torch.float32)
    return d_hidden.to(hidden.dtype), d_weight, d_bias
