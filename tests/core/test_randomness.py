"""Streams of random numbers: other names, other numbers; the same name, the same numbers."""

import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import tiny

from nanoroads import randomness
from nanoroads.generate import generate
from nanoroads.run import optim

ROOT = Path(__file__).parent.parent.parent
PROMPTS = [[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5], [8]]


def test_only_one_file_seeds_generators():
    """RandomState's seeds in roadmap.py belong to the world: they choose its prompts and its walks."""
    seeds = re.compile(r"manual_seed|default_rng|RandomState|Philox|random\.seed|import random\b|torch\.rand")
    found = {}
    for path in [
        *ROOT.glob("*.py"),
        *(ROOT / "nanoroads").rglob("*.py"),
        *(ROOT / "experiments").glob("*.py"),
    ]:
        matches = seeds.findall(path.read_text())
        if matches:
            found[path.name] = sorted(set(matches))
    assert found == {"randomness.py": ["default_rng", "manual_seed"], "roadmap.py": ["RandomState"]}


def test_the_numbers_of_responses_are_uniform_and_independent():
    prompts = [[i, j] for i in range(30) for j in range(30)]
    u = randomness.uniform(prompts, k=4, length=20, seed=1)
    assert u.shape == (3600, 20) and u.dtype == np.float64
    assert 0 <= u.min() and u.max() < 1 and len(np.unique(u)) == u.size
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    chi_squared = ((counts - u.size / 100) ** 2 / (u.size / 100)).sum()
    assert 50 < chi_squared < 170  # 99 degrees of freedom
    assert len(np.unique((u * 2**53).astype(np.int64) % 1024)) == 1024  # the low bits too
    for one, other in (
        (u[:, 0], u[:, 1]),
        (u[0::4].ravel(), u[1::4].ravel()),
        (u[:-4].ravel(), u[4:].ravel()),
    ):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(len(one))


def test_streams_of_other_names_have_other_numbers():
    """Seeds that differ in any bit, also above the 32 that torch's generator on a CPU keeps."""
    seeds = [0, 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**64, 2**127]
    seeds += [randomness.stream_key("responses", seed, step) for seed in range(8) for step in range(8)]
    drawn = [randomness.uniform([[1, 2]], 2, 50, seed) for seed in seeds]
    for one, other in combinations(drawn, 2):
        assert not np.intersect1d(one, other).size
    names = [("a", 0), ("a", 1), ("a", 0, 0), ("b", 0), ("a", 10), ("a", 1, 0), ("a", "0"), ("a", 2**32)]
    drawn = [randomness.generator(*name).random(50) for name in names]
    for one, other in combinations(drawn, 2):
        assert not np.intersect1d(one, other).size
    weights = []
    for stage, seed in (("sft", 0), ("sft", 1), ("reward", 0), ("sft", 2**31)):
        randomness.seed_weights(stage, seed)
        weights.append(torch.rand(50).tolist())
    for one, other in combinations(weights, 2):
        assert not set(one) & set(other)


def test_token_lists_are_not_run_together():
    ambiguous = [[1, 23], [12, 3], [123], [1, 2, 3]]
    u = randomness.uniform(ambiguous, 1, 8, seed=0)
    assert len(np.unique(u)) == u.size
    # Nor a seed with a prompt, nor a prompt with a sample's number.
    assert not np.intersect1d(randomness.uniform([[1]], 12, 8, 1), randomness.uniform([[11]], 12, 8, 1)).size
    assert not np.intersect1d(randomness.uniform([[1]], 1, 8, 11), randomness.uniform([[11]], 1, 8, 1)).size


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_response_depends_on_seed_prompt_and_sample_alone(temperature):
    model = tiny()
    options = {"max_new_tokens": 10, "temperature": temperature, "eos": 7, "seed": 5}
    whole = generate(model, PROMPTS, 4, **options)
    assert generate(model, PROMPTS[::-1], 4, **options) == whole[::-1]  # the order
    for size in (1, 2, 3):  # micro-batches
        parts = []
        for begin in range(0, len(PROMPTS), size):
            parts += generate(model, PROMPTS[begin : begin + size], 4, **options)
        assert parts == whole
    ranks = [generate(model, PROMPTS[rank::2], 4, **options) for rank in range(2)]  # processes
    assert ranks[0] == whole[0::2] and ranks[1] == whole[1::2]
    fewer = generate(model, PROMPTS, 2, **options)  # sample i is sample i, however many there are
    assert fewer == [group[:2] for group in whole]
    assert generate(model, PROMPTS, 4, **{**options, "seed": 6}) != whole


def test_a_prompt_that_stands_there_twice_has_other_samples():
    model = tiny()
    twice = generate(model, [[1, 2], [3], [1, 2]], 3, 10, seed=0)
    assert twice[0] + twice[2] == generate(model, [[1, 2]], 6, 10, seed=0)[0]
    assert twice[0] != twice[2]


def test_a_device_does_not_change_the_numbers():
    """They are drawn on the host; where there is a GPU, its samples are those of the CPU."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = tiny()
    on_cpu = generate(model, PROMPTS, 4, 10, seed=3)
    assert generate(model.cuda(), PROMPTS, 4, 10, seed=3) == on_cpu


def test_samples_follow_the_model_exactly():
    """Frequencies of the first two tokens against exact probabilities, over many streams."""
    model = tiny(vocab_size=4)
    groups = generate(model, [[1, 2]], 8000, 2, seed=11)
    probability = {}
    with torch.no_grad():
        first = model.logits(torch.tensor([[1, 2]]))[0, -1].softmax(-1)
        for a in range(4):
            second = model.logits(torch.tensor([[1, 2, a]]))[0, -1].softmax(-1)
            for b in range(4):
                probability[a, b] = float(first[a] * second[b])
    chi_squared = 0.0
    for pair, p in probability.items():
        count = sum(tuple(response) == pair for response in groups[0])
        chi_squared += (count - 8000 * p) ** 2 / (8000 * p)
    assert chi_squared < 45  # 15 degrees of freedom: beyond it once in ten thousand


def test_each_epoch_and_seed_has_an_order_of_its_own():
    orders = [optim.epoch_order(100, epoch, seed) for epoch in range(3) for seed in (0, 1, 2**31)]
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(100)) for order in orders)
