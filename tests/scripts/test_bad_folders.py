"""Folders that hold something else: one line on stderr that names file and tensor or flag, and
nothing is overwritten."""

import json
import pickle
import shutil
import sys
import types

import pytest
import torch
from helpers.refusals import RULE, change_config, copy, files, row_file, users_of
from helpers.runs import metrics, read_jsonl, run, weights
from safetensors.torch import load_file

import all_roads
import sample
import train_dpo
import train_rlhf
import train_sft
from nanoroads.weights.checkpoint import load_model
from nanoroads.world import pairs

# ---------------------------------------------------------------- policies


def test_a_policy_of_another_world(refuses, sft, tmp_path):
    """Its pairs are of that world, and would be taken for pairs of this one."""
    words = [f"{sft}: a policy of --data roadmap,", "roadmap-short"]
    for script in (train_dpo, train_rlhf):
        refuses(script, *words, out=tmp_path / "x", init=sft, data="roadmap-short")


def test_a_policy_that_is_not_there(refuses, tmp_path):
    for script, flags in users_of(tmp_path / "no", tmp_path):
        refuses(script, tmp_path / "no", "config.json", **flags)


def break_weights(path, how):
    if how == "pickle":
        path.write_bytes(pickle.dumps({"embedding.weight": [0.0]}))
        return
    if how == "torch.save":
        torch.save({"embedding.weight": torch.zeros(3)}, path)
        return
    whole = path.read_bytes()
    kept = {"empty": 0, "a few bytes": 5, "in the header": 100, "truncated": len(whole) - 1}
    path.write_bytes(whole[: kept[how]])


BREAKS = ["empty", "a few bytes", "in the header", "truncated", "pickle", "torch.save"]


@pytest.mark.parametrize("how", BREAKS)
def test_weights_that_are_no_safetensors(how, refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "sft")
    break_weights(folder / "model.safetensors", how)
    for script, flags in users_of(folder, tmp_path):
        refuses(script, folder / "model.safetensors", "not a whole safetensors file", **flags)


def test_weights_of_another_shape(refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "sft")
    shape = json.loads((folder / "config.json").read_text())["model"]
    change_config(folder, model={**shape, "block_size": 64})
    for script, flags in users_of(folder, tmp_path):
        words = [folder / "model.safetensors", "position_embedding.weight", "(32, 16)", "(64, 16)"]
        refuses(script, *words, **flags)
    change_config(folder, model={**shape, "n_layer": 2})
    for script, flags in users_of(folder, tmp_path):
        refuses(script, folder / "model.safetensors", "no tensor blocks.1.", **flags)


@pytest.mark.parametrize(
    "config",
    ["{", "[" * 100_000, "[]", "3", "{}", '{"model": 3}', '{"model": {"depth": 3}}',
     '{"model": {"n_head": 5}}', '{"model": {"norm": "batch"}}', '{"model_type": "bert"}'],
)  # fmt: skip
def test_a_config_that_is_invalid(config, refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "sft")
    (folder / "config.json").write_text(config)
    for script, flags in users_of(folder, tmp_path)[:4]:
        refuses(script, folder, **flags)


@pytest.mark.parametrize(
    "entry",
    [{"tokenizer": 3}, {"args": None}, {"reference": 3}, {"beta": "x"}, {"n_layer": "2"},
     {"n_embd": -16, "n_head": -1}],
)  # fmt: skip
def test_a_config_of_the_wrong_kinds(entry, refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "sft")
    if "n_layer" in entry or "n_embd" in entry:
        shape = json.loads((folder / "config.json").read_text())["model"]
        entry = {"model": {**shape, **entry}}
    change_config(folder, **entry)
    for script, flags in users_of(folder, tmp_path):
        refuses(script, folder / "config.json", **flags)


def test_an_unfinished_run_is_no_policy(refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "sft")
    (folder / "model.safetensors").rename(folder / "resume.safetensors")
    for script, flags in users_of(folder, tmp_path):
        refuses(script, folder / "model.safetensors", "not finished", **flags)


