"""A plan of quick commands with the manners of the real ones: a training script that resumes, and a
module that writes a file with its record. And processes that can be killed."""

import json
import multiprocessing
import os
import sys
import threading
import time

from tqdm import tqdm

from nanoroads.report.phases import Phase, run_phases
from nanoroads.run.flags import run_script

# Counts to eight in OUT/count, TINY_PAUSE seconds each, then writes the text and what it read as its weights.
SCRIPT = """
import os, sys, time
from pathlib import Path
out, text, *reads = sys.argv[sys.argv.index("--out") + 1 :]
out, reads = Path(out), [Path(path) for path in reads if path != "--resume"]
out.mkdir(parents=True, exist_ok=True)
def write(name, content):
    (out / "half").write_text(content)
    os.replace(out / "half", out / name)
if (out / "model.safetensors").exists():
    sys.exit(print("is finished"))
if text == "fail":
    os.write(1, b"last words \\xff\\n")
    sys.exit(2)
if text.startswith("kill"):
    os.kill(os.getpid(), int(text[4:]))
pause = float(os.environ.get("TINY_PAUSE", 0))
count = int((out / "count").read_text()) if (out / "count").exists() else 0
for step in range(count, 8):
    time.sleep(pause)
    write("count", str(step + 1))
write("config.json", "{}")
write("model.safetensors", text + "".join(path.read_text() for path in reads))
"""
# Writes the text and what it read into a file; refuses one that is there.
MODULE = """
import hashlib, json, os, sys, time
from pathlib import Path
out, text, *reads = sys.argv[sys.argv.index("--out") + 1 :]
out = Path(out)
if out.exists():
    sys.exit(f"{out} exists")
time.sleep(float(os.environ.get("TINY_PAUSE", 0)))
content = text + "".join(Path(path).read_text() for path in reads)
contents = {out.name: hashlib.sha256(content.encode()).hexdigest()}
record = {"made_from": {}, "contents": contents, "seconds": time.time()}
for path, value in ((Path(f"{out}.made_from.json"), json.dumps(record)), (out, content)):
    Path(f"{path}.half").write_text(value)
    os.replace(f"{path}.half", path)
"""


def tiny_plan(folder, **texts):
    """sft -> sft/pairs -> dpo, and other, which needs sft alone. texts: other texts than their names."""
    scripts = folder.parent / "scripts"
    scripts.mkdir(exist_ok=True)
    (scripts / "train.py").write_text(SCRIPT)
    (scripts / "draw.py").write_text(MODULE)
    train = str(scripts / "train.py")

    def phase(name, program, needs, reads):
        paths = [str(folder / path) for path in reads]
        command = [*program, "--out", str(folder / name), texts.get(name, name), *paths]
        return Phase(f"{folder}/{name}", [f"{folder}/{need}" for need in needs], command)

    return [
        phase("sft", [train], [], []),
        phase("pairs", ["-m", "draw"], ["sft"], ["sft/model.safetensors"]),
        phase("dpo", [train], ["pairs"], ["sft/model.safetensors", "pairs"]),
        phase("other", [train], ["sft"], ["sft/model.safetensors"]),
    ]


def results(folder):
    """{name: content} of the weights and pairs of a tiny plan."""
    paths = [folder / name / "model.safetensors" for name in ("sft", "dpo", "other")]
    return {str(path.relative_to(folder)): path.read_text() for path in [*paths, folder / "pairs"]}


def seconds(folder):
    """{name: seconds} of the ledger."""
    entries = json.loads((folder / "phases.json").read_text())
    return {name: entry["seconds"] for name, entry in entries.items()}


class Process:
    """A function under run_script in a process of its own, what it prints in a file."""

    def __init__(self, function, *arguments, log):
        self.log = log
        self.process = multiprocessing.get_context("fork").Process(
            target=in_child, args=(function, arguments, log), daemon=True
        )
        self.process.start()

    def kill(self, number):
        os.kill(self.process.pid, number)

    def wait(self):
        """Its exit code, -N where signal N has killed it, and what it printed."""
        self.process.join(60)
        assert not self.process.is_alive()
        return self.process.exitcode, self.log.read_text()


def in_child(function, arguments, log):
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    # tqdm's lock is one for all forks: a process that is killed while it prints would stop all others.
    tqdm.set_lock(threading.RLock())
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    run_script(lambda: function(*arguments), resumes=False)


def start_plan(folder, log, jobs=2):
    return Process(run_phases, tiny_plan(folder), folder, jobs, log=log)


def wait_for(condition, seconds=20):
    """Until the condition holds."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.01)
