"""backend="torch" through the public functions, against fp64 references from the definitions."""

import pytest
import torch
from helpers.logp_reference import bound, error, gradient_error, gradients, reference, reference_with_lse
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from kernels import torch_backend

# What is kept of the probabilities for the backward: all in fp32, all in fp16, nothing.
MODES = ("whole", "fp16", "recompute")
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "temperature": 1.7, "softcap": 5.0},
}


def problem(n=11, d=20, v=37, dtype=torch.float32, bias=False, seed=0, scale=1.0):
    """hidden, weight, target (two of them ignored), bias or None; the floats take gradients."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(n, d) * scale, torch.randn(v, d) / d**0.5 * 2
    target = torch.randint(v, (n,))
    target[1:9:5] = -100
    tensors = [hidden, weight, torch.randn(v)]
    hidden, weight, bias_ = (x.to(dtype).requires_grad_() for x in tensors)
    return hidden, weight, target, bias_ if bias else None


def split(options):
    return {k: x for k, x in options.items() if k != "bias"}, options.get("bias", False)


def use(mode, monkeypatch):
    """Make the backward work in this mode, and in tiles of 3 x 8 -> the budget to pass."""
    monkeypatch.setitem(torch_backend.TILE, "cpu", (24, 8))
    if mode != "whole":
        monkeypatch.setattr(torch_backend, "FP32_BYTES", 0)
    return 0 if mode == "recompute" else None


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
def test_linear_logp(name, dtype):
    options, bias = split(OPTIONS[name])
    hidden, weight, target, bias = problem(dtype=dtype, bias=bias, scale=3.0)
    logp, entropy = kernels.linear_logp(
        hidden, weight, target, bias=bias, return_entropy=True, backend="torch", **options
    )
    expected = reference(hidden, weight, target, bias, **options)
    tol = 1e-12
    if dtype != torch.float64:  # 16-bit inputs too: the logits are fp32 from the accumulator on
        tol = bound(hidden, weight, bias, options.get("temperature", 1.0))
    assert logp.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(logp.double(), expected[0], rtol=0, atol=tol)
    torch.testing.assert_close(entropy.double(), expected[1], rtol=0, atol=tol)
    assert (logp[target == -100] == 0).all() and (entropy[target == -100] == 0).all()
    alone = kernels.linear_logp(hidden.detach(), weight, target, bias=bias, backend="torch", **options)
    assert torch.equal(alone, logp)


@pytest.mark.parametrize("n, d, v", [(5, 7, 1), (1, 1, 2), (6, 33, 129), (3, 300, 8200), (9, 65, 50)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(n, d, v, mode, dtype, monkeypatch):
    budget = use(mode, monkeypatch)
    hidden, weight, target, _ = problem(n, d, v, dtype)
    g = torch.randn(n)
    logp = kernels.linear_logp(hidden, weight, target, backend="torch", budget=budget)
    expected = reference(hidden, weight, target)[0]
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=bound(hidden, weight))
    actual = gradients([logp], [hidden, weight], [g])
    for a, b in zip(actual, gradients([expected], [hidden, weight], [g]), strict=True):
        assert a.dtype == dtype and torch.isfinite(a).all()
        if v == 1:  # p is 1 and the gradient 0
            assert a.abs().max() < 1e-6
        else:
            assert error(a, b) < (3e-3 if dtype == torch.bfloat16 else 5e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_empty(grad):
    hidden, weight, bias = (torch.randn(s, requires_grad=grad) for s in ((0, 8), (5, 8), (5,)))
    target, cu = torch.empty(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    sums, token, entropy = kernels.sequence_logp(
        hidden, weight, target, cu, bias=bias, return_entropy=True, backend="torch"
    )
    assert sums.tolist() == [0, 0] and token.shape == entropy.shape == (0,)
    if grad:
        sums.sum().backward()
        assert [x.grad.abs().sum() for x in (hidden, weight, bias)] == [0, 0, 0]
    assert kernels.logp_from_logits(torch.empty(0, 5), target, backend="torch").shape == (0,)


def test_not_contiguous():
    hidden, weight, target, bias = problem(bias=True)
    views = (
        hidden.detach().T.contiguous().T,
        torch.cat([weight.detach()] * 2, 1)[:, :20],
        target.repeat_interleave(2)[::2],
        bias.detach().repeat_interleave(3)[::3],
    )
    assert not any(x.is_contiguous() for x in views)
    leaves = [x.requires_grad_() for x in views if x.is_floating_point()]
    g = torch.randn(11)
    logp = kernels.linear_logp(*views[:3], bias=views[3], backend="torch")
    expected, _ = reference(hidden, weight, target, bias)
    assert gradient_error([logp], [expected], leaves, [g], [hidden, weight, bias]) < 2e-6
    logits = torch.randn(7, 11).T  # (11, 7)
    logp = kernels.logp_from_logits(logits, target % 7, backend="torch")
    expected = torch.log_softmax(logits.double(), 1).gather(1, (target % 7)[:, None])[:, 0]
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_target_dtypes(dtype):
    hidden, weight, target, _ = problem()
    target[target < 0] = 3
    args = hidden.detach(), weight.detach()
    a, b = (kernels.linear_logp(*args, t, backend="torch") for t in (target, target.to(dtype)))
    assert torch.equal(a, b)


@pytest.mark.parametrize("spread", [50.0, 300.0])
def test_an_improbable_target(spread):
    """p[target] is below what fp32 and fp16 can hold, and yet log-prob and gradient are right."""
    hidden, weight, target, _ = problem(dtype=torch.float32, scale=spread)
    logp = kernels.linear_logp(hidden, weight, target, backend="torch")
    expected = reference(hidden, weight, target)[0]
    assert expected.min() < -88
    torch.testing.assert_close(logp.double(), expected, rtol=1e-6, atol=0)
    g = torch.randn(11)
    assert gradient_error([logp], [expected], [hidden, weight], [g]) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_rare_classes(mode, monkeypatch):
    """The gradient of a class of probability 1e-8 has three digits, too.

    Adam scales it up to the size of the rest."""
    budget = use(mode, monkeypatch)
    hidden, weight, target = torch.ones(1, 2).requires_grad_(), torch.zeros(37, 2), torch.tensor([1])
    weight[2:, 0] = -18.0
    weight.requires_grad_()
    logp = kernels.linear_logp(hidden, weight, target, backend="torch", budget=budget)
    expected = reference(hidden, weight, target)[0]
    actual, wanted = (torch.autograd.grad(x.sum(), weight)[0][2:] for x in (logp, expected))
    assert 1e-9 < wanted.abs().max() < 1e-8 and error(actual, wanted) < 1e-3


def test_a_certain_target():
    """p[target] = 1 - 1e-5: the gradient is (1 - p), no difference of fp16 numbers."""
    torch.manual_seed(0)
    hidden, weight = torch.eye(3)[:1].requires_grad_(), (torch.eye(3) * 12).requires_grad_()
    logp = kernels.linear_logp(hidden, weight, torch.tensor([0]), backend="torch")
    expected = reference(hidden, weight, torch.tensor([0]))[0]
    assert -2e-5 < expected < 0
    assert gradient_error([logp], [expected], [hidden, weight], [1.0]) < 0.02


def test_sequence_logp():
    hidden, weight, target, bias = problem(bias=True)
    cu = torch.tensor([0, 0, 3, 4, 11, 11], dtype=torch.int32)
    options = {"bias": bias, "temperature": 1.3, "softcap": 4.0}
    sums, token, entropy = kernels.sequence_logp(
        hidden, weight, target, cu, return_entropy=True, backend="torch", **options
    )
    logp, h = reference(hidden, weight, target, **options)
    tol = bound(hidden, weight, bias)
    torch.testing.assert_close(token.double(), logp, rtol=0, atol=tol)
    torch.testing.assert_close(entropy.double(), h, rtol=0, atol=tol)
    expected = torch.stack([part.sum() for part in logp.split(cu.diff().tolist())])
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=3 * tol)
    g = torch.randn(5)
    assert gradient_error([sums], [expected], [hidden, weight, bias], [g]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("area", [1 << 20, 100])
def test_logp_from_logits(dtype, area, monkeypatch):
    monkeypatch.setitem(torch_backend.TILE, "cpu", (area, 8))
    torch.manual_seed(0)
    logits, target, g = (
        (torch.randn(9, 31) * 4).to(dtype).requires_grad_(),
        torch.randint(31, (9,)),
        torch.randn(9),
    )
    target[4] = -100
    actual = kernels.logp_from_logits(logits, target, backend="torch")
    expected = reference(logits, torch.eye(31), target)[0]
    tol = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tol)
    a, b = (torch.autograd.grad(x, logits, g.to(x))[0] for x in (actual, expected))
    assert a.dtype == dtype and (a[4] == 0).all()
    assert error(a, b) < {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_segment_sum(dtype):
    torch.manual_seed(0)
    x = torch.randn(4000, dtype=torch.float64).to(dtype).requires_grad_()
    cu = torch.tensor([0, 1, 1, 700, 3999, 4000], dtype=torch.int32)
    sums = kernels.segment_sum(x, cu, backend="torch")
    expected = torch.stack([part.double().sum() for part in x.split(cu.diff().tolist())])
    torch.testing.assert_close(
        sums.double(), expected, rtol=1e-6, atol=2e-5 if dtype != torch.float64 else 1e-12
    )
    g = torch.randn(5)
    (grad,) = torch.autograd.grad(sums, x, g.to(sums))
    assert torch.equal(grad, g.to(dtype).repeat_interleave(cu.diff()))
    again = kernels.segment_sum(
        torch.cat([torch.randn(5).to(dtype), x[1:700]]), torch.tensor([0, 5, 704]), backend="torch"
    )
    assert again[1] == sums[2]  # the same sequence elsewhere: the same bits


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("more", [(), ("entropy",), ("lse",), ("entropy", "lse")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients(mode, name, more, dtype, monkeypatch):
    budget, (options, bias) = use(mode, monkeypatch), split(OPTIONS[name])
    hidden, weight, target, bias = problem(dtype=dtype, bias=bias)
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    g = [torch.randn(len(target)) for _ in range(1 + len(more))]
    logp, entropy, lse = reference_with_lse(hidden, weight, target, bias, **options)
    expected = [logp] + [entropy] * ("entropy" in more) + [lse] * ("lse" in more)
    options |= {f"return_{name}": True for name in more}
    options |= {"bias": bias, "backend": "torch", "budget": budget}
    outputs = kernels.linear_logp(hidden, weight, target, **options)
    outputs = outputs if more else (outputs,)
    actual = gradients(outputs, leaves, g)
    exact = gradients(expected, leaves, g)
    tolerance = {torch.bfloat16: 3e-3, torch.float16: 6e-4, torch.float32: 2e-6}[dtype]
    if mode == "fp16" and dtype == torch.float32:
        tolerance = 3e-4
    for a, b, leaf in zip(actual, exact, leaves, strict=True):
        assert a.dtype == leaf.dtype and error(a, b) < tolerance
    assert (actual[0][target == -100] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("softcap", [20.0, 60.0])
def test_softcap_and_an_improbable_target(mode, softcap, monkeypatch):
    """p[target] underflows in the kept probabilities, and yet its gradient is right."""
    budget = use(mode, monkeypatch)
    hidden, weight, target, _ = problem(scale=40.0)
    logp = kernels.linear_logp(hidden, weight, target, softcap=softcap, backend="torch", budget=budget)
    expected, _ = reference(hidden, weight, target, softcap=softcap)
    assert gradient_error([logp], [expected], [hidden, weight], [1.0]) < 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(mode, name, monkeypatch):
    use(mode, monkeypatch)
    options, with_bias = split(OPTIONS[name])
    hidden, weight, target, bias = problem(5, 4, 7, torch.float64, bias=True)

    def function(hidden, weight, bias):
        bias = bias if with_bias else None
        return kernels.linear_logp(
            hidden, weight, target, bias=bias, return_entropy=True, return_lse=True,
            backend="torch", budget=0 if mode == "recompute" else None, **options,
        )  # fmt: skip

    assert gradcheck(function, (hidden, weight, bias))
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: kernels.logp_from_logits(x, target, backend="torch"), (logits,))
    assert gradcheck(
        lambda x: kernels.segment_sum(x[:, 0], torch.tensor([0, 2, 5]), backend="torch"), (logits,)
    )


class Multiplications(TorchDispatchMode):
    """Counts those of the matrix products."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in func.__name__:
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            self.n += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("need", [(True, False), (False, True), (True, True)])
def test_what_is_frozen_costs_nothing(need, mode, monkeypatch):
    budget = use(mode, monkeypatch)
    hidden, weight, target, _ = problem()
    hidden, weight = (
        x.detach().requires_grad_(wanted) for x, wanted in zip((hidden, weight), need, strict=True)
    )
    with Multiplications() as count:
        kernels.linear_logp(hidden, weight, target, backend="torch", budget=budget).sum().backward()
    is_recomputed = mode == "recompute" and need[1]  # not for d hidden alone: see test_frozen_head.py
    assert count.n == (1 + sum(need) + is_recomputed) * 11 * 20 * 37
    assert [x.grad is not None for x in (hidden, weight)] == list(need)


