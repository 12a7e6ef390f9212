"""What others have made of the losses in losses.py: of pairs, then of samples. Same conventions.

The README's table of losses says when to take which.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from nanoroads.losses import (
    LARGEST_LOG_RATIO,
    clipped_policy_gradient,
    dpo,
    grpo,
    grpo_advantage,
    implicit_reward,
    kl_k3,
    margin,
    probability_ratio,
    sum_responses,
    to_tokens,
)

PAIR_LOSSES = ["dpo-norm", "rpo", "apo-zero", "apo-down", "kto", "orpo"]  # the --loss that `of_pairs` knows

# How far pi/pi_old may go below 1 and above 1 before it is clipped.
PPO_LIMITS = (0.2, 0.2)  # Schulman et al., 1707.06347
RATIO_LIMITS = {  # of the --algo that `like_grpo` knows
    "grpo": PPO_LIMITS,
    "dr-grpo": PPO_LIMITS,
    "dapo": (0.2, 0.28),  # 2503.14476
    "gspo": (3e-4, 4e-4),  # 2507.18071: of a whole response's ratio, to the power of 1/|y|
    "cispo": (1.0, 4.0),  # from 0, which is no limit, to 5, as ScaleRL has it: 2510.13786
}
LIKE_GRPO = list(RATIO_LIMITS)


def ratio_limits(algo: str, low: float | None, high: float | None) -> tuple[float, float]:
    """The limits of an --algo: low and high where they are given, else its own."""
    own_low, own_high = RATIO_LIMITS.get(algo, PPO_LIMITS)
    return low or own_low, high or own_high


# ---------------------------------------------------------------- pairs


def of_pairs(
    name: str,
    logp: Tensor,
    ref_logp: Tensor,
    lengths: Tensor,
    beta: float,
    nll_weight: float,
    odds_weight: float,
    **means: Tensor,
) -> Tensor:
    """The loss (P,) called `name`, one of PAIR_LOSSES. logp, ref_logp, lengths (P, 2), chosen first.

    means: kto's chosen_mean and rejected_mean, where these P are not all pairs of the step."""
    chosen, rejected = logp.unbind(1)  # (P,) each: log pi(y|x), a sum over the response's tokens
    ref_chosen, ref_rejected = ref_logp.unbind(1)
    chosen_length, rejected_length = lengths.unbind(1)
    if name == "orpo":
        return orpo(chosen, rejected, chosen_length, rejected_length, odds_weight)
    if name == "apo-zero":
        return apo_zero(chosen, rejected, ref_chosen, ref_rejected, beta)
    if name == "apo-down":
        return apo_down(chosen, rejected, ref_chosen, ref_rejected, beta)
    if name == "kto":
        return kto(chosen, rejected, ref_chosen, ref_rejected, beta, **means)
    if name == "rpo":
        return rpo(chosen, rejected, ref_chosen, ref_rejected, chosen_length, beta, nll_weight)
    if name == "dpo-norm":
        return dpo_norm(chosen, rejected, ref_chosen, ref_rejected, chosen_length, rejected_length, beta)
    raise ValueError(f"of_pairs: {name} is not one of {', '.join(PAIR_LOSSES)}")


def dpo_norm(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    beta: float,
) -> Tensor:
    """Length-normalised DPO: means over tokens in place of sums, (P,) each -> (P,):

        -log sigmoid(beta (log(pi(y+)/pi_ref(y+))/|y+| - log(pi(y-)/pi_ref(y-))/|y-|))

    Lambert et al. (Tulu 3), 2411.15124, section 5; "sigmoid_norm" in TRL. ln 2 at step 0. Log-probs are
    sums; lengths count response tokens, any dtype. Means are smaller than sums: Tulu 3 has beta = 5."""
    return dpo(
        chosen_logp / chosen_length,
        rejected_logp / rejected_length,
        ref_chosen_logp / chosen_length,
        ref_rejected_logp / rejected_length,
        beta,
    )


def rpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    chosen_length: Tensor,
    beta: float,
    nll_weight: float,
) -> Tensor:
    """DPO plus the negative log-likelihood of the chosen response, per token, (P,) each -> (P,):

        dpo - nll_weight log pi(y+)/|y+|

    Pang et al. (Iterative RPO), 2404.19733, section 2; they weight DPO's term and leave the other at 1, and
    both are 1 in their runs. Llama 3 (2407.21783, section 4.1.4) has nll_weight 0.2. At step 0 ln 2 plus
    nll_weight times the reference's own loss per token.

    Here each pair counts once. TRL (loss_type ["sigmoid", "sft"]) takes the second mean over all tokens
    of a batch, so there a pair counts by its length."""
    nll = -chosen_logp / chosen_length
    return dpo(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta) + nll_weight * nll


