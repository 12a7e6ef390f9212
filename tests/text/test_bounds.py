"""What a stranger's file may make this process do: templates, patterns and rows that never end."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.folders import END, small_folder

from nanoroads.errors import InputError
from nanoroads.text import bounds, chat_template, data, rows, tokenizer
from nanoroads.text.bounds import OutOfBounds, bounded
from nanoroads.text.encode import encode_row
from nanoroads.text.layouts import sft_texts
from nanoroads.text.rows import raw_rows

USER = {"role": "user", "content": "Hi"}
ENOUGH = 2**30


# ---------------------------------------------------------------- the bounds themselves


def settings():
    return signal.getsignal(signal.SIGPROF), resource.getrlimit(resource.RLIMIT_AS)


def test_time_is_bounded():
    before = settings()
    began = time.process_time()
    with pytest.raises(OutOfBounds, match="more than 0.2 s of processor time"), bounded(0.2, ENOUGH):
        while True:
            pass
    assert time.process_time() - began < 2 and settings() == before


def test_time_is_bounded_where_every_exception_is_dropped():
    with pytest.raises(OutOfBounds, match="processor time"), bounded(0.2, ENOUGH):
        while True:
            try:
                while True:
                    pass
            except Exception:  # jinja2 does this around what is constant
                continue


@pytest.mark.skipif(sys.platform != "linux", reason="the system bounds no memory here")
def test_memory_is_bounded():
    before = settings()
    with pytest.raises(OutOfBounds, match="more than 67,108,864 bytes of memory"), bounded(10, 2**26):
        b"a" * 2**28
    assert settings() == before
    assert len(b"a" * 2**28) == 2**28


def test_what_stays_within_is_left_alone():
    before = settings()
    with bounded(5, ENOUGH):
        assert sum(range(1000)) == 499500
    with pytest.raises(KeyError), bounded(5, ENOUGH):
        raise KeyError("of the block itself")
    assert settings() == before
    time.sleep(0.01)
    assert signal.getitimer(signal.ITIMER_PROF)[0] == signal.getitimer(signal.ITIMER_VIRTUAL)[0] == 0


def test_another_thread_has_no_timer():
    seen = []

    def work():
        with bounded(0.1, ENOUGH):
            seen.append("done")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == ["done"]


@pytest.mark.slow
def test_the_system_ends_what_python_cannot_interrupt():
    code = """
from nanoroads.text.bounds import bounded
a = [1]
b = [1]
for _ in range(70):
    a = [a, a]
    b = [b, b]
with bounded(0.5, 2**30):
    a == b
