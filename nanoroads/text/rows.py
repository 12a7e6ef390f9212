"""Files of rows: `.jsonl`, `.jsonl.gz`, `.parquet`, or `hf:org/name[:split]` -> dicts.

A row's number is that of its line; blank lines are passed over. Every error names the file, and the row
where there is one. `parse` leaves both to its caller.
"""

import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanoroads.errors import InputError, nearest_first
from nanoroads.text.bounds import OutOfBounds, bounded
from nanoroads.text.values import plain
from nanoroads.weights.files import jsonl_bytes, write_bytes
from nanoroads.weights.folder import check_regular

# No row of text is longer; a small gzip file may unpack to a line that fills the memory.
MOST_LINE_BYTES = 2**26
# What a thousand rows of a parquet file may take while they are read.
MOST_BATCH_SECONDS = 60
MOST_BATCH_BYTES = 2**31
BLANK = b" \t\r\n\0\x1a"  # what a line without a row consists of; zeros stand where a machine crashed
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# How files of other kinds begin, and what to do with them.
OTHER_KINDS = [
    (b"[", "a JSON array, not one object per line; jq -c '.[]' makes such lines"),
    (b"PAR1", "a parquet file; name it .parquet"),
    (b"\x1f\x8b", "a gzip file; name it .jsonl.gz"),
    (b"\xff\xfe", "UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "UTF-16; save it as UTF-8"),
    (b"PK\x03\x04", "a zip file; unpack it"),
    (b"BZh", "a bzip2 file; unpack it"),
    (b"\xfd7zXZ", "an xz file; unpack it"),
    (b"ARROW1", "an Arrow file; write it as parquet"),
    (b"\xff\xff\xff\xff", "an Arrow file; write it as parquet"),
    (b"\x28\xb5\x2f\xfd", "a zstandard file; unpack it"),
]
TABLES = (".csv", ".tsv")  # with their many dialects: pandas reads them
ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Write dicts as a .jsonl file; never a partial one. Makes its directory."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, jsonl_bytes(rows))


def raw_rows(path: str | Path) -> Iterator[tuple[int, bytes | dict]]:
    """Yields (row number from 1, a line as bytes or a row as a dict); `parse` takes either.

    Raises InputError: no file, no rows, a library is missing."""
    rows = open_rows(path)
    number = 0
    is_empty = True
    try:
        for number, row in enumerate(rows, 1):
            if isinstance(row, bytes):
                if number == 1:
                    row = row.removeprefix(BYTE_ORDER_MARK)
                row = row.strip(BLANK)
                if not row:
                    continue
                if is_empty:
                    refuse_other_kinds(row, path)
            is_empty = False
            yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: not a whole gzip file ({error})") from None
    finally:
        rows.close()
    if is_empty:
        raise InputError(f"{path}: holds no rows")


def refuse_other_kinds(line, path):
    """Raises InputError if a file's first line is that of another kind of file."""
    for beginning, kind in OTHER_KINDS:
        if line.startswith(beginning):
            raise InputError(f"{path}: {kind}")
    if line == b"{":
        kind = "JSON over several lines, not one object per line; jq -c . makes such lines"
        raise InputError(f"{path}: {kind}")


def open_rows(path):
    """What yields lines or rows and can be closed. Raises InputError: no such file."""
    name = str(path)
    if name.startswith("hf:"):
        return hub_rows(name)
    if not Path(path).exists() or Path(path).is_dir():
        raise InputError(f"{path}: no such file{files_like(Path(path))}")
    if name.endswith(TABLES):
        lines = 'pandas.read_csv(FILE).to_json("rows.jsonl", orient="records", lines=True)'
        raise InputError(f"{path}: a table; {lines} makes rows of it")
    check_regular(path)  # a pipe could be read only once, and --resume reads the rows again
    if name.endswith(".parquet"):
        return parquet_rows(path)
    if name.endswith(".gz"):
        return bounded_lines(gzip.open(path), path)
    return bounded_lines(open(path, "rb"), path)


def bounded_lines(file, path):
    """Yields the lines of an open file of bytes, and closes it.

    Raises InputError for a line that does not end: a small gzip file may hold a very long one."""
    with file:
        for number in itertools.count(1):
            line = file.readline(MOST_LINE_BYTES + 1)
            if not line:
                return
            if len(line) > MOST_LINE_BYTES:
                raise InputError(f"{path}:{number}: a line of more than {MOST_LINE_BYTES:,} bytes")
            yield line


def files_like(path):
    """The end of an error about a file that is not there: what there is instead."""
    if path.is_dir():
        return ", but a folder"
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    files = [file.name for file in path.parent.iterdir() if file.name.endswith(ENDINGS)]
    if not files:
        return ""
    return f"; {path.parent} has {nearest_first(path.name, files, most=3)}"


def parquet_rows(path):
    """Yields the rows of a parquet file as dicts, a thousand read at a time. Raises InputError."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: to read it, pip install 'nanoroads[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(1000)
            rows = next_rows(batches)
            while rows is not None:
                yield from rows
                rows = next_rows(batches)
    except OutOfBounds as error:
        raise InputError(f"{path}: was stopped while it was read ({error})") from None
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a whole parquet file ({error})") from None


def next_rows(batches):
    """The rows of the next batch as dicts; None behind the last one. Raises OutOfBounds.

    A parquet file of a few KB can hold one long text in a million rows."""
    with bounded(MOST_BATCH_SECONDS, MOST_BATCH_BYTES):
        batch = next(batches, None)
        return None if batch is None else batch.to_pylist(maps_as_pydicts="lossy")


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
    """A line or a row -> dict of plain values without what is absent.

    Raises InputError: not JSON, not UTF-8, not an object."""
    try:
        parsed = plain(json.loads(row) if isinstance(row, bytes) else row)
    except InputError as error:
        raise InputError(f"not a row ({error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a JSON object ({error})") from None
    if not isinstance(parsed, dict):
        raise InputError(f"not a JSON object, but {type(parsed).__name__}")
    return parsed
