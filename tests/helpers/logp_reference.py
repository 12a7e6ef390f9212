"""Log-probs and entropies in fp64, written from the definitions, and the error against them."""

import torch


def reference(hidden, weight, target, bias=None, temperature=1.0, softcap=None):
    """-> log p[target] and the entropy of p, (N,) each; 0 where the target is -100.

    weight None: hidden holds the logits."""
    z = hidden.double() if weight is None else hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = torch.log_softmax(z / temperature, 1)
    is_live = target != -100
    logp = log_p.gather(1, target.long().clamp_min(0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.clamp_min(-1e30)).sum(1)
    return torch.where(is_live, logp, 0.0), torch.where(is_live, entropy, 0.0)


def error(actual, expected):
    """Relative to the norm."""
    difference = (actual.double() - expected.double()).norm()
    return float((difference / expected.double().norm().clamp_min(1e-30)).detach())


def gradients(outputs, leaves, g):
    """Of sum_i g_i outputs_i."""
    total = sum((output * weight).sum() for output, weight in zip(outputs, g, strict=True))
    return torch.autograd.grad(total, leaves)


def gradient_error(outputs, expected, leaves, g, expected_leaves=None):
    """The largest error of the gradients of sum_i g_i outputs_i."""
    actual = gradients(outputs, leaves, g)
    exact = gradients(expected, expected_leaves or leaves, g)
    return max(error(a, b) for a, b in zip(actual, exact, strict=True))
