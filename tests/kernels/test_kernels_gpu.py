"""backend="triton" on a GPU: what the interpreter cannot check, bf16 above all.

References are in fp64, on the same inputs."""

import pytest
import torch
from helpers.logp_reference import error, gradient_error, reference, reference_with_lse, tensor_core_bound

import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
MODES = {"kept": 8 << 30, "recomputed": 0}
SHAPES = [(1, 64, 50), (300, 768, 50257), (1000, 1000, 12993), (513, 2048, 129920)]


def problem(n, d, v, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(n, d, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(v, d, device="cuda") / d**0.5 * 2).to(dtype).requires_grad_()
    target = torch.randint(v, (n,), device="cuda")
    target[5::7] = -100
    return hidden, weight, target


def poison(gib=2):
    """NaN in the memory that the next torch.empty will get."""
    torch.full((gib << 28,), float("nan"), device="cuda")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n, d, v", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_accuracy(n, d, v, dtype, mode):
    hidden, weight, target = problem(n, d, v, dtype)
    poison()
    logp = kernels.linear_logp(hidden, weight, target, backend="triton", budget=MODES[mode])
    expected, _ = reference(hidden, weight, target)
    assert (logp - expected).abs().max() <= tensor_core_bound(hidden, weight)
    with torch.no_grad():  # another kernel, which keeps nothing
        assert torch.equal(logp, kernels.linear_logp(hidden, weight, target, backend="triton"))
    g = torch.randn(n, device="cuda")
    poison()
    tolerance = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}[dtype]
    assert gradient_error([logp], [expected], [hidden, weight], [g]) < tolerance


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"softcap": 5.0}, {"temperature": 1.7, "softcap": 30.0}]
)
def test_options(options, mode):
    hidden, weight, target = problem(200, 512, 5003)
    bias = torch.randn(5003, device="cuda").bfloat16().requires_grad_()
    out = kernels.linear_logp(
        hidden,
        weight,
        target,
        bias=bias,
        return_entropy=True,
        backend="triton",
        budget=MODES[mode],
        **options,
    )
    expected = reference(hidden, weight, target, bias, **options)
    bound = tensor_core_bound(hidden, weight, bias, **options)
    assert all((a - b).abs().max() <= bound for a, b in zip(out, expected, strict=True))
    g = [torch.randn(200, device="cuda") for _ in out]
    assert gradient_error(out, expected, [hidden, weight, bias], g) < 5e-3


@pytest.mark.parametrize("mode", MODES)
def test_bias_alone(mode):
    """What is kept then, as without a bias; options and entropy are computed again."""
    hidden, weight, target = problem(200, 512, 5003)
    bias = torch.randn(5003, device="cuda").bfloat16().requires_grad_()
    logp = kernels.linear_logp(hidden, weight, target, bias=bias, backend="triton", budget=MODES[mode])
    expected, _ = reference(hidden, weight, target, bias)
    assert (logp - expected).abs().max() <= tensor_core_bound(hidden, weight, bias)
    g = torch.randn(200, device="cuda")
    assert gradient_error([logp], [expected], [hidden, weight, bias], [g]) < 5e-3


@pytest.mark.parametrize("gap", [40.0, 60.0, 300.0])
def test_kept_rows_out_of_range(gap):
    """Targets of a log-prob of about -gap, in a third of the rows: beyond -44 their row is rescaled."""
    hidden, weight, target = problem(600, 128, 5003)
    with torch.no_grad():
        hidden[:, 0] = 0.0
        hidden[::3, 0] = gap
        weight[:, 0] = 0.0
        weight[target[::3].clamp_min(0), 0] = -1.0
    logp = kernels.linear_logp(hidden, weight, target, backend="triton", budget=MODES["kept"])
    expected, _ = reference(hidden, weight, target)
    assert (expected < -0.8 * gap).sum() > 100
    g = torch.randn(600, device="cuda")
    assert gradient_error([logp], [expected], [hidden, weight], [g]) < 5e-3


def test_lse():
    hidden, weight, target = problem(300, 768, 50257)
    logp, lse = kernels.linear_logp(hidden, weight, target, return_lse=True, backend="triton")
    expected, _, expected_lse = reference_with_lse(hidden, weight, target)
    bound = tensor_core_bound(hidden, weight)
    assert (logp - expected).abs().max() <= bound and (lse - expected_lse).abs().max() <= bound
    g = [torch.randn(300, device="cuda"), torch.randn(300, device="cuda")]
    assert gradient_error([logp, lse], [expected, expected_lse], [hidden, weight], g) < 5e-3


