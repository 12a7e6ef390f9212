"""Files of rows -> token lists: every layout, every bad row by file and line, and who gets an EOS."""

import gzip
import json
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiktoken

from nanoroads import data, tokenizer
from nanoroads.batch import pack
from nanoroads.errors import InputError
from nanoroads.text.tokenizer_json import BYTE_OF, FolderEncoding

EOS = 300
MERGES = [b"ab", b"\n\n", b" a", b"Human", b"Assistant"]  # enough to see a merge that crosses a boundary


@pytest.fixture(scope="module")
def encoding():
    """Bytes, and a few merges: what a byte-level BPE does, small enough to count by hand."""
    ranks = {bytes([i]): i for i in range(256)}
    for token in MERGES:  # every prefix of a merge is a token too, so the merges can be reached
        for end in range(2, len(token) + 1):
            ranks.setdefault(token[:end], len(ranks))
    return tiktoken.Encoding("tiny", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": EOS})


@pytest.fixture
def rows(tmp_path):
    """Writes what it is given, objects as JSON and bytes as they are, one a line, and returns the path."""

    def write(*lines, name="rows.jsonl"):
        path = tmp_path / name
        path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        return path

    return write


def text(encoding, ids):
    return encoding.decode([t for t in ids if t != EOS])


def load(path, read, encoding, context=10_000, *limits, **options):
    prompts, responses, texts = data.load(path, read, encoding, context, *limits, **options)
    return [(text(encoding, p), [text(encoding, r) for r in group]) for p, group in zip(prompts, responses, strict=True)], texts


# ---- layouts


@pytest.mark.parametrize("name", ["response", "completion"])
def test_sft_rows(encoding, rows, name):
    path = rows({"prompt": "Q", name: "A"}, {"prompt": "é木\n", name: " 🌲", "id": 7})
    assert load(path, data.sft_texts, encoding) == ([("Q", ["A"]), ("é木\n", [" 🌲"])], ["Q", "é木\n"])


def test_prompt_template(encoding, rows):
    path = rows({"document": "long {text}", "summary": "short"}, {"document": "d", "response": "r"})
    found, _ = load(path, lambda row: data.sft_texts(row, "{document}\n\nTL;DR:"), encoding)
    assert found == [("long {text}\n\nTL;DR:", ["short"]), ("d\n\nTL;DR:", ["r"])]
    assert data.sft_texts({"id": 7, "summary": "s"}, "{id}:") == ("7:", ["s"])
    for value, says in ((None, "NoneType, not text"), ("", "empty"), ([USER], "list, not text"), ({}, "dict, not text")):
        with pytest.raises(InputError, match=f"field 'document' is {says}"):
            data.sft_texts({"document": value, "summary": "s"}, "{document}\n\nTL;DR:")
    for template in ("{nothing}", "{", "{0}", "{summary.x}", "{summary[x]}"):
        with pytest.raises(InputError, match="rows.jsonl:1: --prompt-template .* does not fit"):
            load(path, lambda row, t=template: data.sft_texts(row, t), encoding)


def test_preferences_of_text(encoding, rows):
    path = rows({"prompt": "Q", "chosen": " yes", "rejected": " no"})
    assert load(path, data.preference_texts, encoding) == ([("Q", [" yes", " no"])], ["Q"])


def test_hh_rlhf(encoding, rows):
    start = "\n\nHuman: a?\n\nAssistant: b\n\nHuman: c?\n\nAssistant:"
    path = rows({"chosen": start + " good", "rejected": start + " bad\n\nreally"})
    assert load(path, data.preference_texts, encoding)[0] == [(start, [" good", " bad\n\nreally"])]
    other = start.replace("c?", "d?")
    for row in ({"chosen": start + " x", "rejected": other + " y"}, {"chosen": "no dialogue", "rejected": "either"}):
        with pytest.raises(InputError, match=":1: has no 'prompt'.*do not share a dialogue"):
            load(rows(row), data.preference_texts, encoding)


def test_summarize_from_feedback(encoding, rows):
    row = {"info": {"subreddit": "cats", "title": "T", "post": "P"}, "summaries": [{"text": " a"}, {"text": " b"}], "choice": 1}
    prompt = "SUBREDDIT: r/cats\n\nTITLE: T\n\nPOST: P\n\nTL;DR:"
    assert load(rows(row), data.preference_texts, encoding)[0] == [(prompt, [" b", " a"])]
    assert load(rows(row | {"choice": 0}), data.preference_texts, encoding)[0] == [(prompt, [" a", " b"])]
    article = {"subreddit": None, "title": None, "post": None, "article": "A"}  # as the news articles among them have it
    assert data.preference_texts(row | {"info": article})[0] == "SUBREDDIT: r/\n\nTITLE: \n\nPOST: A\n\nTL;DR:"
    for bad in ({"choice": 2}, {"choice": -1}, {"summaries": row["summaries"][:1]}):
        with pytest.raises(InputError, match=":1: 'choice' must be 0 or 1"):
            load(rows(row | bad), data.preference_texts, encoding)


USER, HELLO, BYE = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "hello"), ("assistant", "bye")))
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
    assert load(rows(row), data.preference_texts, encoding) == ([(ASKED, [" hello", " bye"])], [ASKED])
    assert load(rows(row), data.prompt_texts, encoding) == ([(ASKED, [])], [ASKED])


