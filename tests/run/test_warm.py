"""Children of the warm process: what `python COMMAND` would do, they do; and they are ended, or go on, as
other children."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_plan import results, start_plan, tiny_plan, wait_for

from nanoroads.errors import InputError
from nanoroads.report import phases
from nanoroads.report.phases import Phase, Starter, lock_folder, run_phases
from nanoroads.run.commands import ROOT, command_line
from nanoroads.run.warm import Warm
from nanoroads.weights.files import write_json

if sys.platform != "linux":
    pytest.skip("a warm process is used on Linux alone", allow_module_level=True)

# What a program can know of how it was started.
LOOK = """
import json, os, signal, sys
import torch._dynamo
facts = {"argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path}
facts["environment"] = {name: value for name, value in os.environ.items() if "OPENBLAS" not in name}
facts["directory"] = os.getcwd()
facts["stdin"] = os.readlink("/proc/self/fd/0")
facts["files"] = [os.readlink(f"/proc/self/fd/{number}") for number in (1, 2)]
facts["blocked"] = list(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))
facts["interrupt"] = str(signal.getsignal(signal.SIGINT))
facts["terminal"] = [sys.stdout.line_buffering, sys.stdout.encoding, sys.stdout.errors]
facts["tasks"] = [len(os.listdir("/proc/self/task"))]
torch.ones(2000, 2000).exp_()
facts["tasks"].append(len(os.listdir("/proc/self/task")))
facts["threads"] = torch.get_num_threads()
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One thread, which is not what torch would have on most machines, whatever a sitecustomize.py says."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text("")
    path = os.pathsep.join([str(ROOT), str(folder)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def warm(environment):
    process = Warm(environment)
    assert process.can_fork()
    yield process
    process.close()


def start(warm, folder, text, *words):
    """Start a program -> the child, and the path of what it prints."""
    (folder / "program.py").write_text(text)
    log = folder / "printed"
    with open(os.devnull) as stdin, open(log, "w") as file:
        return warm.start([str(folder / "program.py"), *words], stdin, file), log


def run(warm, folder, text, *words):
    child, log = start(warm, folder, text, *words)
    return child.wait(120), log.read_text()


# ---------------------------------------------------------------- one command


def test_it_is_started_as_python_starts_it(warm, environment, tmp_path):
    ours = json.loads(run(warm, tmp_path, LOOK, "--seed", "3")[1])
    words = [sys.executable, str(tmp_path / "program.py"), "--seed", "3"]
    with open(tmp_path / "printed", "w") as log, open(os.devnull) as stdin:
        subprocess.run(words, env=environment, stdin=stdin, stdout=log, stderr=log, check=True)
    assert ours == json.loads((tmp_path / "printed").read_text())
    assert ours["threads"] == 1 and ours["tasks"] == [1, 1] and not ours["blocked"]


@pytest.mark.parametrize(
    "text, code, last_line",
    [
        ("print('done')", 0, "done"),
        ("import sys; sys.exit(3)", 3, None),
        ("import sys; sys.exit('words')", 1, "words"),
        ("import sys; sys.exit()", 0, None),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt"),
        ("import atexit; atexit.register(print, 'bye'); print('end')", 0, "bye"),
        ("import os; os.kill(os.getpid(), 9)", -9, None),
        ("import os, time; os.kill(os.getpid(), 15); time.sleep(9)", -15, None),
    ],
)
def test_its_end(text, code, last_line, warm, tmp_path):
    lines = [None]
    ours, printed = run(warm, tmp_path, text)
    lines += printed.splitlines()
    assert (ours, lines[-1]) == (code, last_line)


def test_a_module(warm, tmp_path):
    with open(tmp_path / "printed", "w") as log, open(os.devnull) as stdin:
        child = warm.start(["-m", "nanoroads.world.pairs", "--policy", "nowhere"], stdin, log)
    printed = (tmp_path / "printed").read_text() if child.wait(30) == 2 else "no error"
    assert printed.startswith("error: pairs.py: ") and printed.count("\n") == 1


def test_it_is_ended_by_what_the_job_sends(warm, tmp_path):
    text = "from nanoroads.run.flags import run_script\nimport time\n"
    text += "def main():\n    print('here', flush=True)\n    time.sleep(60)\nrun_script(main)\n"
    child, log = start(warm, tmp_path, text)
    wait_for(lambda: "here" in log.read_text())
    assert child.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0)
    child.terminate()
    assert child.wait(30) == 143 and "stopped" in log.read_text()
    child.kill()  # nobody is there
    child, log = start(warm, tmp_path, "import time; time.sleep(60)")
    child.kill()
    assert child.wait(30) == -9


def test_the_warm_process_is_lost(environment, tmp_path):
    other = Warm(environment)
    assert other.can_fork()
    child, log = start(other, tmp_path, "import time; time.sleep(0.2)")
    other.process.kill()
    other.process.wait()
    assert child.wait(30) == -9
    with pytest.raises(InputError, match="was killed"):
        start(other, tmp_path, "")
    other.close()


# ---------------------------------------------------------------- a job


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "scripts"))
    monkeypatch.setattr(phases, "POLL", 0.005)
    monkeypatch.setattr(phases, "is_own", lambda command: True)
    return tmp_path / "out"


