"""The scheduler: commands that need each other's results, several at a time, resumed after a kill.

OUT/phases.json and OUT/started.json are the ledger (ledger.py), OUT/logs/ holds what each command
printed, and OUT/lock keeps two runs from writing to the same files. On Linux this project's own
commands share their imports (run/warm.py).
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

from nanoroads.errors import InputError
from nanoroads.progress import Progress, last_step
from nanoroads.report.ledger import Ledger, Phase
from nanoroads.run.commands import as_typed, child_environment, command_line, how_it_failed, is_own
from nanoroads.run.lock import Lock, acquire
from nanoroads.run.signals import end, uninterrupted
from nanoroads.run.warm import Child, Warm
from nanoroads.weights.files import TEMPORARY, open_own, write_json

POLL = 0.1  # seconds between two looks at the running commands


class Job(NamedTuple):
    """A phase whose command is running."""

    phase: Phase
    child: subprocess.Popen | Child
    begin: float  # time.monotonic() of its start
    log: TextIO  # what the command prints


def new_phase(folder: Path, name: str, command: list, needs=()) -> Phase:
    """The phase that makes folder/name: `command` with `--out folder/name`.

    needs: names, in the same folder, of other phases and of files that are there when the command starts."""
    result = f"{folder}/{name}"
    words = [str(word) for word in command]
    return Phase(result, [f"{folder}/{need}" for need in needs], words + ["--out", result])


def run_phases(phases: list[Phase], out: Path, jobs: int, lock: Lock | None = None) -> dict[str, float]:
    """Run the commands, `jobs` at a time, each one when those it needs are done.

    What an earlier run in `out` has finished is not run again, see ledger.py. lock: of `claim_folder`, for
    a caller that goes on to write in `out`. Returns {short name: seconds}. Raises InputError where a
    command fails or a result has been changed, and ends the other commands."""
    if lock is None:
        lock = lock_folder(out)
        try:
            return run_phases(phases, out, jobs, lock)
        finally:
            lock.release()
    logs = out / "logs"
    if logs.is_symlink():  # files there may be somebody's
        raise InputError(f"{logs}: a link, where logs of ours are written; move it away, and start again")
    logs.mkdir(exist_ok=True)
    ledger = Ledger(out)
    ledger.check_made(phases)  # now, and not after an hour of training
    order = by_critical_path(phases)
    waiting = list(order)
    names = {phase.name for phase in phases}
    ready = []  # their needs are done, and they have to be run
    running = []
    done = {}  # {name: entry in the ledger}
    progress = Progress("phases", "phase", total=len(phases))
    starter = Starter(jobs)
    try:
        while waiting or ready or running:
            for phase in with_needs_done(waiting, names - done.keys()):
                waiting.remove(phase)
                if ledger.is_done(phase):
                    done[phase.name] = ledger.finished[phase.name]
                    progress.advance()
                else:
                    ready.append(phase)
            ready.sort(key=order.index)
            while ready and len(running) < jobs:
                phase = ready.pop(0)
                ledger.start(phase)
                starter.prepare(phase)
                with uninterrupted():  # or a signal could come before the child is in the list
                    running.append(start(phase, out, starter, lock))
            progress.set_text(", ".join(how_far(job, out) for job in running))
            progress.advance(0)
            time.sleep(POLL if running else 0)
            with uninterrupted():  # poll() takes a lock, and what a signal raises would leave it locked
                ended = [job for job in running if job.child.poll() is not None]
            for job in ended:
                running.remove(job)
                done[job.phase.name] = finish(job, ledger)
                progress.advance()
    finally:
        end([job.child for job in running])
        starter.close()
        progress.close()
    return {short_name(name, out): entry["seconds"] for name, entry in done.items()}


# ---------------------------------------------------------------- the folder


def claim_folder(out: Path) -> Lock:
    """Take the folder of results: make it, or refuse one that holds something else, and lock it.

    Returns the lock, to be kept as long as `out` is written to."""
    if not out.is_dir() and (out.exists() or out.is_symlink()):  # a link may lead nowhere
        raise InputError(f"--out {out}: is there, and is no folder; choose another")
    if out.exists() and not (out / "phases.json").exists() and not (out / "started.json").exists():
        # A run that was killed at once leaves these.
        ours = ("lock", "logs", "phases.json", "started.json", TEMPORARY)
        strangers = []
        for path in out.iterdir():
            is_result = (path / "results.json").exists() and (path / "table.md").exists()  # of an experiment
            if not path.name.startswith(ours) and not is_result:
                strangers.append(path.name)
        if strangers:
            raise InputError(f"--out {out}: holds {min(strangers)}, no result of ours; choose another folder")
    lock = lock_folder(out)
    if not (out / "started.json").exists():
        write_json(out / "started.json", {})  # from now on the folder is ours
    return lock


def lock_folder(out):
    """Make a folder and lock it. Returns the Lock, which children with it as their stdin hold, too.

    If another run or the children of a killed one hold it, says so and waits."""
    out.mkdir(parents=True, exist_ok=True)
    waiting = f"{out}: waiting for the phases that another run of it has started"
    return acquire(out / "lock", waiting, wait=True)


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


def with_needs_done(waiting, not_done):
    """The waiting phases that need none of the phases whose names are in `not_done`."""
    return [phase for phase in waiting if not_done.isdisjoint(phase.needs)]


# ---------------------------------------------------------------- start


class Starter:
    """Starts commands, those of this project on Linux from a warm process, see run/warm.py."""

    def __init__(self, jobs):
        self.environment = child_environment()
        # The jobs share the cores: more threads than cores would only get into each other's way.
        self.environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        self.warm = None
        self.warm_is_of_use = sys.platform == "linux"

    def prepare(self, phase):
        """Start the warm process, if there is none and the phase's command has a use for it."""
        if self.warm is None and self.warm_is_of_use and is_own(phase.command):
            self.warm = Warm(self.environment)
            if not self.warm.can_fork():
                self.warm_is_of_use = False
                self.warm.close()

    def start(self, command, stdin, log):
        """Start a command that prints into the open file `log`: a Popen, or a Child with its methods."""
        words = command_line(command)
        if self.warm is not None and self.warm_is_of_use and is_own(command):
            return self.warm.start(words[1:], stdin, log)
        return subprocess.Popen(
            words, env=self.environment, stdin=stdin, stdout=log, stderr=subprocess.STDOUT
        )

    def close(self):
        if self.warm is not None:
            self.warm.close()


