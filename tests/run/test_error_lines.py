"""The one line of an error: short, and without a character that the terminal would obey."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.folders import edit_json, small_folder
from helpers.runs import write_jsonl

import sample
import train_sft
from nanoroads.errors import InputError
from nanoroads.run.flags import LONGEST_ERROR, Parser, run_script
from nanoroads.text import data, tokenizer
from nanoroads.text.layouts import sft_texts

ROOT = Path(sample.__file__).parent
EVIL = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202e\x7f"
ESCAPED = "\\x1b[2J\\x1b]0;title\\x07\\x9b31m\\x0d\\u202e\\x7f"


def error_of(raised, capsys):
    """The line that run_script prints for an exception."""

    def main():
        raise raised

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n")
    return line[len("error: ") : -1]


def test_control_characters_are_escaped(capsys):
    assert error_of(InputError(f"a{EVIL}b"), capsys) == f"a{ESCAPED}b"
    assert error_of(InputError("two\nlines,\t a tab \udcff"), capsys) == "two lines, a tab \\udcff"


def test_a_long_error_keeps_its_beginning_and_its_end(capsys):
    line = error_of(InputError("file.json: " + "x" * 10**6 + "; delete it"), capsys)
    assert len(line) <= LONGEST_ERROR
    assert line.startswith("file.json: xxx") and line.endswith("xxx; delete it") and " ... " in line
    assert error_of(InputError("x" * LONGEST_ERROR), capsys) == "x" * LONGEST_ERROR


def test_an_os_error_names_the_file_first(capsys, tmp_path):
    for error in (IsADirectoryError(21, "Is a directory", tmp_path), OSError(24, "Too many open files", "x")):
        line = error_of(error, capsys)
        assert line == f"{error.filename}: {error.strerror}"
    assert error_of(OSError("of a library"), capsys) == "of a library"
    assert error_of(OSError(36, "File name too long", "a" * 9000), capsys).endswith("a: File name too long")


def test_argparse_too(capsys):
    parser = Parser(prog="x.py")
    parser.add_argument("--steps", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps", EVIL])
    assert "\x1b" not in capsys.readouterr().err


def test_names_and_values_of_a_folder(refuses, tmp_path):
    """The name of the folder, a key of its config, a token, a template's own words."""
    folder = small_folder(tmp_path / f"model{EVIL}")
    edit_json(folder / "config.json", model_type=EVIL)
    line = refuses(sample, "model_type", model=folder)
    assert not set(line[:-1]) & set(EVIL.replace("[2J", "").replace("]0;title", "").replace("31m", ""))

    folder = small_folder(tmp_path / "second", "{{ raise_exception('" + EVIL + "') }}")
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}] * 3)
    flags = {"init": folder, "data": rows, "out": tmp_path / "out", "n_layer": None, "n_head": None}
    flags.update(n_embd=None, block_size=None, rows=None)
    line = refuses(train_sft, ESCAPED[:10], **flags)
    assert "\x1b" not in line and "\u202e" not in line


def test_skipped_rows(capsys, tmp_path):
    path = tmp_path / f"rows{EVIL}.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "response": "A"}) + "\n{" + "\x1b\n")
    encoding = tokenizer.get(str(small_folder(tmp_path / "model")))
    data.load(path, sft_texts, encoding, data.Limits(256, skip_bad_rows=True))
    printed = capsys.readouterr().out
    assert "skipped 1 bad rows" in printed and "\x1b" not in printed and "\x9b" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"},
                                 {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])  # fmt: skip
def test_any_encoding_of_the_terminal(how, tmp_path):
    """A name that is no UTF-8, a text that is no ASCII: printed somehow, and never a traceback."""
    folder = small_folder(tmp_path / "wörld")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **how}
    command = [sys.executable, "sample.py", "--device", "cpu", "--max-new-tokens", "2", "--model"]
    texts = ["--prompt", "A" if "LC_ALL" in how else "日本\U0001f332é"]
    good = subprocess.run([*command, folder, *texts], cwd=ROOT, env=environment, capture_output=True)
    assert good.returncode == 0, good.stderr
    name = os.fsencode(tmp_path) + b"/not utf-8 \xff"
    shutil.copytree(os.fsencode(folder), name)
    (Path(os.fsdecode(name)) / "config.json").write_text("{")
    bad = subprocess.run([*command, name, *texts], cwd=ROOT, env=environment, capture_output=True)
    assert bad.returncode == 2 and bad.stderr.startswith(b"error: ") and bad.stderr.count(b"\n") == 1
