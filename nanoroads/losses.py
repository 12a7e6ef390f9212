"""Every loss, one pure function each: log-probs and rewards in, the loss of each pair, sequence or token out, unreduced.

The scripts take the mean over a whole optimizer step, so that accumulation changes nothing. P pairs, G prompts, k samples
of each, S sequences, R tokens. Log-probs are sums over the response, in nats, unless a docstring says otherwise; any float
dtype, kept. Differentiable in the policy's log-probs; what only weighs a loss (advantage, reward, pi_old) is detached.
x is the prompt, y+ the chosen response, y- the rejected one; step 0 is where pi = pi_ref.
"""

import torch
from torch.nn.functional import logsigmoid

import kernels

# ---------------------------------------------------------------- pairs


def implicit_reward(logp, ref_logp, beta):
    """beta log(pi(y|x) / pi_ref(y|x)), the shape of logp: the reward that pi is soft-optimal for (Rafailov et al.,
    2305.18290, eq. 5, without beta log Z(x), which no comparison sees); the local reward class of Swamy et al., 2503.01067."""
    return beta * (logp - ref_logp)


def bradley_terry(chosen_reward, rejected_reward):
    """-log sigmoid(r(y+) - r(y-)), (P,), (P,) -> (P,): the negative log-likelihood of a preference (Bradley and Terry, 1952;
    Rafailov et al., 2305.18290, eq. 2). ln 2 where the two rewards are equal."""
    return -logsigmoid(chosen_reward - rejected_reward)


def margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    """Implicit reward of y+ minus that of y-, (P,) each -> (P,)."""
    return implicit_reward(chosen_logp, ref_chosen_logp, beta) - implicit_reward(
        rejected_logp, ref_rejected_logp, beta
    )


def dpo(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta, label_smoothing=0.0):
    """-log sigmoid(m), m the margin of implicit rewards, (P,) each -> (P,) (Rafailov et al., 2305.18290, eq. 7). ln 2 at
    step 0.

    label_smoothing e > 0, a number or (P,), is conservative DPO for labels that are wrong with probability e:
    -(1 - e) log sigmoid(m) - e log sigmoid(-m) (Mitchell, "A note on DPO with noisy preferences", 2023). Also ln 2."""
    m = margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta)
    return -(1 - label_smoothing) * logsigmoid(m) - label_smoothing * logsigmoid(-m)


def ipo(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    """(h - 1/(2 beta))^2, h the margin at beta = 1, (P,) each -> (P,) (Azar et al., 2310.12036, eq. 17, beta for their tau).
    (1/(2 beta))^2 at step 0: 100, 25, 1 at beta = 0.05, 0.1, 0.5.

    Sums in give the paper's formula on sums. Its authors, in later code, and TRL average over tokens: for that, divide each
    of the four log-probs by the length of its response before the call."""
    h = margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, 1.0)
    return (h - 1 / (2 * beta)) ** 2


def hinge(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta):
    """max(0, 1 - m), m DPO's margin, (P,) each -> (P,) (the rank loss of SLiC, Zhao et al., 2305.10425, normalised by the
    reference as in Liu et al., 2309.06657). 1 at step 0."""
    return torch.relu(1 - margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta))


def reference_free(chosen_logp, rejected_logp, beta):
    """-log sigmoid(beta (log pi(y+) - log pi(y-))), (P,), (P,) -> (P,): DPO with a uniform reference. At beta = 1 it is
    Bradley-Terry on the local reward sum log pi (Swamy et al., 2503.01067, section 2)."""
    return bradley_terry(beta * chosen_logp, beta * rejected_logp)


def simpo(chosen_logp, rejected_logp, chosen_length, rejected_length, beta, gamma):
    """-log sigmoid(beta (log pi(y+)/|y+| - log pi(y-)/|y-|) - gamma), (P,) each -> (P,): means over tokens, no reference, a
    target margin gamma (Meng et al., 2405.14734, eq. 6). Log-probs are sums; lengths count response tokens, any dtype."""
    return -logsigmoid(beta * (chosen_logp / chosen_length - rejected_logp / rejected_length) - gamma)


# ---------------------------------------------------------------- on-policy: advantages


def check_samples(name, reward, exactly=None):
    """Raise ValueError unless reward is (G, k) with k >= 2, or k == exactly."""
    if reward.dim() != 2 or reward.shape[1] < 2 or exactly not in (None, reward.shape[1]):
        wanted = f"k = {exactly}" if exactly else "k >= 2"
        raise ValueError(
            f"{name} compares the samples of a prompt: reward must be (G, k), {wanted}, not {tuple(reward.shape)}"
        )


def rloo_advantage(reward):
    """r_i minus the mean reward of the other k - 1 samples of its prompt, (G, k) -> (G, k) (Kool et al., 2019, "Buy 4
    REINFORCE samples, get a baseline for free"; RLOO of Ahmadian et al., 2402.14740). That mean does not depend on sample i:
    the policy gradient is unbiased. Raises InputError for k < 2."""
    check_samples("rloo_advantage", reward)
    k = reward.shape[1]
    return (reward - reward.mean(1, keepdim=True)) * (k / (k - 1))  # = r_i - (sum of the others)/(k - 1)


def grpo_advantage(reward, scale=True):
    """(r_i - mean) / (std + 1e-4) over the k samples of a prompt, (G, k) -> (G, k) (Shao et al., 2402.03300, section 4.1.2);
    std divides by k - 1. Tied rewards give 0.

    scale=False leaves the division out, as Dr. GRPO does (Liu et al., 2503.20783), since it weighs up the prompts that are
    nearly solved or nearly hopeless; its other half, no 1/|y| for each response, is the caller's. Raises InputError for k < 2."""
    check_samples("grpo_advantage", reward)
    centred = reward - reward.mean(1, keepdim=True)
    return centred / (reward.std(1, keepdim=True) + 1e-4) if scale else centred


