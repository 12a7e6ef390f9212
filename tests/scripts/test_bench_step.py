"""A tiny model's steps beside TRL's: the same loss and gradient on all sides, figures for everything."""

import json
import math
from dataclasses import replace

import pytest
import torch
from helpers.folders import small_folder

from experiments import bench_step
from nanoroads import randomness
from nanoroads.errors import InputError
from nanoroads.model import GPT, GPTConfig
from nanoroads.report import steps

SMALL = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
NAMES = {
    "DPO": ["nanoroads", "TRL", "TRL, responses only"],
    "RL, sample": ["nanoroads", "transformers"],
    "RL, update": ["nanoroads", "TRL", "TRL, responses only"],
}


@pytest.fixture
def tiny_sizes(monkeypatch):
    for name, value in (("SMALL", SMALL), ("PROMPT", 12), ("RESPONSE", 5), ("ROUNDS", {"cpu": 2})):
        monkeypatch.setattr(bench_step, name, value)


def bench(tmp_path, *arguments):
    """-> what it writes."""
    pytest.importorskip("trl", reason="trl is missing: pip install -e '.[parity]'")
    if torch.cuda.is_available():
        pytest.skip("of a CPU's steps")
    bench_step.main(["--out", str(tmp_path / "new" / "steps.json"), *arguments])
    return json.loads((tmp_path / "new" / "steps.json").read_text())


def test_everyone_takes_the_same_steps(tiny_sizes, tmp_path, capsys):
    written = bench(tmp_path)
    printed = capsys.readouterr().out
    by_name = {}
    for row in written["rows"]:
        assert list(row) == steps.HEAD
        assert row["s"] > 0 and row["tokens/s"] > 0 and row["MiB"] >= 0
        by_name.setdefault(row["step"], []).append(row)
    assert {name: [row["by"] for row in rows] for name, rows in by_name.items()} == NAMES

    advantages = randomness.generator("bench_step", "advantages").normal(size=4)
    expected = {
        "DPO": -math.log(torch.sigmoid(torch.tensor(bench_step.BETA * 2)).item()),  # a margin of two nats
        "RL, update": -math.exp(0.1) * advantages.mean(),  # ratios of e^0.1
    }
    for name, loss in expected.items():
        for row in by_name[name]:
            assert row["loss"] == pytest.approx(loss, abs=1e-5)
            assert row["gradient norm"] == pytest.approx(by_name[name][0]["gradient norm"], rel=1e-4)
            assert row["gradient norm"] > 0 and row["MFU"] > 0
            assert row["tokens/s"] == pytest.approx(4 * 17 / row["s"])
        ours, trl = by_name[name][:2]
        unit = "pairs" if name == "DPO" else "samples"
        assert f"{name}: {trl['s'] / ours['s']:.2f} times the {unit}/s of TRL\n" in printed
    for row in by_name["RL, sample"]:
        assert row["loss"] is None and row["MFU"] is None and row["tokens/s"] == pytest.approx(20 / row["s"])


def test_a_users_model(tiny_sizes, tmp_path, capsys):
    folder = small_folder(tmp_path)
    written = bench(tmp_path, "--model", str(folder))
    assert written["model"] == str(folder) and len(written["rows"]) == 8
    assert "nanoroads" in capsys.readouterr().out


def test_other_work_gives_no_figures(tiny_sizes, tmp_path, monkeypatch):
    dpo = bench_step.losses.dpo
    monkeypatch.setattr(bench_step.losses, "dpo", lambda *args: 1.01 * dpo(*args))
    with pytest.raises(AssertionError, match="DPO: loss .* by nanoroads, .* by TRL"):
        bench(tmp_path)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- refusals


def test_it_refuses_without_trl(monkeypatch):
    find_spec = bench_step.importlib.util.find_spec
    there_is = {"trl": None, "datasets": None}
    monkeypatch.setattr(
        bench_step.importlib.util, "find_spec", lambda name: there_is.get(name, find_spec("json"))
    )
    with pytest.raises(InputError, match=r"^trl, datasets: not installed; pip install -e '\.\[parity\]'$"):
        bench_step.main([])


def test_a_model_that_is_not_there_or_too_short(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_step.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(bench_step, "no_progress_bars", lambda: None)
    with pytest.raises(InputError, match="no such run"):
        bench_step.main(["--model", str(tmp_path / "none")])
    folder = small_folder(tmp_path)  # 256 positions
    with pytest.raises(InputError, match="fewer than 565 positions"):
        bench_step.main(["--model", str(folder)])


# ---------------------------------------------------------------- what the figures mean


def test_operations_are_those_of_every_product():
    """Pairs of a query and a key, counted one by one."""
    model = GPT(GPTConfig(vocab_size=30, n_layer=3, n_head=4, n_embd=16, d_ff=20, mlp="swiglu"))
    prompt, response, k = bench_step.PROMPT, bench_step.RESPONSE, 3
    seen = sum(range(1, prompt + 1))
    for t in range(1, response + 1):
        seen += k * (prompt + t)
    per_token = 16 * 3 * 16 + 16 * 16 + 3 * 16 * 20  # qkv, out, swiglu
    tokens = prompt + k * response
    forward = 3 * (2 * per_token * tokens + 2 * 2 * 16 * seen) + 2 * 16 * 30 * k * response
    assert bench_step.operations(model, 7, k) == 3 * 7 * forward


def step(by, outcome, name="DPO", **options):
    done = steps.Step(name, by, None, count=2, tokens=10, operations=6e9, outcome=outcome, **options)
    return replace(done, seconds=[0.5, 0.25, 4.0])


@pytest.mark.parametrize("outcome", [(0.7, 30.04), (0.7011, 30.0), (math.nan, 30.0), (0.7, math.nan)])
def test_other_work_is_no_comparison(outcome):
    ours = step("nanoroads", (0.7, 30.0))
    with pytest.raises(AssertionError, match="DPO: .* by nanoroads, .* by TRL"):
        steps.check_same([ours, step("TRL", outcome)], 1e-3)
    steps.check_same([ours, step("TRL", (0.7009, 30.02)), step("TRL", (0.9, 9.0), name="RL")], 1e-3)


def test_figures_are_of_the_median():
    row = steps.row_of(step("nanoroads", (0.7, 3.0), extra_bytes=3 << 20), peak=24e9)
    assert row["s"] == 0.5 and row["pairs or samples/s"] == 4 and row["tokens/s"] == 20
    assert row["MFU"] == 0.5 and row["MiB"] == 3 and (row["loss"], row["gradient norm"]) == (0.7, 3.0)
    slow = row | {"by": "TRL", "s": 1.25, "MiB": None}
    assert steps.steps_verdict([row, slow]) == "DPO: 2.50 times the pairs/s of TRL"
    assert (
        steps.steps_table([slow]).splitlines()[2].startswith("| DPO | TRL | 1.25 | 4 | 20 | 0.5 | - | 0.7 |")
    )


def test_the_peak_is_the_data_sheets_where_the_gpu_is_known():
    bare = steps.bare_product(torch.device("cpu"), torch.float32)
    bare.seconds = [2.0, 1.0, 4.0]
    assert steps.peak_rate("NVIDIA H100 80GB HBM3", bare)[0] == 989e12
    assert steps.peak_rate("NVIDIA H100 PCIe", bare)[0] == 756e12
    assert steps.peak_rate("a CPU", bare) == (2048**3, "a bare product's")
