"""The one exception that this project raises for what its user gave, and what its message is made of."""

import difflib
import re

# Control characters, which can rewrite the terminal (not newline and tab); U+202A to U+202E and U+2066 to
# U+2069, with which a text shows its letters in another order; halves of surrogate pairs, which no
# encoding can write.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class InputError(ValueError):
    """Something that the user gave is wrong: a flag, a file, a row.

    Its message is one line: what, where, what to do.
    `run.flags.run_script` prints it and exits with code 2; every other exception is a bug and keeps its
    traceback."""


def printable(text: str) -> str:
    r"""Text of a file, a name or a model, safe to print: \x1b or \u202e for what a terminal would obey."""
    return UNPRINTABLE.sub(escaped, text)


def escaped(match):
    r"""One character as \xNN, or as \uNNNN beyond Latin-1."""
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def nearest_first(name: str, names, most: int = 6) -> str:
    """The names that there are, at most `most` of them, those most like the misspelt one first."""

    def likeness(candidate):
        return difflib.SequenceMatcher(None, name.lower(), candidate.lower()).ratio()

    by_likeness = sorted(names, key=likeness, reverse=True)
    return ", ".join(by_likeness[:most])
