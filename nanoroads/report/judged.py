"""What rewards are judged by in the main world: held-out pairs, and SFT's samples for best of N.

r* is the true reward."""

import json
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid

from nanoroads.randomness import stream_key
from nanoroads.report.on_map import ENCODING, true_rewards
from nanoroads.score import ranked_right
from nanoroads.text import tokenizer
from nanoroads.text.data import Limits, Rows, load
from nanoroads.text.layouts import preference_texts
from nanoroads.world.roadmap import MAIN, prompts
from nanoroads.world.task import sample_routes

WORLD = MAIN
SCALES = torch.logspace(-2, 1.5, 141)  # that are tried for nll_rescaled


def read_pairs(path: Path) -> list[dict[str, str]]:
    """A file of pairs as rows {"prompt", "chosen", "rejected"}."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def true_margins(pairs: list[dict[str, str]]) -> torch.Tensor:
    """r* of the chosen minus r* of the rejected response, (P,) fp64."""
    margins = []
    for pair in pairs:
        chosen = WORLD.reward(pair["prompt"], pair["chosen"])
        margins.append(chosen - WORLD.reward(pair["prompt"], pair["rejected"]))
    return torch.tensor(margins, dtype=torch.float64)


def pairs_as_tokens(pairs: list[dict[str, str]]) -> tuple[list, list]:
    """P pairs -> (prompts, [chosen, rejected] of each), as `pack` takes them."""
    eos = tokenizer.eos_id(ENCODING)
    prompts = []
    responses = []
    for pair in pairs:
        prompts.append(tokenizer.encode(ENCODING, pair["prompt"]))
        chosen = tokenizer.encode(ENCODING, pair["chosen"]) + [eos]
        rejected = tokenizer.encode(ENCODING, pair["rejected"]) + [eos]
        responses.append([chosen, rejected])
    return prompts, responses


def pairs_of(path: Path, context: int) -> tuple[Rows, torch.Tensor]:
    """A file of pairs as data Rows, and their true margins (P,) in fp32.

    context: of the models."""
    rows = load(path, preference_texts, ENCODING, Limits(context=context))
    return rows, true_margins(read_pairs(path)).float()


def samples_of(policy, k: int, seed: int):
    """k samples for each held-out prompt: (prompts, responses) as tokens, and their r*, (prompts, k)."""
    held_out = prompts(WORLD, "test")
    key = stream_key("samples to judge", seed)
    ids, samples = sample_routes(policy, WORLD, ENCODING, held_out, k, seed=key)
    return ids, samples, true_rewards(WORLD, held_out, samples)


def pair_measures(margin: torch.Tensor, true_margin: torch.Tensor) -> dict[str, float]:
    """Measures of the margins of P pairs, chosen minus rejected: by a reward, and by r*, (P,) each.

    nll              of the labels, by Bradley-Terry
    nll_rescaled     the same at the scale of the reward that is best on these very pairs
    accuracy         how often the label is ranked right
    true_order       how often r* is, over the pairs in which it differs"""
    differ = true_margin != 0
    return {
        "nll": -logsigmoid(margin).mean().item(),
        "nll_rescaled": -logsigmoid(SCALES[:, None] * margin).mean(1).max().item(),
        "accuracy": ranked_right(margin).mean().item(),
        "true_order": ranked_right(margin * true_margin.sign())[differ].mean().item(),
    }
