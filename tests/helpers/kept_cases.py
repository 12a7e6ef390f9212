"""What the Triton forward keeps for its backward, in Triton's interpreter: see triton_cases.py."""

import pytest
import torch

import kernels
from helpers.logp_reference import error, gradient_error, reference, reference_with_lse
from helpers.triton_cases import MODES, poison, problem  # noqa: F401  (poison is a fixture)
from kernels import ops, triton_forward


def test_kept_true_class_without_cancellation():
    """What is kept of it is p - 1 of the same log-prob, to fp32's precision, however near 1 p is."""
    gap = torch.arange(1.0, 17.0)  # logp is about -exp(-gap)
    weight, target = torch.tensor([[1.0], [0.0]]), torch.zeros(16, dtype=torch.long)
    logp, _, _, share, store = triton_forward.forward(
        gap[:, None], weight, None, target, 1.0, 0.0, False, MODES["kept"]
    )
    kept, expected = share * store[:, 0], torch.expm1(logp.double())
    assert logp[-1] > -2e-7 and ((kept - expected) / expected).abs().max() < 1e-6


@pytest.mark.parametrize("gap", [40.0, 45.0, 89.0, 1e4, 1e8])
def test_kept_rows_out_of_range(gap):
    """A target 2^64 times less likely than another class, in some rows and half tiles: its row is
    kept relative to the log-sum-exp."""
    hidden, weight, target, bias = problem(n=40, d=33, v=130)
    low = torch.arange(0, 40, 3)
    with torch.no_grad():
        hidden *= 0.1
        hidden[:, 0] = 0.0
        hidden[low, 0] = gap
        weight[:, 0] = 0.0
        weight[target[low].clamp_min(0), 0] = -1.0
    logp = kernels.linear_logp(hidden, weight, target, bias=bias, backend="triton", budget=MODES["kept"])
    expected, _ = reference(hidden, weight, target, bias)
    assert (logp - expected).abs().max() < 2e-5 + 1e-6 * gap
    is_unlikely = expected < -0.9 * gap
    assert is_unlikely.sum() > 10
    g = torch.randn(40)
    assert gradient_error([logp], [expected], [hidden, weight, bias], [g]) < 1e-5
    only = g * is_unlikely
    logp = kernels.linear_logp(hidden, weight, target, bias=bias, backend="triton", budget=MODES["kept"])
    expected, _ = reference(hidden, weight, target, bias)
    assert gradient_error([logp], [expected], [hidden, weight, bias], [only]) < 1e-5


@pytest.mark.parametrize("temperature", [1e-20, 1e-6, 0.5, 1e30])
@pytest.mark.parametrize("banned", ["none", "some", "half tiles and a target", "none, likely targets"])
def test_kept_is_recomputed(banned, temperature):
    """Whether e is kept changes no bit of a log-prob, and no gradient but for its rounding."""
    hidden, weight, target, bias = problem(n=23, v=130)
    with torch.no_grad():
        if banned == "some":
            bias[::2] = -float("inf")
            target[target >= 0] |= 1
        if banned == "none, likely targets":
            target = (hidden @ weight.T + bias).argmax(1)
        if banned == "half tiles and a target":
            bias[:40], bias[target[3]] = -float("inf"), -float("inf")
    options = {"bias": bias, "temperature": temperature, "backend": "triton"}
    leaves, g = [hidden, weight, bias], torch.randn(23)
    logp, again = (kernels.linear_logp(hidden, weight, target, budget=x, **options) for x in MODES.values())
    with torch.no_grad():
        assert torch.equal(logp, again)
        assert torch.equal(logp, kernels.linear_logp(hidden, weight, target, **options))
    kept, expected = (torch.autograd.grad(x, leaves, g) for x in (logp, again))
    for a, b in zip(kept, expected, strict=True):
        assert a.isfinite().all()
        if temperature > 1e-3:  # else no digit of a logit is left for a p between 0 and 1
            assert error(a, b) < 2e-6


@pytest.mark.parametrize("output", [1, 2])
def test_what_is_kept_does_not_serve_entropy_and_lse(output):
    """If they have a gradient all the same, the probabilities are computed again."""
    hidden, weight, target, bias = problem()
    results = ops.linear_op(hidden, weight, bias, target, 1.0, 0.0, True, MODES["kept"], "triton")
    assert results[4].numel()
    expected = reference_with_lse(hidden, weight, target, bias)[output]
    upstream = (target != -100).float()
    assert gradient_error([results[output]], [expected], [hidden, weight, bias], [upstream]) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("compiled", [False, True])
def test_backward_again(compiled, backend):
    """retain_graph: the second pass gives the same bits, because a backward writes to nothing saved."""
    hidden, weight, target, _ = problem()

    def function(h, w):
        return kernels.linear_logp(h * 1, w, target, backend=backend).sum()

    loss = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(
        hidden, weight
    )
    first, *rest = (torch.autograd.grad(loss, [hidden, weight], retain_graph=True) for _ in range(3))
    assert all(torch.equal(a, b) for again in rest for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_the_backward_mutates_nothing(backend, budget):
    """As its schema says to the compiler and to CUDA graphs."""
    hidden, weight, target, bias = (x.detach() for x in problem())
    inputs = hidden, weight, bias, target
    output = torch.ops.nanoroads.linear_logp(*inputs, 1.0, 0.0, False, budget, backend)
    g = torch.ones_like(output[0])
    args = (g, None, None, *inputs, *output, 1.0, 0.0, [True, True, True], backend)
    torch.library.opcheck(torch.ops.nanoroads.linear_logp_backward, args, test_utils="test_schema")
