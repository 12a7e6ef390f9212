"""Losses against hand arithmetic and exact enumeration."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from nanoroads import losses
from nanoroads.errors import InputError

LN2 = math.log(2)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def softplus(x):
    """-log sigmoid(-x), by its definition."""
    return math.log(1 + math.exp(x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---------------------------------------------------------------- gradients, step 0, hand arithmetic


P, K = (5,), (4, 3)
GRADCHECKS = {  # name: (function of the tensors, their shapes)
    "implicit_reward": (lambda a, b: losses.implicit_reward(a, b, 0.3), [P] * 2),
    "bradley_terry": (losses.bradley_terry, [P] * 2),
    "dpo": (lambda *x: losses.dpo(*x, 0.3), [P] * 4),
    "cdpo": (lambda *x: losses.dpo(*x, 0.3, 0.1), [P] * 4),
    "ipo": (lambda *x: losses.ipo(*x, 0.3), [P] * 4),
    "hinge": (lambda *x: losses.hinge(*x, 0.3), [P] * 4),
    "reference_free": (lambda *x: losses.reference_free(*x, 0.3), [P] * 2),
    "simpo": (lambda a, b: losses.simpo(a, b, t(1, 2, 3, 4, 5), t(5, 3, 2, 2, 1), 2.0, 0.5), [P] * 2),
    "rloo_advantage": (losses.rloo_advantage, [K]),
    "grpo_advantage": (losses.grpo_advantage, [K]),
    "grpo_advantage, no scale": (lambda r: losses.grpo_advantage(r, scale=False), [K]),
    "reinforce_advantage": (losses.reinforce_advantage, [K]),
    "policy_gradient": (lambda x: losses.policy_gradient(x, t(1, -2, 0, 0.5, 3)), [P]),
    "clipped_policy_gradient": (
        lambda x: losses.clipped_policy_gradient(x, t(0.7, -0.9, 0, 0.5, 3), t(1, -2, 0, 0.5, -3))[0],
        [P],
    ),
    "online_dpo": (lambda a, b: losses.online_dpo(a, b, t(1, 0, 2).expand(4, 3), 0.3), [K] * 2),
    "online_dpo, soft": (lambda a, b: losses.online_dpo(a, b, t(1, 0, 2).expand(4, 3), 0.3, "soft"), [K] * 2),
    "rebel": (lambda x: losses.rebel(x, t(-1, -2), t([0.5, -1]), 0.7), [(4, 2)]),
    "kl_k1": (losses.kl_k1, [K] * 2),
    "kl_k2": (losses.kl_k2, [K] * 2),
    "kl_k3": (losses.kl_k3, [K] * 2),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    function, shapes = GRADCHECKS[name]
    torch.manual_seed(0)
    assert gradcheck(function, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])


def test_step_0():
    logp, ref = t(-12, -30), t(-12, -30)
    four = logp[:1], logp[1:], ref[:1], ref[1:]
    close(losses.dpo(*four, 0.1), [LN2])
    close(losses.dpo(*four, 0.1, 0.2), [LN2])
    close(losses.bradley_terry(t(0.7), t(0.7)), [LN2])
    for beta, value in ((0.05, 100), (0.1, 25), (0.5, 1)):
        close(losses.ipo(*four, beta), [value])
    close(losses.hinge(*four, 0.1), [1])
    close(losses.rebel(logp[None], ref[None], t(1, 1)[None], 0.5), [0])
    for kl in (losses.kl_k1, losses.kl_k2, losses.kl_k3):
        close(kl(logp, ref), [0, 0])


# chosen -10 (reference -13), rejected -20 (reference -18): h = (-10 - -13) - (-20 - -18) = 3 - -2 = 5
FOUR = t(-10), t(-20), t(-13), t(-18)


def test_pairs_by_hand():
    close(losses.implicit_reward(t(-10, -20), t(-13, -18), 0.1), [0.3, -0.2])
    close(losses.margin(*FOUR, 0.1), [0.5])
    close(losses.bradley_terry(t(2), t(0.5)), [softplus(-1.5)])  # -log sigmoid(1.5)
    close(losses.dpo(*FOUR, 0.1), [softplus(-0.5)])  # m = 0.1 * 5
    close(losses.dpo(*FOUR, 0.1, 0.2), [0.8 * softplus(-0.5) + 0.2 * softplus(0.5)])
    close(losses.ipo(*FOUR, 0.2), [(5 - 2.5) ** 2])  # 1/(2 * 0.2) = 2.5
    close(losses.hinge(*FOUR, 0.1), [0.5])
    close(losses.hinge(*FOUR, 0.3), [0])  # m = 1.5: past the margin
    close(losses.reference_free(t(-10), t(-20), 0.1), [softplus(-1.0)])  # m = 0.1 * 10
    # means per token -10/5 = -2 and -20/4 = -5: m = 2 * 3 - 1 = 5
    close(losses.simpo(t(-10), t(-20), torch.tensor([5]), torch.tensor([4]), 2.0, 1.0), [softplus(-5.0)])
    # IPO on means: (-2 - -2.6) - (-5 - -4.5) = 0.6 - -0.5 = 1.1, less 1/(2 * 1)
    means = [x / n for x, n in zip(FOUR, (5, 4, 5, 4), strict=True)]
    close(losses.ipo(*means, 1.0), [0.6**2])


def test_pairs_relations():
    torch.manual_seed(0)
    w, l, rw, rl = torch.randn(4, 50, dtype=torch.float64)  # noqa: E741
    close(
        (-losses.bradley_terry(w, l)).exp() + (-losses.bradley_terry(l, w)).exp(), torch.ones(50)
    )  # P(a > b) + P(b > a)
    zero = torch.zeros(50, dtype=torch.float64)
    close(losses.reference_free(w, l, 0.4), losses.dpo(w, l, zero, zero, 0.4))
    close(
        losses.dpo(w, l, rw, rl, 0.4, 0.3), losses.dpo(l, w, rl, rw, 0.4, 0.7)
    )  # label 1 - e on the swapped pair
    m = torch.tensor(
        [math.log(0.9 / 0.1)], dtype=torch.float64, requires_grad=True
    )  # cDPO stops at sigmoid(m) = 1 - e
    losses.dpo(m, zero[:1], zero[:1], zero[:1], 1.0, 0.1).backward()
    close(m.grad, [0])


def test_advantages_by_hand():
    reward = t([1, 2, 6], [4, 0, -4])  # means 3 and 0, of all 1.5
    close(
        losses.rloo_advantage(reward), [[1 - 4, 2 - 3.5, 6 - 1.5], [4 + 2, 0, -4 - 2]]
    )  # less the mean of the others
    std = math.sqrt((4 + 1 + 9) / 2) + 1e-4  # of the first row, n - 1
    close(losses.grpo_advantage(reward), [[-2 / std, -1 / std, 3 / std], [4 / 4.0001, 0, -4 / 4.0001]])
    close(losses.grpo_advantage(reward, scale=False), [[-2, -1, 3], [4, 0, -4]])
    close(losses.reinforce_advantage(reward), [[-0.5, 0.5, 4.5], [2.5, -1.5, -5.5]])
    for advantage in (losses.rloo_advantage, losses.grpo_advantage, losses.reinforce_advantage):
        close(advantage(t([7, 7, 7], [7, 7, 7])), torch.zeros(2, 3))
        close(advantage(reward + 100), advantage(reward))  # a constant changes nothing
        close(advantage(reward).sum(), 0)
    close(losses.rloo_advantage(reward).sum(1), [0, 0])
    close(losses.grpo_advantage(reward).sum(1), [0, 0])


def test_policy_gradient_by_hand():
    logp, advantage = t(-3, -5).requires_grad_(), t(2, -0.5).requires_grad_()
    loss = losses.policy_gradient(logp, advantage)
    close(loss, [6, -2.5])
    loss.sum().backward()
    close(logp.grad, [-2, 0.5])  # descent raises log pi where A > 0
    assert advantage.grad is None


def test_clipped_policy_gradient_by_hand():
    # w:   0.5 and 1.5 on both signs of A, then 1.25 for clip_high, then A = 0
    w, advantage = t(0.5, 1.5, 0.5, 1.5, 1.25, 1.5), t(2, 2, -2, -2, 2, 0)
    old = t(-1, -2, -3, -4, -5, -6)
    logp = (old + w.log()).requires_grad_()
    loss, clipped = losses.clipped_policy_gradient(logp, old, advantage)
    # min(1, 1.6)  min(3, 2.4)  min(-1, -1.6)  min(-3, -2.4)  min(2.5, 2.4)  0
    close(loss, [-1.0, -2.4, 1.6, 3.0, -2.4, 0])
    close(clipped, [0, 1, 1, 0, 1, 0])
    loss.sum().backward()
    close(logp.grad, [-0.5 * 2, 0, 0, 1.5 * 2, 0, 0])  # -w A where free
    loss, clipped = losses.clipped_policy_gradient(logp, old, advantage, clip=0.2, clip_high=0.28)
    close(
        loss, [-1.0, -2.56, 1.6, 3.0, -2.5, 0]
    )  # min(3, 1.28 * 2), min(2.5, 2.56): the upper bound moved, the lower not
    close(clipped, [0, 1, 1, 0, 0, 0])


def test_first_epoch_is_the_policy_gradient():
    logp, advantage = t(-3, -5, -0.1).requires_grad_(), t(2, -0.5, 0)
    loss, clipped = losses.clipped_policy_gradient(logp, logp, advantage)  # old_logp is detached inside
    close(loss, -advantage)
    assert clipped.sum() == 0
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    close(gradient, torch.autograd.grad(losses.policy_gradient(logp, advantage).sum(), logp)[0])


def test_online_dpo_by_hand():
    # best is sample 2 (reward 3), worst sample 0 (reward 1): h = (-4 - -6) - (-9 - -8) = 2 - -1 = 3
    logp, ref, reward = t([-9, -5, -4]), t([-8, -7, -6]), t([1, 2, 3])
    close(losses.online_dpo(logp, ref, reward, 0.1), [softplus(-0.3)])
    q = sigmoid(3 - 1)
    close(losses.online_dpo(logp, ref, reward, 0.1, "soft"), [q * softplus(-0.3) + (1 - q) * softplus(0.3)])
    close(losses.online_dpo(logp, ref, reward, 0.1), losses.dpo(t(-4), t(-9), t(-6), t(-8), 0.1))


@pytest.mark.parametrize("label", ["hard", "soft"])
def test_online_dpo_gradients(label):
    logp = t([-9, -5, -4], [-1, -2, -3]).requires_grad_()
    reward = t([1, 2, 3], [5, 5, 5]).requires_grad_()
    losses.online_dpo(logp, logp.detach() + 1, reward, 0.1, label).sum().backward()
    assert (logp.grad[1] == 0).all()  # a prompt with tied rewards
    close(losses.online_dpo(logp, logp.detach() + 1, reward, 0.1, label)[1], 0)
    assert (
        logp.grad[0, 2] < 0 == logp.grad[0, 1] < logp.grad[0, 0]
    )  # descent raises the best, lowers the worst
    assert reward.grad is None
    # the soft label is met where the margin is the gap: sigmoid(m) = sigmoid(r_best - r_worst)
    met = t([1, 0]).requires_grad_()
    losses.online_dpo(met, t([0, 0]), t([1.0, 0.5]), 0.5, "soft").sum().backward()
    close(met.grad, [[0, 0]])


def test_rebel_by_hand():
    # log ratios 1 and -2: 3/0.5 = 6; rewards 5 - 1 = 4: (6 - 4)^2
    logp, old, reward = t([-3, -7]).requires_grad_(), t([-4, -5]).requires_grad_(), t([5, 1]).requires_grad_()
    loss = losses.rebel(logp, old, reward, 0.5)
    close(loss, [4])
    loss.sum().backward()
    assert old.grad is None and reward.grad is None
    close(logp.grad, [[2 * 2 / 0.5, -2 * 2 / 0.5]])
    # its minimum is the mirror descent step pi_old exp(eta r)/Z
    old, reward = torch.log_softmax(t(0.3, -1, 2), 0), t(1, -0.5, 0.2)
    new = torch.log_softmax(old + 0.7 * reward, 0)
    pairs = torch.combinations(torch.arange(3))
    close(losses.rebel(new[pairs], old[pairs], reward[pairs], 0.7), [0, 0, 0])


def test_bad_input():
    one = torch.zeros(3, 1)
    for call in (
        lambda: losses.rloo_advantage(one),
        lambda: losses.grpo_advantage(one),
        lambda: losses.rloo_advantage(torch.zeros(4)),
        lambda: losses.online_dpo(one, one, one, 0.1),
        lambda: losses.rebel(*[torch.zeros(2, 3)] * 3, 1.0),
    ):
        with pytest.raises(ValueError, match="reward must be") as error:
            call()
        assert not isinstance(error.value, InputError)  # which is for what a user gave
    with pytest.raises(ValueError, match="'hrad'") as error:
        losses.online_dpo(*[torch.zeros(2, 2)] * 3, 0.1, "hrad")
    assert not isinstance(error.value, InputError)


def test_grpo_is_its_mean_over_each_response():
    torch.manual_seed(0)
    lengths, advantage, beta = torch.tensor([2, 1, 3]), t(0.7, -1.3, 0.4), 0.3
    logp, old, ref = (torch.randn(6, dtype=torch.float64) for _ in range(3))
    loss, clipped = losses.grpo(logp, old, ref, advantage, lengths, beta)
    expected, at = [], 0
    for n, a in zip(lengths.tolist(), advantage.tolist(), strict=True):
        total = 0.0
        for i in range(at, at + n):
            w = math.exp(logp[i] - old[i])
            total += -min(w * a, min(max(w, 0.8), 1.2) * a) + beta * (
                math.exp(ref[i] - logp[i]) - 1 - (ref[i] - logp[i]).item()
            )
        expected.append(total / n)
        at += n
    close(loss, expected)
    assert clipped.shape == (6,) and 0 < clipped.sum() < 6
    first, none = losses.grpo(old, old, old, advantage, lengths, beta)  # on policy, at the reference
    close(first, -advantage)
    assert not none.any()
    gradcheck(lambda x: losses.grpo(x, old, ref, advantage, lengths, beta)[0], logp.clone().requires_grad_())


# ---------------------------------------------------------------- KL estimators by enumeration


def moments(pi, ref, estimator):
    value = estimator(pi.log(), ref.log())
    mean = (pi * value).sum()
    return mean.item(), (pi * (value - mean) ** 2).sum().sqrt().item(), value


def test_kl_by_hand():
    logp, ref = t(math.log(0.5)), t(math.log(0.2))
    close(losses.kl_k1(logp, ref), [math.log(2.5)])
    close(losses.kl_k2(logp, ref), [math.log(2.5) ** 2 / 2])
    close(losses.kl_k3(logp, ref), [0.4 - 1 + math.log(2.5)])


def test_kl_estimators_of_distant_policies():
    pi, ref = t(0.70, 0.29, 0.01), t(0.12, 0.53, 0.35)
    kl = 0.70 * math.log(0.70 / 0.12) + 0.29 * math.log(0.29 / 0.53) + 0.01 * math.log(0.01 / 0.35)
    (mean1, std1, k1), (mean2, _, k2), (mean3, std3, k3) = (
        moments(pi, ref, k) for k in (losses.kl_k1, losses.kl_k2, losses.kl_k3)
    )
    assert mean1 == pytest.approx(kl, abs=1e-12) and mean3 == pytest.approx(kl, abs=1e-12)
    assert abs(mean2 - kl) > 0.1  # k2 is biased
    assert k1.min() < 0 < k2.min() and k3.min() > 0
    assert (kl, std1, std3) == pytest.approx((1.024, 1.166, 2.974), abs=1e-3)  # k3 is the noisier one here


def test_kl_estimators_of_close_policies():
    pi, ref = t(0.40, 0.35, 0.25), t(0.38, 0.34, 0.28)
    (mean1, std1, _), (mean2, _, _), (mean3, std3, _) = (
        moments(pi, ref, k) for k in (losses.kl_k1, losses.kl_k2, losses.kl_k3)
    )
    assert mean1 == pytest.approx(mean3, abs=1e-12) and mean2 == pytest.approx(mean1, rel=0.05)
    assert std3 < std1 / 10


def test_kl_gradients_as_losses():
    """On samples of pi: k1 has none, k2 has that of KL(pi || ref), k3 that of KL(ref || pi)."""
    theta, ref = t(0.5, -1, 0.2).requires_grad_(), torch.log_softmax(t(-0.7, 0.6, 0.3), 0)
    logp = torch.log_softmax(theta, 0)
    reverse, forward = (logp.exp() * (logp - ref)).sum(), (ref.exp() * (ref - logp)).sum()
    expected = (torch.zeros(()) * logp.sum(), reverse, forward)
    for estimator, kl in zip((losses.kl_k1, losses.kl_k2, losses.kl_k3), expected, strict=True):
        loss = (logp.exp().detach() * estimator(logp, ref)).sum()
        close(*(torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (loss, kl)))