def apo_zero(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """APO-zero: the chosen response goes up, the rejected one down, (P,) each -> (P,):

        1 - sigmoid(r+) + sigmoid(r-),   r = beta log pi/pi_ref

    D'Oosterlinck et al., 2408.06266, eq. 7, plus 1. 1 at step 0."""
    chosen_reward = implicit_reward(chosen_logp, ref_chosen_logp, beta)
    rejected_reward = implicit_reward(rejected_logp, ref_rejected_logp, beta)
    return 1 - torch.sigmoid(chosen_reward) + torch.sigmoid(rejected_reward)


def apo_down(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
) -> Tensor:
    """APO-down: both responses go down, the rejected one further, (P,) each -> (P,):

        1 + sigmoid(r+) - sigmoid(r+ - r-),   r = beta log pi/pi_ref

    D'Oosterlinck et al., 2408.06266, eq. 8, plus 1. 1 at step 0, where the chosen response has no
    gradient: it begins to fall once there is a margin."""
    chosen_reward = implicit_reward(chosen_logp, ref_chosen_logp, beta)
    reward_margin = margin(chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp, beta)
    return 1 + torch.sigmoid(chosen_reward) - torch.sigmoid(reward_margin)


def kto(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    ref_chosen_logp: Tensor,
    ref_rejected_logp: Tensor,
    beta: float,
    kl: Tensor | None = None,
    chosen_mean: Tensor | None = None,
    rejected_mean: Tensor | None = None,
) -> Tensor:
    """KTO, with y+ as a desirable example and y- as an undesirable one, (P,) each -> (P,):

        [1 - sigmoid(beta (h+ - z+)) + 1 - sigmoid(beta (z- - h-))] / 2,   h = log pi/pi_ref

    Ethayarajh et al., 2402.01306, eq. 7 and 8, both weights 1: half of the examples are desirable. 1/2 at
    step 0. z, the point of reference, is a constant of the whole step without gradient.

    Without kl: z+ = max(0, mean of h-) and z- = max(0, mean of h+) over the given pairs, each half measured
    on the other one, as in the paper's first report (and TRL's "kto_pair", until it was dropped). Give it
    the pairs of a whole step, or the means () of h+ and h- over them. It costs nothing; where both means
    are negative, z is 0 and KTO is APO-zero, halved.

    With kl, (): z+ = z- = kl, for a caller who has the estimate of the paper and of TRL: max(0, mean h) of
    responses to other prompts of the batch, (x_i, y_(i-1)), which takes a second forward pass."""
    chosen_log_ratio = chosen_logp - ref_chosen_logp  # h+
    rejected_log_ratio = rejected_logp - ref_rejected_logp  # h-
    if chosen_mean is None:
        chosen_mean = chosen_log_ratio.detach().mean()
        rejected_mean = rejected_log_ratio.detach().mean()
    if kl is None:
        chosen_kl = rejected_mean.clamp(min=0)  # z+
        rejected_kl = chosen_mean.clamp(min=0)  # z-
    else:
        chosen_kl = rejected_kl = kl.detach()
    chosen_loss = 1 - torch.sigmoid(beta * (chosen_log_ratio - chosen_kl))
    rejected_loss = 1 - torch.sigmoid(beta * (rejected_kl - rejected_log_ratio))
    return (chosen_loss + rejected_loss) / 2


def orpo(
    chosen_logp: Tensor,
    rejected_logp: Tensor,
    chosen_length: Tensor,
    rejected_length: Tensor,
    odds_weight: float,
) -> Tensor:
    """ORPO: SFT on the chosen response plus the log of an odds ratio, no reference, (P,) each -> (P,):

        -log p(y+) - odds_weight log sigmoid(log odds(y+) - log odds(y-))
        log p(y) = log pi(y|x)/|y|,   odds(y) = p(y)/(1 - p(y))

    Hong et al., 2403.07691, eq. 3 to 7; odds_weight is their lambda, 0.1 in most of their runs. Log-probs
    are sums; lengths count response tokens, any dtype. Odds are limited to e^20. TRL takes the first term
    over the prompt's tokens, too, which the paper does not."""
    log_p_chosen = chosen_logp / chosen_length
    log_p_rejected = rejected_logp / rejected_length
    log_odds_ratio = log_odds(log_p_chosen) - log_odds(log_p_rejected)
    return -log_p_chosen - odds_weight * logsigmoid(log_odds_ratio)


def log_odds(log_p: Tensor) -> Tensor:
    """log(p/(1 - p)) of log p, any shape, limited where p is 1."""
    log_p = log_p.clamp(max=-math.exp(-LARGEST_LOG_RATIO))
    return log_p - torch.log(-torch.expm1(log_p))


# ---------------------------------------------------------------- on-policy


def like_grpo(
    name: str,
    logp: Tensor,
    rollout,
    *,
    samples: int,
    beta: float,
    clip: float,
    clip_high: float,
    longest: int,
) -> tuple[Tensor, Tensor]:
    """The loss (S,) called `name`, one of LIKE_GRPO, and what was clipped: 1 or 0, (S,) or (R,).

        name      advantage A             loss of a token            their sum is divided by
        grpo      (reward - mean) / std   -min(w A, clamp(w) A)      the response's length
        dr-grpo   reward - mean           the same                   longest
        dapo      (reward - mean) / std   the same                   the step's mean length
        gspo      (reward - mean) / std   the same, with s for w     the response's length
        cispo     (reward - mean) / std   -clamp(w) A log pi         the step's mean length

    w = pi/pi_old of a token, without gradient in cispo; s = (pi/pi_old)^(1/|y|) of its whole response.
    clamp: to 1 - clip and 1 + clip_high, these arguments, of which RATIO_LIMITS has the script's defaults.
    mean and std are those of the prompt's `samples` responses. Each token's loss has beta kl_k3 added: the
    KL is in the loss, and not in the reward. With the step's mean length all tokens of the step weigh the
    same, as in DAPO's code (verl); in the papers of dapo and cispo those of one prompt's responses do, and
    then prompts.

    logp (R,): log pi of the tokens, with gradient. rollout: the Rollout that they belong to
    (run/rollouts.py). longest: the most tokens that a response may have."""
    if name not in LIKE_GRPO:
        raise ValueError(f"like_grpo: {name} is not one of {', '.join(LIKE_GRPO)}")
    rewards = rollout.reward.view(-1, samples)  # (prompts, samples)
    lengths = rollout.batch.lengths  # (S,)
    inputs = {
        "logp": logp,
        "old_logp": rollout.old.token,  # (R,)
        "ref_logp": rollout.ref.token,  # (R,)
        "advantage": grpo_advantage(rewards, scale=name != "dr-grpo").flatten(),  # (S,)
        "lengths": lengths,
        "beta": beta,
        "clip": clip,
        "clip_high": clip_high,
    }
    if name == "gspo":
        return gspo(**inputs)
    step_length = rollout.step_length
    divisors = {"grpo": lengths, "dr-grpo": longest, "dapo": step_length, "cispo": step_length}
    loss = cispo if name == "cispo" else grpo
    return loss(**inputs, divisor=divisors[name])


def gspo(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    advantage: Tensor,
    lengths: Tensor,
    beta: float,
    clip: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """GSPO: one ratio for a whole response, the geometric mean of its tokens' ratios, negated:

        -min(s A, clamp(s, 1 - clip, 1 + clip_high) A) + (beta/|y|) sum_t kl_k3_t
        s = (pi(y|x)/pi_old(y|x))^(1/|y|)

    Zheng et al., 2507.18071, eq. 5 and 7, where clip is 3e-4 and clip_high 4e-4; they leave out the KL.
    logp, old_logp, ref_logp (R,), of tokens; advantage, lengths (S,), of responses. Returns loss and
    clipped, (S,) each. At pi = pi_old = pi_ref the loss is -A, and its gradient is GRPO's."""
    log_ratio = sum_responses(logp - old_logp.detach(), lengths) / lengths  # (S,) log s
    no_change = torch.zeros_like(log_ratio)  # log s of the policy that sampled
    loss, clipped = clipped_policy_gradient(log_ratio, no_change, advantage, clip, clip_high)
    kl = sum_responses(kl_k3(logp, ref_logp), lengths) / lengths  # (S,)
    return loss + beta * kl, clipped


def cispo(
    logp: Tensor,
    old_logp: Tensor,
    ref_logp: Tensor,
    advantage: Tensor,
    lengths: Tensor,
    beta: float,
    clip: float,
    clip_high: float,
    divisor: float,
) -> tuple[Tensor, Tensor]:
    """CISPO: the ratio is a weight, limited and without gradient, so that no token loses its gradient:

        (1/divisor) sum_t [-clamp(w_t, 1 - clip, 1 + clip_high) A log pi_t + beta kl_k3_t]

    MiniMax-M1, 2506.13585, section 3.1, w = pi/pi_old; they have no KL and no lower limit (clip = 1:
    none here, either), and do not say the upper one, which is 5 in Khatri et al. (ScaleRL), 2510.13786.
    In TRL epsilon_high is that limit, here it is 1 + clip_high. divisor: as DAPO's in `grpo`. Shapes as
    there; clipped (R,) is 1 where the weight is limited. At pi = pi_old = pi_ref the gradient is that of
    `grpo` with this divisor; the value, -A log pi / divisor, means nothing."""
    token_advantage = to_tokens(advantage.detach(), lengths, len(logp))  # (R,)
    ratio = probability_ratio(logp, old_logp).detach()  # (R,) w
    weight = ratio.clamp(1 - clip, 1 + clip_high)
    clipped = (weight != ratio).to(logp.dtype)
    loss = -weight * token_advantage * logp + beta * kl_k3(logp, ref_logp)  # (R,)
    return sum_responses(loss, lengths) / divisor, clipped