def test_backward_twice():
    """retain_graph: the same bits, since a backward writes to nothing that is saved."""
    hidden, weight, target = problem(300, 768, 50257)
    loss = kernels.linear_logp(hidden, weight, target, backend="triton").sum()
    first, second = (torch.autograd.grad(loss, [hidden, weight], retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_invariance(dtype):
    """Bit for bit the same log-prob and sum, alone, in another batch and in another place.

    So the on-policy ratio is exactly 1."""
    hidden, weight, target = problem(3000, 768, 50257, dtype)
    cu = torch.tensor([0, 10, 1200, 3000], device="cuda", dtype=torch.int32)
    sums, whole = kernels.sequence_logp(hidden, weight, target, cu, backend="triton")
    for rows in (slice(7, 8), slice(3, 2045), torch.randperm(3000, device="cuda")):
        assert torch.equal(
            kernels.linear_logp(hidden[rows], weight, target[rows], backend="triton"), whole[rows]
        )
    alone, _ = kernels.sequence_logp(hidden[10:1200], weight, target[10:1200], cu[1:3] - 10, backend="triton")
    assert torch.equal(alone[0], sums[1])


@pytest.mark.parametrize("mode", MODES)
def test_determinism(mode):
    hidden, weight, target = problem(700, 768, 50257)
    first = None
    for _ in range(100):
        poison(1)
        logp = kernels.linear_logp(hidden, weight, target, backend="triton", budget=MODES[mode])
        result = (logp, *torch.autograd.grad(logp.sum(), [hidden, weight]))
        first = first or result
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_frozen_head(dtype):
    """The same bits of the forward as with a head that takes gradients; d hidden by another way."""
    hidden, weight, target = problem(700, 768, 50257, dtype)
    options = {"return_lse": True, "backend": "triton"}
    poison()
    results = kernels.linear_logp(hidden, weight.detach(), target, **options)
    others = kernels.linear_logp(hidden, weight, target, **options)
    assert all(torch.equal(a, b) for a, b in zip(results, others, strict=True))
    expected, _ = reference(hidden, weight, target)
    g = torch.randn(700, device="cuda")
    tolerance = {torch.bfloat16: 5e-3, torch.float32: 1e-5}[dtype]
    assert gradient_error(results[:1], [expected], [hidden], [g]) < tolerance


def test_long():
    """N V beyond 2^31 elements, and more rows than one launch takes."""
    hidden, weight, target = problem(20000, 64, 129920)
    for mode in MODES.values():
        logp = kernels.linear_logp(hidden, weight, target, backend="triton", budget=mode)
        d_hidden, d_weight = torch.autograd.grad(logp.sum(), [hidden, weight])
        last = slice(19900, 20000)
        expected, _ = reference(hidden[last], weight, target[last])
        assert (logp[last] - expected).abs().max() <= tensor_core_bound(hidden[last], weight)
        assert (
            error(d_hidden[last], torch.autograd.grad(expected.sum(), hidden)[0][last]) < 5e-3
            and d_weight.isfinite().all()
        )


def test_the_rest():
    logits = (torch.randn(300, 50257, device="cuda") * 5).bfloat16().requires_grad_()
    target = torch.randint(50257, (300,), device="cuda")
    poison()
    logp = kernels.logp_from_logits(logits, target, backend="triton")
    expected = torch.log_softmax(logits.double(), 1).gather(1, target[:, None])[:, 0]
    assert (logp - expected).abs().max() <= 2e-5
    assert error(*(torch.autograd.grad(x.sum(), logits)[0] for x in (logp, expected))) < 5e-3
    x, cu = torch.randn(5000, device="cuda"), torch.tensor([0, 0, 3, 5000], device="cuda", dtype=torch.int32)
    sums = kernels.segment_sum(x, cu, backend="triton")
    assert (sums - torch.stack([x[:0].sum(), x[:3].sum(), x[3:].double().sum().float()])).abs().max() < 1e-4


def test_auto_compile_and_bad_target():
    """ "auto" is triton here; torch.compile makes one graph; a target outside 0..V-1 gives NaN."""
    hidden, weight, target = problem(300, 768, 50257)
    actual = kernels.linear_logp(hidden, weight, target)
    assert torch.equal(actual, kernels.linear_logp(hidden, weight, target, backend="triton"))
    compiled = torch.compile(lambda h, w, t: kernels.linear_logp(h * 1, w, t).sum(), fullgraph=True)
    (d,) = torch.autograd.grad(compiled(hidden, weight, target), hidden)
    assert error(d, torch.autograd.grad(actual.sum(), hidden)[0]) < 5e-3
    target[3] = 50257
    assert kernels.linear_logp(hidden, weight, target).isnan().nonzero().tolist() == [[3]]
