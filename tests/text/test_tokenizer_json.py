"""tokenizer.json -> tiktoken: the ids of the `tokenizers` library, or a refusal that says why."""

import gzip
import itertools
import json
import os
import unicodedata
from pathlib import Path

import pytest
from helpers import smollm2
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanoroads.errors import InputError
from nanoroads.text import tokenizer
from nanoroads.text.tokenizer_json import split_at_matches

tokenizers = pytest.importorskip("tokenizers")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
NO_REGEX = BYTES | {"use_regex": False}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(*parts):
    return {"type": "Sequence", "pretokenizers": list(parts)}


def added(content, special=True, normalized=False):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    return {"content": content, "special": special, "normalized": normalized, **flags}


END, START = added("<|endoftext|>"), added("<|im_start|>")
DIGITS = {"type": "Digits", "individual_digits": True}
DEEPSEEK = sequence(
    split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥]+"), DIGITS, NO_REGEX
)
# name: (normalizer, pre-tokenizer, ignore_merges, added tokens before the vocabulary, and after it)
FAMILIES = {
    "gpt2": (None, BYTES | {"use_regex": True}, False, [], [added("<|endoftext|>", normalized=True)]),
    "neox": (
        {"type": "NFC"},
        BYTES | {"use_regex": True},
        False,
        [END],
        [added(" " * n, False, True) for n in range(24, 1, -1)],
    ),
    "llama3": (None, sequence(split(LLAMA3), NO_REGEX), True, [], [END, added("<|begin_of_text|>")]),
    "qwen2": (
        {"type": "NFC"},
        sequence(split(QWEN2), NO_REGEX),
        False,
        [],
        [END, START, added("</think>", False)],
    ),
    "smollm2": (None, sequence(DIGITS, BYTES | {"use_regex": True}), False, [END, START], []),
    "gaps": (
        None,
        sequence(split(r"\p{L}+| "), NO_REGEX),
        False,
        [],
        [END],
    ),  # a pattern that leaves text over
    "runs": (
        None,
        sequence(DIGITS | {"individual_digits": False}, BYTES | {"use_regex": True}),
        False,
        [],
        [END],
    ),
    "deepseek": (None, DEEPSEEK, False, [], [END]),
}
TEXTS = [
    "Two roads diverged in a yellow wood,\nAnd sorry I could not travel both\r\n\r\n   and be one traveller",
    "it's we'll I'D they'RE don't 'S 1 12 123 1234567890 3.14 v2.10-rc1 ½ Ⅻ ٣٤٥",
    "def f(x):\n    return x  # eight        spaces\n\t\ttabs\n" + " " * 30 + "thirty",
    "Ünïcödé e\u0301 \u1112\u1161\u11ab 木木 日本語テキスト русский "
    "العربية हिन्दी 🌲👩‍👩‍👧 \u00a0\u2003\u3000 \u200b\x00\x1c\x85",
    "aaaaaaaa -------- ====== ...... !!!???  \n\n\n \n "
    "<|endoftext|><|im_start|>user </think> <|begin_of_text|> x",
]


def make(folder, name, corpus=None, **changes):
    """A folder with a small BPE of the family, trained by the `tokenizers` library on whole lines.

    It has merges across whatever the family's pre-tokenizer must cut, so a wrong cut shows."""
    normalizer, pre_tokenizer, ignore_merges, before, after = FAMILIES[name]
    empty = {"type": "BPE", "vocab": {}, "merges": [], "byte_fallback": False, "fuse_unk": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
    }
    spec |= {
        "pre_tokenizer": sequence(split(".{1,30}"), NO_REGEX),
        "post_processor": None,
        "decoder": NO_REGEX,
        "model": empty,
    }
    hf = tokenizers.Tokenizer.from_str(json.dumps(spec))
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=0,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[tokenizers.AddedToken(**t) for t in before],
    )
    hf.train_from_iterator(corpus or TEXTS * 2 + [Path(tokenizer.__file__).read_text()], trainer)
    for token in after:
        add = hf.add_special_tokens if token["special"] else hf.add_tokens
        add([tokenizers.AddedToken(**token)])
    spec = json.loads(hf.to_str())
    spec["model"]["ignore_merges"], spec["pre_tokenizer"] = ignore_merges, pre_tokenizer
    for path, value in changes.items():
        node = spec
        *way, last = path.split("__")
        for key in way:
            node = node[key]
        node[last] = value
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


def from_library(folder):
    """The same file in the `tokenizers` library."""
    hf = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    hf.encode_special_tokens = True  # special tokens in a text stay text, as here
    return hf


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """{name: (our encoding, the library's tokenizer)}"""
    found = {}
    for name in FAMILIES:
        folder = make(tmp_path_factory.mktemp("tokenizers") / name, name)
        found[name] = tokenizer.get(str(folder)), from_library(folder)
    return found


@pytest.fixture(params=FAMILIES)
def family(request, families):
    return families[request.param]


def same(family, text, name=None):
    ours, hf = family
    ids = hf.encode(text, add_special_tokens=False).ids
    assert ours.encode_ordinary(text) == ids, name
    assert tokenizer.encode(ours, text) == ids, name  # and nothing was lost on the way


