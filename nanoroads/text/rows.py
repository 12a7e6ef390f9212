"""Files of rows: `.jsonl`, `.jsonl.gz`, `.parquet`, or `hf:org/name[:split]` -> dicts.

Every error names the file, and the row where there is one. `parse` leaves both to its caller.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanoroads.errors import InputError
from nanoroads.weights.files import write_text


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """A .jsonl file of dicts, whole or not at all. Makes its directory."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def raw_rows(path: str | Path) -> Iterator[tuple[int, bytes | dict]]:
    """Yields (row number from 1, a line as bytes or a row as a dict); `parse` takes either.

    Raises InputError: no file, no rows, a library is missing."""
    rows = open_rows(path)
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: not a whole gzip file ({error})") from None
    finally:
        rows.close()
    if number == 0:
        raise InputError(f"{path}: holds no rows")


def open_rows(path):
    """What yields lines or rows and can be closed. Raises InputError: no such file."""
    name = str(path)
    if name.startswith("hf:"):
        return hub_rows(name)
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    if name.endswith(".parquet"):
        return parquet_rows(path)
    if name.endswith(".gz"):
        return gzip.open(path)
    return open(path, "rb")


def parquet_rows(path):
    """Yields the rows of a parquet file as dicts, a thousand read at a time. Raises InputError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: to read it, pip install 'nanoroads[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a whole parquet file ({error})") from None


def hub_rows(path):
    """Yields the rows of a data set of the Hugging Face hub as dicts. Raises InputError."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path}: to read it, pip install 'nanoroads[hf]'") from None
    name, _, split = path.removeprefix("hf:").partition(":")
    try:
        yield from datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        # Whatever `datasets`, the network or the disk raises: the name is wrong or out of reach.
        raise InputError(f"{path}: {error}") from None


def parse(row: bytes | dict) -> dict:
    """A line or a row -> dict. Raises InputError: not JSON, not UTF-8, not an object."""
    try:
        parsed = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a JSON object ({error})") from None
    if not isinstance(parsed, dict):
        raise InputError(f"not a JSON object, but {type(parsed).__name__}")
    return parsed
