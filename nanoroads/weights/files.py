"""Files on disk: JSON and safetensors, each whole or not there.

They are written beside their place and renamed into it. Nothing is ever unpickled.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanoroads.errors import InputError, nearest_first
from nanoroads.weights.folder import check_regular, own_file, read_json_object
from nanoroads.weights.sharded import gathered

UMASK = os.umask(0)  # the only way to read it is to set it
os.umask(UMASK)
# What a model's weights may be in a file. Smaller types are quantised: they need scales that GPT has no
# place for.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TEMPORARY = ".nanoroads-half-written-"  # begins the names of folders in which files are being written
OURS = "nanoroads"  # the name of the text in a safetensors file of ours
# Keys that our config.json may hold, and their types.
CONFIG_TYPES = {
    "args": dict,
    "model": dict,
    "tokenizer": str,
    "reference": str,
    "beta": (int, float),
    "kl": (int, float),
    "lora": dict,
    "base": str,
    "places": dict,
    "inputs": dict,
    "machine": dict,
}

# ---------------------------------------------------------------- writing


def write_atomic(path, write):
    """Call write(temporary path), flush the file to disk, then rename it to `path`.

    The temporary file lies in a folder of its own, whose name is ours alone, since safetensors makes
    temporary files too. Raises OSError, which always names `path`, and InputError where safetensors
    cannot write: the disk is full, or may not be written to."""
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            write(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~UMASK)  # safetensors makes its files private
            os.replace(temporary, path)
    except SafetensorError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise naming(path, error) from None


def naming(path, error):
    """An OSError that names the file: one of a full disk, in the middle of writing, names none."""
    return OSError(error.errno, error.strerror or str(error), str(path))


def open_own(path, mode):
    """Open a text file that is ours to write to.

    Raises InputError for a link of that name: what it leads to is not ours."""
    path = Path(path)
    refuse_other_kinds(path)
    if path.is_symlink():
        raise InputError(f"{path}: a link, where a file of ours is written; move it away, and start again")
    return open(path, mode, encoding="utf-8", errors="replace")


def append_line(path, text):
    """Add one line to a text file of ours. Raises OSError, which names the file, or InputError."""
    try:
        with open_own(path, "a") as file:
            file.write(text + "\n")
    except OSError as error:
        raise naming(path, error) from None


def write_text(path, text):
    """A text file, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path, data):
    """A file of bytes, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def json_bytes(value):
    """A value as a .json file has it, indented."""
    return (json.dumps(value, indent=2) + "\n").encode()


def jsonl_bytes(rows):
    """Dicts as a .jsonl file has them."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_json(path, value):
    """A value as indented JSON, whole or not at all."""
    write_bytes(path, json_bytes(value))


