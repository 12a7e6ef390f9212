"""The losses: values worked out by hand, fp64 gradcheck, and what the papers claim of them, by exact enumeration of a bandit."""

import math

import pytest
import torch

from nanoroads import losses

LN2 = math.log(2)
F64 = torch.float64


def t(*values):
    return torch.tensor(values, dtype=F64)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def leaf(x):
    return x.detach().clone().requires_grad_()


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64) * scale


def check_value(got, want, tol=1e-12):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), atol=tol, rtol=tol)


# ---------------------------------------------------------------- step 0, where policy and reference agree

EQUAL = t(-40.0, -55.5), t(-60.0, -31.25), t(-40.0, -55.5), t(-60.0, -31.25)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.5])
def test_step_zero_of_the_pair_losses(beta):
    check_value(losses.dpo(*EQUAL, beta), [LN2, LN2])
    check_value(losses.dpo(*EQUAL, beta, label_smoothing=0.1), [LN2, LN2])
    check_value(losses.hinge(*EQUAL, beta), [1.0, 1.0])
    check_value(losses.ipo(*EQUAL, beta), [{0.05: 100.0, 0.1: 25.0, 0.5: 1.0}[beta]] * 2, 1e-9)
    check_value(losses.bradley_terry(t(3.0), t(3.0)), [LN2])


def test_first_epoch_of_ppo_has_ratio_one_and_clips_nothing():
    logp, advantage = leaf(random(50, scale=3)), random(50, seed=1)
    loss, clipped = losses.clipped_policy_gradient(logp, logp.detach(), advantage)
    check_value(loss, -advantage, 0)  # the ratio is exactly 1
    assert clipped.mean() == 0
    loss.sum().backward()
    check_value(logp.grad, -advantage, 0)


# ---------------------------------------------------------------- pairs, by hand

# chosen: log(pi/ref) = -10 + 12 = 2; rejected: -9 + 8 = -1; so h = 3 and m = 3 beta
PAIR = t(-10.0), t(-9.0), t(-12.0), t(-8.0)


def test_implicit_reward_and_margin_by_hand():
    check_value(losses.implicit_reward(t(-10.0), t(-12.0), 0.25), [0.25 * (-10 + 12)])
    check_value(losses.margin(*PAIR, 0.25), [0.25 * ((-10 + 12) - (-9 + 8))])


def test_bradley_terry_by_hand():
    check_value(losses.bradley_terry(t(2.0, -1.0), t(0.5, 3.0)), [-math.log(sigmoid(2 - 0.5)), -math.log(sigmoid(-1 - 3))])


def test_dpo_by_hand():
    check_value(losses.dpo(*PAIR, 0.2), [-math.log(sigmoid(0.2 * 3))])
    want = -0.9 * math.log(sigmoid(0.6)) - 0.1 * math.log(sigmoid(-0.6))
    check_value(losses.dpo(*PAIR, 0.2, label_smoothing=0.1), [want])


def test_ipo_hinge_reference_free_and_simpo_by_hand():
    check_value(losses.ipo(*PAIR, 0.25), [(3 - 1 / (2 * 0.25)) ** 2])
    check_value(losses.hinge(*PAIR, 0.25), [1 - 0.25 * 3])
    check_value(losses.hinge(*PAIR, 0.5), [0.0])  # m = 1.5 > 1
    check_value(losses.reference_free(t(-3.0), t(-5.0), 0.5), [-math.log(sigmoid(0.5 * (-3 + 5)))])
    got = losses.simpo(t(-6.0), t(-20.0), t(3.0), t(5.0), beta=2.0, gamma=1.5)
    check_value(got, [-math.log(sigmoid(2 * (-6 / 3 + 20 / 5) - 1.5))])


def test_dpo_stays_finite_far_from_zero():
    far = torch.tensor([1e4, -1e4])
    loss = losses.dpo(far, torch.zeros(2), torch.zeros(2), torch.zeros(2), 1.0)
    check_value(loss, [0.0, 1e4])


# ---------------------------------------------------------------- advantages, by hand