@pytest.mark.parametrize("mode", MODES)
def test_a_second_backward(mode, monkeypatch):
    budget = use(mode, monkeypatch)
    hidden, weight, target, bias = problem(bias=True)
    logp, entropy = kernels.linear_logp(
        hidden, weight, target, bias=bias, return_entropy=True, backend="torch", budget=budget, softcap=4.0
    )
    loss = (logp + 0.3 * entropy).sum()
    once, twice = (torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(twice, once, strict=True))  # it reads what was kept


def test_no_second_derivative():
    hidden, weight, target, _ = problem()
    logp = kernels.linear_logp(hidden, weight, target, backend="torch")
    (grad,) = torch.autograd.grad((logp**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# ---------------------------------------------------------------- autocast, torch.compile


def test_autocast():
    hidden, weight, target, bias = problem(bias=True)
    g = torch.randn(11)
    with torch.autocast("cpu", torch.bfloat16):
        logp = kernels.linear_logp(hidden, weight, target, bias=bias, backend="torch")
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    expected = reference(low[0], low[1], target, low[2])[0]
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=5e-6)
    assert logp.dtype == torch.float32
    actual, wanted = (
        torch.autograd.grad(logp, (hidden, weight, bias), g),
        torch.autograd.grad(expected, low, g.double()),
    )
    assert all(a.dtype == torch.float32 and error(a, b) < 5e-3 for a, b in zip(actual, wanted, strict=True))


def test_compile():
    hidden, weight, target, bias = problem(bias=True)
    cu = torch.tensor([0, 4, 11], dtype=torch.int32)

    def function(hidden, weight, bias):
        sums, token, entropy = kernels.sequence_logp(
            hidden, weight, target, cu, bias=bias, softcap=4.0, return_entropy=True, backend="torch"
        )
        logits = kernels.logp_from_logits(hidden @ weight.T, target, backend="torch")
        return sums, token, entropy, logits

    leaves, g = (hidden, weight, bias), [torch.randn(s) for s in (2, 11, 11, 11)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*leaves), function(*leaves), strict=True):
        assert torch.equal(a, b)
    assert gradient_error(compiled(*leaves), function(*leaves), leaves, g) < 1e-6