def test_messages_of_sft_and_prompts(encoding, rows):
    path = rows({"prompt": [USER], "completion": [HELLO]})
    assert load(path, data.sft_texts, encoding)[0] == [(ASKED, [" hello"])]
    assert load(rows({"prompt": [USER, HELLO, USER]}), data.prompt_texts, encoding)[1] == [
        "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: hi\n\nAssistant:"
    ]
    assert data.chat_text([{"role": "system", "content": "S"}, USER, HELLO]) == "\n\nSystem: S\n\nHuman: hi\n\nAssistant: hello"


@pytest.mark.parametrize("bad", [["hi"], [{"role": "user"}], [{"content": "hi"}], [], [None]])
def test_bad_messages(encoding, rows, bad):
    with pytest.raises(InputError, match=r"rows.jsonl:1: "):
        load(rows({"prompt": bad}), data.prompt_texts, encoding)
    with pytest.raises(InputError, match=r"rows.jsonl:1: "):
        load(rows({"prompt": [USER], "completion": bad}), data.sft_texts, encoding)


def test_prompts_of_any_rows(encoding, rows):
    prompts, responses, texts = data.load(rows({"prompt": "Q", "chosen": "a", "rejected": "b"}), data.prompt_texts, encoding, 10)
    assert texts == ["Q"] and [list(p) for p in prompts] == [[81]] and responses == [[]]


# ---- tokens


def test_prompt_and_response_are_tokenised_apart(encoding, rows):
    joint = list(encoding.encode_ordinary("xab"))
    prompts, responses, _ = data.load(rows({"prompt": "xa", "response": "b"}), data.sft_texts, encoding, 10)
    assert len(joint) == 2 and [list(prompts[0]), list(responses[0][0])] == [[120, 97], [98, EOS]]


def test_exactly_one_eos(encoding, rows):
    path = rows({"prompt": "Q", "chosen": "yes<|endoftext|>", "rejected": "no"})
    prompts, [[chosen, rejected]], _ = data.load(path, data.preference_texts, encoding, 50)
    assert EOS not in prompts[0]
    for ids, said in ((chosen, "yes<|endoftext|>"), (rejected, "no")):  # a special token in the text stays text
        assert list(ids).count(EOS) == 1 and ids[-1] == EOS and encoding.decode(ids[:-1]) == said


def test_a_cut_response_has_no_eos(encoding, rows):
    path = rows({"prompt": "Q", "chosen": "wxyz", "rejected": "wx"})
    for most, chosen, rejected in ((4, "wxyz", "wx"), (3, "wxy", "wx"), (2, "wx", None), (5, "wxyz", "wx")):
        if rejected is None:  # cut to the same tokens, a pair says nothing
            with pytest.raises(InputError, match=":1: .*the same"):
                data.load(path, data.preference_texts, encoding, 50, None, most)
            continue
        group = data.load(path, data.preference_texts, encoding, 50, None, most)[1][0]
        for ids, said in zip(group, (chosen, rejected), strict=True):
            whole = len(said) + 1 <= most
            assert list(ids) == [*said.encode(), *([EOS] if said in ("wx", "wxyz") and whole else [])]
            assert len(ids) <= most


def test_a_cut_prompt_keeps_its_end(encoding, rows):
    path = rows({"prompt": "vwxyz", "response": "r"})
    prompts, _, texts = data.load(path, data.sft_texts, encoding, 50, 3)
    assert list(prompts[0]) == [*b"xyz"] and texts == ["vwxyz"]
    assert list(data.load(path, data.sft_texts, encoding, 50, 4)[0][0]) == [*b"wxyz"]
    assert list(data.load(path, data.sft_texts, encoding, 50, 5)[0][0]) == [*b"vwxyz"]


