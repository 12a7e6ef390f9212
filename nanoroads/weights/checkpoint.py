"""A run's weights: saved, resumed, and loaded as a policy or as a reward model.

A finished run is config.json + model.safetensors + metrics.jsonl. While it trains,
resume.safetensors holds weights, the optimizer's moments and the step in one file, so that they
cannot disagree. Of a model with adapters (lora.py) both files hold what is trained, and config.json
says where the rest is, and what it was.
"""

from pathlib import Path

import numpy as np
import torch

from nanoroads.errors import InputError
from nanoroads.model import GPTConfig
from nanoroads.weights import identity
from nanoroads.weights.files import (
    all_finite,
    check_weight,
    cpu_weights,
    local_folder,
    read_config,
    read_safetensors,
    write_safetensors,
    write_text,
)
from nanoroads.weights.folder import own_file
from nanoroads.weights.hf import load_hf, plan
from nanoroads.weights.hf_config import check_type, field_type, llama3_scaling
from nanoroads.weights.lora import adapters, add_adapters, merge
from nanoroads.weights.peft import save_peft
from nanoroads.weights.sharded import gathered, is_sharded, sharded_as

# ---------------------------------------------------------------- saving and resuming


def finite_weights(folder, model):
    """The model's cpu_weights; of one with adapters those that are trained. Raises InputError for NaN and
    infinity.

    A model that went wrong must not replace, in `folder`, the last one that had not."""
    tensors = cpu_weights(model, without=frozen_names(model))
    if not all_finite(tensors):
        hint = "a lower --lr may help; the run's last checkpoint is kept"
        raise InputError(f"{folder}: the weights are not finite; {hint}")
    return tensors


def frozen_names(model):
    """The names of the weights that a model with adapters shares; [] of a model without."""
    if not adapters(model):
        return []
    return [name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad]


def save_model(folder, model, base=None):
    """Write model.safetensors of a run. Raises InputError, e.g. for NaN weights.

    base: what a model with adapters has its other weights from. The adapters are written in PEFT's
    format, too."""
    tensors = finite_weights(folder, model)
    if base is not None:
        save_peft(folder, model, base)
    write_safetensors(Path(folder) / "model.safetensors", tensors)


