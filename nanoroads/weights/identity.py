"""What a thing was made of: hashes of contents, never of places, sizes or dates.

A file that was moved, copied or touched is the same file; one that was edited is another, though
it kept its length. And where a run's folder says that its tokenizer and its reference are.
"""

import hashlib
import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path

from nanoroads.errors import InputError
from nanoroads.weights.files import local_folder, read_config
from nanoroads.weights.folder import TEMPLATES, own_file

# What decides how a Hugging Face folder reads text: the beginnings of the files' names.
TEXT_FILES = ("tokenizer", "special_tokens", "chat_template", "generation_config")
# What a run's config.json says of the model itself. The rest is of its training.
MODEL_FIELDS = ("model", "beta")
LARGE = 4_000_000_000  # bytes; from here on it takes seconds to read them

# ---------------------------------------------------------------- hashes


def of_bytes(data: bytes) -> str:
    """A hash of bytes, as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def of_value(value) -> str:
    """A hash of a value that JSON can hold."""
    return of_bytes(json.dumps(value, sort_keys=True).encode())


def of_file(path: Path) -> str:
    """A hash of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(partial(file.read, 1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def of_files(paths: list[Path]) -> str:
    """One hash of several files: their names and their contents, in any order."""
    lines = [f"{path.name} {of_file(path)}" for path in sorted(paths)]
    return of_bytes("\n".join(lines).encode())


def of_model(folder: str | Path) -> dict[str, str]:
    """{"config", "weights", "tokenizer": hash} of a run's folder or a Hugging Face folder.

    Raises InputError for a folder without a config.json."""
    config = read_config(folder)
    path = local_folder(folder)
    weights = weight_files(path)
    say_if_large(folder, weights)
    if "model_type" in config:  # Hugging Face's
        fields = config
        tokenizer_folder = path
    else:
        tokenizer_folder = Path(find(folder, config, "tokenizer"))
        fields = {name: config.get(name) for name in MODEL_FIELDS}
        if "lora" in config:  # what the weights that its own file does not hold were
            fields["lora"] = config["lora"]
        if not tokenizer_folder.is_dir():  # roadmap or gpt2
            fields["tokenizer"] = str(tokenizer_folder)
    parts = {"config": of_value(fields), "weights": of_files(weights)}
    return {**parts, **of_tokenizer(tokenizer_folder)}


def of_tokenizer(folder: Path) -> dict[str, str]:
    """{"tokenizer": hash} of a folder's tokenizer files; {} where there are none."""
    if not folder.is_dir():  # roadmap or gpt2
        return {}
    names = [path.name for path in folder.iterdir() if path.name.startswith(TEXT_FILES)]
    names += [f"{TEMPLATES}/{path.name}" for path in folder.glob(f"{TEMPLATES}/*.jinja")]
    files = own_files(folder, names)
    return {"tokenizer": of_files(files)} if files else {}


def say_if_large(name, paths):
    """Print a line where it takes a while to read these files of `name`."""
    size = sum(path.stat().st_size for path in paths)
    if size > LARGE:
        print(f"{name}: hashing {size / 1e9:.0f} GB, to know them again on --resume", flush=True)


def weight_files(folder):
    """The files with a model's weights: one, or the shards and their index."""
    whole = own_files(folder, ["model.safetensors"])
    if whole:
        return whole
    return own_files(folder, [path.name for path in folder.glob("*.safetensors*")])


def own_files(folder, names):
    """The paths of these files of a folder, without those that lie outside of it: nobody reads them."""
    paths = []
    for name in names:
        try:
            path = own_file(folder, name)
        except InputError:  # whoever needs the file says so
            continue
        if path is not None:
            paths.append(path)
    return paths


def of_module(name: str) -> dict[str, str]:
    """{"source": hash} of the module of `module:function`, without what that imports.

    {}: there is no such module, or it has no source file."""
    module, _, _ = name.partition(":")
    sys.path.insert(0, "")  # the module may lie in the user's own directory
    try:
        spec = importlib.util.find_spec(module)
    except (Exception, SystemExit):  # whatever its parent package does when it is imported
        return {}
    finally:
        sys.path.remove("")
    if spec is None or not spec.has_location:
        return {}
    return {"source": of_file(Path(spec.origin))}


# ---------------------------------------------------------------- where things are


def places(folder: Path, name: str) -> dict[str, str]:
    """How a run in `folder` finds the folder `name` again: {"relative", "absolute"} paths.

    Relative to the run's own folder, for when both are moved together."""
    absolute = Path(name).resolve()
    return {"relative": os.path.relpath(absolute, folder.resolve()), "absolute": str(absolute)}


def find(folder: str | Path, config: dict, what: str) -> str:
    """The tokenizer, the reference or the base of a run, as a name or an existing path.

    folder: the run's. config: its config.json. what: "tokenizer", "reference" or "base". Looks beside the
    run first, then where the folder was, then where the name leads as it was typed. Raises
    InputError that names what is gone."""
    typed = config.get(what, str(folder))
    kept = config.get("places", {}).get(what)
    if not isinstance(kept, dict):  # roadmap, gpt2, hf:org/name; or a run of an older version
        return str(local_folder(typed))
    run_folder = local_folder(folder)
    absolute = str(kept.get("absolute"))
    for path in ((run_folder / str(kept.get("relative"))).resolve(), Path(absolute), Path(typed)):
        if path.is_dir():
            return str(path)
    raise InputError(f"{folder}: its {what}, the folder {absolute}, is gone; put it back there")
