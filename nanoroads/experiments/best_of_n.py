"""What experiments/best_of_n.py chooses among: samples of a policy and the reward model's scores."""

import torch

from nanoroads.model import GPT
from nanoroads.progress import tracked
from nanoroads.randomness import stream_key
from nanoroads.report.compared import WORLD
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS
from nanoroads.score import scalar_rewards
from nanoroads.text import tokenizer
from nanoroads.world.roadmap import prompts
from nanoroads.world.task import sample_routes


def sample_and_score(policy: GPT, reward_model: GPT, split: str, k: int, seed: int):
    """k samples of each of P prompts -> prompts, responses, and the reward model's scores (P, k), -inf of
    what is empty or was cut off."""
    split_prompts = prompts(WORLD, split)
    eos = tokenizer.eos_id(ENCODING)
    responses, scores = [], []
    for start in tracked(range(0, len(split_prompts), 250), f"seed {seed}, {split}", "part"):
        part = split_prompts[start : start + 250]
        key = stream_key("best of n", split, seed, start)
        ids, samples = sample_routes(policy, WORLD, ENCODING, part, k, seed=key)
        score = scalar_rewards(reward_model, ids, samples, GROUPS_PER_PASS)
        # What was cut off is no whole response, and what is empty no row to train on: a favourite only
        # where all are such.
        whole = [[sample[-1] == eos and len(sample) > 1 for sample in group] for group in samples]
        scores.append(score.masked_fill(~torch.tensor(whole), -torch.inf))
        responses += samples
    return split_prompts, responses, torch.cat(scores)
