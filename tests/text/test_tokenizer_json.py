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
