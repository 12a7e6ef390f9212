"""A head whose vocabulary lies in shards, one on each rank (tensor parallelism).

Each rank has some rows of the weight, and all of hidden and target. It finds the log-sum-exp and the
target's logit within its own classes, as linear_logp gives them. The ranks exchange three numbers per
token, and in the backward d hidden:

    lse = log sum over ranks of exp(the rank's lse),    logp = the target's logit - lse
"""

import torch
import torch.distributed as dist

from kernels.api import IGNORE, check_target, linear_logp


class _SumOfGradients(torch.autograd.Function):
    """The identity. Its gradient is the sum of the ranks' gradients, each of which is its shard's part."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, g):
        total = g.to(torch.promote_types(g.dtype, torch.float32), copy=True)
        dist.all_reduce(total, group=ctx.group)
        return total.to(g.dtype), None


def sharded_logp(hidden, weight, target, first_class, *, bias=None, group=None, **options):
    """linear_logp and its log-sum-exp, of a vocabulary in shards -> logp, lse, (N,) each.

    weight (V', D) and bias (V',): the rank's classes, first_class .. first_class + V' - 1 of the whole.
    Shards may differ in size; each has a class that is not banned. hidden (N, D), target (N,), in
    classes of the whole, and the loss made of the results are the same on every rank, as the results
    are. A target of -100 gives 0 and no gradient, another one that no shard has gives NaN. options:
    temperature, softcap, backend and budget, as in linear_logp.
    The gradients of weight and bias are the shard's own; every rank gets the whole d hidden."""
    check_target(target, hidden, "hidden")
    target = target.long()
    is_ignored = target == IGNORE
    is_mine = (target >= first_class) & (target < first_class + weight.shape[0])
    own_class = torch.where(is_mine, target - first_class, 0)  # of a target elsewhere: any class
    own_class = own_class.masked_fill(is_ignored, IGNORE)
    hidden = _SumOfGradients.apply(hidden, group)
    own_logp, own_lse = linear_logp(hidden, weight, own_class, bias=bias, return_lse=True, **options)
    own_logit = torch.where(is_mine, own_logp + own_lse, 0.0)

    lses = [torch.empty_like(own_lse) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lses, own_lse.detach(), group=group)
    lses[dist.get_rank(group)] = own_lse  # through which this rank's gradients go
    lse = torch.stack(lses).logsumexp(0)

    exchanged = torch.stack([own_logit.detach(), is_mine.to(own_logit.dtype)])
    dist.all_reduce(exchanged, group=group)
    logit, shards = exchanged  # (N,) each: the target's logit, and how many shards have it
    logit = logit.masked_fill(shards != 1, float("nan"))
    logp = torch.where(is_mine, own_logit, logit) - lse
    return logp.masked_fill(is_ignored, 0.0), lse.masked_fill(is_ignored, 0.0)