def test_missing_start_and_compare(refuses, sft, tmp_path):
    for name in ("start", "compare"):
        flags = {"reward": "helpers.runs:brevity", "init": sft, name: tmp_path / "no"}
        refuses(train_rlhf, tmp_path / "no", "config.json", out=tmp_path / name, **flags)


def test_a_reward_model_is_no_policy(refuses, sft, rlhf, tmp_path):
    model, out = rlhf / "reward", tmp_path / "out"
    data = row_file(tmp_path)
    refuses(train_sft, model, "reward model", out=out, init=model, data=data)
    refuses(train_dpo, model, "reward model", out=out, init=model, data=data)
    for name in ("start", "compare"):
        flags = {"init": sft, "reward": "helpers.runs:brevity", name: model}
        refuses(train_rlhf, model, "reward model", out=tmp_path / name, **flags)
    refuses(sample, model, "reward model", model=model)
    refuses(pairs, model, "reward model", policy=model, n=4, out=tmp_path / "pairs.jsonl")


def test_pairs_need_a_policy_of_the_map(refuses, rows, sft, tmp_path):
    other = run(train_sft, tmp_path / "other", data=rows / "sft.jsonl", steps=1)
    refuses(pairs, other, "built-in map", policy=other, out=tmp_path / "pairs.jsonl")
    assert len(read_jsonl(sft / "pairs.jsonl")) == 200 and weights(other)


# ---------------------------------------------------------------- hf:org/name


