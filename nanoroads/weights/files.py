"""Files on disk: JSON and safetensors, each whole or not there.

They are written beside their place and renamed into it. Nothing is ever unpickled.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanoroads.errors import InputError

UMASK = os.umask(0)  # the only way to read it is to set it
os.umask(UMASK)
# Keys that our config.json may hold, and their types.
CONFIG_TYPES = {"args": dict, "model": dict, "tokenizer": str, "reference": str, "beta": (int, float)}

# ---------------------------------------------------------------- writing


def write_atomic(path, write):
    """Call write(temporary path), flush the file to disk, then rename it to `path`.

    Raises InputError where safetensors cannot write: the disk is full, or may not be written to."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~UMASK)  # safetensors makes its files private
        os.replace(temporary, path)
    except SafetensorError as error:
        raise InputError(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """A text file, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(text))


def write_json(path, value):
    """A value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_safetensors(path, tensors, metadata=None):
    """{name: tensor} with {name: text} beside them, whole or not at all."""
    write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def delete_half_written(folder):
    """Remove what a killed run was writing: our temporary files, and safetensors' `.tmp??????`."""
    for pattern in ("*.tmp", ".tmp??????"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)  # another process may have removed it


# ---------------------------------------------------------------- reading


def read_json_object(path):
    """The JSON object in a file, as a dict. Raises InputError."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise InputError(f"{path}: not JSON") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object, but {type(value).__name__}")
    return value


def read_safetensors(path):
    """({name: tensor}, {name: text} of its metadata). Raises InputError."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None


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
    """config.json of one of our runs or of a Hugging Face folder, as a dict. Raises InputError."""
    path = local_folder(folder) / "config.json"
    if not path.exists():
        raise InputError(f"{folder}: no such run (it has no config.json)")
    config = read_json_object(path)
    if "model_type" in config:  # Hugging Face's; weights/hf_config.py checks it
        return config
    for name, kind in CONFIG_TYPES.items():
        if name in config and not isinstance(config[name], kind):
            raise InputError(f"{path}: {name} is {config[name]!r}")
    return config


def cpu_weights(model):
    """A model's state_dict on the CPU, without the second name of a tied embedding.

    safetensors refuses tensors that share memory."""
    tensors = model.state_dict()
    if model.config.tied and model.config.head == "lm":
        del tensors["lm_head.weight"]
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def all_finite(tensors):
    """Whether no tensor of {name: tensor} holds a NaN or an infinity."""
    return all(torch.isfinite(tensor).all() for tensor in tensors.values())
