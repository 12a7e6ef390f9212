"""Optimizer steps: which examples, at what learning rate, and the update itself.

Nothing here keeps state between steps. Data order and learning rate are functions of (seed, step), so a
resumed run needs only the step, the weights and the optimizer's moments to end with the same bits."""

import functools
import math

import torch

from nanoroads import randomness
from nanoroads.run import distributed, torchrun
from nanoroads.weights.sharded import gathered, is_sharded

BUCKET = 2**25  # gradients that are added up in one message: 128 MiB in fp32


def total_steps(examples, batch_size, epochs, steps=None, updates=1):
    """Optimizer steps in all: `steps` where it is given, else `epochs` passes over the examples, with
    `updates` steps on each batch."""
    return steps or updates * max(1, round(epochs * math.ceil(examples / batch_size)))


@functools.lru_cache(maxsize=4)
def epoch_order(examples, epoch, seed):
    """A shuffle of range(examples), as a tuple. It is the same one for all stages, which Theorem 2.2 needs:
    DPO and a local reward model see the same pairs in the same order."""
    return tuple(randomness.generator("data order", seed, epoch).permutation(examples).tolist())


def batch_indices(examples, batch_size, step, seed):
    """Which examples step `step` trains on, as a list.

    Each epoch is a fresh shuffle; its last batch may be smaller."""
    per_epoch = math.ceil(examples / batch_size)
    epoch, i = divmod(step, per_epoch)
    return list(epoch_order(examples, epoch, seed)[i * batch_size : (i + 1) * batch_size])


def chunks(items, size):
    """items in runs of `size` (None: one run)."""
    size = size or max(1, len(items))
    return [items[i : i + size] for i in range(0, len(items), size)]


def rank_chunks(indices, size, model, takes_mean=False):
    """The chunks of this rank's share of a step's indices: all of them, without torchrun.

    model: whose passes they are. takes_mean: see `distributed.matched`."""
    return distributed.matched(chunks(distributed.share(indices), size), model, takes_mean)


def adamw(model, lr, weight_decay):
    """AdamW with no weight decay on vectors (norms, biases). What is frozen is left out."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim > 1]
    vectors = [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def learning_rate(peak, step, steps, warmup, schedule):
    """A linear warm-up times 1 ("constant") or half a cosine from step 0 to the last ("cosine").

    So the cosine's maximum is a little below `peak`: 0.997 of it with 10 of 300 steps of warm-up.
    step counts from 0."""
    warm = min(1.0, (step + 1) / (warmup + 1))
    if schedule == "constant":
        return peak * warm
    return peak * warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def sum_gradients(model):
    """Add up the gradients of all ranks; of a sharded model FSDP has done so.

    DDP would send the last layers' gradients while the backward pass is still in the first ones. To wait
    for its end is simpler, and ranks may make unequally many passes in a step."""
    if torchrun.ranks() == 1 or is_sharded(model.norm.weight):
        return
    buckets, numbers = [[]], 0
    for parameter in [p for p in model.parameters() if p.requires_grad]:
        if parameter.grad is None:  # this rank had no group
            parameter.grad = torch.zeros_like(parameter)
        numbers += parameter.numel()
        if numbers > BUCKET and buckets[-1]:
            buckets.append([])
            numbers = parameter.numel()
        buckets[-1].append(parameter.grad)
    for gradients in buckets:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


def update(model, optimizer, lr, clip):
    """Add up the gradients of all ranks, clip, step, forget the gradients.

    Returns the gradient norm before clipping, as a tensor: no GPU synchronisation."""
    sum_gradients(model)
    norm = gathered(torch.nn.utils.clip_grad_norm_(model.parameters(), clip))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


class Mean:
    """Means of metrics over an optimizer step, however it was cut into chunks and shared among ranks; of
    some, the largest value.

    All stays on the device: no GPU synchronisation."""

    def __init__(self):
        self.sums = {}
        self.counts = {}
        self.largest = {}

    def add(self, **tensors: torch.Tensor):
        """add(loss=..., reward=...): tensors of any shape; each of their values counts once."""
        for name, tensor in tensors.items():
            self.sums[name] = self.sums.get(name, 0.0) + tensor.detach().sum()
            self.counts[name] = self.counts.get(name, 0) + tensor.numel()

    def add_largest(self, **tensors: torch.Tensor):
        """add_largest(gap=...): tensors of any shape, of whose values the largest is kept."""
        for name, tensor in tensors.items():
            largest = tensor.detach().max()
            self.largest[name] = torch.maximum(self.largest.get(name, largest), largest)

    def means(self) -> dict[str, torch.Tensor]:
        """{name: the mean of all values that were added under it, or the largest}. Every rank has to ask."""
        means = distributed.all_means(self.sums, self.counts)
        return {**means, **distributed.all_ranks(self.largest, "largest")}
