"""The cache against the full forward, in both of its shapes: as long as what is used, and fixed."""

import pytest
import torch
from helpers.tiny import SHAPES, tiny

from nanoroads.cache import FixedCache, KVCache

CACHES = [KVCache, FixedCache]
LENGTHS = [(7, 7, 7), (1, 8, 3), (40, 2, 33)]  # short prompts and long ones are attended to differently


@torch.no_grad()
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("cache_kind", CACHES)
@pytest.mark.parametrize("kind", SHAPES)
def test_it_equals_the_full_forward(kind, cache_kind, lengths):
    """Prompts of these lengths as one stream, then 8 tokens for each, one at a time."""
    model = tiny(kind)
    sequences = torch.randint(23, (3, max(lengths) + 8))
    prompts = [row[:length].tolist() for row, length in zip(sequences, lengths, strict=True)]
    wanted = model.logits(sequences)  # (3, T, V)
    row = torch.arange(3)
    position = torch.tensor(lengths) - 1
    cache = cache_kind(model.config, prompts, 8, dtype=torch.float64)
    hidden = cache.read_prompts(model)
    for _ in range(8):
        torch.testing.assert_close(model.lm_head(hidden), wanted[row, position], rtol=0, atol=1e-10)
        position = cache.next_position()
        hidden = model.trunk(sequences[row, position], position, cache.attend)
    torch.testing.assert_close(model.lm_head(hidden), wanted[row, position], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("cache_kind", CACHES)
def test_rows_that_are_repeated_and_kept_stay_what_they_are(cache_kind):
    model = tiny("gqa")
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    newest = torch.arange(6)
    cache = cache_kind(model.config, prompts, 2, dtype=torch.float64)
    cache.read_prompts(model)
    cache.repeat(3)
    model.trunk(newest, cache.next_position(), cache.attend)
    kept = torch.tensor([1, 3, 5])
    cache.keep(kept)
    hidden = model.trunk(newest[kept] + 7, cache.next_position(), cache.attend)
    for row, logits in zip(kept.tolist(), model.lm_head(hidden), strict=True):
        sequence = torch.tensor([prompts[row // 3] + [row, row + 7]])
        torch.testing.assert_close(logits, model.logits(sequence)[0, -1], rtol=0, atol=1e-10)


@torch.no_grad()
def test_padding_and_columns_to_come_are_never_looked_at():
    """They are filled with numbers that would be seen in every result."""
    model = tiny()
    for cache_kind in CACHES:
        cache = cache_kind(model.config, [[1, 2, 3, 4], [5]], 4, dtype=torch.float64)
        for tensor in (*cache.k, *cache.v):
            tensor.fill_(1e9)
        hidden = cache.read_prompts(model)
        position = cache.next_position()
        hidden = model.trunk(torch.tensor([6, 7]), position, cache.attend)
        wanted = [model.logits(torch.tensor([row]))[0, -1] for row in ([1, 2, 3, 4, 6], [5, 7])]
        torch.testing.assert_close(model.lm_head(hidden), torch.stack(wanted), rtol=0, atol=1e-10)
