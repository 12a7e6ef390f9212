"""The torch backend: any device, chunked over rows. One chunk of logits lives at a time.

If all rows fit into one chunk, their log-probs are kept for the backward pass and nothing is computed twice; otherwise each
chunk's logits are computed again there.
"""

import torch
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 << 20  # of fp32 logits


def logits_of(hidden, weight, bias, temperature, softcap):
    """(n, D), (V, D) -> z (n, V) in fp32 or fp64: fp32 from the accumulator on, since bf16 logits cost 1e-2 nats a token."""
    if hidden.dtype in (torch.float32, torch.float64):
        z = hidden @ weight.T
    elif hidden.is_cuda:
        z = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        z = hidden.float() @ weight.float().T
    if bias is not None:
        z += bias
    if softcap is not None:
        z = z.div_(softcap).tanh_().mul_(softcap)
    return z.div_(temperature) if temperature != 1.0 else z


class LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, temperature, softcap, with_entropy):
        n, v = hidden.shape[0], weight.shape[0]
        rows = max(1, CHUNK_BYTES // (4 * v))
        keep = target != -100
        index = target.where(keep, 0).long().unsqueeze(1)  # (N, 1)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logp, entropy = (torch.zeros(n, dtype=wide, device=hidden.device) for _ in range(2))
        kept = None
        for a in range(0, n, rows):
            all_logp = logits_of(hidden[a : a + rows], weight, bias, temperature, softcap).log_softmax(1)  # (rows, V)
            logp[a : a + rows] = all_logp.gather(1, index[a : a + rows]).squeeze(1)
            if with_entropy:
                entropy[a : a + rows] = -(all_logp.exp() * all_logp).sum(1)
            kept = all_logp if rows >= n else None
        ctx.save_for_backward(hidden, weight, bias, index, keep, kept, entropy if with_entropy else None)
        ctx.temperature, ctx.softcap, ctx.rows = temperature, softcap, rows
        return logp.masked_fill_(~keep, 0.0), entropy.masked_fill(~keep, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy):
        """dz = g (1[target] - p) / temperature, and -h p (log p + H) / temperature for an entropy's gradient h."""
        hidden, weight, bias, index, keep, kept, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        n, wide = hidden.shape[0], g_logp.dtype
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        d_bias = torch.zeros_like(weight[:, 0], dtype=wide) if need_bias else None
        w = weight.to(wide) if need_hidden else None
        g_logp = (g_logp * keep)[:, None] / ctx.temperature
        g_entropy = (g_entropy * keep)[:, None] / ctx.temperature
        for a in range(0, n, ctx.rows):
            rows = slice(a, a + ctx.rows)
            all_logp = kept
            if kept is None:
                all_logp = logits_of(hidden[rows], weight, bias, ctx.temperature, ctx.softcap).log_softmax(1)
            dz = all_logp.exp()
            if entropy is None:
                dz *= -g_logp[rows]
            else:
                dz *= -g_logp[rows] - g_entropy[rows] * (all_logp + entropy[rows, None])
            own = all_logp.gather(1, index[rows])  # 1 - p of the target is -expm1(logp): no cancellation where p is near 1
            true_class = -torch.expm1(own) * g_logp[rows]
            if entropy is not None:
                true_class -= g_entropy[rows] * own.exp() * (own + entropy[rows, None])
            dz.scatter_(1, index[rows], true_class)
            if ctx.softcap is not None:  # d/dx softcap tanh(x / softcap) = 1 - (z / softcap)^2
                z = logits_of(hidden[rows], weight, bias, 1.0, ctx.softcap)
                dz *= 1 - (z / ctx.softcap) ** 2
            if need_hidden:
                d_hidden[rows] = dz @ w
            if need_weight:
                d_weight.addmm_(dz.T, hidden[rows].to(wide))
            if need_bias:
                d_bias += dz.sum(0)
        d_weight, d_bias = (None if d is None else d.to(weight.dtype) for d in (d_weight, d_bias))
        return d_hidden, d_weight, d_bias, None, None, None, None


def linear_logp(hidden, weight, target, bias, temperature, softcap, with_entropy):
    logp, entropy = LinearLogp.apply(hidden, weight, bias, target, temperature, softcap, with_entropy)
    return (logp, entropy) if with_entropy else logp
