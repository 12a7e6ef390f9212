"""Checkpoints: safetensors and JSON, written beside and renamed into place, so a file is whole or it is the old one.

A finished run is config.json + model.safetensors + metrics.jsonl. While it trains, resume.safetensors holds weights,
the optimizer's moments and the step in one file; nothing is ever unpickled.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanoroads.common import InputError, local, plain, read_config
from nanoroads.model import GPT, GPTConfig

UMASK = os.umask(0)  # there is no other way to read it
os.umask(UMASK)


def write_atomic(path, write):
    """Call write(temporary path), flush it to disk, then rename it to `path`."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        temporary.chmod(0o666 & ~UMASK)  # safetensors makes its files private
        os.replace(temporary, path)
    except SafetensorError as error:  # the disk is full, or may not be written to
        raise InputError(f"{path}: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomic(path, lambda p: p.write_text(json.dumps(value, indent=2) + "\n"))


def weights(model):
    """state_dict on the CPU, without the second name of a tied embedding (safetensors refuses shared memory)."""
    tied = model.config.tied and model.config.head == "lm"
    return {k: v.cpu().contiguous() for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def finite_weights(model, out):
    """A model that went wrong must not replace, in `out`, the last one that had not. Raises InputError."""
    tensors = weights(model)
    if not all(torch.isfinite(v).all() for v in tensors.values()):
        raise InputError(f"{out}: the weights are not finite; a lower --lr may help; its last checkpoint is kept")
    return tensors


def save_config(out, args, stage, model, tokenizer, **more):
    """config.json: the model's shape, its tokenizer's name, and the flags of the run."""
    run = {"nanoroads": stage, "stage": stage, "model": asdict(model.config), "tokenizer": tokenizer}
    write_json(out / "config.json", run | more | {"args": plain(args)})


def save_model(out, model):
    tensors = finite_weights(model, out)
    write_atomic(Path(out) / "model.safetensors", lambda p: save_file(tensors, p))


def save_state(out, model, optimizer, step):
    """All that a resumed run needs, in one file: `step` steps are done."""
    tensors = {f"model.{k}": v for k, v in finite_weights(model, out).items()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{name}.{key}"] = value.cpu().contiguous()
    write_atomic(Path(out) / "resume.safetensors", lambda p: save_file(tensors, p, metadata={"step": str(step)}))


def load_state(out, model, optimizer):
    """Fill model and optimizer from resume.safetensors, drop later lines of metrics.jsonl. Returns the step, or 0."""
    path = Path(out) / "resume.safetensors"
    step = 0
    if path.exists():
        tensors, metadata = read_safetensors(path)
        fill(model, {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}, path)
        for name, p in model.named_parameters():
            start = f"optimizer.{name}."
            state = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
            optimizer.state[p] = {k: v.to(p.device) for k, v in state.items()}
        step = int(metadata["step"])
    log = Path(out) / "metrics.jsonl"
    if log.exists():  # the last line of a killed run may be cut in half
        lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
        try:
            kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{log}: a line of it is not a JSON object with a step") from None
        write_atomic(log, lambda p: p.write_text("".join(kept)))
    return step


def finish(out, model):
    """The run is done: model.safetensors is written, then the state that is not needed any more goes."""
    save_model(out, model)
    (Path(out) / "resume.safetensors").unlink(missing_ok=True)


def is_finished(out):
    return (Path(out) / "model.safetensors").exists() and not (Path(out) / "resume.safetensors").exists()


def read_safetensors(path):
    try:
        with safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, f.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None


def fill(model, tensors, path, new=()):
    """Load tensors into the model; those in `new` may stay as initialised. Raises InputError naming the tensor."""
    own = model.state_dict()
    if model.config.tied and "lm_head.weight" in own and "lm_head.weight" not in tensors:
        tensors = tensors | {"lm_head.weight": tensors.get("embedding.weight", own["lm_head.weight"])}
    for name, value in own.items():
        if name not in tensors and name not in new:
            raise InputError(f"{path}: holds no tensor {name}")
        if name in tensors and tensors[name].shape != value.shape:
            raise InputError(f"{path}: {name} is {tuple(tensors[name].shape)}, the config says {tuple(value.shape)}")
    unknown = [name for name in tensors if name not in own and name not in ("lm_head.weight", "scalar_head.weight")]
    if unknown:
        raise InputError(f"{path}: holds a tensor {unknown[0]} that the config has no place for")
    model.load_state_dict({k: v for k, v in tensors.items() if k in own}, strict=False)


def load_fitting(folder, device="cpu", like=None, head="lm"):
    """load_model for the place of a policy (head None: or of a reward model). Raises InputError if it is something else, or
    if it does not share the vocabulary or the context of `like`, a model that reads the same batches."""
    model = load_model(folder, device=device)
    if head and model.config.head != head:
        raise InputError(
            f"{folder}: a reward model, where a policy is wanted" if head == "lm" else f"{folder}: not a reward model"
        )
    for name in ("vocab_size", "block_size") if like is not None else ():
        mine, wanted = getattr(model.config, name), getattr(like.config, name)
        if mine < wanted or (name == "vocab_size" and mine != wanted):
            raise InputError(f"{folder}: its {name} is {mine}, that of the policy {wanted}")
    return model


def load_model(folder, dtype=None, device="cpu", head=None, readout=None):
    """A GPT from one of our runs or a Hugging Face folder.

    head, readout: override the config's, so that an SFT checkpoint becomes the trunk of a reward model (its scalar head
    is new, with standard deviation 1/sqrt(D+1)). Raises InputError naming the file and the tensor."""
    folder, config = local(folder), read_config(folder)
    if "model_type" in config:
        from nanoroads.hf import load_hf

        model_config, tensors, path = load_hf(folder, config)
    else:
        path = Path(folder) / "model.safetensors"
        if "model" not in config:
            raise InputError(f"{folder}/config.json: neither a run of nanoroads nor a Hugging Face model")
        if not path.exists():
            hint = " (the run is not finished; --resume it)" if (Path(folder) / "resume.safetensors").exists() else ""
            raise InputError(f"{path}: no such file{hint}")
        try:
            model_config = GPTConfig(**config["model"])
        except (TypeError, ValueError) as error:
            raise InputError(f"{folder}/config.json: {error}") from None
        tensors, _ = read_safetensors(path)
    model_config.head, model_config.readout = head or model_config.head, readout or model_config.readout
    try:
        with torch.device("meta"):  # no time or memory for initial values, which the file replaces
            model = GPT(model_config).to(dtype or torch.float32)
    except (TypeError, RuntimeError) as error:  # a size that is none
        raise InputError(f"{folder}/config.json: {error}") from None
    model.to_empty(device="cpu")
    if model_config.head == "scalar":
        model.init_scalar_head()
    elif model_config.tied:
        model.lm_head.weight = model.embedding.weight
    fill(model, tensors, path, new=("scalar_head.weight",) if head == "scalar" else ())
    return model.to(device)
