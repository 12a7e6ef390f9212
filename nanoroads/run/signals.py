"""What ends a program early: Ctrl-C, SIGTERM, SIGHUP. Its child processes end with it."""

import contextlib
import os
import signal
import subprocess
import threading

PATIENCE = 10.0  # seconds that a child has to end by itself
# SIGTERM: `kill`, a batch system. SIGHUP: the terminal was closed; Windows has no such signal.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(BaseException):
    """A signal of ENDING has come. Like KeyboardInterrupt no Exception, so that nothing swallows it."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def stop(number, frame):
    """The handler of ENDING: raises Stopped where the program is, so that every `finally` is run."""
    raise Stopped(number)


@contextlib.contextmanager
def handled(numbers, handler):
    """These signals call `handler` within the block. One that is ignored, as by nohup, stays so.

    Only a main thread can set handlers; in any other nothing changes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not set from Python
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old_handler in before.items():
            signal.signal(number, old_handler)


@contextlib.contextmanager
def uninterrupted():
    """A signal that comes within the block, Ctrl-C too, is acted on at its end."""
    arrived = []

    def note(number, frame):
        arrived.append(number)

    try:
        with handled([signal.SIGINT, *ENDING], note):
            yield
    finally:
        if arrived:
            os.kill(os.getpid(), arrived[0])  # now to the handler that was there before


def end(children: list[subprocess.Popen]):
    """End the child processes and wait for them. One that lives on after PATIENCE is killed."""
    with uninterrupted():
        for child in children:
            child.terminate()  # its run_script ends its own children
        for child in children:
            try:
                child.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
