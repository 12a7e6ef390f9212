"""Steps of sampling with fixed shapes, as a CUDA graph needs them; the log-probs of what is sampled."""

import math

import pytest
import torch
from helpers.tiny import SHAPES, tiny

from nanoroads import decoding
from nanoroads.batch import pack
from nanoroads.errors import InputError
from nanoroads.generate import generate, generate_with_logps, stream
from nanoroads.sampling import keep_likeliest
from nanoroads.weights import packed
from nanoroads.weights.packed import can_pack, cast_twin, decoding_twin

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], [8, 9, 7, 9]]
SAMPLING = [
    {"temperature": 0},
    {"temperature": 2.0, "seed": 1},
    {"temperature": 2.0, "top_k": 7, "top_p": 0.9, "eos": 3, "seed": 2},
    {"temperature": 2.0, "eos": (3, 5, 11), "seed": 3},
]


@pytest.fixture
def fixed_shapes(monkeypatch):
    """fixed_shapes(True or False): how `decode` goes about it from now on."""

    def choose(fixed):
        monkeypatch.setattr(decoding, "uses_cuda_graph", lambda model: fixed)

    return choose


@pytest.mark.parametrize("options", SAMPLING)
@pytest.mark.parametrize("kind", SHAPES)
def test_fixed_shapes_draw_the_same_tokens(kind, options, fixed_shapes):
    model = tiny(kind)
    for prompts in (PROMPTS, PROMPTS[2:3]):  # with padding and without
        fixed_shapes(False)
        responses, logps = generate_with_logps(model, prompts, 3, 21, **options)
        fixed_shapes(True)
        fixed_responses, fixed_logps = generate_with_logps(model, prompts, 3, 21, **options)
        assert fixed_responses == responses
        for group, fixed_group in zip(logps, fixed_logps, strict=True):
            for row, fixed_row in zip(group, fixed_group, strict=True):
                torch.testing.assert_close(fixed_row, row, rtol=0, atol=1e-9)


def test_fixed_shapes_stop_at_the_next_look_after_the_last_row_has_finished(fixed_shapes):
    model = tiny()
    options = {"temperature": 0, "eos": generate(model, PROMPTS[:1], 1, 30, temperature=0)[0][0][3]}
    wanted = len(list(stream(model, PROMPTS[:1], 2, 30, **options)))
    fixed_shapes(True)
    steps = list(stream(model, PROMPTS[:1], 2, 30, **options))
    assert len(steps) == decoding.CHECK_EVERY * math.ceil(wanted / decoding.CHECK_EVERY) < 30
    for place, (tokens, finished) in enumerate(steps, start=1):
        assert finished.all() == (place >= wanted)
        assert (tokens == options["eos"]).all() == (place >= wanted)  # a finished row stays what it is
    assert len({id(tokens) for tokens, _ in steps}) == len(steps)  # nobody's tokens are written over
    assert steps[0][0].tolist() != steps[1][0].tolist()


@pytest.mark.parametrize("new_tokens", [1, 2, 3, 8, 9])
def test_fixed_shapes_give_as_many_tokens_as_were_asked_for(new_tokens, fixed_shapes):
    fixed_shapes(True)
    responses = generate(tiny(), PROMPTS, 2, new_tokens)
    assert all(len(row) == new_tokens for group in responses for row in group)


@pytest.mark.parametrize("new_tokens", [1, 5, 20])
def test_with_fixed_shapes_logits_that_are_not_finite_are_refused(new_tokens, fixed_shapes):
    fixed_shapes(True)
    model = tiny()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        generate(model, PROMPTS, 2, new_tokens)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_cuda_graph_draws_the_tokens_of_eager_steps(kind, compute_dtype, fixed_shapes):
    model = tiny(kind).float().cuda()
    model.compute_dtype = compute_dtype
    for options in SAMPLING:
        fixed_shapes(True)
        responses, logps = generate_with_logps(model, PROMPTS, 3, 21, **options)
        fixed_shapes(False)
        eager_responses, eager_logps = generate_with_logps(model, PROMPTS, 3, 21, **options)
        if compute_dtype is None:
            assert responses == eager_responses
        first, eager_first = logps[0][0][0], eager_logps[0][0][0]  # later ones depend on what was drawn
        torch.testing.assert_close(first, eager_first, rtol=0, atol=0.02 if compute_dtype else 1e-4)


