"""DPO and RLHF in the two other worlds.

In one, planning is as easy as verifying (routes of at most two moves); in the other, verifying is
as hard as planning (the reward compares with a hidden walk).
"""

from pathlib import Path

import torch

from nanoroads.report.on_map import policy_row, route_logps
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import read_config
from nanoroads.world import roadmap
from nanoroads.world.optimum import exact_optimum, kl_to_optimum, rewarded_routes

STRENGTH = {"dpo": "beta", "rlhf_global": "kl"}  # the flag that weighs KL against reward


def world_folder(seed_folder: Path, world_name: str) -> Path:
    """Where a seed's runs in a world lie: the main world's in the seed's folder itself."""
    if world_name == "roadmap":
        return seed_folder
    return seed_folder / world_name.removeprefix("roadmap-")


def gap_closed_row(seed_folder, world_name):
    """{policy: {"mean", "se"} of its true reward, ...} in one of the other two worlds.

    In the short one, a policy also has "on_training_prompts", its reward on prompts of the training
    pairs, since the held-out prompts are few, and "kl_to_optimum", unless it is SFT's."""
    world = roadmap.WORLDS[world_name]
    folder = world_folder(seed_folder, world_name)
    reference = load_policy(folder / "sft")
    policies = {name: load_policy(folder / name) for name in ("sft", "dpo", "rlhf_global")}
    held_out = roadmap.prompts(world, "test")
    rows = {name: policy_row(policy, reference, world, held_out) for name, policy in policies.items()}
    result = {name: dict(row["reward"]) for name, row in rows.items()}
    if world_name == "roadmap-short":
        training_prompts = roadmap.prompts(world, "train")[:256]
        for name, policy in policies.items():
            row = policy_row(policy, reference, world, training_prompts)
            result[name]["on_training_prompts"] = row["reward"]
        logps = route_logps(reference, {prompt: rewarded_routes(world, prompt) for prompt in held_out})
        for name, flag in STRENGTH.items():
            strength = read_config(folder / name).get(flag)
            result[name]["kl_to_optimum"] = kl_to_soft_optimum(world, rows[name], logps, strength)
    return result


def kl_to_soft_optimum(world, row, ref_logps, beta):
    """KL(pi || pi*) in nats, the mean over prompts, of a policy with this row of measures.

    pi* is the soft optimum that both roads aim at. Its reward is bt_scale r*, whose difference is
    the labels' logit.
    ref_logps: {prompt: log pi_ref (R,) of all routes with a reward}, from route_logps."""
    log_zs = []
    for prompt, logp in ref_logps.items():
        true_rewards = [world.reward(prompt, route) for route in rewarded_routes(world, prompt)]
        reward = world.bt_scale * torch.tensor(true_rewards, dtype=torch.float64)  # (R,)
        log_zs.append(exact_optimum(logp, reward, beta)["log_z"].item())
    mean_log_z = sum(log_zs) / len(log_zs)
    mean_reward = world.bt_scale * row["reward"]["mean"]
    return kl_to_optimum(row["kl_to_ref"]["mean"], mean_reward, mean_log_z, beta)