def test_texts(family):
    for text in [*TEXTS, "\n".join(TEXTS), "", " ", "\n", Path(__file__).read_text()]:
        same(family, text)


# What newer Unicode versions added are letters to one regex engine and not yet to the other.
KNOWN = st.characters(exclude_categories=("Cs", "Cn")).filter(
    lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn"
)
SNIPPETS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'LL",
    "a",
    "aa",
    "-",
    "12",
    "é",
    "e\u0301",
    "木",
    "<|endoftext|>",
    "</think>",
    "ſ",
]


@given(st.lists(st.one_of(st.sampled_from(SNIPPETS), st.text(KNOWN, max_size=4)), max_size=20).map("".join))
@example("'ſ 'ſ")
@example("<|im_start|>\u0338 </think>\u0338")
@example("a" * 7 + "-" * 9 + " " * 53 + "\n" * 5)
@settings(max_examples=300, deadline=None)
def test_any_text(families, text):
    for name, family in families.items():
        same(family, text, name)


@pytest.mark.parametrize("name", ["gaps", "deepseek"])
@pytest.mark.parametrize("text", ["=" * 1_000_000, "a" + "\u0301" * 150_000 + "1 b", "1=" * 150_000])
def test_long_runs_that_the_pattern_leaves_over(families, name, text):
    """tiktoken's regex engine would run out of stack, and panic."""
    ours, hf = families[name]
    assert tokenizer.encode(ours, text) == hf.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", FAMILIES)
def test_special_tokens(families, name):
    """Each id decodes to its token, each added token has the id that the library gives it."""
    ours, hf = families[name]
    *_, before, after = FAMILIES[name]
    assert ours.n_vocab == hf.get_vocab_size()
    for token in before + after:
        i = hf.token_to_id(token["content"])
        assert ours.ids[token["content"]] == i and ours.decode([i]) == token["content"]
        assert (i in tokenizer.encode(ours, f"a{token['content']}b")) == (not token["special"])
        special = [token["content"]] if token["special"] else []
        pattern = tokenizer.special_pattern(ours)
        assert [x for x, match in split_at_matches(f"a{token['content']}b", pattern) if match] == special
        assert i in tokenizer.encode_with_special(ours, f"a{token['content']}b")
    plain = [
        i for i in range(ours.n_vocab) if hf.id_to_token(i) not in {t["content"] for t in before + after}
    ]
    for i in plain:
        assert ours.decode_single_token_bytes(i).decode(errors="replace") == hf.decode(
            [i], skip_special_tokens=False
        )


def test_ignore_merges_reaches_a_whole_word(tmp_path):
    """Llama 3 has words that no merge makes: they are taken whole, and never as a part."""
    folder = make(tmp_path, "llama3")
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["vocab"]["Ġqqq"] = top = len(spec["model"]["vocab"]) + 50
    for ignore in (True, False):
        spec["model"]["ignore_merges"] = ignore
        tokenizer.get.cache_clear()
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        family = tokenizer.get(str(folder)), from_library(folder)
        for text in ("a qqq", " qqqq", "qqq qqq"):
            same(family, text)
        assert (top in family[0].encode_ordinary("a qqq")) == ignore
        assert tokenizer.decode(family[0], [top, top + 1]) == " qqq"  # a model may sample it all the same


def test_a_byte_without_token(tmp_path):
    """SmolLM2 has no tokens for bytes that its corpus lacked: the library drops them, we say so."""
    folder = make(tmp_path, "smollm2")
    spec = json.loads((folder / "tokenizer.json").read_text())
    del spec["model"]["vocab"]["ā"]  # the byte 1
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    ours = tokenizer.get(str(folder))
    assert ours.n_vocab == max(spec["model"]["vocab"].values()) + 1
    assert (
        ours.encode_ordinary("qz\1qz") == from_library(folder).encode("qz\1qz", add_special_tokens=False).ids
    )
    with pytest.raises(InputError, match=r"has no tokens for '\\x01qz' .character 3"):
        tokenizer.encode(ours, "qz\1qz")


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


@pytest.fixture(scope="module")
def shared():
    if "NANOROADS_SHARED" not in os.environ:
        pytest.skip("NANOROADS_SHARED names no folder with texts")
    return Path(os.environ["NANOROADS_SHARED"])


def debian(shared, rows=None):
    """The documents and summaries of the first rows, or of all."""
    texts = []
    with gzip.open(shared / "data" / "debian_summaries.jsonl.gz") as file:
        for line in itertools.islice(file, rows):
            row = json.loads(line)
            texts += [row["document"], row["summary"]]
    return texts


def test_debian_summaries(family, shared):
    for text in debian(shared, 1000):
        same(family, text)


@pytest.mark.slow
def test_smollm2(shared):
    """A real vocabulary, where helpers/smollm2.py finds it."""
    folder = smollm2.folder()
    family = tokenizer.get(str(folder)), from_library(folder)
    for text in [*debian(shared), *TEXTS[:3], TEXTS[4]]:
        same(family, text)
    assert family[0].decode([tokenizer.eos_id(family[0])]) == "<|im_end|>"
