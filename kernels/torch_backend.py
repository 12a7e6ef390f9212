"""The torch backend: any device. Of the logits, only one tile is in memory at a time.

Forward: a tile of logits z becomes E = exp(z - peak), where peak is the largest z of its row in
this tile. The statistics of a row's tiles (target_logit, peak, total, moment) are then merged into
its log-prob, its log-sum-exp and its entropy. All logarithms are natural.

Backward, with upstream gradients g of the log-prob and l of the log-sum-exp:
dz = (g 1[target] - (g - l) p) / temperature, then dX = dz W, dW = dz^T X, dbias = dz^T 1. The
probabilities p come from E, which the forward keeps

    in fp32 (fp64 for fp64 inputs)   if that is small,
    in fp16                          if that fits the budget. Relative error of p: at most 5e-4
                                     down to 1e-9 of the tile's largest; the true class has none.
    not at all                       otherwise: the backward computes the logits again.

For a frozen head, the forward can also add up E W over the tiles: see frozen_head.py.

Matrix products write to out= or in place: autocast leaves those in fp32.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

FP32_BYTES = 8 << 20  # up to this size E is kept in fp32
LOG_ZERO = -1e30  # stands for log 0: unlike -inf, it can be subtracted from itself
FP16_SCALE = 2.0**15  # E, at most 1, is kept in fp16 times this, so that rare classes are normal numbers
# (elements of a tile, to fit the L2 cache; its fewest columns, for few launches)
TILE = {"cpu": (1 << 20, 1024), "cuda": (1 << 25, 8192)}


def wide(dtype):
    """The dtype to compute in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@cache
def quarter_of_free(device):
    """In bytes. Asked once: later answers would follow what torch's allocator happens to hold."""
    free, _ = torch.cuda.mem_get_info(device)
    return free // 4


def default_budget(device):
    """Bytes of probabilities that the backward may keep."""
    # The compiler cannot trace mem_get_info.
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return min(4 << 30, quarter_of_free(device))
    return 4 << 30


# --- tiles


