"""The Triton backend of logp_from_logits and segment_sum: what needs no matrix product.

Units are named as in triton_forward.py."""

import torch
import triton
import triton.language as tl

from kernels.torch_backend import wide
from kernels.triton_tile import FUSE, IGNORE, LN2, LOG2E, LOG_ZERO

ROW = {"BLOCK_V": 4096, "num_warps": 8}


# --- kernels


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


def logits_forward(logits, target):
    """logits (N, V) -> logp, lse (N,) fp32."""
    n, v = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    logp = logits.new_empty(n, dtype=torch.float32)
    lse = logits.new_empty(n, dtype=torch.float32)
    if n:
        target = target.long().contiguous()
        row_kernel[(n,)](logits, target, logp, lse, v, logits.stride(0), **ROW, **FUSE)
    return logp, lse


def segment_sum(x, cu_seqlens):
    """x (N,), cu_seqlens (B+1,) -> (B,) fp32, fp64 for fp64."""
    out = x.new_empty(cu_seqlens.shape[0] - 1, dtype=wide(x.dtype))
    if len(out):
        segment_kernel[(len(out),)](x.contiguous(), cu_seqlens.contiguous(), out, BLOCK=512, **FUSE)
    return out


def logits_backward(g_logp, logits, target, logp, lse):
    """-> d_logits (N, V), contiguous, of the logits' dtype."""
    n, v = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    g = g_logp.float().masked_fill(target == -100, 0.0).contiguous()
    if n:
        row_grad_kernel[(n * triton.cdiv(v, ROW["BLOCK_V"]),)](
            logits, target.long().contiguous(), -torch.expm1(logp), lse, g, d_logits, v, logits.stride(0), v,
            **ROW, **FUSE,
        )  # fmt: skip
    return d_logits
