"""The benchmark calls each peer as that peer is to be called.

None of them but TRL runs without a GPU, so stand-ins have the names, the signatures and the refusals of
the real ones, read in the versions that kernels/peers.py lists, and compute what those promise.
"""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from kernels import bench, peers


def log_probs(hidden, weight, target):
    return torch.log_softmax(hidden @ weight.T, 1).gather(1, target[:, None])[:, 0]


def gradients(saved, grad):
    """Of log_probs, given grad (N,), which kernels read through a pointer: it has to be contiguous."""
    assert grad.is_contiguous()
    hidden, weight, target = saved
    dz = grad[:, None] * (F.one_hot(target, len(weight)) - torch.softmax(hidden @ weight.T, 1))
    return dz @ weight, dz.T @ hidden


# ---------------------------------------------------------------- stand-ins


class Trl9(torch.autograd.Function):
    """TRL 1.16."""

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):
        assert (bias, temperature, final_logit_softcapping, logit_scale) == (None, 1.0, None, 1.0)
        assert chunk_size > 0 and outputs == ()
        ctx.save_for_backward(hidden, weight, targets)
        return log_probs(hidden, weight, targets), None, None, None, None

    @staticmethod
    def backward(ctx, grad, *_):
        return *gradients(ctx.saved_tensors, grad), *[None] * 7


class Trl7(torch.autograd.Function):
    """TRL's file as of another commit: the chunks are its own affair, and all outputs are always there."""

    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature, final_logit_softcapping=None, logit_scale=1.0
    ):
        assert (bias, temperature, final_logit_softcapping, logit_scale) == (None, 1.0, None, 1.0)
        ctx.save_for_backward(hidden, weight, targets)
        logp = log_probs(hidden, weight, targets)
        return logp, logp.detach(), logp.detach(), logp.detach() > 0

    @staticmethod
    def backward(ctx, grad, *_):
        return *gradients(ctx.saved_tensors, grad), *[None] * 5


class Liger(torch.autograd.Function):
    """The negative log-likelihood."""

    @staticmethod
    def forward(
        ctx,
        _input,
        weight,
        target,
        temperature=1.0,
        ignore_index=-100,
        m_tiles_per_cluster=1,
        return_entropy=False,
        selected_token_ids=None,
    ):
        assert (temperature, ignore_index, m_tiles_per_cluster) == (1.0, -100, 1)
        assert not return_entropy and selected_token_ids is None and target.dtype == torch.int64
        ctx.save_for_backward(_input, weight, target)
        return -log_probs(_input, weight, target)

    @staticmethod
    def backward(ctx, grad, grad_entropy=None):
        return *gradients(ctx.saved_tensors, -grad), *[None] * 6


