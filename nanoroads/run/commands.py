"""Running this project's own scripts as commands, the very ones that a user would type."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from nanoroads.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent  # the checkout


def command_line(command):
    """A command line that works from any directory.

    command: ["train_sft.py", ...] or ["-m", "nanoroads.world.pairs", ...]."""
    script, *flags = map(str, command)
    if script.endswith(".py"):
        script = str(ROOT / script)
    return [sys.executable, script, *flags]


def child_environment():
    """The environment of a child process that finds this checkout, installed or not."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = str(ROOT)
    if "PYTHONPATH" in os.environ:
        environment["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    return environment


def as_typed(command):
    """The command as a user would type it."""
    return f"python {shlex.join(map(str, command))}"


def make_if_missing(path, command):
    """If `path` is not there, say so and run the command, which makes it.

    Raises InputError where it fails."""
    if Path(path).exists():
        return
    print(f"{path} is missing; making it:\n  {as_typed(command)}", flush=True)
    code = subprocess.run(command_line(command), env=child_environment()).returncode
    if code == 2:  # it has said why
        sys.exit(2)
    if code:
        raise InputError(f"{path}: the command above failed")