def test_advantages_by_hand():
    reward = t([1.0, 2.0, 6.0], [0.0, 0.0, 3.0])
    check_value(losses.rloo_advantage(reward), [[1 - 4, 2 - 3.5, 6 - 1.5], [0 - 1.5, 0 - 1.5, 3 - 0]])
    check_value(losses.reinforce_advantage(reward), [[1 - 2, 2 - 2, 6 - 2], [-2, -2, 3 - 2]])
    check_value(losses.grpo_advantage(reward, scale=False), [[1 - 3, 2 - 3, 6 - 3], [-1, -1, 3 - 1]])
    std = [math.sqrt((4 + 1 + 9) / 2) + 1e-4, math.sqrt((1 + 1 + 4) / 2) + 1e-4]
    want = [[-2 / std[0], -1 / std[0], 3 / std[0]], [-1 / std[1], -1 / std[1], 2 / std[1]]]
    check_value(losses.grpo_advantage(reward), want)


def test_advantages_sum_to_zero_and_equal_rewards_give_none():
    reward = random(7, 4)
    for advantage in (losses.rloo_advantage(reward), losses.grpo_advantage(reward), losses.grpo_advantage(reward, scale=False)):
        check_value(advantage.sum(1), torch.zeros(7), 1e-12)
    check_value(losses.reinforce_advantage(reward).sum(), 0.0, 1e-12)
    for advantage in (losses.rloo_advantage, losses.grpo_advantage, losses.reinforce_advantage):
        check_value(advantage(torch.full((2, 3), 0.5)), torch.zeros(2, 3), 0)


@pytest.mark.parametrize("advantage", [losses.rloo_advantage, losses.grpo_advantage])
def test_one_sample_a_prompt_raises(advantage):
    with pytest.raises(ValueError, match=advantage.__name__):
        advantage(torch.zeros(3, 1))


# ---------------------------------------------------------------- on-policy losses, by hand


def test_policy_gradient_by_hand():
    logp, advantage = leaf(t(-2.0, -3.0)), leaf(t(0.5, -4.0))
    loss = losses.policy_gradient(logp, advantage)
    check_value(loss, [0.5 * 2, -4.0 * 3])
    loss.sum().backward()
    check_value(logp.grad, [-0.5, 4.0])
    assert advantage.grad is None


def test_clipped_policy_gradient_by_hand():
    ratio = [1.5, 1.5, 0.5, 0.5, 1.1, 1.25]
    sign = t(2.0, -2.0, 2.0, -2.0, 3.0, 2.0)
    logp, old = leaf(torch.log(t(*ratio)) - 4), leaf(torch.full((6,), -4.0, dtype=F64))
    loss, clipped = losses.clipped_policy_gradient(logp, old, sign)
    check_value(loss, [-1.2 * 2, 1.5 * 2, -0.5 * 2, 0.8 * 2, -1.1 * 3, -1.2 * 2])
    check_value(clipped, [1, 0, 0, 1, 0, 1])
    loss.sum().backward()
    check_value(logp.grad, [0, 1.5 * 2, -0.5 * 2, 0, -1.1 * 3, 0])  # a clipped token has no gradient
    assert old.grad is None
    loss, clipped = losses.clipped_policy_gradient(logp, old, sign, clip=0.4, clip_high=0.28)
    check_value(loss, [-1.28 * 2, 1.5 * 2, -0.5 * 2, 0.6 * 2, -1.1 * 3, -1.25 * 2])
    check_value(clipped, [1, 0, 0, 1, 0, 0])


def test_online_dpo_by_hand():
    # best: sample 2, log(pi/ref) = -7 + 9 = 2; worst: sample 0, -3 + 2 = -1; m = 0.2 * 3
    logp, ref, reward = t([-3.0, -5.0, -7.0]), t([-2.0, -5.0, -9.0]), t([0.1, 0.4, 0.9])
    check_value(losses.online_dpo(logp, ref, reward, 0.2), [-math.log(sigmoid(0.6))])
    q = sigmoid(0.9 - 0.1)
    want = -q * math.log(sigmoid(0.6)) - (1 - q) * math.log(sigmoid(-0.6))
    check_value(losses.online_dpo(logp, ref, reward, 0.2, label="soft"), [want])
    with pytest.raises(ValueError, match="label is 'best'"):
        losses.online_dpo(logp, ref, reward, 0.2, label="best")


