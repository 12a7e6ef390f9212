"""How far a policy is from the soft optimum pi* of the true reward, on the training prompts of a world.

Where the routes with a reward can be listed, up to 5 moves (some 90 a prompt; 11,000 at 8), a
policy's true reward and log Z are exact; the KL inside a distance is a mean over samples. A GPT's
next state depends on all states before it, so no dynamic programming over (state, moves left)
gives its log Z beyond that.
"""

import torch

from nanoroads.world.optimum import MOST_MOVES, exact_optimum, kl_to_optimum, rewarded_routes
from nanoroads.world.roadmap import World, prompts


def listed_routes(world: World) -> dict[str, list[str]] | None:
    """{prompt: every route with a reward} of the training prompts; None where they are too many."""
    if world.max_moves > MOST_MOVES:
        return None
    return {prompt: rewarded_routes(world, prompt) for prompt in prompts(world, "train")}


def side_by_side(rows, padding: float) -> torch.Tensor:
    """P tensors or lists of different lengths -> (P, R) fp64, R the longest; the others are padded."""
    tensors = []
    for row in rows:
        tensors.append(torch.as_tensor(row, dtype=torch.float64))
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)


def true_rewards(world: World) -> torch.Tensor:
    """(P, R): r* of the listed routes of each prompt."""
    rewards = []
    for prompt, texts in listed_routes(world).items():
        rewards.append([world.reward(prompt, text) for text in texts])
    return side_by_side(rewards, 0.0)


def exact_reward(world, logps) -> torch.Tensor:
    """(P,): the true reward that a policy has on each prompt.

    logps: {prompt: log pi (R,) of its listed routes}; no other response has a reward."""
    logp = side_by_side(logps.values(), -torch.inf)  # (P, R)
    return (logp.exp() * true_rewards(world)).sum(1)


class Optimum:
    """pi* of a world's true reward, for one reference and one beta.

    Labels are Bradley-Terry on bt_scale r*, so that is the reward whose optimum both roads aim at.
    ref_logps: {prompt: log pi_ref (R,) of its listed routes}."""

    def __init__(self, world, ref_logps, beta):
        self.world = world
        self.beta = beta
        ref_logp = side_by_side(ref_logps.values(), -torch.inf)  # (P, R)
        exact = exact_optimum(ref_logp, world.bt_scale * true_rewards(world), beta)
        self.log_z = exact["log_z"]  # (P,)
        self.reward = exact["reward"] / world.bt_scale  # (P,), r* of pi*
        self.row = {
            "reward": self.reward.mean().item(),
            "kl_to_ref": exact["kl_to_ref"].mean().item(),
            "kl_to_optimum": 0.0,
        }

    def distance_of(self, reward, log_ratio) -> torch.Tensor:
        """(P,): KL(pi || pi*) in nats on each prompt, from k samples of pi.

        reward, log_ratio (P, k): their true reward and log pi/pi_ref. On samples of pi* itself every
        term of the mean is 0."""
        scaled = self.world.bt_scale * reward.double()
        terms = kl_to_optimum(log_ratio.double(), scaled, self.log_z[:, None], self.beta)  # (P, k)
        return terms.mean(1)


def row_of(reward, log_ratio, optimum=None, logps=None):
    """Measures of a policy, means over prompts: {"reward", "kl_to_ref"}, and "kl_to_optimum" where there
    is an Optimum.

    reward, log_ratio (P, k): true reward and log pi/pi_ref of its samples. With an Optimum the reward
    is the exact one, from logps: {prompt: log pi (R,) of its listed routes}."""
    row = {"reward": reward.mean().item(), "kl_to_ref": log_ratio.mean().item()}
    if optimum is not None:
        row["reward"] = exact_reward(optimum.world, logps).mean().item()
        row["kl_to_optimum"] = optimum.distance_of(reward, log_ratio).mean().item()
    return row
