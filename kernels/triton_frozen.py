"""The Triton backend of a frozen head: the sums of frozen_head.py, next to log-prob and log-sum-exp.

A slice of the vocabulary at a time, the forward's own kernel writes e = 2^(z2 - reference2) to a buffer,
and cuBLAS adds e W of the slice to the sums, in fp32. Statistics, tiles and their order are the
forward's, and so are the bits of the log-probs. A row's reference2 is its target's logit. Where some
class of a slice is more than 2^64 times likelier than that, raise_kernel makes it this class's logit.

Memory: N D sums in fp32, and a buffer of SLICE columns for at most CHUNK rows.
"""

import torch
import triton
import triton.language as tl

from kernels import triton_backward
from kernels.tiles import tile_for
from kernels.torch_backend import put_target
from kernels.triton_forward import (
    CHUNK,
    MERGE,
    RANGE2,
    highest,
    logits_kernel,
    merge_kernel,
    rebase,
    reference_kernel,
    slots_of,
)
from kernels.triton_tile import FUSE, LN2, LOG2E, PER_BATCH, aligned, operands, precision


@triton.jit(do_not_specialize=PER_BATCH)
def raise_kernel(
    # pointers, read: peak2 (slots, N); read and written: reference2 (N,), store (N, V) of e, sums (N, D)
    peak2, reference2, store, sums,
    # sizes; V and slots are those of the slice
    N, V, D, slots,
    # strides
    stats_stride, store_stride,
    # meta-parameters; BLOCK_T: slots that are read at a time; WIDTH: columns of a slot
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Raises reference2 of the rows whose e is out of its range, and makes e and sums relative to it."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < N
    top2 = highest(peak2, rows, live, slots, stats_stride, BLOCK_N, BLOCK_T)
    base2 = tl.load(reference2 + rows, mask=live, other=0.0)
    is_raised = live & (top2 - base2 > RANGE2)
    if tl.max(is_raised.to(tl.int32), 0) > 0:
        rebase(store, peak2, rows, base2, top2, is_raised, V, stats_stride, store_stride, WIDTH)
        to_top = tl.exp2(base2 - top2)
        for d in range(0, D, BLOCK_D):
            lanes = d + tl.arange(0, BLOCK_D)
            address = sums + rows.to(tl.int64)[:, None] * D + lanes[None, :]
            inside = is_raised[:, None] & (lanes < D)[None, :]
            old = tl.load(address, mask=inside, other=0.0)
            tl.store(address, old * to_top[:, None], mask=inside)
        tl.debug_barrier()  # all warps have read reference2
        tl.store(reference2 + rows, top2, mask=is_raised)


def forward(hidden, weight, bias, target, temperature, sums, tile=None):
    """-> logp, lse (N,) fp32 in nats. Fills sums (N, D) fp32, contiguous."""
    x, w, target = aligned(hidden), aligned(weight), target.long().contiguous()
    n, v = hidden.shape[0], weight.shape[0]
    tile = tile or tile_for("forward", hidden)
    scale = LOG2E.value / temperature
    statistics = sums.new_empty((2, slots_of(v, tile), min(n, CHUNK)))
    peak2, total = statistics
    logp = sums.new_empty(n)
    lse = sums.new_empty(n)
    target_z2 = sums.new_empty(n)
    reference2 = sums.new_empty(n)
    step = max(triton_backward.SLICE // tile["BLOCK_V"], 1) * tile["BLOCK_V"]
    buffer = hidden.new_empty(min(n, CHUNK), min(step, (v + 63) // 64 * 64))
    if n:
        reference_kernel[(n,)](
            x, w, None if bias is None else bias.contiguous(), target, reference2, v, x.shape[1], scale,
            BIAS=bias is not None, BLOCK_D=1024, **FUSE,
        )  # fmt: skip
    for start in range(0, n, CHUNK):
        rows = slice(start, min(start + CHUNK, n))
        count = rows.stop - start
        for first in range(0, v, step):
            add_slice(
                x[rows], weight, w, bias, target[rows], reference2[rows], peak2, total, target_z2[rows],
                buffer[:count], sums[rows], slice(first, min(first + step, v)), scale, tile,
            )  # fmt: skip
        merge_kernel[(triton.cdiv(count, MERGE["BLOCK_N"]),)](
            peak2, total, total, target_z2[rows], target[rows], reference2[rows],
            logp[rows], lse[rows], lse[rows], lse[rows], buffer,
            count, v, len(peak2), total.stride(0), buffer.stride(0),
            ENTROPY=False, STORE=False, WIDTH=tile["BLOCK_V"] // 2, **MERGE, **FUSE,
        )  # fmt: skip
    sums *= (reference2 * LN2.value - lse).exp_()[:, None]
    return logp, lse


def add_slice(
    x, weight, w, bias, target, reference2, peak2, total, target_z2, buffer, sums, cols, scale, tile
):
    """The statistics of columns cols of some rows, and their e W added to sums, but for the targets'.

    w: the weight as the kernels take it."""
    count, width = len(x), cols.stop - cols.start
    slots = slots_of(width, tile)
    first_slot = 2 * cols.start // tile["BLOCK_V"]
    peak2, total = peak2[first_slot:], total[first_slot:]
    is_inside = (target >= cols.start) & (target < cols.stop)
    x_tiles, w_tiles = operands(x, w[cols], tile)
    logits_kernel[(triton.cdiv(count, tile["BLOCK_N"]) * slots // 2,)](
        x_tiles, w_tiles, None if bias is None else bias[cols].contiguous(),
        torch.where(is_inside, target - cols.start, -1), reference2,
        peak2, total, total, target_z2, buffer,
        count, width, x.shape[1], total.stride(0), buffer.stride(0), scale, 0.0,
        BIAS=bias is not None, SOFTCAP=False, ENTROPY=False, STORE=True,
        PRECISION=precision(x.dtype), **tile, **FUSE,
    )  # fmt: skip
    raise_kernel[(triton.cdiv(count, MERGE["BLOCK_N"]),)](
        peak2, reference2, buffer, sums, count, width, sums.shape[1], slots,
        total.stride(0), buffer.stride(0),
        BLOCK_D=256, WIDTH=tile["BLOCK_V"] // 2, **MERGE, **FUSE,
    )  # fmt: skip
    e = buffer[:, :width]
    index = target.clamp(0, len(weight) - 1)
    put_target(e, index, cols.start, len(weight), torch.zeros_like(e[:, :1]))
    triton_backward.product_into(sums, e, weight[cols], accumulate=cols.start > 0)
