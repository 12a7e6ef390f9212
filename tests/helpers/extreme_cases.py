"""Extreme inputs of both backends, against fp64 references written from the definitions.

Run by test_triton.py with TRITON_INTERPRET=1, as triton_cases.py is, whose fixtures it shares."""

import pytest
import torch
from torch.nn.functional import linear

import kernels
from helpers.logp_reference import error, reference
from helpers.triton_cases import MODES, poison, problem

__all__ = ["poison"]  # a fixture of every test
BACKENDS = ["torch", "triton"]
NAN, INF = float("nan"), float("inf")


def slow(*values):
    """Cases of the slow half."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# ---------------------------------------------------------------- softcap

CAPS = [1e-3, 2.0, 200.0, 1e4, 1e30, *slow(1e-2, 0.1, 1.0, 30.0, 1e7, 1e15)]
SCALES = [1e-6, 1e-3, 0.1, 1.0, 10.0, 300.0]  # of the logits of a row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", CAPS)
def test_softcap(softcap, backend):
    """The error of a log-prob is at most 1e-6 of the row's largest capped logit, plus the 1e-6 of any
    logarithm; that of d logits is at most ten times that, of an upstream gradient of 1."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor(SCALES)  # (6,)
    hidden = scales.diag()  # (6, 6), so that a product has one term and needs no rounding of a sum
    weight = torch.randn(75, 6, generator=generator).requires_grad_()
    target = torch.arange(6) + 11
    expected = reference(hidden, weight, target, softcap=softcap)
    # d weight is d logits (75, 6) times the scales.
    d_logits = torch.autograd.grad(expected[0].sum() + expected[1].sum(), weight)[0] / scales
    largest = (weight.detach() * scales).abs().amax(0).clamp_max(softcap)  # (6,)
    bound = 1e-6 + 1e-6 * largest
    for budget in MODES.values():
        logp, entropy = kernels.linear_logp(
            hidden, weight, target, softcap=softcap, return_entropy=True, backend=backend, budget=budget
        )
        assert ((logp - expected[0]).abs() < bound).all()
        assert ((entropy - expected[1]).abs() < 3 * bound).all()
        actual = torch.autograd.grad(logp.sum() + entropy.sum(), weight)[0] / scales
        assert ((actual - d_logits).abs().amax(0) < 10 * bound).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_softcap_of_infinity(backend):
    """tanh of it is 1, so a bias of -inf bans nothing under a softcap; NaN stays NaN."""
    hidden, weight, target, _ = problem(bias=False)
    bias = torch.zeros(75)
    bias[3], bias[4] = -INF, INF
    options = {"softcap": 5.0, "backend": backend}
    logp = kernels.linear_logp(hidden, weight, target, bias=bias, **options)
    expected, _ = reference(hidden, weight, target, bias, softcap=5.0)
    assert expected.isfinite().all() and (logp - expected).abs().max() < 2e-5
    bias[5] = NAN
    assert kernels.linear_logp(hidden, weight, target, bias=bias, **options)[target != -100].isnan().all()


# ---------------------------------------------------------------- ignored rows