def save_state(folder, model, optimizer, step, made_from=""):
    """Write all that a resumed run needs, in one file, after `step` steps. Raises InputError.

    That is weights, the optimizer's moments, and the lines of metrics.jsonl so far. made_from: a
    hash of what decides the run's result."""
    folder = Path(folder)
    tensors = {f"model.{name}": tensor for name, tensor in finite_weights(folder, model).items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{name}.{key}"] = gathered(value).cpu().contiguous()
    log = folder / "metrics.jsonl"
    lines = log.read_bytes() if log.exists() else b""
    # As a tensor: text beside the tensors may not be longer than 100 MB.
    tensors["metrics"] = torch.from_numpy(np.frombuffer(lines, np.uint8).copy())
    write_safetensors(folder / "resume.safetensors", tensors, {"step": str(step), "made_from": made_from})


def load_state(folder, model, optimizer, total=None, made_from="", keeps_log=True):
    """Fill model and optimizer from resume.safetensors, and put metrics.jsonl back as it was then.

    total: steps of the whole run, if known. made_from: as for save_state, "" if it is not to be
    compared. keeps_log: whether this process is the one that writes metrics.jsonl. Returns the number of
    steps that are done, 0 where there is no such file. Raises InputError that says what to do with one
    that is damaged, or of another run."""
    path = Path(folder) / "resume.safetensors"
    if not path.exists():
        return 0
    try:
        tensors, metadata = read_safetensors(path)
        step = saved_step(path, metadata, total)
        saved_for = metadata.get("made_from", "")  # an older version did not write it
        if made_from and saved_for and saved_for != made_from:
            raise InputError(f"{path}: is the checkpoint of another run")
        moments = saved_moments(path, model, tensors)
        weights = tensors_under("model.", tensors)
        check_weights(path, model, weights)
        fill(model, weights, path, may_be_new=frozen_names(model))
    except InputError as error:
        raise InputError(f"{error}; delete it, and --resume begins again from the first step") from None
    for name, parameter in model.named_parameters():
        if name in moments:
            optimizer.state[parameter] = {key: sharded_as(x, parameter) for key, x in moments[name].items()}
    if keeps_log and "metrics" in tensors:  # an older version did not keep them
        write_text(Path(folder) / "metrics.jsonl", tensors["metrics"].numpy().tobytes().decode())
    return step


def saved_step(path, metadata, total):
    """The number of steps that a checkpoint says are done. Raises InputError."""
    text = metadata.get("step", "")
    step = int(text) if text.isdecimal() else 0
    if step < 1 or (total is not None and step >= total):
        raise InputError(f"{path}: of step {text!r}, in a run of {total} steps")
    return step


def saved_moments(path, model, tensors):
    """{parameter's name: AdamW's state of it} of a checkpoint's tensors. Raises InputError."""
    moments = {}
    frozen = frozen_names(model)
    for name, parameter in model.named_parameters():
        if name in frozen:
            continue
        moments[name] = tensors_under(f"optimizer.{name}.", tensors)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            shape = () if key == "step" else tuple(parameter.shape)
            value = moments[name].get(key)
            if value is None or tuple(value.shape) != shape or not torch.isfinite(value).all():
                raise InputError(f"{path}: holds no optimizer's state {key} of {name}")
    return moments


def check_weights(path, model, weights):
    """Raises InputError unless the weights have the dtype that they were saved in, and are finite."""
    expected = model.state_dict()
    for name, value in weights.items():
        if name in expected and value.dtype != expected[name].dtype:
            raise InputError(f"{path}: {name} is {value.dtype}, in a run of {expected[name].dtype}")
    if not all_finite(weights):
        raise InputError(f"{path}: the weights are not finite")


def tensors_under(prefix, tensors):
    """{name: tensor} of the names that begin with `prefix`, without it."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            found[name.removeprefix(prefix)] = tensor
    return found


def drop_state(folder):
    """The run is done: remove the state, which nobody needs now."""
    (Path(folder) / "resume.safetensors").unlink(missing_ok=True)


def is_finished(folder):
    """Whether a run has come to its end. A killed one has no model yet, or its state still."""
    has_model = (Path(folder) / "model.safetensors").exists()
    has_state = (Path(folder) / "resume.safetensors").exists()
    return has_model and not has_state


# ---------------------------------------------------------------- loading


def load_policy(folder, device="cpu", compute_dtype=None, like=None, matrix_dtype=None):
    """A language model, from one of our runs or a Hugging Face folder, with fp32 weights.

    compute_dtype: of matrix products (None: fp32), see GPT. like: a model that reads the same
    batches, see `check_fits`. matrix_dtype: what the matrices are held in, if not in fp32. Raises
    InputError, also where the folder holds a reward model."""
    model = load_model(folder, device=device, compute_dtype=compute_dtype, matrix_dtype=matrix_dtype)
    if model.config.head != "lm":
        raise InputError(f"{folder}: a reward model, where a policy is wanted")
    check_fits(folder, model, like)
    return model


def load_reference(folder, compute_dtype=None, matrix_dtype=None):
    """As load_policy, of a policy that is not trained, on the CPU."""
    model = load_policy(folder, compute_dtype=compute_dtype, matrix_dtype=matrix_dtype)
    return model.requires_grad_(False)


def load_reward_model(folder, device="cpu", compute_dtype=None, like=None):
    """A reward model of either class, with fp32 weights; arguments and errors as load_policy's.

    Global: a model with a scalar head. Local: a policy, its log-ratio to a reference the reward."""
    model = load_model(folder, device=device, compute_dtype=compute_dtype)
    check_fits(folder, model, like)
    return model


def new_reward_model(folder, device="cpu", compute_dtype=None, readout="last"):
    """The trunk of a policy, with fp32 weights, and a scalar head, new unless the folder holds one.

    A new head is drawn from torch's global generator, its standard deviation is 1/sqrt(D + 1)
    (Stiennon et al., 2009.01325). readout: "last" or "sum", see GPTConfig. Raises InputError."""
    return load_model(folder, device=device, compute_dtype=compute_dtype, head="scalar", readout=readout)


def check_fits(folder, model, like):
    """Raises InputError unless the model of `folder` can read the batches of the policy `like`.

    It must share the vocabulary, and have at least its context. like None: nothing is checked."""
    if like is None:
        return
    vocabulary = model.config.vocab_size
    policy_vocabulary = like.config.vocab_size
    if vocabulary != policy_vocabulary:
        raise InputError(f"{folder}: its vocab_size is {vocabulary}, that of the policy {policy_vocabulary}")
    context = model.config.block_size
    policy_context = like.config.block_size
    if context < policy_context:
        raise InputError(f"{folder}: its block_size is {context}, that of the policy {policy_context}")


def load_model(
    folder, dtype=None, device="cpu", compute_dtype=None, head=None, readout=None, matrix_dtype=None
):
    """A GPT from one of our runs or a Hugging Face folder; adapters are merged into its matrices.

    dtype: of the weights (None: fp32). compute_dtype: of matrix products (None: the weights').
    head, readout: override the config's; a scalar head that the folder does not hold is new.
    matrix_dtype: of embeddings and matrices alone; in what they are multiplied is what fp32 ones are
    cast to, so this saves memory and changes no product. Raises InputError naming the file and the
    tensor."""
    config = read_config(folder)
    if "lora" in config:
        model = load_merged(folder, config, dtype, head, readout).to(dtype or torch.float32)
        model.compute_dtype = compute_dtype
        model.hold_matrices(matrix_dtype)
        return model.to(device)
    folder = local_folder(folder)
    if "model_type" in config:
        model_config, tensors, path = load_hf(folder, config)
    else:
        model_config, tensors, path = load_run(folder, config)
    model_config.head = head or model_config.head
    model_config.readout = readout or model_config.readout
    # No time for initial values, which the file replaces, and no memory before the shapes are right.
    model = plan(model_config, tensors, path).to(dtype or torch.float32)
    model.hold_matrices(matrix_dtype)
    may_be_new = ["scalar_head.weight"] if head == "scalar" else []
    tensors = fitting(model, tensors, path, may_be_new)
    model.to_empty(device="cpu")
    if model_config.head == "scalar":
        model.init_scalar_head()
    elif model_config.tied:
        model.lm_head.weight = model.embedding.weight
    model.load_state_dict(tensors, strict=False)
    model.compute_dtype = compute_dtype
    return model.to(device)


def load_run(folder, config):
    """One of our finished runs, its config.json as a dict -> (GPTConfig, {name: tensor}, path).

    path: of the weights, for error messages. Raises InputError."""
    if "model" not in config:
        raise InputError(f"{folder}/config.json: neither a run of nanoroads nor a Hugging Face model")
    model_config = run_model_config(config["model"], folder / "config.json")
    tensors, path = run_tensors(folder)
    return model_config, tensors, path


def run_tensors(folder):
    """({name: tensor}, path) of the model.safetensors of a finished run. Raises InputError."""
    path = own_file(folder, "model.safetensors")
    if path is None:
        path = folder / "model.safetensors"
        unfinished = (folder / "resume.safetensors").exists()
        hint = " (the run is not finished; --resume it)" if unfinished else ""
        raise InputError(f"{path}: no such file{hint}")
    tensors, _ = read_safetensors(path)
    for name, tensor in tensors.items():
        check_weight(tensor, name, path)
    return tensors, path


# ---------------------------------------------------------------- loading a run with adapters


def load_merged(folder, config, dtype, head, readout):
    """A run of --lora as a plain GPT, on the CPU: what its base holds, with the adapters merged.

    config: its config.json. The rest as for load_model. Raises InputError, also where the base has
    changed."""
    wanted = run_model_config(config.get("model", {}), Path(folder) / "config.json")
    adapted = with_run_adapters(load_model(own_base(folder, config), dtype), folder, config)
    model = merge(adapted).requires_grad_(True)
    if head == "scalar" and wanted.head == "lm":
        model.set_scalar_head(readout)
    return model


def with_run_adapters(base, folder, config):
    """A GPT that shares the base's weights, with the adapters of a run, and with its scalar head if it
    has one. Raises InputError."""
    folder = local_folder(folder)
    path = folder / "config.json"
    wanted = run_model_config(config.get("model", {}), path)
    for name in ("rank", "alpha"):
        check_type(name, config["lora"].get(name), int, path)
    tensors, path = run_tensors(folder)
    rank = config["lora"]["rank"]
    ranks = [tensor.shape[-1] for name, tensor in tensors.items() if name.endswith(".lora_B")]
    if set(ranks) != {rank}:  # before there is memory for them
        raise InputError(f"{path}: its adapters are not of rank {rank}, which the config says")
    model = add_adapters(base, rank, config["lora"]["alpha"])
    if wanted.head == "scalar":
        model.set_scalar_head(wanted.readout)
    fill(model, tensors, path, may_be_new=frozen_names(model))
    return model


def own_base(folder, config):
    """The folder that has a run's other weights. Raises InputError unless it holds what it held."""
    base = identity.find(folder, config, "base")
    if not is_base(config, base):
        reason = "is not what it was trained on (changed since, or another model)"
        raise InputError(f"{folder}: its base {base} {reason}; put that back")
    return base


def is_base(config, folder):
    """Whether a folder holds the weights that the adapters of a run were trained on."""
    trained_on = config["lora"].get("base")
    found = identity.of_model(folder)
    if not isinstance(trained_on, dict):
        return False
    return all(trained_on.get(part) == found[part] for part in ("config", "weights"))


# ---------------------------------------------------------------- what a file holds


def run_model_config(shape, path):
    """The "model" of a run's config.json -> GPTConfig. Raises InputError naming the field."""
    shape = dict(shape)
    for field, value in shape.items():
        if field == "rope_scaling" and isinstance(value, dict):
            llama3_scaling(value, path)
        elif field in GPTConfig.__annotations__ and value is not None:
            check_type(field, value, field_type(field), path)
    try:
        return GPTConfig(**shape)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def fill(model, tensors, path, may_be_new=()):
    """Load {name: tensor} into the model; arguments and errors as those of `fitting`."""
    weights = fitting(model, tensors, path, may_be_new)
    places = model.state_dict()
    for name, tensor in weights.items():
        if is_sharded(places[name]):
            weights[name] = sharded_as(tensor, places[name])
    model.load_state_dict(weights, strict=False)


def fitting(model, tensors, path, may_be_new=()):
    """The tensors of {name: tensor} that the model takes, whose shapes are right.

    Names in may_be_new may be missing; the model keeps these as they are initialised. Raises
    InputError naming the file `path` and the tensor."""
    expected = model.state_dict()
    lacks_head = "lm_head.weight" in expected and "lm_head.weight" not in tensors
    if model.config.tied and lacks_head and "embedding.weight" in tensors:
        tensors = {**tensors, "lm_head.weight": tensors["embedding.weight"]}
    for name, value in expected.items():
        if name not in tensors and name not in may_be_new:
            raise InputError(f"{path}: holds no tensor {name}")
        if name in tensors and tensors[name].shape != value.shape:
            shape = tuple(tensors[name].shape)
            raise InputError(f"{path}: {name} is {shape}, the config says {tuple(value.shape)}")
    heads = ("lm_head.weight", "scalar_head.weight")  # the other kind of head is left out
    for name in tensors:
        if name not in expected and name not in heads:
            raise InputError(f"{path}: holds a tensor {name} that the config has no place for")
    return {name: tensor for name, tensor in tensors.items() if name in expected}
