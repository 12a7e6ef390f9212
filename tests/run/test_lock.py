"""One process writes to a folder at a time, and what must end with a process does."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import argv, run, write_jsonl
from test_identity import interrupted

import train_dpo
import train_sft
from nanoroads.errors import InputError
from nanoroads.run import commands, lock, signals
from nanoroads.run.commands import child_environment, command_line
from nanoroads.run.flags import run_script
from nanoroads.weights.files import read_safetensors, write_safetensors

if sys.platform == "win32":
    pytest.skip("needs fork and flock", allow_module_level=True)

pytestmark = pytest.mark.alone  # processes that get a signal after so many seconds


@pytest.fixture
def in_a_child():
    """in_a_child(work): run it in a forked process up to its first `yield`, and keep that process there."""
    children = []

    def start(work):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            steps = work()
            kept = next(steps)  # noqa: F841, a lock that would end if nothing referred to it
            os.write(write, b"x")
            time.sleep(60)
            os._exit(1)
        assert os.read(read, 1) == b"x"
        children.append(child)
        return child

    yield start
    for child in children:
        end(child)


def end(child):
    """Kill a forked process, if it is still there."""
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


# ---------------------------------------------------------------- the lock


def test_a_lock_is_of_one_process_and_ends_with_it(in_a_child, tmp_path):
    path = tmp_path / "lock"

    def hold():
        yield lock.acquire(path, "busy")

    child = in_a_child(hold)
    with pytest.raises(InputError, match=f"busy \\(process {child} on "):
        lock.acquire(path, "busy")
    assert path.read_text().startswith(f"process {child} on ")  # and is not overwritten by who asks
    end(child)
    ours = lock.acquire(path, "busy")
    assert path.read_text().startswith(f"process {os.getpid()} on ")
    assert lock.acquire(path, "busy") is ours  # this very process may ask again
    ours.release()
    assert not path.exists()


def test_a_lock_ends_when_nothing_refers_to_it(tmp_path):
    path = tmp_path / "lock"
    lock.acquire(path, "busy")
    assert not path.exists()


def test_who_waits_gets_the_lock_in_the_end(in_a_child, tmp_path, capsys):
    path = tmp_path / "lock"

    def hold():
        yield lock.acquire(path, "busy")

    child = in_a_child(hold)
    threading.Timer(0.2, os.kill, (child, signal.SIGKILL)).start()
    ours = lock.acquire(path, "waiting", wait=True)
    assert ours.release.alive and f"waiting (process {child}" in capsys.readouterr().out


@pytest.mark.parametrize("system", ["has no locks", "has them, but not for these files"])
def test_without_locks_nothing_is_locked(system, tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(37, "No locks available")

    if system == "has no locks":
        monkeypatch.setattr(lock, "fcntl", None)
    else:
        monkeypatch.setattr(lock.fcntl, "flock", refuse)
    assert lock.acquire(tmp_path / "lock", "busy").release.alive


# ---------------------------------------------------------------- runs


def test_a_folder_is_written_by_one_run(in_a_child, sft, tmp_path, refuses, monkeypatch):
    """--resume is refused while another process trains, and goes on when that has been killed."""
    flags = {"init": sft, "steps": 12}
    out = interrupted(train_dpo, tmp_path / "out", monkeypatch, **flags)

    def hold():
        yield lock.acquire(out / ".nanoroads-lock", "busy")

    child = in_a_child(hold)
    before = (out / "metrics.jsonl").read_bytes()
    error = refuses(train_dpo, out, "another process is writing to it", out=out, resume=True, **flags)
    assert f"process {child} on" in error and "--out" in error
    assert (out / "metrics.jsonl").read_bytes() == before
    end(child)
    run(train_dpo, out, resume=True, **flags)


def test_an_export_folder_is_written_by_one_run(in_a_child, sft, tmp_path, refuses):
    folder = tmp_path / "hf"
    folder.mkdir()

    def hold():
        yield lock.acquire(folder / ".nanoroads-lock", "busy")

    in_a_child(hold)
    flags = {"init": sft, "steps": 1, "out": tmp_path / "out", "export_hf": folder}
    refuses(train_dpo, "--export-hf", folder, "another process", **flags)


def test_what_two_scripts_miss_is_made_once(in_a_child, tmp_path, monkeypatch, capsys):
    """The second waits for the first, and finds it made."""
    path = tmp_path / "it"

    def make():
        def slowly(command, making):
            time.sleep(0.4)
            path.touch()
            return 0

        commands.run_command = slowly
        held = lock.acquire(Path(f"{path}.lock"), "busy")
        thread = threading.Thread(target=commands.make_if_missing, args=(path, ["train_sft.py"]))
        thread.start()
        yield held

    def never(command, making):
        raise AssertionError("it is being made already")

    child = in_a_child(make)
    monkeypatch.setattr(commands, "run_command", never)
    commands.make_if_missing(path, ["train_sft.py"])
    assert f"waiting for that (process {child}" in capsys.readouterr().out and path.exists()


# ---------------------------------------------------------------- signals


def running(command_words):
    """Whether a process whose command line holds these words is there."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode(errors="replace")
            if command_words in words and "Z" not in (process / "stat").read_text().rsplit(")", 1)[1][:3]:
                return True
        except OSError:  # it has just ended
            continue
    return False


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_script_that_is_stopped_ends_what_it_started(number, tmp_path):
    """train_dpo.py misses its reference and starts train_sft.py; neither is there afterwards."""
    init = tmp_path / "sft"
    words = ["train_dpo.py", *argv(train_dpo, out=tmp_path / "dpo", init=init)]
    parent = subprocess.Popen(
        command_line(words), env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for((init / ".nanoroads-lock").exists)  # the child has begun
    assert running(f"train_sft.py\0--data\0roadmap\0--out\0{init}")
    parent.send_signal(number)
    error = parent.communicate()[1].decode()
    assert parent.returncode == 128 + number and "Traceback" not in error
    wait_for(lambda: not running(str(init)), seconds=15)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_no_error_of_what_it_interrupts(number, tmp_path, capfd):
    """torch makes a ValueError of an exception that comes while safetensors loads a tensor; anything may."""

    def main():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        except BaseException:
            raise ValueError("could not determine the shape of object type 'UntypedStorage'") from None

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    error = capfd.readouterr().err
    assert stopped.value.code == 128 + number and error.startswith("\nstopped; ")


def test_signals_do_not_break_a_file_that_is_read(tmp_path):
    """The real thing: a signal at any moment of reading a checkpoint stops the program, and is no error."""
    path = tmp_path / "file"
    write_safetensors(path, {f"tensor {i}": torch.zeros(3) for i in range(40)})
    rng = random.Random(0)
    for _ in range(40):
        with pytest.raises(signals.Stopped), signals.stopping():
            threading.Timer(0.01 * rng.random(), os.kill, (os.getpid(), signal.SIGTERM)).start()
            while True:
                read_safetensors(path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_inspect_leaves_nothing_behind(number, tmp_path):
    rows = [{"prompt": "WA>FL:", "response": ">OR" * 20}] * 200_000
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    words = ["train_sft.py", "--inspect", "--block-size", "128", "--data", str(data)]
    environment = {**child_environment(), "TMPDIR": str(temporary)}
    child = subprocess.Popen(command_line(words), env=environment, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(temporary.iterdir()))
    child.send_signal(number)
    assert child.wait() == 128 + number
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_process_that_trains_locks_and_a_killed_one_does_not(sft, tmp_path, refuses, monkeypatch):
    """The real thing, with SIGKILL."""
    out = tmp_path / "out"
    flags = {"data": sft / "demos.jsonl", "steps": 100_000, "out": out, "resume": True}
    child = subprocess.Popen(
        command_line(["train_sft.py", *argv(train_sft, **flags)]), env=child_environment()
    )
    wait_for((out / "resume.safetensors").exists)
    with pytest.raises(InputError, match=f"process {child.pid} on"):
        train_sft.main(argv(train_sft, **flags))
    child.kill()
    child.wait()
    flags.pop("out")
    interrupted(train_sft, out, monkeypatch, **flags)
