"""The GPT against transformers, its cache against the full forward, its heads against plain sums."""

import pytest
import torch

pytest.importorskip("transformers")
from helpers.hf_models import MODELS, exact, make
from helpers.tiny import SHAPES, tiny
from transformers import AutoModelForCausalLM

from nanoroads.batch import pack
from nanoroads.model import GPT, GPTConfig, LogProbs, rotary_table
from nanoroads.weights.hf import save_hf

BATCH = pack([[1, 2, 3], [4]], [[[5, 6], [7, 8, 9]], [[3], [2, 2, 2, 1]]])


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(name, tmp_path):
    theirs = make(name)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path, dtype=torch.float64)
    tokens = torch.randint(61, (2, 48))
    wanted = theirs(tokens).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(ours.logits(tokens), wanted, rtol=0, atol=1e-9)

    save_hf(tmp_path / "back", ours)  # and out again
    back = exact(AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float64))
    torch.testing.assert_close(back(tokens).logits, wanted, rtol=0, atol=1e-9)


def test_a_future_token_changes_nothing():
    for kind in SHAPES:
        model, tokens = tiny(kind), torch.randint(1, 23, (1, 12))
        changed = tokens.clone()
        changed[0, 7] = 0
        a, b = model.logits(tokens), model.logits(changed)
        assert torch.equal(a[:, :7], b[:, :7]) and not torch.allclose(a[:, 7:], b[:, 7:])


def test_scalar_head_reads_the_last_token_or_sums():
    sequences = [([1, 2, 3], [5, 6]), ([1, 2, 3], [7, 8, 9]), ([4], [3]), ([4], [2, 2, 2, 1])]
    last, total = tiny(head="scalar"), tiny(head="scalar", readout="sum")
    wanted_last, wanted_total = [], []
    for prompt, response in sequences:
        tokens = torch.tensor([prompt + response])
        hidden = last.trunk(tokens, torch.arange(tokens.shape[1])[None])[0]  # (T, D)
        reward = last.scalar_head(hidden)[:, 0]  # (T,)
        wanted_last.append(reward[-1])
        wanted_total.append(reward[len(prompt) :].sum())
    torch.testing.assert_close(last(BATCH).double(), torch.stack(wanted_last), rtol=0, atol=1e-10)
    torch.testing.assert_close(total(BATCH).double(), torch.stack(wanted_total), rtol=0, atol=1e-10)


def test_log_probs_at_a_temperature():
    model, p, r = tiny(), [1, 2, 3], [4, 5]
    token_logp = model(pack([p], [[r]]), temperature=2.0).token
    logp = (model.logits(torch.tensor([p + r]))[0, 2:4] / 2.0).log_softmax(-1)
    torch.testing.assert_close(
        token_logp.double(), logp.gather(1, torch.tensor(r)[:, None])[:, 0], rtol=0, atol=1e-5
    )


def operations(function):
    """{name: how often torch ran it} while the function ran, inside of autograd Functions too."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.key: event.count for event in profile.key_averages()}


def test_no_gradient_is_summed_in_the_order_of_threads():
    """As the backward of x[rows] does on several CPU threads where rows repeat.

    Here they do: a prompt's last token, k times."""
    x = torch.randn(3, 2, requires_grad=True)
    indexed = operations(x[torch.tensor([0, 0, 1])].sum().backward)
    assert "aten::_index_put_impl_" in indexed
    model = tiny()
    sequence = model(pack([[1, 2], [1]], [[[3], [4], [5]], [[6], [7]]])).sequence
    backward = operations(sequence.sum().backward)
    # Of tokens, positions and what predicts a token; and the gathers of `attention.by_group` in two layers.
    assert backward["aten::embedding_dense_backward"] == 3 + 2 * 4
    assert not [
        name for name in backward if "index_put" in name or "index_add" in name or "scatter_add" in name
    ]


HEADS = [{}, {"head": "scalar"}, {"head": "scalar", "readout": "sum"}]


def outputs_and_gradients(model, batch):
    out = model(batch)
    outputs = out if model.config.head == "lm" else (out,)
    loss = sum((x * torch.linspace(0.5, 2, len(x))).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, [p for p in model.parameters()])]


@pytest.mark.parametrize("options", HEADS, ids=["policy", "last", "sum"])
@pytest.mark.parametrize("kind", SHAPES)
def test_the_compute_dtype_gives_what_autocast_gives(kind, options):
    """Bit for bit, outputs and gradients, and around a model autocast still works."""
    model = tiny(kind, **options).float()
    exact = outputs_and_gradients(model, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = outputs_and_gradients(model, BATCH)
    model.compute_dtype = torch.bfloat16
    found = outputs_and_gradients(model, BATCH)
    assert all(x.dtype == torch.float32 and torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert not torch.equal(found[0], exact[0])
    model.compute_dtype = torch.float32  # that of the weights: nothing is rounded
    found = outputs_and_gradients(model, BATCH)
    assert all(torch.equal(x, y) for x, y in zip(found, exact, strict=True))


@torch.no_grad()
def test_logits_are_computed_in_the_compute_dtype():
    model, tokens = tiny("gqa").float(), torch.randint(23, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model.logits(tokens)
    model.compute_dtype = torch.bfloat16
    assert model.logits(tokens).dtype == torch.bfloat16
    assert torch.equal(model.logits(tokens), wanted)


def test_log_probs_unpack_as_a_pair():
    model = tiny()
    out = model(BATCH)
    sequence, token = out
    assert isinstance(out, LogProbs) and sequence is out.sequence and token is out.token
    assert sequence.shape == (4,) and token.shape == (2 + 3 + 1 + 4,)
    sums = [part.sum() for part in token.split([2, 3, 1, 4])]
    torch.testing.assert_close(sequence, torch.stack(sums), rtol=0, atol=1e-5)


def test_initialisation():
    """GPT-2's: 0.02, less on what is added to the residual stream.

    And a head that is small where a reward is read."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_embd=256, n_layer=8, n_head=4, tied=False))
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert not model.blocks[3].attention.qkv.bias.any()
    scalar = GPT(GPTConfig(n_embd=2, n_head=1, head="scalar"))
    torch.manual_seed(1)
    scalar.init_scalar_head()
    torch.manual_seed(1)
    assert torch.allclose(scalar.scalar_head.weight, torch.randn(1, 2) * 3**-0.5)
    tied = GPT(GPTConfig())
    assert tied.lm_head.weight is tied.embedding.weight
    assert (
        sum(p.numel() for p in tied.parameters()) == 98 * 64 + 64 * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64
    )


def test_rotary_turns_by_the_position():
    config = GPTConfig(position="rotary", n_embd=8, n_head=1, rope_theta=100.0)
    cos, sin = rotary_table(config, torch.tensor([0, 1, 5]))
    angle = torch.tensor([0.0, 1.0, 5.0])[:, None] * 100.0 ** -torch.tensor([0.0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(torch.stack([cos[:, 0], sin[:, 0]]), torch.stack([angle.cos(), angle.sin()]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"norm": "batchnorm"}, "norm is 'batchnorm'"),
        ({"readout": "first"}, "readout is 'first'"),
        ({"n_head": 4, "n_kv_head": 3}, "n_head 4 is not a multiple of n_kv_head 3"),
    ],
)
def test_config_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**wrong)