@pytest.mark.parametrize("label", ["hard", "soft"])
def test_online_dpo_says_nothing_of_a_tie(label):
    logp, ref, reward = leaf(random(2, 3)), random(2, 3, seed=1), leaf(t([1.0, 1.0, 1.0], [1.0, 0.0, 0.5]))
    loss = losses.online_dpo(logp, ref, reward, 0.5, label)
    assert loss[0] == 0 and loss[1] > 0
    loss.sum().backward()
    assert (logp.grad[0] == 0).all() and logp.grad.isfinite().all()
    assert logp.grad[1, 0] < 0 < logp.grad[1, 1] and logp.grad[1, 2] == 0  # up with the best, down with the worst
    assert reward.grad is None


def test_rebel_by_hand():
    logp, old, reward = leaf(t([-3.0, -6.0])), leaf(t([-4.0, -5.5])), leaf(t([2.0, 0.5]))
    loss = losses.rebel(logp, old, reward, eta=0.5)
    check_value(loss, [((1 - -0.5) / 0.5 - (2 - 0.5)) ** 2])
    loss.sum().backward()
    check_value(logp.grad, [[2 * 1.5 / 0.5, -2 * 1.5 / 0.5]])
    assert old.grad is None and reward.grad is None


def test_rebel_is_zero_at_its_target_and_raises_the_better_sample_before():
    old, reward = random(5, 2, scale=3), random(5, 2, seed=1)
    check_value(losses.rebel(old + 0.7 * reward + random(5, 1, seed=2), old, reward, eta=0.7), torch.zeros(5), 1e-20)
    logp = leaf(old)
    losses.rebel(logp, old, reward, eta=0.7).sum().backward()
    assert (logp.grad[:, 0].sign() == (reward[:, 1] - reward[:, 0]).sign()).all()
    check_value(logp.grad.sum(1), torch.zeros(5))


# ---------------------------------------------------------------- fp64 gradcheck of every loss


GRADCHECK = {
    "implicit_reward": lambda a, b, c, d: losses.implicit_reward(a, b, 0.3),
    "bradley_terry": lambda a, b, c, d: losses.bradley_terry(a, b),
    "margin": lambda a, b, c, d: losses.margin(a, b, c, d, 0.3),
    "dpo": lambda a, b, c, d: losses.dpo(a, b, c, d, 0.3),
    "cdpo": lambda a, b, c, d: losses.dpo(a, b, c, d, 0.3, 0.2),
    "ipo": lambda a, b, c, d: losses.ipo(a, b, c, d, 0.3),
    "hinge": lambda a, b, c, d: losses.hinge(a, b, c, d, 0.3),
    "reference_free": lambda a, b, c, d: losses.reference_free(a, b, 0.3),
    "simpo": lambda a, b, c, d: losses.simpo(a, b, t(2.0, 3.0, 4.0), t(5.0, 1.0, 2.0), 2.0, 0.5),
    "rloo": lambda a, b, c, d: losses.rloo_advantage(torch.stack([a, b, c], 1)),
    "grpo": lambda a, b, c, d: losses.grpo_advantage(torch.stack([a, b, c], 1)),
    "grpo unscaled": lambda a, b, c, d: losses.grpo_advantage(torch.stack([a, b, c], 1), scale=False),
    "reinforce": lambda a, b, c, d: losses.reinforce_advantage(torch.stack([a, b, c], 1)),
    "policy_gradient": lambda a, b, c, d: losses.policy_gradient(a, t(0.3, -1.2, 2.0)),
    "clipped": lambda a, b, c, d: losses.clipped_policy_gradient(a, OLD[:, 0], t(0.3, -1.2, 2.0), 0.3)[0],
    "online_dpo": lambda a, b, c, d: losses.online_dpo(torch.stack([a, b], 1), torch.stack([c, d], 1), REWARD, 0.3),
    "soft": lambda a, b, c, d: losses.online_dpo(torch.stack([a, b], 1), torch.stack([c, d], 1), REWARD, 0.3, "soft"),
    "rebel": lambda a, b, c, d: losses.rebel(torch.stack([a, b], 1), OLD, REWARD, 0.3),
    "k1": lambda a, b, c, d: losses.kl_k1(a, b),
    "k2": lambda a, b, c, d: losses.kl_k2(a, b),
    "k3": lambda a, b, c, d: losses.kl_k3(a, b),
}
REWARD = t([0.2, 0.9], [1.5, 0.1], [0.5, 0.5])
OLD = random(3, 2, seed=0)


