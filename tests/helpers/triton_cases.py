"""backend="triton" in Triton's interpreter, against fp64 references written from the definitions.

Run by test_triton.py, with TRITON_INTERPRET=1. The interpreter is wrong for bf16 products, so fp32
and fp16 are what can be checked here; bf16 is in test_kernels_gpu.py. Its products are numpy's,
whose BLAS, depending on the CPU, may sum a row in another order in another place. So what holds bit
for bit on a GPU does so here only for inputs whose products are exact in any order.
"""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from helpers.logp_reference import error, gradient_error, gradients, reference
from kernels import tiles, triton_backward, triton_forward, tune

TOLERANCE = {
    torch.float32: 2e-6,
    torch.float16: 1.2e-3,
}  # of gradients, relative to the norm: fp16 rounds d logits
MODES = {"kept": 1 << 30, "recomputed": 0}


def problem(n=19, d=20, v=75, dtype=torch.float32, bias=True, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, d, generator=g) * scale, torch.randn(v, d, generator=g)
    target = torch.randint(v, (n,), generator=g)
    target[1:9:5] = -100
    hidden, weight, b = (x.to(dtype).requires_grad_() for x in (hidden, weight, torch.randn(v, generator=g)))
    return hidden, weight, target, b if bias else None


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What torch.empty gives is NaN, so that nothing unwritten passes; slices are small."""
    empty, like = torch.Tensor.new_empty, torch.empty_like

    def fill(x):
        return x.fill_(float("nan")) if x.dtype.is_floating_point else x

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(like(*a, **k)))
    monkeypatch.setattr(triton_backward, "SLICE", 32)
    monkeypatch.setattr(triton_forward, "CHUNK", 16)


OPTIONS = {
    "plain": {"bias": False},
    "bias": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0, "bias": False},
    "all": {"temperature": 1.7, "softcap": 5.0},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("entropy", [False, True])
def test_linear_logp(name, dtype, mode, entropy):
    check_linear_logp(name, dtype, mode, entropy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name, entropy", [("bias", False), ("all", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear_logp_without_tma(dtype, name, entropy, mode, monkeypatch):
    """Tiles are loaded by pointers, as on sm_80."""
    for tile in tiles.table()["interpreter"]["fp32"].values():
        monkeypatch.setitem(tile, "TMA", False)
    check_linear_logp(name, dtype, mode, entropy)


def check_linear_logp(name, dtype, mode, entropy):
    options = dict(OPTIONS[name])
    hidden, weight, target, bias = problem(dtype=dtype, bias=options.pop("bias", True))
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    expected = reference(hidden, weight, target, bias, **options)
    out = kernels.linear_logp(
        hidden,
        weight,
        target,
        bias=bias,
        return_entropy=entropy,
        backend="triton",
        budget=MODES[mode],
        **options,
    )
    out = out if entropy else (out,)
    for actual, true in zip(out, expected, strict=False):
        assert actual.dtype == torch.float32 and (actual - true).abs().max() < 2e-5
    torch.manual_seed(1)
    g = [torch.randn(len(target)) for _ in out]
    actual = gradients(out, leaves, g)
    exact = gradients(expected[: len(out)], leaves, g)
    for a, b, leaf in zip(actual, exact, leaves, strict=True):
        assert a.dtype == dtype and a.shape == leaf.shape and error(a, b) < TOLERANCE[dtype]


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 40),
    st.integers(1, 40),
    st.integers(1, 100),
    st.integers(0, 99),
    st.sampled_from(list(MODES)),
)
def test_any_shape(n, d, v, seed, mode):
    hidden, weight, target, bias = problem(n, d, v, seed=seed)
    out = kernels.linear_logp(hidden, weight, target, bias=bias, backend="triton", budget=MODES[mode])
    expected, _ = reference(hidden, weight, target, bias)
    assert out.shape == (n,) and torch.allclose(out.double(), expected, atol=2e-5, rtol=0)
    g = torch.randn(n)
    leaves = [hidden, weight, bias]
    tolerance = 1e-4 if v == 1 else 2e-6  # a target of p near 1 has few digits of 1 - p
    for a, b in zip(gradients([out], leaves, [g]), gradients([expected], leaves, [g]), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=tolerance) or error(a, b) < 5e-6


@pytest.mark.parametrize("exact", [True, False])
def test_batch_invariance(exact):
    """A row's log-prob is the same alone, in another batch and in another place.

    It is so bit for bit, but for what BLAS does: products of small multiples of 1/8, and their sums
    in any order, are exact in fp32."""
    hidden, weight, target, bias = problem(n=50)
    if exact:
        hidden, weight = (hidden * 8).round() / 8, (weight * 8).round() / 8
    options = {"bias": bias, "return_entropy": True, "backend": "triton"}
    whole, whole_entropy = kernels.linear_logp(hidden, weight, target, **options)
    for rows in (slice(7, 8), slice(3, 45), torch.randperm(50)):
        logp, entropy = kernels.linear_logp(hidden[rows], weight, target[rows], **options)
        if exact:
            assert torch.equal(logp, whole[rows]) and torch.equal(entropy, whole_entropy[rows])
        else:
            assert (logp - whole[rows]).abs().max() < 2e-5
            assert (entropy - whole_entropy[rows]).abs().max() < 2e-5


def test_ignored_and_banned():
    """-100: 0 and no gradient. A token whose bias is -inf has probability 0; H is finite."""
    hidden, weight, target, _ = problem()
    bias = torch.zeros(75)
    bias[:40], bias[41] = -float("inf"), -float("inf")
    target = torch.where(target == -100, target, target.clamp_min(42))
    for mode in MODES.values():
        out = kernels.linear_logp(
            hidden, weight, target, bias=bias, return_entropy=True, backend="triton", budget=mode
        )
        expected = reference(hidden, weight, target, bias)
        assert all((x - y).abs().max() < 2e-5 for x, y in zip(out, expected, strict=True))
        d_hidden, d_weight = gradients(out, [hidden, weight], [1.0, 1.0])
        assert not d_hidden[target == -100].any() and not d_weight[bias.isinf()].any()
        assert d_weight.isfinite().all()
    nothing = kernels.linear_logp(hidden, weight, torch.full_like(target, -100), backend="triton")
    assert not nothing.any() and not torch.autograd.grad(nothing.sum(), weight)[0].any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_a_banned_target(mode, backend):
    """Its log-prob is -inf; the gradients of the entropy and of the other rows are right."""
    hidden, weight, target, bias = problem()
    low = bias.detach().index_fill(0, target[3], -1e4)
    banned = low.masked_fill(low == -1e4, -float("inf"))
    out = kernels.linear_logp(
        hidden, weight, target, bias=banned, return_entropy=True, backend=backend, budget=MODES[mode]
    )
    expected, g = reference(hidden, weight, target, low), [target != target[3], 1.0]
    assert (out[0].isneginf() == (target == target[3])).all() and (out[1] - expected[1]).abs().max() < 2e-5
    out = (out[0].masked_fill(target == target[3], 0.0), out[1])
    assert gradient_error(out, expected, [hidden, weight], g) < 5e-6


def test_nan_stays():
    hidden, weight, target, _ = problem()
    hidden = hidden.detach().clone()
    hidden[4, 2] = float("nan")
    out = kernels.linear_logp(hidden, weight, target, backend="triton")
    assert out[4].isnan() and out.isnan().sum() == 1


def test_true_class_without_cancellation():
    """At logp = -1e-7 its gradient is 1e-7; 1 - exp(logp) in fp32 would be 1.2e-7."""
    x, w, target = torch.ones(1, 1), torch.tensor([[16.0], [0.0]]), torch.tensor([0])
    _, *saved = triton_forward.forward(x, w, None, target, 1.0, 0.0, False, 0)
    logp_ = torch.tensor([-1e-7])
    _, d, _ = triton_backward.backward(
        torch.ones(1), None, None, x, w, None, target, logp_, *saved, 1.0, 0.0, [False, True, False]
    )
    assert abs(d[0, 0] / 1e-7 - 1) < 1e-3 and abs(d[1, 0] / -torch.exp(torch.tensor(-16.0)) - 1) < 1e-3


def test_ignored_rows_of_banned_classes():
    """Such rows have no distribution, and their gradient is 0 all the same."""
    hidden, weight, target, bias = problem()
    with torch.no_grad():
        bias.fill_(-float("inf"))
    for budget in MODES.values():
        logp = kernels.linear_logp(
            hidden, weight, torch.full_like(target, -100), bias=bias, backend="triton", budget=budget
        )
        assert not any(x.any() for x in torch.autograd.grad(logp.sum(), [hidden, weight, bias]))


def test_frozen_head():
    """No d weight is computed for a weight without requires_grad."""
    hidden, weight, target, bias = problem()
    need = [True, False, False]
    h, w, b = (x.detach() for x in (hidden, weight, bias))
    out = triton_forward.forward(h, w, b, target, 1.0, 0.0, False, 0)
    _, d_weight, d_bias = triton_backward.backward(out[0], None, None, h, w, b, target, *out, 1.0, 0.0, need)
    assert not d_weight.numel() and not d_bias.numel()
    loss = kernels.linear_logp(hidden, weight.detach(), target, backend="triton").sum()
    expected = reference(hidden, weight, target)[0].sum()
    assert error(*(torch.autograd.grad(x, hidden)[0] for x in (loss, expected))) < 2e-6


def test_no_second_derivative():
    hidden, weight, target, _ = problem()
    loss = kernels.linear_logp(hidden, weight, target, backend="triton").sum()
    for f, message in ((loss, "does not require grad"), (loss**2, "once_differentiable")):
        (d,) = torch.autograd.grad(f, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match=message):
            d.sum().backward()


def test_views():
    """Transposed, strided and unaligned inputs; an expanded upstream gradient."""
    hidden, weight, target, bias = problem()
    views = [
        hidden.detach().T.contiguous().T,
        torch.stack([weight.detach()] * 2, 1)[:, 1],
        torch.stack([bias.detach()] * 2, 1)[:, 1],
    ]
    shifted = torch.empty(hidden.numel() + 1)[1:].view(hidden.shape).copy_(hidden.detach())
    views = [x.requires_grad_() for x in views]
    odd = torch.stack([target] * 2, 1)[:, 1]
    out = kernels.linear_logp(*views[:2], odd, bias=views[2], backend="triton")
    expected, _ = reference(hidden, weight, target, bias)
    assert gradient_error([out], [expected], views, [1.0], [hidden, weight, bias]) < 2e-6
    unaligned = kernels.linear_logp(shifted, weight, target.int(), bias=bias, backend="triton")
    assert (unaligned - expected).abs().max() < 2e-5


def test_sequence_logp():
    hidden, weight, target, bias = problem()
    cu = torch.tensor([0, 0, 7, 8, 19], dtype=torch.int32)
    sums, token, entropy = kernels.sequence_logp(
        hidden, weight, target, cu, bias=bias, return_entropy=True, backend="triton"
    )
    logp, _ = reference(hidden, weight, target, bias)
    expected = torch.stack([part.sum() for part in logp.split(cu.diff().tolist())])
    assert sums.shape == (4,) and error(sums, expected) < 2e-6 and len(token) == len(entropy) == 19
    g = torch.randn(4)
    assert gradient_error([sums], [expected], [hidden, weight], [g]) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_segment_sum(dtype):
    """Any lengths; and a sequence's sum does not depend on where it starts."""
    x, cu = torch.randn(3000).to(dtype), torch.tensor([0, 0, 1, 700, 700, 3000], dtype=torch.int32)
    sums = kernels.segment_sum(x, cu, backend="triton")
    expected = torch.stack([part.double().sum() for part in x.split(cu.diff().tolist())])
    assert sums.dtype == torch.float32 and (sums - expected).abs().max() < 1e-4
    moved = kernels.segment_sum(
        torch.cat([torch.randn(5).to(dtype), x[700:]]), torch.tensor([0, 5, 2305]), backend="triton"
    )
    assert moved[1] == sums[4]
    assert kernels.segment_sum(x[:0], cu[:1], backend="triton").shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n, v", [(5, 7), (3, 9000), (0, 4)])
