"""Every loss, one pure function each: log-probs and rewards in, the loss of each pair, sequence or token out, unreduced.

The scripts take the mean over a whole optimizer step, so that accumulation changes nothing. P pairs, G prompts, k samples
of each, S sequences, R tokens. Log-probs are sums over the response in nats unless a docstring says otherwise; any float
dtype; differentiable in the policy's log-probs. y+ is the chosen response, y- the rejected one, x the prompt.
"""

import torch
from torch.nn.functional import logsigmoid

# ---------------------------------------------------------------- pairs


def implicit_reward(logp, ref_logp, beta):
    """beta log(pi(y|x) / pi_ref(y|x)): the reward that a policy is optimal for (Rafailov et al., 2305.18290, eq. 5, without
    its log Z(x), which no comparison sees), and the local reward class of Swamy et al., 2503.01067."""
    return beta * (logp - ref_logp)


def bradley_terry(chosen_reward, rejected_reward):
    """-log sigmoid(r(y+) - r(y-)), (P,): the negative log-likelihood of a preference (Bradley and Terry, 1952)."""
    return -logsigmoid(chosen_reward - rejected_reward)


def margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    """Implicit reward of y+ minus that of y-, (P,)."""
    return implicit_reward(chosen_logp, ref_chosen_logp, beta) - implicit_reward(rejected_logp, ref_rejected_logp, beta)


def dpo(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta, label_smoothing=0.0):
    """-log sigmoid(m), m the margin of implicit rewards, (P,) (Rafailov et al., 2305.18290, eq. 7); ln 2 at step 0.

    label_smoothing e > 0 is conservative DPO, for labels flipped with probability e:
    -(1 - e) log sigmoid(m) - e log sigmoid(-m) (Mitchell, 2023)."""
    m = margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta)
    return -(1 - label_smoothing) * logsigmoid(m) - label_smoothing * logsigmoid(-m)


def ipo(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    """(h - 1/(2 beta))^2, h the margin at beta = 1, (P,) (Azar et al., 2310.12036, eq. 17); 1/(4 beta^2) at step 0.

    With sums in, this is the paper's formula. Its authors and TRL later average over tokens: pass means to get that."""
    h = margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, 1.0)
    return (h - 1 / (2 * beta)) ** 2


def hinge(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    """max(0, 1 - m), m DPO's margin, (P,) (SLiC, Zhao et al., 2305.10425, on the log-ratios as in Liu et al., 2309.06657);
    1 at step 0."""
    return torch.relu(1 - margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta))


def reference_free(chosen_logp, rejected_logp, beta):
    """-log sigmoid(beta (log pi(y+) - log pi(y-))), (P,): DPO with a uniform reference. With beta = 1 this is Bradley-Terry
    on r_pi = sum log pi, the paper's local reward model (Swamy et al., 2503.01067, section 2)."""
    return bradley_terry(beta * chosen_logp, beta * rejected_logp)


def simpo(chosen_logp, rejected_logp, chosen_length, rejected_length, beta, gamma):
    """-log sigmoid(beta (log pi(y+)/|y+| - log pi(y-)/|y-|) - gamma), (P,): means over tokens, no reference, a target margin
    gamma (Meng et al., 2405.14734, eq. 6)."""
    return -logsigmoid(beta * (chosen_logp / chosen_length - rejected_logp / rejected_length) - gamma)


# ---------------------------------------------------------------- on-policy: advantages


def rloo_advantage(reward):
    """(G, k) -> (G, k): r_i minus the mean of the other k - 1 samples' rewards (Kool et al., 2019; Ahmadian et al.,
    2402.14740, eq. 8). Unbiased. Raises ValueError for k < 2."""
    k = reward.shape[1]
    if k < 2:
        raise ValueError("rloo_advantage: a sample needs others of its prompt; k is 1")
    return (reward - reward.mean(1, keepdim=True)) * (k / (k - 1))


