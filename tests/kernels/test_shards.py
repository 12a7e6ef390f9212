"""A vocabulary in two shards, on two processes, against the fp64 reference of the whole."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.logp_reference import error, reference_with_lse

import kernels

SPLIT = 20  # of 75 classes: the first shard has 20, the second 55
CASES = {
    "fp64": (torch.float64, {}),
    "fp32": (torch.float32, {}),
    "fp32, recomputed": (torch.float32, {"budget": 0}),
    "temperature": (torch.float64, {"temperature": 0.7}),
    "softcap": (torch.float64, {"softcap": 3.0}),
}


def problem(dtype):
    """hidden, weight, target (one ignored, in a row of NaN), bias (one class banned)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=generator).to(dtype)
    weight = torch.randn(75, 8, generator=generator).to(dtype)
    bias = torch.randn(75, generator=generator).to(dtype)
    target = torch.randint(75, (12,), generator=generator)
    target[:4] = torch.tensor([0, SPLIT - 1, SPLIT, 74])
    target[5] = -100
    return hidden, weight, target, bias


def shard(rank, *tensors):
    """The rank's rows of each tensor, as leaves."""
    rows = slice(0, SPLIT) if rank == 0 else slice(SPLIT, 75)
    return [x[rows].clone().requires_grad_() for x in tensors]


def check_case(rank, dtype, options):
    hidden, weight, target, bias = problem(dtype)
    leaves = [x.double().clone().requires_grad_() for x in (hidden, weight, bias)]
    how = {name: x for name, x in options.items() if name != "budget"}
    exact, _, exact_lse = reference_with_lse(leaves[0], leaves[1], target, leaves[2], **how)
    g = torch.linspace(-1, 1, 12, dtype=torch.float64)
    expected = torch.autograd.grad((g * exact).sum() + (exact_lse**2).sum(), leaves)

    own_weight, own_bias = shard(rank, weight, bias)
    hidden[5] = torch.nan  # of the ignored row
    hidden.requires_grad_()
    logp, lse = kernels.sharded_logp(
        hidden, own_weight, target, rank * SPLIT, bias=own_bias, backend="torch", **options
    )
    loss = (g.to(dtype) * logp).sum() + (lse**2).sum()
    actual = torch.autograd.grad(loss, [hidden, own_weight, own_bias])
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert (logp - exact).abs().max() < tolerance and (lse - exact_lse).abs().max() < tolerance
    assert not logp[5] and not lse[5] and not actual[0][5].any()
    expected = [expected[0], *shard(rank, *expected[1:])]
    assert max(error(a, b) for a, b in zip(actual, expected, strict=True)) < tolerance


def check_strange_targets(rank):
    """One in no shard and one banned; the others stay as they are."""
    hidden, weight, target, bias = problem(torch.float64)
    bias[33] = -torch.inf
    target[7:9] = torch.tensor([75, 33])
    own_weight, own_bias = shard(rank, weight, bias)
    logp, lse = kernels.sharded_logp(hidden, own_weight, target, rank * SPLIT, bias=own_bias, backend="torch")
    target[7] = 0
    exact, _, exact_lse = reference_with_lse(hidden, weight, target, bias)
    assert logp[7].isnan() and logp[8].isneginf()
    others = torch.arange(12) != 7
    assert torch.allclose(logp[others], exact[others]) and torch.allclose(lse, exact_lse)
    loss = logp.masked_fill(logp.isnan() | logp.isinf(), 0.0).sum()
    assert all(d.isfinite().all() for d in torch.autograd.grad(loss, [own_weight, own_bias]))


def work(rank, address):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for dtype, options in CASES.values():
        check_case(rank, dtype, options)
    check_strange_targets(rank)
    with pytest.raises(ValueError, match="^target must be"):
        kernels.sharded_logp(*problem(torch.float32)[:2], torch.zeros(12), 0)
    dist.destroy_process_group()


def test_two_shards(tmp_path):
    mp.spawn(work, args=(f"file://{tmp_path}/meeting",), nprocs=2)
