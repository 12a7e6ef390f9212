"""How far a policy is from the soft optimum pi* of the true reward, with log Z exact by enumeration.

Exact where the routes with a reward can be listed, up to 5 moves (some 90 a prompt; 11,000 at 8).
A GPT's next state depends on all states before it, so no dynamic programming over (state, moves
left) gives its log Z.
"""

import torch

from nanoroads.world.optimum import exact_optimum, kl_to_optimum, rewarded_routes
from nanoroads.world.roadmap import World, prompts

MOST_MOVES = 5


def listed_routes(world: World) -> dict[str, list[str]] | None:
    """{prompt: every route with a reward} of the training prompts; None where they are too many."""
    if world.max_moves > MOST_MOVES:
        return None
    return {prompt: rewarded_routes(world, prompt) for prompt in prompts(world, "train")}


def side_by_side(rows, padding: float) -> torch.Tensor:
    """P tensors or lists of different lengths -> (P, R) fp64."""
    tensors = []
    for row in rows:
        tensors.append(torch.as_tensor(row, dtype=torch.float64))
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)


class Optimum:
    """pi* of a world's true reward, on the scale of its labels, for one reference and one beta.

    ref_logps: {prompt: log pi_ref (R,) of the routes in listed_routes}; its other responses have
    no reward."""

    def __init__(self, world, ref_logps, beta):
        self.world = world
        self.beta = beta
        true_rewards = []
        for prompt, texts in listed_routes(world).items():
            true_rewards.append([world.reward(prompt, text) for text in texts])
        self.true_reward = side_by_side(true_rewards, 0.0)  # (P, R)
        ref_logp = side_by_side(ref_logps.values(), -torch.inf)
        exact = exact_optimum(ref_logp, world.bt_scale * self.true_reward, beta)
        self.log_z = exact["log_z"]  # (P,)
        self.row = {
            "reward": exact["reward"].mean().item() / world.bt_scale,
            "kl_to_ref": exact["kl_to_ref"].mean().item(),
            "kl_to_optimum": 0.0,
        }

    def reward_of(self, logps) -> float:
        """The true reward of a policy, exactly. logps: {prompt: log pi (R,)} as ref_logps."""
        logp = side_by_side(logps.values(), -torch.inf)
        return (logp.exp() * self.true_reward).sum(1).mean().item()

    def distance_of(self, reward, log_ratio) -> float:
        """KL(pi || pi*) in nats, from k samples of each prompt: their true reward and log pi / pi_ref,
        (P, k) each. It has no spread where pi is pi*."""
        scaled = self.world.bt_scale * reward.double()
        return kl_to_optimum(log_ratio.double(), scaled, self.log_z[:, None], self.beta).mean().item()


def row_of(reward, log_ratio, optimum=None, logps=None):
    """Measures of a policy: {"reward", "kl_to_ref"}, and "kl_to_optimum" where there is an Optimum.

    reward, log_ratio (P, k): of its samples. The reward is exact where there is an Optimum."""
    row = {"reward": reward.mean().item(), "kl_to_ref": log_ratio.mean().item()}
    if optimum is not None:
        row["reward"] = optimum.reward_of(logps)
        row["kl_to_optimum"] = optimum.distance_of(reward, log_ratio)
    return row
