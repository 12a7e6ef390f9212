"""What floating point does to losses: ties, overflow, narrow dtypes."""

import pytest
import torch

from nanoroads import losses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    a, b, c, d = torch.randn(4, 6, 2).to(dtype)
    outputs = [f(*pair, 0.1) for pair in [(a, b, c, d)] for f in (losses.dpo, losses.ipo, losses.hinge)]
    outputs += [losses.bradley_terry(a, b), losses.reference_free(a, b, 0.1), losses.policy_gradient(a, b)]
    outputs += [losses.simpo(a, b, torch.tensor([3, 4]), torch.tensor([5, 6]), 0.1, 0.5)]
    outputs += [f(a) for f in (losses.rloo_advantage, losses.grpo_advantage, losses.reinforce_advantage)]
    outputs += [*losses.clipped_policy_gradient(a, b, c), losses.rebel(a, b, c, 0.5)]
    outputs += [losses.online_dpo(a, b, c, 0.1), losses.online_dpo(a, b, c, 0.1, "soft")]
    outputs += [f(a, b) for f in (losses.kl_k1, losses.kl_k2, losses.kl_k3)]
    assert all(x.dtype == dtype for x in outputs)


def test_large_margins_in_fp32():
    zero = torch.zeros(1)
    for m, value, slope in ((500.0, 0.0, 0.0), (-500.0, 500.0, -1.0)):
        logp = torch.tensor([m], requires_grad=True)
        loss = losses.dpo(logp, zero, zero, zero, 1.0)
        loss.backward()
        assert loss.item() == value and logp.grad.item() == slope


def test_k3_of_close_policies_in_fp32():
    d = torch.tensor([1e-3, -1e-3])  # d^2/2 + d^3/6, which exp(d) - 1 - d loses to rounding
    torch.testing.assert_close(losses.kl_k3(-d, torch.zeros(2)), d**2 / 2 + d**3 / 6, rtol=1e-3, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1000.1, -7.3e5, 1e-8, 3.1e12])
@pytest.mark.parametrize("k", [2, 3, 7, 25])
def test_tied_rewards_have_no_advantage_at_any_offset(offset, k):
    """The mean of equal fp32 numbers is not that number: 1000.1 seven times gave an advantage of .54."""
    reward = torch.full((3, k), offset)
    for advantage in (losses.grpo_advantage, losses.rloo_advantage, losses.reinforce_advantage):
        assert (advantage(reward) == 0).all()
    assert (losses.grpo_advantage(reward, scale=False) == 0).all()
    # One prompt that ties beside one that does not.
    mixed = torch.stack([torch.full((k,), offset), torch.linspace(0, 1, k)])
    for advantage in (losses.grpo_advantage, losses.rloo_advantage):
        assert (advantage(mixed)[0] == 0).all() and (advantage(mixed)[1] != 0).any()


def test_advantages_are_those_of_fp64():
    reward = torch.rand(40, 8, generator=torch.Generator().manual_seed(0)) + 3.0
    wide = reward.double()
    mean = wide.mean(1, keepdim=True)
    wanted = (wide - mean) / (wide.std(1, keepdim=True) + 1e-4)
    assert (losses.grpo_advantage(reward) - wanted).abs().max() < 1e-5
    assert (losses.rloo_advantage(reward) - (wide - mean) * 8 / 7).abs().max() < 1e-6
    assert (losses.reinforce_advantage(reward) - (wide - wide.mean())).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [25.0, 100.0, 1e4, 1e30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_far_from_the_old_policy_losses_and_gradients_are_finite(dtype, log_ratio, sign):
    old = torch.zeros(4, dtype=dtype)
    lengths = torch.tensor([2, 2])
    for away in (log_ratio, -log_ratio):
        logp = torch.full((4,), away, dtype=dtype, requires_grad=True)
        loss, clipped = losses.clipped_policy_gradient(logp, old, torch.full((4,), sign, dtype=dtype))
        if sign > 0 and away > 0:
            assert loss.tolist() == pytest.approx([-1.2] * 4) and (clipped == 1).all()
        loss.sum().backward()
        assert loss.isfinite().all() and logp.grad.isfinite().all()

        logp = torch.full((4,), away, dtype=dtype, requires_grad=True)
        advantage = torch.full((2,), sign, dtype=dtype)
        loss, _ = losses.grpo(logp, old, old, advantage, lengths, beta=0.1)
        loss.sum().backward()
        assert loss.isfinite().all() and logp.grad.isfinite().all()


@pytest.mark.parametrize("label", ["hard", "soft"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_tied_prompt_has_no_gradient_whatever_its_log_probs(label, bad):
    logp = torch.tensor([[bad, -2.0, bad], [-1.0, -2.0, -3.0]], requires_grad=True)
    ref_logp = torch.tensor([[-1.0, bad, -1.0], [-1.0, -1.0, -1.0]])
    reward = torch.tensor([[0.3, 0.3, 0.3], [0.0, 1.0, 2.0]])
    loss = losses.online_dpo(logp, ref_logp, reward, beta=0.5, label=label)
    loss.sum().backward()
    assert loss[0] == 0 and (logp.grad[0] == 0).all()
    alone = logp.detach()[1:].requires_grad_()
    wanted = losses.online_dpo(alone, ref_logp[1:], reward[1:], beta=0.5, label=label)
    wanted.sum().backward()
    assert torch.equal(loss[1:], wanted) and torch.equal(logp.grad[1:], alone.grad)
