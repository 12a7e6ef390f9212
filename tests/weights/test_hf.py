"""Hugging Face folders: what is read, and what is refused by name. Parity of logits is in test_model.py."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")
from helpers.hf_models import ROPE, make
from helpers.tiny import tiny

from nanoroads.errors import InputError
from nanoroads.model import GPT
from nanoroads.weights.hf import save_hf


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name in ("gpt2", "neox", "llama-gqa", "llama-tied", "mistral", "qwen2", "qwen3", "olmo2"):
        made[name] = tmp_path_factory.mktemp(name)
        make(name).save_pretrained(made[name])
    return made


@pytest.fixture
def copy(folders, tmp_path):
    """copy(name, {config changes}, {tensor changes}) -> a folder that differs in these.

    "REMOVE" removes a key of the config, None a tensor."""

    def write(name, config=(), tensors=(), rename=lambda key: key):
        changed = json.loads((folders[name] / "config.json").read_text()) | dict(config)
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in changed.items() if v != "REMOVE"}))
        weights = load_file(folders[name] / "model.safetensors") | dict(tensors)
        save_file({rename(k): v for k, v in weights.items() if v is not None}, tmp_path / "model.safetensors")
        return tmp_path

    return write


def load(folder):
    return GPT.from_pretrained(folder, dtype=torch.float64)


def same(a, b):
    assert a.config == b.config
    assert all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


REFUSED = [
    (
        "gpt2",
        {"model_type": "bloom"},
        "model_type 'bloom' is not one of gpt2, gpt_neox, llama, mistral, qwen2, qwen3, olmo2",
    ),
    ("gpt2", {"activation_function": "relu"}, "gpt2 with activation_function 'relu'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights False"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention True"),
    ("gpt2", {"n_positions": "REMOVE"}, "n_positions is None, not a positive integer"),
    ("gpt2", {"n_head": "four"}, "n_head is 'four', not a positive integer"),
    ("gpt2", {"n_head": 5}, "n_embd 32 is not a multiple of n_head 5"),
    ("neox", {"attention_bias": False}, "gpt_neox with attention_bias False"),
    ("neox", {"hidden_act": "silu"}, "gpt_neox with hidden_act 'silu'"),
    ("neox", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ("neox", {"intermediate_size": "REMOVE"}, "intermediate_size is None"),
    ("llama-gqa", {"attention_bias": True}, "llama with attention_bias True"),
    ("llama-gqa", {"mlp_bias": True}, "mlp_bias True"),
    ("llama-gqa", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama-gqa", {"rope_interleaved": True}, "rope_interleaved True"),
    ("llama-gqa", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    (
        "llama-gqa",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5",
    ),
    (
        "llama-gqa",
        {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
        "rope_scaling has no low_freq_factor",
    ),
    ("llama-gqa", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("mistral", {"sliding_window": 32}, "mistral with sliding_window 32"),
    ("mistral", {"sliding_window": "REMOVE", "max_position_embeddings": 8192}, "sliding_window 4096"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window True"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("gpt2", {"model_type": ["gpt2"]}, "model_type ['gpt2'] is not one of"),
    ("gpt2", {"n_inner": 0.5}, "n_inner is 0.5, not a positive integer"),
    ("gpt2", {"n_layer": True}, "n_layer is True, not a positive integer"),
    ("neox", {"rope_parameters": {"rope_theta": "1e4"}}, "rotary_emb_base is '1e4', not a positive number"),
    ("neox", {"use_parallel_residual": "yes"}, "use_parallel_residual is 'yes', not true or false"),
    ("llama-gqa", {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', not a positive number"),
    ("llama-gqa", {"hidden_act": ["silu"]}, "hidden_act is ['silu'], not text"),
    ("llama-gqa", {"tie_word_embeddings": None}, "tie_word_embeddings is None, not true or false"),
    ("llama-gqa", {"rope_parameters": "llama3"}, "rope_scaling or rope_parameters 'llama3'"),
    (
        "llama-gqa",
        {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
        "{'full_attention': {'rope_type': 'yarn'}}",
    ),
    ("llama-gqa", {"rope_parameters": ROPE | {"factor": "8"}}, "factor is '8', not a positive number"),
    ("mistral", {"sliding_window": "64"}, "sliding_window is '64', not a positive integer"),
    ("qwen2", {"layer_types": 7}, "layer_types 7"),
    ("qwen3", {"attention_bias": True}, "qwen3 with attention_bias True"),
    ("qwen3", {"use_sliding_window": True}, "qwen3 with use_sliding_window True"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "qwen3 with layer_types"),
    ("qwen3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    ("qwen3", {"hidden_act": "gelu"}, "qwen3 with hidden_act 'gelu'"),
    ("olmo2", {"attention_bias": True}, "olmo2 with attention_bias True"),
    ("olmo2", {"clip_qkv": 8.0}, "olmo2 with clip_qkv 8.0"),
    ("olmo2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear'"),
]


@pytest.mark.parametrize(
    ("name", "config", "message"), REFUSED, ids=[f"{n}-{[*c][0]}" for n, c, _ in REFUSED]
)
def test_what_gpt_cannot_represent_is_refused_by_name(name, config, message, copy):
    folder = copy(name, config)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load(folder)
    assert str(error.value).startswith(str(folder / "config.json")) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "gpt2",
            {
                "activation_function": "REMOVE",
                "layer_norm_epsilon": "REMOVE",
                "tie_word_embeddings": "REMOVE",
            },
        ),
        ("neox", {"rope_parameters": "REMOVE", "rotary_pct": 0.25, "rotary_emb_base": 10000}),
        ("neox", {"rope_parameters": "REMOVE", "hidden_act": "REMOVE", "use_parallel_residual": "REMOVE"}),
        (
            "llama-gqa",
            {"rope_parameters": "REMOVE", "rope_theta": 10000.0, "rope_scaling": None, "head_dim": "REMOVE"},
        ),
        ("llama-tied", {"rope_parameters": "REMOVE", "hidden_act": "REMOVE", "rope_interleaved": False}),
        ("mistral", {"sliding_window": "REMOVE"}),
        ("qwen3", {"rope_parameters": "REMOVE", "rope_theta": 1e6, "layer_types": "REMOVE"}),
        ("olmo2", {"rope_parameters": "REMOVE", "rope_theta": 5e5, "rms_norm_eps": "REMOVE"}),
        (
            "qwen2",
            {
                "rope_parameters": "REMOVE",
                "layer_types": "REMOVE",
                "sliding_window": 16,
                "use_sliding_window": False,
            },
        ),
    ],
)
def test_older_and_shorter_configs_mean_the_same(name, config, folders, copy):
    same(load(copy(name, config)), load(folders[name]))


def test_llama3_rope_in_both_styles(copy):
    old = load(copy("llama-gqa", {"rope_parameters": "REMOVE", "rope_theta": 5e5, "rope_scaling": ROPE}))
    new = load(copy("llama-gqa", {"rope_parameters": ROPE | {"rope_theta": 5e5}}))
    same(old, new)
    assert new.config.rope_theta == 5e5 and new.config.rope_scaling["factor"] == 8.0
    short = {k: v for k, v in ROPE.items() if k != "original_max_position_embeddings"}
    filled = load(
        copy("llama-gqa", {"rope_parameters": short})
    )  # transformers takes the model's own length then
    assert filled.config.rope_scaling["original_max_position_embeddings"] == 64


def test_files_with_buffers_without_prefix_or_with_the_tied_head_twice(folders, copy):
    wanted = load(folders["gpt2"])
    embedding = load_file(folders["gpt2"] / "model.safetensors")["transformer.wte.weight"]
    mask = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(2)}
    same(load(copy("gpt2", tensors=mask | {"lm_head.weight": embedding.clone()})), wanted)
    same(load(copy("gpt2", tensors=mask, rename=lambda key: key.removeprefix("transformer."))), wanted)
    inverse = {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(1)}
    same(load(copy("neox", tensors=inverse)), load(folders["neox"]))
    same(load(copy("llama-gqa", rename=lambda key: key.removeprefix("model."))), load(folders["llama-gqa"]))


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        (
            "neox",
            {"gpt_neox.layers.1.mlp.dense_h_to_4h.bias": None},
            "gpt_neox.layers.1.mlp.dense_h_to_4h.bias",
        ),
        ("llama-gqa", {"lm_head.weight": None}, "no floating-point tensor lm_head.weight"),
        (
            "llama-gqa",
            {"model.norm.weight": torch.ones(32, dtype=torch.int8)},
            "no floating-point tensor model.norm.weight",
        ),
        ("llama-gqa", {"model.layers.0.self_attn.k_proj.weight": torch.ones(16, 31)}, "self_attn"),
        (
            "neox",
            {"gpt_neox.layers.0.attention.query_key_value.weight": torch.ones(95, 32)},
            "query_key_value.weight is (95",
        ),
        ("qwen2", {"model.norm.weight": torch.ones(33)}, "norm.weight is (33,)"),
        (
            "llama-gqa",
            {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)},
            "q_proj.bias that the config has no place",
        ),
        (
            "qwen2",
            {"lm_head.weight": torch.ones(61, 32)},
            "ties the head to the embedding, but here they differ",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, tensors, message, copy):
    folder = copy(name, tensors=tensors)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        load(folder)
    assert str(error.value).startswith(str(folder / "model.safetensors"))


def shard(folder, mark=b""):
    """Split model.safetensors in two, with an index, which begins with `mark`."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    index = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({n: tensors[n] for n in names if index[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    text = json.dumps({"metadata": {"author": "Zoë"}, "weight_map": index}, ensure_ascii=False)
    (folder / "model.safetensors.index.json").write_bytes(mark + text.encode())
    return folder


