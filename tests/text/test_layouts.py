"""Every layout of a row -> prompt and answers; bad rows and pairs by file and line."""

import json

import pytest
from helpers.rows import ASKED, BYE, HELLO, USER, load

from nanoroads.errors import InputError
from nanoroads.text import data, layouts
from nanoroads.text.data import Limits
from nanoroads.text.rows import parse


@pytest.mark.parametrize("name", ["response", "completion"])
def test_sft_rows(encoding, rows, name):
    path = rows({"prompt": "Q", name: "A"}, {"prompt": "é木\n", name: " 🌲", "id": 7})
    assert load(path, layouts.sft_texts, encoding) == ([("Q", ["A"]), ("é木\n", [" 🌲"])], ["Q", "é木\n"])


def test_a_dialogue_of_text_holds_its_prompt_once(encoding, rows):
    prompt = "\n\nHuman: a\n\nAssistant:"
    for row in ({"prompt": prompt, "response": prompt + " b"}, {"prompt": prompt, "completion": " b"}):
        assert load(rows(row), layouts.sft_texts, encoding)[0] == [(prompt, [" b"])]
    quotation = {"prompt": "A river:", "response": "A river: a stream"}
    assert load(rows(quotation), layouts.sft_texts, encoding)[0] == [("A river:", ["A river: a stream"])]
    with pytest.raises(InputError, match="an answer is empty, in 'response'"):
        load(rows({"prompt": prompt, "response": prompt + " "}), layouts.sft_texts, encoding)


def test_prompt_template(encoding, rows):
    path = rows({"document": "long {text}", "summary": "short"}, {"document": "d", "response": "r"})
    found, _ = load(path, lambda row: layouts.sft_texts(row, "{document}\n\nTL;DR:"), encoding)
    assert found == [("long {text}\n\nTL;DR:", ["short"]), ("d\n\nTL;DR:", ["r"])]
    assert layouts.sft_texts({"id": 7, "summary": "s"}, "{id}:")[:2] == ("7:", ["s"])
    for value, says in (
        ("", "empty"),
        ([USER], "list, not text"),
        (["text"], "list, not text"),
        ({}, "dict, not text"),
        (json.dumps([USER]), "a message list, not text"),
    ):
        with pytest.raises(InputError, match=f"field 'document' is {says}"):
            layouts.sft_texts({"document": value, "summary": "s"}, "{document}\n\nTL;DR:")
    for template in ("{nothing}", "{", "{0}", "{summary.x}", "{summary[x]}"):
        with pytest.raises(InputError, match="rows.jsonl:1: --prompt-template .* does not fit"):
            load(path, lambda row, t=template: layouts.sft_texts(row, t), encoding)


def test_prompt_template_with_values_that_lie_deeper(encoding, rows):
    row = {"info": {"post": "p", "title": None, "tags": ["a", None], "id": 7}, "summary": "s"}
    path = rows(row)
    texts = layouts.sft_texts(parse(row), "{info[id]}. {info[post]} {info[tags][0]}")
    assert texts.prompt == "7. p a" and set(texts.fields) == {"info", "summary"}
    for template, says in (
        ("{info[title]}", "does not fit the row .no value for 'title'"),
        ("{info[tags][1]}", "field 'info.tags..1.' is NoneType, not text"),
        ("{info[tags]}", "field 'info.tags.' is list, not text"),
        ("{info}", "field 'info' is dict, not text"),
        ("{info.__class__}", "field 'info.__class__' is type, not text"),
        ("{summary.upper}", "field 'summary.upper' is builtin_function_or_method, not text"),
    ):
        with pytest.raises(InputError, match=says):
            load(path, lambda row, t=template: layouts.sft_texts(row, t), encoding)


def test_preferences_of_text(encoding, rows):
    path = rows({"prompt": "Q", "chosen": " yes", "rejected": " no"})
    assert load(path, layouts.preference_texts, encoding) == ([("Q", [" yes", " no"])], ["Q"])


