"""Both roads over three responses in fp64: one prompt, a uniform reference, exact labels, exact optima.

experiments/misspecified.py compares them here. Policies are log-linear, pi ~ pi_ref exp(features @
theta), and rewards linear, features @ w; so a class is a matrix of features (3, D). beta KL(pi ||
pi_ref) holds a policy back on each road.
"""

import torch

from nanoroads import losses
from nanoroads.experiments.exact_fit import minimise

FIRST, SECOND = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])  # the three pairs: 12, 13, 23
REF_LOGP = torch.full((3,), 1 / 3, dtype=torch.float64).log()
OWN_PARAMETERS = torch.eye(3, dtype=torch.float64)  # (3, 3): the class of all policies, or of all rewards


def fp64(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def log_policy(theta, features):
    """theta (D,), features (3, D) -> log pi of the three responses, (3,)."""
    return torch.log_softmax(REF_LOGP + features @ theta, 0)


def least(loss_of, size):
    """The theta (size,) where loss_of(theta) is least."""
    return minimise(loss_of, beside_zero(size), gradient_below=1e-12)


def beside_zero(size):
    """Where a search starts, (size,): in `classes` zero itself is a saddle, by symmetry."""
    theta = torch.zeros(size, dtype=torch.float64)
    theta[0] = 0.01
    return theta


# ---------------------------------------------------------------- the roads


def dpo(reward, weights, features, beta):
    """Road 1, in expectation over pairs drawn with weights (3,) and over their labels -> log pi, (3,)."""
    second_wins = torch.sigmoid(reward[SECOND] - reward[FIRST])  # how often: label smoothing of each pair

    def loss_of(theta):
        logp = log_policy(theta, features)
        loss = losses.dpo(logp[FIRST], logp[SECOND], REF_LOGP[FIRST], REF_LOGP[SECOND], beta, second_wins)
        return (weights * loss).sum()

    return log_policy(least(loss_of, features.shape[1]), features)


def fit_reward(reward, weights, features):
    """Stage 1 of road 2, a Bradley-Terry fit within the class features @ w -> reward model, (3,)."""
    first_wins = torch.sigmoid(reward[FIRST] - reward[SECOND])  # how often

    def loss_of(w):
        score = features @ w
        loss_if_first = losses.bradley_terry(score[FIRST], score[SECOND])
        loss_if_second = losses.bradley_terry(score[SECOND], score[FIRST])
        loss = first_wins * loss_if_first + (1 - first_wins) * loss_if_second
        return (weights * loss).sum()

    return features @ least(loss_of, features.shape[1])


def best_policy(reward_model, features, beta):
    """Stage 2 of road 2, RL without noise: the best E[r] - beta KL of the class -> log pi, (3,)."""

    def loss_of(theta):
        logp = log_policy(theta, features)
        return -value(logp, reward_model, beta)

    return log_policy(least(loss_of, features.shape[1]), features)


def online_dpo(reward, features, beta, rounds=40):
    """DPO again and again, each time on pairs of the last policy's samples."""
    logp = log_policy(beside_zero(features.shape[1]), features)
    for _ in range(rounds):
        weights = (logp[FIRST] + logp[SECOND]).exp()
        logp = dpo(reward, weights / weights.sum(), features, beta)
    return logp


def value(logp, reward, beta=0.0):
    """E_pi[r] - beta KL(pi || pi_ref)."""
    return (logp.exp() * (reward - beta * losses.kl_k1(logp, REF_LOGP))).sum()


# ---------------------------------------------------------------- roads side by side


def both_roads(reward, weights, policies, rewards, beta):
    """{road: log pi (3,)} on the same pairs. policies, rewards (3, D): the classes that are searched."""
    reward_model = fit_reward(reward, weights, rewards)
    return {"dpo": dpo(reward, weights, policies, beta), "rlhf": best_policy(reward_model, policies, beta)}


def values(logps, reward, beta=0.0):
    """{road: E[r] - beta KL} of {road: log pi (3,)}, and in the last place the reference's."""
    found = {}
    for road, logp in logps.items():
        found[road] = value(logp, reward, beta).item()
    found["reference"] = value(REF_LOGP, reward, beta).item()
    return found


def descend(features, steps, lr):
    """Gradient descent on the one pair (y1, y2), where y1 always wins.

    Returns DPO's policy, log pi (3,); RLHF's reward model (3,); and pi(y3) after every tenth step. beta
    is 1 and the reference uniform, so Bradley-Terry's loss of features @ theta is DPO's loss too
    (Theorem 2.2), and the same descent gives both."""
    theta = torch.zeros(features.shape[1], dtype=torch.float64)
    mass = []
    for step in range(1, steps + 1):
        theta.requires_grad_()
        score = features @ theta
        (gradient,) = torch.autograd.grad(losses.bradley_terry(score[0], score[1]), theta)
        theta = theta.detach() - lr * gradient
        if step % 10 == 0:
            mass.append(round(log_policy(theta, features)[2].exp().item(), 6))
    return log_policy(theta, features), features @ theta, mass