PATHS = {
    "plain": {"with_bias": False},
    "bias": {},
    "temperature": {"temperature": 0.3},
    "softcap": {"softcap": 5.0},
    "entropy": {"return_entropy": True},
    "lse": {"return_lse": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["kept", *slow("recomputed")])
@pytest.mark.parametrize("name", PATHS)
def test_an_ignored_row_may_hold_anything(name, mode, backend):
    """The gradients of everything else are those without that row, and its own is 0."""
    options = dict(PATHS[name])
    hidden, weight, target, bias = problem()
    if not options.pop("with_bias", True):
        bias = None
    leaves = [leaf for leaf in (weight, bias) if leaf is not None]
    kept = target != -100
    cu_seqlens = torch.tensor([0, 4, 4, 19], dtype=torch.int32)

    def results(hidden):
        """Sums of log-probs and the gradients of a loss on all outputs, d hidden first."""
        outputs = kernels.sequence_logp(
            hidden, weight, target, cu_seqlens, bias=bias, backend=backend, budget=MODES[mode], **options
        )
        loss = sum((output * torch.linspace(-1, 1, len(output))).sum() for output in outputs)
        return outputs, torch.autograd.grad(loss, [hidden, *leaves])

    clean = torch.where(kept[:, None], hidden.detach(), 0.0).requires_grad_()
    expected, exact = results(clean)
    assert all(output.isfinite().all() for output in expected)
    for value in (NAN, INF, -INF, 3e38):
        dirty = torch.where(kept[:, None], hidden.detach(), value).requires_grad_()
        outputs, actual = results(dirty)
        for a, b in zip(outputs + actual, expected + exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert not actual[0][~kept].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_row_of_logits_may_hold_anything(backend):
    for value in (NAN, INF, -INF):
        logits = torch.randn(3, 9)
        logits[1] = value
        logits.requires_grad_()
        logp = kernels.logp_from_logits(logits, torch.tensor([2, -100, 4]), backend=backend)
        (gradient,) = torch.autograd.grad(logp.sum(), logits)
        assert logp.isfinite().all() and not gradient[1].any() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_an_upstream_gradient_stops_at_an_ignored_row(backend):
    hidden, weight, target, _ = problem(bias=False)
    results = kernels.linear_logp(
        hidden, weight, target, return_entropy=True, return_lse=True, backend=backend
    )
    upstream = torch.where(target == -100, NAN, 1.0)
    for result in results:
        gradients = torch.autograd.grad(result, [hidden, weight], upstream, retain_graph=True)
        assert all(gradient.isfinite().all() for gradient in gradients)


# ---------------------------------------------------------------- banned targets, temperatures


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.1, 10.0, 1e4, 1e30])
def test_a_banned_target_at_any_temperature(temperature, mode, backend):
    """-inf for the token and for its sequence; finite gradients, those of log_softmax in fp64."""
    hidden, weight, target, bias = problem(n=6, v=40)
    bias = bias.detach().index_fill(0, target[3], -INF)
    banned = target == target[3]
    cu_seqlens = torch.tensor([0, 3, 6], dtype=torch.int32)
    options = {"bias": bias, "temperature": temperature, "backend": backend, "budget": MODES[mode]}
    sums, logp, entropy = kernels.sequence_logp(
        hidden, weight, target, cu_seqlens, return_entropy=True, **options
    )
    expected, _ = reference(hidden, weight, target, bias, temperature)
    assert logp[banned].isneginf().all() and sums[1] == -INF
    assert sums[0].isfinite() and entropy.isfinite().all()
    torch.testing.assert_close(logp.double(), expected, rtol=1e-6, atol=2e-5)
    actual = torch.autograd.grad(logp.sum(), [hidden, weight])
    exact = torch.autograd.grad(expected.sum(), [hidden, weight])
    for a, b in zip(actual, exact, strict=True):
        assert a.isfinite().all() and (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_class_banned(backend):
    """No distribution: NaN, as log_softmax says."""
    hidden, weight, target, _ = problem(bias=False)
    bias = torch.full((75,), -INF)
    results = kernels.linear_logp(
        hidden, weight, target, bias=bias, return_entropy=True, return_lse=True, backend=backend
    )
    live = target != -100
    for result in results:
        assert result[live].isnan().all() and not result[~live].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-20, 1e-6, 1e6, 1e30])
def test_extreme_temperatures(temperature, backend):
    hidden, weight, target, bias = problem()
    options = {"bias": bias, "temperature": temperature}
    logp, entropy = kernels.linear_logp(
        hidden, weight, target, return_entropy=True, backend=backend, **options
    )
    expected = reference(hidden, weight, target, **options)
    torch.testing.assert_close(logp.double(), expected[0], rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=2e-6, atol=2e-5)
    actual = torch.autograd.grad(logp.sum(), weight)[0] * temperature
    exact = torch.autograd.grad(expected[0].sum(), weight)[0] * temperature
    if temperature > 1:
        assert error(actual, exact) < 1e-5
    assert actual.isfinite().all()  # logits of 10^6 have no digit for a p between 0 and 1


