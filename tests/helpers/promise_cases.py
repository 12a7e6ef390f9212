"""What both backends promise beyond log-probs and entropies: the log-sum-exp, equal bits with and
without gradients, and what torch.compile is told of the operations.

Run by test_triton.py with TRITON_INTERPRET=1, as triton_cases.py is, whose fixtures it shares."""

import pytest
import torch

import kernels
from helpers.logp_reference import error, gradient_error, gradients, reference_with_lse
from helpers.triton_cases import MODES, OPTIONS, poison, problem

__all__ = ["poison"]  # a fixture of every test
BACKENDS = ["torch", "triton"]
SLOW_TRITON = pytest.param("triton", marks=pytest.mark.slow)


def inputs(options):
    """One of OPTIONS -> hidden, weight, target, bias or None, and the options that are left."""
    options = dict(options)
    return *problem(bias=options.pop("bias", True)), options


# ---------------------------------------------------------------- the log-sum-exp


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIONS)
def test_lse(name, mode, backend):
    """Its value, and its gradient together with those of log-prob and entropy."""
    hidden, weight, target, bias, options = inputs(OPTIONS[name])
    results = kernels.linear_logp(
        hidden, weight, target, bias=bias, return_entropy=True, return_lse=True,
        backend=backend, budget=MODES[mode], **options,
    )  # fmt: skip
    expected = reference_with_lse(hidden, weight, target, bias, **options)
    for actual, exact in zip(results, expected, strict=True):
        assert actual.dtype == torch.float32 and (actual - exact).abs().max() < 2e-5
    assert not results[2][target == -100].any()
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(len(target), generator=generator) for _ in results]
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    assert gradient_error(results, expected, leaves, upstream) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_z_loss(mode, backend):
    """The gradient of the log-sum-exp alone: p times its upstream gradient, the target's as any."""
    hidden, weight, target, bias = problem()
    options = {"bias": bias, "backend": backend, "budget": MODES[mode]}
    logp, lse = kernels.linear_logp(hidden, weight, target, return_lse=True, **options)
    assert torch.equal(logp, kernels.linear_logp(hidden, weight, target, **options))
    _, _, exact = reference_with_lse(hidden, weight, target, bias)
    leaves = [hidden, weight, bias]
    assert gradient_error([lse**2], [exact**2], leaves, [1.0]) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_target_s_own_logit(backend):
    """logp + lse is the target's logit, whatever the other classes are: their p cancels."""
    hidden, weight, target, _ = problem(bias=False)
    logp, lse = kernels.linear_logp(hidden, weight, target, return_lse=True, backend=backend)
    own = torch.where(target != -100, (hidden * weight[target.clamp_min(0)]).sum(1), 0.0)
    assert gradient_error([logp + lse], [own], [hidden, weight], [1.0]) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_logp_hands_over_all(backend):
    hidden, weight, target, _ = problem(bias=False)
    cu_seqlens = torch.tensor([0, 7, 19])
    options = {"return_entropy": True, "return_lse": True, "backend": backend}
    sums, *results = kernels.sequence_logp(hidden, weight, target, cu_seqlens, **options)
    expected = kernels.linear_logp(hidden, weight, target, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert torch.allclose(sums, torch.stack([results[0][:7].sum(), results[0][7:].sum()]))


# ---------------------------------------------------------------- a frozen head


def frozen_problem(name, gap=0.0):
    """As inputs, but weight and bias take no gradients. gap: how much less likely than another class
    the target is in every third row, in nats; and as much less likely than classes 50 to 74."""
    hidden, weight, target, bias, options = inputs(OPTIONS[name])
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if gap:
        low = torch.arange(0, 19, 3)
        with torch.no_grad():
            hidden[:, 0] = 0.0
            hidden[low, 0] = gap
        weight[:50, 0], weight[50:, 0] = 0.0, 1.0
        weight[target[low].clamp_min(0), 0] = -1.0
    return hidden, weight, target, bias, options


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [0.0, 40.0, 45.0, 100.0, 1e4])
@pytest.mark.parametrize("name", ["plain", "bias", "temperature"])
def test_frozen_head(name, gap, backend):
    """Bits of the forward and gradients are those of a head that is not frozen."""
    hidden, weight, target, bias, options = frozen_problem(name, gap)
    options |= {"bias": bias, "return_lse": True, "backend": backend}
    results = kernels.linear_logp(hidden, weight, target, **options)
    assert "Frozen" in results[0].grad_fn.name()
    others = kernels.linear_logp(hidden, weight.clone().requires_grad_(), target, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))
    logp, _, lse = reference_with_lse(hidden, weight, target, bias, options.get("temperature", 1.0))
    is_unlikely = logp < -0.9 * gap
    assert not gap or is_unlikely.sum() >= 5
    generator = torch.Generator().manual_seed(1)
    g, of_lse = (torch.randn(19, generator=generator) for _ in range(2))
    tolerance = 2e-6 + 1e-7 * gap  # z is rounded to 2^-24 of its size, and p with it
    for upstream in ((g, of_lse), (g * is_unlikely, 0 * of_lse)):
        expected = gradients((logp, lse), [hidden], upstream, retain_graph=True)
        actual = gradients(results, [hidden], upstream, retain_graph=True)
        assert error(actual[0], expected[0]) < tolerance
        assert not actual[0][target == -100].any()


