"""--track: what is logged arrives once, a resumed run goes on, and a missing package is one line."""

import json
import sys
from pathlib import Path

import pytest
from helpers.runs import read_jsonl, run, write_jsonl

import train_dpo
from nanoroads.errors import InputError
from nanoroads.run import track
from nanoroads.run.track import tracking

# As much of wandb as we call; every call is a line of calls.jsonl beside it.
STAND_IN = """
import json, pathlib

class Error(Exception):
    pass

def record(*call):
    with open(pathlib.Path(__file__).parent / "calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\\n")

SERVER = {}  # {id: the last step that has arrived}

class Run:
    def __init__(self, id):
        self.id = id
        self.starting_step = SERVER.get(id, -1) + 1
    def log(self, row, step):
        assert step > SERVER.get(self.id, -1)
        SERVER[self.id] = step
        record("log", step, row)
    def finish(self, exit_code=0):
        record("finish", exit_code)

def init(**options):
    if options["project"] == "closed":
        raise Error("not logged in")
    record("init", options)
    return Run(options["id"])
"""


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """A module `wandb`; returns a function that says which calls it had."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "wandb.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    yield lambda: read_jsonl(folder / "calls.jsonl")
    sys.modules.pop("wandb", None)


def logged(calls):
    return [(step, row) for name, step, row in (call for call in calls if call[0] == "log")]


def test_a_package_that_is_missing_is_refused_before_anything_is_done(sft, refuses, tmp_path, monkeypatch):
    found = track.importlib.util.find_spec
    monkeypatch.setattr(
        track.importlib.util, "find_spec", lambda name: None if name in track.TRACKERS else found(name)
    )
    for name in track.TRACKERS:
        out = tmp_path / name
        refuses(train_dpo, f"--track {name}", f"pip install {name}", init=sft, track=name, out=out)
        assert not out.exists()
    track.check(None)  # without the flag nothing is needed


def test_without_the_flag_nothing_happens(tmp_path):
    with tracking(None, tmp_path, {}, "hash", 0) as log:
        log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- wandb


def test_wandb_has_the_lines_of_both_files(sft, tmp_path, wandb):
    out = run(train_dpo, tmp_path / "dpo", init=sft, track="wandb", log_every=4)
    (_, options), *lines, last = wandb()
    assert (options["project"], options["name"], options["resume"]) == ("nanoroads", str(out), "allow")
    assert options["config"]["lr"] == 3e-3 and Path(options["dir"]) == out
    assert last == ["finish", 0]
    expected = []
    for row, speed in zip(read_jsonl(out / "metrics.jsonl"), read_jsonl(out / "speed.jsonl"), strict=True):
        expected.append((row["step"], {**row, **speed}))
    assert logged(lines) == expected and len(expected) == 4


def take(out, steps, total):
    """Log steps of a run in `out` as a process does that dies behind the last of them."""
    # What `Run.steps` leaves of the last process: the lines up to the checkpoint.
    rows = [{"step": step, "loss": float(step)} for step in range(1, steps[0])]
    write_jsonl(out / "metrics.jsonl", rows)
    write_jsonl(out / "speed.jsonl", [{"step": row["step"], "seconds": 0.5} for row in rows])
    with tracking("wandb", out, {}, "hash of the run", steps[0] - 1) as log:
        for step in steps:
            log(step, {"step": step, "loss": float(step), "seconds": 0.5})
        if steps[-1] < total:
            raise KeyboardInterrupt


def test_a_resumed_run_is_the_same_wandb_run_without_doubled_steps(tmp_path, wandb, monkeypatch):
    out = tmp_path / "dpo"
    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        take(out, [1, 2, 3, 4], 6)
    with pytest.raises(KeyboardInterrupt):
        take(out, [3], 6)  # from the checkpoint at 2 on; dies before it is where the first was
    take(out, [3, 4, 5, 6], 6)
    calls = wandb()
    ids = [call[1]["id"] for call in calls if call[0] == "init"]
    assert len(ids) == 3 and len(set(ids)) == 1
    expected = [(step, {"step": step, "loss": float(step), "seconds": 0.5}) for step in range(1, 7)]
    assert logged(calls) == expected
    assert [call[1] for call in calls if call[0] == "finish"] == [1, 1, 0]
    # What wandb has lost of a killed process, it is sent again; offline, that is everything.
    sys.modules["wandb"].SERVER[ids[0]] = 2
    take(out, [5, 6], 6)
    sys.modules["wandb"].SERVER.clear()
    take(out, [5, 6], 6)
    assert [step for step, _ in logged(wandb())[6:]] == [3, 4, 5, 6, 1, 2, 3, 4, 5, 6]
    # Another run in the same place is another one; so is one in another place.
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for folder, made_from in ((out, "another hash"), (tmp_path, "hash of the run")):
        (out / "metrics.jsonl").unlink(missing_ok=True)
        (out / "speed.jsonl").unlink(missing_ok=True)
        with tracking("wandb", folder, {}, made_from, 0) as log:
            log(1, {"loss": 0.0})
    calls = wandb()[-6:]
    assert [call[0] for call in calls] == ["init", "log", "finish"] * 2
    assert len({ids[0], calls[0][1]["id"], calls[3][1]["id"]}) == 3
    assert calls[0][1]["project"] == "mine"


def test_wandb_that_cannot_start_is_one_line(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "closed")
    with (
        pytest.raises(InputError, match="--track wandb: not logged in"),
        tracking("wandb", tmp_path, {}, "", 0),
    ):
        pass
    (tmp_path / "wandb.json").write_text("[")
    with pytest.raises(InputError, match="wandb.json"), tracking("wandb", tmp_path, {}, "", 0):
        pass


# ---------------------------------------------------------------- TensorBoard


def shown(folder):
    """{name: [(step, value)]} as TensorBoard shows a folder."""
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_shows_every_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    out = tmp_path / "dpo"
    with tracking("tensorboard", out, {}, "", 0) as log:  # of a process that died behind a checkpoint at 4
        for step in range(1, 7):
            log(step, {"loss": float(step)})
    with tracking("tensorboard", out, {}, "", 4) as log:
        for step in range(5, 9):
            log(step, {"loss": 10.0 + step})
    assert shown(out / "tensorboard") == {
        "loss": [(1, 1), (2, 2), (3, 3), (4, 4), (5, 15), (6, 16), (7, 17), (8, 18)]
    }


def test_tensorboard_has_the_lines_of_metrics(sft, tmp_path):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    out = run(train_dpo, tmp_path / "dpo", init=sft, track="tensorboard", steps=3)
    scalars = shown(out / "tensorboard")
    rows = read_jsonl(out / "metrics.jsonl")
    assert scalars["margin"] == [(row["step"], pytest.approx(row["margin"])) for row in rows]
    assert [step for step, _ in scalars["tokens_per_second"]] == [1, 2, 3]
    run(train_dpo, out, init=sft, steps=3, resume=True)  # --track is none of the flags that make the result
    assert json.loads((out / "config.json").read_text())["args"]["track"] == "tensorboard"
