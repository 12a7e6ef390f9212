"""Folders that no run may have, and disks that are full: one line that names the folder or the file."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.refusals import files
from helpers.runs import run, weights

import sample
import train_dpo
import train_rlhf
import train_sft
from nanoroads.errors import InputError
from nanoroads.run import folder
from nanoroads.run.commands import child_environment
from nanoroads.weights import files as weight_files
from nanoroads.weights.files import append_line, write_json, write_safetensors, write_text
from nanoroads.world import pairs

resource = pytest.importorskip("resource")  # not on Windows

# ---------------------------------------------------------------- --out


@pytest.mark.parametrize(
    "script, flag",
    [(train_sft, "out"), (train_sft, "data"), (train_sft, "init"), (train_sft, "tokenizer"),
     (train_dpo, "init"), (train_dpo, "eval_data"), (train_rlhf, "start"), (train_rlhf, "compare"),
     (train_rlhf, "reward"), (train_sft, "export_hf"), (sample, "model"), (sample, "prompts"),
     (pairs, "out"), (pairs, "policy")],
)  # fmt: skip
def test_an_empty_path_is_not_the_working_directory(script, flag, refuses, tmp_path, monkeypatch):
    """As an unset variable of a shell leaves it."""
    monkeypatch.chdir(tmp_path)
    words = [f"--{flag.replace('_', '-')}", "is empty"]
    refuses(script, *words, **{flag: ""})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/", "home", "home by a link"])
def test_places_that_are_no_run(place, refuses, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "link").symlink_to(home)
    out = {"/": "/", "home": home, "home by a link": tmp_path / "link"}[place]
    refuses(train_sft, f"--out {out}", "no place for a run", out=out, steps=1)
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("flag", ["out", "export_hf"])
def test_a_name_that_is_no_utf_8(flag, refuses, sft, tmp_path):
    """safetensors opens no such file: that is said before anything is written."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff")
    flags = {"init": sft, "out": tmp_path / "out", flag: odd}
    refuses(train_dpo, "odd\\udcff", "is not a name in UTF-8", **flags)
    assert not os.path.exists(odd)


@pytest.mark.parametrize("target", ["nowhere", "link"])
def test_a_link_to_nothing(target, refuses, sft, tmp_path):
    """Or to itself."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    refuses(train_dpo, f"--out {link}", "a link to a folder that is not there", out=link, init=sft)
    flags = {"out": tmp_path / "out", "init": sft, "export_hf": link}
    refuses(train_dpo, f"--export-hf {link}", "a link to a folder that is not there", **flags)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors", "resume.safetensors"])
def test_files_without_a_config_are_somebody_elses(name, refuses, sft, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    for resume in (False, True):
        refuses(train_dpo, out, name, "config.json", "--out", out=out, init=sft, resume=resume)


def test_a_users_files_stay_beside_a_run(sft, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("thesis.tmp", ".tmpABCDEF", "model.safetensors.1.tmp", "lock", "finished.json"):
        (out / name).write_text("mine")
    (out / "folder.tmp").mkdir()
    before = files(out)
    run(train_dpo, out, init=sft, steps=1)
    after = files(out)
    assert {path: after[path] for path in before} == before and (out / "folder.tmp").is_dir()


def test_a_finished_run_may_lie_where_nobody_can_write(sft, dpo, refuses, tmp_path, monkeypatch, capfd):
    def refuse(path, message):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folder, "acquire", refuse)
    run(train_dpo, dpo, init=sft, steps=30, resume=True)
    assert f"{dpo} is finished" in capfd.readouterr().out
    refuses(train_dpo, "Permission denied", tmp_path / "new", init=sft, out=tmp_path / "new")


# ---------------------------------------------------------------- full disks


@contextmanager
def largest_file(size):
    """No file of this process may grow beyond `size` bytes: as on a full disk, writing fails half-way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "script, flags, size, name",
    [
        (train_sft, {"rows": 2000, "data": "roadmap"}, 9000, "demos.jsonl"),
        (train_dpo, {}, 500, "ref_logp.safetensors"),
        (train_dpo, {"loss": "simpo", "steps": 40}, 2800, "resume.safetensors"),
        (train_rlhf, {"reward": "helpers.runs:brevity"}, 1000, "config.json"),
        (train_rlhf, {"reward": "helpers.runs:brevity", "save_every": 1000, "steps": 40}, 5000, "metrics"),
    ],
)
def test_a_full_disk_is_told_with_the_file(script, flags, size, name, sft, refuses, tmp_path):
    out = tmp_path / "out"
    if script is not train_sft:
        flags = {"init": sft, **flags}
    with largest_file(size):
        error = refuses(script, name, out=out, **flags)
    assert str(out) in error and "File too large" in error
    assert not [path for path in out.iterdir() if "half-written" in path.name]


def test_a_run_goes_on_when_there_is_room_again(sft, refuses, tmp_path):
    flags = {"init": sft, "reward": "helpers.runs:brevity", "steps": 10, "save_every": 1}
    whole = run(train_rlhf, tmp_path / "whole", **flags)
    size = (whole / "model.safetensors").stat().st_size
    out = tmp_path / "out"
    with largest_file(size):
        refuses(train_rlhf, "resume.safetensors", out=out, **flags)
    run(train_rlhf, out, resume=True, **flags)
    assert weights(out) == weights(whole)


@pytest.mark.parametrize("write", [write_text, write_json, append_line])
def test_every_way_to_write_names_the_file(write, tmp_path):
    path = tmp_path / "file"
    with largest_file(10), pytest.raises(OSError) as error:
        write(path, "x" * 10_000)
    assert error.value.filename == str(path) and str(path) in str(error.value)


def test_a_device_that_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "open_own", open)
    with pytest.raises(OSError, match="No space left on device: .*full"):
        append_line("/dev/full", "x")
    with pytest.raises(OSError, match="nowhere"):
        write_safetensors(tmp_path / "nowhere/file", {})


@pytest.mark.slow
@pytest.mark.parametrize("size", [50_000, 200_000])
def test_a_trace_that_is_cut_off_is_no_trace(size, sft, tmp_path):
    """torch says nothing when the disk is full."""
    flags = {"init": sft, "out": tmp_path / "out", "profile": True, "save_every": 1000}
    with largest_file(size), pytest.raises(InputError, match="out/trace.json: could not be written to its"):
        run(train_dpo, **flags)
    assert not (tmp_path / "out/trace.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_is_full():
    code = "from nanoroads.run.flags import run_script; run_script(lambda: print('x'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], env=child_environment(), stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr.decode() == "error: standard output: No space left on device\n"