# ---------------------------------------------------------------- equal bits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_grad_is_grad(name, backend):
    """Sampling and training give the same bits, so the first ratio of the two is exactly 1."""
    hidden, weight, target, bias, options = inputs(OPTIONS[name])
    options |= {"bias": bias, "backend": backend}
    more = {"return_entropy": True, "return_lse": True}
    with torch.no_grad():
        expected = kernels.linear_logp(hidden, weight, target, **more, **options)
        assert torch.equal(kernels.linear_logp(hidden, weight, target, **options), expected[0])
    for budget in MODES.values():
        actual = kernels.linear_logp(hidden, weight, target, budget=budget, **more, **options)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        alone = kernels.linear_logp(hidden, weight, target, budget=budget, **options)
        assert torch.equal(alone, expected[0])


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("backend", ["torch", SLOW_TRITON])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_size_that_is_not_known_before_the_run(backend):
    """hidden[mask] in one graph: two different masks, and one that leaves nothing."""
    hidden, weight, target, bias = problem()

    def loss(hidden, weight, bias, mask, cu_seqlens):
        rows, targets = (hidden * 2)[mask], target[mask]
        results = kernels.sequence_logp(
            rows, weight, targets, cu_seqlens, bias=bias,
            return_entropy=True, return_lse=True, backend=backend,
        )  # fmt: skip
        from_logits = kernels.logp_from_logits(rows @ weight.T, targets, backend=backend)
        lengths = kernels.segment_sum((rows * rows).sum(1), cu_seqlens, backend=backend)
        return sum((x * x).sum() for x in (*results, from_logits, lengths))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for kept_of_five in (3, 2, 0):
        mask = torch.arange(19) % 5 < kept_of_five
        count = int(mask.sum())
        cu_seqlens = torch.tensor([0, count // 2, count])
        arguments = hidden, weight, bias, mask, cu_seqlens
        actual, expected = (torch.autograd.grad(f(*arguments), arguments[:3]) for f in (compiled, loss))
        assert all(error(a, b) < 1e-6 for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", ["torch", SLOW_TRITON])
@pytest.mark.parametrize("name", ["linear_logp", "linear_logp_backward", "the rest"])
def test_what_torch_compile_is_told(name, backend):
    """Which arguments an operation writes to, its shapes, its gradient: as PyTorch checks them."""
    hidden, weight, target, bias = problem()
    leaves = hidden, weight, bias
    fixed = [leaf.detach() for leaf in leaves]
    budgets = [-1, 0]
    if backend == "torch":  # Triton does not write the padding of what it keeps
        budgets.append(1 << 30)
    if name == "linear_logp":
        for budget in budgets:
            check_op(name, *leaves, target, 1.3, 0.0, True, budget, backend)
    if name == "linear_logp_backward":
        for budget in budgets:
            results = torch.ops.nanoroads.linear_logp(*fixed, target, 1.3, 0.0, True, budget, backend)
            upstream = torch.ones(19), None, torch.ones(19)
            check_op(name, *upstream, *fixed, target, *results, 1.3, 0.0, [True, True, False], backend)
    if name == "the rest":
        check_op("frozen_linear_logp", hidden, *fixed[1:], target, 1.3, backend)
        check_op("segment_sum", hidden[:, 0], torch.tensor([0, 7, 19]), backend)
        target = target.clamp(max=19)
        check_op("logp_from_logits", hidden, target, backend)
        logp, lse = torch.ops.nanoroads.logp_from_logits(fixed[0], target, backend)
        check_op("logp_from_logits_backward", torch.ones(19), fixed[0], target, logp, lse, backend)


def check_op(name, *arguments):
    torch.library.opcheck(getattr(torch.ops.nanoroads, name).default, arguments)
