"""Commands without the seconds that each of them takes for its imports.

A warm process (warm_process.py) imports once what the scripts import, computes nothing, and forks a
child for each command. The child does what `python COMMAND` does, to the same bits; in `ps` alone it
has another command line. The messages on the socket between job and warm process are JSON:

    ["train_dpo.py", ...], with two open files    start this command -> the child's process number
    a child's process number                      how has it ended? -> its exit code, null while it runs
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

from nanoroads.errors import InputError
from nanoroads.run.signals import ENDING

SIGNALS = [signal.SIGINT, *ENDING]
LONGEST = 2**17  # bytes of a message
GONE = "the process that starts the commands was killed, perhaps because memory ran out; start again"


class Warm:
    """The warm process, as the job sees it. It ends with the job; its children go on.

    environment: that of the children."""

    def __init__(self, environment: dict[str, str]):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-m", "nanoroads.run.warm_process", str(theirs.fileno())]
        # NumPy would start threads when it is imported, and a process with threads should not fork. No
        # script multiplies matrices in NumPy.
        environment = {"OPENBLAS_NUM_THREADS": "1", **environment}
        nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        # Ctrl-C is sent to all processes of the job, and this one has to outlive its children: what is
        # blocked here stays so in it.
        blocked_before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.process = subprocess.Popen(words, env=environment, pass_fds=[theirs.fileno()], **nowhere)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
            theirs.close()

    def can_fork(self) -> bool:
        """Waits for the imports, and says whether children can be forked after them."""
        return self.socket.recv(LONGEST) == b"true"

    def start(self, command: list[str], stdin, log) -> "Child":
        """Start ["/.../train_sft.py", ...] or ["-m", MODULE, ...], which prints into the open file `log`.

        Raises InputError if the warm process is gone."""
        try:
            return Child(self, self.ask(command, [stdin.fileno(), log.fileno()]))
        except ConnectionError:
            raise InputError(GONE) from None

    def ask(self, question, files=()):
        """The reply to a message, for which no signal may interrupt us. Raises ConnectionError."""
        socket.send_fds(self.socket, [json.dumps(question).encode()], files)
        reply = self.socket.recv(LONGEST)
        if not reply:
            raise ConnectionResetError(GONE)
        return json.loads(reply)

    def close(self):
        """End the warm process, whose children have ended."""
        self.process.kill()
        self.process.wait()
        self.socket.close()


class Child:
    """A command that was started, with those methods of subprocess.Popen that are needed."""

    def __init__(self, warm, pid):
        self.warm = warm
        self.pid = pid
        self.returncode = None

    def poll(self):
        """The exit code, -N where signal N has killed it; None while it runs."""
        if self.returncode is None:
            try:
                self.returncode = self.warm.ask(self.pid)
            except ConnectionError:  # nobody can know it any more
                self.returncode = -signal.SIGKILL
        return self.returncode

    def wait(self, timeout=float("inf")):
        """Waits for the exit code. Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:  # its number is no other process's before its exit code is known
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)
