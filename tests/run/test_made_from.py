"""A file that was made is used again only if it is what was made, from the same things; if it is not, it is
made again where it is ours, and refused by name where it may be somebody's work."""

import json
import os

import pytest

from nanoroads.errors import InputError
from nanoroads.run.made_from import make_or_keep, read_record, record_path, unchanged_record, write_made


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new/a.json"


class Maker:
    """Makes a.json and b.png, and counts how often."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {"a.json": b"a%d" % self.calls, "b.png": b"b%d" % self.calls}


def other_bytes(path):
    """Other contents of the same size and date."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns


def test_it_is_made_once_whatever_its_date(path):
    make = Maker()
    seconds = make_or_keep(path, {"from": 1, "pair": (1, 2)}, make)
    os.utime(path, (0, 0))
    assert make_or_keep(path, {"from": 1, "pair": [1, 2]}, make) == seconds
    os.utime(path, (4e9, 4e9))
    assert make_or_keep(path, {"from": 1, "pair": [1, 2]}, make) == seconds
    assert make.calls == 1 and path.read_text() == "a1" and path.with_name("b.png").read_text() == "b1"


def test_from_something_else_it_is_made_again(path):
    make = Maker()
    make_or_keep(path, {"from": 1}, make)
    make_or_keep(path, {"from": 2}, make)
    assert make.calls == 2 and path.read_text() == "a2" and read_record(path)["made_from"] == {"from": 2}


@pytest.mark.parametrize("name", ["a.json", "b.png"])
def test_what_is_missing_is_made_again_and_what_was_changed_is_refused(name, path):
    make = Maker()
    make_or_keep(path, {"from": 1}, make)
    path.with_name(name).unlink()
    make_or_keep(path, {"from": 1}, make)
    assert make.calls == 2
    other_bytes(path.with_name(name))
    for made_from in ({"from": 1}, {"from": 2}):
        with pytest.raises(InputError, match=f"{name}: has changed since it was made; delete it"):
            make_or_keep(path, made_from, make)
    assert make.calls == 2 and path.with_name(name).read_text() == f"{name[0]}?"


@pytest.mark.parametrize("name", ["a.json", "b.png"])
def test_a_file_without_a_record_is_refused(name, path):
    path.parent.mkdir()
    path.with_name(name).write_text("mine")
    with pytest.raises(InputError, match=f"{name}: "):
        make_or_keep(path, {}, Maker())
    assert [each.name for each in path.parent.iterdir()] == [name] and path.with_name(
        name
    ).read_text() == "mine"


@pytest.mark.parametrize("moment", range(5))
def test_killed_at_any_moment_it_is_made_again(moment, path, monkeypatch):
    """Before and after the record and either file, the first time and the second."""
    make = Maker()
    for made_from in ({"from": 1}, {"from": 2}):
        replaced = []

        def kill_at(source, target, replace=os.replace, replaced=replaced):
            if len(replaced) == moment:
                raise KeyboardInterrupt
            replace(source, target)
            replaced.append(target)

        monkeypatch.setattr(os, "replace", kill_at)
        try:
            make_or_keep(path, made_from, make)
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        make_or_keep(path, made_from, make)
        assert unchanged_record(path)["made_from"] == made_from
        assert path.read_text()[0] == "a" and path.with_name("b.png").read_text()[0] == "b"


def test_a_folder_in_its_place_is_refused(path):
    make_or_keep(path, {}, Maker())
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="a.json: has changed since it was made"):
        make_or_keep(path, {}, Maker())


GOOD = {"made_from": {}, "contents": {"a.json": "0"}, "seconds": 1}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"made_from": {}',
        json.dumps({**GOOD, "made_from": 1}),
        json.dumps({**GOOD, "contents": {"a.json": 1}}),
        json.dumps({**GOOD, "contents": {"../../a.json": "0"}}),
        json.dumps({**GOOD, "contents": {"..": "0"}}),
        json.dumps({**GOOD, "contents": {"": "0"}}),
        json.dumps({**GOOD, "contents": {"\0": "0"}}),
        json.dumps({**GOOD, "seconds": "1"}),
        "\udcff",
    ],
)
def test_a_damaged_record_is_one_line_that_says_what_to_do(text, path):
    path.parent.mkdir()
    path.write_text("a")
    record_path(path).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=f"^{record_path(path)}: .*delete it and {path}, and start again$"):
        make_or_keep(path, {}, Maker())
    assert path.read_text() == "a"


def test_write_made_never_overwrites(path):
    write_made(path, {"a.json": b"1"}, {}, 0)
    other_bytes(path)
    with pytest.raises(InputError, match="has changed"):
        write_made(path, {"a.json": b"2"}, {}, 0)
    assert path.read_bytes() == b"?"
