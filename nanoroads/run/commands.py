"""Running this project's own scripts as commands, the very ones that a user would type."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from nanoroads.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent  # the checkout


def command_line(command):
    """["train_sft.py", ...] or ["-m", "nanoroads.world.pairs", ...] -> a command line that works from any directory."""
    script, *flags = [str(word) for word in command]
    if script.endswith(".py"):
        script = str(ROOT / script)
    return [sys.executable, script, *flags]


def child_environment():
    """The environment of a child process that finds this checkout, installed or not."""
    paths = [str(ROOT)]
    if "PYTHONPATH" in os.environ:
        paths.append(os.environ["PYTHONPATH"])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def as_typed(command):
    """The command as a user would type it."""
    return "python " + shlex.join(str(word) for word in command)


def make_if_missing(path, command):
    """If `path` is not there, say so and run the command, which makes it. Raises InputError where it fails."""
    if Path(path).exists():
        return
    print(f"{path} is missing; making it:\n  {as_typed(command)}", flush=True)
    code = subprocess.run(command_line(command), env=child_environment()).returncode
    if code == 2:  # it has said why
        sys.exit(2)
    if code:
        raise InputError(f"{path}: the command above failed")