def start(phase, out, starter, lock):
    """Start the command of a phase, say so, and return its Job."""
    tqdm.write(as_typed(phase.command))
    command = list(phase.command)
    if phase.resumes:
        command.append("--resume")
    log = open_own(out / "logs" / (short_name(phase.name, out).replace("/", "-") + ".txt"), "w")
    # Children hold this lock as their stdin. If we are killed they keep it, and the next run waits
    # for them: what they are writing is not touched before they end.
    child = starter.start(command, lock.file, log)
    return Job(phase, child, time.monotonic(), log)


def how_far(job, out):
    """A running job's name and the step that it has come to, as its log says."""
    return f"{short_name(job.phase.name, out)} {last_step(Path(job.log.name))}".strip()


# ---------------------------------------------------------------- finish


def finish(job, ledger):
    """Enter a job whose command has ended into the ledger, on disk too. Returns the entry.

    Raises InputError with the last line that the command printed if it failed."""
    job.log.close()
    code = job.child.returncode
    if code != 0:
        printed = Path(job.log.name).read_text(errors="replace").strip().splitlines()
        last_line = printed[-1].removeprefix("error: ") if printed else "no output"
        raise InputError(f"{job.phase.name} {how_it_failed(code)}: {last_line} (all of it: {job.log.name})")
    return ledger.finish(job.phase, round(time.monotonic() - job.begin, 1))


def short_name(name, out):
    """A phase's name without the folder that all phases share."""
    return name.removeprefix(f"{out}/")
