"""A stream of groups proves itself: log-probs, sums, rewards and gradients are those of separate
sequences, in each of the four ways to attend."""

import copy
import random
import shutil

import pytest
import torch
from helpers.tiny import SHAPES, tiny
from torch.nn.attention import flex_attention

from nanoroads import attention
from nanoroads.batch import pack

WAYS = ("by_segment", "by_group", "padded", "by_blocks")


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """Each way to attend, also those that a CPU would not take."""
    monkeypatch.setattr(attention, "of_groups", getattr(attention, request.param))
    # FlexAttention refuses gradients on a CPU, since no compiled kernel has them there. Its eager form
    # is differentiable.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "BLOCK", 16)


def random_groups(seed, groups=5, most=4):
    """Ragged prompts, ragged K, ragged responses."""
    r = random.Random(seed)

    def words(low, high):
        return [r.randrange(23) for _ in range(r.randint(low, high))]

    prompts = [words(1, 7) for _ in range(groups)]
    responses = [[words(1, 6) for _ in range(r.randint(1, most))] for _ in range(groups)]
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("most", [1, 2, 4])  # responses of a prompt
@pytest.mark.parametrize("kind", SHAPES)
def test_policy_equals_separate_sequences(kind, most, way):
    model = tiny(kind)
    for seed in range(3):
        prompts, responses = random_groups(seed, most=most)
        logp = model(pack(prompts, responses))
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("readout", ["last", "sum"])
@pytest.mark.parametrize("kind", SHAPES)
def test_reward_model_equals_separate_sequences(kind, readout, way):
    model = tiny(kind, head="scalar", readout=readout)
    prompts, responses = random_groups(7)
    reward = model(pack(prompts, responses))
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
def test_the_order_of_groups_does_not_matter(kind):
    model = tiny(kind)
    prompts, responses = random_groups(3, groups=8)
    order = random.Random(0).sample(range(8), 8)
    by_group = model(pack(prompts, responses)).sequence.split([len(group) for group in responses])
    shuffled = pack([prompts[g] for g in order], [responses[g] for g in order])
    close(model(shuffled).sequence, torch.cat([by_group[g] for g in order]))


def test_the_example_of_the_docstring():
    batch = pack([[10, 11, 12, 13], [14, 15]], [[[1, 2, 3], [4, 5, 6, 7]], [[8, 9, 10], [11]]])
    assert batch.tokens.tolist() == [10, 11, 12, 13, 1, 2, 3, 4, 5, 6, 7, 14, 15, 8, 9, 10, 11]
    assert batch.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 0, 1, 2, 3, 4, 2]
    assert batch.group_lengths == [[4, 3, 4], [2, 3, 1]]
    assert batch.rows.tolist() == [3, 4, 5, 3, 7, 8, 9, 12, 13, 14, 12]
    assert batch.response_index.tolist() == [4, 5, 6, 7, 8, 9, 10, 13, 14, 15, 16]
    assert batch.target.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert batch.cu_seqlens.tolist() == [0, 3, 7, 10, 11] and batch.cu_seqlens.dtype == torch.int32
    assert batch.last.tolist() == [6, 10, 15, 16] and batch.lengths.tolist() == [3, 4, 3, 1]
    moved = batch.to("cpu")
    fields = ("tokens", "position", "rows", "response_index", "target", "cu_seqlens")
    assert all(torch.equal(getattr(moved, name), getattr(batch, name)) for name in fields)
    assert moved.group_lengths == batch.group_lengths


def who_sees_whom(groups):
    """(N, N) bool, from the words of batch.py: the earlier tokens of its own response and the whole
    prompt of its group."""
    tokens = []  # of each its group, its response (0: the prompt) and its place in it
    for g, lengths in enumerate(groups):
        for r, length in enumerate(lengths):
            tokens += [(g, r, place) for place in range(length)]
    sees = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, (g, r, place) in enumerate(tokens):
        for j, (other_g, other_r, other_place) in enumerate(tokens):
            in_prompt = other_r == 0 and r > 0
            earlier = other_r == r and other_place <= place
            sees[i, j] = g == other_g and (in_prompt or earlier)
    return sees


