"""DPO and RLHF in worlds where the gap between verifying and generating is closed, or should be.

With one move there is nothing to plan; with two there is one state in between. In the hidden world
verifying is as hard as planning, since the reward compares with a hidden walk.
"""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from nanoroads.losses import kl_k1
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS, over_prompts, route_logps
from nanoroads.score import mean_se, sequence_logps
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import read_config
from nanoroads.world import roadmap
from nanoroads.world.optimum import exact_optimum, kl_to_optimum, rewarded_routes
from nanoroads.world.task import MEASURES, sample_routes

SETTINGS = {"short_horizon": "roadmap-short", "two_moves": "roadmap-2", "hidden_reference": "roadmap-hidden"}
STRENGTH = {"dpo": "beta", "rlhf_global": "kl"}  # the flag that weighs KL against reward
SAMPLES = 8  # of a policy for each prompt

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
    prompts = roadmap.prompts(world, "test")
    reference = load_policy(folder / "sft")
    policies = {"sft": reference}
    for name in roads:
        policies[name] = load_policy(folder / name)
    if world.hidden:
        rewards = {name: sampled_rewards(policy, world, prompts) for name, policy in policies.items()}
        result = {name: mean_se(reward) for name, reward in rewards.items()}
    else:
        rewards, result = rows_with_optimum(folder, world, prompts, policies, roads)
    if "dpo" in rewards and "rlhf_global" in rewards:
        result["rlhf_minus_dpo"] = mean_se(rewards["rlhf_global"] - rewards["dpo"])
    return result


def samples(policy, world, prompts):
    """A policy's samples: prompts and responses as tokens, and the true rewards (P, SAMPLES)."""
    ids, responses = sample_routes(policy, world, ENCODING, prompts, SAMPLES, seed=MEASURES)
    rewards = []
    for prompt, group in zip(prompts, responses, strict=True):
        rewards.append([world.reward(prompt, text) for text in tokenizer.decode_all(ENCODING, group)])
    return ids, responses, torch.tensor(rewards, dtype=torch.float64)


def sampled_rewards(policy, world, prompts):
    """The mean true reward of a policy's samples of each prompt, (P,)."""
    _, _, reward = samples(policy, world, prompts)
    return reward.mean(1)


# ---------------------------------------------------------------- where the optimum is known


def rows_with_optimum(folder, world, prompts, policies, roads):
    """({policy: true reward of each prompt (P,)}, {policy or "optimum": its row}).

    The optimum is that of the first road's strength; both have the same in the main job."""
    routes = {prompt: rewarded_routes(world, prompt) for prompt in prompts}
    true_rewards = []
    for prompt, texts in routes.items():
        true_rewards.append(torch.tensor([world.reward(prompt, text) for text in texts]).double())
    true_reward = pad_sequence(true_rewards, batch_first=True)  # (P, R)
    rewards = {}
    logps = {}  # {policy: (P, R)}
    for name, policy in policies.items():
        logp = route_logps(policy, routes).values()
        logps[name] = pad_sequence(list(logp), batch_first=True, padding_value=-torch.inf)
        rewards[name] = (logps[name].exp() * true_reward).sum(1)
    rows = {name: mean_se(reward) for name, reward in rewards.items()}

    for name, flag in roads.items():
        beta = read_config(folder / name)[flag]
        # Labels are Bradley-Terry on bt_scale r*, so that is the reward whose optimum both roads aim at.
        optimum = exact_optimum(logps["sft"], world.bt_scale * true_reward, beta)
        rows.setdefault("optimum", mean_se(optimum["reward"] / world.bt_scale))
        distance = distances(policies[name], policies["sft"], world, prompts, optimum["log_z"], beta)
        rows[name]["kl_to_optimum"] = over_prompts(distance, prompts)
    return rewards, rows


def distances(policy, reference, world, prompts, log_z, beta):
    """log pi / pi* in nats of each sample of a policy; its mean is KL(pi || pi*). log_z (P,): exact."""
    ids, responses, reward = samples(policy, world, prompts)
    logp = sequence_logps(policy, ids, responses, GROUPS_PER_PASS)  # (P, SAMPLES)
    ref_logp = sequence_logps(reference, ids, responses, GROUPS_PER_PASS)
    log_ratio = kl_k1(logp, ref_logp).double()
    return kl_to_optimum(log_ratio, world.bt_scale * reward, log_z[:, None], beta).flatten().tolist()
