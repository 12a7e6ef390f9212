"""The files of pairs and of prompts that the runs of experiments/wider_data.py train on."""

from pathlib import Path

import numpy as np
import torch

from nanoroads import randomness
from nanoroads.report import evidence
from nanoroads.report.compared import WORLD
from nanoroads.report.judged import read_pairs
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS
from nanoroads.score import scalar_rewards
from nanoroads.text.data import Limits, load
from nanoroads.text.layouts import preference_texts
from nanoroads.weights.checkpoint import load_reward_model
from nanoroads.weights.files import jsonl_bytes, write_bytes
from nanoroads.world.roadmap import prompts


def write_data_files(folder: Path, seed: int):
    """half_pairs.jsonl, all_prompts.jsonl and relabelled_pairs.jsonl of a seed.

    more_pairs.jsonl begins with the rows of sft/pairs.jsonl; the others are new."""
    more_pairs = folder / "more_pairs.jsonl"
    rows = read_pairs(more_pairs)
    all_prompts = prompts(WORLD, "train")  # in random order
    half = set(all_prompts[: len(all_prompts) // 2])
    half_pairs = [row for row in rows if row["prompt"] in half]
    write_bytes(folder / "half_pairs.jsonl", jsonl_bytes(half_pairs[: evidence.PAIRS]))
    write_bytes(folder / "all_prompts.jsonl", jsonl_bytes([{"prompt": prompt} for prompt in all_prompts]))

    # The first pairs keep their true labels, as many more get a reward model's.
    reward_model = load_reward_model(folder / "rlhf_global/reward")
    limits = Limits(context=reward_model.config.block_size)
    pairs = load(more_pairs, preference_texts, ENCODING, limits)
    reward = scalar_rewards(reward_model, pairs.prompts, pairs.responses, GROUPS_PER_PASS)  # (N, 2)
    relabelled = relabel(rows, reward, randomness.generator("relabelled", seed))
    both = rows[: evidence.PAIRS] + relabelled[evidence.PAIRS : 2 * evidence.PAIRS]
    write_bytes(folder / "relabelled_pairs.jsonl", jsonl_bytes(both))


def relabel(rows: list[dict], reward: torch.Tensor, rng: np.random.Generator) -> list[dict]:
    """The same pairs with labels by Bradley-Terry on a model's rewards (N, 2), chosen first."""
    stays = torch.sigmoid(reward[:, 0] - reward[:, 1]).tolist()  # the chance that chosen stays chosen
    relabelled = []
    for row, chance, draw in zip(rows, stays, rng.random(len(rows)), strict=True):
        if draw >= chance:
            row = {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}
        relabelled.append(row)
    return relabelled
