"""Every loss, one pure function each: log-probs and rewards in, an unreduced loss out.

The loss is that of each pair, sequence or token; the scripts take the mean over a whole optimizer
step, so that accumulation changes nothing. Log-probs are sums over the response, in nats, unless a
docstring says otherwise. Any float dtype; outputs keep it. Differentiable in the policy's
log-probs; what only weights a loss (advantage, reward, pi_old) is detached.

Sizes: P pairs, G prompts, k samples of each prompt, S sequences, R tokens. x is the prompt, y+ the
chosen response, y- the rejected one; step 0 is where pi = pi_ref.

The losses that others have made of these (KTO, APO, ORPO, GSPO, ...) are in loss_variants.py.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

import kernels

# e^20 is 500 million: beyond it a probability ratio is as good as infinite. Limited, it overflows
# neither in the loss nor in its gradient, where infinity times 0 would be NaN; there is no gradient
# beyond the limit.
LARGEST_LOG_RATIO = 20.0

# ---------------------------------------------------------------- pairs


def implicit_reward(logp: Tensor, ref_logp: Tensor, beta: float) -> Tensor:
    """The reward that pi is soft-optimal for, inputs of one shape:

        beta log(pi(y|x) / pi_ref(y|x))

    Rafailov et al., 2305.18290, eq. 5, without beta log Z(x), which no comparison sees; the local
    reward class of Swamy et al., 2503.01067. 0 at step 0."""
    return beta * (logp - ref_logp)


def bradley_terry(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """The negative log-likelihood of a preference, (P,), (P,) -> (P,):

        -log sigmoid(r(y+) - r(y-))

    Bradley and Terry, 1952; Rafailov et al., 2305.18290, eq. 2. ln 2 where rewards are equal."""
    return -logsigmoid(chosen_reward - rejected_reward)


def margin(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """Implicit reward of y+ minus that of y-, (P,) each -> (P,). 0 at step 0."""
    chosen_reward = implicit_reward(chosen_logp, ref_chosen_logp, beta)
    rejected_reward = implicit_reward(rejected_logp, ref_rejected_logp, beta)
    return chosen_reward - rejected_reward


def dpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    label_smoothing: float | Tensor = 0.0,
) -> Tensor:
    """DPO, m the margin of implicit rewards, (P,) each -> (P,):

        -log sigmoid(m)

    Rafailov et al., 2305.18290, eq. 7. ln 2 at step 0.

    label_smoothing e > 0, a number or (P,), is conservative DPO for labels that are wrong with
    probability e (Mitchell, "A note on DPO with noisy preferences", 2023), also ln 2 at step 0:

        -(1 - e) log sigmoid(m) - e log sigmoid(-m)"""
    m = margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta)
    return -(1 - label_smoothing) * logsigmoid(m) - label_smoothing * logsigmoid(-m)


def ipo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """IPO, h the margin at beta = 1, (P,) each -> (P,):

        (h - 1/(2 beta))^2

    Azar et al., 2310.12036, eq. 17, beta for their tau. (1/(2 beta))^2 at step 0: 100, 25, 1 at
    beta = 0.05, 0.1, 0.5.

    Given sums, this is the paper's formula. Its authors, in later code, and TRL average over
    tokens: for that, divide each of the four log-probs by the length of its response first."""
    h = margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, 1.0)
    return (h - 1 / (2 * beta)) ** 2


def hinge(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """The hinge loss, m DPO's margin, (P,) each -> (P,):

        max(0, 1 - m)

    The rank loss of SLiC (Zhao et al., 2305.10425), normalised by the reference as in Liu et al.,
    2309.06657. 1 at step 0."""
    m = margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta)
    return torch.relu(1 - m)


def reference_free(chosen_logp: Tensor, rejected_logp: Tensor, beta: float) -> Tensor:
    """DPO with a uniform reference, (P,), (P,) -> (P,):

        -log sigmoid(beta (log pi(y+) - log pi(y-)))

    At beta = 1 it is Bradley-Terry on the local reward sum log pi (Swamy et al., 2503.01067,
    section 2)."""
    return bradley_terry(beta * chosen_logp, beta * rejected_logp)


def simpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float,
    gamma: float,
) -> Tensor:
    """SimPO: means over tokens, no reference, a target margin gamma, (P,) each -> (P,):

        -log sigmoid(beta (log pi(y+)/|y+| - log pi(y-)/|y-|) - gamma)

    Meng et al., 2405.14734, eq. 6. Log-probs are sums; lengths count response tokens, any dtype."""
    difference = chosen_logp / chosen_length - rejected_logp / rejected_length
    return -logsigmoid(beta * difference - gamma)


# ---------------------------------------------------------------- on-policy: advantages


def check_samples(name: str, reward: Tensor, exactly: int | None = None):
    """Raises ValueError unless reward is (G, k) with k >= 2, or with k == exactly."""
    fits = reward.dim() == 2 and reward.shape[1] >= 2
    wanted = "k >= 2"
    if exactly is not None:
        fits = fits and reward.shape[1] == exactly
        wanted = f"k = {exactly}"
    if not fits:
        needs = f"reward must be (G, k), {wanted}, not {tuple(reward.shape)}"
        raise ValueError(f"{name} compares the samples of a prompt: {needs}")


def centred(reward: Tensor, dim: int) -> Tensor:
    """The rewards minus their mean over `dim`; exactly 0 where all are equal.

    The mean of equal numbers is not quite that number in fp32, so the first one is subtracted first."""
    from_first = reward - reward.narrow(dim, 0, 1)
    return from_first - from_first.mean(dim, keepdim=True)


def rloo_advantage(reward: Tensor) -> Tensor:
    """RLOO: r_i minus the mean of the prompt's other k - 1 samples, (G, k) -> (G, k):

        r_i - (sum of the others) / (k - 1)  =  (r_i - mean) k / (k - 1)

    Kool et al., 2019, "Buy 4 REINFORCE samples, get a baseline for free"; Ahmadian et al.,
    2402.14740. The others' mean does not depend on sample i: the policy gradient is unbiased.
    Raises ValueError for k < 2."""
    check_samples("rloo_advantage", reward)
    k = reward.shape[1]
    return centred(reward, 1) * (k / (k - 1))


def grpo_advantage(reward: Tensor, scale: bool = True) -> Tensor:
    """GRPO: standardised over the k samples of a prompt, (G, k) -> (G, k), 0 where rewards tie:

        (r_i - mean) / (std + 1e-4)

    Shao et al., 2402.03300, section 4.1.2; std divides by k - 1.

    scale=False leaves the division out, as Dr. GRPO does (Liu et al., 2503.20783), since it gives
    extra weight to the prompts that are nearly solved or nearly hopeless; its other half, no 1/|y|
    for each response, is the caller's. Raises ValueError for k < 2."""
    check_samples("grpo_advantage", reward)
    advantage = centred(reward, 1)
    if not scale:
        return advantage
    return advantage / (advantage.std(1, keepdim=True) + 1e-4)