# ---------------------------------------------------------------- invariance


@pytest.mark.parametrize("n, d, v", [(200, 96, 1000), (64, 48, 98)])
def test_a_row_does_not_depend_on_the_others(n, d, v):
    hidden, weight, target, _ = problem(n, d, v)
    tol = bound(hidden, weight)
    whole = kernels.linear_logp(hidden, weight, target, backend="torch")
    pick = torch.randperm(n)[:7]
    alone = torch.cat(
        [
            kernels.linear_logp(hidden[i : i + 1], weight, target[i : i + 1], backend="torch")
            for i in pick.tolist()
        ]
    )
    in_few = kernels.linear_logp(hidden[pick], weight, target[pick], backend="torch")
    assert (alone - whole[pick]).abs().max() <= tol and (in_few - whole[pick]).abs().max() <= tol


@pytest.mark.parametrize("n, d, v", [(7, 33, 98), (300, 64, 5003), (1200, 16, 1100), (1, 7, 3000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_do_not_depend_on_what_is_kept(n, d, v, dtype, monkeypatch):
    """Bit for bit: without gradients, and with E kept in fp32, in fp16 and not at all."""
    hidden, weight, target, bias = problem(n, d, v, dtype, bias=True)
    options = {"bias": bias, "return_entropy": True, "return_lse": True, "backend": "torch"}
    with torch.no_grad():
        expected = kernels.linear_logp(hidden, weight, target, **options)
    for fp32_bytes, budget in ((1 << 40, None), (0, None), (0, 0)):
        monkeypatch.setattr(torch_backend, "FP32_BYTES", fp32_bytes)
        actual = kernels.linear_logp(hidden, weight, target, budget=budget, **options)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
