"""DPO and RLHF in worlds where the gap between verifying and generating is closed, or should be.

With one move there is nothing to plan; with two there is one state in between. In the hidden world
verifying is as hard as planning, since the reward compares with a hidden walk.
"""

from pathlib import Path

import torch

from nanoroads.report import cells
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS, route_logps
from nanoroads.score import mean_se
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import read_config
from nanoroads.world import roadmap
from nanoroads.world.distance import Optimum, exact_reward, listed_routes
from nanoroads.world.task import measure_on_map

# {its name in results.json: the world}
SETTINGS = {"short_horizon": "roadmap-short", "two_moves": "roadmap-2", "hidden_reference": "roadmap-hidden"}
STRENGTH = {"dpo": "beta", "rlhf_global": "kl"}  # the flag that weighs KL against reward
SAMPLES = 8  # of a policy for each prompt
# What "closed" means: a difference in true reward within SMALL, and both roads within NEAR nats of the
# policy that both aim at.
SMALL = 0.01
NEAR = 0.3

# Flags of the worlds of one and two moves, for the main job and for experiments/sweep.py. SFT goes on
# from the main world's policy. Both roads have the same strength, and so the same soft optimum.
FEW_MOVES = {
    "sft": ["--steps", 600, "--lr", 1e-3],
    "pairs": ["--n", 20_000],
    "dpo": ["--beta", 0.5, "--epochs", 1],
    "reward": ["--reward-epochs", 1],
    "rl": ["--kl", 0.5],
}
RL_STEPS = {"roadmap-short": 100, "roadmap-2": 150}


def world_folder(seed_folder: Path, world_name: str) -> Path:
    """Where a seed's runs in a world lie: the main world's in the seed's folder itself."""
    if world_name == "roadmap":
        return seed_folder
    return seed_folder / world_name


def gap_closed_row(folder: Path, world_name: str, roads: dict[str, str] = STRENGTH) -> dict:
    """{policy: {"mean", "se"} of its true reward, ...} in one of the worlds of few prompts.

    folder: the world's runs, sft and `roads`, {run: the flag that weighs KL against reward}. Where
    routes with a reward can be listed, rewards are exact, a road has "kl_to_optimum", {"mean",
    "se"} in nats, and there is "optimum". "rlhf_minus_dpo" is taken prompt by prompt."""
    world = roadmap.WORLDS[world_name]
    reference = load_policy(folder / "sft")
    policies = {"sft": reference}
    for name in roads:
        policies[name] = load_policy(folder / name)
    samples = {}  # {policy: (true reward, log pi/pi_ref), (P, SAMPLES) each}
    for name, policy in policies.items():
        samples[name] = samples_of(policy, reference, world)

    rewards = {}  # {policy: (P,)}
    listed = listed_routes(world)
    if listed is None:
        for name, (reward, _) in samples.items():
            rewards[name] = reward.mean(1)
    else:
        logps = {name: route_logps(policy, listed) for name, policy in policies.items()}
        for name in policies:
            rewards[name] = exact_reward(world, logps[name])
    rows = {name: mean_se(reward) for name, reward in rewards.items()}
    if listed is not None:
        for name, flag in roads.items():
            optimum = Optimum(world, logps["sft"], beta=read_config(folder / name)[flag])
            rows[name]["kl_to_optimum"] = mean_se(optimum.distance_of(*samples[name]))
            # That of the first road's strength; both have the same in the main job.
            rows.setdefault("optimum", mean_se(optimum.reward))
    if "dpo" in rewards and "rlhf_global" in rewards:
        rows["rlhf_minus_dpo"] = mean_se(rewards["rlhf_global"] - rewards["dpo"])
    return rows


def samples_of(policy, reference, world):
    """True reward and log pi/pi_ref of a policy's samples, (P, SAMPLES) fp64 each.

    The prompts are those of both splits, which are the same in these worlds."""
    prompts = roadmap.prompts(world, "train")
    values = measure_on_map(policy, reference, world, ENCODING, prompts, GROUPS_PER_PASS, SAMPLES)
    reward = torch.tensor(values["reward"], dtype=torch.float64)
    log_ratio = torch.tensor(values["kl"], dtype=torch.float64)
    return reward.view(-1, SAMPLES), log_ratio.view(-1, SAMPLES)


def closed_line(setting: str, lead: cells.Cell, dpo: cells.Cell, rlhf: cells.Cell) -> str:
    """The line of a verdict that the gap is closed in a setting.

    lead: RLHF's over DPO in true reward. dpo, rlhf: their nats from the exact soft optimum."""
    closed = cells.every([cells.within(lead, SMALL), cells.below(dpo, NEAR), cells.below(rlhf, NEAR)])
    text = f"{setting} the gap is closed: RLHF - DPO is {cells.beside_nearer_bound(lead, SMALL)}; from the "
    text += f"soft optimum DPO is {cells.plus_minus(dpo, 2)} nats away, {cells.in_errors(dpo, NEAR)}, RLHF "
    return cells.claim(closed, f"{text}{cells.plus_minus(rlhf, 2)}, {cells.in_errors(rlhf, NEAR)}.")
