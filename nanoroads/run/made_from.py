"""What a file was made from, and whether it may be used again: a record beside it.

FILE.made_from.json    {"made_from": {name: setting or hash}, "contents": {file: hash}, "seconds": s}

`contents` are FILE and what was made together with it, as they were then. Files are compared by
what they hold (SHA-256), never by size or date.

The rule, here and in report/ledger.py: what we made and nobody has changed is made again when what
it was made from has changed; what somebody has changed, or what has no record, may be somebody's
work and is refused by name. That the code has changed is not noticed.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from nanoroads.errors import InputError
from nanoroads.weights.files import read_config, read_json_object, write_bytes, write_json
from nanoroads.weights.identity import of_bytes, of_file, of_value

# ---------------------------------------------------------------- hashes


def policy_hash(folder: Path) -> str:
    """SHA-256 of what a finished run computes: its shape, its tokenizer's name, its weights."""
    config = read_config(folder)
    weights = folder / "model.safetensors"
    if not weights.exists():
        raise InputError(f"{weights}: no such file (a run that is not finished goes on with --resume)")
    parts = [config.get("model"), config.get("tokenizer"), of_file(weights)]
    if "lora" in config:  # the file holds adapters alone
        parts.append(config["lora"])
    return of_value(parts)


# ---------------------------------------------------------------- records


def record_path(path: Path) -> Path:
    """Where the record of a file lies."""
    return path.with_name(f"{path.name}.made_from.json")


def read_record(path: Path) -> dict | None:
    """The record of a file, None where there is none. Raises InputError for a damaged one."""
    record = record_path(path)
    advice = f"delete it and {path}, and start again"
    if not record.exists():
        return None
    value = read_state(record, advice)
    fields = {"made_from": is_object, "contents": is_contents, "seconds": is_seconds}
    check_fields(value, fields, record, advice)
    return value


def unchanged_record(path: Path) -> dict | None:
    """The record of a file, if none of the files that it names has changed; None: there is no file.

    Raises InputError, by name: a file has changed since it was made, or has no record."""
    record = read_record(path)
    if record is None:
        if path.exists():
            raise InputError(f"{path}: no record says what it was made from; delete it, and it is made again")
        return None
    for name, made in record["contents"].items():
        check_unchanged(path.with_name(name), made)
    return record


def check_unchanged(path: Path, made: str):
    """Raises InputError for a file that is there and whose hash is not `made` any more."""
    if path.exists() and (not path.is_file() or of_file(path) != made):
        raise InputError(
            f"{path}: has changed since it was made; delete it to have it made again, or move it away"
        )


def is_complete(path: Path, record: dict) -> bool:
    """Whether all files of a record are there."""
    return all(path.with_name(name).exists() for name in record["contents"])


# ---------------------------------------------------------------- making


def make_or_keep(path: Path, made_from: dict, make: Callable[[], dict[str, bytes]]) -> float:
    """See to it that `path` is there and was made from `made_from`. Returns the seconds that it took.

    make() -> {file name: bytes}, the files that are then written beside the record, `path` among
    them. It is called only where they are missing, or were made from something else. Raises
    InputError, by name, for files that somebody has changed."""
    record = unchanged_record(path)
    made_from = json.loads(json.dumps(made_from))  # as the record has it: lists for tuples
    if record and record["made_from"] == made_from and is_complete(path, record):
        return record["seconds"]
    begin = time.monotonic()
    files = make()
    seconds = round(time.monotonic() - begin, 1)
    write_made(path, files, made_from, seconds)
    return seconds


def write_made(path: Path, files: dict[str, bytes], made_from: dict, seconds: float):
    """Write files beside the record of `path`, and the record. Their folder is made.

    Raises InputError for a file that is there and not ours, see `unchanged_record`."""
    record = unchanged_record(path)  # again: to make them may have taken hours
    old_names = list(record["contents"]) if record else []
    for name in files:
        if name not in old_names and path.with_name(name).exists():
            raise InputError(f"{path.with_name(name)}: exists; move it away, and start again")
    # Old files go first, and the record comes before the new ones: whenever this is killed, each file
    # that is there is as a record says, and nothing is taken for somebody's work.
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in old_names:
        path.with_name(name).unlink(missing_ok=True)
    contents = {name: of_bytes(data) for name, data in files.items()}
    write_json(record_path(path), {"made_from": made_from, "contents": contents, "seconds": seconds})
    for name, data in files.items():
        write_bytes(path.with_name(name), data)


# ---------------------------------------------------------------- state files


def read_state(path: Path, advice: str) -> dict:
    """A JSON object that a program of ours has written. Raises InputError with `advice` at its end."""
    if not path.is_file():
        raise InputError(f"{path}: not a file; {advice}")
    try:
        return read_json_object(path)
    except InputError as error:
        raise InputError(f"{error}; {advice}") from None


def check_fields(value, fields, path, advice, entry=""):
    """Raises InputError unless `value` is an object whose fields are right.

    fields: {name: function of a field's value that says whether it is right}."""
    where = f"{path}: {entry}".removesuffix(": ")
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object; {advice}")
    for name, is_right in fields.items():
        if not is_right(value.get(name)):
            raise InputError(f"{where}: {name!r} is missing or damaged; {advice}")


def is_object(value):
    return isinstance(value, dict)


def is_text_object(value):
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def is_contents(value):
    """{file name: hash}, of files in one folder."""
    return is_text_object(value) and all(is_file_name(name) for name in value)


def is_file_name(text):
    """Whether a text names a file beside another: it leads nowhere else."""
    return text not in ("", "..") and Path(text).name == text and "\0" not in text


def is_text_list(value):
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def is_seconds(value):
    return type(value) in (int, float) and 0 <= value < math.inf