# ---------------------------------------------------------------- dtypes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.uint8, *slow(torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32)]
)
def test_targets_of_every_integer_dtype(dtype, backend):
    """156 is the byte of -100, and a class of its own in uint8."""
    hidden, weight, _, _ = problem(v=200, bias=False)
    target = torch.arange(19) + (100 if dtype == torch.int8 else 150)
    actual = kernels.linear_logp(hidden, weight, target.to(dtype), backend=backend)
    expected = kernels.linear_logp(hidden, weight, target, backend=backend)
    assert torch.equal(actual, expected) and actual.all()
    logits = (hidden @ weight.T).detach()
    actual = kernels.logp_from_logits(logits, target.to(dtype), backend=backend)
    assert torch.equal(actual, kernels.logp_from_logits(logits, target, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("n", [19, *slow(0)])
def test_a_gradient_for_one_input_alone(wanted, n, backend):
    names = ["hidden", "weight", "bias"]
    hidden, weight, target, bias = problem()
    tensors = {}
    for name, tensor in zip(names, (hidden[:n], weight, bias), strict=True):
        tensors[name] = tensor.detach().clone().requires_grad_(name == wanted)
    logp = kernels.linear_logp(
        tensors["hidden"], tensors["weight"], target[:n], bias=tensors["bias"], backend=backend
    )
    expected, _ = reference(tensors["hidden"], tensors["weight"], target[:n], tensors["bias"])
    (exact,) = torch.autograd.grad(expected.sum(), tensors[wanted])
    logp.sum().backward()
    assert [name for name in names if tensors[name].grad is not None] == [wanted]
    assert error(tensors[wanted].grad, exact) < 2e-6


def test_bf16_is_refused_by_the_interpreter():
    """It multiplies bit patterns: as inputs, through autocast and through set_backend."""
    hidden, weight, target, _ = problem(bias=False)
    low = [x.detach().bfloat16() for x in (hidden, weight)]
    refused = pytest.raises(ValueError, match="^backend is 'triton'.*bf16")
    with refused:
        kernels.linear_logp(*low, target, backend="triton")
    with refused, torch.autocast("cpu", torch.bfloat16):
        kernels.linear_logp(hidden, weight, target, backend="triton")
    with refused:
        kernels.logp_from_logits(low[0], target.clamp(max=19), backend="triton")
    with refused:
        kernels.segment_sum(low[0][:, 0], torch.tensor([0, 19]), backend="triton")
    with pytest.raises(ValueError, match="^weight must have hidden's dtype"):
        kernels.linear_logp(hidden, low[1], target, backend="triton")
    logp = kernels.linear_logp(*low, target)  # "auto" is torch here
    assert (logp - reference(*low, target)[0]).abs().max() < 2e-5
    kernels.set_backend("triton")
    try:
        with refused:
            kernels.linear_logp(*low, target)
    finally:
        kernels.set_backend("auto")


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_autocast_is_that_of_linear(dtype, low):
    """The log-probs are those of the logits that F.linear would give, before their rounding."""
    hidden, weight, target, bias = problem()
    inputs = [x.detach().to(dtype) for x in (hidden, weight, bias)]
    with torch.autocast("cpu", low):
        logits = linear(*inputs)
        logp = kernels.linear_logp(*inputs[:2], target, bias=inputs[2], backend="torch")
    cast = [x.to(logits.dtype) for x in inputs]
    expected, _ = reference(cast[0], cast[1], target, cast[2])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert logp.dtype == wide and (logp - expected).abs().max() < (1e-12 if wide == torch.float64 else 2e-5)


def test_autocast_does_not_mix_fp64():
    """As F.linear: only what is not fp64 is cast, and then the dtypes differ."""
    hidden, weight, target, _ = problem(bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError, match="dtype"):
            linear(hidden.double(), weight)
        with pytest.raises(ValueError, match="^weight must have hidden's dtype torch.float64"):
            kernels.linear_logp(hidden.double(), weight, target, backend="torch")
