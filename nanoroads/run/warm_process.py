"""python -m nanoroads.run.warm_process FD: what forks the children of warm.py.

FD: the number of a socket, open, on which the questions come. Nothing is computed here, so that no
thread is started: a child would not have it, but would have the locks that it held.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # AdamW imports it

import nanoroads.run.rollouts
import nanoroads.run.run
import nanoroads.world.task  # noqa: F401  (with these comes all that the scripts import)
from nanoroads.run.warm import LONGEST, SIGNALS


def main():
    """Say whether children can be forked, and fork them until the job ends."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    gc.collect()
    gc.freeze()  # the children need not look through the modules' objects again and again
    connection.send(json.dumps(can_fork()).encode())
    command = answer(connection)
    if command is not None:
        # As Python's own forked processes end: to take a thousand modules apart takes a second.
        os._exit(exit_code_of(command))


def can_fork():
    """Whether nothing was started that a child would not have: a thread, or CUDA."""
    if len(os.listdir("/proc/self/task")) > 1:
        return False
    pid = os.fork()
    if pid == 0:  # torch says it in a child alone
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(pid, 0)[1] == 0


def answer(connection):
    """Answer the job's questions until it ends -> None; in each child -> its command."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, LONGEST, 2)
        if not message:
            return None
        question = json.loads(message)
        if isinstance(question, int):
            pid, status = os.waitpid(question, os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        else:
            reply = os.fork()
            if reply == 0:
                connection.close()
                become_a_command(question, *files)
                return question
            for file in files:
                os.close(file)
        connection.send(json.dumps(reply).encode())


def become_a_command(command, stdin, log):
    """Files, signals, sys.argv and sys.path as `python COMMAND` has them."""
    os.dup2(stdin, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(stdin)
    os.close(log)
    if command[0] == "-m":
        sys.argv = command[1:]
    else:
        sys.argv = command
        sys.path[0] = str(Path(command[0]).parent)
    Path("/proc/self/comm").write_text(Path(sys.argv[0]).name)  # what `top` shows
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def exit_code_of(command):
    """Run a command to its end, also what is to be done when Python ends -> its exit code."""
    code = 0
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        traceback.print_exc()
        code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    atexit._run_exitfuncs()  # a lock is let go of, for example
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
