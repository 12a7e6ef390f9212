"""A user's file of rows -> tokens, each row within the limits, and some rows held out."""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tiktoken
from tqdm import tqdm

from nanoroads.errors import InputError
from nanoroads.text.encode import EncodedRow, cut_prompt, encode_row
from nanoroads.text.layouts import TextOrMessages
from nanoroads.text.rows import parse, raw_rows

# A function of layouts.py: row -> (prompt, answers).
Layout = Callable[[dict], tuple[TextOrMessages, list[TextOrMessages]]]


class Limits(NamedTuple):
    """How long the rows of a file may be, in tokens, and what becomes of those that do not fit."""

    context: int  # the model's block_size
    max_prompt: int | None = None  # keep the last max_prompt tokens; None: only the context limits
    max_response: int | None = (
        None  # keep the first max_response tokens, then no EOS; None: only the context limits
    )
    skip_bad_rows: bool = False  # leave out rows that do not fit, and say how many
    hint: str = ""  # appended to the error, so it begins with a space


@dataclass
class Rows:
    """A file as tokens: N prompts with K responses each, and the prompts as text."""

    prompts: list[array]  # N arrays of tokens
    responses: list[list[array]]  # N lists of K arrays of tokens; K = 0 for a file of prompts
    texts: list[str]  # N prompts as text

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
        """Each prompt once, where it stands first, without responses: what RL samples from."""
        first = {}  # prompt as text -> where it stands first
        for i, text in enumerate(self.texts):
            first.setdefault(text, i)
        prompts = [self.prompts[i] for i in first.values()]
        return Rows(prompts, [[] for _ in prompts], list(first))


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
        raise InputError("'chosen' and 'rejected' are the same once encoded and cut")
    longest_response = max(map(len, responses), default=1)  # a prompt alone: room for one token
    longest = len(prompt) + longest_response
    if longest > limits.context:
        sizes = f"{longest} tokens, the model's context is {limits.context}"
        raise InputError(f"prompt and response take {sizes}{limits.hint}")
    return EncodedRow(prompt, responses, row.text)


# ---------------------------------------------------------------- a file


def load(path: str | Path, layout: Layout, encoding: tiktoken.Encoding, limits: Limits) -> Rows:
    """Read a whole file. layout: a function of layouts.py, row -> (prompt, answers).

    A row that does not fit raises InputError with file:row; limits.skip_bad_rows leaves it out."""
    loaded = Rows([], [], [])
    errors = []
    for number, raw_row in tqdm(raw_rows(path), desc=f"reading {path}", unit="row", disable=None):
        try:
            prompt, answers = layout(parse(raw_row))
            encoded = fit(encoding, encode_row(encoding, prompt, answers), limits)
        except InputError as error:
            errors.append(f"{path}:{number}: {error}")
            if not limits.skip_bad_rows:
                raise InputError(errors[0]) from None
            continue
        # An array takes 4 bytes per token, a list about 36.
        loaded.prompts.append(array("i", encoded.prompt))
        loaded.responses.append([array("i", response) for response in encoded.responses])
        loaded.texts.append(encoded.text)
    if not loaded.prompts:
        raise InputError(f"{path}: no usable row; the first error: {errors[0]}")
    if errors:
        print(f"{path}: skipped {len(errors):,} bad rows of {number:,}; the first: {errors[0]}")
    return loaded


def load_split(
    path: str | Path,
    held_out_path: str | Path | None,
    layout: Layout,
    encoding: tiktoken.Encoding,
    limits: Limits,
) -> tuple[Rows, Rows]:
    """(training rows, held-out rows). Raises InputError.

    held_out_path None: the last 5 % of the file, at most 256 rows."""
    rows = load(path, layout, encoding, limits)
    if held_out_path is not None:
        return rows, load(held_out_path, layout, encoding, limits)
    return hold_out(rows, path)


def hold_out(
    rows: Rows, path: str | Path = "the data", share: float = 0.05, most: int = 256
) -> tuple[Rows, Rows]:
    """(all but the last rows, the last rows for evaluation). Raises InputError for a single row.

    share: the fraction of the rows to hold out, but at least one row and at most `most`."""
    if len(rows) < 2:
        raise InputError(f"{path}: holds one row; at least two are needed, one of them to be held out")
    held_out = max(1, min(most, int(len(rows) * share)))
    boundary = len(rows) - held_out
    return rows.slice(0, boundary), rows.slice(boundary, len(rows))
