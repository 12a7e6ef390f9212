"""Running this project's own scripts as commands, the very ones that a user would type."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from nanoroads.errors import InputError, printable
from nanoroads.run import lock, torchrun
from nanoroads.run.signals import end, uninterrupted
from nanoroads.world import roadmap

ROOT = Path(__file__).resolve().parent.parent.parent  # the checkout


def command_line(command):
    """A command line that works from any directory.

    command: ["train_sft.py", ...] or ["-m", "nanoroads.world.pairs", ...]."""
    script, *flags = map(str, command)
    if script.endswith(".py"):
        script = str(ROOT / script)
    return [sys.executable, script, *flags]


def is_own(command):
    """Whether a command is one of this project's."""
    if command[0] == "-m":
        return command[1].startswith("nanoroads.")
    return (ROOT / command[0]).is_relative_to(ROOT)


def child_environment():
    """The environment of a child process that finds this checkout, installed or not, and is no rank."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = str(ROOT)
    for name in torchrun.VARIABLES:
        environment.pop(name, None)
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    return environment


def as_typed(command):
    """The command as a user would type it, safe to print."""
    return printable(f"python {shlex.join(map(str, command))}")


def print_next(*commands):
    """Print what a user may want to type next: commands as lists of words."""
    print(f"next: {'    or: '.join(as_typed(command) for command in commands)}")


def data_flag(data, pairs="pairs.jsonl"):
    """--data of the next command, where the one that has ended had this --data: a list of words.

    pairs: the file of pairs, if `data` is not a world of the map."""
    if data == "roadmap":  # the default
        return []
    return ["--data", data if data in roadmap.WORLDS else pairs]


def make_if_missing(path, command):
    """If `path` is not there, say so and run the command, which makes it. Of several ranks, rank 0 does.

    Two scripts that miss the same file make it once: the second waits for the first. Raises
    InputError where the command fails."""
    path = Path(path)
    if torchrun.rank() == 0 and not path.exists():
        make(path, command)
    torchrun.wait_for_rank_0()


def make(path, command):
    """Run the command, which makes `path`, unless another script does; see `make_if_missing`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"{path} is missing, and another script is making it; waiting for that"
    making = lock.acquire(Path(f"{path}.lock"), waiting, wait=True)
    try:
        if path.exists():  # made while we waited
            return
        print(f"{path} is missing; making it:\n  {as_typed(command)}", flush=True)
        code = run_command(command, making)
        if code == 2:  # it has said why
            sys.exit(2)
        if code:
            raise InputError(f"{path}: the command above {how_it_failed(code)}")
    finally:
        making.release()


def run_command(command, making):
    """Run the command to its end -> its exit code, see `how_it_failed`. It ends when we are ended.

    making: a Lock, which the command holds too. If we are killed, it goes on, and the next script
    waits for it."""
    children = []
    try:
        with uninterrupted():  # or a signal could come before the child is in the list
            child = subprocess.Popen(command_line(command), env=child_environment(), stdin=making.file)
            children.append(child)
        return child.wait()
    finally:
        end(children)


def how_it_failed(code):
    """A child's exit code in words; -N says that signal N has killed it."""
    if code == -9:  # SIGKILL, which no program can answer
        return "was killed, perhaps because memory ran out; start again, it goes on"
    if code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)}); start again, it goes on"
    if code > 128:
        return "was stopped; start again, it goes on"
    return "failed"
