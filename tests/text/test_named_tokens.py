"""Tokens that only the files beside tokenizer.json name: the ids of transformers, or a refusal."""

import json

import pytest
from test_chat import CHATML, make

from nanoroads.errors import InputError
from nanoroads.text import tokenizer


def token(content, **flags):
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content, **plain, **flags}


def folder(path, config, files):
    """A folder whose tokenizer.json has the ids 0 to 260, and what the other files say."""
    make(path, CHATML, **config)
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    tokenizer.get.cache_clear()
    return path


DECODER = {"added_tokens_decoder": {"261": token("<x>"), "262": token("<y>", special=False)}}
MAP = {"special_tokens_map.json": {"eos_token": {"content": "<s>"}, "additional_special_tokens": ["<x>"]}}


@pytest.mark.parametrize(
    "config, files",
    [
        ({}, {}),
        (DECODER, {}),
        (DECODER | {"eos_token": "<x>"}, {}),
        ({"added_tokens_decoder": {"262": token("<x>"), "261": token("<y>")}}, {}),
        ({"added_tokens_decoder": {"7": token("<|im_end|>")}}, {}),  # tokenizer.json gives it its id
        ({"added_tokens_decoder": {"259": token("  ", special=True)}}, {}),
        ({"additional_special_tokens": ["<x>", "<y>"]}, {}),
        ({"additional_special_tokens": ["<y>"], "extra_special_tokens": ["<x>"]}, {}),
        ({"extra_special_tokens": {"x_token": "<x>"}}, {}),
        ({"added_tokens_decoder": {"261": token(""), "262": token("<|im_end|>")}, "pad_token": ""}, {}),
        ({"additional_special_tokens": [{"content": "<x>", "__type": "AddedToken", **token("<x>")}]}, {}),
        ({"additional_special_tokens": ["q", "<|im_end|>"]}, {}),  # q is in the vocabulary
        ({}, MAP),
        (DECODER, MAP),
        ({}, {"added_tokens.json": {"<y>": 262, "<x>": 261}}),
        ({"additional_special_tokens": ["<x>"]}, {"added_tokens.json": {"<x>": 261}}),
        ({"added_tokens_decoder": {}}, {"added_tokens.json": {"<x>": 261}}),
        ({"add_bos_token": True, "eos_token": {"content": "<s>", "__type": "AddedToken"}}, {}),
    ],
)
def test_ids_as_transformers(tmp_path, config, files):
    transformers = pytest.importorskip("transformers")
    folder(tmp_path, config, files)
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    encoding = tokenizer.get(str(tmp_path))
    assert tokenizer.eos_id(encoding) == hf.eos_token_id
    for text in ("a<x>b<y>c q  <|im_end|><s>", "<y><x>"):
        assert tokenizer.encode_with_special(encoding, text) == hf(text).input_ids
    for text, token_id in hf.get_added_vocab().items():
        assert encoding.ids[text] == token_id
        if hf.added_tokens_decoder[token_id].special and text != "q":  # a user cannot type it
            assert text in encoding.special_texts and token_id not in tokenizer.encode(encoding, f"a{text}")


@pytest.mark.parametrize(
    "config, files, says",
    [
        (
            {"eos_token": "</s>"},
            {"config.json": {"eos_token_id": 257}},
            "its eos_token is '</s>', which is no token",
        ),
        ({"eos_token": {"content": "</s>"}}, {}, "its eos_token is '</s>'"),
        ({"eos_token": 7}, {}, "its eos_token is 7"),
        ({"bos_token": "<bos>"}, {}, "its bos_token is '<bos>'"),
        ({}, {"special_tokens_map.json": {"eos_token": "</s>"}}, "its eos_token is '</s>'"),
        ({"added_tokens_decoder": {"300": token("<x>")}}, {}, "gives '<x>' the id 300, but 261 is the first"),
        ({}, {"added_tokens.json": {"<x>": 3}}, "gives '<x>' the id 3, but 261"),
        ({}, {"generation_config.json": {"eos_token_id": "258"}}, "generation_config.json: eos_token_id"),
        ({}, {"generation_config.json": {"eos_token_id": [258, None]}}, "must be an id, or a list of ids"),
        ({}, {"generation_config.json": {"eos_token_id": -1}}, "must be an id"),
        ({}, {"config.json": {"eos_token_id": True}}, "config.json: eos_token_id .True. must be an id"),
        ({"eos_token": None}, {"config.json": {"eos_token_id": 10**6}}, "eos_token_id 1000000 is no token"),
        ({"added_tokens_decoder": {"261": 3}}, {}, "not a tokenizer that can be read"),
        ({"added_tokens_decoder": {"261": token("<x>", single_word=True)}}, {}, "single_word True"),
    ],
)
def test_what_is_named_and_missing_is_refused(tmp_path, config, files, says):
    with pytest.raises(InputError, match=says):
        tokenizer.get(str(folder(tmp_path, config, files)))


@pytest.mark.parametrize(
    "config, files, stops",
    [
        ({}, {}, (258,)),
        ({}, {"generation_config.json": {"eos_token_id": [256, 258, 256]}}, (258, 256)),
        (
            {},
            {"generation_config.json": {"eos_token_id": 256}, "config.json": {"eos_token_id": 257}},
            (258, 256),
        ),
        ({}, {"generation_config.json": {}, "config.json": {"eos_token_id": [257, 258]}}, (258, 257)),
        ({"eos_token": ""}, {"generation_config.json": {"eos_token_id": [256, 258]}}, (256, 258)),
        (
            {"eos_token": None},
            {"generation_config.json": {"eos_token_id": []}, "config.json": {"eos_token_id": 257}},
            (257, 258),  # the second is what the chat template writes
        ),
    ],
)
def test_what_ends_a_response(tmp_path, config, files, stops):
    encoding = tokenizer.get(str(folder(tmp_path, config, files)))
    assert tokenizer.stop_ids(encoding) == stops and tokenizer.eos_id(encoding) == stops[0]


def test_a_pad_token_that_is_no_token_changes_nothing(tmp_path):
    """Nothing here pads, and the model may have no embedding for it."""
    encoding = tokenizer.get(str(folder(tmp_path, {"pad_token": "[PAD]"}, {})))
    assert encoding.n_vocab == 261 and encoding.names["pad_token"] == "[PAD]"