def write_safetensors(path, tensors, metadata=None, hashed=True):
    """{name: tensor} with {name: text} beside them, whole or not at all.

    hashed: with a hash of both, by which `read_safetensors` notices that the file was damaged."""
    if hashed:
        fields = {**(metadata or {}), "sha256": content_hash(tensors, metadata or {})}
        # One text, since safetensors writes several in any order: equal runs have equal files.
        metadata = {OURS: json.dumps(fields, sort_keys=True)}
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def content_hash(tensors, metadata):
    """A hash of {name: tensor on the CPU} and {name: text}, to notice a damaged file."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    hash_tensors(digest, tensors)
    return digest.hexdigest()


def hash_tensors(digest, tensors):
    """Add {name: tensor} to a hash of hashlib's, one at a time on the CPU."""
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(gathered(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def delete_half_written(folder):
    """Remove what a killed process of ours was writing in the folder, and nothing else."""
    for path in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------- reading


def read_safetensors(path):
    """({name: tensor}, {name: text} of its metadata). Raises InputError."""
    check_regular(path)
    refuse_odd_bytes(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None
    if OURS not in metadata:
        return tensors, metadata
    damaged = InputError(f"{path}: not a whole safetensors file (its contents have changed)")
    try:
        fields = dict(json.loads(metadata[OURS]))
    except (ValueError, TypeError, RecursionError):
        raise damaged from None
    expected = fields.pop("sha256", None)
    if content_hash(tensors, fields) != expected:
        raise damaged
    return tensors, fields


def refuse_other_kinds(path):
    """Raises InputError where a folder, a pipe or a link to nothing has the name of a file."""
    if (path.exists() or path.is_symlink()) and not path.is_file():
        raise InputError(f"{path}: not a file; move it away, and start again")


def refuse_odd_bytes(path):
    """Raises InputError for a path that is no UTF-8, which safetensors cannot open."""
    try:
        os.fsencode(path).decode()  # its bytes: in the C locale Python reads no UTF-8, and may be wrong
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not a name in UTF-8, which safetensors takes; rename it") from None


def check_weight(tensor, name, path):
    """Raises InputError unless a file's tensor can be a weight: of WEIGHT_DTYPES, and finite."""
    if tensor.dtype not in WEIGHT_DTYPES:
        raise InputError(
            f"{path}: holds no floating-point tensor {name} of 16 bits or more, but {tensor.dtype}"
        )
    if not torch.isfinite(tensor).all():
        raise InputError(f"{path}: {name} holds NaN or infinity; the file is damaged, or its model diverged")


def local_folder(folder):
    """A folder's path; for `hf:org/name` the path that huggingface_hub downloads it to.

    Raises InputError."""
    name = str(folder)
    if not name.startswith("hf:"):
        return Path(folder)
    try:
        from huggingface_hub import snapshot_download

        wanted = ["*.json", "*.safetensors", "*.jinja"]
        return Path(snapshot_download(name.removeprefix("hf:"), allow_patterns=wanted))
    except ImportError:
        raise InputError(f"{name}: to download it, pip install 'nanoroads[hf]'") from None
    except Exception as error:  # of the hub, the network or the disk: too many kinds to name
        raise InputError(f"{name}: {error}") from None


def read_config(folder):
    """config.json of one of our runs or of a Hugging Face folder, as a dict. Raises InputError.

    Of the second without the keys that mean something in ours."""
    path = own_file(local_folder(folder), "config.json")
    if path is None:
        raise InputError(f"{folder}: no such run (it has no config.json){runs_like(Path(folder))}")
    config = read_json_object(path)
    if "model_type" in config:  # Hugging Face's; weights/hf_config.py checks it
        return {name: value for name, value in config.items() if name not in CONFIG_TYPES}
    for name, kind in CONFIG_TYPES.items():
        if name in config and not isinstance(config[name], kind):
            raise InputError(f"{path}: {name} is {config[name]!r}")
    data = config.get("args", {}).get("data", "")
    if not isinstance(data, str):
        raise InputError(f"{path}: its args name the data {data!r}")
    if not 0 < config.get("beta", 1.0) < math.inf:
        raise InputError(f"{path}: beta is {config['beta']!r}, not a positive number")
    return config


def runs_like(folder):
    """The end of an error about a folder that is no run: the runs beside it and in it."""
    beside = [path.parent for path in folder.parent.glob("*/config.json")]
    inside = [path.parent for path in folder.glob("*/config.json")]
    runs = [str(path) for path in [*beside, *inside]]
    if not runs:
        return ""
    return f"; there is {nearest_first(str(folder), runs, most=2)}"


def cpu_weights(model, without=()):
    """A model's state_dict on the CPU, without the second name of a tied embedding, nor those in `without`.

    safetensors refuses tensors that share memory."""
    tensors = model.state_dict()
    if model.config.tied and model.config.head == "lm":
        del tensors["lm_head.weight"]
    kept = {name: tensor for name, tensor in tensors.items() if name not in without}
    return {name: gathered(tensor).cpu().contiguous() for name, tensor in kept.items()}


def all_finite(tensors):
    """Whether no tensor of {name: tensor} holds a NaN or an infinity."""
    return all(torch.isfinite(tensor).all() for tensor in tensors.values())
