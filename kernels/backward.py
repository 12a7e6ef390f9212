"""The Triton backend, backward: d logits in the inputs' dtype, then one cuBLAS product each for d hidden and d weight.

With p = softmax(z), upstream gradients g of logp and h of the entropy H, and 1[t] the true class:

    dz = g (1[t] - p) - h p (log p + H),    times 1 - tanh^2 with a softcap;    dX = dz W,    dW = dz^T X,    dbias = dz^T 1

kept:        the forward's E = 2^(z - peak) becomes dz in place: 6 N D V FLOPs for forward and backward, N V elements of memory
recomputed:  dz a vocabulary slice at a time from hidden @ weight^T: 8 N D V FLOPs, N x SLICE elements of memory

In both each row of dW is one product over all N, and dX is summed in fp32. The true class is -expm1(logp), without cancellation.
"""

import torch
import triton
import triton.language as tl

from kernels.logp import FUSE, LN2, LOG2E, LOW, PER_BATCH, aligned, logits_of, operands, precision, product, tile_of, tiles
from kernels.logp import forward as forward  # these four with backward and logits_backward are what api.py calls
from kernels.logp import kept as kept
from kernels.logp import logits_forward as logits_forward
from kernels.logp import segment_sum as segment_sum

SLICE = 8192  # columns of d logits that live at a time when they are computed again, for up to 65536 rows


@triton.jit
def dlogits(
    log_p, p, rows, cols, target, first, lse, entropy, g, h, N, ratio, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr
):  # fmt: skip
    """log2 p and p of a tile -> dz, fp32. cols count from column first of the vocabulary; ratio = temperature / softcap."""
    live = rows < N
    gain = tl.load(g + rows, mask=live, other=0.0)
    true = cols[None, :] == (tl.load(target + rows, mask=live, other=-1) - first).to(tl.int32)[:, None]
    rest = tl.load(g + N + rows, mask=live, other=0.0)  # -expm1(logp)
    dz = gain[:, None] * tl.where(true, rest[:, None], -p)
    log_p *= LN2
    if ENTROPY:
        slope = tl.load(h + rows, mask=live, other=0.0)
        dz -= slope[:, None] * p * (log_p + tl.load(entropy + rows, mask=live, other=0.0)[:, None])
    if SOFTCAP:
        tanh = (log_p + tl.load(lse + rows, mask=live, other=0.0)[:, None]) * ratio
        dz *= 1 - tanh * tanh
    return dz