def children_of(pid):
    """The numbers of a process's children."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return list(map(int, text.split()))


def test_ctrl_c_ends_all_of_a_job(folder, monkeypatch, tmp_path, capfd):
    """A terminal sends it to all processes of the job at once; the warm one outlives the others."""
    monkeypatch.setenv("TINY_PAUSE", "5")
    job = start_plan(folder, tmp_path / "printed")
    wait_for(lambda: (folder / "sft").exists(), 120)  # it imports torch first
    warm_pid = children_of(job.process.pid)[0]
    os.kill(warm_pid, signal.SIGINT)
    for child in children_of(warm_pid):
        os.kill(child, signal.SIGINT)
    job.kill(signal.SIGINT)
    code, printed = job.wait()
    assert code == 130 and printed.splitlines()[-1] == "stopped" and "Traceback" not in printed
    lock_folder(folder).release()
    assert "waiting" not in capfd.readouterr().out  # nobody holds it
    assert not Path(f"/proc/{warm_pid}").exists()


def test_children_of_a_job_that_was_killed_hold_its_lock(folder, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("TINY_PAUSE", "0.5")
    job = start_plan(folder, tmp_path / "printed")
    wait_for(lambda: (folder / "sft/count").exists(), 120)
    warm_pid = children_of(job.process.pid)[0]
    job.kill(signal.SIGKILL)
    job.wait()
    wait_for(lambda: not Path(f"/proc/{warm_pid}").exists() or "Z" in state(warm_pid))
    lock_folder(folder).release()
    assert "waiting for the phases that another run" in capfd.readouterr().out
    assert (folder / "sft/model.safetensors").exists()  # it went on to its end
    monkeypatch.setattr(phases, "is_own", lambda command: False)
    monkeypatch.setenv("TINY_PAUSE", "0")
    run_phases(tiny_plan(folder), folder, 2)
    assert len(results(folder)) == 4


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_a_phase_that_is_killed_is_not_said_to_have_failed(folder):
    with pytest.raises(InputError, match="dpo was killed, perhaps because memory ran out; start again"):
        run_phases(tiny_plan(folder, dpo="kill9"), folder, 2)


def test_a_job_goes_the_long_way_where_no_child_can_be_forked(folder, monkeypatch):
    monkeypatch.setattr(Warm, "can_fork", lambda self: False)
    run_phases(tiny_plan(folder), folder, 2)
    assert len(results(folder)) == 4


def test_only_own_commands_are_forked(monkeypatch):
    started = []
    monkeypatch.setattr(phases, "Warm", lambda environment: started.append(environment))
    starter = Starter(2)
    starter.prepare(Phase("a", [], ["-m", "mark"]))
    starter.prepare(Phase("a", [], ["/elsewhere/train_sft.py"]))
    assert not started
    monkeypatch.setattr(phases.sys, "platform", "darwin")
    Starter(2).prepare(Phase("a", [], ["train_sft.py"]))
    assert not started


def test_the_weights_are_those_of_the_command_typed_by_hand(tmp_path):
    flags = ["--rows", "300", "--steps", "4", "--batch-size", "8", "--log-every", "1"]
    command = ["train_sft.py", *flags, "--out", str(tmp_path / "warm")]
    write_json(tmp_path / "phases.json", {})
    starter = Starter(os.cpu_count())
    run_phases([Phase("warm", [], command)], tmp_path, os.cpu_count())
    typed = command_line(["train_sft.py", *flags, "--out", str(tmp_path / "typed")])
    printed = subprocess.run(
        typed,
        env=starter.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    log = (tmp_path / "logs/warm.txt").read_text()
    assert lines(log) == lines(printed.stdout.replace("typed", "warm"))
    for name in ("model.safetensors", "metrics.jsonl", "demos.jsonl"):
        assert (tmp_path / "warm" / name).read_bytes() == (tmp_path / "typed" / name).read_bytes()


def lines(log):
    """What was printed, without the seconds of the progress."""
    return [line for line in log.splitlines() if " so far" not in line and " left" not in line]
