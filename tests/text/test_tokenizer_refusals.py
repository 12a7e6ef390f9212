"""tokenizer.json: what is refused, in words that say why, and the tokens around a text."""

import json

import pytest
from test_tokenizer_json import BYTES, NO_REGEX, added, make, sequence, split

from nanoroads.errors import InputError
from nanoroads.text import tokenizer

tokenizers = pytest.importorskip("tokenizers")


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0}},
            "model with type 'Unigram' is not supported",
        ),
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "model with type 'WordPiece'"),
        ({"model__byte_fallback": True}, "model with byte_fallback True"),
        ({"model__dropout": 0.1}, "model with dropout 0.1"),
        ({"model__end_of_word_suffix": "</w>"}, "end_of_word_suffix '</w>'"),
        ({"model__continuing_subword_prefix": "##"}, "continuing_subword_prefix '##'"),
        ({"model__vocab": {"a": 0}}, "not in the order of its merges"),
        ({"model__vocab": 7}, "not a tokenizer that can be read"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer with type 'NFKC'"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}},
            "normalizer with type 'Lowercase'",
        ),
        ({"pre_tokenizer": None}, "does not end in ByteLevel"),
        (
            {"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}},
            "pre-tokenizer Metaspace is not supported",
        ),
        ({"pre_tokenizer": sequence(split("a"))}, "does not end in ByteLevel"),
        ({"pre_tokenizer": sequence(NO_REGEX, split("a"))}, "does not end in ByteLevel"),
        ({"pre_tokenizer": sequence(split("a") | {"behavior": "Removed"}, NO_REGEX)}, "behavior 'Removed'"),
        ({"pre_tokenizer": sequence(split("a") | {"invert": True}, NO_REGEX)}, "invert True"),
        ({"pre_tokenizer": BYTES | {"add_prefix_space": True}}, "add_prefix_space True"),
        (
            {"added_tokens": [added("<mask>", special=False) | {"id": 9, "lstrip": True}]},
            "added token with lstrip True",
        ),
        ({"added_tokens": [added("<s>") | {"id": 9, "single_word": True}]}, "token with single_word True"),
    ],
)
def test_what_tiktoken_cannot_do_is_refused(tmp_path, changes, says):
    with pytest.raises(InputError) as caught:
        tokenizer.get(str(make(tmp_path / "x", "gpt2", **changes)))
    assert str(caught.value).startswith(f"{tmp_path / 'x' / 'tokenizer.json'}: ") and says in str(
        caught.value
    )


def test_ids_out_of_order_are_refused(tmp_path):
    folder = make(tmp_path, "gpt2")
    spec = json.loads((folder / "tokenizer.json").read_text())
    (a, i), (b, j) = list(spec["model"]["vocab"].items())[300:302]
    spec["model"]["vocab"] |= {a: j, b: i}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="not in the order of its merges"):
        tokenizer.get(str(folder))


@pytest.mark.parametrize(
    ("one", "other"), [("a", "Ġ"), ("a", "<|endoftext|>"), ("<|endoftext|>", "<|im_start|>")]
)
def test_two_tokens_with_the_same_id_are_refused(tmp_path, one, other):
    """tiktoken would panic at them, or decode only one."""
    folder = make(tmp_path, "qwen2")
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    added_tokens = {token["content"]: token for token in spec["added_tokens"]}
    shared_id = vocab[one] if one in vocab else added_tokens[one]["id"]
    if other in vocab:
        vocab[other] = shared_id
    else:
        added_tokens[other]["id"] = shared_id
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(InputError) as caught:
        tokenizer.get(str(folder))
    text = str(caught.value)
    assert text.startswith(f"{folder / 'tokenizer.json'}: ")
    assert text.endswith(f"have the same id {shared_id}")
    assert repr(one) in text and repr(other) in text


def test_broken_files(tmp_path):
    with pytest.raises(
        InputError, match="tokenizer.json: no such file; only a byte-level BPE .*no SentencePiece"
    ):
        tokenizer.get(str(tmp_path))
    make(tmp_path, "llama3")
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    model = whole["model"]
    wrong = [
        {"added_tokens": [{"content": "<e>"}]},
        {"added_tokens": [3]},
        {"model": model | {"vocab": model["vocab"] | {"a": "1"}}},
        {"model": model | {"merges": ["a b c"]}},
        {"model": model | {"merges": 3}},
        {"pre_tokenizer": [3]},
        {"pre_tokenizer": sequence({}, NO_REGEX)},
        {"pre_tokenizer": sequence(split("("), NO_REGEX)},
        {"pre_tokenizer": sequence(split("("), split("a"), NO_REGEX)},
        {"post_processor": {"type": "TemplateProcessing", "single": []}},
        {"normalizer": "NFC"},
    ]
    for text in (
        "{",
        "[]",
        "{}",
        '{"model": null}',
        "[" * 100_000,
        *(json.dumps(whole | change) for change in wrong),
    ):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(InputError, match="tokenizer.json: not a tokenizer that can be read"):
            tokenizer.get(str(tmp_path))


@pytest.mark.parametrize(
    "files, eos",
    [
        (
            {
                "tokenizer_config.json": {"eos_token": "<|im_start|>"},
                "generation_config.json": {"eos_token_id": 1},
            },
            "<|im_start|>",
        ),
        ({"tokenizer_config.json": {"eos_token": {"content": "<|im_start|>"}}}, "<|im_start|>"),
        (
            {"special_tokens_map.json": {"eos_token": "<|im_start|>"}, "tokenizer_config.json": {}},
            "<|im_start|>",
        ),
        ({"generation_config.json": {"eos_token_id": 1}, "config.json": {"eos_token_id": 0}}, "<|im_start|>"),
        ({"generation_config.json": {"eos_token_id": [1, 0]}}, "<|im_start|>"),
        ({"config.json": {"eos_token_id": 1}}, "<|im_start|>"),
        ({"tokenizer_config.json": {"eos_token": None}}, "<|endoftext|>"),
        ({}, "<|endoftext|>"),
    ],
)
def test_eos(tmp_path, files, eos):
    make(tmp_path, "smollm2")  # its special tokens are ids 0 and 1
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    encoding = tokenizer.get(str(tmp_path))
    assert encoding.decode([tokenizer.eos_id(encoding)]) == eos and encoding.bos == []


def test_bos_of_the_post_processor(tmp_path):
    folder = make(tmp_path, "llama3")
    hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    name = "<|begin_of_text|>"
    bos = tokenizers.processors.TemplateProcessing(
        single=f"{name} $A", special_tokens=[(name, hf.token_to_id(name))]
    )
    hf.post_processor = tokenizers.processors.Sequence([tokenizers.processors.ByteLevel(), bos])
    hf.save(str(folder / "tokenizer.json"))
    encoding = tokenizer.get(str(folder))
    assert encoding.bos == [hf.token_to_id(name)]
    assert encoding.bos + tokenizer.encode(encoding, "some roads") == hf.encode("some roads").ids