def attention_weights(attend, n):
    """(N, N) of an attend function: with the identity as values, the output is the weights."""
    same = torch.zeros(n, 1, n, dtype=torch.float64)  # (N, H, C): all scores are 0
    return attend(0, same, same, torch.eye(n, dtype=torch.float64)[:, None])[:, 0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_everybody_sees_whom_they_should_and_nobody_else(way):
    ragged, even = [[4, 3, 4], [1, 5], [2, 1, 1, 6], [3, 2]], [[2, 3, 1], [1, 2, 3]]
    for groups in (ragged, even, [[2, 3], [4, 1]]):
        sees = who_sees_whom(groups)
        weights = attention_weights(attention.of_groups(groups, "cpu"), len(sees))
        close(weights, sees / sees.sum(1, keepdim=True, dtype=torch.float64))


def test_blocks_are_those_in_which_somebody_sees_somebody(monkeypatch):
    """FlexAttention skips the others. A block too many costs time; one too few is a wrong result."""
    masks = []
    build = flex_attention.BlockMask.from_kv_blocks
    monkeypatch.setattr(
        flex_attention.BlockMask, "from_kv_blocks", lambda *a, **k: masks.append(build(*a, **k)) or masks[-1]
    )
    monkeypatch.setattr(attention, "BLOCK", 16)
    for seed in range(20):
        r = random.Random(seed)
        groups = [[r.randint(1, 40) for _ in range(r.randint(2, 6))] for _ in range(r.randint(1, 6))]
        attention.by_blocks(groups, "cpu")
        sees = who_sees_whom(groups)
        pad = -len(sees) % 16
        padded = torch.nn.functional.pad(sees, (0, pad, 0, pad))
        wanted = padded.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).any(3).any(1)
        assert torch.equal(masks[-1].to_dense()[0, 0].bool(), wanted)
        index = torch.arange(len(sees))
        by_function = masks[-1].mask_mod(0, 0, index[:, None], index[None, :])
        assert torch.equal(by_function, sees)