def grpo_advantage(reward, scale=True):
    """(G, k) -> (G, k): (r_i - mean) / std of the prompt's samples (Shao et al., 2402.03300, section 4.1.2), std with
    k - 1. scale=False leaves the division out, as Dr. GRPO does (Liu et al., 2503.20783). Raises ValueError for k < 2."""
    if reward.shape[1] < 2:
        raise ValueError("grpo_advantage: a sample needs others of its prompt; k is 1")
    centred = reward - reward.mean(1, keepdim=True)
    return centred / (reward.std(1, keepdim=True) + 1e-4) if scale else centred


def reinforce_advantage(reward):
    """(G, k) -> (G, k): r_i minus the mean reward of the whole batch (Williams, 1992, with a constant baseline)."""
    return reward - reward.mean()


# ---------------------------------------------------------------- on-policy: losses


def policy_gradient(logp, advantage):
    """-A log pi(y), (S,): its gradient is that of -E[r] (REINFORCE; with rloo_advantage, RLOO). A carries no gradient."""
    return -advantage.detach() * logp


def clipped_policy_gradient(logp, old_logp, advantage, clip=0.2, clip_high=None):
    """-min(w A, clip(w, 1 - clip, 1 + clip_high) A) with w = pi/pi_old, per token (R,) (PPO, Schulman et al., 1707.06347,
    eq. 7; GRPO, 2402.03300, eq. 3; clip_high apart from clip is DAPO's, 2503.14476).

    logp, old_logp, advantage: (R,) per token. Returns (loss (R,), clipped (R,)): 1.0 where the clipped branch is taken, so
    that the token has no gradient."""
    advantage = advantage.detach()
    ratio = (logp - old_logp.detach()).exp()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    free, held = ratio * advantage, bounded * advantage
    return -torch.minimum(free, held), (held < free).to(logp.dtype)


def online_dpo(logp, ref_logp, reward, beta, label="hard"):
    """DPO on the best and the worst of a prompt's k samples by reward, (G, k) each -> (G,) (Guo et al., 2402.04792; the
    paper's stage 2). A prompt whose rewards are all equal says nothing: its loss is 0, with no gradient.

    label="soft": the target is the Bradley-Terry probability q = sigmoid(r_best - r_worst) instead of 1:
    -q log sigmoid(m) - (1 - q) log sigmoid(-m). Raises ValueError for another label."""
    if label not in ("hard", "soft"):
        raise ValueError(f"online_dpo: label is {label!r}, not 'hard' or 'soft'")
    best, worst = reward.argmax(1, keepdim=True), reward.argmin(1, keepdim=True)
    gap = (reward.gather(1, best) - reward.gather(1, worst)).squeeze(1).detach()  # (G,)
    pairs = [x.gather(1, i).squeeze(1) for x in (logp, ref_logp) for i in (best, worst)]
    flipped = torch.sigmoid(-gap) if label == "soft" else 0.0
    return torch.where(gap > 0, dpo(*pairs, beta, flipped), 0.0)


def rebel(logp, old_logp, reward, eta):
    """((log w_1 - log w_2)/eta - (r_1 - r_2))^2 with w = pi/pi_old, for two samples of a prompt, (G, 2) each -> (G,) (Gao et
    al., 2404.16767, eq. 1)."""
    ratio = logp - old_logp.detach()
    return ((ratio[:, 0] - ratio[:, 1]) / eta - (reward[:, 0] - reward[:, 1]).detach()) ** 2


# ---------------------------------------------------------------- KL(pi || pi_ref), from samples of pi


def kl_k1(logp, ref_logp):
    """log pi - log pi_ref: unbiased, any sign. The one to put inside a reward (Schulman, "Approximating KL divergence", 2020)."""
    return logp - ref_logp


def kl_k2(logp, ref_logp):
    """(log pi - log pi_ref)^2 / 2: biased, never negative; its gradient as a loss, on samples of pi, is that of the KL."""
    return 0.5 * (logp - ref_logp) ** 2


def kl_k3(logp, ref_logp):
    """pi_ref/pi - 1 - log(pi_ref/pi): unbiased and never negative; GRPO's loss term, per token. For distant policies its
    standard deviation is above k1's."""
    return torch.expm1(ref_logp - logp) - (ref_logp - logp)