class Verl(torch.autograd.Function):
    """Log-probs and entropies."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature=1.0, reduction="none", dist_process_group=None):
        assert isinstance(temperature, float) and temperature == 1.0
        assert reduction == "none" and dist_process_group is None
        ctx.save_for_backward(hidden, weight, labels)
        p = torch.softmax(hidden @ weight.T, 1)
        return log_probs(hidden, weight, labels), -(p * p.log()).sum(1)

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        assert not grad_entropy.any()
        return *gradients(ctx.saved_tensors, grad), *[None] * 4


def cce_25_1(
    e,
    c,
    targets,
    ignore_index=-100,
    softcap=None,
    reduction="mean",
    shift=False,
    filter_eps="high",
    impl="cce",
):
    assert filter_eps is None and impl == "cce"  # a filter would leave gradients out
    return F.cross_entropy(e @ c.T, targets, reduction=reduction)


def cce_25_6(
    e,
    c,
    targets,
    bias=None,
    ignore_index=-100,
    softcap=None,
    reduction="mean",
    shift=0,
    return_lse=False,
    filter_eps="auto",
    accum_e_fp32=False,
    accum_c_fp32=False,
    filter_e_grad=True,
    filter_c_grad=True,
    impl="cce",
    vocab_parallel_options=None,
):
    assert impl == "cce_exact"  # no filter, and fp32 sums
    return F.cross_entropy(e @ c.T, targets, reduction=reduction)


def quack_function(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None
):
    if reduction not in ("mean", "sum"):
        raise ValueError(f"Invalid reduction: {reduction}")
    return F.cross_entropy(x @ weight.T, target, reduction=reduction)


LIGER = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
STAND_INS = {
    "trl 9": ("trl", "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", Trl9),
    "trl 7": ("trl", "trl.kernels.chunked_logprob", "ChunkedLogProbFunction", Trl7),
    "liger": ("liger-kernel", LIGER, "LigerFusedScaledCrossEntropySM90Function", Liger),
    "cce 25.1": ("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", cce_25_1),
    "cce 25.6": ("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy", cce_25_6),
    "quack": ("quack-kernels", "quack.linear_cross_entropy", "chunked_linear_cross_entropy", quack_function),
    "verl": ("verl", "verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", Verl.apply),
}


def install(monkeypatch, module, **attributes):
    """A module of this name, and its packages."""
    parts = module.split(".")
    for i in range(1, len(parts) + 1):
        name = ".".join(parts[:i])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, value in attributes.items():
        setattr(sys.modules[module], name, value)


# ---------------------------------------------------------------- each is called as it is to be called


@pytest.mark.parametrize("stand_in", STAND_INS)
def test_a_peer_gives_log_probs_and_their_gradients(stand_in, monkeypatch):
    peer, module, name, function = STAND_INS[stand_in]
    install(monkeypatch, module, **{name: function})
    shape = (9, 6, 11)
    _, rows = bench.measure(shape, torch.float32, "cpu", {peer: bench.implementation(peer)}, 1)
    row = rows[peer]  # of a peer that failed there is none
    if stand_in == "quack":
        assert row["logp_error"] is None  # it gives no more than a sum
        x, w, target = bench.problem(*shape, torch.float32, "cpu")
        torch.testing.assert_close(bench.implementation(peer)(x, w, target), log_probs(x, w, target).sum())
    else:
        assert row["logp_error"] < 1e-5
    assert row["d_hidden_error"] < 1e-5 and row["d_weight_error"] < 1e-5


def test_every_peer_has_a_stand_in():
    assert {stand_in[0] for stand_in in STAND_INS.values()} == peers.PEERS.keys()


def test_the_installed_trl():
    pytest.importorskip(
        "trl.kernels.chunked_logprob", reason="TRL 1.16 is missing: pip install -e '.[bench]'"
    )
    found = {name: bench.implementation(name) for name in ("trl", "trl frozen head")}
    _, rows = bench.measure((40, 8, 70), torch.float32, "cpu", found, 1)
    assert rows["trl"]["logp_error"] < 1e-5 and rows["trl"]["d_weight_error"] < 1e-5
    assert rows["trl frozen head"]["d_hidden_error"] < 1e-5


# ---------------------------------------------------------------- none fails without a word


def test_a_peer_that_is_not_installed_says_so(monkeypatch, capsys):
    for peer, module, _, _ in STAND_INS.values():
        monkeypatch.setitem(sys.modules, module, None)  # importing it raises
        monkeypatch.setattr(bench, "CONTENDERS", [peer])
        assert bench.contenders(on_cuda=True) == {}
        printed = capsys.readouterr().out
        assert printed.startswith(f"{peer}: left out, ") and module in printed


def test_a_peer_with_other_arguments_says_so(monkeypatch, capsys):
    class Later:
        @staticmethod
        def forward(ctx, hidden, weight, bias, targets, temperature, top_k):
            pass

    install(monkeypatch, "trl.kernels.chunked_logprob", ChunkedLogProbFunction=Later)
    monkeypatch.setattr(bench, "CONTENDERS", ["trl"])
    assert bench.contenders(on_cuda=False) == {}
    assert (
        capsys.readouterr().out == "trl: left out, ChunkedLogProbFunction has arguments unknown here: top_k\n"
    )


@pytest.mark.parametrize(
    "error, words", [(AssertionError(), "AssertionError"), (TypeError("no fp32"), "no fp32")]
)
def test_a_peer_that_fails_at_a_shape_says_so(error, words, capsys):
    def fails(hidden, weight, target):
        raise error

    _, rows = bench.measure((9, 6, 11), torch.float32, "cpu", {"verl": fails}, 1)
    assert rows == {}
    assert capsys.readouterr().out == f"verl: left out at (9, 6, 11), {words}\n"


# ---------------------------------------------------------------- a frozen head


def test_a_frozen_head_counts_two_products():
    found = {name: bench.implementation(name) for name in ("nanoroads torch", "nanoroads torch frozen head")}
    ceiling, rows = bench.measure((64, 32, 2000), torch.float32, "cpu", found, 3)
    whole, frozen = rows.values()
    assert frozen["d_weight_error"] is None and frozen["d_hidden_error"] < 1e-5
    assert frozen["logp_error"] == whole["logp_error"] < 2e-5
    products = 2 * 64 * 32 * 2000 * 1e-9  # 10^9 operations in each
    assert whole["tflops"] == pytest.approx(3 * products / whole["total_ms"])
    assert frozen["tflops"] == pytest.approx(2 * products / frozen["total_ms"])
    bare_ms = frozen["of_ceiling"] * frozen["total_ms"]
    assert 0 < bare_ms < 0.9 * 3 * products / ceiling  # of two products, not of three
