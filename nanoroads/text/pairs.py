"""A file of pairs for several models, each of which reads the same rows by a tokenizer of its own.

Errors of rows are gathered, {number of the row: what is wrong}, since a row that one model cannot read
is scored by none."""

from typing import NamedTuple

from nanoroads.errors import InputError, printable
from nanoroads.progress import tracked
from nanoroads.text.data import Rows, append, fit
from nanoroads.text.encode import encode_row
from nanoroads.text.layouts import Texts, chat_text
from nanoroads.text.rows import parse, raw_rows


class Pair(NamedTuple):
    """One row: a prompt and two answers, the chosen one first."""

    number: int  # of its line, from 1
    row: dict
    texts: Texts  # for a tokenizer
    prompt: str  # as text; a message list as HH-RLHF writes it
    answers: list[str]  # as text, without roles


def read_pairs(path, layout):
    """(Pairs of a file, {row's number: error}). layout: a function of layouts.py.

    Raises InputError for the file itself."""
    pairs = []
    errors = {}
    for number, raw_row in tracked(raw_rows(path), f"reading {path}", "row"):
        try:
            row = parse(raw_row)
            texts = layout(row)
            prompt = texts.prompt if isinstance(texts.prompt, str) else chat_text(texts.prompt)
            pairs.append(Pair(number, row, texts, prompt, [answer_text(answer) for answer in texts.answers]))
        except InputError as error:
            errors[number] = str(error)
    return pairs, errors


def answer_text(answer):
    """What an answer says: a text, or the contents of its messages."""
    if isinstance(answer, str):
        return answer
    return "\n".join(message["content"] for message in answer)


def encode_pairs(pairs, encoding, limits):
    """({row's number: EncodedRow}, {row's number: error}) of Pairs. limits: a data.Limits."""
    encoded = {}
    errors = {}
    for pair in tracked(pairs, "reading", "pair"):
        texts = pair.texts
        try:
            whole = encode_row(encoding, texts.prompt, texts.answers, tools=texts.tools)
            encoded[pair.number] = fit(encoding, whole, limits)
        except InputError as error:
            errors[pair.number] = str(error)
    return encoded, errors


def without_errors(path, pairs, errors, skip_bad_rows):
    """The Pairs that have no error. Raises InputError for the first error, unless rows may be skipped.

    Also where nothing is left."""
    kept = [pair for pair in pairs if pair.number not in errors]
    if not errors:
        return kept
    first = min(errors)
    line = f"{path}:{first}: {errors[first]}"
    if not skip_bad_rows:
        raise InputError(f"{line} (--skip-bad-rows leaves such rows out)")
    if not kept:
        raise InputError(f"{path}: no usable row; the first error: {line}")
    count = f"{len(errors):,} bad rows of {len(errors) + len(kept):,}"
    print(printable(f"{path}: skipped {count}; the first: {line}"))
    return kept


def rows_of(pairs, encoded):
    """Pairs as data Rows. encoded: {row's number: EncodedRow}."""
    rows = Rows([], [], [])
    for pair in pairs:
        append(rows, encoded[pair.number])
    return rows


def subsets_of(pairs, column):
    """The subset of each pair, a list of names; None where no row has the column. Raises InputError.

    column: --by; None: "subset", which may be missing."""
    names = [pair.row.get(column or "subset") for pair in pairs]
    if all(name is None for name in names):
        if column:
            raise InputError(f"--by {column}: no row has this column")
        return None
    return ["(none)" if name is None else str(name) for name in names]
