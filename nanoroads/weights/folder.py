"""Every file of a model's folder is opened here: the folder may be a stranger's.

Only regular files inside the folder are read, and of what is parsed only so many bytes, nested so
deep. A link inside may lead to another file of the folder. A snapshot in Hugging Face's cache is
made of links to the blobs beside it, which are its own files too.
"""

import json
import os
import stat
from pathlib import Path, PurePosixPath

from nanoroads.errors import InputError

# The largest tokenizer.json that is known is 33 MB, the largest other JSON file of a model 9 MB.
MOST_BYTES = 2**26
MOST_DEPTH = 100  # objects and lists inside one another; a tool's JSON schema has some 20
TEMPLATES = "additional_chat_templates"  # a folder with chat templates by name, as one for tools
MARK_OF_SHARED_BLOBS = ".huggingface-shared-blobs"

# ---------------------------------------------------------------- where a file is


def own_file(folder: str | Path, name: str) -> Path | None:
    """The path of a file of a model's folder, or None where there is none.

    Raises InputError: the name or a link leads out of the folder, or it is no regular file."""
    folder = Path(folder)
    if not is_name_inside(name):
        raise InputError(f"{folder}: {name!r} is not the name of a file in this folder")
    path = folder / name
    if not os.path.lexists(path):
        return None
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(place) for place in own_places(folder)):
        raise InputError(f"{path}: a link to {target}, outside of the folder; copy the file to use it")
    if not target.exists():
        raise InputError(f"{path}: a link to {target}, which is not there")
    check_regular(path)
    return path


def is_name_inside(name):
    """Whether the text is a plain relative path, which cannot lead out of a folder by itself.

    A backslash parts folders on Windows; what is not printable (NUL, half a character) no system
    takes."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def own_places(folder):
    """The real folders whose files belong to a model's folder: itself, and the blobs of a snapshot.

    Hugging Face's cache is CACHE/models--ORG--NAME/snapshots/REVISION, whose links lead to
    CACHE/models--ORG--NAME/blobs; newer versions keep the larger ones in CACHE/blobs, for all
    models together, and mark that folder."""
    root = Path(os.path.realpath(folder))
    places = [root]
    repository = root.parent.parent
    if root.parent.name == "snapshots" and repository.name.startswith("models--"):
        places.append(repository / "blobs")
        shared = repository.parent / "blobs"
        if (shared / MARK_OF_SHARED_BLOBS).is_file():
            places.append(shared)
    # `blobs` may itself be a link to elsewhere.
    return [place for place in places if os.path.realpath(place) == str(place)]


def check_regular(path: str | Path):
    """Raises InputError for a folder, a pipe, a socket or a device: only regular files are opened.

    A pipe gives its contents once, and opening it would wait for a writer. Raises OSError where
    there is no such file."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder, where a file is wanted")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is a pipe or a device; save its contents as a file to read them")


# ---------------------------------------------------------------- what a file holds


def read_bytes(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """The contents of a regular file. Raises InputError where there are more than `most` bytes."""
    check_regular(path)
    with open(path, "rb") as file:
        contents = file.read(most + 1)
    if len(contents) > most:
        raise InputError(f"{path}: is larger than the {most:,} bytes that such a file may have")
    return contents


def parse_json(text: str | bytes):
    """The value that a JSON text holds. Raises ValueError, also where it is nested too deep.

    Of a key that stands twice the last value counts, as for every Python program."""
    too_deep = f"more than {MOST_DEPTH} objects or lists inside one another"
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(too_deep) from None
    level = [value]
    for _ in range(MOST_DEPTH):
        level = lists_and_objects_in(level)
        if not level:
            return value
    raise ValueError(too_deep)


def lists_and_objects_in(values):
    """The lists and objects that stand directly inside the lists and objects among `values`."""
    found = []
    for value in values:
        if isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, list):
            inner = value
        else:
            continue
        found += [part for part in inner if isinstance(part, (dict, list))]
    return found


def read_json_object(path: str | Path) -> dict:
    """The JSON object in a file, as a dict. Raises InputError."""
    contents = read_bytes(path)
    try:
        value = parse_json(contents)
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object, but {type(value).__name__}")
    return value


def read_optional_json(path: str | Path) -> dict:
    """The JSON object in a file that a model's folder need not have; {} without it. Raises InputError."""
    path = Path(path)
    if own_file(path.parent, path.name) is None:
        return {}
    return read_json_object(path)
