"""What a long loop says: a bar on a terminal; elsewhere lines, as many as there is something to tell."""

import io
import os
import re
import struct
import subprocess
import sys

import pytest
from helpers.runs import run

import train_dpo
from nanoroads import progress
from nanoroads.progress import Progress, last_step, tracked
from nanoroads.run.commands import child_environment
from nanoroads.run.flags import run_script


class Clock:
    """A clock that stands still unless it is set forward."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


class FullDisk(io.StringIO):
    """A log on a disk that is full."""

    def write(self, text):
        raise OSError(28, "No space left on device")


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_a_loop_that_tells_something_says_a_line_with_the_time_left(clock, capsys):
    with Progress("dpo", "step", total=1000) as loop:
        for step in range(20):
            clock.now += 0.5
            if step == 9:
                loop.set_text("loss 0.65")
            loop.advance(now=step == 9)
    # Ten steps took 5 s, so 990 more take 495.
    assert lines(capsys)[0] == "dpo: step 10 of 1,000, loss 0.65, 08:15 left"


def test_time_left_counts_from_the_checkpoint_on(clock, capsys):
    with Progress("dpo", "step", total=100, done=50) as loop:
        clock.now += 10
        loop.advance(10, now=True)
        clock.now += 40
        loop.advance(40, now=True)
    assert lines(capsys) == ["dpo: step 60 of 100, 00:40 left", "dpo: step 100 of 100, 00:50 so far"]


def test_other_loops_say_a_line_after_ten_seconds_then_every_thirty_and_at_the_end(clock, capsys):
    seen = []
    for row in tracked(iter(range(100)), "reading x.jsonl", "row"):
        seen.append(row)
        clock.now += 1
    assert seen == list(range(100))
    counts = [int(re.match(r"reading x.jsonl: row (\d+), ", line)[1]) for line in lines(capsys)]
    assert counts == [10, 40, 70, 100]
    for _ in tracked(["a"] * 12, "scoring", "batch"):
        clock.now += 1
    assert lines(capsys)[0] == "scoring: batch 10 of 12, 00:02 left"


def test_a_short_loop_and_one_that_fails_say_nothing_more(clock, capsys):
    for _ in tracked(range(9), "reading", "row"):
        clock.now += 1
    assert lines(capsys) == []
    with pytest.raises(ValueError), Progress("reading", "row") as loop:
        clock.now += 11
        loop.advance()
        loop.advance()
        raise ValueError
    assert lines(capsys) == ["reading: row 1, 00:11 so far"]
    assert progress.OPEN == []


@pytest.mark.parametrize("stderr", [None, FullDisk()])
def test_a_line_that_cannot_be_written_stops_nothing(stderr, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stderr)
    steps = []
    with Progress("dpo", "step", total=3) as loop:
        for step in range(3):
            loop.advance(now=True)
            steps.append(step)
    assert steps == [0, 1, 2] and capsys.readouterr().out == ""


def test_a_name_cannot_write_to_the_terminal(clock, capsys):
    with Progress("reading a\x1b[2J\nb\u202e", "row") as loop:
        loop.set_text("\x07")
        loop.advance(now=True)
    assert lines(capsys) == [r"reading a\x1b[2J b\u202e: row 1, \x07, 00:00 so far"]


def test_the_log_of_another_process_tells_how_far_it_is(clock, tmp_path, monkeypatch):
    log = tmp_path / "log.txt"
    log.write_text("using: lr 0.1\nrloo: 1,825 prompts x 8, 120 steps, kl 0.5\n")
    assert last_step(log) == ""
    with open(log, "a") as file:
        monkeypatch.setattr(sys, "stderr", file)
        with Progress("reward", "step", total=1500) as loop:
            loop.advance(now=True)
            loop.advance(1233, now=True)
    assert last_step(log) == "reward 1,234/1,500"
    log.write_bytes(b"dpo: step 7 of 9, loss 1\n" + b"\xff" * 100)
    assert last_step(log) == "dpo 7/9"
    log.write_text("x" * 10_000 + "\ndpo: step 8 of 9, loss 1, 00:01 left\n")
    assert last_step(log) == "dpo 8/9"


def test_a_training_run_says_a_line_for_every_line_of_its_log(sft, tmp_path, capsys):
    capsys.readouterr()
    run(train_dpo, tmp_path / "out", init=sft, log_every=4)
    said = lines(capsys)
    # 12 steps; those that are evaluated, 6 and 12, have a line too.
    assert [re.match(r"dpo: step (\d+) of 12, ", line)[1] for line in said] == ["4", "6", "8", "12"]
    words = ("loss ", "accuracy ", "margin ", " tokens/s, ", " pairs/s, ", " MiB, ")
    assert all(word in line for line in said for word in words)
    assert "left" in said[0] and "so far" in said[-1]


LOOP = """
import time
from nanoroads.progress import Progress, close_all
from nanoroads.errors import InputError
from nanoroads.run import flags, run

def main():
    print("begins")
    with Progress("outer", "step", total=3) as outer:
        for step in range(3):
            with Progress("inner", "row", total=2) as inner:
                for row in range(2):
                    time.sleep(0.4)
                    inner.advance()
            outer.set_text("loss 1")
            outer.advance(now=True)
            if step == 1:
                raise InputError("it breaks")

flags.run_script(main)
"""


def test_on_a_terminal_there_is_a_bar_and_no_line_and_an_error_stands_on_a_line_of_its_own():
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    parent, child = os.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP], env=child_environment(), stdout=child, stderr=child
    )
    os.close(child)
    written = b""
    chunk = read(parent)
    while chunk:
        written += chunk
        chunk = read(parent)
    os.close(parent)
    assert process.wait() == 2
    text = written.decode()
    assert "outer:  67%" in text and "2/3" in text and ", loss 1]" in text
    assert "step 2 of 3" not in text
    assert re.search(r"\n\r?error: it breaks\r?\n$", text)


def test_a_terminal_without_a_width_gets_lines(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda file: os.terminal_size((0, 0)))
    with Progress("dpo", "step", total=3) as loop:
        loop.advance(now=True)
    assert lines(capsys) == ["dpo: step 1 of 3, 00:00 left"]


def read(terminal):
    try:
        return os.read(terminal, 65536)
    except OSError:  # what Linux says at the end
        return b""


def test_what_a_log_holds_stands_in_the_order_in_which_it_was_written():
    done = subprocess.run(
        [sys.executable, "-c", LOOP],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    begins = [line.split(",")[0] for line in done.stdout.splitlines()]
    assert begins == ["begins", "outer: step 1 of 3", "outer: step 2 of 3", "error: it breaks"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_character_that_the_terminal_lacks_is_escaped(encoding, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding, newline="\n"))
    run_script(lambda: print("\u00dc \u4eba"))
    said = {"ascii": b"\\xdc \\u4eba\n", "latin-1": b"\xdc \\u4eba\n", "utf-8": "\u00dc \u4eba\n".encode()}
    assert written.getvalue() == said[encoding]


def test_a_signal_while_a_bar_is_made_leaves_nothing_to_close(monkeypatch):
    def stopped(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress, "tqdm", stopped)
    with pytest.raises(KeyboardInterrupt):
        progress.Progress("reading", "row")
    progress.close_all()  # what run_script does then
    assert progress.OPEN == []
