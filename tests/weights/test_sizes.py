"""Files of a stranger's folder that are too large, nested too deep, or hold no weights."""

import json
import struct

import pytest
import torch
from helpers.folders import edit_json, small_folder
from helpers.refusals import change_config, copy
from safetensors.torch import load_file, save_file

from nanoroads.errors import InputError
from nanoroads.text import tokenizer
from nanoroads.text.encode import encode_row
from nanoroads.weights import folder as folders
from nanoroads.weights.checkpoint import load_model
from nanoroads.weights.files import read_config

USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def model(tmp_path):
    return small_folder(tmp_path / "model")


# ---------------------------------------------------------------- how much is read


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
def test_a_file_of_a_gigabyte_is_not_read(name, model):
    with open(model / name, "wb") as file:
        file.truncate(2**30)  # takes no room on the disk
    with pytest.raises(InputError, match=f"{name}: is larger than the"):
        encode_row(tokenizer.of(model, load_model(model))[1], [USER])


@pytest.mark.parametrize(
    "text", ["[" * 101 + "]" * 101, "[" * 10**6, '{"a":' * 200 + "1" + "}" * 200, "[" * 950 + "]" * 950]
)
def test_nesting_has_a_bound(text, tmp_path):
    with pytest.raises(ValueError, match="more than 100 objects or lists inside one another"):
        folders.parse_json(text)
    (tmp_path / "config.json").write_text('{"model_type": ' + text + "}")
    with pytest.raises(InputError, match="config.json: not JSON"):
        read_config(tmp_path)


def test_nesting_that_is_read():
    for depth in (1, 20, 99):
        text = '[{"a":' * (depth // 2) + "[1]" + "}]" * (depth // 2)
        assert folders.parse_json(text) == json.loads(text)


def test_numbers_and_keys_that_json_has_no_rule_for():
    with pytest.raises(ValueError, match="4300 digits"):
        folders.parse_json("9" * 5000)
    assert folders.parse_json('{"a": 1, "a": 2}') == {"a": 2}


# ---------------------------------------------------------------- weights that are none


def broken_header(text, begin=None):
    header = text.encode()
    return struct.pack("<Q", len(header) if begin is None else begin) + header


ONE = '{"a":{"dtype":"%s","shape":%s,"data_offsets":[%d,%d]}}'
HEADERS = {
    "length of 2^63": broken_header("{}", 2**63),
    "length beyond the file": broken_header("{}", 10**6),
    "no JSON": broken_header("{a}"),
    "deep": broken_header("[" * 100_000),
    "unknown dtype": broken_header(ONE % ("F7", "[1]", 0, 4)) + bytes(4),
    "product overflows": broken_header(ONE % ("F32", f"[{2**40},{2**40}]", 0, 4)) + bytes(4),
    "offsets beyond the file": broken_header(ONE % ("F32", "[100]", 0, 400)) + bytes(4),
    "offsets backwards": broken_header(ONE % ("F32", "[1]", 4, 0)) + bytes(4),
    "overlap": broken_header(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        '"b":{"dtype":"F32","shape":[1],"data_offsets":[2,6]}}'
    )
    + bytes(6),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie(name, model):
    (model / "model.safetensors").write_bytes(HEADERS[name])
    with pytest.raises(InputError, match="model.safetensors: not a whole safetensors file"):
        load_model(model)


QUANTISED = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", QUANTISED)
def test_dtypes_that_are_no_weights(dtype, model, sft, tmp_path):
    for folder, name in ((model, "model.norm.weight"), (copy(sft, tmp_path / "run"), "norm.weight")):
        tensors = load_file(folder / "model.safetensors")
        tensors[name] = tensors[name].to(dtype)
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(
            InputError, match=f"no floating-point tensor {name} of 16 bits or more, but {dtype}"
        ):
            load_model(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value, model, sft, tmp_path):
    for folder, name in ((model, "model.norm.weight"), (copy(sft, tmp_path / "run"), "norm.weight")):
        tensors = load_file(folder / "model.safetensors")
        tensors[name][3] = value
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(InputError, match=f"model.safetensors: {name} holds NaN or infinity"):
            load_model(folder)


# ---------------------------------------------------------------- configs that ask for too much

LARGE = [{"vocab_size": 10**9, "hidden_size": 10**3}, {"vocab_size": 2**31 - 1, "hidden_size": 2**31 - 4},
         {"intermediate_size": 2**31 - 1}, {"head_dim": 2**31 - 2}, {"num_hidden_layers": 2**31 - 1},
         {"num_hidden_layers": 10**7, "layer_types": ["full_attention"]},
         {"num_attention_heads": 2**30, "head_dim": 2}]  # fmt: skip


@pytest.mark.parametrize("changes", LARGE)
def test_a_config_that_asks_for_a_trillion_parameters(changes, model, monkeypatch):
    """It is refused before their memory is taken."""
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
    edit_json(model / "config.json", **changes)
    with pytest.raises(InputError, match="config"):
        load_model(model)


WRONG = [{"n_layer": 10**9}, {"n_layer": True}, {"vocab_size": 2**40}, {"norm_eps": float("nan")},
         {"rope_theta": -1.0}, {"tied": 1}, {"bias": "yes"}, {"head_size": 0},
         {"rope_scaling": {"factor": 2.0}},
         {"position": "rotary", "rotary_pct": 1e9}, {"position": "rotary", "head_size": 7},
         {"n_embd": [16]}, {"d_ff": 1e300}]  # fmt: skip


@pytest.mark.parametrize("changes", WRONG)
def test_a_run_whose_config_asks_for_the_impossible(changes, sft, tmp_path):
    folder = copy(sft, tmp_path / "run")
    change_config(folder, model={**read_config(sft)["model"], **changes})
    with pytest.raises(InputError, match="config.json: "):
        load_model(folder)


def test_keys_of_ours_in_a_config_of_hugging_face_mean_nothing(model):
    edit_json(model / "config.json", tokenizer="/etc", reference=3, args=[1], beta="x", model=[])
    assert tokenizer.of(model, load_model(model))[0] == str(model)


@pytest.mark.parametrize("args", [{"data": ["roadmap"]}, {"data": 3}, {"data": {}}])
def test_a_run_whose_data_has_no_name(args, sft, tmp_path):
    folder = copy(sft, tmp_path / "run")
    change_config(folder, args=args)
    with pytest.raises(InputError, match="config.json: its args name the data"):
        read_config(folder)


@pytest.mark.parametrize("beta", [float("nan"), float("inf"), 0, -1.0])
def test_a_run_whose_beta_is_no_strength(beta, sft, tmp_path):
    folder = copy(sft, tmp_path / "run")
    change_config(folder, beta=beta)
    with pytest.raises(InputError, match="config.json: beta is"):
        read_config(folder)
