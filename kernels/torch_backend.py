"""The torch backend: any device, chunked over rows; the logits of one chunk live at a time.

Forward: p = softmax(z), logp = z[target] - lse. Backward, for one row with upstream gradient g and q = p - 1[target]:

    dX = -g q W        dW = -q^T (g X)        dbias = -q^T g        (g already divided by the temperature)

so g scales X and dX, (N, D), and never the (N, V) probabilities. p is kept in fp32 if all rows make one chunk; else as
p / max p in fp16 if that fits the budget (the largest class and the true class stay exact, the rest are off by 2e-4 of
themselves); else it is computed again.
"""

from functools import reduce

import torch

CHUNK = 32 << 20  # bytes of logits in a chunk
SLICE = 8192  # rows of a 16-bit weight converted to fp32 at a time


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_budget(device):
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return min(4 << 30, torch.cuda.mem_get_info(device)[0] // 4)
    return 4 << 30


def chunk_rows(weight):
    return max(1, CHUNK // (weight.shape[0] * wide(weight.dtype).itemsize))


def kept(hidden, weight, budget):
    """Empty (peak, store) of the shapes that forward keeps for the backward under this budget; -1: no backward."""
    n, v = hidden.shape[0], weight.shape[0]
    if budget < 0 or (n > chunk_rows(weight) and (hidden.dtype == torch.float64 or 2 * n * v > budget)):
        return hidden.new_empty(0, dtype=wide(hidden.dtype)), hidden.new_empty(0)
    if n <= chunk_rows(weight):
        return hidden.new_empty(0, dtype=wide(hidden.dtype)), hidden.new_empty((n, v), dtype=wide(hidden.dtype))
    return hidden.new_empty((n, 1), dtype=torch.float32), hidden.new_empty((n, v), dtype=torch.float16)


def slices(weight):
    """(start, end) of the rows of the weight that go into one matrix product."""
    step = weight.shape[0] if weight.dtype in (torch.float32, torch.float64) else SLICE
    return [(a, min(a + step, weight.shape[0])) for a in range(0, weight.shape[0], step)]


def logits_of(hidden, weight, bias, temperature, softcap):
    """(n, D), (V, D) -> z (n, V), fp32 from the accumulator on: rounding logits to bf16 costs 1e-2 nats a token."""
    if hidden.dtype == wide(hidden.dtype):
        z = hidden @ weight.T
    elif hidden.is_cuda:
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        hidden = hidden.float()
        z = hidden.new_empty(hidden.shape[0], weight.shape[0])
        for a, b in slices(weight):
            z[:, a:b] = hidden @ weight[a:b].float().T
    if bias is not None:
        z += bias
    if softcap:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z.div_(temperature) if temperature != 1.0 else z


def forward(hidden, weight, bias, target, temperature, softcap, with_entropy, budget):
    n, v = hidden.shape[0], weight.shape[0]
    keep, index = usable(target, v)
    peak, store = kept(hidden, weight, budget)
    lse, own = (hidden.new_empty(n, dtype=wide(hidden.dtype)) for _ in range(2))
    entropy = lse.new_empty(n if with_entropy else 0)
    step = chunk_rows(weight)
    for a in range(0, n, step):
        rows = slice(a, a + step)
        z = logits_of(hidden[rows], weight, bias, temperature, softcap)  # (rows, V)
        own[rows] = z.gather(1, index[rows, None]).squeeze(1)
        p, lse[rows] = softmax_(z, own[rows], index[rows])
        lost = lse[rows].isinf()
        if not z.is_cuda and lost.any():  # p[t] underflowed
            lse[rows][lost] = logits_of(hidden[rows][lost], weight, bias, temperature, softcap).logsumexp(1)
        if with_entropy:
            entropy[rows] = -torch.xlogy(p, p).sum(1)
        if len(peak):
            peak[rows] = p.amax(1, keepdim=True)
            store[rows] = p.div_(peak[rows])
        elif len(store):
            store = p
    return masked(own - lse, keep, index, target), entropy.masked_fill_(~keep[: len(entropy)], 0.0), lse, peak, store


def softmax_(z, own, index):
    """Softmax of z (n, V) in place, and the log-sum-exp (n,) of its rows: on a CPU from z[t] and p[t], inf where p[t] is 0."""
    if z.is_cuda:
        lse = z.logsumexp(1)
        return z.sub_(lse[:, None]).exp_(), lse
    p = torch.softmax(z, 1, out=z)
    p_own = p.gather(1, index[:, None]).squeeze(1)
    return p, own - torch.where(p_own < 1e-30, 0.0, p_own).log()


def usable(target, v):
    """-> keep (N,) bool, index (N,) int64 that is safe to gather with."""
    return target != -100, target.long().clamp(0, v - 1)


def masked(logp, keep, index, target):
    logp.masked_fill_(~keep, 0.0)
    return logp.masked_fill_((index != target) & keep, float("nan")) if target.is_cuda else logp


def backward(g_logp, g_entropy, hidden, weight, bias, target, logp, entropy, lse, peak, store, temperature, softcap, need):
    need_hidden, need_weight, need_bias = need
    n, v = hidden.shape[0], weight.shape[0]
    keep, index = usable(target, v)
    big = wide(hidden.dtype)
    if not n:
        return tuple(torch.zeros_like(x) if wanted else x.new_empty(0) for x, wanted in zip((hidden, weight, weight[:, 0]), need))
    d_hidden = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    d_weight = torch.empty_like(weight, dtype=big) if need_weight else weight.new_empty(0)
    d_bias = weight.new_zeros(v if need_bias else 0, dtype=big)
    g = (g_logp / -temperature).to(big).masked_fill_(~keep, 0.0)[:, None]  # (N, 1), from here on -g
    step = chunk_rows(weight)
    for a in range(0, n, step):
        rows = slice(a, a + step)
        if not store.numel():
            q = logits_of(hidden[rows], weight, bias, temperature, softcap).softmax(1)  # (rows, V)
        else:
            q = store[rows] * peak[rows] if len(peak) else store.data  # .data: overwritten, api.py sees to it that just once
        scale = g[rows]
        log_q = q.clamp_min(1e-38).log_() if g_entropy is not None or softcap else None
        q.scatter_(1, index[rows, None], torch.expm1(logp[rows, None]))  # p - 1 without cancellation
        if g_entropy is not None:  # dH/dz = -p (log p + H)
            h = (g_entropy[rows] / -temperature).to(big).masked_fill_(~keep[rows], 0.0)[:, None]
            q = scale * q + h * log_q.exp() * (log_q + entropy[rows, None])
            scale = torch.ones_like(scale)
        if softcap:  # d/du softcap tanh(u / softcap) = 1 - tanh^2
            q *= 1 - ((log_q + lse[rows, None]) * (temperature / softcap)) ** 2
        x = hidden[rows] * scale
        for b, c in slices(weight):
            if need_weight:
                d_weight[b:c].addmm_(q[:, b:c].T, x, beta=0 if a == 0 else 1)
        if need_hidden:
            parts = [q[:, b:c] @ weight[b:c].to(big) for b, c in slices(weight)]
            torch.mul(reduce(torch.add, parts), scale, out=d_hidden[rows])
        if need_bias:
            d_bias += q.T @ scale[:, 0]
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


def logits_forward(logits, target):
    keep, index = usable(target, logits.shape[1])
    lse = torch.empty(logits.shape[0], dtype=wide(logits.dtype), device=logits.device)
    for rows in _row_chunks(logits):
        lse[rows] = logits[rows].to(lse.dtype).logsumexp(1)
    logp = logits.gather(1, index[:, None]).squeeze(1).to(lse.dtype) - lse
    return masked(logp, keep, index, target), lse


def logits_backward(g, logits, target, logp, lse):
    keep, index = usable(target, logits.shape[1])
    g = g.masked_fill(~keep, 0.0)[:, None]
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in _row_chunks(logits):
        q = (logits[rows].to(lse.dtype) - lse[rows, None]).exp_()
        q.scatter_(1, index[rows, None], torch.expm1(logp[rows, None]))
        d_logits[rows] = q.mul_(-g[rows])
    return d_logits


def _row_chunks(logits):
    step = chunk_rows(logits.T)
    return [slice(a, a + step) for a in range(0, logits.shape[0], step)]


def segment_sum(x, cu_seqlens):
    return torch.segment_reduce(x.to(wide(x.dtype)), "sum", offsets=cu_seqlens.long(), initial=0)
