"""The torch backend of logp_from_logits and segment_sum."""

import torch

from kernels.torch_backend import TILE, masked, spans, usable, wide


def logits_forward(logits, target):
    """-> logp, lse (N,)."""
    ignored, index = usable(target, logits.shape[1])
    lse = torch.empty(logits.shape[0], dtype=wide(logits.dtype), device=logits.device)
    logp = torch.empty_like(lse)
    for row0, row1 in row_spans(logits):
        z = logits[row0:row1].to(lse.dtype, copy=True)
        target_logit = z.gather(1, index[row0:row1, None])[:, 0]
        peak = z.amax(1)
        log_total = z.sub_(peak[:, None]).exp_().sum(1).log_()
        logp[row0:row1] = target_logit - peak - log_total
        lse[row0:row1] = peak + log_total
    return masked(logp, ignored, index, target), lse


def logits_backward(g_logp, logits, target, logp, lse):
    """-> d_logits (N, V), contiguous."""
    ignored, index = usable(target, logits.shape[1])
    g = g_logp.masked_fill(ignored, 0.0)[:, None]
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for row0, row1 in row_spans(logits):
        p = (logits[row0:row1].to(lse.dtype) - lse[row0:row1, None]).exp_()
        target_dz = g[row0:row1] * -torch.expm1(logp[row0:row1, None])  # g (1 - p) without cancellation
        dz = p.mul_(-g[row0:row1]).scatter_(1, index[row0:row1, None], target_dz)
        d_logits[row0:row1] = dz.masked_fill_(ignored[row0:row1, None], 0.0)  # also if such a row holds NaN
    return d_logits


def row_spans(logits):
    """Blocks of whole rows."""
    area, _ = TILE.get(logits.device.type, TILE["cuda"])
    return spans(logits.shape[0], max(1, area // logits.shape[1]))


def segment_sum(x, cu_seqlens):
    """-> sums (B,)."""
    if x.device.type == "mps":  # where torch has no segment_reduce
        return segment_sum(x.cpu(), cu_seqlens.cpu()).to(x.device)
    return torch.segment_reduce(x.to(wide(x.dtype)), "sum", offsets=cu_seqlens.long(), initial=0)
