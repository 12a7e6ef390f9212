"""Files of rows -> token lists: who gets an EOS, what is cut, what a user sees."""

from array import array

import pytest
from helpers.rows import ASKED, BYE, EOS, HELLO, USER, chat_folder, load

from nanoroads.batch import pack
from nanoroads.errors import InputError
from nanoroads.text import data, layouts
from nanoroads.text.data import Limits

# ---- tokens


def test_prompt_and_response_are_tokenised_apart(encoding, rows):
    joint = list(encoding.encode_ordinary("xab"))
    loaded = data.load(rows({"prompt": "xa", "response": "b"}), layouts.sft_texts, encoding, Limits(10))
    assert len(joint) == 2
    assert [list(loaded.prompts[0]), list(loaded.responses[0][0])] == [[120, 97], [98, EOS]]


def test_exactly_one_eos(encoding, rows):
    path = rows({"prompt": "Q", "chosen": "yes<|endoftext|>", "rejected": "no"})
    loaded = data.load(path, layouts.preference_texts, encoding, Limits(50))
    [[chosen, rejected]] = loaded.responses
    assert EOS not in loaded.prompts[0]
    # The EOS that a training file spells is EOS, and no second one follows.
    assert list(chosen) == [*b"yes", EOS] and list(rejected) == [*b"no", EOS]


def test_a_cut_response_has_no_eos(encoding, rows):
    path = rows({"prompt": "Q", "chosen": "wxyz", "rejected": "wx"})
    for most, chosen, rejected in ((4, "wxyz", "wx"), (3, "wxy", "wx"), (2, "wx", None), (5, "wxyz", "wx")):
        if rejected is None:  # cut to the same tokens, a pair says nothing
            with pytest.raises(InputError, match=":1: .*the same once encoded and cut"):
                data.load(path, layouts.preference_texts, encoding, Limits(50, max_response=most))
            continue
        group = data.load(path, layouts.preference_texts, encoding, Limits(50, max_response=most)).responses[
            0
        ]
        for ids, answer in zip(group, (chosen, rejected), strict=True):
            whole = len(answer) + 1 <= most
            assert list(ids) == [*answer.encode(), *([EOS] if answer in ("wx", "wxyz") and whole else [])]
            assert len(ids) <= most


def test_a_cut_prompt_keeps_its_end(encoding, rows):
    path = rows({"prompt": "vwxyz", "response": "r"})
    for most, end in ((3, b"xyz"), (4, b"wxyz"), (5, b"vwxyz")):
        loaded = data.load(path, layouts.sft_texts, encoding, Limits(50, max_prompt=most))
        assert list(loaded.prompts[0]) == [*end] and loaded.texts == ["vwxyz"]


def test_context(encoding, rows):
    path = rows({"prompt": "xy", "chosen": "abc", "rejected": "vwxz"})  # 2 + max(3 - 1 merge + 1, 5)
    assert data.load(path, layouts.preference_texts, encoding, Limits(7))
    with pytest.raises(
        InputError,
        match=r"rows.jsonl:1: prompt and response take 7 tokens, the model's context is 6 \(--max-",
    ):
        data.load(path, layouts.preference_texts, encoding, Limits(6, hint=" (--max-prompt-tokens cuts)"))
    assert data.load(rows({"prompt": "xyz"}), layouts.prompt_texts, encoding, Limits(4))
    with pytest.raises(
        InputError, match=":1: .* context is 3$"
    ):  # a prompt that leaves no room for a response
        data.load(rows({"prompt": "xyz"}), layouts.prompt_texts, encoding, Limits(3))


# ---- message lists, with and without a template


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, HELLO]},
        {"messages": [USER, HELLO | {"tool_calls": None}], "prompt": "hi"},
        {"prompt": [USER], "completion": [HELLO]},
        {"prompt": "hi", "completion": [HELLO]},
        {"prompt": [USER], "response": "hello"},
    ],
)
def test_chat_rows_of_sft(encoding, rows, tmp_path, row):
    assert load(rows(row), layouts.sft_texts, encoding)[0] == [(ASKED, [" hello"])]
    folder = chat_folder(tmp_path)
    loaded = data.load(rows(row), layouts.sft_texts, folder, Limits(99))
    [prompt], [[response]] = loaded.prompts, loaded.responses
    assert folder.decode(prompt) == loaded.texts[0] == "<s>user:hi<e>assistant:"
    assert folder.decode(response) == "hello<e>"
    if row.get("prompt") != "hi" or "messages" in row:
        assert data.load(rows(row), layouts.prompt_texts, folder, Limits(99)).prompts == [prompt]


