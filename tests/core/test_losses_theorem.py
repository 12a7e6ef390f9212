"""Policy gradients, and Theorem 2.2 (Swamy et al., 2503.01067), by enumeration on a bandit of routes."""

import itertools

import pytest
import torch

from nanoroads import losses


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


# ---------------------------------------------------------------- policy gradients by enumeration


def tuples(n, k):
    """Every draw of k arms out of n, (n^k, k)."""
    return torch.tensor(list(itertools.product(range(n), repeat=k)))


def regularised_value(logp, ref, reward, tau):
    """E_pi[r] - tau KL(pi || pi_ref), exactly."""
    return (logp.exp() * (reward - tau * (logp - ref))).sum()


@pytest.mark.parametrize(
    "advantage, share",
    [  # share of the true gradient that the estimate has in expectation, k = 3
        (losses.rloo_advantage, 1),
        (lambda r: losses.grpo_advantage(r, scale=False), 1 - 1 / 3),
        (lambda r: torch.stack([losses.reinforce_advantage(row[None])[0] for row in r]), 1 - 1 / 3),
    ],
    ids=["rloo", "grpo without scale", "reinforce"],
)
def test_expected_policy_gradient(advantage, share):
    """E over all 4^3 draws of the estimate, k1 inside the reward == the gradient of -(E[r] - tau KL).

    The latter by autograd."""
    theta, ref = t(0.5, -1, 0.2, 1).requires_grad_(), torch.log_softmax(t(0.1, 0.9, -0.4, 0), 0)
    reward, tau = t(1, 3, -2, 0.5), 0.6
    logp, draws = torch.log_softmax(theta, 0), tuples(4, 3)
    regularised = reward - tau * losses.kl_k1(logp, ref).detach()
    loss = losses.policy_gradient(logp[draws], advantage(regularised[draws])).mean(1)  # (64,)
    (estimate,) = torch.autograd.grad(
        (logp[draws].sum(1).exp().detach() * loss).sum(), theta, retain_graph=True
    )
    (exact,) = torch.autograd.grad(-regularised_value(logp, ref, reward, tau), theta)
    close(estimate, share * exact)
    assert exact.abs().min() > 0.01


# ---------------------------------------------------------------- Theorem 2.2: the roads are one

# Trajectories of two moves, three choices each: nine responses to one prompt. A policy is theta
# (4, 3): logits of the first move, then of the second after each first. Pi, the class that DPO
# searches, is (2, 3): a second move blind to the first.

BETA = 0.4


def trajectory_logp(theta):
    """theta (4, 3), or (2, 3) for a policy in Pi -> log pi of the nine trajectories, (9,)."""
    first, second = torch.log_softmax(theta[0], 0), torch.log_softmax(theta[1:], 1)
    return (first[:, None] + second).flatten()


@pytest.fixture(scope="module")
def dpo_fit():
    """(log pi_ref, log pi_DPO, true reward), (9,) each: DPO's optimum within Pi on all pairs.

    They are labelled by a reward that no policy of Pi is optimal for. pi_ref is in Pi."""
    torch.manual_seed(0)
    ref = trajectory_logp(torch.randn(2, 3, dtype=torch.float64))
    truth = torch.randn(9, dtype=torch.float64)
    chosen, rejected = tuples(9, 2).unbind(1)
    share = torch.sigmoid(truth[chosen] - truth[rejected])  # of the annotators who prefer `chosen`
    theta = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        logp = trajectory_logp(theta)
        loss = (share * losses.dpo(logp[chosen], logp[rejected], ref[chosen], ref[rejected], BETA)).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    assert theta.grad.abs().max() < 1e-9
    return ref, trajectory_logp(theta.detach()), truth


def soft_optimum(ref, reward, tau):
    """log of pi_ref exp(r/tau)/Z."""
    return torch.log_softmax(ref + reward / tau, 0)


def kl(p, q):
    return (p.exp() * (p - q)).sum().item()


def test_stage_1_over_local_rewards_is_dpo():
    torch.manual_seed(1)
    ref = trajectory_logp(torch.randn(4, 3, dtype=torch.float64))
    chosen, rejected = torch.randint(9, (2, 40))
    theta = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    logp = trajectory_logp(theta)
    reward = BETA * (logp - ref)  # r restricted to R(Pi)
    likelihood = losses.bradley_terry(reward[chosen], reward[rejected])
    offline = losses.dpo(logp[chosen], logp[rejected], ref[chosen], ref[rejected], BETA)
    close(likelihood, offline)
    gradients = [torch.autograd.grad(x.mean(), theta, retain_graph=True)[0] for x in (likelihood, offline)]
    close(*gradients)
    assert gradients[0].abs().max() > 0.01
    close(losses.implicit_reward(logp, ref, BETA), reward)


def test_stage_2_gives_dpo_back(dpo_fit):
    ref, dpo, truth = dpo_fit
    local = losses.implicit_reward(dpo, ref, BETA)
    close(soft_optimum(ref, local, BETA), dpo)
    for tau in (0.2, 1.0):  # another temperature gives the tempered policy, a different one
        tempered = torch.log_softmax(ref + (BETA / tau) * (dpo - ref), 0)
        close(soft_optimum(ref, local, tau), tempered)
        assert kl(tempered, dpo) > 0.05
    assert (
        kl(soft_optimum(ref, truth, BETA), dpo) > 0.05
    )  # a global reward does not lead back: the theorem needs R(Pi)


@pytest.mark.parametrize("tau", [BETA, 0.2, 1.0])
def test_policy_gradient_reaches_the_soft_optimum(dpo_fit, tau):
    """Stage 2 with the losses that the script uses, from pi_ref, over every policy.

    In expectation over all nine trajectories."""
    ref, dpo, _ = dpo_fit
    local = losses.implicit_reward(dpo, ref, BETA)
    first = ref.view(3, 3).logsumexp(1)
    theta = torch.cat([first[None], ref.view(3, 3)]).requires_grad_()
    close(trajectory_logp(theta), ref)
    optimizer = torch.optim.Adam([theta], lr=0.1)
    for step in range(2000):
        logp = trajectory_logp(theta)
        advantage = local - tau * losses.kl_k1(logp, ref)
        loss = (logp.exp().detach() * losses.policy_gradient(logp, advantage)).sum()
        optimizer.zero_grad()
        loss.backward()
        if step == 1:
            exact = torch.autograd.grad(-regularised_value(trajectory_logp(theta), ref, local, tau), theta)[0]
            close(theta.grad, exact)
        optimizer.step()
    reached, optimum = trajectory_logp(theta).detach(), soft_optimum(ref, local, tau)
    close(reached.exp(), optimum.exp(), atol=1e-6)
    # the value there is the soft value tau log E_ref[exp(r/tau)]
    close(regularised_value(reached, ref, local, tau), tau * (ref + local / tau).logsumexp(0), atol=1e-9)
    assert (kl(reached, dpo) < 1e-9) == (tau == BETA)
