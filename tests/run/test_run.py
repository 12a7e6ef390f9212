"""Run: the folder, the record and the clock of a training run,
without any of the scripts' losses."""

import json
import math
from array import array

import pytest
import torch
from helpers.runs import argv

import train_dpo
from nanoroads.batch import pack
from nanoroads.errors import InputError
from nanoroads.model import GPT, GPTConfig
from nanoroads.run import run as run_module
from nanoroads.run.folder import read_metrics
from nanoroads.run.optim import adamw
from nanoroads.run.run import Run, pick_device, pick_dtype
from nanoroads.text.data import Rows
from nanoroads.weights import checkpoint
from nanoroads.weights.files import TEMPORARY, read_config, read_safetensors


def args_of(out, **flags):
    """The flags of a real script, as its command line gives them."""
    return train_dpo.flags(argv(train_dpo, out=out, **flags))


def small_model(seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(vocab_size=7, n_layer=1, n_head=1, n_embd=16, block_size=8))


def run_steps(run, model, total, stop_after=None):
    """A loop with the order of a script's: a made-up loss, log,
    save. Returns the steps that it took."""
    optimizer = adamw(model, 1e-2, 0.0)
    taken = []
    for step in run.steps(model, optimizer, total):
        taken.append(step)
        logp = model(pack([[1, 2]], [[[3, step % 7]]])).sequence
        loss = -logp.sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log(step, {"loss": loss.detach()})
        run.save(step, model, optimizer)
        if stop_after == step:
            break
    return taken


# ---------------------------------------------------------------- the folder


def test_a_new_folder_is_made_and_the_run_of_another_is_refused(tmp_path):
    out = tmp_path / "x/y"
    Run(args_of(out, init="a/b"), "dpo").describe(small_model(), "roadmap", beta=0.5)
    config = read_config(out)
    assert (config["stage"], config["tokenizer"], config["beta"]) == ("dpo", "roadmap", 0.5)
    assert config["model"]["n_embd"] == 16
    assert config["args"]["init"] == "a/b"  # as text
    # Half written by a killed run; and files of the user's, whose names are those of temporary files.
    half_written = out / f"{TEMPORARY}x4fp0q"
    half_written.mkdir()
    (half_written / ".tmpX4fp0Q").touch()
    users = {"thesis.tmp", ".tmpX4fp0Q", "model.safetensors.7.tmp", "notes.txt"}
    for name in users:
        (out / name).touch()
    assert Run(args_of(out, init="a/b", resume=True, log_every=3), "dpo").out == out
    assert {path.name for path in out.iterdir()} == users | {"config.json"}


@pytest.mark.parametrize(
    "flags, stage, words",
    [
        ({}, "dpo", "already holds a run: --resume"),
        ({"resume": True}, "sft", "stage 'dpo', not 'sft'"),
        ({"resume": True, "lr": 0.2}, "dpo", "its run had --lr 0.003, this one has 0.2"),
        ({"resume": True, "init": "a/c"}, "dpo", "its run had --init a/b, this one has a/c"),
        ({"resume": True, "label_smoothing": 0.3}, "dpo", "had --label-smoothing 0.1, this one has 0.3"),
    ],
)
def test_a_run_with_other_flags_is_refused_by_their_name(flags, stage, words, tmp_path):
    Run(args_of(tmp_path, init="a/b"), "dpo").describe(small_model(), "roadmap")
    with pytest.raises(InputError, match=words) as error:
        Run(args_of(tmp_path, **{"init": "a/b", **flags}), stage)
    assert str(tmp_path) in str(error.value)


def test_a_flag_that_the_older_run_did_not_have_is_named(tmp_path):
    Run(args_of(tmp_path), "dpo").describe(small_model(), "roadmap")
    config = read_config(tmp_path)
    del config["args"]["label_smoothing"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="had --label-smoothing None, this one has 0.1"):
        Run(args_of(tmp_path, resume=True), "dpo")


def test_inspect_writes_nothing_to_the_folder(tmp_path):
    run = Run(args_of(tmp_path / "out", inspect=True), "dpo")
    assert run.out != tmp_path / "out" and run.out.is_dir()
    assert not (tmp_path / "out").exists()