def test_chat_rows_of_preferences(rows, tmp_path):
    folder = chat_folder(tmp_path)
    path = rows(
        {"prompt": [USER], "chosen": [HELLO], "rejected": [BYE]},
        {"chosen": [USER, HELLO, USER, HELLO], "rejected": [USER, HELLO, USER, BYE]},
    )
    loaded = data.load(path, layouts.preference_texts, folder, Limits(99))
    prompts = ["<s>user:hi<e>assistant:", "<s>user:hi<e>assistant:hello<e>user:hi<e>assistant:"]
    assert loaded.texts == [folder.decode(prompt) for prompt in loaded.prompts] == prompts
    for group in loaded.responses:
        assert [folder.decode(response) for response in group] == ["hello<e>", "bye<e>"]
        for response in group:
            assert list(response).count(folder.eos) == 1 and response[-1] == folder.eos
    folder.bos = [folder.ids["<s>"]]
    cut = data.load(path, layouts.preference_texts, folder, Limits(99, max_prompt=4, max_response=3))
    assert [folder.decode(p) for p in cut.prompts] == [
        "<s>nt:"
    ] * 2  # BOS stays in front of a prompt that was cut
    assert [folder.decode(r) for r in cut.responses[0]] == ["hel", "bye"]


def test_a_template_without_eos(rows, tmp_path):
    folder = chat_folder(tmp_path, "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}")
    loaded = data.load(rows({"messages": [USER, HELLO]}), layouts.sft_texts, folder, Limits(99))
    assert folder.decode(loaded.responses[0][0]) == "assistant:hello <e>"


def test_bos_of_text(rows, tmp_path):
    """A family with a BOS has exactly one in front of a prompt of text, and none in a response."""
    folder = chat_folder(tmp_path)
    folder.bos = [folder.ids["<s>"]]
    path = rows({"prompt": "abc", "response": "x"}, {"prompt": "<s>abc", "response": "x"})
    loaded = data.load(path, layouts.sft_texts, folder, Limits(99))
    assert loaded.prompts[0] == loaded.prompts[1] and loaded.responses[0] == loaded.responses[1]
    [prompt, _], [[response], _] = loaded.prompts, loaded.responses
    assert folder.decode(prompt) == "<s>abc" and folder.decode(response) == "x<e>"
    assert list(prompt).count(folder.ids["<s>"]) == 1
    cut = data.load(rows({"prompt": "abc"}), layouts.prompt_texts, folder, Limits(99, max_prompt=3))
    assert folder.decode(cut.prompts[0]) == "<s>bc"


# ---- what a user sees


def test_skipped_rows_are_counted(encoding, rows, capsys):
    path = rows(
        {"prompt": "Q", "response": "A"},
        b"{",
        {"prompt": "Q"},
        b'{"prompt": "Q", "response": "B"}',
        {"prompt": "Q", "response": "C" * 50},
    )
    found, _ = load(path, layouts.sft_texts, encoding, 40, skip_bad_rows=True)
    assert found == [("Q", ["A"]), ("Q", ["B"])]
    assert capsys.readouterr().out.startswith(
        f"{path}: skipped 3 bad rows of 5; the first: {path}:2: not a JSON object"
    )
    with pytest.raises(InputError, match=f"no usable row; the first error: {path}:1: has no field"):
        load(rows({"a": 1}, b"["), layouts.sft_texts, encoding, skip_bad_rows=True)
    load(rows({"prompt": "Q", "response": "A"}), layouts.sft_texts, encoding, skip_bad_rows=True)
    assert "skipped" not in capsys.readouterr().out


def test_tokens_take_four_bytes(encoding, rows):
    loaded = data.load(rows({"prompt": "é", "response": "A"}), layouts.sft_texts, encoding, Limits(50))
    for ids in (loaded.prompts[0], loaded.responses[0][0]):
        assert isinstance(ids, array) and ids.itemsize == 4
    batch = pack(loaded.prompts, loaded.responses)
    assert batch.tokens.tolist() == [*"é".encode(), 65, EOS] and batch.target.tolist() == [65, EOS]
