"""What the estimators estimate, by enumeration of every draw of k out of four responses, in fp64."""

import itertools
import math

import pytest
import torch

from nanoroads import losses


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


THETA = t(0.5, -1, 0.2, 1)
REWARD = t(1, 3, -2, 0.5)


def gradients(advantage_of, k, theta=THETA, reward=REWARD):
    """(expected gradient of the policy gradient loss, the true gradient of -E[r]), (4,) each."""
    theta = theta.clone().requires_grad_()
    logp = torch.log_softmax(theta, 0)
    draws = torch.tensor(list(itertools.product(range(len(theta)), repeat=k)))  # (4^k, k)
    chance = logp[draws].sum(1).exp().detach()
    loss = losses.policy_gradient(logp[draws], advantage_of(reward[draws])).mean(1)
    (estimate,) = torch.autograd.grad((chance * loss).sum(), theta, retain_graph=True)
    (exact,) = torch.autograd.grad(-(logp.exp() @ reward), theta)
    return estimate, exact


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("k", [2, 3, 4])
def test_rloo_is_unbiased_and_dr_grpo_is_short_of_it_by_one_kth(k):
    estimate, exact = gradients(losses.rloo_advantage, k)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-14)
    unscaled, _ = gradients(lambda reward: losses.grpo_advantage(reward, scale=False), k)
    torch.testing.assert_close(unscaled, (1 - 1 / k) * exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize("k, angle", [(2, 0.838), (3, 0.891), (4, 0.933)])
def test_grpo_points_elsewhere(k, angle):
    """The cosine to the true gradient, here: to divide by the std weights the draws differently."""
    estimate, exact = gradients(losses.grpo_advantage, k)
    assert cosine(estimate, exact) == pytest.approx(angle, abs=1e-3)


def grpo_factor(k, p):
    """c in E[GRPO's gradient] = c grad p, for a reward of 0 or 1 with success p."""
    total = 0.0
    for m in range(1, k):  # successes among the k
        chance = math.comb(k, m) * p**m * (1 - p) ** (k - m)
        pull = m * (1 - m / k) / (k * p) + (k - m) * (m / k) / (k * (1 - p))
        total += chance * pull / math.sqrt(m * (k - m) / (k * (k - 1)))
    return total


@pytest.mark.parametrize("p", [0.5, 0.2, 0.05])
@pytest.mark.parametrize("k", [2, 4])
def test_grpo_on_a_binary_reward(k, p):
    """A factor that depends on p, except for k = 2, where to divide by the std does nothing but scale."""
    theta = t(p, (1 - p) / 2, (1 - p) / 2).log()
    estimate, exact = gradients(losses.grpo_advantage, k, theta, t(1, 0, 0))
    torch.testing.assert_close(estimate, grpo_factor(k, p) * exact, rtol=1e-3, atol=1e-12)
    if k == 2:
        assert grpo_factor(2, p) == pytest.approx(1 / math.sqrt(2))


def test_grpo_of_many_samples_climbs_the_arcsine_of_the_success():
    """d/dp 2 arcsin sqrt p = 1 / sqrt(p (1 - p)): Thrampoulidis et al., 2510.23049."""
    assert grpo_factor(64, 0.5) == pytest.approx(1.97, abs=0.01)
    assert grpo_factor(64, 0.05) == pytest.approx(4.30, abs=0.01)
    assert grpo_factor(1000, 0.2) == pytest.approx(1 / math.sqrt(0.2 * 0.8), rel=2e-3)


def online_dpo_gradient(reward, label, beta=0.5):
    """Expected gradient of online DPO with two samples, at pi = pi_ref."""
    theta = THETA.clone().requires_grad_()
    logp = torch.log_softmax(theta, 0)
    draws = torch.tensor(list(itertools.product(range(4), repeat=2)))
    chance = logp[draws].sum(1).exp().detach()
    loss = losses.online_dpo(logp[draws], logp.detach()[draws], reward[draws], beta, label)
    return torch.autograd.grad((chance * loss).sum(), theta)[0]


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_hard_online_dpo_has_the_direction_of_grpo_with_two_samples(scale):
    """Each keeps the sign of r1 - r2 alone."""
    hard = online_dpo_gradient(scale * REWARD, "hard")
    grpo, exact = gradients(losses.grpo_advantage, 2, reward=1e6 * REWARD)  # 1e6: the 1e-4 vanishes
    assert cosine(hard, grpo) == pytest.approx(1, abs=1e-9)
    assert cosine(hard, exact) < 0.96


def test_soft_online_dpo_is_the_policy_gradient_for_small_rewards():
    """Of size beta / 2 times the true gradient."""
    _, exact = gradients(losses.rloo_advantage, 2)
    soft = online_dpo_gradient(1e-3 * REWARD, "soft")
    torch.testing.assert_close(soft, 0.5 / 2 * 1e-3 * exact, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("p, ratio", [(0.501, 4.0), (0.55, 4.013), (0.7, 4.237), (0.9, 5.49), (0.99, 9.38)])
def test_ipo_at_beta_is_dpo_at_four_beta_for_weak_preferences(p, ratio):
    """The margins that each is happy with, where a share p of the annotators prefers the first."""
    beta, zero = 0.5, t(0.0)
    margins = []
    for loss in (losses.dpo, losses.ipo):
        h = torch.linspace(-1, 15, 160_001, dtype=torch.float64)
        expected = p * loss(h, zero, zero, zero, beta) + (1 - p) * loss(-h, zero, zero, zero, beta)
        margins.append(h[expected.argmin()].item())
    assert margins[0] / beta == pytest.approx(math.log(p / (1 - p)) / beta / beta, abs=1e-3)
    assert math.log(p / (1 - p)) / beta / ((2 * p - 1) / (2 * beta)) == pytest.approx(ratio, rel=2e-3)
    assert margins[1] == pytest.approx((2 * p - 1) / (2 * beta), abs=1e-3)


@pytest.mark.parametrize("n", [2, 4, 16, 64])
def test_the_kl_of_best_of_n_is_below_its_formula_where_responses_have_mass(n):
    """And the tilted policy of the same KL earns more."""
    ref = torch.softmax(THETA, 0)
    order = REWARD.argsort()
    below = torch.cat([t(0.0), ref[order].cumsum(0)])
    best = torch.empty(4, dtype=torch.float64)
    best[order] = below[1:] ** n - below[:-1] ** n  # the best is this one
    kl = losses.kl_k1(best.log(), ref.log()) @ best
    assert kl < math.log(n) - (n - 1) / n
    low, high = 0.0, 50.0
    for _ in range(60):  # 1/beta of the tilted policy that has this KL
        tilt = (low + high) / 2
        tilted = torch.softmax(ref.log() + tilt * REWARD, 0)
        if losses.kl_k1(tilted.log(), ref.log()) @ tilted < kl:
            low = tilt
        else:
            high = tilt
    assert tilted @ REWARD > best @ REWARD


@pytest.mark.parametrize("theta", [t(1, -2, 0.5, 0), t(-3, 0.4, 2, 1)])
def test_the_chosen_change_by_half_the_margin_less_the_kl_from_the_reference(theta):
    """For any policy, whatever trained it, on pairs of the reference's samples with Bradley-Terry labels."""
    beta = 0.3
    ref_logp, logp = torch.log_softmax(THETA, 0), torch.log_softmax(theta, 0)
    chosen, rejected = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)  # (16,) each
    wins = 2 * torch.sigmoid(REWARD[chosen] - REWARD[rejected])  # drawn in either order
    chance = (ref_logp[chosen] + ref_logp[rejected]).exp() * wins  # (16,)
    assert chance.sum().item() == pytest.approx(1)
    change = losses.kl_k1(logp, ref_logp)
    margin = losses.margin(logp[chosen], logp[rejected], ref_logp[chosen], ref_logp[rejected], beta)
    kl = ref_logp.exp() @ losses.kl_k1(ref_logp, logp)
    half = chance @ margin / (2 * beta)
    torch.testing.assert_close(chance @ change[chosen], half - kl, rtol=0, atol=1e-14)
    torch.testing.assert_close(chance @ change[rejected], -half - kl, rtol=0, atol=1e-14)
