"""The torch backend: any device; of the logits, one tile lives at a time.

Forward: a tile of logits z becomes E = exp(z - m), m the largest of its row; the tiles of a row make its log-sum-exp.
Backward, with upstream gradient g: q = g (1[target] - p), dX = q W, dW = q^T X, dbias = q^T 1, over the temperature. p comes
from E, kept in fp32 if it is small, in fp16 if that fits the budget (then p is off by at most 5e-4 of itself, down to 1e-9 of
the largest; the true class by nothing), or else computed again. The products are out= or in place: autocast leaves those in fp32.
"""

from functools import cache

import torch

WHOLE = 8 << 20  # bytes of E that are kept in fp32
HALF = 2.0**15  # E, at most 1, is kept in fp16 times this: the rare classes stay normal numbers
TILE = {"cpu": (1 << 20, 1024), "cuda": (1 << 25, 8192)}  # elements and least columns: for the L2 cache; for few launches


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def quarter_of_free(device):
    """Asked once: later answers would follow what torch's allocator happens to hold."""
    return torch.cuda.mem_get_info(device)[0] // 4


def default_budget(device):
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return min(4 << 30, quarter_of_free(device))
    return 4 << 30


def tile(hidden, weight):
    """Rows and columns of a tile."""
    n, v = hidden.shape[0], weight.shape[0]
    area, least = TILE.get(weight.device.type, TILE["cuda"])
    cols = min(v, max(least, area // max(n, 1)))
    cols = cols if weight.dtype == wide(weight.dtype) else min(cols, 8 * least)  # as many rows of the weight become fp32
    return max(1, min(n, area // cols)), cols


def kept(hidden, weight, budget):
    """Empty (peak, store) of the shapes that forward keeps for the backward under this budget; -1: no backward."""
    n, v, big = hidden.shape[0], weight.shape[0], wide(hidden.dtype)
    whole = n * v * big.itemsize <= min(WHOLE, budget)
    if not whole and (big == torch.float64 or 2 * n * v > budget):
        return hidden.new_empty(0, dtype=big), hidden.new_empty(0)
    parts = len(spans(v, tile(hidden, weight)[1]))
    return hidden.new_empty((n, parts), dtype=big), hidden.new_empty((n, v), dtype=big if whole else torch.float16)


def spans(n, step):
    return [(a, min(a + step, n)) for a in range(0, max(n, 1), step)]


def part(store, scratch, a, e, b, c):
    """The (e-a, c-b) tensor to work in: of an fp32 store, itself (.data: its second use is api.py's affair)."""
    return store.data[a:e, b:c] if scratch is None else scratch[: (e - a) * (c - b)].view(e - a, c - b)


def logits_(z, x, w, bias, temperature, softcap):
    """Fills z (n, C) from x (n, D) and w (C, D): fp32 from the accumulator on, as rounding to bf16 costs 1e-2 nats a token."""
    if x.is_cuda and x.dtype != z.dtype:
        torch.mm(x, w.T, out_dtype=z.dtype, out=z)  # on the tensor cores
    else:
        torch.mm(x.to(z.dtype), w.to(z.dtype).T, out=z)
    if bias is not None:
        z += bias.to(z.dtype).clamp_min(-1e30)  # -inf shuts a class out
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)
    return z.div_(temperature) if temperature != 1.0 else z


def usable(target, v):
    """-> ignored (N,) bool, index (N,) int64 that is safe to gather with."""
    return target == -100, target.long().clamp(0, v - 1)


def get(x, index, b, v):
    """x (n, C), columns b .. of V -> (n, 1): x in the column of index (n,), -inf where x does not hold that column."""
    if x.shape[1] == v:
        return x.gather(1, index[:, None])
    at = index[:, None] - b
    inside = at.clamp(0, x.shape[1] - 1)
    return x.gather(1, inside).masked_fill_(inside != at, -float("inf"))


def put(x, index, b, v, value):
    """The inverse of get: value (n, 1) into the column of index, where x holds that column."""
    if x.shape[1] == v:
        return x.scatter_(1, index[:, None], value)
    at = index[:, None] - b
    inside = at.clamp(0, x.shape[1] - 1)
    return x.scatter_(1, inside, torch.where(inside == at, value, x.gather(1, inside)))


def masked(logp, ignored, index, target):
    logp.masked_fill_(ignored, 0.0)
    return logp.masked_fill_((index != target) & ~ignored, float("nan")) if target.is_cuda else logp


def cat(tensors, dim):
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def merge(own, top, total, spread=None):
    """Of a row's tiles (n, tiles): z[target], m, sum E, sum E log E -> logp, lse (n, 1), m (n, tiles) [, entropy (n, 1)]."""
    most, share = top, None
    if top.shape[1] > 1:
        most, own = top.amax(1, keepdim=True), own.amax(1, keepdim=True)
        share = (top - most).exp_()
    tail = (total if share is None else (share * total).sum(1, keepdim=True)).log()
    if spread is None:
        return own - most - tail, most + tail, top
    if share is not None:  # p = share E / exp(tail)
        spread = (share * (spread + total * (top - most))).sum(1, keepdim=True)
    return own - most - tail, most + tail, top, tail - spread / tail.exp()


def forward(hidden, weight, bias, target, temperature, softcap, with_entropy, budget):
    (n, _), v, big = hidden.shape, weight.shape[0], wide(hidden.dtype)
    ignored, index = usable(target, v)
    peak, store = kept(hidden, weight, budget)
    rows, cols = tile(hidden, weight)
    scratch = None if store.numel() and store.dtype == big else hidden.new_empty(rows * cols, dtype=big)
    blocks = []
    for a, e in spans(n, rows):
        parts = []
        for b, c in spans(v, cols):
            z = part(store, scratch, a, e, b, c)
            logits_(z, hidden[a:e], weight[b:c], None if bias is None else bias[b:c], temperature, softcap)
            own = get(z, index[a:e], b, v)
            top = z.amax(1, keepdim=True)
            total = z.sub_(top).exp_().sum(1, keepdim=True)  # z is E from here on
            parts.append((own, top, total, *([torch.xlogy(z, z).sum(1, keepdim=True)] if with_entropy else [])))
            if scratch is not None and store.numel():
                store[a:e, b:c] = z.mul_(HALF)
        blocks.append(merge(*(cat(x, 1) for x in zip(*parts, strict=True))))
    logp, lse, top, *entropy = (cat(x, 0) for x in zip(*blocks, strict=True))
    if bias is not None:
        logp.masked_fill_(logp < -1e29, -float("inf"))  # a target whose bias is -inf
    entropy = entropy[0][:, 0].masked_fill_(ignored, 0.0) if with_entropy else lse.new_empty(0)
    return masked(logp[:, 0], ignored, index, target), entropy, lse[:, 0], top if len(peak) else peak, store


def backward(g_logp, g_entropy, hidden, weight, bias, target, logp, entropy, lse, peak, store, temperature, softcap, need):
    """Overwrites store if it is fp32."""
    need_hidden, need_weight, need_bias = need
    (n, _), v, big = hidden.shape, weight.shape[0], wide(hidden.dtype)
    ignored, index = usable(target, v)
    rows, cols = tile(hidden, weight)
    x, lse = hidden.to(big), lse[:, None]
    scratch = None if store.numel() and store.dtype == big else x.new_empty(rows * cols)
    d_hidden = x.new_empty(x.shape if need_hidden else 0)
    d_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    d_bias = weight.new_empty(v if need_bias else 0)
    scaled = (None if y is None else (y / -temperature).to(big).masked_fill_(ignored, 0.0)[:, None] for y in (g_logp, g_entropy))
    g, h = scaled  # -g and -h from here on
    own = torch.expm1(logp)[:, None] * g  # g (1 - p) without cancellation
    share = (peak - lse).exp_() if store.numel() else x.new_ones(1).expand(n, len(spans(v, cols)))  # p = share E
    share = share / HALF if store.numel() and scratch is not None else share
    factor = share * g
    for i, (b, c) in enumerate(spans(v, cols)):
        w, shift = weight[b:c].to(big), None if bias is None else bias[b:c]
        dw = d_weight[b:c] if d_weight.dtype == big or not need_weight else x.new_empty(w.shape)
        db = x.new_zeros(c - b if need_bias else 0)
        for a, e in spans(n, rows):
            q = part(store, scratch, a, e, b, c)
            if not store.numel():
                logits_(q, hidden[a:e], weight[b:c], shift, temperature, softcap).sub_(lse[a:e]).exp_()
            elif scratch is not None:
                q.copy_(store[a:e, b:c])
            if h is not None or softcap:
                p = q * share[a:e, i, None]
                log_p = put(p.clamp_min(1e-38).log_(), index[a:e], b, v, logp[a:e, None].clamp_min(-1e30))
            put(q.mul_(factor[a:e, i, None]), index[a:e], b, v, own[a:e])
            if h is not None:  # dH/dz = -p (log p + H)
                q += h[a:e] * p * (log_p + entropy[a:e, None])
            if softcap:  # d/du softcap tanh(u / softcap) = 1 - tanh^2
                q *= 1 - ((log_p + lse[a:e]) * (temperature / softcap)) ** 2
            if need_weight:
                dw.addmm_(q.T, x[a:e], beta=0 if a == 0 else 1)
            if need_hidden:
                d_hidden[a:e].addmm_(q, w, beta=0 if b == 0 else 1)
            if need_bias:
                db += q.sum(0)
        if need_weight and d_weight.dtype != big:
            d_weight[b:c] = dw
        if need_bias:
            d_bias[b:c] = db
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def logits_forward(logits, target):
    ignored, index = usable(target, logits.shape[1])
    lse = torch.empty(logits.shape[0], dtype=wide(logits.dtype), device=logits.device)
    logp = torch.empty_like(lse)
    for a, e in _row_spans(logits):
        z = logits[a:e].to(lse.dtype, copy=True)
        own, top = z.gather(1, index[a:e, None])[:, 0], z.amax(1)
        tail = z.sub_(top[:, None]).exp_().sum(1).log_()
        logp[a:e], lse[a:e] = own - top - tail, top + tail
    return masked(logp, ignored, index, target), lse


def logits_backward(g, logits, target, logp, lse):
    ignored, index = usable(target, logits.shape[1])
    g = g.masked_fill(ignored, 0.0)[:, None]
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for a, e in _row_spans(logits):
        q = (logits[a:e].to(lse.dtype) - lse[a:e, None]).exp_().mul_(-g[a:e])
        d_logits[a:e] = q.scatter_(1, index[a:e, None], g[a:e] * -torch.expm1(logp[a:e, None]))
    return d_logits


def _row_spans(logits):
    area, _ = TILE.get(logits.device.type, TILE["cuda"])
    return spans(logits.shape[0], max(1, area // logits.shape[1]))


def segment_sum(x, cu_seqlens):
    if x.device.type == "mps":  # where torch has no segment_reduce
        return segment_sum(x.cpu(), cu_seqlens.cpu()).to(x.device)
    return torch.segment_reduce(x.to(wide(x.dtype)), "sum", offsets=cu_seqlens.long(), initial=0)