def reinforce_advantage(reward):
    """r_i minus the mean reward of all G k samples, (G, k) -> (G, k): REINFORCE (Williams, 1992) with the batch mean as its
    baseline. Give it the samples of the whole optimizer step. The mean holds r_i itself, so the expected gradient is
    1 - 1/(G k) of the true one for samples of one prompt."""
    return reward - reward.mean()


# ---------------------------------------------------------------- on-policy: losses


def policy_gradient(logp, advantage):
    """-A log pi(y|x), (S,), (S,) -> (S,), A without gradient (Williams, 1992): its gradient is that of -E[r]. With
    rloo_advantage it is RLOO. The value means nothing."""
    return -advantage.detach() * logp


def clipped_policy_gradient(logp, old_logp, advantage, clip=0.2, clip_high=None):
    """-min(w A, clamp(w, 1 - clip, 1 + clip_high) A), w = pi/pi_old of a token, (R,) each (PPO, Schulman et al., 1707.06347,
    eq. 7; inside GRPO, 2402.03300, eq. 3). clip_high is clip unless given (DAPO's "clip-higher", 2503.14476).

    Returns loss (R,) and clipped (R,), of logp's dtype: 1 where the min picks the clipped branch, which has no gradient, else
    0; outside the interval alone does not count. Both are exact in the first epoch, where w = 1: loss -A, clipped 0."""
    advantage = advantage.detach()
    ratio = (logp - old_logp.detach()).exp()
    bounded = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    free, held = ratio * advantage, bounded * advantage
    return -torch.minimum(free, held), (held < free).to(logp.dtype)


def grpo(logp, old_logp, ref_logp, advantage, lengths, beta, clip=0.2):
    """GRPO's objective, negated: (1/|y|) sum over tokens of [clipped_policy_gradient + beta kl_k3] (Shao et al., 2402.03300,
    eq. 3). logp, old_logp, ref_logp (R,) per token; advantage, lengths (S,) per response. Returns loss (S,) and clipped (R,)."""
    spread = lambda x: x.repeat_interleave(lengths, output_size=len(logp))  # noqa: E731  (S,) -> (R,)
    loss, clipped = clipped_policy_gradient(logp, old_logp, spread(advantage), clip)
    loss = (loss + beta * kl_k3(logp, ref_logp)) / spread(lengths)
    return kernels.segment_sum(loss, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()), clipped


def online_dpo(logp, ref_logp, reward, beta, label="hard"):
    """DPO on the best and the worst of a prompt's k samples by reward, (G, k) each -> (G,) (Guo et al., 2402.04792, where
    k = 2; best against worst of 25 in Swamy et al., 2503.01067). A prompt with tied rewards says nothing: loss 0, gradient 0.

    label="soft": the target is the Bradley-Terry probability q = sigmoid(r_best - r_worst) in place of 1, a cross-entropy:
    -q log sigmoid(m) - (1 - q) log sigmoid(-m). Raises InputError for k < 2 and for another label."""
    check_samples("online_dpo", reward)
    if label not in ("hard", "soft"):
        raise ValueError(f"online_dpo: label is {label!r}, not 'hard' or 'soft'")
    best, worst = reward.argmax(1, keepdim=True), reward.argmin(1, keepdim=True)  # (G, 1)
    gap = (reward.gather(1, best) - reward.gather(1, worst)).squeeze(1).detach()  # (G,)
    pairs = [
        x.gather(1, i).squeeze(1) for x in (logp, ref_logp) for i in (best, worst)
    ]  # dpo's four, (G,) each
    flipped = torch.sigmoid(-gap) if label == "soft" else 0.0
    return torch.where(gap > 0, dpo(*pairs, beta, flipped), 0.0)


def rebel(logp, old_logp, reward, eta):
    """((log w_1 - log w_2)/eta - (r_1 - r_2))^2, w = pi/pi_old, for two samples of a prompt, (G, 2) each -> (G,) (Gao et al.,
    2404.16767, algorithm 1). It is 0 at pi = pi_old exp(eta r)/Z. Raises InputError unless k is 2."""
    check_samples("rebel", reward, exactly=2)
    log_w = logp - old_logp.detach()
    return ((log_w[:, 0] - log_w[:, 1]) / eta - (reward[:, 0] - reward[:, 1]).detach()) ** 2


# ---------------------------------------------------------------- KL(pi || pi_ref), from samples of pi

# Schulman, "Approximating KL divergence", 2020. What a sample says of the KL's value and what its gradient does as a loss are
# two questions: gradients below are expectations over fresh samples of pi (Liu et al., 2510.01555).


def kl_k1(logp, ref_logp):
    """log pi - log pi_ref, of any one shape: unbiased, any sign. The one to put inside the reward, detached: the policy
    gradient of r - c k1 is that of E[r] - c KL. Never a loss: its expected gradient is 0."""
    return logp - ref_logp


def kl_k2(logp, ref_logp):
    """(log pi - log pi_ref)^2 / 2, of any one shape: biased, never negative. As a loss on sequence log-probs its gradient is
    that of KL(pi || pi_ref); token by token it misses what early tokens do to later ones."""
    return 0.5 * (logp - ref_logp) ** 2


def kl_k3(logp, ref_logp):
    """pi_ref/pi - 1 - log(pi_ref/pi), of any one shape: unbiased, never negative (GRPO's loss term, per token, 2402.03300,
    eq. 4). Less variance than k1 while the policies are close, more, without bound, once they are distant. As a loss its
    gradient is that of the other KL, KL(pi_ref || pi); the two agree to first order."""
    return torch.expm1(ref_logp - logp) - (ref_logp - logp)