def test_logp_from_logits(n, v, dtype):
    logits = (torch.randn(n, v + 1) * 5).to(dtype)[:, :v].requires_grad_()
    target = torch.randint(v, (n,))
    target[1:2] = -100
    out = kernels.logp_from_logits(logits, target, backend="triton")
    expected, _ = reference(logits, None, target)
    g = torch.randn(n)
    assert out.shape == (n,) and torch.allclose(out.double(), expected, atol=2e-5)
    assert error(*(gradients([x], [logits], [g])[0] for x in (out, expected))) < TOLERANCE[dtype]
    masked = logits.detach().masked_fill(torch.arange(v) % 2 == 1, -float("inf"))  # banned tokens
    expected, _ = reference(masked.nan_to_num(neginf=-60000.0), None, target // 2 * 2)
    out = kernels.logp_from_logits(masked, target // 2 * 2, backend="triton")
    assert torch.allclose(out.double(), expected, atol=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    """Inputs go to autocast's dtype, the arithmetic equals that of fp16 inputs outside."""
    hidden, weight, target, _ = problem(bias=False)
    half = [x.detach().half().requires_grad_() for x in (hidden, weight)]
    expected = kernels.linear_logp(*half, target, backend="triton", budget=MODES[mode])
    with torch.autocast("cpu", torch.float16):
        out = kernels.linear_logp(hidden, weight, target, backend="triton", budget=MODES[mode])
        actual = torch.autograd.grad(out.sum(), [hidden, weight])
    assert torch.equal(out, expected)
    for a, b in zip(actual, torch.autograd.grad(expected.sum(), half), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())
    out = kernels.linear_logp(hidden, weight, target, backend="triton", budget=MODES[mode])
    with torch.autocast("cpu", torch.bfloat16):  # only the backward is inside
        actual = torch.autograd.grad(out.sum(), hidden)[0]
    assert error(actual, torch.autograd.grad(reference(hidden, weight, target)[0].sum(), hidden)[0]) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compile(backend):
    """One graph around a model, forward and backward; dynamic shapes too."""
    hidden, weight, target, bias = problem()

    def loss(hidden, weight, target, bias, cu):
        sums, token, entropy = kernels.sequence_logp(
            hidden * 2, weight, target, cu, bias=bias, return_entropy=True, backend=backend
        )
        return (sums * torch.arange(1, len(sums) + 1)).sum() + entropy.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (19, 12):
        args = hidden[:n], weight, target[:n], bias, torch.tensor([0, 7, n], dtype=torch.int32)
        actual, true = (torch.autograd.grad(f(*args), [hidden, weight, bias]) for f in (compiled, loss))
        assert all(error(a, b) < 1e-6 for a, b in zip(actual, true, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("budget", [-1, 0, 1 << 30])
def test_op(backend, budget):
    """Schema, fakes and autograd registration of the custom ops, as PyTorch checks them."""
    hidden, weight, target, bias = problem()
    args = (hidden.detach(), weight.detach(), bias.detach(), target, 1.0, 0.0, True, budget, backend)
    torch.library.opcheck(
        torch.ops.nanoroads.linear_logp, args, test_utils=("test_schema", "test_faketensor")
    )


def test_fp64_is_refused():
    hidden, weight, target, _ = problem(dtype=torch.float64)
    with pytest.raises(ValueError, match="fp64"):
        kernels.linear_logp(hidden, weight, target, backend="triton")
    with pytest.raises(ValueError, match="fp64"):
        kernels.segment_sum(hidden[:, 0], torch.tensor([0, 19]), backend="triton")


@pytest.mark.slow
def test_tuning(tmp_path, monkeypatch, capsys):
    """A tile that gives wrong results is not taken; what is taken is in the file, whole."""
    table = copy.deepcopy(tiles.table())
    monkeypatch.setattr(tiles, "PATH", tmp_path / "tiles.json")
    monkeypatch.setattr(tiles, "table", lambda: table)
    monkeypatch.setattr(tune, "SHAPES", {"": [(5, 8, 70)], " narrow": [(4, 8, 70)]})
    monkeypatch.setattr(tune, "SWEEPS", [{"BLOCK_V": (32, 64), "num_warps": (4, 16)}, {"BLOCK_D": (16, 64)}])
    monkeypatch.setattr(tune, "REPEATS", 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 1))
    ms = iter(range(10**6, 0, -1))  # each faster than the one before

    def timed(function, clock):
        function()
        return next(ms)

    right = triton_forward.forward

    def wrong_for_64(*args):
        logp, *rest = right(*args)
        tile = args[-1]
        if tile and tile["BLOCK_V"] == 64:
            logp = logp + 0.01
        return logp, *rest

    monkeypatch.setattr(tune, "timed", timed)
    monkeypatch.setattr(triton_forward, "forward", wrong_for_64)
    tune.tune(torch.float32, "fp32", "cpu")
    tuned = json.loads((tmp_path / "tiles.json").read_text())
    assert tuned["sm_91"]["fp32"]["forward"]["BLOCK_V"] == 32
    assert tuned["sm_91"]["fp32"]["backward"]["BLOCK_V"] == 64
    assert tuned["sm_91"]["fp32"]["forward narrow"]["BLOCK_V"] == 32
    assert tuned["sm_90"] == tiles.table()["sm_90"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiles.json"]
    printed = capsys.readouterr().out
    assert "BLOCK_V=64" in printed and "wrong results" in printed, printed