def test_a_run_inside_another(tmp_path):
    outer = Run(args_of(tmp_path / "out", seed=7, export_hf=tmp_path / "hf", profile=True), "rlhf")

    inner = outer.inside("reward", without=["gamma", "loss"], lr=0.5, steps=None)
    assert (inner.out, inner.stage) == (tmp_path / "out/reward", "reward")
    assert inner.out.is_dir()
    assert (inner.args.lr, inner.args.steps, inner.args.seed) == (0.5, None, 7)
    assert not hasattr(inner.args, "gamma") and not hasattr(inner.args, "loss")
    assert inner.args.export_hf is None and not inner.args.profile  # these are of the whole run alone
    assert (outer.args.lr, outer.args.loss, outer.out) == (3e-3, "dpo", tmp_path / "out")
    # It is a run of its own: described, and refused to others.
    inner.describe(small_model(), "roadmap")
    assert read_config(inner.out)["stage"] == "reward" and not (outer.out / "config.json").exists()
    with pytest.raises(InputError, match="reward already holds a run"):
        outer.inside("reward")


def test_a_run_is_finished_when_its_weights_are_written(tmp_path):
    run = Run(args_of(tmp_path), "dpo")
    assert not run.finished
    run.describe(small_model(), "roadmap")
    run_steps(run, small_model(), 8)
    assert (tmp_path / "resume.safetensors").exists()
    assert not Run(args_of(tmp_path, resume=True), "dpo").finished
    run.finish(small_model())
    assert run.finished and not (tmp_path / "resume.safetensors").exists()
    assert Run(args_of(tmp_path, resume=True), "dpo").finished


# ---------------------------------------------------------------- the steps


def test_steps_go_on_from_the_last_checkpoint(tmp_path):
    """Killed behind step 7, with checkpoints every 3: the next process goes on with step 6, and
    ends with the same weights."""
    whole = small_model()
    assert run_steps(Run(args_of(tmp_path / "whole", save_every=3), "dpo"), whole, 10) == list(range(10))

    run = Run(args_of(tmp_path / "cut", save_every=3), "dpo")
    run.describe(small_model(), "roadmap")
    assert run_steps(run, small_model(), 10, stop_after=7) == list(range(8))
    with open(tmp_path / "cut/metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a line cut in half
    resumed, model = Run(args_of(tmp_path / "cut", save_every=3, resume=True), "dpo"), small_model(seed=5)
    assert run_steps(resumed, model, 10) == [6, 7, 8, 9]
    for name, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "updates, save_every, saved",
    [
        (1, 5, [5, 10, 15]),
        (1, 100, []),
        (2, 5, [6, 12, 18]),  # the first step between two batches of samples at which five have passed
        (2, 6, [6, 12, 18]),
        (3, 1, [3, 6, 9, 12, 15, 18]),
    ],
)
def test_a_checkpoint_is_due_when_save_every_steps_have_passed(
    updates, save_every, saved, tmp_path, monkeypatch
):
    """With several updates on a batch of samples, RL asks only between
    two batches. The last step is never saved."""
    written = []
    monkeypatch.setattr(
        checkpoint, "save_state", lambda out, model, optimizer, step, made_from: written.append(step)
    )
    run = Run(args_of(tmp_path, save_every=save_every), "rlhf")
    for step in run.steps(None, None, 20):
        if (step + 1) % updates == 0:
            run.save(step, None, None)
    assert written == saved


def test_when_it_logs_and_evaluates(tmp_path):
    run = Run(args_of(tmp_path, log_every=2, eval_every=3), "dpo")
    evaluated, logged = [], []
    for step in run.steps(None, None, 7):
        if run.evaluates(step):
            evaluated.append(step + 1)
        if run.will_log(step):
            logged.append(step + 1)
        run.log(step, {"loss": 1.0})
    assert evaluated == [3, 6, 7]  # and after the last step
    assert logged == [2, 3, 4, 6, 7]  # wherever it evaluates, too
    assert [row["step"] for row in read_metrics(tmp_path)] == logged
    assert run.last_row == {"step": 7, "loss": 1.0}


# ---------------------------------------------------------------- metrics.jsonl


