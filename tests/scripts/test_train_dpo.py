"""train_dpo.py end to end, tiny: the files it leaves, the keys it
logs, the numbers of step 0, and that it learns."""

import math
from statistics import mean

import pytest
import torch
from helpers.runs import check_run, load_rows, metrics, run
from torch.nn.functional import logsigmoid

import train_dpo
from nanoroads import losses
from nanoroads.run.optim import batch_indices
from nanoroads.score import sequence_logps
from nanoroads.text import layouts
from nanoroads.weights.checkpoint import load_model
from nanoroads.weights.files import read_config, read_safetensors

MAP_KEYS = {"map_reward", "map_legal", "map_arrives", "map_moves", "map_greedy_reward", "map_kl"}
MEASURES = {"loss", "accuracy", "margin", "chosen_logp", "rejected_logp", "kl_ref_policy"}
EVAL_MEASURES = {f"eval_{name}" for name in MEASURES}
KEYS = MEASURES | {"step", "grad_norm"}


def kept_logps(path):
    return read_safetensors(path)[0]["value"]


def step_0_loss(loss, sft, beta):
    """The loss of the first batch where policy = reference, from the reference log-probs alone."""
    known = {"dpo": math.log(2), "cdpo": math.log(2), "ipo": 1 / (2 * beta) ** 2, "hinge": 1.0}
    known.update({"dpo-norm": math.log(2), "apo-zero": 1.0, "apo-down": 1.0, "kto": 0.5})
    if loss in known:
        return known[loss]
    rows = load_rows(sft / "pairs.jsonl", layouts.preference_texts)
    first = batch_indices(len(rows), 32, 0, 0)
    chosen, rejected = sequence_logps(load_model(sft), *rows.take(first)).unbind(1)
    lengths = torch.tensor(rows.lengths())[first]
    nll = -chosen / lengths[:, 0]  # per token
    if loss == "rpo":
        return math.log(2) + nll.mean().item()
    if loss == "orpo":
        p = torch.stack([-nll, rejected / lengths[:, 1]]).exp()
        log_odds = (p / (1 - p)).log()
        return (nll - 0.1 * logsigmoid(log_odds[0] - log_odds[1])).mean().item()
    if loss == "simpo":
        margin = beta * (chosen / lengths[:, 0] - rejected / lengths[:, 1]) - 0.5
        return -logsigmoid(margin).mean().item()
    return -logsigmoid(beta * (chosen - rejected)).mean().item()


def test_the_defaults_are_those_of_the_model_and_not_of_the_data(sft, tmp_path, monkeypatch):
    """The map's small policy, which is the default of --init, on a file of rows."""
    monkeypatch.chdir(tmp_path)
    small = (1e-4, 4.0, 0.3)
    args = train_dpo.flags(["--data", "rows.jsonl"])  # out/sft is not there yet
    assert (args.lr, args.epochs, args.beta) == small
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sft").symlink_to(sft)
    args = train_dpo.flags(["--data", "rows.jsonl"])
    assert (args.lr, args.epochs, args.beta) == small
    assert train_dpo.flags(["--data", "rows.jsonl", "--init", "hf:org/name"]).lr == 1e-6


@pytest.mark.parametrize("loss", train_dpo.LOSSES)
def test_each_loss(loss, sft, tmp_path):
    out = run(train_dpo, tmp_path / "dpo", init=sft, loss=loss, beta=0.2, steps=30, eval_every=15)
    log = check_run(out, "dpo", KEYS, EVAL_MEASURES | MAP_KEYS)
    first, last = log[0], log[-1]
    assert first["loss"] == pytest.approx(step_0_loss(loss, sft, 0.2), abs=2e-6)
    assert first["margin"] == pytest.approx(0, abs=2e-6)
    assert first["kl_ref_policy"] == pytest.approx(0, abs=2e-6)
    assert mean(row["loss"] for row in log[-5:]) < mean(row["loss"] for row in log[:5])
    assert last["margin"] > 0 and mean(row["accuracy"] for row in log[-5:]) > 0.6
    config = read_config(out)
    assert config["beta"] == 0.2 and config["reference"] == str(sft)
    # The reference log-probs beside the run are those of the reference.
    rows = load_rows(sft / "pairs.jsonl", layouts.preference_texts)
    reference = sequence_logps(load_model(sft), rows.prompts, rows.responses, 32)
    assert torch.equal(kept_logps(out / "ref_logp.safetensors"), reference)


def test_it_starts_at_its_reference_bit_for_bit(sft, tmp_path):
    """In the same batch layout (each pair alone) step 0 gives the
    reference's log-probs: every pair is a tie."""
    first = metrics(run(train_dpo, tmp_path / "dpo", init=sft, micro_batch_size=1, steps=1))[0]
    assert (first["accuracy"], first["margin"], first["kl_ref_policy"]) == (0.5, 0.0, 0.0)


def test_it_evaluates_on_the_test_pairs_of_the_map(dpo, sft):
    rows = load_rows(sft / "pairs_test.jsonl", layouts.preference_texts)
    logp = sequence_logps(load_model(dpo), rows.prompts, rows.responses)
    ref = sequence_logps(load_model(sft), rows.prompts, rows.responses)
    margin = 0.3 * ((logp - ref)[:, 0] - (logp - ref)[:, 1])
    wanted = {
        "loss": losses.dpo(*logp.unbind(1), *ref.unbind(1), 0.3),
        "chosen_logp": logp[:, 0],
        "rejected_logp": logp[:, 1],
        "kl_ref_policy": ref - logp,
        "margin": margin,
        "accuracy": (margin > 0).float(),
    }
    last = metrics(dpo)[-1]
    for name, values in wanted.items():
        assert last[f"eval_{name}"] == pytest.approx(values.mean().item(), abs=1e-4), name
    assert last["eval_loss"] == pytest.approx(wanted["loss"].mean().item(), abs=1e-5)


def test_on_rows_of_the_user(rows, sft, tmp_path):
    out = run(train_dpo, tmp_path / "a", init=sft, data=rows / "pairs.jsonl")
    log = check_run(out, "dpo", KEYS, EVAL_MEASURES)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] < log[0]["loss"]
    assert len(kept_logps(out / "ref_logp.safetensors")) == 76  # 5% of the 80 pairs are held out
    assert len(kept_logps(out / "ref_logp_test.safetensors")) == 4
    flags = {"data": rows / "pairs.jsonl", "eval_data": rows / "pairs.jsonl"}
    out = run(train_dpo, tmp_path / "b", init=sft, steps=1, **flags)
    files = list(out.glob("ref_logp*"))
    assert len(files) == 2 and {len(kept_logps(path)) for path in files} == {80}