@triton.jit(do_not_specialize=PER_BATCH)
def kept_kernel(
    store, peak, target, logp, lse, entropy, g, h, N, V, peak_stride, store_stride, ratio,
    SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """store (N, V): 2^(z - peak) -> dz in place. WIDTH: the columns that share a row of peak."""
    slots = tl.cdiv(V, WIDTH)
    rows = tl.program_id(0) // slots * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.program_id(0) % slots
    cols = slot * WIDTH + tl.arange(0, WIDTH)
    at = store + rows.to(tl.int64)[:, None] * store_stride + cols[None, :]
    inside = (rows < N)[:, None] & (cols < store_stride)[None, :]
    e = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(peak + slot.to(tl.int64) * peak_stride + rows, mask=rows < N, other=0.0)
    m -= tl.load(lse + rows, mask=rows < N, other=0.0) * LOG2E
    p = e * tl.exp2(m)[:, None]
    log_p = tl.log2(tl.maximum(e, 1e-38)) + m[:, None]
    true = cols[None, :] == tl.load(target + rows, mask=rows < N, other=-1).to(tl.int32)[:, None]
    own = tl.maximum(tl.load(logp + rows, mask=rows < N, other=0.0), LOW)  # where e is 0; of a banned target, p log p = 0
    log_p = tl.where(true, own[:, None] * LOG2E, log_p)
    dz = dlogits(log_p, p, rows, cols, target, 0, lse, entropy, g, h, N, ratio, SOFTCAP, ENTROPY)
    tl.store(at, dz.to(store.dtype.element_ty), mask=inside)  # up to the stride: whole vectors, whatever V


@triton.jit
def write_tile(
    z, bias, target, first, lse, entropy, g, h, out, row, col, N, V, out_stride, scale, softcap, ratio,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows, cols = row + tl.arange(0, BLOCK_N), col + tl.arange(0, WIDTH)
    log_p = logits_of(z, bias, cols, V, scale, softcap, BIAS, SOFTCAP)
    log_p -= tl.load(lse + rows, mask=rows < N, other=0.0)[:, None] * LOG2E
    if BIAS:  # a banned token: p log p = 0
        log_p = tl.maximum(log_p, -1e30, propagate_nan=tl.PropagateNan.ALL)
    p = tl.exp2(log_p)
    dz = dlogits(log_p, p, rows, cols, target, first, lse, entropy, g, h, N, ratio, SOFTCAP, ENTROPY)
    at = out + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
    tl.store(at, dz.to(out.dtype.element_ty), mask=(rows < N)[:, None] & (cols < out_stride)[None, :])


@triton.jit(do_not_specialize=PER_BATCH)
def slice_kernel(
    x, w, bias, target, lse, entropy, g, h, out, N, V, D, first, out_stride, scale, softcap, ratio,
    BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz of V columns from column first on, w and bias those columns' -> out (N, V)."""
    row_block, tile = tile_of(tl.program_id(0), N, V, BLOCK_N, BLOCK_V, GROUP)
    row, col = row_block * BLOCK_N, tile * BLOCK_V
    left, right = product(x, w, row, col, N, V, D, TMA, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D)
    write_tile(
        left, bias, target, first, lse, entropy, g, h, out, row, col, N, V, out_stride, scale, softcap, ratio,
        BIAS, SOFTCAP, ENTROPY, BLOCK_N, BLOCK_V // 2,
    )  # fmt: skip
    write_tile(
        right, bias, target, first, lse, entropy, g, h, out, row, col + BLOCK_V // 2, N, V, out_stride, scale, softcap,
        ratio, BIAS, SOFTCAP, ENTROPY, BLOCK_N, BLOCK_V // 2,
    )  # fmt: skip


@triton.jit
def row_grad_kernel(logits, target, logp, lse, g, out, V, stride, out_stride, BLOCK_V: tl.constexpr):
    """d logits (N, V) of existing logits, g (1[t] - p): one program per row and block of columns."""
    blocks = tl.cdiv(V, BLOCK_V)
    row = tl.program_id(0) // blocks
    cols = tl.program_id(0) % blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    z = tl.load(logits + row.to(tl.int64) * stride + cols, mask=cols < V, other=0.0).to(tl.float32)
    p = tl.exp2((z - tl.load(lse + row)) * LOG2E)
    true = cols == tl.load(target + row).to(tl.int32)
    dz = tl.load(g + row) * tl.where(true, tl.load(logp + row), -p)
    tl.store(out + row.to(tl.int64) * out_stride + cols, dz.to(out.dtype.element_ty), mask=cols < V)


def add_product(out, a, b, first):
    """out = a @ b if first, else out += a @ b, summed in fp32. In place, which autocast leaves alone."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out) if first else out.addmm_(a, b)
    if out.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out) if first else torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return add_product(out, a.to(out.dtype), b.to(out.dtype), first)


def backward(
    g_logp, g_entropy, hidden, weight, bias, target, logp, entropy, lse, peak, store, temperature, softcap, need, tile=None
):
    """-> d_hidden, d_weight, d_bias of the inputs' dtypes; empty where need says no. Overwrites store. tile: the forward's if
    store is not empty."""
    need_hidden, need_weight, need_bias = need
    n, v = hidden.shape[0], weight.shape[0]
    if not n:
        like = zip((hidden, weight, weight[:, 0]), need, strict=True)
        return tuple(x.new_zeros(x.shape if wanted else 0) for x, wanted in like)
    keep = store.numel() > 0
    tile = tile or tiles("forward" if keep else "backward", hidden)
    ignored, target = target == -100, target.long().contiguous()
    g, h = (
        torch.zeros_like(lse) if x is None else (x.float() / temperature).masked_fill_(ignored, 0.0) for x in (g_logp, g_entropy)
    )
    g = torch.stack([g, -torch.expm1(logp)])  # the true class rides along
    rows = (lse, entropy, g, h)
    ratio = temperature / softcap if softcap else 0.0
    options = {"SOFTCAP": softcap > 0, "ENTROPY": g_entropy is not None}
    d_hidden = torch.empty_like(hidden, dtype=torch.float32, memory_format=torch.contiguous_format) if need_hidden else None
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0)
    d_bias = weight.new_empty(v if need_bias else 0)
    if keep:
        width = tile["BLOCK_V"] // 2
        kept_kernel[(triton.cdiv(n, 32) * triton.cdiv(v, width),)](
            store, peak, target, logp, *rows, n, v, peak.stride(0), store.stride(0), ratio,
            BLOCK_N=32, WIDTH=width, **options, **FUSE,
        )  # fmt: skip
        step = v
    else:
        x, w = aligned(hidden), aligned(weight)
        step = min(SLICE, max(1024, (SLICE << 16) // n // 1024 * 1024))
        store = hidden.new_empty(n, min(step, (v + 63) // 64 * 64))
    for a in range(0, v, step):
        b = min(a + step, v)
        dz = store[:, : b - a]
        if not keep:
            slice_kernel[(triton.cdiv(n, tile["BLOCK_N"]) * triton.cdiv(b - a, tile["BLOCK_V"]),)](
                *operands(x, w[a:b], tile), None if bias is None else bias[a:b].contiguous(), target, *rows, dz,
                n, b - a, x.shape[1], a, dz.stride(0), LOG2E.value / temperature, softcap, ratio,
                BIAS=bias is not None, PRECISION=precision(hidden.dtype), **options, **tile, **FUSE,
            )  # fmt: skip
        if need_hidden:
            add_product(d_hidden, dz, weight[a:b], a == 0)
        if need_weight:
            add_product(d_weight[a:b], dz.T, hidden, True)
        if need_bias:
            d_bias[a:b] = dz.sum(0, dtype=torch.float32)
    return d_hidden.to(hidden.dtype) if need_hidden else hidden.new_empty(0), d_weight, d_bias


def logits_backward(g, logits, target, logp, lse):
    """-> d_logits (N, V), contiguous, of the logits' dtype."""
    n, v = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    g = g.float().masked_fill(target == -100, 0.0).contiguous()
    if n:
        row_grad_kernel[(n * triton.cdiv(v, 4096),)](
            logits, target.long().contiguous(), -torch.expm1(logp), lse, g, out, v, logits.stride(0), v,
            BLOCK_V=4096, num_warps=8, **FUSE,
        )  # fmt: skip
    return out