def test_hh_rlhf(encoding, rows):
    start = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    path = rows({"chosen": start + " good", "rejected": start + " bad\n\nreally"})
    assert load(path, layouts.preference_texts, encoding)[0] == [(start, [" good", " bad\n\nreally"])]
    other = start.replace("c?", "d?")
    for row, says in (
        ({"chosen": start + " x", "rejected": other + " y"}, "'chosen' must begin with an assistant message"),
        ({"chosen": "no dialogue", "rejected": "either"}, "has no 'prompt'.*do not share a dialogue"),
    ):
        with pytest.raises(InputError, match=f":1: .*{says}"):
            load(rows(row), layouts.preference_texts, encoding)


def test_summarize_from_feedback(encoding, rows):
    row = {
        "info": {"subreddit": "cats", "title": "T", "post": "P"},
        "summaries": [{"text": " a"}, {"text": " b"}],
        "choice": 1,
    }
    prompt = "SUBREDDIT: r/cats\n\nTITLE: T\n\nPOST: P\n\nTL;DR:"
    assert load(rows(row), layouts.preference_texts, encoding)[0] == [(prompt, [" b", " a"])]
    assert load(rows(row | {"choice": 0}), layouts.preference_texts, encoding)[0] == [(prompt, [" a", " b"])]
    article = {
        "subreddit": None,
        "title": None,
        "post": None,
        "article": "A",
    }  # as the news articles among them have it
    assert (
        layouts.preference_texts(row | {"info": article})[0]
        == "SUBREDDIT: r/\n\nTITLE: \n\nPOST: A\n\nTL;DR:"
    )
    for bad in ({"choice": 2}, {"choice": -1}, {"summaries": row["summaries"][:1]}):
        with pytest.raises(InputError, match=":1: 'choice' must be 0 or 1"):
            load(rows(row | bad), layouts.preference_texts, encoding)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [HELLO], "rejected": [BYE]},
        {"chosen": [USER, HELLO], "rejected": [USER, BYE]},
        {"prompt": "hi", "chosen": [USER, HELLO], "rejected": [USER, BYE]},
    ],
)
def test_preferences_of_messages(encoding, rows, row):
    """With the prompt apart, as a shared beginning, and as UltraFeedback has it: both."""
    assert load(rows(row), layouts.preference_texts, encoding) == ([(ASKED, [" hello", " bye"])], [ASKED])
    assert load(rows(row), layouts.prompt_texts, encoding) == ([(ASKED, [])], [ASKED])


def test_messages_of_sft_and_prompts(encoding, rows):
    path = rows({"prompt": [USER], "completion": [HELLO]})
    assert load(path, layouts.sft_texts, encoding)[0] == [(ASKED, [" hello"])]
    assert load(rows({"prompt": [USER, HELLO, USER]}), layouts.prompt_texts, encoding)[1] == [
        "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: hi\n\nAssistant:"
    ]
    assert (
        layouts.chat_text([{"role": "system", "content": "S"}, USER, HELLO])
        == "\n\nSystem: S\n\nHuman: hi\n\nAssistant: hello"
    )


@pytest.mark.parametrize("bad", [["hi"], [{"role": "user"}], [{"content": "hi"}], [], [None]])
def test_bad_messages(encoding, rows, bad):
    with pytest.raises(InputError, match=r"rows.jsonl:1: "):
        load(rows({"prompt": bad}), layouts.prompt_texts, encoding)
    with pytest.raises(InputError, match=r"rows.jsonl:1: "):
        load(rows({"prompt": [USER], "completion": bad}), layouts.sft_texts, encoding)


def test_prompts_of_any_rows(encoding, rows):
    path = rows({"prompt": "Q", "chosen": "a", "rejected": "b"})
    loaded = data.load(path, layouts.prompt_texts, encoding, Limits(10))
    assert loaded.texts == ["Q"] and loaded.responses == [[]]
    assert [list(prompt) for prompt in loaded.prompts] == [[81]]


