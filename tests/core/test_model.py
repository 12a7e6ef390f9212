"""The GPT against transformers, its cache against the full forward, its heads against plain sums."""

import pytest
import torch

pytest.importorskip("transformers")
from helpers.hf_models import MODELS, exact, make
from helpers.tiny import SHAPES, tiny
from transformers import AutoModelForCausalLM

from nanoroads.batch import pack
from nanoroads.model import GPT, GPTConfig, KVCache, rotary_table
from nanoroads.weights.hf import save_hf


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


@torch.no_grad()
@pytest.mark.parametrize("kind", SHAPES)
def test_cache_equals_full_forward(kind):
    model = tiny(kind)
    tokens = torch.randint(23, (3, 20))
    position = torch.arange(20).expand(3, 20)
    cache = KVCache(model.config, 3, 20, dtype=torch.float64)
    parts = [model.trunk(tokens[:, :8], position[:, :8], cache=cache)]
    for t in range(8, 20):
        assert cache.used == t
        parts.append(model.trunk(tokens[:, t : t + 1], position[:, t : t + 1], cache=cache))
    torch.testing.assert_close(model.lm_head(torch.cat(parts, 1)), model.logits(tokens), rtol=0, atol=1e-10)


@torch.no_grad()
def test_cache_repeat_keeps_rows_together():
    model = tiny("gqa")
    tokens = torch.randint(23, (2, 9)).repeat_interleave(3, dim=0)
    tokens[:, 8] = torch.arange(6)
    position = torch.arange(9).expand(6, 9)
    cache = KVCache(model.config, 2, 9, dtype=torch.float64)
    model.trunk(tokens[::3, :8], position[::3, :8], cache=cache)
    cache.repeat(3)
    hidden = model.trunk(tokens[:, 8:], position[:, 8:], cache=cache)
    torch.testing.assert_close(model.lm_head(hidden)[:, 0], model.logits(tokens)[:, 8], rtol=0, atol=1e-10)


def test_a_future_token_changes_nothing():
    for kind in SHAPES:
        model, tokens = tiny(kind), torch.randint(1, 23, (1, 12))
        changed = tokens.clone()
        changed[0, 7] = 0
        a, b = model.logits(tokens), model.logits(changed)
        assert torch.equal(a[:, :7], b[:, :7]) and not torch.allclose(a[:, 7:], b[:, 7:])


def test_scalar_head_reads_the_last_token_or_sums():
    prompts, responses = [[1, 2, 3], [4]], [[[5, 6], [7, 8, 9]], [[3], [2, 2, 2, 1]]]
    batch = pack(prompts, responses)
    last, total = tiny(head="scalar"), tiny(head="scalar", readout="sum")
    rewards = [
        (last.scalar_head(h)[-1, 0], last.scalar_head(h)[len(p) :].sum())
        for p, group in zip(prompts, responses, strict=True)
        for r in group
        for h in [last.trunk(torch.tensor([p + r]), torch.arange(len(p + r))[None])[0]]
    ]
    wanted_last, wanted_total = (torch.stack(x) for x in zip(*rewards, strict=True))
    torch.testing.assert_close(last(batch).double(), wanted_last, rtol=0, atol=1e-10)
    torch.testing.assert_close(total(batch).double(), wanted_total, rtol=0, atol=1e-10)


def test_log_probs_at_a_temperature():
    model, p, r = tiny(), [1, 2, 3], [4, 5]
    token_logp = model(pack([p], [[r]]), temperature=2.0)[1]
    logp = (model.logits(torch.tensor([p + r]))[0, 2:4] / 2.0).log_softmax(-1)
    torch.testing.assert_close(
        token_logp.double(), logp.gather(1, torch.tensor(r)[:, None])[:, 0], rtol=0, atol=1e-5
    )


def test_no_gradient_is_summed_in_the_order_of_threads():
    """As the backward of x[rows] does on several CPU threads where rows repeat: here, a prompt's last token k times."""
    names, todo = set(), [tiny()(pack([[1, 2]], [[[3], [4], [5]]]))[0].grad_fn]
    while todo:
        node = todo.pop()
        names.add(node.name())
        todo += [n for n, _ in node.next_functions if n]
    assert "EmbeddingBackward0" in names and "IndexBackward0" not in names


def test_initialisation():
    """GPT-2's: 0.02, less on what is added to the residual stream, and a head that is small where a reward is read."""
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
    cos, sin = rotary_table(config, torch.tensor([[0, 1, 5]]))
    angle = torch.tensor([0.0, 1.0, 5.0])[:, None] * 100.0 ** -torch.tensor([0.0, 0.25, 0.5, 0.75])
    torch.testing.assert_close(torch.stack([cos[0, 0], sin[0, 0]]), torch.stack([angle.cos(), angle.sin()]))


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
