"""The house of every script: schedule, data order, optimizer, metrics, flags, commands for what is missing."""

import argparse
import json
import math
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoroads import common
from nanoroads.errors import InputError

# ---------------------------------------------------------------- learning rate


def schedule(steps, **flags):
    args = Namespace(**{"lr": 2.0, "warmup": 0, "schedule": "cosine"} | flags)
    return [common.learning_rate(args, step, steps) for step in range(steps)]


def test_learning_rate_at_its_corners():
    assert schedule(4) == pytest.approx([2 * 0.5 * (1 + math.cos(math.pi * t)) for t in (0, 0.25, 0.5, 0.75)])
    assert schedule(3, schedule="constant") == [2.0, 2.0, 2.0]
    assert schedule(6, schedule="constant", warmup=3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert schedule(1) == [2.0] and schedule(1, warmup=10) == [pytest.approx(2 / 11)]  # never 0: the one step does something
    both = schedule(100, warmup=9)
    assert both[0] == pytest.approx(0.2) and max(both) == both[9] and 0 < both[-1] < 2e-3
    assert all(a > b for a, b in zip(both[9:], both[10:], strict=False))


@given(st.integers(1, 300), st.integers(0, 300), st.sampled_from(["cosine", "constant"]))
def test_learning_rate_is_positive_and_at_most_the_peak(steps, warmup, kind):
    assert all(0 < lr <= 2.0 for lr in schedule(steps, warmup=warmup, schedule=kind))


def test_update_clips_steps_and_forgets():
    model = torch.nn.Linear(2, 1, bias=False)
    args = Namespace(lr=0.5, warmup=0, schedule="constant", clip=1.0, weight_decay=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)  # update() sets the rate of the step
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert common.update(args, model, optimizer, 0, 1).item() == 5.0
    assert torch.allclose(before - model.weight, torch.tensor([[0.3, 0.4]]), atol=1e-6)  # 0.5 x gradient of norm 1
    assert model.weight.grad is None
    before, args.clip = model.weight.detach().clone(), 2.0
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    common.update(args, model, optimizer, 0, 1)
    assert torch.allclose(before - model.weight, torch.tensor([[0.6, 0.8]]), atol=1e-6)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    groups = common.make_optimizer(Namespace(lr=1.0, weight_decay=0.1), model).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.1, 0.0, 0.0, 0.0]


# ---------------------------------------------------------------- data order


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_an_epoch_shows_every_example_once(examples, size, seed, epoch):
    per_epoch = math.ceil(examples / size)
    batches = [common.batch_indices(examples, size, epoch * per_epoch + i, seed) for i in range(per_epoch)]
    assert sorted(sum(batches, [])) == list(range(examples))
    assert all(len(b) == size for b in batches[:-1]) and 1 <= len(batches[-1]) <= size


def test_data_order_is_a_function_of_seed_and_step():
    def order(seed, steps=range(10)):
        return [common.batch_indices(40, 8, step, seed) for step in steps]

    want = order(3)
    torch.manual_seed(99)  # the state of torch's generator does not matter, nor which steps came before
    common.epoch_order.cache_clear()
    assert order(3, reversed(range(10)))[::-1] == want == order(3)
    assert order(4) != want and want[:5] != want[5:]  # other seeds and epochs are other shuffles
    assert order(4)[:5] != want[5:]  # also those that seed + epoch would confuse
    common.batch_indices(40, 8, 0, 3).clear()  # and a caller may do with it what he likes
    assert order(3) == want


def test_steps_and_chunks():
    args = Namespace(steps=None, epochs=2.5, batch_size=10)
    assert common.total_steps(args, 95) == 25 and common.total_steps(args, 1) == 2
    assert common.total_steps(Namespace(steps=7, epochs=2.5, batch_size=10), 95) == 7
    assert common.total_steps(Namespace(steps=None, epochs=0.001, batch_size=10), 95) == 1
    assert common.chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert common.chunks([1, 2, 3], None) == [[1, 2, 3]] == common.chunks([1, 2, 3], 9)


# ---------------------------------------------------------------- metrics.jsonl


def test_metrics_are_floats_one_line_a_step(tmp_path):
    row = common.log_metrics(tmp_path, 1, {"loss": torch.tensor(0.25), "reward": 1, "kl": 1 / 3})
    assert row == {"step": 1, "loss": 0.25, "reward": 1.0, "kl": 0.333333}
    common.log_metrics(tmp_path, 2, {"loss": torch.tensor(0.5, dtype=torch.float64)})
    assert common.read_metrics(tmp_path) == [row, {"step": 2, "loss": 0.5}]
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == common.read_metrics(tmp_path)


