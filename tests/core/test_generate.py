"""Sampling: greedy against the uncached forward, the supports of top-k and top-p, frequencies, EOS, seeds."""

import math

import pytest
import torch
from helpers.tiny import SHAPES, tiny

import kernels
from nanoroads.cache import KVCache
from nanoroads.errors import InputError
from nanoroads.generate import generate, sample_token, stream
from nanoroads.weights import packed
from nanoroads.weights.packed import PackedLinear, can_pack, decoding_twin

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5], [8, 9, 7, 9]]
PROMPTS_7 = [[t % 7 for t in prompt] for prompt in PROMPTS]


@torch.no_grad()
def greedy(model, prompt, n, eos=None):
    """Token by token, the whole sequence anew each time."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + n and (len(tokens) == len(prompt) or tokens[-1] != eos):
        tokens.append(int(model.logits(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("kind", SHAPES)
def test_greedy_equals_the_uncached_forward(kind, k):
    for seed in range(2):
        model = tiny(kind, seed=seed)
        wanted = [greedy(model, p, 12) for p in PROMPTS]
        assert len({tuple(w) for w in wanted}) > 1
        assert generate(model, PROMPTS, k, 12, temperature=0) == [[w] * k for w in wanted]
        assert (
            generate(model, PROMPTS[2:3] * 2, k, 12, temperature=0) == [[wanted[2]] * k] * 2
        )  # nothing to pad
        eos = wanted[1][7]
        assert generate(model, PROMPTS, k, 12, temperature=0, eos=eos) == [
            [greedy(model, p, 12, eos)] * k for p in PROMPTS
        ]


def test_top_k_1_is_greedy():
    model = tiny("neox")
    assert generate(model, PROMPTS, 2, 15, top_k=1) == generate(model, PROMPTS, 2, 15, temperature=0)


def test_eos_stops_each_row_and_nothing_follows():
    model = tiny(vocab_size=5)
    prompts = [[1, 2], [3], [4, 4, 4]]
    groups = generate(model, prompts, 20, 12, eos=0, temperature=3.0)
    rows = [row for group in groups for row in group]
    assert [len(group) for group in groups] == [20, 20, 20]
    for row in rows:
        assert 0 not in row[:-1] and (row[-1] == 0 or len(row) == 12)
    lengths = {len(row) for row in rows}
    assert len(lengths) > 5 and 12 in lengths
    steps = list(stream(model, prompts, 20, 12, eos=0, temperature=3.0))
    for i, row in enumerate(rows):
        assert [int(token[i]) for token, _ in steps] == row + [0] * (len(steps) - len(row))
        assert [bool(finished[i]) for _, finished in steps] == [0 in row[: t + 1] for t in range(len(steps))]


def test_it_stops_when_every_row_has():
    model = tiny()
    eos = greedy(model, PROMPTS[0], 4)[3]
    steps = list(stream(model, PROMPTS[:1], 5, 30, temperature=0, eos=eos))
    assert len(steps) == greedy(model, PROMPTS[0], 30).index(eos) + 1 and steps[-1][1].all()


def test_a_seed_is_a_sample():
    model = tiny("gqa")

    def draw(seed):
        return generate(model, PROMPTS, 4, 10, temperature=2.0, seed=seed)

    state = torch.get_rng_state()
    assert draw(5) == draw(5) != draw(6)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    group = draw(5)[0]
    assert len({tuple(row) for row in group}) == 4  # the samples of one prompt differ


def allowed(logits, temperature, top_k, top_p):
    """The definition, one token at a time.

    The k likeliest; of these the shortest run whose probability reaches top_p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    p = (torch.tensor(logits, dtype=torch.float64) / temperature).exp()
    order = order[: top_k or None]
    kept, total = [], float(p[order].sum())
    for i in order:
        kept.append(i)
        if top_p < 1 and float(p[kept].sum()) / total >= top_p:
            break
    probability = torch.zeros(len(logits), dtype=torch.float64)
    probability[kept] = p[kept] / p[kept].sum()
    return probability


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_top_k_and_top_p_are_their_definitions(temperature):
    """A fine grid of u measures the probability of each token; one outside the support must never come."""
    torch.manual_seed(0)
    rows, n = 3 * torch.randn(20, 11), 1000
    u = (torch.arange(n) + 0.5) / n
    for top_k in (0, 1, 4, 11, 50):
        for top_p in (1.0, 0.9, 0.5, 0.01):
            token = sample_token(rows.repeat_interleave(n, 0), u.repeat(20), temperature, top_k, top_p).view(
                20, n
            )
            share = torch.nn.functional.one_hot(token, 11).double().mean(1)  # (20, 11)
            wanted = torch.stack([allowed(row, temperature, top_k, top_p) for row in rows.tolist()])
            assert not share[wanted == 0].any() and share[wanted > 1.001 / n].all()
            torch.testing.assert_close(share, wanted, rtol=0, atol=1.001 / n)


