"""Log-probs, entropies and log-sum-exps in fp64, written from the definitions, and errors against them."""

import torch


def logits(hidden, weight, bias=None, temperature=1.0, softcap=None):
    """(N, V), in fp64."""
    z = hidden.double() if weight is None else hidden.double() @ weight.double().T
    if bias is not None:
        z = z + bias.double()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def reference(*inputs, **options):
    """-> log p[target] and the entropy of p, (N,) each; see reference_with_lse."""
    logp, entropy, _ = reference_with_lse(*inputs, **options)
    return logp, entropy


def reference_with_lse(hidden, weight, target, bias=None, temperature=1.0, softcap=None):
    """-> log p[target], the entropy of p and log sum exp of the logits, (N,) each; 0 where the target
    is -100.

    weight None: hidden holds the logits."""
    z = logits(hidden, weight, bias, temperature, softcap)
    log_p = torch.log_softmax(z, 1)
    is_live = target != -100
    logp = log_p.gather(1, target.long().clamp_min(0)[:, None])[:, 0]
    entropy = -(log_p.exp() * log_p.clamp_min(-1e30)).sum(1)
    results = logp, entropy, z.logsumexp(1)
    return tuple(torch.where(is_live, result, 0.0) for result in results)


def bound(hidden, weight, bias=None, temperature=1.0):
    """How far a log-prob in fp32 may be from the exact one, in nats.

    fp32 rounds to 2^-24 of a number. A sum of D products is rounded D times, in both directions, at
    partial sums of the size of the logit: sqrt(D) x 2^-24 x the largest logit. Then bias, temperature,
    softcap and the subtraction of the peak round a number of that size once each. The exponentials,
    their sum and its logarithm are off by 1e-6, however large the logits are."""
    largest = logits(hidden, weight, bias, min(temperature, 1.0)).abs().max()
    roundings = hidden.shape[1] ** 0.5 + 4
    return 1e-6 + 2**-24 * roundings * float(largest.detach())


def tensor_core_bound(hidden, weight, bias=None, temperature=1.0, softcap=None):
    """How far a log-prob of products on NVIDIA's tensor cores may be from the exact one, in nats.

    For each 16 of the D products they add these and the accumulator, and cut off what fp32 has no
    place for (Khattak and Mikaitis 2025, arXiv 2512.07004), where other hardware rounds to nearest.
    So the errors of the D / 16 steps do not cancel: half of 2^-23 each, of a partial sum that grows
    to z. fp32 is multiplied in blocks of 32 that are added in round to nearest."""
    bound = 2e-5
    if hidden.dtype != torch.float32:
        largest = logits(hidden, weight, bias, min(temperature, 1.0)).abs().max()
        bound += 2e-9 * hidden.shape[1] * float(largest.detach())
    return bound


def error(actual, expected):
    """Relative to the norm."""
    difference = (actual.double() - expected.double()).norm()
    return float((difference / expected.double().norm().clamp_min(1e-30)).detach())


def gradients(outputs, leaves, g, retain_graph=False):
    """Of sum_i g_i outputs_i."""
    total = sum((output * weight).sum() for output, weight in zip(outputs, g, strict=True))
    return torch.autograd.grad(total, leaves, retain_graph=retain_graph)


def gradient_error(outputs, expected, leaves, g, expected_leaves=None):
    """The largest error of the gradients of sum_i g_i outputs_i."""
    actual = gradients(outputs, leaves, g)
    exact = gradients(expected, expected_leaves or leaves, g)
    return max(error(a, b) for a, b in zip(actual, exact, strict=True))