@pytest.mark.parametrize("name", GRADCHECK)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(GRADCHECK[name], [leaf(random(3, seed=seed)) for seed in range(4)])


# ---------------------------------------------------------------- a bandit, enumerated

ARMS, BETA = 5, 0.5
REF = random(ARMS, seed=10, scale=0.5).log_softmax(0)
TRUE = random(ARMS, seed=11, scale=0.5)  # the reward that the preferences come from
FIRST, SECOND = torch.combinations(torch.arange(ARMS)).T  # every pair of arms, (10,)
PREFERRED = torch.sigmoid(TRUE[FIRST] - TRUE[SECOND])  # P(first > second)


def maximise(objective, theta, steps, rate):
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(objective(theta), theta)
        theta = leaf(theta + rate * gradient)
    return theta.detach().log_softmax(0)


def pair_loss(loss):
    """The expected loss of all pairs, each drawn as often as the other, labelled by Bradley-Terry on TRUE."""
    return (PREFERRED * loss(FIRST, SECOND) + (1 - PREFERRED) * loss(SECOND, FIRST)).mean()


def dpo_loss(logp):
    return pair_loss(lambda a, b: losses.dpo(logp[a], logp[b], REF[a], REF[b], BETA))


def reward_model_loss(reward):
    return pair_loss(lambda a, b: losses.bradley_terry(reward[a], reward[b]))


def regularised(logp, reward, tau):
    """E[r] - tau KL(pi || pi_ref), summed over every arm."""
    return (logp.exp() * (reward - tau * (logp - REF))).sum()


def soft_optimum(reward, tau):
    return (REF + reward / tau).log_softmax(0)


@pytest.fixture(scope="module")
def pi_dpo():
    return maximise(lambda theta: -dpo_loss(theta.log_softmax(0)), leaf(REF), 1200, 40.0)


def test_theorem_2_2_stage_one_is_dpo():
    theta = leaf(random(ARMS, seed=12))
    value, gradients = [], []
    for loss in (dpo_loss, lambda logp: reward_model_loss(losses.implicit_reward(logp, REF, BETA))):
        value.append(loss(theta.log_softmax(0)))
        gradients.append(torch.autograd.grad(value[-1], theta)[0])
    check_value(value[0], value[1].detach(), 1e-14)
    check_value(gradients[0], gradients[1], 1e-14)
    assert gradients[0].abs().max() > 1e-2


def test_theorem_2_2_dpo_finds_the_optimal_policy_of_the_true_reward(pi_dpo):
    check_value(pi_dpo, soft_optimum(TRUE, BETA), 1e-9)  # the class holds it, and the data is unlimited


def test_theorem_2_2_stage_two_returns_pi_dpo_at_beta_and_a_tempered_one_elsewhere(pi_dpo):
    reward = losses.implicit_reward(pi_dpo, REF, BETA)
    check_value(soft_optimum(reward, BETA), pi_dpo, 1e-12)
    for tau in (BETA / 2, 2 * BETA):
        tempered = (REF + (BETA / tau) * (pi_dpo - REF)).log_softmax(0)
        check_value(soft_optimum(reward, tau), tempered, 1e-12)
        assert (tempered - pi_dpo).abs().max() > 0.1


@pytest.mark.parametrize("tau", [BETA, 2 * BETA])
def test_theorem_2_2_gradient_ascent_on_the_regularised_objective_gets_there(pi_dpo, tau):
    reward = losses.implicit_reward(pi_dpo, REF, BETA)
    found = maximise(lambda theta: regularised(theta.log_softmax(0), reward, tau), leaf(REF), 1500, 3.0)
    check_value(found, (REF + (BETA / tau) * (pi_dpo - REF)).log_softmax(0), 1e-8)