def test_context(encoding, rows):
    path = rows({"prompt": "xy", "chosen": "abc", "rejected": "vwxz"})  # 2 + max(3 - 1 merge + 1, 5)
    assert data.load(path, data.preference_texts, encoding, 7)
    with pytest.raises(InputError, match=r"rows.jsonl:1: prompt and response take 7 tokens, the model's context is 6 \(--max-"):
        data.load(path, data.preference_texts, encoding, 6)
    assert data.load(rows({"prompt": "xyz"}), data.prompt_texts, encoding, 4)
    with pytest.raises(InputError, match=":1: .* context is 3 "):  # a prompt that leaves no room for a response
        data.load(rows({"prompt": "xyz"}), data.prompt_texts, encoding, 3)


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
        load(path, data.sft_texts, encoding)
    assert str(caught.value).startswith(f"{path}:2: ") and says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "Q", "chosen": "A"}, "has no field 'rejected'"),
        ({"prompt": "Q", "chosen": "A", "rejected": "A"}, "the same"),
        ({"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant:"}, "an answer is empty"),
        ({"chosen": [HELLO], "rejected": [BYE]}, "field 'prompt': a message list must hold"),
        ({"prompt": [USER], "chosen": [HELLO], "rejected": [BYE | {"content": None}]}, "field 'rejected': a message list"),
        ({"info": "x", "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}, "'x': an object with the field 'post' or"),
        ({"info": {"post": "P"}, "summaries": ["text", "b"], "choice": 0}, "'text': an object with the field 'text' is wanted"),
        ({"chosen": [USER, HELLO], "rejected": [USER, HELLO]}, "the same"),
        ({"prompt": [USER], "chosen": [HELLO], "rejected": [HELLO | {"content": ""}]}, "an answer is empty"),
        ({"prompt": 7, "chosen": [HELLO], "rejected": [BYE]}, "field 'prompt' is int"),
        ({"prompt": "Q", "chosen": "A", "rejected": 0}, "field 'rejected' is int"),
        ({"prompt": "Q", "chosen": [HELLO], "rejected": "A"}, "one is text, the other a message list"),
        ({"info": None, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}, "has no field 'post' or 'article'"),
    ],
)
def test_bad_pairs_are_named(encoding, rows, row, says):
    path = rows({"prompt": "Q", "chosen": "A", "rejected": "B"}, row)
    with pytest.raises(InputError) as caught:
        load(path, data.preference_texts, encoding)
    assert str(caught.value).startswith(f"{path}:2: ") and says in str(caught.value)


def test_bad_files_are_named(encoding, rows, tmp_path):
    for path, says in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "no such file"), (rows(), "holds no rows")):
        with pytest.raises(InputError, match=f"{path}: {says}"):
            load(path, data.sft_texts, encoding)


# ---- writing and splitting


def test_written_rows_come_back(encoding, tmp_path):
    written = [{"prompt": 'é "木"\n', "response": "\u2028 \U0001f332"}, {"prompt": "Q", "response": "A"}]
    path = tmp_path / "new" / "rows.jsonl"
    data.write_rows(path, written)
    found = [data.parse(line) for _, line in data.raw_rows(path)]
    assert found == written and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("n, held", [(2, 1), (19, 1), (100, 5), (10_000, 256)])
def test_hold_out(n, held):
    (prompts, responses), (test_prompts, test_responses) = data.hold_out(list(range(n)), list(range(n)))
    assert len(test_prompts) == held and prompts + test_prompts == responses + test_responses == list(range(n))
    with pytest.raises(InputError, match="one row"):
        data.hold_out([1], [1])


# ---- kinds of files


ROWS = [{"prompt": "Q", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(2500)]


def everything(path, encoding):
    prompts, responses, texts = data.load(path, data.preference_texts, encoding, 50)
    return [list(p) for p in prompts], [[list(r) for r in g] for g in responses], texts


def test_gzip(encoding, rows, tmp_path):
    plain, zipped = rows(*ROWS), tmp_path / "rows.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert everything(zipped, encoding) == everything(plain, encoding)
    whole = zipped.read_bytes()
    for name, broken, number in (("cut", whole[:-20], r"\d+"), ("text", b"{}", 1), ("crc", whole[:-8] + b"x" * 8, 2501)):
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
    assert load(path, data.preference_texts, encoding)[0] == [(ASKED, [" hello", " bye"])]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=f"{path}: not a whole parquet file"):
        everything(path, encoding)


def test_hub(encoding, rows, monkeypatch):
    """`datasets` stands in here: what matters is what it is asked for, and that rows come through."""

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
    assert load(rows(row), data.sft_texts, encoding)[0] == [(ASKED, [" hello"])]
    folder = chat_folder(tmp_path)
    [prompt], [[response]], [text_] = data.load(rows(row), data.sft_texts, folder, 99)
    assert folder.decode(prompt) == text_ == "<s>user:hi<e>assistant:" and folder.decode(response) == "hello<e>"
    if row.get("prompt") != "hi" or "messages" in row:
        assert list(data.load(rows(row), data.prompt_texts, folder, 99)[0][0]) == list(prompt)


