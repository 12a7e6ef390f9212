"""Both roads where planning is made as easy as verifying (two-move routes), or verifying as hard as
planning (the reward compares with a hidden walk)."""

from pathlib import Path

import torch

from nanoroads.report.on_map import policy_row, route_logps
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import read_config
from nanoroads.world import roadmap
from nanoroads.world.optimum import exact_optimum, kl_to_optimum, routes

STRENGTH = {"dpo": "beta", "rlhf_global": "kl"}  # what the flag is called that weighs KL against reward


def world_folder(seed_folder: Path, world_name: str) -> Path:
    """Where a seed's runs in a world lie: the main world's in the seed's folder itself."""
    if world_name == "roadmap":
        return seed_folder
    return seed_folder / world_name.removeprefix("roadmap-")


def gap_closed_row(seed_folder, world_name):
    """{policy: true reward as {"mean", "se"}} in one of the other two worlds.

    In the short one, also the reward on prompts of the training pairs, since its held-out prompts
    are few, and the KL to the exact optimum."""
    world = roadmap.WORLDS[world_name]
    folder = world_folder(seed_folder, world_name)
    reference = load_policy(folder / "sft")
    policies = {name: load_policy(folder / name) for name in ("sft", "dpo", "rlhf_global")}
    held_out = roadmap.prompts(world, "test")
    rows = {name: policy_row(policy, reference, world, held_out) for name, policy in policies.items()}
    result = {name: row["reward"] for name, row in rows.items()}
    if world_name == "roadmap-short":
        training_prompts = roadmap.prompts(world, "train")[:256]
        for name, policy in policies.items():
            row = policy_row(policy, reference, world, training_prompts)
            result[name]["on_training_prompts"] = row["reward"]
        logps = route_logps(reference, {prompt: routes(world, prompt) for prompt in held_out})
        for name, flag in STRENGTH.items():
            strength = read_config(folder / name).get(flag)
            result[name]["kl_to_optimum"] = kl_to_soft_optimum(world, rows[name], logps, strength)
    return result


def kl_to_soft_optimum(world, row, ref_logps, beta):
    """KL(pi || pi*) in nats, the mean over prompts, of a policy with this row of measures.

    pi* is the soft optimum that both roads aim at; its reward is the labels' logit bt_scale r*.
    ref_logps: {prompt: log pi_ref (R,) of all routes with a reward}, from route_logps."""
    log_zs = []
    for prompt, logp in ref_logps.items():
        true_rewards = [world.reward(prompt, route) for route in routes(world, prompt)]
        reward = world.bt_scale * torch.tensor(true_rewards, dtype=torch.float64)  # (R,)
        log_zs.append(exact_optimum(logp, reward, beta)["log_z"].item())
    mean_log_z = sum(log_zs) / len(log_zs)
    mean_reward = world.bt_scale * row["reward"]["mean"]
    return kl_to_optimum(row["kl_to_ref"]["mean"], mean_reward, mean_log_z, beta)