def all_tuples(k):
    return torch.cartesian_prod(*[torch.arange(ARMS)] * k)  # (ARMS^k, k)


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("k", [2, 3])
def test_rloo_policy_gradient_is_unbiased(k, kl):
    theta = leaf(random(ARMS, seed=13))
    logp = theta.log_softmax(0)
    sample = all_tuples(k)
    chance = logp[sample].sum(1).exp().detach()  # (ARMS^k,) of drawing this tuple
    reward = TRUE[sample] - kl * losses.kl_k1(logp, REF)[sample]
    loss = losses.policy_gradient(logp[sample], losses.rloo_advantage(reward)).mean(1)
    (got,) = torch.autograd.grad((chance * loss).sum(), theta)
    want_logp = theta.log_softmax(0)
    (want,) = torch.autograd.grad(-regularised(want_logp, TRUE, kl), theta)
    check_value(got, want, 1e-13)
    assert want.abs().max() > 1e-2


def test_grpo_advantage_without_the_scale_is_rloo_shrunk_by_its_k(k=3):
    reward = TRUE[all_tuples(k)]
    check_value(losses.grpo_advantage(reward, scale=False) * k / (k - 1), losses.rloo_advantage(reward), 1e-12)


# ---------------------------------------------------------------- KL estimators


def test_kl_estimators_by_hand():
    logp, ref = t(-1.0, -3.0), t(-1.5, -2.0)
    check_value(losses.kl_k1(logp, ref), [0.5, -1.0])
    check_value(losses.kl_k2(logp, ref), [0.5**2 / 2, 1.0**2 / 2])
    check_value(losses.kl_k3(logp, ref), [math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0])


def spread(estimate, p):
    mean = (p * estimate).sum()
    return mean, (p * (estimate - mean) ** 2).sum().sqrt()


def test_kl_estimators_on_a_categorical():
    for seed, scale in ((0, 0.1), (1, 1.0), (2, 3.0)):
        logp, ref = random(30, seed=seed, scale=scale).log_softmax(0), random(30, seed=seed + 20).log_softmax(0)
        p = logp.exp()
        kl = (p * (logp - ref)).sum()
        k1, k2, k3 = losses.kl_k1(logp, ref), losses.kl_k2(logp, ref), losses.kl_k3(logp, ref)
        check_value(spread(k1, p)[0], kl, 1e-12)
        check_value(spread(k3, p)[0], kl, 1e-12)
        assert (k1 < 0).any() and (k2 >= 0).all() and (k3 >= 0).all()


def test_k3_spreads_more_than_k1_between_distant_policies_and_less_between_near_ones():
    for slope, distant in ((0.1, False), (4.0, True)):
        logp = torch.linspace(0, slope, 30, dtype=F64).log_softmax(0)
        std1, std3 = (spread(estimator(logp, logp.flip(0)), logp.exp())[1] for estimator in (losses.kl_k1, losses.kl_k3))
        assert (std3 > 2 * std1) if distant else (std3 < 0.5 * std1)


def test_k3_of_near_policies_does_not_cancel_in_fp32():
    logp = torch.tensor([-1.0, -1.0])
    ref = logp + torch.tensor([2.0**-10, -(2.0**-10)])
    check_value(losses.kl_k3(logp, ref).double(), [2.0**-21 + 2.0**-30 / 6, 2.0**-21 - 2.0**-30 / 6], 2e-10)


def test_gradient_of_k2_on_policy_is_that_of_the_kl():
    theta = leaf(random(ARMS, seed=14))
    logp = theta.log_softmax(0)
    (want,) = torch.autograd.grad((logp.exp() * (logp - REF)).sum(), theta, retain_graph=True)
    (got,) = torch.autograd.grad((logp.exp().detach() * losses.kl_k2(logp, REF)).sum(), theta)
    check_value(got, want, 1e-13)
    (of_k1,) = torch.autograd.grad((theta.log_softmax(0).exp().detach() * losses.kl_k1(theta.log_softmax(0), REF)).sum(), theta)
    check_value(of_k1, torch.zeros(ARMS), 1e-13)  # k1 as a loss says nothing: it belongs inside the reward
