"""Files of rows: `.jsonl`, `.jsonl.gz`, `.parquet`, or `hf:org/name[:split]` -> dicts; every error names the file and the row."""

import gzip
import json
import zlib
from pathlib import Path

from nanoroads.errors import InputError
from nanoroads.weights.files import write_text


def write_rows(path, rows):
    """A .jsonl file of dicts, whole or not at all. Makes its directory."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def raw_rows(path):
    """Yields (row number, a line as bytes or a row as a dict). Raises InputError: no file, no rows, a library is missing."""
    name, number = str(path), 0
    if name.startswith("hf:"):
        rows = hub_rows(name)
    elif not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    elif name.endswith(".parquet"):
        rows = parquet_rows(path)
    else:
        rows = gzip.open(path) if name.endswith(".gz") else open(path, "rb")
    try:
        for number, row in enumerate(rows, 1):
            yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: not a whole gzip file ({error})") from None
    finally:
        rows.close()
    if number == 0:
        raise InputError(f"{path}: holds no rows")


def parquet_rows(path):
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
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path}: to read it, pip install 'nanoroads[hf]'") from None
    name, _, split = path.removeprefix("hf:").partition(":")
    try:
        yield from datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # its own, of the network, of the file system: whatever it is, the name was wrong or unreachable
        raise InputError(f"{path}: {error}") from None


def parse(row):
    """A line or a row -> dict. Raises InputError: not JSON, not UTF-8, not an object."""
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a JSON object ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"not a JSON object, but {type(row).__name__}")
    return row
