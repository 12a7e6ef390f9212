"""--track: every line of metrics.jsonl and speed.jsonl goes to Weights & Biases or TensorBoard, too.

Both packages are optional. A resumed run goes on where the killed one was, without doubled steps."""

import contextlib
import importlib.util
import os
import uuid
from pathlib import Path

from nanoroads.errors import InputError
from nanoroads.run.folder import SPEED, read_metrics
from nanoroads.weights.files import read_json_object, write_json

TRACKERS = ["wandb", "tensorboard"]  # the names of the packages


def check(name: str | None):
    """Raises InputError where the package of --track is not installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise InputError(f"--track {name}: is not installed; pip install {name}, or leave out --track")


@contextlib.contextmanager
def tracking(name: str | None, out: Path, flags: dict, made_from: str, done: int):
    """Yields log(step, {name: number}), to be called with growing steps; without --track it does nothing.

    out: the run's folder. flags: the run's. made_from: a hash of what decides its result. done:
    steps that its last checkpoint holds. Raises InputError where wandb cannot start."""
    if name == "wandb":
        with wandb_run(out, flags, made_from) as log:
            yield log
    elif name == "tensorboard":
        with tensorboard_writer(out, done) as log:
            yield log
    else:
        yield log_nothing


def log_nothing(step, row):
    """The log without --track."""


@contextlib.contextmanager
def tensorboard_writer(out, done):
    """Writes to OUT/tensorboard: `tensorboard --logdir OUT` shows it."""
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard hides what a killed process had logged behind its last checkpoint: it is logged again.
    with SummaryWriter(out / "tensorboard", purge_step=done + 1) as writer:

        def log(step, row):
            for name, value in row.items():
                writer.add_scalar(name, value, step)
            writer.flush()  # a killed run keeps its lines

        yield log


@contextlib.contextmanager
def wandb_run(out, flags, made_from):
    """Logs to the wandb run whose id is in OUT/wandb.json.

    A killed run has logged steps behind its last checkpoint, and may have lost some before it. wandb
    says at which step it goes on: from there all that was logged before is sent again, and a step
    that it has is not. WANDB_MODE=offline knows of no earlier process: its newest folder has all."""
    import wandb

    options = {"project": os.environ.get("WANDB_PROJECT", "nanoroads"), "id": run_id(out, made_from)}
    options.update(name=str(out), dir=str(out), config=flags, resume="allow")
    try:
        run = wandb.init(**options)
    except wandb.Error as error:  # not logged in, no network
        raise InputError(f"--track wandb: {error}") from None

    def log(step, row):
        if step >= run.starting_step:
            run.log(row, step=step)

    try:
        for row in logged_before(out):
            log(row["step"], row)
        yield log
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def run_id(out, made_from):
    """The id in OUT/wandb.json, a new one for a new run, or for one that is made anew in an old folder."""
    path = out / "wandb.json"
    state = {}
    if path.exists():
        state = read_json_object(path)
    if "id" not in state or state.get("made_from") != made_from:
        state = {"id": uuid.uuid4().hex, "made_from": made_from}
        write_json(path, state)
    return state["id"]


def logged_before(out):
    """The rows of metrics.jsonl up to the last checkpoint, each with those of speed.jsonl."""
    rows = {}
    for name in ("metrics.jsonl", SPEED):
        if (out / name).exists():
            for row in read_metrics(out, name):
                rows.setdefault(row["step"], {}).update(row)
    return rows.values()
