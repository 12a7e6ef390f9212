"""backend="torch" where only d hidden is wanted: its forward sums E W over the tiles, see
torch_backend.py. Against fp64 references, and against the path that other heads take."""

import pytest
import torch
from helpers.logp_reference import error, gradients, reference_with_lse
from torch.autograd import gradcheck

import kernels
from kernels import torch_backend

OPTIONS = {"plain": {}, "bias": {"bias": True}, "temperature": {"temperature": 0.7, "bias": True}}
TILES = {"one": (1 << 20, 1024), "many": (24, 8)}  # of 11 rows, 37 columns


def problem(dtype=torch.float32, scale=1.0, n=11, d=20, v=37):
    """hidden, which takes gradients; weight, target (two of them ignored) and bias, which do not."""
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(n, d, generator=generator) * scale).to(dtype).requires_grad_()
    weight = (torch.randn(v, d, generator=generator) / d**0.5 * 2).to(dtype)
    target = torch.randint(v, (n,), generator=generator)
    target[1:9:5] = -100
    return hidden, weight, target, torch.randn(v, generator=generator).to(dtype)


def frozen(hidden, weight, target, bias=None, **options):
    """-> (logp, lse)"""
    return kernels.linear_logp(hidden, weight, target, bias=bias, return_lse=True, backend="torch", **options)


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch):
    monkeypatch.setitem(torch_backend.TILE, "cpu", TILES[request.param])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradient(name, dtype, tiles):
    """Of log-prob, of log-sum-exp and of both; 0 for ignored rows."""
    options = dict(OPTIONS[name])
    hidden, weight, target, bias = problem(dtype)
    options["bias"] = bias if options.pop("bias", False) else None
    generator = torch.Generator().manual_seed(1)
    g, of_lse = (torch.randn(len(target), generator=generator) for _ in range(2))
    tolerance = {torch.bfloat16: 3e-3, torch.float16: 6e-4, torch.float32: 2e-6}[dtype]
    for upstream in ((g, 0 * g), (0 * g, of_lse), (g, of_lse)):
        logp, _, lse = reference_with_lse(hidden, weight, target, **options)
        (exact,) = gradients((logp, lse), [hidden], upstream)
        results = frozen(hidden, weight, target, **options)
        (actual,) = gradients(results, [hidden], upstream)
        assert actual.dtype == dtype and error(actual, exact) < tolerance
        assert not actual[target == -100].any()


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_it_gives_what_other_heads_get(scale, tiles):
    """The same bits of log-probs, also without gradients; the same d hidden, also of improbable
    targets and of rows whose peak rises from tile to tile by more than fp32 can hold."""
    hidden, weight, target, bias = problem(scale=scale)
    results = frozen(hidden, weight, target, bias)
    others = frozen(hidden, weight.clone().requires_grad_(), target, bias)
    with torch.no_grad():
        without = frozen(hidden, weight, target, bias)
    for actual, other, plain in zip(results, others, without, strict=True):
        assert torch.equal(actual, other) and torch.equal(actual, plain)
    (actual,), (other,) = (gradients(x, [hidden], [1.0, 0.3]) for x in (results, others))
    assert error(actual, other) < 1e-6


def test_gradcheck(tiles):
    hidden, weight, target, bias = problem(torch.float64)
    assert gradcheck(lambda x: frozen(x, weight, target, bias, temperature=1.7), (hidden,))


def test_a_certain_target(tiles):
    """p = 1 - 1e-5: the target's own row of W enters with 1 - p, not with a difference of sums."""
    weight = torch.eye(37)[:, :20] * 13
    hidden = torch.eye(20)[:1].requires_grad_()
    target = torch.tensor([0])
    logp, lse = frozen(hidden, weight, target)
    exact, _, _ = reference_with_lse(hidden, weight, target)
    (actual,), (expected,) = gradients([logp], [hidden], [1.0]), gradients([exact], [hidden], [1.0])
    assert expected.abs().max() < 2e-3 and error(actual, expected) < 2e-2


def test_banned_classes(tiles):
    """A whole tile of them, the first, and the target of one row."""
    hidden, weight, target, bias = problem()
    bias[:9], bias[target[3]] = -torch.inf, -torch.inf
    logp, lse = frozen(hidden, weight, target, bias)
    finite = bias.clamp_min(-1e4)
    exact, _, exact_lse = reference_with_lse(hidden, weight, target, finite)
    is_banned = bias[target.clamp_min(0)].isinf() & (target != -100)
    assert torch.equal(logp.isneginf(), is_banned) and is_banned[3]
    (actual,), (expected,) = (
        gradients((logp, lse), [hidden], [1.0, 0.5]),
        gradients((exact, exact_lse), [hidden], [1.0, 0.5]),
    )
    assert error(actual, expected) < 2e-6


def test_twice_and_empty_and_compiled():
    hidden, weight, target, bias = problem()

    def loss(hidden):
        logp, lse = frozen(hidden * 2, weight, target, bias)
        return (logp * torch.arange(11)).sum() + (lse**2).sum()

    value = loss(hidden)
    once, again = (torch.autograd.grad(value, hidden, retain_graph=True)[0] for _ in range(2))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden)
    assert torch.equal(once, again) and torch.equal(compiled, value)
    assert torch.equal(torch.autograd.grad(compiled, hidden)[0], once)
    nothing = hidden.detach()[:0].requires_grad_()
    logp, lse = frozen(nothing, weight, target[:0], bias)
    (logp.sum() + lse.sum()).backward()
    assert nothing.grad.shape == (0, 20)


@pytest.mark.parametrize(
    "options, kept",
    [({}, True), ({"return_entropy": True}, False), ({"softcap": 5.0}, False), ({"budget": 0}, True)],
)
def test_what_the_graph_holds(options, kept):
    """N D sums, whatever the budget; with softcap or entropy, what any head keeps."""
    hidden, weight, target, _ = problem()
    results = kernels.linear_logp(hidden, weight, target, backend="torch", **options)
    logp = results[0] if isinstance(results, tuple) else results
    assert (logp.grad_fn.saved_tensors[-1].shape == hidden.shape) == kept
    expected = reference_with_lse(hidden, weight, target, softcap=options.get("softcap"))[0]
    (actual,), (exact,) = (gradients([x], [hidden], [1.0]) for x in (logp, expected))
    assert error(actual, exact) < 2e-6
