"""One run on several processes: torchrun --nproc-per-node 8 train_dpo.py ...

Each process, a rank, takes its share of a step's groups (a prompt and its responses). It divides its loss by
the size of the whole step, and gradients are added up over the ranks: all of them make the update that one
process would make. Without torchrun there is one rank, which has all items, and nothing is sent."""

import math

import torch
from torch import distributed as dist

from nanoroads.batch import pack
from nanoroads.run.torchrun import rank, rank_0_says, ranks
from nanoroads.weights.sharded import is_sharded

# {what is wanted of the ranks' numbers: (operation, number of a rank that has none)}
OPERATIONS = {"sum": (dist.ReduceOp.SUM, 0.0), "largest": (dist.ReduceOp.MAX, -math.inf)}


def share(items):
    """The items of this rank, a list. Rank 0 always has some; of few items others may have none."""
    return items[rank() :: ranks()]


def matched(items, model, takes_mean=False):
    """Yields the items of this rank. Where another rank has more, passes follow whose loss is 0.

    All ranks must make equally many if the model is sharded, or if the loss calls batch_means
    (takes_mean)."""
    missing = 0
    sharded = is_sharded(model.norm.weight)
    if ranks() > 1 and (takes_mean or sharded):
        most = torch.tensor(len(items))
        dist.all_reduce(most, dist.ReduceOp.MAX)
        missing = int(most) - len(items)
    yield from items
    for _ in range(missing):
        if sharded:
            output = model(pack([[0]], [[[0]]], model.norm.weight.device))[0]  # log-probs, or a reward
        if takes_mean:
            batch_means()  # adds nothing to what the others have
        if sharded and torch.is_grad_enabled():
            (0.0 * output.sum()).backward()


def all_ranks(numbers, wanted="sum"):
    """{name: number or tensor ()} of this rank -> the sums over all ranks, or wanted="largest" the largest.
    The names are rank 0's, since a rank without a group has none. No GPU synchronisation."""
    if ranks() == 1:
        return numbers
    devices = [number.device.type for number in numbers.values() if isinstance(number, torch.Tensor)]
    names, devices = rank_0_says([list(numbers), devices])
    if not names:
        return {}
    device = devices[0] if devices else "cpu"
    operation, missing = OPERATIONS[wanted]
    zero = torch.zeros((), dtype=torch.float64, device=device)
    values = torch.stack([zero + numbers.get(name, missing) for name in names])
    dist.all_reduce(values, operation)
    return dict(zip(names, values, strict=True))


def all_means(sums, counts):
    """{name: sum} of what this rank has, and {name: of how many} -> {name: mean over all ranks}."""
    totals = all_ranks({**sums, **{f"count of {name}": count for name, count in counts.items()}})
    means = {}
    for name in totals:
        if f"count of {name}" in totals:
            means[name] = totals[name] / totals[f"count of {name}"]
    return means


def batch_means(**tensors):
    """batch_means(baseline=x) of x (S,) -> {"baseline": the mean over the S of all ranks, ()}.

    For losses that take a mean over the batch. {} where this process has the whole batch."""
    if ranks() == 1:
        return {}
    sums = {name: x.detach().double().sum() for name, x in tensors.items()}
    means = all_means(sums, {name: x.numel() for name, x in tensors.items()})
    return {name: means[name].to(x.dtype) for name, x in tensors.items()}


def in_parts(count, compute):
    """compute(indices) -> a row on the CPU for each. Each rank computes a part -> rows (count, ...).

    Parts have one size, so that a sharded model makes equally many passes: the last row may be computed
    several times."""
    size = math.ceil(count / ranks())
    rows = compute([min(rank() * size + i, count - 1) for i in range(size)])
    if ranks() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)[:count]