def test_chat_rows_of_preferences(rows, tmp_path):
    folder = chat_folder(tmp_path)
    path = rows(
        {"prompt": [USER], "chosen": [HELLO], "rejected": [BYE]},
        {"chosen": [USER, HELLO, USER, HELLO], "rejected": [USER, HELLO, USER, BYE]},
    )
    prompts, responses, texts = data.load(path, data.preference_texts, folder, 99)
    assert (
        texts
        == ["<s>user:hi<e>assistant:", "<s>user:hi<e>assistant:hello<e>user:hi<e>assistant:"]
        == [folder.decode(p) for p in prompts]
    )
    assert [[folder.decode(r) for r in g] for g in responses] == [["hello<e>", "bye<e>"]] * 2
    assert all(list(r).count(folder.eos) == 1 and r[-1] == folder.eos for g in responses for r in g)
    folder.bos = [folder.ids["<s>"]]
    cut = data.load(path, data.preference_texts, folder, 99, 4, 3)  # BOS stays in front of a prompt that was cut
    assert [folder.decode(p) for p in cut[0]] == ["<s>nt:"] * 2 and [folder.decode(r) for r in cut[1][0]] == ["hel", "bye"]


def test_a_template_without_eos(rows, tmp_path):
    folder = chat_folder(tmp_path, "{% for m in messages %}{{ m.role }}:{{ m.content }} {% endfor %}")
    responses = data.load(rows({"messages": [USER, HELLO]}), data.sft_texts, folder, 99)[1]
    assert folder.decode(responses[0][0]) == "assistant:hello <e>"


def test_bos_of_text(rows, tmp_path):
    """A family with a BOS has exactly one in front of a prompt of text, and none in a response."""
    folder = chat_folder(tmp_path)
    folder.bos = [folder.ids["<s>"]]
    [prompt], [[response]], _ = data.load(rows({"prompt": "abc", "response": "<s>"}), data.sft_texts, folder, 99)
    assert folder.decode(prompt) == "<s>abc" and folder.decode(response) == "<s><e>"
    assert list(prompt).count(folder.ids["<s>"]) == 1 and folder.ids["<s>"] not in response
    assert folder.decode(data.load(rows({"prompt": "abc"}), data.prompt_texts, folder, 99, 3)[0][0]) == "<s>bc"


CHAT = "<s>{% for m in messages %}{{ m.role }}:{{ m.content }}<e>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"


def chat_folder(tmp_path, template=CHAT):
    """A tokenizer of bytes with a chat template."""
    vocab = {c: i for i, c in enumerate(BYTE_OF)}
    added = [{"id": 256 + i, "content": c, "special": True, "normalized": False} for i, c in enumerate(("<s>", "<e>"))]
    spec = {"added_tokens": added, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"model": {"type": "BPE", "vocab": vocab, "merges": []}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>", "chat_template": template}))
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
    found, _ = load(path, data.sft_texts, encoding, 40, skip_bad_rows=True)
    assert found == [("Q", ["A"]), ("Q", ["B"])]
    assert capsys.readouterr().out.startswith(f"{path}: skipped 3 bad rows of 5; the first: {path}:2: not a JSON object")
    with pytest.raises(InputError, match=f"no row is good; the first: {path}:1: has no field"):
        load(rows({"a": 1}, b"["), data.sft_texts, encoding, skip_bad_rows=True)
    load(rows({"prompt": "Q", "response": "A"}), data.sft_texts, encoding, skip_bad_rows=True)
    assert "skipped" not in capsys.readouterr().out


def test_inspect_shows_what_is_trained(rows, capsys):
    encoding = tokenizer.get("roadmap")
    path = rows(*[{"prompt": "WA>FL:", "chosen": ">ID>MT", "rejected": ">OR"}] * 5)
    data.inspect(*data.load(path, data.preference_texts, encoding, 50)[:2], encoding, n=2)
    out = capsys.readouterr().out
    one = "  prompt      WA|>FL|:|\n  response 1  [>ID][>MT][<|end|>]\n  response 2  [>OR][<|end|>]\n"
    heads = [f"example {i}: 5 of 8 tokens are trained, those in [brackets]\n" for i in (1, 2)]
    assert out == heads[0] + one + heads[1] + one
    data.inspect(*data.load(path, data.prompt_texts, encoding, 50)[:2], encoding, n=1)
    head = "example 1: 0 of 3 tokens are trained, those in [brackets]\n"
    assert capsys.readouterr().out == head + "  prompt      WA|>FL|:|\n"


def test_tokens_take_four_bytes(encoding, rows):
    prompts, responses, _ = data.load(rows({"prompt": "é", "response": "A"}), data.sft_texts, encoding, 50)
    for ids in (prompts[0], responses[0][0]):
        assert isinstance(ids, array) and ids.itemsize == 4
    batch = pack(prompts, responses)
    assert batch.tokens.tolist() == [[*"é".encode(), 65, EOS]] and batch.target.tolist() == [65, EOS]
