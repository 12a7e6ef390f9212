"""Files of rows -> token lists: every layout, bad rows by file and line, who gets an EOS."""

import gzip
import json
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken

from nanoroads.batch import pack
from nanoroads.errors import InputError
from nanoroads.text import data, layouts
from nanoroads.text.data import Limits
from nanoroads.text.rows import parse, raw_rows, write_rows
from nanoroads.text.tokenizer_json import BYTE_OF, FolderEncoding

EOS = 300
# Enough to see a merge that crosses a boundary.
MERGES = [b"ab", b"\n\n", b" a", b"Human", b"Assistant"]


@pytest.fixture(scope="module")
def encoding():
    """Bytes, and a few merges: what a byte-level BPE does, small enough to count by hand."""
    ranks = {bytes([i]): i for i in range(256)}
    for token in MERGES:  # every prefix of a merge is a token too, so the merges can be reached
        for end in range(2, len(token) + 1):
            ranks.setdefault(token[:end], len(ranks))
    return tiktoken.Encoding(
        "tiny", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": EOS}
    )


@pytest.fixture
def rows(tmp_path):
    """Writes objects as JSON and bytes as they are, one per line, and returns the path."""

    def write(*lines, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(
            b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines)
        )
        return path

    return write


def text(encoding, ids):
    return encoding.decode([t for t in ids if t != EOS])


def load(path, layout, encoding, context=10_000, **limits):
    """([(prompt, responses)], prompts), all as text."""
    rows = data.load(path, layout, encoding, Limits(context, **limits))
    found = []
    for prompt, group in zip(rows.prompts, rows.responses, strict=True):
        found.append((text(encoding, prompt), [text(encoding, response) for response in group]))
    return found, rows.texts


# ---- layouts


@pytest.mark.parametrize("name", ["response", "completion"])
def test_sft_rows(encoding, rows, name):
    path = rows({"prompt": "Q", name: "A"}, {"prompt": "é木\n", name: " 🌲", "id": 7})
    assert load(path, layouts.sft_texts, encoding) == ([("Q", ["A"]), ("é木\n", [" 🌲"])], ["Q", "é木\n"])


def test_prompt_template(encoding, rows):
    path = rows({"document": "long {text}", "summary": "short"}, {"document": "d", "response": "r"})
    found, _ = load(path, lambda row: layouts.sft_texts(row, "{document}\n\nTL;DR:"), encoding)
    assert found == [("long {text}\n\nTL;DR:", ["short"]), ("d\n\nTL;DR:", ["r"])]
    assert layouts.sft_texts({"id": 7, "summary": "s"}, "{id}:") == ("7:", ["s"])
    for value, says in (
        (None, "NoneType, not text"),
        ("", "empty"),
        ([USER], "a list, not text"),
        (["text"], "a list, not text"),
        ({}, "dict, not text"),
    ):
        with pytest.raises(InputError, match=f"field 'document' is {says}"):
            layouts.sft_texts({"document": value, "summary": "s"}, "{document}\n\nTL;DR:")
    for template in ("{nothing}", "{", "{0}", "{summary.x}", "{summary[x]}"):
        with pytest.raises(InputError, match="rows.jsonl:1: --prompt-template .* does not fit"):
            load(path, lambda row, t=template: layouts.sft_texts(row, t), encoding)


def test_preferences_of_text(encoding, rows):
    path = rows({"prompt": "Q", "chosen": " yes", "rejected": " no"})
    assert load(path, layouts.preference_texts, encoding) == ([("Q", [" yes", " no"])], ["Q"])


def test_hh_rlhf(encoding, rows):
    start = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    path = rows({"chosen": start + " good", "rejected": start + " bad\n\nreally"})
    assert load(path, layouts.preference_texts, encoding)[0] == [(start, [" good", " bad\n\nreally"])]
    other = start.replace("c?", "d?")
    for row in (
        {"chosen": start + " x", "rejected": other + " y"},
        {"chosen": "no dialogue", "rejected": "either"},
    ):
        with pytest.raises(InputError, match=":1: has no 'prompt'.*do not share a dialogue"):
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