def reinforce_advantage(reward: Tensor, baseline: Tensor | None = None) -> Tensor:
    """REINFORCE with the batch mean as its baseline, of any shape:

        r_i - mean of all G k samples

    Williams, 1992. Give it the samples of the whole optimizer step; or some of them, and the mean of
    all, (), as baseline. The mean includes r_i itself, which scales the expected gradient by
    1 - 1/(G k)."""
    if baseline is not None:
        return reward - baseline
    return centred(reward.flatten(), 0).view_as(reward)


# ---------------------------------------------------------------- on-policy: losses


def policy_gradient(logp: Tensor, advantage: Tensor) -> Tensor:
    """The policy gradient, (S,), (S,) -> (S,), A without gradient:

        -A log pi(y|x)

    Williams, 1992: its gradient is that of -E[r], its value means nothing. With rloo_advantage it
    is RLOO."""
    return -advantage.detach() * logp


def probability_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    """pi/pi_old, of one shape; pi_old without gradient. Its log is limited, see LARGEST_LOG_RATIO."""
    return (logp - old_logp.detach()).clamp(max=LARGEST_LOG_RATIO).exp()


def clipped_policy_gradient(
    logp: Tensor, old_logp: Tensor, advantage: Tensor, clip: float = 0.2, clip_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """PPO's clipped objective, negated, w = pi/pi_old of a token or of a whole response:

        -min(w A, clamp(w, 1 - clip, 1 + clip_high) A)

    Schulman et al., 1707.06347, eq. 7; inside GRPO, 2402.03300, eq. 3. clip_high is clip unless
    given (DAPO's "clip-higher", 2503.14476).

    Inputs of one shape. Returns loss and clipped, of that shape and logp's dtype. clipped is 1
    where the min picks the clipped branch, which has no gradient, else 0; outside the interval
    alone does not count. Both are exact in the first epoch, where w = 1: loss -A, clipped 0. log w is
    limited, see LARGEST_LOG_RATIO."""
    if clip_high is None:
        clip_high = clip
    advantage = advantage.detach()
    ratio = probability_ratio(logp, old_logp)  # w
    unclipped_objective = ratio * advantage
    clipped_objective = ratio.clamp(1 - clip, 1 + clip_high) * advantage
    clipped = (clipped_objective < unclipped_objective).to(logp.dtype)
    return -torch.minimum(unclipped_objective, clipped_objective), clipped


def grpo(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    advantage: Tensor,
    lengths: Tensor,
    beta: float,
    clip: float = 0.2,
    clip_high: float | None = None,
    divisor: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GRPO's objective, negated, a mean over the tokens t of each response:

        (1/|y|) sum_t [clipped_policy_gradient_t + beta kl_k3_t]

    Shao et al., 2402.03300, eq. 3. logp, old_logp, ref_logp (R,), of tokens; advantage, lengths
    (S,), of responses. Returns loss (S,) and clipped (R,). At pi = pi_old = pi_ref
    loss is -A, clipped 0.

    divisor, in place of |y|, gives each token the same weight, whichever response it is in. Dr. GRPO
    (Liu et al., 2503.20783) takes a constant, the longest response allowed. DAPO (Yu et al.,
    2503.14476) takes a mean over tokens: in its eq. 8 those of one prompt's responses, and then the
    mean over prompts; in its code (verl), and here, all tokens of the step. That is the divisor mean
    length of the step's responses: the mean over responses is then that mean over tokens. Loss is
    -A |y|/divisor at pi = pi_old = pi_ref."""
    token_advantage = to_tokens(advantage, lengths, len(logp))  # (R,)
    loss, clipped = clipped_policy_gradient(logp, old_logp, token_advantage, clip, clip_high)
    loss = loss + beta * kl_k3(logp, ref_logp)  # (R,)
    if divisor is None:
        divisor = lengths
    return sum_responses(loss, lengths) / divisor, clipped


def to_tokens(value: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """A value of each response (S,) -> that of each token's response (R,). tokens: R."""
    return value.repeat_interleave(lengths, output_size=tokens)


def sum_responses(value: Tensor, lengths: Tensor) -> Tensor:
    """A value of each token (R,) -> its sum over each response (S,)."""
    cu_seqlens = pad(lengths.cumsum(0), (1, 0)).int()  # (S+1,) where each response starts
    return kernels.segment_sum(value, cu_seqlens)


def online_dpo(logp: Tensor, ref_logp: Tensor, reward: Tensor, beta: float, label: str = "hard") -> Tensor:
    """DPO on the best and the worst of a prompt's k samples by reward, (G, k) each -> (G,).

    Guo et al., 2402.04792, where k = 2; best against worst of 25 in Swamy et al., 2503.01067. A
    prompt with tied rewards says nothing: loss 0, gradient 0. Else ln 2 at step 0.

    label="soft", which no flag of train_rlhf.py reaches: the target is the Bradley-Terry probability
    q = sigmoid(r_best - r_worst) in place of 1, a cross-entropy, m DPO's margin:

        -q log sigmoid(m) - (1 - q) log sigmoid(-m)

    Raises ValueError for k < 2 and for another label."""
    check_samples("online_dpo", reward)
    if label not in ("hard", "soft"):
        raise ValueError(f"online_dpo: label is {label!r}, not 'hard' or 'soft'")
    best = reward.argmax(1, keepdim=True)  # (G, 1)
    worst = reward.argmin(1, keepdim=True)  # (G, 1)
    pair = torch.cat([best, worst], dim=1)  # (G, 2)
    gap = (reward.gather(1, best) - reward.gather(1, worst)).squeeze(1).detach()  # (G,)
    tied = gap == 0  # (G,)
    # Tied prompts enter the loss as zeros: to mask its result alone would give NaN gradients where a log-prob
    # is infinite.
    best_logp, worst_logp = logp.gather(1, pair).masked_fill(tied[:, None], 0.0).unbind(1)  # (G,)
    ref_best_logp, ref_worst_logp = ref_logp.gather(1, pair).masked_fill(tied[:, None], 0.0).unbind(1)
    label_smoothing = 0.0
    if label == "soft":
        label_smoothing = torch.sigmoid(-gap)  # 1 - q
    loss = dpo(best_logp, worst_logp, ref_best_logp, ref_worst_logp, beta, label_smoothing)
    return loss.masked_fill(tied, 0.0)


def rebel(logp: Tensor, old_logp: Tensor, reward: Tensor, eta: float) -> Tensor:
    """REBEL, w = pi/pi_old, for two samples of a prompt, (G, 2) each -> (G,):

        ((log w_1 - log w_2)/eta - (r_1 - r_2))^2

    Gao et al., 2404.16767, algorithm 1. It is (r_1 - r_2)^2 at pi = pi_old, and 0 at
    pi = pi_old exp(eta r)/Z. Raises ValueError unless k is 2."""
    check_samples("rebel", reward, exactly=2)
    log_ratio = logp - old_logp.detach()  # (G, 2)
    reward_gap = (reward[:, 0] - reward[:, 1]).detach()  # (G,)
    return ((log_ratio[:, 0] - log_ratio[:, 1]) / eta - reward_gap) ** 2


# ---------------------------------------------------------------- KL(pi || pi_ref), from samples of pi

# Schulman, "Approximating KL divergence", 2020. What a sample says of the KL's value and what its
# gradient does as a loss are two questions: gradients below are expectations over fresh samples of
# pi (Liu et al., 2510.01555). All three are 0 at step 0.


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k1, inputs of one shape: unbiased, any sign.

        log pi - log pi_ref

    The one to put inside the reward, detached: the policy gradient of r - c k1 is that of
    E[r] - c KL. Never a loss: its expected gradient is 0."""
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k2, inputs of one shape: biased, never negative.

        (log pi - log pi_ref)^2 / 2

    As a loss on sequence log-probs its gradient is that of KL(pi || pi_ref); token by token it
    misses what early tokens do to later ones."""
    return 0.5 * (logp - ref_logp) ** 2


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3, inputs of one shape: unbiased, never negative.

        pi_ref/pi - 1 - log(pi_ref/pi)

    GRPO's loss term, per token (2402.03300, eq. 4). Less variance than k1 while the policies are
    close, more, without bound, once they are distant. As a loss its gradient is that of the other
    KL, KL(pi_ref || pi); near pi = pi_ref the two gradients agree to first order. The log-ratio is
    limited, see LARGEST_LOG_RATIO."""
    log_ratio = (ref_logp - logp).clamp(max=LARGEST_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio
