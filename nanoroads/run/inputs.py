"""What a run is made from: for every flag that names something, a hash of its contents.

config.json keeps the hashes. A run that is resumed, or that is asked for again when it is
finished, is refused where one of them differs. A file that was moved or copied is still the same.
"""

import platform
from argparse import Namespace
from pathlib import Path

import torch

from nanoroads.errors import InputError
from nanoroads.run import torchrun
from nanoroads.weights import identity
from nanoroads.world.roadmap import WORLDS

MODEL_FLAGS = ("init", "start", "compare", "reward", "tokenizer")  # they may name a model's folder
FILE_FLAGS = ("data", "eval_data")

# {flag: {part: hash}}, e.g. {"init": {"config": "9f..", "weights": "03..", "tokenizer": "b7.."}}
Inputs = dict[str, dict[str, str]]


def hash_inputs(args: Namespace, known: Inputs, download: bool = False) -> Inputs:
    """The hashes of all that the flags name and that is there already.

    known: hashes that are not computed again. download: hf:org/name is fetched, too; what the hub
    serves as --data is not compared. Raises InputError."""
    inputs = dict(known)
    for flag in (*FILE_FLAGS, *MODEL_FLAGS):
        value = getattr(args, flag, None)
        if value is None or flag in inputs:
            continue
        if flag in FILE_FLAGS:
            parts = hash_file(args, flag, str(value))
        else:
            parts = hash_model(str(value), download)
        if parts:
            inputs[flag] = parts
    return inputs


def hash_file(args, flag, value):
    """{part: hash} of a file of rows. Of the map they are the pairs beside --init."""
    if flag == "data" and value in WORLDS and hasattr(args, "eval_data"):
        paths = {name: Path(args.init) / name for name in ("pairs.jsonl", "pairs_test.jsonl")}
    else:
        paths = {"rows": Path(value)}
    for path in paths.values():
        if not path.is_file():
            return {}
    identity.say_if_large(value, paths.values())
    return {part: identity.of_file(path) for part, path in paths.items()}


def hash_model(value, download):
    """{part: hash} of a model's folder, or of the source of module:function."""
    if value.startswith("hf:"):
        return identity.of_model(value) if download else {}
    if (Path(value) / "config.json").is_file():
        return identity.of_model(value)
    if (Path(value) / "tokenizer.json").is_file():  # a folder that holds a tokenizer alone
        return identity.of_tokenizer(Path(value))
    if ":" in value:
        return identity.of_module(value)
    return {}


# ---------------------------------------------------------------- comparing


def check_inputs(out: Path, config: dict, args: Namespace, inputs: Inputs):
    """Raises InputError unless the run in `out` was made from the same `inputs`.

    config: its config.json. What is not there any more, or was not recorded, is not compared."""
    recorded = config.get("inputs", {})
    for flag, parts in inputs.items():
        before = recorded.get(flag)
        if not isinstance(before, dict) or before == parts:
            continue
        changed = [name for name in {**before, **parts} if before.get(name) != parts.get(name)]
        flag_and_value = f"--{flag.replace('_', '-')} {getattr(args, flag)}"
        typed = config.get("args", {}).get(flag)
        words = f"{out}: its run began with another {flag_and_value}"
        if typed != str(getattr(args, flag)):
            words = f"{out}: its run began with {typed}, not with {flag_and_value}"
        raise InputError(f"{words} (different: {', '.join(changed)}); --out DIR starts another run")


def same_contents(config: dict, inputs: Inputs, flag: str) -> bool:
    """Whether a flag names the same contents as in the run of this config.json, be it by another path."""
    return flag in inputs and config.get("inputs", {}).get(flag) == inputs[flag]


# ---------------------------------------------------------------- the machine


def this_machine(device: torch.device) -> dict[str, str]:
    """What the rounding of a result depends on, beside its inputs."""
    machine = {"device": device.type, "torch": torch.__version__}
    if device.type == "cpu":
        machine["threads"] = str(torch.get_num_threads())
        machine["processor"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        machine["processor"] = torch.cuda.get_device_name(device)
    if torchrun.ranks() > 1:
        machine["ranks"] = str(torchrun.ranks())
    return machine


def say_what_differs(out: Path, config: dict, machine: dict[str, str]):
    """Print one line if the run in `out` goes on under circumstances that change its last bits."""
    before = {"ranks": "1", **config.get("machine", {})}
    words = []
    for name, value in {"ranks": "1", **machine}.items():
        if name in before and before[name] != value:
            words.append(f"{name} {before[name]} before, {value} now")
    if words:
        print(f"{out}: {'; '.join(words)}: the weights may differ in their last bits from an unbroken run's")
