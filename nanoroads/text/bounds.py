"""Bounds on what a stranger's file may make this process do: so much processor time, so much memory.

A chat template is a program, the pattern of a tokenizer can be as slow as one, and a small file may
hold a long text many times.
"""

import contextlib
import signal
import sys
import threading

from nanoroads.errors import InputError

try:
    import resource
except ImportError:  # on Windows
    resource = None

MOST_TOKENS = 1_000_000  # Gemma has 262,144
MOST_ADDED_CHARACTERS = 2**22  # 65,536 codes of sounds take 720,000
MOST_PATTERN_CHARACTERS = 100_000  # the longest known ones have some thousand


class OutOfBounds(Exception):
    """A block under `bounded` took too much; the message says of what."""


class TimeIsUp(BaseException):
    """What the timer raises. No Exception: jinja2 drops those that it meets while it compiles."""


@contextlib.contextmanager
def bounded(seconds: float, more_bytes: int):
    """Raises OutOfBounds if the block takes more processor time than this, or adds more memory.

    The time is bounded in the main thread of a POSIX system, the memory on Linux; elsewhere the
    block runs without that bound. Python cannot interrupt a single operation that is written in C,
    a comparison of lists that hold one another a million times, say: after three times as long the
    system ends the process there ("Virtual timer expired")."""
    try:
        with bounded_time(seconds), bounded_memory(more_bytes):
            yield
    except TimeIsUp:
        raise OutOfBounds(f"it takes more than {seconds} s of processor time") from None
    except MemoryError:
        raise OutOfBounds(f"it takes more than {more_bytes:,} bytes of memory") from None


@contextlib.contextmanager
def bounded_time(seconds):
    """Raises TimeIsUp. The timers count processor time: a process may be stopped for a while."""

    def stop(signal_number, frame):
        raise TimeIsUp

    in_main_thread = threading.current_thread() is threading.main_thread()
    # Python runs signal handlers only in the main thread.
    if not hasattr(signal, "SIGPROF") or not in_main_thread:
        yield
        return
    handler_before = signal.signal(signal.SIGPROF, stop)
    # Once more every second, since what is raised while an object is deleted is lost.
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    signal.setitimer(signal.ITIMER_VIRTUAL, 3 * seconds)  # SIGVTALRM has no handler
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGPROF, handler_before)


@contextlib.contextmanager
def bounded_memory(more_bytes):
    """See `bounded`. The limit is the operating system's, so an allocation beyond it fails at once."""
    if not sys.platform.startswith("linux"):
        yield
        return
    with open("/proc/self/statm") as sizes:
        pages = int(sizes.read().split()[0])  # of the address space
    limit = pages * resource.getpagesize() + more_bytes
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    for limit_before in (soft, hard):
        if limit_before != resource.RLIM_INFINITY:
            limit = min(limit, limit_before)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---------------------------------------------------------------- sizes of a tokenizer


def check_token_lengths(path, specification):
    """Raises InputError for more tokens, or longer added ones, than any tokenizer has."""
    size = len(specification["model"]["vocab"])
    if size > MOST_TOKENS:
        raise InputError(f"{path}: has {size:,} tokens; at most {MOST_TOKENS:,} can be read")
    added_tokens = specification.get("added_tokens") or []
    characters = sum(len(token["content"]) for token in added_tokens)
    if characters > MOST_ADDED_CHARACTERS:
        raise InputError(f"{path}: its added tokens are {characters:,} characters long together")
    for token in added_tokens:
        if not token["content"]:
            raise InputError(f"{path}: an added token is empty")


def check_pattern_lengths(path, patterns):
    """Raises InputError for a pattern of a tokenizer.json that is longer than any known one."""
    longest = max(map(len, patterns), default=0)
    if longest > MOST_PATTERN_CHARACTERS:
        raise InputError(f"{path}: a pattern of its pre-tokenizer is {longest:,} characters long")
