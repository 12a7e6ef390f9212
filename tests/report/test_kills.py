"""all_roads.py's scheduler is killed: its commands end with it, and the next start ends with the same
results. Commands that fail say so in one line."""

import random
import signal
import time
from pathlib import Path

import pytest
from helpers.tiny_plan import Process, results, seconds, start_plan, tiny_plan, wait_for

from nanoroads.errors import InputError
from nanoroads.report import phases
from nanoroads.report.phases import claim_folder, lock_folder, run_phases
from nanoroads.run import made_from
from nanoroads.run.commands import how_it_failed

if not Path("/proc/self/cmdline").exists():
    pytest.skip("this system does not list its processes in /proc", allow_module_level=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "scripts"))
    monkeypatch.setattr(phases, "POLL", 0.005)
    return tmp_path / "out"


def processes_with(word):
    """The command lines of running processes that hold a word."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if word in line:  # a zombie has no command line
            found.append(line)
    return found


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_its_commands_end_with_it(number, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TINY_PAUSE", "5")
    process = start_plan(folder, tmp_path / "printed")
    wait_for(lambda: processes_with(f"--out {folder}/sft"))
    process.kill(number)
    code, printed = process.wait()
    assert code == 128 + number
    assert printed.splitlines()[-1] == "stopped" and "Traceback" not in printed
    assert not processes_with(str(folder))
    monkeypatch.setenv("TINY_PAUSE", "0")
    run_phases(tiny_plan(folder), folder, 2)


def test_a_signal_that_is_ignored_stays_so(folder, monkeypatch, tmp_path):
    """nohup ignores SIGHUP for all that it starts."""
    monkeypatch.setenv("TINY_PAUSE", "0.05")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start_plan(folder, tmp_path / "printed")
        wait_for(lambda: processes_with(f"--out {folder}/sft"))
        process.kill(signal.SIGHUP)
        assert process.wait()[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def kill_at_random(folder, log, moments, rounds):
    """Start and kill the plan `rounds` times, then let it end. Returns all that was printed."""
    printed = []
    for _ in range(rounds):
        process = start_plan(folder, log)
        process.process.join(moments.uniform(0, 0.6))
        if process.process.is_alive():
            process.kill(moments.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        printed.append(process.wait()[1])
    code, last = start_plan(folder, log).wait()
    assert code == 0, last
    return "".join([*printed, last])


@pytest.mark.parametrize("seed", [0, *[pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 13)]])
def test_random_kills_change_nothing(seed, folder, monkeypatch, tmp_path):
    run_phases(tiny_plan(tmp_path / "whole"), tmp_path / "whole", 2)
    monkeypatch.setenv("TINY_PAUSE", "0.03")
    printed = kill_at_random(folder, tmp_path / "printed", random.Random(seed), 4 if seed == 0 else 12)
    assert "Traceback" not in printed and "error:" not in printed
    assert results(folder) == results(tmp_path / "whole")
    assert len(seconds(folder)) == 4 and not processes_with(str(folder))


# ---------------------------------------------------------------- two at a time


def test_a_second_start_waits_for_the_first(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TINY_PAUSE", "0.05")
    first = start_plan(folder, tmp_path / "first")
    wait_for(lambda: processes_with(f"--out {folder}/sft"))
    second = start_plan(folder, tmp_path / "second")
    assert first.wait()[0] == 0
    code, printed = second.wait()
    waiting = f"{folder}: waiting for the phases that another run of it has started (process "
    assert code == 0 and printed.startswith(waiting) and len(printed.splitlines()) == 1


def claim_and_run(folder, sign):
    lock = claim_folder(folder)
    run_phases(tiny_plan(folder), folder, 2, lock)
    sign.touch()
    time.sleep(0.5)
    sign.unlink()
    lock.release()


def test_the_caller_may_keep_the_lock(folder, tmp_path):
    """all_roads.py measures and reports under the lock too."""
    sign = tmp_path / "sign"
    first = Process(claim_and_run, folder, sign, log=tmp_path / "first")
    wait_for(sign.exists)
    lock_folder(folder).release()
    assert not sign.exists() and first.wait()[0] == 0


# ---------------------------------------------------------------- commands that fail


def test_the_last_words_of_a_command_that_fails(folder):
    with pytest.raises(InputError, match=f"{folder}/dpo failed: last words \ufffd .*logs/dpo.txt"):
        run_phases(tiny_plan(folder, dpo="fail"), folder, 1)


def test_a_command_that_is_killed_is_not_said_to_have_failed(folder):
    with pytest.raises(InputError, match="dpo was killed, perhaps because memory ran out; start again"):
        run_phases(tiny_plan(folder, dpo="kill9"), folder, 1)
    with pytest.raises(InputError, match=r"other was killed by signal 11 \(Segmentation fault\)"):
        run_phases(tiny_plan(folder, other="kill11"), folder, 1)
    assert how_it_failed(143) == "was stopped; start again, it goes on"


def test_a_file_in_the_place_of_a_run_stays(folder):
    folder.mkdir()
    (folder / "other").write_text("mine")
    with pytest.raises(InputError, match="other failed: FileExistsError"):
        run_phases(tiny_plan(folder), folder, 100)
    assert (folder / "other").read_text() == "mine"


def test_a_command_that_makes_nothing(folder):
    plan = tiny_plan(folder)
    (folder.parent / "scripts/train.py").write_text("")
    with pytest.raises(InputError, match="sft: its command has ended without a result"):
        run_phases(plan, folder, 2)


def test_a_full_disk_ends_the_commands(folder, monkeypatch):
    """It shows when the first phase is entered into the ledger, while another runs."""
    plan = tiny_plan(folder)
    run_phases(plan[:1], folder, 1)
    monkeypatch.setenv("TINY_PAUSE", "0.5")
    monkeypatch.setattr(phases.Ledger, "finish", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run_phases(plan, folder, 2)
    assert not processes_with(str(folder))


def full_disk(*arguments):
    raise OSError(28, "No space left on device")


def test_what_a_start_that_was_killed_at_once_leaves_is_ours(tmp_path):
    (tmp_path / "out/.nanoroads-half-written-abc").mkdir(parents=True)
    claim_folder(tmp_path / "out")


def test_a_clock_that_is_set_back_gives_no_negative_seconds(tmp_path, monkeypatch):
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    made_from.make_or_keep(tmp_path / "file.json", {}, lambda: {"file.json": b"{}"})
    assert made_from.make_or_keep(tmp_path / "file.json", {}, lambda: 1 / 0) >= 0