def test_a_hub_name_that_cannot_be_had(refuses, tmp_path, monkeypatch):
    flags = {"out": tmp_path / "out", "init": "hf:org/name", "data": "x.jsonl"}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuses(train_dpo, "hf:org/name", "pip install 'nanoroads[hf]'", **flags)
    hub = types.SimpleNamespace(snapshot_download=lambda name, allow_patterns: f"{tmp_path}/{1 / 0}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    refuses(train_dpo, "hf:org/name", "division by zero", **flags)


def test_a_hub_name_is_its_downloaded_folder(sft, monkeypatch):
    hub = types.SimpleNamespace(snapshot_download=lambda name, allow_patterns: {"org/name": str(sft)}[name])
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    downloaded, local = load_model("hf:org/name").state_dict(), load_model(sft).state_dict()
    assert downloaded.keys() == local.keys()
    assert all(torch.equal(downloaded[name], local[name]) for name in local)


# ---------------------------------------------------------------- --out


def test_a_directory_with_a_run_is_not_written_to(refuses, sft, dpo, tmp_path):
    folder, data = copy(dpo, tmp_path / "dpo"), row_file(tmp_path)
    refuses(train_dpo, folder, "already holds a run", "--resume", "--out", out=folder, init=sft)
    refuses(train_sft, folder, "already holds a run", out=folder, data=data)
    refuses(train_sft, folder, "stage 'dpo'", "'sft'", out=folder, data=data, resume=True)
    refuses(train_rlhf, folder, "stage 'dpo'", "'rlhf'", out=folder, init=sft, resume=True)
    refuses(pairs, folder / "metrics.jsonl", "exists", policy=sft, n=4, out=folder / "metrics.jsonl")


def test_a_directory_with_a_reward_model_is_not_written_to(refuses, sft, rlhf, tmp_path):
    out = tmp_path / "out"
    copy(rlhf / "reward", out / "reward")
    refuses(train_rlhf, out / "reward", "already holds a run", out=out, init=sft)
    words = [out / "reward", "--reward-lr", "0.003", "1e-05"]
    refuses(train_rlhf, *words, out=out, init=sft, resume=True, reward_lr=1e-5)


def test_a_directory_that_holds_something_else(refuses, sft, tmp_path):
    data, other = row_file(tmp_path), tmp_path / "other"
    other.mkdir()
    shutil.copy(sft / "model.safetensors", other)
    refuses(train_sft, other, "is not a run", out=other, data=data)
    for config in ('{"model_type": "gpt2"}', "[]", "{", '{"stage": "sft"}'):
        (other / "config.json").write_text(config)
        refuses(train_sft, other, out=other, data=data, resume=True)
    refuses(train_sft, data, "is not a run", out=data, data=data)  # a file
    refuses(train_sft, "rows.jsonl", out=data / "below", data=data)  # below a file


# ---------------------------------------------------------------- --resume

OTHER = [("lr", 5e-3), ("seed", 4), ("beta", 1.0), ("loss", "ipo"), ("steps", 31), ("batch_size", 8)]


@pytest.mark.parametrize("flag, value", OTHER)
def test_resume_with_other_flags(flag, value, refuses, sft, dpo, tmp_path):
    folder = copy(dpo, tmp_path / "dpo")
    flags = {"out": folder, "init": sft, "resume": True, "steps": 30, flag: value}
    refuses(train_dpo, folder, f"--{flag.replace('_', '-')} ", value, **flags)


def test_resume_with_flags_that_only_say_where_and_how_often(sft, dpo, tmp_path):
    folder = copy(dpo, tmp_path / "dpo")
    before = files(folder)
    run(train_dpo, folder, init=sft, steps=30, resume=True, eval_every=7, save_every=1, log_every=4)
    assert files(folder) == before


@pytest.mark.parametrize("how", ["a few bytes", "truncated", "pickle", "no optimizer"])
def test_a_checkpoint_to_resume_that_is_broken(how, refuses, sft, tmp_path):
    flags = {"data": sft / "demos.jsonl", "steps": 6, "out": tmp_path / "run", "resume": True}
    path = tmp_path / "run/resume.safetensors"
    run(train_sft, **flags)
    (tmp_path / "run/model.safetensors").rename(path)
    if how != "no optimizer":
        break_weights(path, how)
    refuses(train_sft, path, **flags)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_ledger_of_all_roads_that_is_broken(text, refuses, tmp_path):
    (tmp_path / "phases.json").write_text(text)
    refuses(all_roads, tmp_path / "phases.json", out=tmp_path, quick=True)


# ---------------------------------------------------------------- losses that are not finite


@pytest.mark.parametrize("script", [train_sft, train_dpo, train_rlhf])
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(script, refuses, sft, tmp_path):
    out = tmp_path / "run"
    flags = {"out": out, "steps": 12, "save_every": 1, "warmup": 0, "schedule": "constant", "lr": 1e30}
    if script is train_sft:
        flags["data"] = sft / "demos.jsonl"
    else:
        flags["init"] = sft
    if script is train_rlhf:
        flags["reward"] = "helpers.runs:brevity"
        error = refuses(script, "logits are not finite", "last checkpoint is kept", **flags)
    else:
        error = refuses(script, "step ", "loss is nan", out, **flags)
    assert "a lower --lr" in error
    assert [row["step"] for row in metrics(out)] == [1]
    assert all(value.isfinite().all() for value in load_file(out / "resume.safetensors").values())


def test_weights_that_are_not_finite_are_never_saved(refuses, sft, rows, tmp_path):
    """Where no line of the log is due, the checkpoint itself looks; and so do the final weights."""
    huge = {"warmup": 0, "schedule": "constant", "log_every": 100, "eval_every": 100}
    out = tmp_path / "a"
    refuses(train_sft, out, "not finite", out=out, data=sft / "demos.jsonl", steps=12, lr=1e38, **huge)
    assert not (out / "resume.safetensors").exists() and not (out / "metrics.jsonl").exists()
    out = tmp_path / "b"
    flags = {"init": sft, "data": rows / "pairs.jsonl", **RULE, **huge}
    refuses(train_rlhf, out, "not finite", out=out, steps=1, lr=3.4e38, **flags)