# ---- bad rows


@pytest.mark.parametrize(
    "bad, says",
    [
        (b"{not json", "not a JSON object"),
        (b'{"prompt": "Q", "response": "\xff\xfe"}', "not a JSON object"),
        (b'{"prompt": "cut', "not a JSON object"),
        (b"[1, 2]", "not a JSON object, but list"),
        (b"null", "not a JSON object, but NoneType"),
        (b"[" * 100_000, "not a JSON object"),
        (b"{}", "has no field 'prompt', only nothing"),
        ({"prompt": "Q", "answer": "A"}, "has no field 'response' or 'completion', only 'prompt', 'answer'"),
        ({"response": "A"}, "has no field 'prompt'"),
        ({"prompt": 3, "response": "A"}, "field 'prompt' is int, not text"),
        ({"prompt": None, "response": "A"}, "has no field 'prompt', only 'response'"),
        ({"prompt": "Q", "response": {"text": "A"}}, "field 'response' is dict, not text"),
        ({"prompt": "", "response": "A"}, "field 'prompt' is empty"),
        ({"prompt": "Q", "response": ""}, "field 'response' is empty"),
        ({"prompt": "Q", "response": "\ud800"}, "has no tokens for"),
    ],
)
def test_bad_rows_are_named(encoding, rows, bad, says):
    path = rows({"prompt": "Q", "response": "A"}, bad, {"prompt": "Q", "response": "B"})
    with pytest.raises(InputError) as caught:
        load(path, layouts.sft_texts, encoding)
    assert str(caught.value).startswith(f"{path}:2: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


NOTHING_SHARED = "has no 'prompt', and 'chosen' and 'rejected' share no beginning before an answer"


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "Q", "chosen": "A"}, "has no field 'rejected'"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "the same"),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant:"},
            "an answer is empty",
        ),
        ({"chosen": [HELLO], "rejected": [BYE]}, NOTHING_SHARED),
        ({"prompt": [], "chosen": [HELLO], "rejected": [BYE]}, NOTHING_SHARED),
        ({"chosen": [USER, HELLO], "rejected": [USER]}, "'rejected' is the beginning of 'chosen'"),
        (
            {"prompt": [USER], "chosen": [HELLO], "rejected": [BYE | {"content": None}]},
            "field 'rejected': a message list",
        ),
        (
            {"info": "x", "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
            "'x': an object with the field 'post' or",
        ),
        (
            {"info": {"post": "P"}, "summaries": ["text", "b"], "choice": 0},
            "'text': an object with the field 'text' is wanted",
        ),
        ({"chosen": [USER, HELLO], "rejected": [USER, HELLO]}, "the same"),
        ({"prompt": [USER], "chosen": [HELLO], "rejected": [HELLO | {"content": ""}]}, "an answer is empty"),
        ({"prompt": 7, "chosen": [HELLO], "rejected": [BYE]}, "field 'prompt' is int"),
        ({"prompt": "Q", "chosen": "A", "rejected": 0}, "field 'rejected' is int"),
        ({"prompt": "Q", "chosen": [HELLO], "rejected": "A"}, "one is text, the other a message list"),
        (
            {"info": None, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
            "has no field 'post' or 'article'",
        ),
    ],
)
def test_bad_pairs_are_named(encoding, rows, row, says):
    path = rows({"prompt": "Q", "chosen": "A", "rejected": "B"}, row)
    with pytest.raises(InputError) as caught:
        load(path, layouts.preference_texts, encoding)
    assert str(caught.value).startswith(f"{path}:2: ") and says in str(caught.value)


def test_bad_files_are_named(encoding, rows, tmp_path):
    for path, says in (
        (tmp_path / "none.jsonl", "no such file"),
        (tmp_path, "no such file"),
        (rows(), "holds no rows"),
    ):
        with pytest.raises(InputError, match=f"{path}: {says}"):
            load(path, layouts.sft_texts, encoding)
