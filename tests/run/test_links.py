"""Links and a user's own files under the names that we write to: nothing outside of a folder changes."""

import os

import pytest
from helpers.runs import run

import train_dpo
from nanoroads.errors import InputError
from nanoroads.run import lock
from nanoroads.weights.files import append_line

MINE = "the work of months\n"


@pytest.fixture
def mine(tmp_path):
    """A user's file outside of the folder that is written to."""
    path = tmp_path / "mine.txt"
    path.write_text(MINE)
    return path


def test_a_lock_never_reaches_through_a_link(mine, tmp_path):
    link = tmp_path / "lock"
    link.symlink_to(mine)
    with pytest.raises(InputError, match=f"{link}: a link, where a file of ours is written; move it away"):
        lock.acquire(link, "busy")
    assert mine.read_text() == MINE and link.is_symlink()


@pytest.mark.parametrize("content", [MINE.encode(), b"\xff\0", b"proces"])
def test_a_file_that_is_no_lock_of_ours_stays(content, tmp_path):
    path = tmp_path / "pairs.jsonl.lock"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: is no lock of ours"):
        lock.acquire(path, "busy")
    assert path.read_bytes() == content


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a link to nothing"])
def test_a_lock_is_a_file(kind, tmp_path):
    path = tmp_path / "lock"
    if kind == "a folder":
        path.mkdir()
    if kind == "a pipe":
        os.mkfifo(path)
    if kind == "a link to nothing":
        path.symlink_to(tmp_path / "nothing")
    with pytest.raises(InputError, match=f"{path}: not a file"):
        lock.acquire(path, "busy")
    assert not (tmp_path / "nothing").exists()


def test_what_a_killed_process_left_is_a_lock_of_ours(tmp_path):
    path = tmp_path / "lock"
    for left in ("", "process 1 on a machine\n"):
        path.write_text(left)
        lock.acquire(path, "busy").release()
        assert not path.exists()


def test_a_folder_may_be_reached_by_a_link(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    ours = lock.acquire(tmp_path / "link/lock", "busy")
    assert lock.acquire(tmp_path / "folder/lock", "busy") is ours


def test_a_line_is_not_added_through_a_link(mine, tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(mine)
    with pytest.raises(InputError, match="metrics.jsonl: a link"):
        append_line(tmp_path / "metrics.jsonl", "{}")
    assert mine.read_text() == MINE


@pytest.mark.parametrize("finished", [False, True])
def test_a_run_whose_lock_is_a_link_is_refused(finished, mine, sft, refuses, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if finished:
        run(train_dpo, out, init=sft, steps=1)
    (out / ".nanoroads-lock").symlink_to(mine)
    refuses(train_dpo, f"{out}/.nanoroads-lock", "a link", out=out, init=sft, steps=1, resume=finished)
    assert mine.read_text() == MINE


def test_an_export_that_was_killed_while_it_wrote_is_written_again(sft, tmp_path):
    export = tmp_path / "export"
    flags = {"init": sft, "steps": 1, "export_hf": export}
    out = run(train_dpo, tmp_path / "out", **flags)
    (export / "config.json").unlink()
    half = export / ".nanoroads-half-written-1"
    half.mkdir()
    (half / "config.json").write_text("{")
    run(train_dpo, out, **flags, resume=True)
    assert (export / "config.json").exists() and not half.exists()
