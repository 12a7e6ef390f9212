"""A user's file of rows -> tokens, each row within the limits, and some rows held out."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tiktoken

from nanoroads.errors import InputError, printable
from nanoroads.progress import tracked
from nanoroads.text.columns import Columns
from nanoroads.text.encode import EncodedRow, cut_prompt, encode_row, left_out_line
from nanoroads.text.layouts import SAME_ANSWERS, Texts
from nanoroads.text.rows import parse, raw_rows
from nanoroads.text.split import hold_out, prompt_keys, shared_prompts

Layout = Callable[[dict], Texts]  # a function of layouts.py


SAME_TOKENS = f"{SAME_ANSWERS} once encoded and cut"


class Limits(NamedTuple):
    """How long the rows of a file may be, in tokens, and what becomes of those that do not fit."""

    context: int  # the model's block_size
    # None: only the context limits them.
    max_prompt: int | None = None  # the last tokens are kept
    max_response: int | None = None  # the first ones are kept, and then there is no EOS
    skip_bad_rows: bool = False  # leave out rows that do not fit, and say how many
    hint: str = ""  # for rows that are too long; appended to the error, so it begins with a space
    row_hint: str = ""  # the same for any row that cannot be used


@dataclass
class Rows:
    """A file as tokens: N prompts with K responses each, and the prompts as text."""

    prompts: list[array]  # N arrays of tokens
    responses: list[list[array]]  # N lists of K arrays of tokens; K = 0 for a file of prompts
    texts: list[str]  # N prompts as text, before they are cut

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Sequence[int]) -> tuple[list[array], list[list[array]]]:
        """(prompts, responses) of the rows with these indices, as `pack` takes them."""
        return [self.prompts[i] for i in indices], [self.responses[i] for i in indices]

    def select(self, indices: Sequence[int]) -> "Rows":
        """The rows with these indices, as Rows."""
        prompts, responses = self.take(indices)
        return Rows(prompts, responses, [self.texts[i] for i in indices])

    def slice(self, begin: int, end: int) -> "Rows":
        """Rows begin to end - 1."""
        return Rows(self.prompts[begin:end], self.responses[begin:end], self.texts[begin:end])

    def response_tokens(self, indices: Sequence[int]) -> int:
        """The number of response tokens in the rows with these indices."""
        return sum(len(response) for i in indices for response in self.responses[i])

    def lengths(self) -> list[list[int]]:
        """The lengths of the responses, N lists of K."""
        return [[len(response) for response in group] for group in self.responses]

    def unique_prompts(self) -> "Rows":
        """Each prompt once, where it stands first, without responses: what RL samples from.

        Two texts are one prompt if the model reads the same tokens."""
        first = {}  # prompt as bytes -> where it stands first
        for i, key in enumerate(prompt_keys(self.prompts)):
            first.setdefault(key, i)
        kept = self.select(list(first.values()))
        return Rows(kept.prompts, [[] for _ in kept.prompts], kept.texts)


# ---------------------------------------------------------------- limits


def fit(encoding, row, limits):
    """Cut an EncodedRow to the limits. Raises InputError if it does not fit or teaches nothing."""
    prompt, responses = row.prompt, row.responses
    if limits.max_prompt:
        prompt = cut_prompt(encoding, prompt, limits.max_prompt)
    if limits.max_response:  # a response that is cut has no EOS, and must not learn one
        responses = [response[: limits.max_response] for response in responses]
    if not prompt:
        raise InputError("the prompt is empty")
    if len(responses) == 2 and responses[0] == responses[1]:
        raise InputError(SAME_TOKENS)
    longest_response = max(map(len, responses), default=1)  # a prompt alone: room for one token
    longest = len(prompt) + longest_response
    if longest > limits.context:
        sizes = f"{longest} tokens, the model's context is {limits.context}"
        raise InputError(f"prompt and response take {sizes}{limits.hint}")
    return row._replace(prompt=prompt, responses=responses)


# ---------------------------------------------------------------- a file


class Reading(NamedTuple):
    """One row of a file, as far as it could be read."""

    number: int  # of its line, from 1
    row: dict
    texts: Texts | None
    whole: EncodedRow | None  # before the limits cut it
    encoded: EncodedRow | None  # what is trained
    error: InputError | None  # why the rest is missing


def readings(path: str | Path, layout: Layout, encoding: tiktoken.Encoding, limits: Limits):
    """Yields a Reading of every row of a file, good or bad. Raises InputError for the file itself."""
    for number, raw_row in tracked(raw_rows(path), f"reading {path}", "row"):
        row = {}
        texts = whole = encoded = error = None
        try:
            row = parse(raw_row)
            texts = layout(row)
            whole = encode_row(encoding, texts.prompt, texts.answers, tools=texts.tools)
            encoded = fit(encoding, whole, limits)
        except InputError as caught:
            error = caught
        yield Reading(number, row, texts, whole, encoded, error)


def load(path: str | Path, layout: Layout, encoding: tiktoken.Encoding, limits: Limits) -> Rows:
    """Read a whole file, and say which of its columns nobody reads. layout: a function of layouts.py.

    A row that does not fit raises InputError with file:row; limits.skip_bad_rows leaves it out."""
    loaded = Rows([], [], [])
    columns = Columns()
    errors = []
    left_out = ""  # what the template drops of the generation prompt, from the first such row
    for reading in readings(path, layout, encoding, limits):
        if reading.error:
            errors.append(f"{path}:{reading.number}: {reading.error}")
            if not limits.skip_bad_rows:
                raise InputError(errors[0] + limits.row_hint) from None
            continue
        append(loaded, reading.encoded)
        columns.add(reading.row, reading.texts)
        left_out = left_out or reading.whole.left_out
    if not loaded.prompts:
        raise InputError(f"{path}: no usable row; the first error: {errors[0]}")
    if errors:
        rows = f"{len(errors):,} bad rows of {len(errors) + len(loaded):,}"
        print(printable(f"{path}: skipped {rows}; the first: {errors[0]}"))
    if left_out:
        print(printable(f"{path}: {left_out_line(left_out)}"))
    for line in columns.lines():
        print(printable(f"{path}: {line}"))
    return loaded


def append(rows, encoded):
    """Add an EncodedRow to Rows."""
    # An array takes 4 bytes per token, a list about 36.
    rows.prompts.append(array("i", encoded.prompt))
    rows.responses.append([array("i", response) for response in encoded.responses])
    rows.texts.append(encoded.text)


def load_split(
    path: str | Path,
    held_out_path: str | Path | None,
    layout: Layout,
    encoding: tiktoken.Encoding,
    limits: Limits,
) -> tuple[Rows, Rows]:
    """(training rows, held-out rows). Raises InputError.

    held_out_path None: those of about 5 % of the file, at most 256 rows (more if every prompt has more rows
    than that); see split.py."""
    rows = load(path, layout, encoding, limits)
    return split(rows, path, held_out_path, layout, encoding, limits)


def split(rows, path, held_out_path, layout, encoding, limits):
    """The same for a file whose rows are loaded already."""
    if held_out_path is None:
        return hold_out(rows, path)
    test = load(held_out_path, layout, encoding, limits)
    shared = shared_prompts(rows, test)
    if shared:
        prompts = f"{shared:,} of its {len(test.unique_prompts()):,} prompts"
        print(printable(f"{held_out_path}: {prompts} are also in {path}"))
    return rows, test