def test_metrics_are_floats_one_line_for_each_step(tmp_path):
    run = Run(args_of(tmp_path), "dpo")
    rows = [
        {"loss": torch.tensor(0.25), "reward": 1, "kl": 1 / 3},
        {"loss": torch.tensor(0.5, dtype=torch.float64)},
    ]
    for step in run.steps(None, None, 2):
        run.log(step, rows[step])
    first = {"step": 1, "loss": 0.25, "reward": 1.0, "kl": 0.333333}
    assert read_metrics(tmp_path) == [first, {"step": 2, "loss": 0.5}]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == read_metrics(tmp_path)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_that_are_not_finite_end_the_run(name, value, tmp_path):
    run = Run(args_of(tmp_path), "dpo")
    steps = run.steps(None, None, 2)
    run.log(next(steps), {"loss": 1.0})
    with pytest.raises(InputError, match=f"step 2: {name} is {value}") as error:
        run.log(next(steps), {"loss": 1.0, name: torch.tensor(value)})
    assert str(tmp_path) in str(error.value)
    assert len(read_metrics(tmp_path)) == 1


def test_seconds_add_up_by_name(tmp_path, monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5])
    run = Run(args_of(tmp_path), "dpo")
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: next(clock))
    for name in ("a", "a", "b"):
        with run.timed(name):
            pass
    assert run.seconds == {"seconds_a": 3.0, "seconds_b": 0.5}


# ---------------------------------------------------------------- once


def rows_of(prompts, responses):
    """Rows as a file gives them: arrays of tokens, also of more than 255."""
    groups = [[array("i", response) for response in group] for group in responses]
    return Rows([array("i", prompt) for prompt in prompts], groups, ["text"] * len(prompts))


ROWS = rows_of([[1, 2], [300]], [[[4], [5, 6]], [[1], [50_000]]])


def never():
    raise AssertionError("it is kept, and not computed again")


def test_what_is_computed_once_is_kept(tmp_path):
    run = Run(args_of(tmp_path), "dpo")
    value = torch.randn(2, 2)
    made_from = [small_model(), ROWS, 0.3]
    assert torch.equal(run.once("ref_logp", lambda: value, of=made_from), value)
    assert torch.equal(read_safetensors(tmp_path / "ref_logp.safetensors")[0]["value"], value)
    again = Run(args_of(tmp_path, resume=True), "dpo")
    kept = again.once("ref_logp", never, of=[small_model(), ROWS, 0.3])  # equal ones, not the same objects
    assert torch.equal(kept, value)
    assert torch.equal(again.once("other", lambda: value + 1, of=made_from), value + 1)


@pytest.mark.parametrize("changed", ["a weight", "a token", "a boundary", "a row", "a number"])
def test_what_was_computed_from_something_else_is_refused(changed, tmp_path):
    run = Run(args_of(tmp_path), "dpo")
    run.once("ref_logp", lambda: torch.zeros(2, 2), of=[small_model(), ROWS, 0.3])
    before = (tmp_path / "ref_logp.safetensors").read_bytes()
    model, rows, number = small_model(), ROWS, 0.3
    if changed == "a weight":
        with torch.no_grad():
            model.embedding.weight[3, 5] += 1e-6
    elif changed == "a token":
        rows = rows_of([[1, 2], [300]], [[[4], [5, 6]], [[1], [50_001]]])
    elif changed == "a boundary":  # the same tokens in the same order, but the prompt ends elsewhere
        rows = rows_of([[1], [300]], [[[2, 4], [5, 6]], [[1], [50_000]]])
    elif changed == "a row":
        rows = ROWS.slice(0, 1)
    else:
        number = 0.4
    with pytest.raises(
        InputError, match="ref_logp.safetensors: was computed from other data or another model"
    ):
        run.once("ref_logp", never, of=[model, rows, number])
    assert (tmp_path / "ref_logp.safetensors").read_bytes() == before


# ---------------------------------------------------------------- the machine


def test_devices_and_compute_dtypes():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert pick_device("cpu") == cpu
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    assert pick_dtype("auto", cpu) is None and pick_dtype("auto", cuda) == torch.bfloat16
    assert pick_dtype("float32", cpu) is None and pick_dtype("float32", cuda) is None
    assert pick_dtype("bfloat16", cpu) == pick_dtype("bfloat16", cuda) == torch.bfloat16
    for name, low in [("auto", False), ("float32", False), ("bfloat16", True)]:
        model = small_model()
        model.compute_dtype = pick_dtype(name, cpu)
        with model.autocast():
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert (product.dtype == torch.bfloat16) == low
