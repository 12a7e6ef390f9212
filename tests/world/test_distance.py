"""The soft optimum by enumeration, and the distance of a policy to it."""

import math

import pytest
import torch

from nanoroads.world import distance
from nanoroads.world.roadmap import WORLDS, prompts

BETA = 0.5


def uniform_logps(world, mass):
    """Log-probs that share `mass` equally among the listed routes of each prompt."""
    listed = distance.listed_routes(world)
    return {
        prompt: torch.full((len(texts),), mass / len(texts), dtype=torch.float64).log()
        for prompt, texts in listed.items()
    }


def test_which_worlds_are_listed():
    assert distance.listed_routes(WORLDS["roadmap-8"]) is None
    assert distance.listed_routes(WORLDS["roadmap"]) is None
    listed = distance.listed_routes(WORLDS["roadmap-2"])
    assert list(listed) == prompts(WORLDS["roadmap-2"], "train")
    assert sum(map(len, listed.values())) == 377


def test_one_move_by_hand():
    """One route has r = 1, so Z is p e^(6 / beta) + 1 - p."""
    world = WORLDS["roadmap-short"]
    optimum = distance.Optimum(world, uniform_logps(world, 0.25), BETA)
    z = 0.25 * math.exp(6 / BETA) + 0.75
    assert optimum.log_z.tolist() == pytest.approx([math.log(z)] * 200)
    share = 0.25 * math.exp(6 / BETA) / z
    assert optimum.row["reward"] == pytest.approx(share)
    assert optimum.row["kl_to_ref"] == pytest.approx(share * 6 / BETA - math.log(z))
    # The reference itself: E[log pi_ref - log pi*] = log Z - E[6 r] / beta.
    reward = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).repeat(200, 1)
    row = distance.row_of(reward, torch.zeros(200, 4), optimum, uniform_logps(world, 0.25))
    assert row["reward"] == pytest.approx(0.25) and row["kl_to_ref"] == 0
    assert row["kl_to_optimum"] == pytest.approx(math.log(z) - 0.25 * 6 / BETA)


def test_two_moves_by_hand():
    """Prompts differ in how many routes have a reward; a row has the exact reward, not the samples'."""
    world = WORLDS["roadmap-2"]
    rewards, log_z = [], []
    for prompt, texts in distance.listed_routes(world).items():
        share = 0.3 / len(texts)
        true = [world.reward(prompt, text) for text in texts]
        rewards.append(share * sum(true))
        log_z.append(math.log(0.7 + share * sum(math.exp(6 * reward / BETA) for reward in true)))
    logps = uniform_logps(world, 0.3)
    assert distance.exact_reward(world, logps).tolist() == pytest.approx(rewards)
    optimum = distance.Optimum(world, logps, BETA)
    assert optimum.log_z.tolist() == pytest.approx(log_z)
    row = distance.row_of(torch.ones(200, 4), torch.zeros(200, 4), optimum, logps)
    assert row["reward"] == pytest.approx(sum(rewards) / 200)


def test_the_optimum_is_no_distance_from_itself():
    """Whatever is drawn from it, its log-ratio is the scaled reward less log Z."""
    world = WORLDS["roadmap-2"]
    optimum = distance.Optimum(world, uniform_logps(world, 0.3), BETA)
    reward = torch.tensor([0.0, 0.95, 1.0]).repeat(200, 1)
    log_ratio = world.bt_scale * reward / BETA - optimum.log_z[:, None]
    row = distance.row_of(reward, log_ratio, optimum, uniform_logps(world, 0.3))
    assert row["kl_to_optimum"] == pytest.approx(0, abs=1e-5)


def test_without_an_optimum_the_samples_count():
    row = distance.row_of(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 1.5]]))
    assert row == {"reward": 0.5, "kl_to_ref": 1.0}