def tile(hidden, weight):
    """Rows and columns of a tile."""
    n, v = hidden.shape[0], weight.shape[0]
    area, fewest_cols = TILE.get(weight.device.type, TILE["cuda"])
    cols = min(v, max(fewest_cols, area // max(n, 1)))
    if weight.dtype != wide(weight.dtype):  # a tile's columns are weight rows that are cast to fp32
        cols = min(cols, 8 * fewest_cols)
    return max(1, min(n, area // cols)), cols


def spans(length, step):
    """0 .. length in steps -> (start, end) of each; (0, 0) for nothing."""
    return [(start, min(start + step, length)) for start in range(0, max(length, 1), step)]


def kept(hidden, weight, budget):
    """Empty (peak, store) of the shapes that forward keeps within budget; -1: no backward."""
    n, v = hidden.shape[0], weight.shape[0]
    dtype = wide(hidden.dtype)
    if budget <= 0:  # without a look at n, which torch.compile may not know
        return hidden.new_empty(0, dtype=dtype), hidden.new_empty(0)
    in_full = n * v * dtype.itemsize <= min(FP32_BYTES, budget)
    if not in_full and (dtype == torch.float64 or 2 * n * v > budget):
        return hidden.new_empty(0, dtype=dtype), hidden.new_empty(0)
    _, tile_cols = tile(hidden, weight)
    peak = hidden.new_empty((n, len(spans(v, tile_cols))), dtype=dtype)
    return peak, hidden.new_empty((n, v), dtype=dtype if in_full else torch.float16)


def in_shape(scratch, rows, cols):
    """The first rows x cols elements of scratch as a tile."""
    return scratch[: rows * cols].view(rows, cols)


def join(tensors, dim):
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


# --- targets


def usable(target, v):
    """-> ignored (N,) bool, index (N,) int64 that is safe to gather with."""
    return target == -100, target.long().clamp(0, v - 1)


def get_target(x, index, col0, v):
    """x (n, C), columns of V from col0 on -> (n, 1), x at column index (n,); -inf where outside x."""
    if x.shape[1] == v:
        return x.gather(1, index[:, None])
    column = index[:, None] - col0
    nearest = column.clamp(0, x.shape[1] - 1)
    return x.gather(1, nearest).masked_fill_(nearest != column, -float("inf"))


def put_target(x, index, col0, v, value):
    """The inverse of get_target: value (n, 1) into column index of x, where x holds that column."""
    if x.shape[1] == v:
        return x.scatter_(1, index[:, None], value)
    column = index[:, None] - col0
    nearest = column.clamp(0, x.shape[1] - 1)
    return x.scatter_(1, nearest, torch.where(nearest == column, value, x.gather(1, nearest)))


def masked(logp, ignored, index, target):
    """0 where the target is ignored, NaN where it is outside the vocabulary."""
    logp.masked_fill_(index != target, float("nan"))
    return logp.masked_fill_(ignored, 0.0)


# --- linear_logp


def logits_(z, x, w, bias, temperature, softcap):
    """Fills z (n, C) from x (n, D) and w (C, D).

    In fp32 from the accumulator on, because rounding to bf16 costs 1e-2 nats per token."""
    if x.is_cuda and x.dtype != z.dtype:
        torch.mm(x, w.T, out_dtype=z.dtype, out=z)  # on the tensor cores
    else:
        torch.mm(x.to(z.dtype), w.to(z.dtype).T, out=z)
    if bias is not None:
        z += bias.to(z.dtype)
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        z.div_(temperature)
    if bias is not None:
        z.clamp_min_(LOG_ZERO)  # -inf bans a class, at any temperature
    return z


def softcap_slope(z, temperature, softcap):
    """d/du softcap tanh(u / softcap) = 1 - tanh^2, from the logits z."""
    return 1 - (z * (temperature / softcap)) ** 2


def merge(target_logit, peak, total, moment, may_be_banned):
    """A row's tiles (n, tiles) -> logp, lse, entropy (n, 1) each; entropy is None without moment.

    target_logit: z[target], -inf in tiles without it; total: sum E; moment: sum E log E.
    may_be_banned: whether z may be LOG_ZERO. A banned target has a log-prob of -inf; all are NaN for
    a row whose every class is banned, which has no distribution."""
    if peak.shape[1] > 1:  # fold the tiles into one, relative to the peak of the whole row
        row_peak = peak.amax(1, keepdim=True)
        share = (peak - row_peak).exp_()
        if moment is not None:
            moment = (share * (moment + total * (peak - row_peak))).sum(1, keepdim=True)
        total = (share * total).sum(1, keepdim=True)
        target_logit = target_logit.amax(1, keepdim=True)
        peak = row_peak
    log_total = total.log()
    if may_be_banned:
        log_total.masked_fill_(peak == LOG_ZERO, float("nan"))
    logp = target_logit - peak - log_total
    if may_be_banned:
        logp.masked_fill_((target_logit == LOG_ZERO) & (peak > LOG_ZERO), -float("inf"))
    lse = peak + log_total
    if moment is None:
        return logp, lse, None
    return logp, lse, log_total - moment / log_total.exp()


def add_to_sums(sums, top, e, peak, w, index, col0, v):
    """Adds E W of a tile to sums (n, D), without the targets' own rows of W -> the new top (n, 1).

    E is relative to the tile's peak, sums to top, the highest peak of the tiles before, None for the
    first. Overwrites E."""
    put_target(e, index, col0, v, torch.zeros_like(peak))
    if top is None:
        torch.mm(e, w.to(e.dtype), out=sums)
        return peak
    new_top = torch.maximum(top, peak)
    sums.mul_((top - new_top).exp_())
    sums.addmm_(e.mul_((peak - new_top).exp_()), w.to(e.dtype))
    return new_top


def forward(hidden, weight, bias, target, temperature, softcap, with_entropy, budget, sums=None):
    """-> logp, entropy, lse (N,), and peak and store as in kept.

    sums (N, D), if given, gets sum_j p_j W_j over all classes but the target."""
    n, v = hidden.shape[0], weight.shape[0]
    dtype = wide(hidden.dtype)
    ignored, index = usable(target, v)
    peak, store = kept(hidden, weight, budget)
    tile_rows, tile_cols = tile(hidden, weight)
    # Tiles are computed in memory of one layout, whatever is kept of them: so are the log-probs.
    is_one_tile = store.shape == (tile_rows, tile_cols) and store.dtype == dtype
    scratch = store.view(-1) if is_one_tile else hidden.new_empty(tile_rows * tile_cols, dtype=dtype)

    logps, lses, entropies, row_peaks = [], [], [], []  # one item per block of rows
    for row0, row1 in spans(n, tile_rows):
        target_logits, peaks, totals, moments = [], [], [], []  # one item per tile of these rows
        top = None
        for col0, col1 in spans(v, tile_cols):
            z = in_shape(scratch, row1 - row0, col1 - col0)
            tile_bias = None if bias is None else bias[col0:col1]
            logits_(z, hidden[row0:row1], weight[col0:col1], tile_bias, temperature, softcap)
            target_logits.append(get_target(z, index[row0:row1], col0, v))
            peaks.append(z.amax(1, keepdim=True))
            e = z.sub_(peaks[-1]).exp_()
            totals.append(e.sum(1, keepdim=True))
            if with_entropy:
                moments.append(torch.xlogy(e, e).sum(1, keepdim=True))
            if store.numel() and store.dtype == torch.float16:
                store[row0:row1, col0:col1] = e.mul_(FP16_SCALE)
            elif store.numel() and not is_one_tile:
                store[row0:row1, col0:col1] = e
            if sums is not None:
                w = weight[col0:col1]
                top = add_to_sums(sums[row0:row1], top, e, peaks[-1], w, index[row0:row1], col0, v)
        row_peaks.append(join(peaks, 1))
        moment = join(moments, 1) if with_entropy else None
        logp, lse, entropy = merge(
            join(target_logits, 1), row_peaks[-1], join(totals, 1), moment, bias is not None
        )
        if sums is not None:
            sums[row0:row1] *= (top - lse).exp()
        logps.append(logp)
        lses.append(lse)
        entropies.append(entropy)

    logp, lse = join(logps, 0)[:, 0], join(lses, 0)[:, 0]
    entropy = lse.new_empty(0)
    if with_entropy:
        entropy = join(entropies, 0)[:, 0].masked_fill_(ignored, 0.0)
    if len(peak):  # kept gave only its shape
        peak = join(row_peaks, 0)
    return masked(logp, ignored, index, target), entropy, lse, peak, store


class RowTerms(NamedTuple):
    """What a row brings to the gradient of its logits, as columns (N, 1)."""

    index: Tensor  # (N,) the target
    logp: Tensor
    entropy: Tensor
    lse: Tensor
    share: Tensor  # (N, tiles): p = share E
    factor: Tensor  # (N, tiles): -(g - l) p / temperature = factor E
    target_dz: Tensor  # the target's own dz, all of it
    minus_h: Tensor | None  # -h / temperature, h the upstream gradient of the entropy


def minus_upstream(g, ignored, dtype, temperature):
    """-g / temperature (N, 1), 0 where the target is ignored."""
    return (g / -temperature).to(dtype).masked_fill_(ignored, 0.0)[:, None]


def gradient_parts(g_logp, g_lse, ignored, logp, temperature):
    """-> (N, 1) each: the factor of p in dz, -(g - l) / temperature, and the target's whole dz."""
    minus_g = minus_upstream(g_logp, ignored, logp.dtype, temperature)
    target_dz = torch.expm1(logp)[:, None] * minus_g  # g (1 - p) without the cancellation of 1 - p
    if g_lse is None:
        return minus_g, target_dz
    minus_l = minus_upstream(g_lse, ignored, logp.dtype, temperature)
    return minus_g - minus_l, target_dz - logp.exp()[:, None] * minus_l


def row_terms(g_logp, g_entropy, g_lse, target, logp, entropy, lse, share, v, temperature):
    ignored, index = usable(target, v)
    of_p, target_dz = gradient_parts(g_logp, g_lse, ignored, logp, temperature)
    minus_h = None
    if g_entropy is not None:
        minus_h = minus_upstream(g_entropy, ignored, logp.dtype, temperature)
    return RowTerms(
        index=index,
        logp=logp[:, None],
        entropy=entropy[:, None],
        lse=lse[:, None],
        share=share,
        factor=share * of_p,
        target_dz=target_dz,
        minus_h=minus_h,
    )


def logits_gradient(dz, e, slope, terms, rows, tile_index, col0, v, temperature, softcap):
    """Fills dz of a tile from its E, which may be the same memory.

    The tile has the rows in slice `rows` and columns from col0 on. slope: softcap_slope of the tile,
    None to derive it from E, which is coarse for a small softcap (api.py keeps no E then)."""
    index = terms.index[rows]
    if terms.minus_h is not None or softcap:
        p = e * terms.share[rows, tile_index, None]
        log_p = p.clamp_min(1e-38).log_()
        log_p = put_target(log_p, index, col0, v, terms.logp[rows].clamp_min(LOG_ZERO))
    torch.mul(e, terms.factor[rows, tile_index, None], out=dz)
    put_target(dz, index, col0, v, terms.target_dz[rows])
    if terms.minus_h is not None:  # dH/dz = -p (log p + H)
        dz += terms.minus_h[rows] * p * (log_p + terms.entropy[rows])
    if softcap:
        if slope is None:
            slope = softcap_slope(log_p + terms.lse[rows], temperature, softcap)
        dz *= slope


def backward(
    g_logp, g_entropy, g_lse, hidden, weight, bias, target,
    logp, entropy, lse, peak, store, temperature, softcap, need,
):  # fmt: skip
    """-> d_hidden, d_weight, d_bias; empty where need says no."""
    need_hidden, need_weight, need_bias = need
    n, v = hidden.shape[0], weight.shape[0]
    dtype = wide(hidden.dtype)
    tile_rows, tile_cols = tile(hidden, weight)
    x = hidden.to(dtype)
    scratch = x.new_empty(tile_rows * tile_cols)
    is_kept = store.numel() > 0
    if is_kept:  # p = share E
        share = (peak - lse[:, None]).exp_()
        share = share / FP16_SCALE if store.dtype == torch.float16 else share
    else:  # E is computed again as p itself
        share = x.new_ones(1).expand(n, len(spans(v, tile_cols)))
    terms = row_terms(g_logp, g_entropy, g_lse, target, logp, entropy, lse, share, v, temperature)

    d_hidden = x.new_empty(x.shape if need_hidden else 0)
    d_weight = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    d_bias = weight.new_empty(v if need_bias else 0)
    in_place = not need_weight or d_weight.dtype == dtype
    for tile_index, (col0, col1) in enumerate(spans(v, tile_cols)):
        w = weight[col0:col1].to(dtype)
        tile_bias = None if bias is None else bias[col0:col1]
        dw = d_weight[col0:col1] if in_place else x.new_empty(w.shape)
        db = x.new_zeros(col1 - col0) if need_bias else None
        for row0, row1 in spans(n, tile_rows):
            dz = in_shape(scratch, row1 - row0, col1 - col0)
            slope = None
            if is_kept:
                e = store[row0:row1, col0:col1]
            else:
                logits_(dz, hidden[row0:row1], weight[col0:col1], tile_bias, temperature, softcap)
                if softcap:
                    slope = softcap_slope(dz, temperature, softcap)
                e = dz.sub_(lse[row0:row1, None]).exp_()
            rows = slice(row0, row1)
            logits_gradient(dz, e, slope, terms, rows, tile_index, col0, v, temperature, softcap)
            if need_weight:
                dw.addmm_(dz.T, x[row0:row1], beta=0 if row0 == 0 else 1)
            if need_hidden:
                d_hidden[row0:row1].addmm_(dz, w, beta=0 if col0 == 0 else 1)
            if need_bias:
                db += dz.sum(0)
        if not in_place:
            d_weight[col0:col1] = dw
        if need_bias:
            d_bias[col0:col1] = db
    return d_hidden.to(hidden.dtype), d_weight, d_bias