def test_a_cpu_pads_short_sequences_alone(monkeypatch):
    chosen = []

    def note(name):
        def way(groups, device):
            chosen.append(name)
            return attention.causal

        return way

    for name in WAYS:
        monkeypatch.setattr(attention, name, note(name))
    short, long = [[10, 5, 6]] * 3, [[60, 40, 30], [5, 40]]
    many = [[10] + [9] * 30]  # short responses, and a long group
    monkeypatch.setattr(attention, "HAS_TRITON", False)
    for groups, device in ((short, "cpu"), (many, "cpu"), (long, "cpu"), (long, "mps"), (long, "cuda")):
        attention.of_groups(groups, device)
    monkeypatch.setattr(attention, "HAS_TRITON", True)
    for groups, device in ((long, "cpu"), (short, "cuda:1")):
        attention.of_groups(groups, device)
    assert chosen == ["by_group", "padded", "by_segment", "padded", "padded", "by_segment", "by_blocks"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("name", WAYS)
def test_torch_compile_compiles_once_for_all_batches(name, monkeypatch):
    """And gives the same log-probs, with the compiled kernel of FlexAttention, too, which a CPU has for
    inference alone."""
    model = tiny("gqa", head_size=16, n_layer=10, block_size=256).float()
    plain = copy.deepcopy(model)
    model.compile_trunk()
    monkeypatch.setattr(attention, "SHORT", {"padded": 1000, "by_group": 1000, "by_segment": 0}.get(name))
    monkeypatch.setattr(attention, "SHORT_GROUP", {"padded": 0, "by_group": 1000}.get(name))
    if name == "by_blocks":
        compiled = attention.compiled_flex_attention()
        monkeypatch.setattr(flex_attention, "flex_attention", compiled)
        monkeypatch.setattr(
            attention,
            "of_groups",
            lambda *a: torch.compiler.disable(attention.by_blocks(*a), recursive=False),
        )
    for seed in range(6):
        r = random.Random(seed)
        prompts = [[r.randrange(23) for _ in range(r.randint(20, 90))] for _ in range(8)]
        responses = [[prompt[: r.randint(5, 20)] for _ in range(r.randint(2, 4))] for prompt in prompts]
        with torch._dynamo.config.patch(error_on_recompile=seed > 0):
            if name == "by_blocks":
                with torch.no_grad():
                    logp = model(pack(prompts, responses)).token
            else:
                logp = model(pack(prompts, responses)).token
                gradients(model, logp.sum())
        wanted = torch.cat(separate(plain, prompts, responses))
        torch.testing.assert_close(logp, wanted, rtol=0, atol=1e-4)


def in_bfloat16(seed, shapes):
    """q, k, v and an output's gradient in bf16, of so many tokens and heads."""
    torch.manual_seed(seed)
    return [torch.randn(*shape, 16).bfloat16() for shape in shapes]


def values_and_gradients(function, leaves, out_gradient):
    """function(q, k, v), and the gradients of all three."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = function(*leaves)
    return [y, *torch.autograd.grad(y, leaves, out_gradient.to(y.dtype))]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["causal", "bool", "scores"])
def test_a_cpu_trains_in_bfloat16_as_in_fp32_rounded_at_the_end(kind, autocast):
    """To the last bit of the output and of each gradient, with grouped heads, and under autocast, too."""
    leaves = in_bfloat16(0, [(2, 9, 4), (2, 9, 2), (2, 9, 2), (2, 9, 4)])
    sees = torch.ones(9, 9, dtype=torch.bool).tril()
    sees[7:, 2:5] = False  # less than a causal mask shows
    scores = torch.zeros(9, 9).masked_fill(~sees, -torch.inf)
    options = {"causal": {"is_causal": True}, "bool": {"mask": sees}, "scores": {"mask": scores}}[kind]
    exact = [x.float() for x in leaves]
    wanted = values_and_gradients(lambda *x: attention.attention(*x, **options), exact[:3], exact[3])
    if kind == "scores":
        options = {"mask": scores.bfloat16()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = values_and_gradients(lambda *x: attention.attention(*x, **options), leaves[:3], leaves[3])
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16 and theirs.dtype == torch.float32
        assert torch.equal(ours, theirs.bfloat16())


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("name", ["by_segment", "by_group", "padded"])
def test_each_way_of_a_cpu_trains_in_bfloat16_close_to_fp32(name, most):
    """Also where each prompt has one response, so that no way needs a mask."""
    prompts, responses = random_groups(3, most=most)
    lengths = pack(prompts, responses).group_lengths
    n = sum(map(sum, lengths))
    leaves = in_bfloat16(1, [(n, 4), (n, 2), (n, 2), (n, 4)])
    exact = [x.float() for x in leaves]

    def attend(q, k, v):
        return getattr(attention, name)(lengths, "cpu")(0, q, k, v)

    wanted = values_and_gradients(attend, exact[:3], exact[3])
    found = values_and_gradients(attend, leaves[:3], leaves[3])
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == torch.bfloat16 and theirs.dtype == torch.float32
        assert (ours.float() - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_a_gpu_equal_the_loop(dtype):
    """FlexAttention, compiled, and padded calls: values and gradients, one kernel for all lengths."""
    for seed in range(4):
        r = random.Random(seed)
        groups = [[r.randint(1, 300) for _ in range(r.randint(2, 6))] for _ in range(4)]
        n = sum(map(sum, groups))
        torch.manual_seed(seed)
        shapes = ((n, 4, 64), (n, 2, 64), (n, 2, 64), (n, 4, 64))
        q, k, v, g = (torch.randn(shape, device="cuda").to(dtype) for shape in shapes)
        exact = [x.double().cpu().requires_grad_() for x in (q, k, v)]
        wanted = attention.by_segment(groups, "cpu")(0, *exact)
        wanted_gradients = torch.autograd.grad(wanted, exact, g.double().cpu())
        for way in (attention.by_blocks, attention.padded):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            y = way(groups, "cuda")(0, *leaves)
            tolerance = {torch.float32: 1e-3, torch.bfloat16: 2e-2}[dtype]  # fp32 may be TF32
            results = [y, *torch.autograd.grad(y, leaves, g)]
            for a, b in zip(results, [wanted, *wanted_gradients], strict=True):
                assert (a.double().cpu() - b).norm() < tolerance * b.norm()


@pytest.mark.parametrize(
    ("prompts", "responses", "message"),
    [
        ([[1], []], [[[2]], [[3]]], "group 1: an empty prompt"),
        ([[1]], [[[2], []]], "group 0: an empty prompt or response"),
        ([[1], [2]], [[[2]], []], "group 1: an empty prompt or response"),
        ([[1]], [[[2]], [[3]]], "zip"),
        ([], [], "no groups"),
    ],
)
def test_errors(prompts, responses, message):
    with pytest.raises(ValueError, match=message):
        pack(prompts, responses)
