"""train_sft.py end to end, tiny: the files it leaves, the keys it
logs, the numbers of step 0, and that it learns."""

import math

import pytest
from helpers.runs import check_run, load_rows, metrics, read_jsonl, run, weights

import train_sft
from nanoroads.run.optim import batch_indices
from nanoroads.score import sequence_logps
from nanoroads.text import layouts
from nanoroads.text.split import hold_out
from nanoroads.weights.checkpoint import load_model
from nanoroads.weights.files import read_config

KEYS = {"step", "loss", "grad_norm"}


def test_on_the_map(sft):
    log = check_run(sft, "sft", KEYS, {"eval_loss"})
    assert log[0]["loss"] == pytest.approx(
        math.log(98), abs=0.02
    )  # a new model knows nothing of its 98 tokens
    assert log[-1]["loss"] < 2.4 and log[-1]["eval_loss"] < 2.4
    assert read_config(sft)["tokenizer"] == "roadmap"
    assert len(read_jsonl(sft / "demos.jsonl")) == 2000


def test_on_rows_of_the_user(rows, tmp_path):
    out = run(train_sft, tmp_path / "new", data=rows / "sft.jsonl", rows=None)
    log = check_run(out, "sft", KEYS, {"eval_loss"})
    assert log[-1]["loss"] < log[0]["loss"] - 1


def test_a_new_model_on_rows_of_the_user_learns_without_a_rate(rows, tmp_path):
    """It is as small as the map's, and is trained as the map's is. At a
    pretrained model's rate it would stay as it is."""
    out = run(train_sft, tmp_path / "new", data=rows / "sft.jsonl", rows=None, lr=None, steps=30)
    assert read_config(out)["args"]["lr"] == 3e-3
    log = metrics(out)
    assert log[-1]["loss"] < log[0]["loss"] - 0.2


def test_from_a_policy_that_exists(rows, sft, tmp_path):
    """The first loss is that policy's on the first batch, a mean
    over its tokens, and not a new model's."""
    log = metrics(run(train_sft, tmp_path / "more", data=rows / "sft.jsonl", init=sft, steps=3, lr=1e-4))
    demonstrations, _ = hold_out(load_rows(rows / "sft.jsonl", layouts.sft_texts))
    first = batch_indices(114, 96, 0, 0)  # 120 rows, 5% of them held out; batches for a small model
    logp = sequence_logps(load_model(sft), *demonstrations.take(first))
    nll = -logp.sum().item() / demonstrations.response_tokens(first)
    assert log[0]["loss"] == pytest.approx(nll, abs=1e-5)
    assert nll < 4.5


def test_the_held_out_loss_is_a_mean_over_tokens(rows, tmp_path):
    out = run(train_sft, tmp_path / "out", data=rows / "sft.jsonl", steps=2)
    _, held_out = hold_out(load_rows(rows / "sft.jsonl", layouts.sft_texts))
    logp = sequence_logps(load_model(out), held_out.prompts, held_out.responses)
    nll = -logp.sum().item() / held_out.response_tokens(range(6))
    assert metrics(out)[-1]["eval_loss"] == pytest.approx(nll, abs=1e-5)


def test_the_same_for_a_seed_and_another_for_another(rows, tmp_path):
    made = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        made[name] = weights(run(train_sft, tmp_path / name, data=rows / "sft.jsonl", steps=3, seed=seed))
    assert made["a"] == made["b"] != made["c"]
