"""A lock on a folder for as long as a process writes to it.

It ends with the process, however that ends: the system lets go of it even after SIGKILL.
"""

import os
import socket
import weakref
from pathlib import Path
from typing import TextIO

from nanoroads.errors import InputError
from nanoroads.weights.files import naming, open_own

try:
    import fcntl
except ImportError:  # on Windows there is no such lock
    fcntl = None

HOLDER = "process "  # begins the text in a lock's file, which names the holder


class Lock:
    """A lock that this process holds, until it is released or nothing refers to it any more."""

    def __init__(self, path: Path, file: TextIO):
        self.file = file  # a child process that has it as its stdin holds the lock, too
        self.release = weakref.finalize(self, let_go, path, file, os.getpid())


# {path: Lock} of this process. Two files of one process would lock each other out.
held = weakref.WeakValueDictionary()


def acquire(path: Path, message: str, wait: bool = False) -> Lock:
    """Lock the file `path`, which is made for that, and removed in the end. A link is not followed.

    Where another process holds the lock, with `wait` the message is printed, and the lock is taken
    when it is free; without, InputError is raised with the message. Either names the holder. Where
    the system has no such locks, nothing is locked. What this process holds it gets again. Raises
    InputError for a file that is no lock of ours."""
    path = Path(os.path.realpath(path.parent)) / path.name
    if path in held and held[path].release.alive:
        return held[path]
    file = open_own(path, "a+")  # "w" would erase the holder's name before the lock is ours
    while not locked(file, message, wait, path):  # whoever held it has removed the file
        file.close()
        file = open_own(path, "a+")
    file.seek(0)
    text = file.read(len(HOLDER))
    if text and text != HOLDER:
        file.close()
        raise InputError(f"{path}: is no lock of ours, and its name is needed; move it away, and start again")
    try:
        file.truncate(0)
        file.write(f"{HOLDER}{os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError as error:
        raise naming(path, error) from None
    held[path] = lock = Lock(path, file)
    return lock


def locked(file, message, wait, path):
    """flock an open file, see `acquire`. Returns whether it is still the file at `path`."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = " ".join(file.read(200).split()) or "another process"
        if not wait:
            file.close()
            raise InputError(f"{message} ({holder})") from None
        print(f"{message} ({holder})", flush=True)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks, as some network ones are
        return True
    return path.exists() and os.path.samestat(os.stat(path), os.fstat(file.fileno()))


def let_go(path, file, owner):
    """Remove the file of a lock while it is still held, then end the lock.

    owner: the process that took it. A fork of it has a copy of the Lock, and ends nothing."""
    if os.getpid() == owner:
        path.unlink(missing_ok=True)
    file.close()
