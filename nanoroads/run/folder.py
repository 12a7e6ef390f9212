"""The folder of a run: whose it is, who writes to it, and whether what it holds is whole."""

import atexit
import json
import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

from nanoroads.errors import InputError
from nanoroads.run.inputs import Inputs, check_inputs, same_contents
from nanoroads.run.lock import Lock, acquire
from nanoroads.weights import identity
from nanoroads.weights.checkpoint import is_finished
from nanoroads.weights.files import (
    delete_half_written,
    read_config,
    read_json_object,
    read_safetensors,
    refuse_odd_bytes,
    refuse_other_kinds,
    write_json,
    write_text,
)

# Flags that a --resume may change. They say where and how often to write, which leaves the result as it is;
# another --device changes only the rounding.
NOT_THE_RESULT = {
    "out",
    "resume",
    "device",
    "fsdp",
    "profile",
    "eval_every",
    "save_every",
    "log_every",
    "stop_after",
    "export_hf",
    "inspect",
    "track",
    "checkpoint_activations",
}
LOCK = ".nanoroads-lock"
RECORD = ".nanoroads-finished.json"  # hashes of a finished run's files
SAMPLES = "samples.jsonl"  # what the policy said at each evaluation, see samples.py
# See speed.py; beside metrics.jsonl, which is the same however fast a machine is.
SPEED = "speed.jsonl"
# Written after config.json; the last two by a run of --lora.
RESULTS = (
    "metrics.jsonl",
    "model.safetensors",
    "resume.safetensors",
    SAMPLES,
    SPEED,
    "adapter_model.safetensors",
    "adapter_config.json",
)


class Opened(NamedTuple):
    """The folder of a run."""

    config: dict | None  # its config.json; None: it has not begun
    locks: list[Lock]  # the folder is ours as long as they are kept


# ---------------------------------------------------------------- opening


def open_folder(out: Path, args: Namespace, stage: str) -> Opened:
    """Make the folder of a run and lock it, or refuse: what is not this run's is never written to.

    What is wrong with it or with --export-hf is found now, not after an hour of training. Raises
    InputError."""
    place = os.path.realpath(out)
    if place in (os.path.realpath(os.sep), os.path.realpath(os.path.expanduser("~"))):
        raise InputError(f"--out {out}: is no place for a run; name a folder of its own")
    refuse_odd_bytes(place)
    own_config(out, args, stage)
    out.mkdir(parents=True, exist_ok=True)
    busy = f"{out}: another process is writing to it; wait until that has ended, or choose another --out"
    locks = []
    try:
        locks.append(acquire(out / LOCK, busy))
    except OSError:
        if not is_finished(out):  # which may lie where nobody can write
            raise
    # Not in a finished run: what is half-written there is another process's, which may be making pairs.
    if not (is_finished(out) and (out / RECORD).exists()):
        delete_half_written(out)
    config = own_config(out, args, stage)  # again: until now another process may have written
    if args.export_hf and not args.inspect:
        locks += open_export(args, out)
    return Opened(config, locks)


def own_config(out, args, stage):
    """The config.json of this run in `out`, None before it began. Raises InputError for another run's."""
    if out.is_symlink() and not out.exists():
        raise InputError(f"--out {out}: is a link to a folder that is not there")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} exists and is not a run of nanoroads")
    names = ["config.json", LOCK, RECORD, *RESULTS, "demos.jsonl", "trace.json"]
    for name in names:
        refuse_other_kinds(out / name)
    if not (out / "config.json").exists():
        refuse_strays(out, args)
        return None
    try:
        config = read_config(out)
    except InputError as error:
        raise InputError(f"{error}; put it back as it was, or choose another --out") from None
    if "stage" not in config:
        raise InputError(f"{out}/config.json is not of a run of nanoroads; choose another --out")
    if not args.resume:
        raise InputError(f"{out} already holds a run: --resume continues it, --out DIR starts another")
    if config["stage"] != stage:
        stages = f"of stage {config['stage']!r}, not {stage!r}"
        raise InputError(f"{out} holds a run {stages}; choose another --out")
    return config


def refuse_strays(out, args):
    """Raises InputError for files in a folder without config.json that a run would write over."""
    names = [*RESULTS, "trace.json"] if args.profile else RESULTS
    for name in names:
        if (out / name).exists():
            reason = "without the config.json that says of which run; put that back, or choose another --out"
            raise InputError(f"{out} is not a run of nanoroads: it holds {name}, {reason}")