def test_shards(folders, copy):
    same(load(shard(copy("llama-gqa"))), load(folders["llama-gqa"]))
    same(load(shard(copy("llama-gqa"), mark=b"\xef\xbb\xbf")), load(folders["llama-gqa"]))  # UTF-8's own


def test_broken_folders(copy, tmp_path):
    with pytest.raises(InputError, match="config.json"):
        load(tmp_path)
    with pytest.raises(InputError, match="config.json"):
        load(tmp_path / "nowhere")
    folder = shard(copy("llama-gqa"))
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=second.name):
        load(folder)
    second.unlink()
    with pytest.raises(InputError, match=second.name):
        load(folder)
    for text in ('{"weights": 1}', '{"weight_map": {"wte": 3}}', "[", '{"weight_map": [1]}'):
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(InputError, match="index.json: not an index"):
            load(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(InputError, match=re.escape(f"{folder / 'model.safetensors'}: no such file")):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(InputError, match="pytorch_model.bin: a pickle is never read"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_in_and_out(dtype, copy, folders, tmp_path):
    weights = load_file(folders["neox"] / "model.safetensors")
    folder = copy("neox", tensors={k: v.to(dtype) for k, v in weights.items()})
    model = GPT.from_pretrained(folder, dtype=dtype)
    assert model.embedding.weight.dtype == dtype
    assert torch.equal(model.embedding.weight, weights["gpt_neox.embed_in.weight"].to(dtype))
    save_hf(tmp_path / "out", model, eos=7)
    out = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (out["torch_dtype"], out["eos_token_id"]) == (str(dtype).removeprefix("torch."), 7)
    same(GPT.from_pretrained(tmp_path / "out", dtype=dtype), model)


def test_a_copied_generation_config_stops_where_responses_end(tmp_path):
    """transformers reads it before config.json; the chat template may end answers otherwise."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "temperature": 0.6}))
    save_hf(tmp_path, tiny("gqa"), eos=(7, 3))
    transformers = pytest.importorskip("transformers")
    settings = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert settings.eos_token_id == [7, 3] and settings.temperature == 0.6


@pytest.mark.parametrize("eos, written", [(7, 7), ((7,), 7), ((7, 3), [7, 3]), (None, None)])
def test_all_that_ends_a_response_is_saved(tmp_path, eos, written):
    save_hf(tmp_path, tiny("gqa"), eos=eos)
    transformers = transformers = pytest.importorskip("transformers")
    assert (
        transformers.GenerationConfig.from_model_config(
            transformers.AutoConfig.from_pretrained(tmp_path)
        ).eos_token_id
        == written
    )


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("learned", {"head": "scalar"}, "has no head 'scalar'"),
        ("learned", {"norm": "rmsnorm"}, "gpt2, the nearest Hugging Face family, has no norm 'rmsnorm'"),
        ("learned", {"parallel_residual": True}, "has no parallel_residual True"),
        ("learned", {"mlp": "swiglu"}, "activation_function 'silu'"),
        ("neox", {"n_kv_head": 2}, "has no n_kv_head 2"),
        ("neox", {"qkv_bias": False}, "has no qkv_bias False"),
        ("gqa", {"bias": True}, "has no bias True"),
        ("gqa", {"rotary_pct": 0.5}, "has no rotary_pct 0.5"),
        ("gqa", {"norm_place": "after"}, "llama, the nearest Hugging Face family, has no norm_place 'after'"),
        ("qwen3", {"norm_place": "after"}, "qwen3, the nearest Hugging Face family, has no norm_place"),
        ("olmo2", {"norm_place": "before"}, "olmo2, the nearest Hugging Face family, has no norm_place"),
    ],
)
def test_save_refuses_what_no_family_has(kind, options, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message)):
        save_hf(tmp_path / "out", tiny(kind, **options))
    assert not (tmp_path / "out").exists()


def test_fp64_weights_stay_fp64(tmp_path):
    model = make("llama-gqa")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 1e-9)  # what fp32 cannot hold
    model.save_pretrained(tmp_path)
    embedding = GPT.from_pretrained(tmp_path, dtype=torch.float64).embedding.weight
    assert torch.equal(embedding, model.model.embed_tokens.weight)