def test_top_p_that_is_reached_exactly_cuts_the_rest():
    u = torch.linspace(0, 0.99, 7)
    assert sample_token(torch.zeros(7, 2), u, 1.0, 0, 0.5).unique().numel() == 1


def test_the_ends_of_the_unit_interval():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]] * 2)
    assert sample_token(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0, 0, 1.0).tolist() == [1, 2]
    assert sample_token(logits, torch.tensor([0.0, 1 - 2**-24]), 1.0, 0, 1e-9).tolist() == [2, 2]


def test_a_sample_does_not_depend_on_when_others_finish():
    model = tiny(vocab_size=7)
    alone = [row for group in generate(model, PROMPTS_7, 30, 15, temperature=3.0) for row in group]
    for eos in range(1, 4):
        rows = [
            row for group in generate(model, PROMPTS_7, 30, 15, temperature=3.0, eos=eos) for row in group
        ]
        assert min(map(len, rows)) < 4 and max(map(len, rows)) > 9
        assert rows == [row[: row.index(eos) + 1] if eos in row else row for row in alone]


@pytest.mark.parametrize("temperature", [0.5, 1.0])
@pytest.mark.parametrize("kind", ["learned", "gqa"])
@torch.no_grad()
def test_frequencies_are_probabilities(kind, temperature):
    """Pairs of tokens, so that one comes from the prefill and one from the cache.

    Two prompts of different lengths."""
    model, n = tiny(kind, vocab_size=4, n_embd=16), 8000
    prompts = [[1, 2, 3], [2]]
    for prompt, rows in zip(prompts, generate(model, prompts, n, 2, temperature=temperature), strict=True):
        first = (model.logits(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1)
        second = (model.logits(torch.tensor([[*prompt, a] for a in range(4)]))[:, -1] / temperature).softmax(
            -1
        )
        p = (first[:, None] * second).flatten()  # (16,)
        count = torch.bincount(torch.tensor([4 * a + b for a, b in rows]), minlength=16)
        z = (count - n * p) / (n * p * (1 - p)).clamp(min=1).sqrt()
        assert z.abs().max() < 4.5
        assert 0.05 < p.max() < 0.95


def test_a_prompt_is_prefilled_once(monkeypatch):
    model, shapes = tiny(), []
    trunk = model.trunk
    monkeypatch.setattr(
        model, "trunk", lambda tokens, *a: shapes.append(tuple(tokens.shape)) or trunk(tokens, *a)
    )
    generate(model, PROMPTS, 6, 5)
    assert shapes == [(15,)] + [(24,)] * 4  # the prompts as one stream, without padding


def can_be_packed(dtype):
    """A parameter that is skipped where oneDNN does not do it, as bf16 on a CPU with AVX2 alone."""
    skip = pytest.mark.skipif(not can_pack(dtype), reason=f"this CPU multiplies no packed {dtype}")
    return pytest.param(dtype, marks=skip)


def linears(model):
    return [module for module in model.modules() if type(module) is torch.nn.Linear]


@pytest.mark.parametrize("dtype", [can_be_packed(torch.float32), can_be_packed(torch.bfloat16)])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_packed_twin_is_the_model(kind, dtype, monkeypatch):
    """The same logits and samples, from a model that is left as it was."""
    model = tiny(kind).to(dtype)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    wanted = generate(model, PROMPTS, 2, 8, temperature=0)
    monkeypatch.setattr(packed, "MIN_PARAMETERS", 1)
    twin = decoding_twin(model, dtype, 4)
    assert sum(isinstance(m, PackedLinear) for m in twin.modules()) == len(linears(model)) > 8
    assert not linears(twin)
    tokens = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    with torch.no_grad():
        expected = model.logits(tokens)
        apart = (twin.logits(tokens) - expected).abs().max() / expected.abs().max()
    assert apart < (1e-5 if dtype == torch.float32 else 0.03)
    assert twin.embedding.weight is model.embedding.weight
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    if dtype == torch.float32:
        assert generate(model, PROMPTS, 2, 8, temperature=0) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_not_packed_is_the_model_itself(kind, dtype, monkeypatch):
    """Small models, fp64 and compiled trunks, on any CPU."""
    model = tiny(kind).to(dtype)
    assert decoding_twin(model, dtype, 4) is model
    monkeypatch.setattr(packed, "MIN_PARAMETERS", 1)
    assert decoding_twin(model.double(), torch.float64, 4) is model
    monkeypatch.setattr(torch, "compile", lambda trunk, **options: trunk)
    model.compile_trunk()
    assert decoding_twin(model.to(dtype), dtype, 4) is model


def test_a_cpu_without_bf16_decodes_with_the_model_itself(monkeypatch):
    model = tiny("gqa").float()
    model.compute_dtype = torch.bfloat16
    wanted = generate(model, PROMPTS, 2, 8, temperature=0)
    monkeypatch.setattr(packed, "MIN_PARAMETERS", 1)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    assert not can_pack(torch.bfloat16)
    assert decoding_twin(model, torch.bfloat16, 4) is model
    assert generate(model, PROMPTS, 2, 8, temperature=0) == wanted


@pytest.mark.parametrize("without", ["oneDNN", "x86"])
def test_another_cpu_decodes_with_the_model_itself(without, monkeypatch):
    model = tiny().float()
    monkeypatch.setattr(packed, "MIN_PARAMETERS", 1)
    if without == "oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    else:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    for dtype in (torch.float32, torch.bfloat16):
        assert not can_pack(dtype)
        assert decoding_twin(model, dtype, 4) is model


SAMPLING = [
    {"temperature": 0},
    {"temperature": 2.0, "seed": 1},
    {"temperature": 2.0, "top_k": 7, "top_p": 0.9, "eos": 3, "seed": 2},
]


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_in_bf16_the_policy_that_samples_is_the_one_that_is_scored(kind, is_packed, monkeypatch):
    """Logits that are rounded to bf16 are those of another policy: by 4e-4 nats per token."""
    if is_packed and not can_pack(torch.bfloat16):
        pytest.skip("oneDNN does not pack bf16 here")
    monkeypatch.setattr(packed, "MIN_PARAMETERS", 1 if is_packed else 10**9)
    model = tiny(kind).float()
    model.compute_dtype = torch.bfloat16
    hidden = (20 * torch.randn(64, 32)).bfloat16()  # logits deviate by far more than one
    twin = decoding_twin(model, torch.bfloat16, 64)
    assert (twin is model) != is_packed
    with torch.no_grad(), twin.autocast():
        logits = twin.sampling_head()(hidden)
    assert logits.dtype == torch.float32 and logits.std() > 3
    target = torch.arange(64) % 23
    with torch.no_grad(), model.autocast():
        _, scored = kernels.sequence_logp(
            hidden, model.lm_head.weight, target, torch.tensor([0, 64], dtype=torch.int32)
        )
    sampled = logits.double().log_softmax(-1)[torch.arange(64), target]
    assert (sampled - scored).abs().max() < 1e-4


@pytest.mark.parametrize("kind", SHAPES)
def test_the_compute_dtype_of_the_weights_changes_nothing(kind):
    plain, same = tiny(kind).float(), tiny(kind).float()
    same.compute_dtype = torch.float32
    for options in SAMPLING:
        assert generate(same, PROMPTS, 3, 12, **options) == generate(plain, PROMPTS, 3, 12, **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    model = tiny()
    model.lm_head.weight.data.fill_(bad)
    with pytest.raises(InputError, match="not finite"):
        generate(model, PROMPTS, 2, 4, temperature=temperature)
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad  # one token that is impossible is no fault
    u = torch.rand(3, dtype=torch.float64)
    if bad == -float("inf"):
        assert sample_token(logits, u, temperature, 0, 1.0)[1] != 2
    else:
        with pytest.raises(InputError, match="not finite"):
            sample_token(logits, u, temperature, 0, 1.0)


@pytest.mark.parametrize("temperature", [1e-4, 1e-20, 1e-38, 1e-45, 1e-300, 5e-324])
def test_the_smaller_the_temperature_the_greedier(temperature):
    model = tiny()
    greedy = generate(model, PROMPTS, 3, 8, temperature=0)
    assert generate(model, PROMPTS, 3, 8, temperature=temperature) == greedy
    assert generate(model, PROMPTS, 3, 8, temperature=temperature, top_k=4, top_p=0.9) == greedy
    logits = torch.tensor([[0.0, 1e10, 1e9], [-1e10, -2e10, -3e10]])  # over T they are infinite in fp32
    assert sample_token(logits, torch.full((2,), 0.9).double(), temperature, 0, 1.0).tolist() == [1, 0]


def test_every_token_of_a_large_vocabulary_can_be_drawn_as_often_as_it_should():
    """With 24 random bits, and cumulative sums in fp32, a token of 2^-26 of the mass is drawn four times too
    often, or never."""
    v = 2**17
    logits = torch.zeros(1, v)
    logits[0, : v // 2] = -9 * math.log(2)  # the first half: 2^-26 each, and a little more
    chance = logits[0].double().softmax(-1)
    u = 2000.25 * chance[0] + torch.arange(256, dtype=torch.float64) * chance[0] / 32
    token = sample_token(logits.expand(256, v), u, 1.0, 0, 1.0)
    assert torch.bincount(token - 2000, minlength=9).tolist() == [24] + [32] * 7 + [8]


def test_the_cache_is_in_the_compute_dtype(monkeypatch):
    """And a packed twin decodes in it."""
    model = tiny().float()
    model.compute_dtype = torch.bfloat16
    dtypes = []
    attend = KVCache.attend
    monkeypatch.setattr(
        KVCache, "attend", lambda cache, *rest: dtypes.append(cache.k[0].dtype) or attend(cache, *rest)
    )
    assert len(list(stream(model, PROMPTS, 2, 8))) == 8
    monkeypatch.setattr(packed, "MIN_PARAMETERS", 1)
    assert len(list(stream(model, PROMPTS, 2, 8))) == 8
    assert len(dtypes) == 2 * 7 * model.config.n_layer and set(dtypes) == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "0 samples of 3 tokens"),
        ({"max_new_tokens": 0}, "2 samples of 0 tokens"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), PROMPTS, **{"k": 2, "max_new_tokens": 3} | options)


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ([[1] * 40], 9, "40 tokens and 9 new ones exceed the model's context, 48"),
        ([[1], []], 3, "empty prompt"),
        ([], 3, "no prompts"),
    ],
)
def test_errors(prompts, n, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny(), prompts, 1, n)


def test_the_context_can_be_filled():
    assert len(generate(tiny(), [[1] * 40], 1, 8)[0][0]) == 8


def test_several_tokens_may_end_a_response():
    model = tiny()
    prompts = [[1, 2, 3], [4, 5]]
    free = generate(model, prompts, k=6, max_new_tokens=12, seed=4)
    stop = (7, 11)
    stopped = generate(model, prompts, k=6, max_new_tokens=12, eos=stop, seed=4)
    ended = set()
    for free_group, group in zip(free, stopped, strict=True):
        for whole, response in zip(free_group, group, strict=True):
            places = [place for place, token in enumerate(whole) if token in stop]
            assert response == (whole[: places[0] + 1] if places else whole)
            ended.update(response[-1:])
    assert ended >= set(stop)  # both did end a response