USER, HELLO, BYE = (
    {"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "hello"), ("assistant", "bye"))
)
ASKED = "\n\nHuman: hi\n\nAssistant:"


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
    for ids, answer in (
        (chosen, "yes<|endoftext|>"),
        (rejected, "no"),
    ):  # a special token in the text stays text
        assert list(ids).count(EOS) == 1 and ids[-1] == EOS and encoding.decode(ids[:-1]) == answer


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


# ---- bad files and rows


@pytest.mark.parametrize(
    "bad, says",
    [
        (b"{not json", "not a JSON object"),
        (b'{"prompt": "Q", "response": "\xff\xfe"}', "not a JSON object"),
        (b'{"prompt": "cut', "not a JSON object"),
        (b"", "not a JSON object"),
        (b"[1, 2]", "not a JSON object, but list"),
        (b"null", "not a JSON object, but NoneType"),
        (b"[" * 100_000, "not a JSON object"),
        (b"{}", "has no field 'prompt', only nothing"),
        ({"prompt": "Q", "answer": "A"}, "has no field 'response' or 'completion', only 'prompt', 'answer'"),
        ({"response": "A"}, "has no field 'prompt'"),
        ({"prompt": 3, "response": "A"}, "field 'prompt' is int, not text"),
        ({"prompt": None, "response": "A"}, "field 'prompt' is NoneType, not text"),
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
        ({"chosen": [USER, HELLO], "rejected": [USER]}, NOTHING_SHARED),
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


# ---- writing and splitting


def test_written_rows_come_back(encoding, tmp_path):
    written = [{"prompt": 'é "木"\n', "response": "\u2028 \U0001f332"}, {"prompt": "Q", "response": "A"}]
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, written)
    found = [parse(line) for _, line in raw_rows(path)]
    assert found == written and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("n, held", [(2, 1), (19, 1), (100, 5), (10_000, 256)])
def test_hold_out(n, held):
    numbers = list(range(n))
    train, test = data.hold_out(data.Rows(numbers, numbers, numbers))
    assert len(test.prompts) == held
    assert (
        train.prompts + test.prompts
        == train.responses + test.responses
        == train.texts + test.texts
        == numbers
    )
    with pytest.raises(InputError, match="one row"):
        data.hold_out(data.Rows([1], [1], [1]))


# ---- kinds of files


ROWS = [{"prompt": "Q", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(2500)]


def everything(path, encoding):
    loaded = data.load(path, layouts.preference_texts, encoding, Limits(50))
    prompts = [list(prompt) for prompt in loaded.prompts]
    responses = [[list(response) for response in group] for group in loaded.responses]
    return prompts, responses, loaded.texts


def test_gzip(encoding, rows, tmp_path):
    plain, zipped = rows(*ROWS), tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert everything(zipped, encoding) == everything(plain, encoding)
    whole = zipped.read_bytes()
    for name, broken, number in (
        ("cut", whole[:-20], r"\d+"),
        ("text", b"{}", 1),
        ("crc", whole[:-8] + b"x" * 8, 2501),
    ):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(broken)
        with pytest.raises(InputError, match=f"{path}:{number}: not a whole gzip file"):
            everything(path, encoding)


def test_parquet(encoding, rows, tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=700)
    assert everything(path, encoding) == everything(rows(*ROWS), encoding)
    messages = [{"chosen": [USER, HELLO], "rejected": [USER, BYE]}]
    parquet.write_table(pyarrow.Table.from_pylist(messages), path)
    assert load(path, layouts.preference_texts, encoding)[0] == [(ASKED, [" hello", " bye"])]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"{path}: not a whole parquet file"):
        everything(path, encoding)


def test_hub(encoding, rows, monkeypatch):
    """With a stand-in for `datasets`: what it is asked for, and that rows come through."""

    def load_dataset(name, split):
        if name != "org/name":
            raise FileNotFoundError(f"no {name}")
        return {"train": ROWS, "test_prefs": ROWS[:7]}[split]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert everything(Path("hf:org/name"), encoding) == everything(rows(*ROWS), encoding)
    assert len(everything("hf:org/name:test_prefs", encoding)[0]) == 7
    with pytest.raises(InputError, match="hf:org/other: no org/other"):
        everything("hf:org/other", encoding)


def test_missing_libraries_are_named(encoding, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"rows.parquet: to read it, pip install 'nanoroads\[parquet\]'"):
        everything(tmp_path / "rows.parquet", encoding)
    with pytest.raises(InputError, match=r"hf:a/b: to read it, pip install 'nanoroads\[hf\]'"):
        everything("hf:a/b", encoding)


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
    loaded = data.load(rows({"prompt": "abc", "response": "<s>"}), layouts.sft_texts, folder, Limits(99))
    [prompt], [[response]] = loaded.prompts, loaded.responses
    assert folder.decode(prompt) == "<s>abc" and folder.decode(response) == "<s><e>"
    assert list(prompt).count(folder.ids["<s>"]) == 1 and folder.ids["<s>"] not in response
    cut = data.load(rows({"prompt": "abc"}), layouts.prompt_texts, folder, Limits(99, max_prompt=3))
    assert folder.decode(cut.prompts[0]) == "<s>bc"


CHAT = (
    "<s>{% for m in messages %}{{ m.role }}:{{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chat_folder(tmp_path, template=CHAT):
    """A tokenizer of bytes with a chat template."""
    vocab = {c: i for i, c in enumerate(BYTE_OF)}
    added = [
        {"id": 256 + i, "content": c, "special": True, "normalized": False}
        for i, c in enumerate(("<s>", "<e>"))
    ]
    spec = {"added_tokens": added, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(spec | {"model": {"type": "BPE", "vocab": vocab, "merges": []}})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<e>", "chat_template": template})
    )
    return FolderEncoding(tmp_path)


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
    assert batch.tokens.tolist() == [[*"é".encode(), 65, EOS]] and batch.target.tolist() == [65, EOS]