@pytest.mark.parametrize("name", ["loss", "grad_norm", "eval_loss"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metrics_that_are_not_finite_end_the_run(name, value, tmp_path):
    common.log_metrics(tmp_path, 1, {"loss": 1.0})
    with pytest.raises(InputError, match=f"step 2: {name} is {value}") as error:
        common.log_metrics(tmp_path, 2, {"loss": 1.0} | {name: torch.tensor(value)})
    assert str(tmp_path) in str(error.value) and len(common.read_metrics(tmp_path)) == 1


# ---------------------------------------------------------------- flags


def test_numbers_of_flags():
    good = [("3", int, {}, 3), ("0.5", float, {}, 0.5), ("0", int, {"or_zero": True}, 0), ("6", int, {"below": 7}, 6)]
    for text, kind, limits, value in good:
        assert common.positive(kind, **limits)(text) == value
    bad = [("0", int, {}), ("-1", int, {"or_zero": True}), ("7", int, {"below": 7}), ("nan", float, {}), ("inf", float, {})]
    for text, kind, limits in [*bad, ("nan", float, {"or_zero": True}), ("-inf", float, {"or_zero": True})]:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not a .* number"):
            common.positive(kind, **limits)(text)
    with pytest.raises(ValueError):
        common.positive(int)("1.5")


def test_defaults_of_a_stage_are_in_its_help(capsys):
    p = common.parser("doc", {"lr": 1e-6, "epochs": 1.0}, out=Path("out/x"), lr=3e-3, epochs=2.5, batch_size=96)
    with pytest.raises(SystemExit) as stopped:
        p.parse_args(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and all(word in text for word in ("out/x", "0.003", "2.5", "96", "--lr 1e-06 --epochs 1.0"))


def test_devices_and_autocast():
    cpu = common.pick_device(Namespace(device="cpu"))
    assert cpu == torch.device("cpu") and common.pick_device(Namespace(device="auto")).type in ("cpu", "cuda", "mps")
    for dtype, device, low in [("auto", "cpu", False), ("float32", "cpu", False), ("bfloat16", "cpu", True)]:
        with common.autocast(Namespace(dtype=dtype), torch.device(device)):
            assert ((torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16) == low


def test_timer_adds_up_by_name(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 20.5])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    timer = common.Timer()
    for name in ("a", "a", "b"):
        with timer(name):
            pass
    assert timer.seconds == {"a": 3.0, "b": 0.5}


# ---------------------------------------------------------------- --out


def arguments(out, **flags):
    return Namespace(**{"out": out, "resume": False, "lr": 0.1, "init": Path("a/b"), "log_every": 10} | flags)


def test_open_run(tmp_path):
    out = tmp_path / "x/y"
    assert common.open_run(arguments(out), "dpo") == out and out.is_dir()
    config = {"stage": "dpo", "args": common.plain(arguments(out))}
    assert config["args"]["init"] == "a/b"
    (out / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors.7.tmp", ".tmpX4fp0Q", "notes.txt"):  # half written, the second by safetensors; the user's
        (out / name).touch()
    assert common.open_run(arguments(out, resume=True, log_every=3), "dpo") == out
    assert {p.name for p in out.iterdir()} == {"config.json", "notes.txt"}
    for flags, stage, words in [
        ({}, "dpo", "already holds a run: --resume"),
        ({"resume": True}, "sft", "stage 'dpo', not 'sft'"),
        ({"resume": True, "lr": 0.2}, "dpo", "its run had --lr 0.1, this one has 0.2"),
        ({"resume": True, "init": Path("a/c")}, "dpo", "its run had --init a/b, this one has a/c"),
        ({"resume": True, "label_smoothing": 0.3}, "dpo", "had --label-smoothing None, this one has 0.3"),
    ]:
        with pytest.raises(InputError, match=words) as error:
            common.open_run(arguments(out, **flags), stage)
        assert str(out) in str(error.value)


# ---------------------------------------------------------------- what is missing is made


def test_make_with_runs_the_command_once(tmp_path, monkeypatch, capsys):
    ran = []

    def fake(command, env):
        ran.append(command)
        (tmp_path / "it").touch()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(common.subprocess, "run", fake)
    for _ in range(2):
        common.make_with(["train_sft.py", "--out", Path("a b"), "--seed", 3], tmp_path / "it")
    assert ran == [[common.sys.executable, str(common.ROOT / "train_sft.py"), "--out", "a b", "--seed", "3"]]
    assert capsys.readouterr().out.splitlines()[1:] == ["  python train_sft.py --out 'a b' --seed 3"]


def test_commands_work_from_any_directory(tmp_path, monkeypatch):
    assert common.python(["-m", "nanoroads.world.pairs", "--n", "3"])[1:] == ["-m", "nanoroads.world.pairs", "--n", "3"]
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    assert common.environment()["PYTHONPATH"].split(common.os.pathsep) == [str(common.ROOT), "/elsewhere"]
    monkeypatch.delenv("PYTHONPATH")
    assert common.environment()["PYTHONPATH"] == str(common.ROOT)
