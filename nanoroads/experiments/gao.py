"""Gao et al., 2210.10760, for overoptimisation.py and best_of_n.py of experiments/: best of n without noise,
its KL, and their forms.

Gold is the true reward, the proxy a reward model's score, and d = sqrt KL(policy || SFT), KL in nats."""

import math

import torch

from nanoroads.report.evidence import values_of


def best_of_n(proxy, value, n):
    """The mean value of the sample that the proxy likes best, over all choices of n of the N samples.

    proxy, value (P, N). Of the C(N, n) choices a sample is the best in those C(i, n - 1) whose other
    n - 1 samples are among the i that the proxy likes less."""
    total = proxy.shape[1]
    counts = [math.comb(i, n - 1) for i in range(total)]
    weights = torch.tensor(counts, dtype=value.dtype)  # (N,)
    from_below = value.gather(1, proxy.argsort(1))  # (P, N): the proxy's favourite last
    return (from_below @ weights / math.comb(total, n)).mean().item()


def kl_of_best_of(n):
    """An upper bound of KL(best of n || SFT), in nats: a response that is drawn twice makes it less."""
    return math.log(n) - (n - 1) / n


def terms(d, form):
    """d (points,) -> (points, 2): d and -d x, of which a and b are the weights."""
    x = d
    if form == "ln d":
        x = d.log()
    return torch.stack([d, -d * x], 1)


def fit(rows, name, form):
    """Least squares over a road's settings -> {"a", "b", "r2"}. name: "gold" or "proxy"."""
    d = torch.tensor(values_of(rows, "kl"), dtype=torch.float64).sqrt()
    height = torch.tensor(values_of(rows, name), dtype=torch.float64)
    weights = torch.linalg.lstsq(terms(d, form), height[:, None]).solution  # (2, 1)
    error = height - (terms(d, form) @ weights).squeeze(1)
    r2 = 1 - error.square().sum() / (height - height.mean()).square().sum()
    return {"a": weights[0].item(), "b": weights[1].item(), "r2": r2.item()}
