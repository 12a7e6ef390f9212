"""How far a long loop has come: a bar on a terminal, elsewhere a line on stderr now and then.

A bar redraws itself, which a log file cannot show. So under nohup, SLURM or CI, and wherever else
stderr is no terminal, a loop says a line when it has something to tell, and otherwise every half
minute:

    dpo: step 120 of 628, loss 0.6512, accuracy 0.609, margin 0.21, 52,034 tokens/s, 1,105 pairs/s,
    peak 540 MiB, 00:17 left
"""

import contextlib
import os
import re
import sys
import time
from pathlib import Path

from tqdm import tqdm

from nanoroads.errors import printable

BAR_AFTER = 1.0  # seconds that a loop takes before its bar appears
FIRST_LINE = 10.0  # seconds until the first line of a loop that has nothing to tell
NEXT_LINE = 30.0  # seconds from one such line to the next

# As tqdm's, without the rate: a loop that has a text to show beside its bar needs the room.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"

LINE = re.compile(r"^([^:\n]+): \w+ ([\d,]*\d) of ([\d,]*\d)", re.MULTILINE)  # as Progress.line begins

TAIL = 2000  # bytes at the end of a log that hold its last line
OPEN = []  # every Progress whose loop runs, the outer ones first


class Progress:
    """The progress of one loop, used in a `with` block.

    name: what the loop does. unit: what it counts. total: how many there are, None if nobody
    knows. done: how many an earlier process has done."""

    def __init__(self, name: str, unit: str, total: int | None = None, done: int = 0):
        self.name = " ".join(printable(name).split())  # of a file, say, with a line break in its name
        self.unit = unit
        self.total = total
        self.done = done
        self.done_before = done
        self.text = ""  # what stands beside the bar
        self.done_at_last_line = None  # the count in the last line; None before the first
        self.begin = time.monotonic()
        self.line_due = self.begin + FIRST_LINE
        self.on_terminal = can_show_a_bar()
        self.bar = tqdm(
            desc=self.name,
            unit=unit,
            total=total,
            initial=done,
            disable=not self.on_terminal,
            delay=BAR_AFTER,
            miniters=0,  # drawn again every 0.1 s, whether or not the count has changed
            dynamic_ncols=True,
            leave=None,  # a bar inside another one vanishes when it is done
        )
        OPEN.append(self)  # last: a signal may come before the bar is there

    def set_text(self, text: str):
        """What is to stand beside the bar, and in the next line."""
        self.text = printable(text)
        if self.total is not None:
            self.bar.bar_format = BAR
        self.bar.set_postfix_str(self.text, refresh=False)

    def advance(self, count: int = 1, now: bool = False):
        """`count` more are done. now: there is something to tell, so a line is due now."""
        self.done += count
        self.bar.update(count)
        if not self.on_terminal and (now or time.monotonic() >= self.line_due):
            self.say_line()

    def say_line(self):
        """Print the line of a loop that has no bar."""
        # A closed stderr, a full disk or a terminal that has gone is no reason to stop the loop.
        if sys.stderr is not None:
            with contextlib.suppress(OSError):
                print(self.line(), file=sys.stderr, flush=True)
        self.done_at_last_line = self.done
        self.line_due = time.monotonic() + NEXT_LINE

    def line(self) -> str:
        """What a log shows of the loop."""
        seconds = time.monotonic() - self.begin
        done_here = self.done - self.done_before
        parts = [f"{self.name}: {self.unit} {self.done:,}"]
        if self.total is not None:
            parts[0] += f" of {self.total:,}"
        if self.text:
            parts.append(self.text)
        if self.total is not None and 0 < done_here and self.done < self.total:
            seconds_left = seconds / done_here * (self.total - self.done)
            parts.append(f"{tqdm.format_interval(seconds_left)} left")
        else:
            parts.append(f"{tqdm.format_interval(seconds)} so far")
        return ", ".join(parts)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self.close()
        # A log that shows a loop's progress also shows its end.
        if kind is None and self.done_at_last_line not in (None, self.done):
            self.say_line()

    def close(self):
        """Leave the bar as it is, and go to the next line of the terminal."""
        self.bar.close()
        if self in OPEN:
            OPEN.remove(self)


def can_show_a_bar() -> bool:
    """Whether stderr is a terminal. One of width 0, which some CI systems have, shows no bar."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    return os.get_terminal_size(sys.stderr.fileno()).columns > 0


def close_all():
    """Close the bars of loops that an error has left, so that it is not printed into one of them."""
    for progress in reversed(OPEN.copy()):
        progress.close()


def say(text: str):
    """Print a line to stdout, above the bars if there are any."""
    with tqdm.external_write_mode():
        print(printable(text))


def tracked(items, name: str, unit: str):
    """Yields the items, and shows how many of them are done, and of how many if they are a list."""
    total = len(items) if hasattr(items, "__len__") else None
    with Progress(name, unit, total) as progress:
        for item in items:
            yield item
            progress.advance()


def last_step(log: Path) -> str:
    """The progress in the last line of a loop's log, as "dpo 120/628"; "" where it has no line yet."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - TAIL))
        lines = LINE.findall(file.read().decode(errors="replace"))
    if not lines:
        return ""
    name, done, total = lines[-1]
    return f"{name} {done}/{total}"