@pytest.mark.parametrize("kind", SHAPES)
def test_a_cast_twin_is_the_model_under_autocast(kind, monkeypatch):
    """Bit for bit: a CUDA graph decodes with it."""
    model = tiny(kind).float()
    model.compute_dtype = torch.bfloat16
    wanted = generate_with_logps(model, PROMPTS, 3, 12, temperature=2.0)
    monkeypatch.setattr(decoding, "decoding_twin", lambda model, dtype, rows: cast_twin(model, dtype))
    assert generate_with_logps(model, PROMPTS, 3, 12, temperature=2.0) == wanted
    twin = cast_twin(model, torch.bfloat16)
    assert {p.dtype for p in twin.blocks[0].mlp.up.parameters()} == {torch.bfloat16}
    assert model.blocks[0].mlp.up.weight.dtype == torch.float32


# ---------------------------------------------------------------- log-probs


def flat(nested):
    return torch.tensor([logp for group in nested for row in group for logp in row], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_log_probs_are_those_that_the_policy_gives_its_samples(kind, temperature):
    model = tiny(kind)
    responses, logps = generate_with_logps(model, PROMPTS, 3, 12, temperature, eos=(3, 5), seed=4)
    lengths = [[len(row) for row in group] for group in responses]
    assert [[len(row) for row in group] for group in logps] == lengths
    assert min(map(min, lengths)) < max(map(max, lengths))
    assert responses == generate(model, PROMPTS, 3, 12, temperature, eos=(3, 5), seed=4)
    with torch.no_grad():
        scored = model(pack(PROMPTS, responses), temperature).token
    # Logits are rounded to fp32 before they are divided by the temperature.
    torch.testing.assert_close(flat(logps), scored, rtol=0, atol=1e-5)


def test_with_top_k_and_top_p_they_are_those_of_the_tokens_that_are_left():
    model = tiny()
    responses, logps = generate_with_logps(model, PROMPTS, 5, 1, 2.0, top_k=6, top_p=0.8)
    with torch.no_grad():
        for prompt, group, group_logps in zip(PROMPTS, responses, logps, strict=True):
            logits = model.logits(torch.tensor([prompt]))[:, -1] / 2.0
            wanted = keep_likeliest(logits, 6, 0.8).log_softmax(-1)[0]
            for (token,), (logp,) in zip(group, group_logps, strict=True):
                assert abs(logp - wanted[token]) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_packed_twin_gives_them_but_for_rounding(kind, dtype, monkeypatch):
    if not can_pack(dtype):
        pytest.skip(f"this CPU multiplies no packed {dtype}")
    model = tiny(kind).float()
    model.compute_dtype = dtype
    monkeypatch.setattr(packed, "MIN_PARAMETERS", 1)
    responses, logps = generate_with_logps(model, PROMPTS, 3, 12, 2.0)
    with torch.no_grad():
        scored = model(pack(PROMPTS, responses), 2.0).token
    gap = (flat(logps) - scored).abs().max()
    assert gap < (1e-4 if dtype == torch.float32 else 0.1)


@pytest.mark.skipif(not can_pack(torch.bfloat16), reason="this CPU multiplies no packed bf16")
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
@torch.no_grad()
def test_in_bf16_a_packed_twin_rounds_where_the_model_does(kind, weights, monkeypatch):
    """A rounding more or less anywhere moves log-probs a thousand times as far as this."""
    monkeypatch.setattr(packed, "MIN_PARAMETERS", 1)
    model = tiny(kind).to(weights)
    model.compute_dtype = torch.bfloat16
    tokens = torch.randint(23, (16, 12), generator=torch.Generator().manual_seed(0))
    position = torch.arange(12).expand_as(tokens)
    logps = []
    for decoder in (model, decoding_twin(model, torch.bfloat16, 16)):
        with decoder.autocast():
            hidden = decoder.trunk(tokens, position).flatten(0, 1)
            logps.append(decoder.sampling_head()(hidden).log_softmax(-1))
    assert (logps[0] - logps[1]).abs().mean() < 1e-5
