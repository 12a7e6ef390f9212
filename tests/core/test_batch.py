"""Packing proves itself: log-probs, sums, rewards and gradients
are those of separate, unpadded sequences."""

import dataclasses
import random

import pytest
import torch
from helpers.tiny import SHAPES, tiny

from nanoroads.batch import first_fit, pack


def random_groups(seed, groups=5):
    """Ragged prompts, ragged K, ragged responses."""
    r = random.Random(seed)

    def words(low, high):
        return [r.randrange(23) for _ in range(r.randint(low, high))]

    prompts = [words(1, 7) for _ in range(groups)]
    responses = [[words(1, 6) for _ in range(r.randint(1, 4))] for _ in range(groups)]
    return prompts, responses


def separate(model, prompts, responses):
    """One forward pass for each response: its token log-probs, or
    a reward model's score of each token."""
    out = []
    for prompt, group in zip(prompts, responses, strict=True):
        for response in group:
            tokens = torch.tensor([prompt + response])
            if model.config.head == "scalar":
                hidden = model.trunk(tokens, torch.arange(tokens.shape[1])[None])
                out.append(model.scalar_head(hidden)[0, len(prompt) :, 0])
            else:
                logp = model.logits(tokens)[0, len(prompt) - 1 : -1].log_softmax(-1)
                out.append(logp.gather(1, torch.tensor(response)[:, None])[:, 0])
    return out


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("row_length", [None, 31, 64, 200])
@pytest.mark.parametrize("kind", SHAPES)
def test_policy_equals_separate_sequences(kind, row_length):
    model = tiny(kind)
    for seed in range(3):
        prompts, responses = random_groups(seed)
        logp = model(pack(prompts, responses, row_length=row_length))
        separately = separate(model, prompts, responses)
        token, sequence = torch.cat(separately), torch.stack([tokens.sum() for tokens in separately])
        close(logp.token.double(), token)
        close(logp.sequence.double(), sequence)
        # A random sum of both, so that every gradient counts.
        token_weight, sequence_weight = torch.randn(len(token)), torch.randn(len(sequence))
        packed_loss = (logp.token * token_weight).sum() + (logp.sequence * sequence_weight).sum()
        separate_loss = (token * token_weight).sum() + (sequence * sequence_weight).sum()
        for a, b in zip(gradients(model, packed_loss), gradients(model, separate_loss), strict=True):
            close(a, b)


@pytest.mark.parametrize("row_length", [None, 40])
@pytest.mark.parametrize("readout", ["last", "sum"])
@pytest.mark.parametrize("kind", SHAPES)
def test_reward_model_equals_separate_sequences(kind, readout, row_length):
    model = tiny(kind, head="scalar", readout=readout)
    prompts, responses = random_groups(7)
    reward = model(pack(prompts, responses, row_length=row_length))
    scores = separate(model, prompts, responses)
    wanted = torch.stack([s[-1] if readout == "last" else s.sum() for s in scores])
    close(reward.double(), wanted)
    weight = torch.randn(len(reward))
    packed_gradients = gradients(model, reward @ weight.to(reward))
    separate_gradients = gradients(model, wanted @ weight.double())
    for a, b in zip(packed_gradients, separate_gradients, strict=True):
        close(a, b)


@torch.no_grad()
@pytest.mark.parametrize("kind", SHAPES)
def test_order_padding_and_packing_do_not_matter(kind):
    model = tiny(kind)
    prompts, responses = random_groups(3, groups=8)
    order = random.Random(0).sample(range(8), 8)
    batch = pack(prompts, responses)
    by_group = model(batch).sequence.split([len(group) for group in responses])
    for row_length, pad in ((None, 0), (None, 22), (31, 5), (300, 0)):
        shuffled = pack([prompts[g] for g in order], [responses[g] for g in order], row_length, pad)
        close(model(shuffled).sequence, torch.cat([by_group[g] for g in order]))


