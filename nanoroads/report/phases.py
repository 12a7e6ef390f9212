"""The scheduler: commands that need each other's results, several at a time, resumed after a kill.

OUT/phases.json is the ledger of what is finished, OUT/logs/ holds what each command printed, and
OUT/lock keeps two runs from writing to the same files.
"""

import os
import subprocess
import time
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

from nanoroads.errors import InputError
from nanoroads.progress import Progress, last_step
from nanoroads.run.commands import as_typed, child_environment, command_line
from nanoroads.weights.files import read_json_object, write_json

try:
    import fcntl
except ImportError:  # on Windows there is no such lock
    fcntl = None

POLL = 0.1  # seconds between two looks at the running commands


class Phase(NamedTuple):
    """One command and what it waits for."""

    name: str  # as the ledger has it
    needs: list[str]  # the names of the phases whose results the command reads
    command: list[str]  # ["train_sft.py", ...] or ["-m", MODULE, ...], --out PATH among its flags

    @property
    def result(self) -> Path:
        """The folder or file that the command makes."""
        return Path(self.command[self.command.index("--out") + 1])

    @property
    def resumes(self) -> bool:
        """Whether the command continues a killed run of its own: scripts do, modules start anew."""
        return self.command[0].endswith(".py")


class Job(NamedTuple):
    """A phase whose command is running."""

    phase: Phase
    child: subprocess.Popen
    begin: float  # time.time() of its start
    log: TextIO  # what the command prints


def new_phase(folder: Path, name: str, command: list, needs=()) -> Phase:
    """The phase that makes folder/name: `command` with `--out folder/name`.

    needs: names of other phases of the same folder."""
    result = f"{folder}/{name}"
    words = [str(word) for word in command]
    return Phase(result, [f"{folder}/{need}" for need in needs], words + ["--out", result])


def run_phases(phases: list[Phase], out: Path, jobs: int) -> dict[str, float]:
    """Run the commands, `jobs` at a time, each one when those it needs are done.

    What an earlier run in `out` has finished is not run again. Returns {short name: seconds}.
    Raises InputError where a command fails, and terminates the others."""
    (out / "logs").mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "w") as lock:
        acquire(lock, out)
        ledger = read_ledger(out)
        done = done_before(phases, ledger)
        waiting = [phase for phase in by_critical_path(phases) if phase.name not in done]
        running = []
        progress = Progress("phases", "phase", total=len(phases), done=len(done))
        try:
            while waiting or running:
                for phase in next_phases(waiting, done, jobs - len(running)):
                    waiting.remove(phase)
                    running.append(start(phase, out, jobs, lock))
                progress.show(", ".join(how_far(job, out) for job in running))
                progress.advance(0)
                time.sleep(POLL)
                ended = [job for job in running if job.child.poll() is not None]
                for job in ended:
                    done[job.phase.name] = finish(job, out, ledger)
                    running.remove(job)
                    progress.advance()
        finally:
            for job in running:
                job.child.terminate()
            progress.close()
    return {short_name(name, out): entry["seconds"] for name, entry in done.items()}


# ---------------------------------------------------------------- what is done


def read_ledger(out):
    """phases.json: {name: {"command", "seconds"}} of all phases that ever finished in `out`."""
    path = out / "phases.json"
    if not path.exists():
        return {}
    return read_json_object(path)


def done_before(phases, ledger):
    """The ledger's entries of the phases that need not run again.

    A phase is done if it finished with this very command and its result is still there."""
    done = {}
    for phase in phases:
        entry = ledger.get(phase.name, {})
        if entry.get("command") == phase.command and phase.result.exists():
            done[phase.name] = entry
    return done


# ---------------------------------------------------------------- what is next


def by_critical_path(phases):
    """The phases, those with the longest chain of waiting phases behind them first.

    Nothing makes the whole job shorter than its longest chain, the critical path."""
    path_length = {phase.name: 0 for phase in phases}
    # A phase stands behind those it needs, so from the end its own length is known when it is used.
    for phase in reversed(phases):
        for needed in phase.needs:
            longest = path_length.get(needed, 0)
            path_length[needed] = max(longest, path_length[phase.name] + 1)
    return sorted(phases, key=lambda phase: -path_length[phase.name])


def next_phases(waiting, done, free):
    """At most `free` of the waiting phases: the first ones whose needs are all done."""
    ready = [phase for phase in waiting if all(need in done for need in phase.needs)]
    return ready[:free]


# ---------------------------------------------------------------- start


def start(phase, out, jobs, lock):
    """Start the command of a phase, say so, and return its Job."""
    tqdm.write(as_typed(phase.command))
    command = list(phase.command)
    if phase.resumes:
        command.append("--resume")
    else:
        # No finished result of this very command: a killed run left it, or another command made it.
        phase.result.unlink(missing_ok=True)
    # The jobs share the cores: more threads than cores would only get into each other's way.
    environment = child_environment()
    environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    log = open(out / "logs" / (short_name(phase.name, out).replace("/", "-") + ".txt"), "w")
    # Children hold this lock as their stdin. If we are killed they keep it, and the next run waits
    # for them: what they are writing is not touched before they end.
    child = subprocess.Popen(
        command_line(command), env=environment, stdin=lock, stdout=log, stderr=subprocess.STDOUT
    )
    return Job(phase, child, time.time(), log)


def acquire(lock, out):
    """Take the lock. If another run or the children of a killed one hold it, say so and wait."""
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{out}: waiting for the phases that another run of it has started", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def how_far(job, out):
    """A running job's name and the step that it has come to, as its log says."""
    return f"{short_name(job.phase.name, out)} {last_step(Path(job.log.name))}".strip()


# ---------------------------------------------------------------- finish


def finish(job, out, ledger):
    """Enter a job whose command has ended into the ledger, on disk too. Returns the entry.

    Raises InputError with the last line that the command printed if it failed."""
    job.log.close()
    name = job.phase.name
    if job.child.returncode != 0:
        printed = Path(job.log.name).read_text().strip().splitlines()
        last_line = printed[-1] if printed else "no output"
        raise InputError(f"{name} failed: {last_line} (all of it: {job.log.name})")
    ledger[name] = {"command": job.phase.command, "seconds": round(time.time() - job.begin, 1)}
    write_json(out / "phases.json", ledger)
    return ledger[name]


def short_name(name, out):
    """A phase's name without the folder that all phases share."""
    return name.removeprefix(f"{out}/")