"""
    ended = subprocess.run([sys.executable, "-c", code], timeout=120)
    assert ended.returncode == -signal.SIGVTALRM


# ---------------------------------------------------------------- chat templates

STOPPED = {
    "a loop in a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a constant": "{{ ('a ' * 10**7) | wordwrap(3) }}",
    "a product": "{{ messages[0].content * 10**10 }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}",
    "lists that double": "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}"
    "{% endfor %}",
    "padding": "{{ messages[0].content | center(10**10) }}",
    "a format": "{{ '%9999999999d' % (messages | length) }}",
    "much text": "{% for i in range(99999) %}{{ messages[0].content * 99999 }}{% endfor %}",
}
REFUSED = {
    "": "its chat template writes nothing",
    "{# nothing #}": "its chat template writes nothing",
    "{% if messages | length > 9 %}A{% endif %}": "its chat template writes nothing",
    "{{ 'a' * 2**25 }}": "its chat template writes 33,554,432 characters",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": "recursion",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}": "recursion",
    "{{ range(10**9) | list }}": "Range too big",
    "{{ 10 ** 5000 }}": "4300 digits",
    "{% include '/etc/passwd' %}": "no loader",
    "{% extends '/etc/passwd' %}": "no loader",
    "{% import '/etc/passwd' as x %}{{ x }}": "no loader",
    "{% from '/etc/passwd' import x %}{{ x }}": "no loader",
    "{% if 1 %}" * 500 + "{% endif %}" * 500: "cannot be read",
    "{% for i in [1] %}" * 40 + "{% endfor %}" * 40: "cannot be read",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "cannot be read",
    "{{ " + "1 + " * 20000 + "1 }}": "cannot be read",
    "{{ " + "[" * 500 + "]" * 500 + " }}": "cannot be read",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ cycler.__init__.__globals__ }}": "unsafe",
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(chat_template, "MOST_SECONDS", 0.3)


@pytest.mark.parametrize("name", STOPPED)
def test_a_template_that_runs_on_is_stopped(name, quick, tmp_path):
    encoding = tokenizer.get(str(small_folder(tmp_path, STOPPED[name])))
    began = time.process_time()
    with pytest.raises(InputError) as error:
        encode_row(encoding, [USER])
    assert str(error.value).startswith(f"{tmp_path}: its chat template ")
    assert "processor time" in str(error.value) or "bytes of memory" in str(error.value)
    assert time.process_time() - began < 10


@pytest.mark.parametrize("template", REFUSED)
def test_a_template_that_cannot_be_used_is_refused(template, tmp_path):
    encoding = tokenizer.get(str(small_folder(tmp_path, template)))
    with pytest.raises(InputError) as error:
        encode_row(encoding, [USER])
    assert str(error.value).startswith(f"{tmp_path}: ") and REFUSED[template] in str(error.value)


@pytest.mark.parametrize("name", ["a loop in a loop", "a constant"])  # one is stopped while it is compiled
def test_a_template_that_was_stopped_is_not_run_for_every_row(name, quick, tmp_path):
    folder = small_folder(tmp_path, STOPPED[name])
    row = {"messages": [USER, {"role": "assistant", "content": "Yes"}]}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 300)
    limits = data.Limits(256, skip_bad_rows=True)
    began = time.process_time()
    with pytest.raises(InputError, match="no usable row.*its chat template .*processor time"):
        data.load(tmp_path / "rows.jsonl", sft_texts, tokenizer.get(str(folder)), limits)
    assert time.process_time() - began < 10


# ---------------------------------------------------------------- tokenizers


def from_library(folder, text):
    library = pytest.importorskip("tokenizers")
    return library.Tokenizer.from_file(f"{folder}/tokenizer.json").encode(text, add_special_tokens=False).ids


TEXTS = ["hello world aaa", "axa  xx\n\n b aab", "a" * 20 + "!", "naïve 日本 a b", ""]
EMPTY_MATCHES = ["", "a*", "x?", "(?=a)", r"\b", "|a", "(?:)", r"(?!\w)", "a*|b+"]


@pytest.mark.parametrize("pattern", [*EMPTY_MATCHES, r"(a)\1", r"(?>a*)*b"])
def test_patterns_that_match_between_characters(pattern, tmp_path):
    """tiktoken would panic at them. The ids are those of the `tokenizers` library."""
    encoding = tokenizer.get(str(small_folder(tmp_path, pattern=pattern)))
    for text in TEXTS:
        assert tokenizer.encode(encoding, text) == from_library(tmp_path, text)


PATTERNS = ["(", "(?:a{1000}){1000}", "(" * 1000 + "a" + ")" * 1000, "a|" * 60_000 + "b", "[z-a]"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_cannot_be_used(pattern, tmp_path):
    small_folder(tmp_path, pattern=pattern)
    with pytest.raises(InputError, match="tokenizer.json: (not a tokenizer|a pattern of)"):
        tokenizer.get(str(tmp_path))


def test_a_pattern_that_is_slow_without_end(monkeypatch, tmp_path):
    monkeypatch.setattr("nanoroads.text.tokenizer_json.MOST_SECONDS", 0.3)
    encoding = tokenizer.get(str(small_folder(tmp_path, pattern=r"(?:a|a)+(?=\d)|")))
    with pytest.raises(InputError, match="tokenizer.json: its pattern takes more than 0.3 s"):
        tokenizer.encode(encoding, "a" * 60)


def change(specification, what):
    token = specification["added_tokens"][0]
    if what == "too many tokens":
        specification["model"]["vocab"] = {str(i): i for i in range(1001)}
    elif what == "a token of megabytes":
        token["content"] = "x" * 5_000_000
    elif what == "an empty token":
        token["content"] = ""
    elif what == "a huge id":
        token["id"] = 10**30
    elif what == "a negative id":
        token["id"] = -5
    elif what == "half a character":
        token["content"] = "\ud800"
    elif what == "merges of numbers":
        specification["model"]["merges"] = [3]
    elif what == "merges of threes":
        specification["model"]["merges"] = [["a", "b", "c"]]
    elif what == "a vocabulary of numbers":
        specification["model"]["vocab"] = [1, 2]


@pytest.mark.parametrize(
    "what",
    ["too many tokens", "a token of megabytes", "an empty token", "a huge id", "a negative id",
     "half a character", "merges of numbers", "merges of threes", "a vocabulary of numbers"],
)  # fmt: skip
def test_tokens_that_cannot_be_used(what, tmp_path, monkeypatch):
    monkeypatch.setattr("nanoroads.text.bounds.MOST_TOKENS", 1000)
    small_folder(tmp_path)
    specification = json.loads((tmp_path / "tokenizer.json").read_text())
    change(specification, what)
    (tmp_path / "tokenizer.json").write_text(json.dumps(specification))
    with pytest.raises(InputError, match="tokenizer.json"):
        tokenizer.get(str(tmp_path))


def test_the_small_folder_itself_can_be_used(tmp_path):
    encoding = tokenizer.get(str(small_folder(tmp_path)))
    row = encode_row(encoding, [USER], [[{"role": "assistant", "content": "Yes"}]])
    assert row.prompt == [*b"user: Hi", 256, *b"assistant: "] and row.responses == [[*b"Yes", 256]]
    assert encoding.ids == {END: 256}


# ---------------------------------------------------------------- rows


def test_a_line_that_does_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MOST_LINE_BYTES", 2**16)
    good = json.dumps({"prompt": "x" * 60_000}).encode() + b"\n"
    for name, write in (("a.jsonl", open), ("b.jsonl.gz", gzip.open)):
        with write(tmp_path / name, "wb") as file:
            file.write(good + b"a" * 2**22)
        seen = []
        with pytest.raises(InputError, match=f"{name}:2: a line of more than 65,536 bytes"):
            seen += [number for number, _ in raw_rows(tmp_path / name)]
        (tmp_path / name).unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="the system bounds no memory here")
def test_a_long_text_in_many_rows_of_a_parquet_file(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(rows, "MOST_BATCH_BYTES", 2**28)
    column = arrow.DictionaryArray.from_arrays(
        arrow.array([0] * 1000, arrow.int32()), arrow.array(["x" * 10**6])
    )
    parquet.write_table(arrow.table({"prompt": column}), tmp_path / "rows.parquet")
    assert (tmp_path / "rows.parquet").stat().st_size < 200_000
    with pytest.raises(InputError, match="rows.parquet: was stopped while it was read .*bytes of memory"):
        list(raw_rows(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
def test_rows_from_a_pipe_are_refused(name, tmp_path):
    """--resume reads them again, and a pipe nobody writes to would be waited for."""
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: is a pipe or a device; save its contents as a file"):
        list(raw_rows(tmp_path / name))


@pytest.mark.parametrize(
    "line",
    [b"[" * 10**6, b'{"prompt":' + b"[" * 500 + b"]" * 500 + b"}", b'{"prompt": ' + b"9" * 10**6 + b"}"],
)
def test_rows_that_python_cannot_hold(line):
    with pytest.raises(InputError, match="not a (JSON object|row)"):
        rows.parse(line)


def test_bounds_are_for_this_system():
    assert bounds.resource is resource