def test_the_example_of_the_docstring():
    batch = pack([[10, 11, 12, 13], [14]], [[[1, 2, 3], [4, 5, 6, 7]], [[8, 9]]], pad=99)
    assert batch.tokens.tolist() == [[10, 11, 12, 13, 1, 2, 3, 4, 5, 6, 7], [14, 8, 9] + [99] * 8]
    assert batch.position.tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7], [0, 1, 2] + [0] * 8]
    assert batch.segment.tolist() == [[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2], [0, 1, 1] + [0] * 8]
    assert batch.group.tolist() == [[0] * 11, [1] * 3 + [-1] * 8]
    assert batch.rows.tolist() == [3, 4, 5, 3, 7, 8, 9, 11, 12]
    assert batch.response_index.tolist() == [4, 5, 6, 7, 8, 9, 10, 12, 13]
    assert batch.target.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 9] and batch.cu_seqlens.dtype == torch.int32
    assert batch.last.tolist() == [6, 10, 13] and batch.lengths.tolist() == [3, 4, 2]
    sees = batch.mask()[0, 0]
    assert sees[10].tolist() == [True] * 4 + [False] * 3 + [True] * 4  # the end of b: p and itself, never a
    assert sees[3].tolist() == [True] * 4 + [False] * 7
    moved = batch.to("cpu")
    fields = ("tokens", "position", "group", "segment", "rows", "response_index", "target", "cu_seqlens")
    assert all(torch.equal(getattr(moved, name), getattr(batch, name)) for name in fields)
    assert not moved.causal


def test_groups_in_one_row_do_not_see_each_other():
    batch = pack([[1, 2], [3]], [[[4]], [[5, 6]]], row_length=6)
    assert batch.tokens.tolist() == [[1, 2, 4, 3, 5, 6]] and batch.position.tolist() == [[0, 1, 2, 0, 1, 2]]
    causal = torch.ones(3, 3).tril()
    assert torch.equal(batch.mask()[0, 0], torch.block_diag(causal, causal).bool())


@torch.no_grad()
def test_causal_fast_path_is_the_mask():
    model = tiny("gqa")
    prompts = [[1, 2, 3], [4, 5], [6]]
    responses = [[[7, 8]], [[9, 10]], [[11, 12]]]  # 5, 4 and 3 tokens in all: no two fit a row
    batch = pack(prompts, responses)
    assert batch.causal and batch.mask() is None and batch.tokens.shape == (3, 5)
    masked = dataclasses.replace(batch, causal=False)
    assert masked.mask() is not None
    close(model(batch).token, model(masked).token)
    assert not pack(prompts, [group * 2 for group in responses]).causal
    assert not pack(prompts, responses, row_length=7).causal


@pytest.mark.parametrize(
    ("prompts", "responses", "row_length", "message"),
    [
        ([[1], []], [[[2]], [[3]]], None, "group 1: an empty prompt"),
        ([[1]], [[[2], []]], None, "group 0: an empty prompt or response"),
        ([[1], [2]], [[[2]], []], None, "group 1: an empty prompt or response"),
        ([[1], [2, 3]], [[[2]], [[3], [4]]], 3, "group 1 has 4 tokens, more than row_length 3"),
        ([[1]], [[[2]], [[3]]], None, "zip"),
        ([], [], None, "no groups"),
    ],
)
def test_errors(prompts, responses, row_length, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, responses, row_length=row_length)


def test_first_fit_fills_rows_and_never_overflows():
    r = random.Random(0)
    for _ in range(50):
        sizes = [r.randint(1, 40) for _ in range(r.randint(1, 60))]
        bins = first_fit(sizes, 40)
        assert sorted(g for members in bins for g in members) == list(range(len(sizes)))
        filled = [sum(sizes[g] for g in members) for members in bins]
        assert max(filled) <= 40
        assert len([size for size in filled if size <= 20]) <= 1  # two half-empty rows would have been one