def open_export(args, out):
    """Make the folder --export-hf and lock it, or refuse. Returns a list with the lock.

    The list is empty where nothing is left to do."""
    export = args.export_hf
    refuse_odd_bytes(export)
    if os.path.realpath(export) == os.path.realpath(out):
        raise InputError(f"--export-hf {export}: is --out itself")
    if export.is_symlink() and not export.exists():
        raise InputError(f"--export-hf {export}: is a link to a folder that is not there")
    if export.exists() and not args.resume:
        if any(path.name != LOCK for path in export.iterdir()):
            raise InputError(f"--export-hf {export}: exists, and is not empty")
    if (export / "config.json").exists():  # the last file of an export
        return []
    export.mkdir(parents=True, exist_ok=True)
    return [acquire(export / LOCK, f"--export-hf {export}: another process is writing to it")]


def check_same_run(out: Path, config: dict, args: Namespace, inputs: Inputs):
    """Raises InputError unless the run in `out` had the same flags, and was made from the same inputs.

    A path may differ, if what it leads to is the same."""
    before = config.get("args", {})
    check_inputs(out, config, args, inputs)
    for name, value in plain(args).items():
        if name in NOT_THE_RESULT or same_contents(config, inputs, name):
            continue
        if before.get(name) != value:
            words = f"its run had --{name.replace('_', '-')} {before.get(name)}, this one has {value}"
            raise InputError(f"{out}: {words}; --out DIR starts another run")


def run_hash(args: Namespace, stage: str, inputs: Inputs) -> str:
    """A hash of all that decides a run's result: the other runs' checkpoints have another one."""
    flags = {}
    for name, value in plain(args).items():
        if name not in NOT_THE_RESULT and name not in inputs:  # a path may change
            flags[name] = value
    return identity.of_value([stage, flags, inputs])


def temporary_folder() -> Path:
    """--inspect writes nothing that is kept: a folder that goes when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="nanoroads-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def plain(args: Namespace) -> dict:
    """Flags as JSON has them: paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


# ---------------------------------------------------------------- metrics.jsonl


def drop_lines_after(log: Path, step: int):
    """Keep the lines of metrics.jsonl up to `step`; the last one of a killed run may be cut in half."""
    if not log.exists():
        return
    kept = []
    try:
        lines = log.read_text(encoding="utf-8").splitlines() if step else []
        for line in lines:
            if line.endswith("}") and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    except (ValueError, KeyError, TypeError, RecursionError):
        hint = "delete it to go on without it"
        raise InputError(f"{log}: a line of it is not a JSON object with a step; {hint}") from None
    write_text(log, "".join(kept))


def read_metrics(out: Path, name: str = "metrics.jsonl", whole: bool = True) -> list[dict]:
    """metrics.jsonl of a run, or its like, a list of {"step", name: number}. Raises InputError.

    whole: False leaves out a last line that is cut in half, as a killed run has it."""
    path = Path(out) / name
    refuse_other_kinds(path)
    if not path.exists():
        raise InputError(f"{path}: no such file")
    rows = []
    text = path.read_bytes()
    if not whole:
        text = text[: text.rfind(b"\n") + 1]
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise InputError(f"{path}:{number}: not a JSON object with a step")
        rows.append(row)
    return rows


# ---------------------------------------------------------------- a finished run


def write_record(out: Path):
    """Write the RECORD of a finished run: what its files are, to notice when they change.

    The reward model of train_rlhf.py, a run within it, is a part of it."""
    names = ["config.json", "metrics.jsonl", "model.safetensors"]
    if (out / "reward" / RECORD).exists():
        names += [f"reward/{name}" for name in names]
    hashes = {name: identity.of_file(out / name) for name in names if (out / name).is_file()}
    write_json(out / RECORD, hashes)


def check_finished(out: Path):
    """Raises InputError unless a finished run is as it was when it finished.

    Without a RECORD, as in an older version's run, its files need only be whole."""
    record = out / RECORD
    if not record.exists():
        try:
            read_safetensors(out / "model.safetensors")
            read_metrics(out)
        except InputError as error:
            raise InputError(f"{error}; put it back, or train again with another --out") from None
        return
    try:
        hashes = read_json_object(record)
    except InputError as error:
        raise InputError(f"{error}; delete it, and start again") from None
    for name, before in hashes.items():
        path = out / name
        if not path.is_file() or identity.of_file(path) != before:
            reason = "is not as its run left it (damaged, edited or gone)"
            hint = f"put it back, train again with another --out, or delete {record} to take it as it is"
            raise InputError(f"{path} {reason}; {hint}")
