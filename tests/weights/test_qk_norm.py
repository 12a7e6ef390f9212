"""Qwen3 and OLMo 2 against transformers: log-probs of a batch, sampling with the cache, names of tensors."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
from helpers.hf_models import make

from nanoroads.batch import pack
from nanoroads.errors import InputError
from nanoroads.generate import generate
from nanoroads.model import GPT, GPTConfig
from nanoroads.weights.hf import save_hf

NAMES = ["qwen3", "qwen3-untied", "olmo2", "olmo2-gqa"]
PROMPTS = [[3, 14, 15, 9], [26, 5], [35, 8, 9, 7, 9, 32, 3]]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """both(name): (ours, theirs, the folder that ours was read from), in fp64."""
    made = {}

    def models(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            theirs = make(name)
            theirs.save_pretrained(folder)
            made[name] = (GPT.from_pretrained(folder, dtype=torch.float64), theirs, folder)
        return made[name]

    return models


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_log_probs_of_a_batch(name, both):
    """Two answers to one prompt, which stands once, and a prompt with one answer."""
    ours, theirs, _ = both(name)
    responses = [[[1, 2], [4, 4, 4]], [[60]], [[7], [50, 51]]]
    wanted = []
    for prompt, group in zip(PROMPTS, responses, strict=True):
        for response in group:
            logp = theirs(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            wanted += [logp[place, token] for place, token in zip(places, response, strict=True)]
    found = torch.cat([ours(pack([p], [g])).token for p, g in zip(PROMPTS, responses, strict=True)])
    torch.testing.assert_close(found.double(), torch.stack(wanted), rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_with_the_cache(name, both):
    """The tokens that transformers' own cache gives, prompt by prompt."""
    ours, theirs, _ = both(name)
    found = [group[0] for group in generate(ours, PROMPTS, 1, 16, temperature=0)]
    for prompt, row in zip(PROMPTS, found, strict=True):
        settings = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0, "eos_token_id": None}
        wanted = theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        assert row == wanted


@pytest.mark.parametrize("name", NAMES)
def test_an_export_has_their_names_and_the_same_bits(name, both, tmp_path):
    ours, _, folder = both(name)
    save_hf(tmp_path, ours)
    theirs, back = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[tensor], theirs[tensor]) for tensor in theirs)
    names = {tensor.removeprefix("model.layers.1.") for tensor in theirs if ".layers.1." in tensor}
    assert {"self_attn.q_norm.weight", "self_attn.k_norm.weight"} <= names
    assert ("post_feedforward_layernorm.weight" in names) == name.startswith("olmo2")
    assert ("input_layernorm.weight" in names) == name.startswith("qwen3")
    config, written = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    for key in ("model_type", "architectures", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"):
        assert written[key] == config[key], key
    assert GPT.from_pretrained(tmp_path).config == ours.config


def test_the_two_forms():
    """Sizes of the norms: a head's, or all heads' together."""
    sizes = {}
    for kind in ("head", "all"):
        config = GPTConfig(n_head=4, n_kv_head=2, n_embd=32, qk_norm=kind)
        attention = GPT(config).blocks[0].attention
        sizes[kind] = (attention.q_norm.weight.numel(), attention.k_norm.weight.numel())
    assert sizes == {"head": (8, 8), "all": (32, 16)}
    with pytest.raises(ValueError, match="qk_norm is 'layer', not one of none, head, all"):
        GPTConfig(qk_norm="layer")
    with pytest.raises(ValueError, match="parallel_residual true does not go with norm_place 'after'"):
        GPTConfig(parallel_residual=True, norm_place="after")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("qwen3_moe", "it is a mixture of experts"),
        ("olmo3", "most of its layers have a sliding window"),
        ("smollm3", "every fourth of its layers has no rotary embedding"),
    ],
)
def test_a_relative_is_refused_with_the_reason(kind, reason, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(InputError, match=f"model_type '{kind}' .{reason}. is not one of gpt2"):
        GPT.from_pretrained(tmp_path)
