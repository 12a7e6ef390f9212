"""Files of rows, of every kind, and what only looks like one."""

import gzip
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.rows import ASKED, BYE, HELLO, USER, load

from nanoroads.errors import InputError
from nanoroads.text import data, layouts
from nanoroads.text.data import Limits
from nanoroads.text.rows import parse, raw_rows, write_rows


def test_written_rows_come_back(encoding, tmp_path):
    written = [{"prompt": 'é "木"\n', "response": "\u2028 \U0001f332"}, {"prompt": "Q", "response": "A"}]
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, written)
    found = [parse(line) for _, line in raw_rows(path)]
    assert found == written and list(path.parent.iterdir()) == [path]


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


# ---- lines that hold no row, and files of other kinds

PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}
LINE = b'{"prompt": "Q", "chosen": "a", "rejected": "b"}'


def numbers(path):
    return [number for number, _ in raw_rows(path)]


@pytest.mark.parametrize(
    "content, expected",
    [
        (LINE + b"\n\n" + LINE + b"\n", [1, 3]),
        (b"\n \n" + LINE + b"\n  ", [3]),
        (LINE + b"\r\n\r\n" + LINE + b"\r\n", [1, 3]),
        (b"\xef\xbb\xbf" + LINE + b"\n", [1]),
        (b"\xef\xbb\xbf\r\n" + LINE, [2]),
        (LINE + b"\n" + b"\0" * 4096, [1]),  # what a machine that crashed leaves
        (LINE + b"\0\0", [1]),
        (LINE + b"\n\x1a", [1]),
        (b"\t" + LINE + b" \t\n\v\n"[:3] + LINE, [1, 2]),
    ],
)
def test_blank_lines_are_passed_over(content, expected, tmp_path, encoding):
    path, zipped = tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"
    path.write_bytes(content)
    zipped.write_bytes(gzip.compress(content, mtime=0))
    for each in (path, zipped):
        assert numbers(each) == expected
        assert everything(each, encoding)[2] == ["Q"] * len(expected)


def test_an_error_names_the_line_of_the_file(encoding, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n" + LINE + b"\n\n\n{}\n")
    with pytest.raises(InputError, match=f"{path}:5: has no field 'chosen'"):
        everything(path, encoding)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", b"[" + LINE + b",\n" + LINE + b"]", "a JSON array, .*jq -c '.\\[\\]'"),
        ("a.json", b"\n[\n  " + LINE + b"\n]", "a JSON array"),
        ("a.jsonl", b"\xef\xbb\xbf [" + LINE + b"]", "a JSON array"),
        ("a.json", b'{\n  "prompt": "Q"\n}', "JSON over several lines"),
        ("a.csv", b"prompt,chosen,rejected\nQ,a,b\n", "a table; pandas.read_csv"),
        ("a.tsv", b"prompt\tchosen\n", "a table"),
        ("a.jsonl", b"PAR1\0\0", "a parquet file; name it .parquet"),
        ("a.jsonl", gzip.compress(LINE, mtime=0), "a gzip file; name it .jsonl.gz"),
        ("a.jsonl", LINE.decode().encode("utf-16"), "UTF-16"),
        ("a.jsonl", b"PK\x03\x04abc", "a zip file"),
        ("a.arrow", b"\xff\xff\xff\xff\x10", "an Arrow file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdabc", "a zstandard file"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"\n \n\0\0\n", "holds no rows"),
        ("a.jsonl", b"\xef\xbb\xbf", "holds no rows"),
        ("a.jsonl.gz", gzip.compress(b"\n", mtime=0), "holds no rows"),
    ],
)
def test_files_of_other_kinds_are_named(name, content, says, encoding, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"^{path}: {says}") as caught:
        everything(path, encoding)
    assert "\n" not in str(caught.value)


def test_what_is_nested_too_deep_is_a_bad_row(encoding, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE + b'\n{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}\n")
    with pytest.raises(InputError, match=f"{path}:2: not a row \\(nested more than 100 deep"):
        everything(path, encoding)
