"""Which rows are held out for evaluation: by prompt, so that no prompt is on both sides.

A model trained on some answers to a prompt cannot be tested fairly on others to it; and in a file that
holds its rows twice, a row would be measured on itself."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from nanoroads.errors import InputError, printable


def hold_out(rows, path: str | Path = "the data", share: float = 0.05, most: int = 256):
    """data Rows -> (rows for training, rows for evaluation), and says how many. Raises InputError.

    See held_out_rows. A file of one prompt only is split within the prompt, with a line that says so."""
    if len(rows) < 2:
        raise InputError(f"{path}: holds one row; at least two are needed, one of them to be held out")
    keys = prompt_keys(rows.prompts)
    held_out = held_out_rows(keys, share, most)
    is_held_out = set(held_out)
    train = rows.select([i for i in range(len(rows)) if i not in is_held_out])
    test = rows.select(held_out)

    test_prompts = len({keys[i] for i in held_out})
    if len(set(keys)) == 1:
        shared = f"the {len(test):,} held-out rows share it"
        print(printable(f"{path}: all {len(rows):,} rows have one prompt, so {shared}"))
    else:
        prompts = f"{test_prompts:,} of {len(set(keys)):,} prompts"
        print(printable(f"{path}: held out {len(test):,} of {len(rows):,} rows, those of {prompts}"))
    return train, test


def prompt_keys(prompts) -> list[bytes]:
    """Prompts as arrays of tokens -> what they can be compared by: as the model reads them.

    16 bytes each, however long the prompts are."""
    return [hashlib.blake2b(prompt.tobytes(), digest_size=16).digest() for prompt in prompts]


def held_out_rows(keys: Sequence[bytes], share: float = 0.05, most: int = 256) -> list[int]:
    """Which rows to hold out, in the order of the file. keys: each row's prompt.

    share: the fraction of the rows, but at least one row and at most `most` (more if every prompt has
    more rows than that). Prompts are taken from the end of the file, each with all its rows, as long as
    they do not exceed it: where no prompt comes twice, these are the last rows. If every prompt has too
    many rows, it is the one with the fewest: of two prompts with 500 rows each, half the file."""
    limit = max(1, min(most, int(len(keys) * share)))
    rows_of = Counter(keys)
    if len(rows_of) == 1:
        return list(range(len(keys) - limit, len(keys)))

    held_out_keys = set()
    count = 0  # rows
    for key in reversed(keys):
        if key not in held_out_keys and count + rows_of[key] <= limit:
            held_out_keys.add(key)
            count += rows_of[key]
        if count == limit:
            break
    if not held_out_keys:
        last_first = list(dict.fromkeys(reversed(keys)))
        held_out_keys.add(min(last_first, key=rows_of.get))
    return [i for i, key in enumerate(keys) if key in held_out_keys]


def shared_prompts(train, test) -> int:
    """How many different prompts of `test` (data Rows) are also in `train`."""
    return len(set(prompt_keys(train.prompts)) & set(prompt_keys(test.prompts)))
