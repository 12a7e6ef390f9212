"""Ctrl-C, SIGTERM and SIGHUP end a script with one line, and its commands with it."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny_plan import Process, wait_for

from nanoroads.run import signals
from nanoroads.run.commands import make_if_missing
from nanoroads.run.flags import run_script

# A command that runs a command, as train_dpo.py does where its reference is missing: the inner one writes
# its process's number, and waits.
INNER = "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(60)\n"
OUTER = """import sys
from nanoroads.run.commands import make_if_missing
from nanoroads.run.flags import run_script
run_script(lambda: make_if_missing(sys.argv[2] + ".made", sys.argv[1:]), resumes=False)
"""


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def is_running(pid):
    """Whether a process is there, and more than an entry that nobody has waited for."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, *map(slow, (signal.SIGHUP, signal.SIGINT))])
def test_a_command_and_its_own_command_end_with_the_script(number, tmp_path):
    (tmp_path / "inner.py").write_text(INNER)
    (tmp_path / "outer.py").write_text(OUTER)
    command = [str(tmp_path / name) for name in ("outer.py", "inner.py", "pid")]
    process = Process(make_if_missing, tmp_path / "made", command, log=tmp_path / "printed")
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    process.kill(number)
    code, printed = process.wait()
    assert code == 128 + number and "Traceback" not in printed
    assert printed.splitlines().count("stopped") == 2  # the command's, and its own
    assert not is_running((tmp_path / "pid").read_text())


def send(number):
    os.kill(os.getpid(), number)
    time.sleep(5)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_script_says_how_to_go_on(number, code, capsys):
    before = [signal.getsignal(each) for each in (signal.SIGINT, *signals.ENDING)]
    cleaned = []

    def main():
        try:
            send(number)
        except Exception:  # nothing that looks for mistakes swallows it
            pytest.fail("it is no mistake")
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as stopped:
        run_script(main)
    assert stopped.value.code == code and cleaned
    printed = capsys.readouterr().err
    assert printed.startswith("\nstopped; ") and printed.endswith("--resume\n") and printed.count("\n") == 2
    assert [signal.getsignal(each) for each in (signal.SIGINT, *signals.ENDING)] == before


def test_a_signal_waits_for_the_end_of_what_must_not_be_interrupted():
    steps = []
    with pytest.raises(KeyboardInterrupt):
        with signals.uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            steps.append("done")
    assert steps == ["done"]


def test_a_child_that_does_not_end_is_killed(monkeypatch, tmp_path):
    monkeypatch.setattr(signals, "PATIENCE", 0.2)
    stubborn = "import signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    stubborn += "open(sys.argv[1], 'w').write('here')\ntime.sleep(60)\n"
    child = signals.subprocess.Popen([sys.executable, "-c", stubborn, str(tmp_path / "sign")])
    wait_for((tmp_path / "sign").exists)
    signals.end([child])
    assert child.returncode == -signal.SIGKILL
