"""What all training scripts share: gradient accumulation, bfloat16,
traces, cut responses, inputs that are made."""

import json

import pytest
import torch
from helpers.runs import argv, metrics, read_jsonl, run

import train_dpo
import train_rlhf
import train_sft
from nanoroads.errors import InputError
from nanoroads.run import commands
from nanoroads.weights.checkpoint import load_model
from nanoroads.weights.files import read_config, read_safetensors
from nanoroads.world import pairs

# ---------------------------------------------------------------- gradient accumulation


def stage_flags(stage, sft):
    """(script, flags, folder below --out) of a stage; "rl-grpo" is RL with that algorithm."""
    if stage == "sft":
        return train_sft, {"data": sft / "demos.jsonl"}, ""
    if stage == "dpo":
        return train_dpo, {"init": sft}, ""
    if stage == "rm":
        flags = {"init": sft, "stop_after": "reward", "reward_lr": 0.1, "reward_batch_size": 8}
        return train_rlhf, flags, "reward"
    algo = stage.removeprefix("rl-")
    return train_rlhf, {"init": sft, "reward": "helpers.runs:brevity", "algo": algo, "lr": 0.01}, ""


@pytest.mark.parametrize("stage", ["sft", "dpo", "rm", "rl-rloo", "rl-grpo", "rl-online-dpo", "rl-rebel"])
def test_accumulation_changes_nothing(stage, sft, tmp_path, monkeypatch):
    script, flags, below = stage_flags(stage, sft)
    flags = {"batch_size": 8, "steps": 4, "clip": 1e9, "lr": 0.1, "schedule": "constant", **flags}

    # Plain gradient descent and no clipping: AdamW forgives a gradient of the wrong scale.
    def plain_descent(model, lr, weight_decay):
        return torch.optim.SGD(model.parameters(), lr=lr)

    monkeypatch.setattr(script, "adamw", plain_descent)
    whole = run(script, tmp_path / "whole", micro_batch_size=None, **flags) / below
    parts = run(script, tmp_path / "parts", micro_batch_size=3, **flags) / below
    one, _ = read_safetensors(whole / "model.safetensors")
    two, _ = read_safetensors(parts / "model.safetensors")
    start = load_model(sft).state_dict()
    moved = max((one[name] - start[name]).abs().max().item() for name in one if name in start)
    apart = max((one[name] - two[name]).abs().max().item() for name in one)
    assert apart < 1e-5 and moved > 20 * apart and moved > 1e-3
    for a, b in zip(metrics(whole), metrics(parts), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


# ---------------------------------------------------------------- other ways to run


@pytest.mark.slow
def test_bfloat16_and_a_trace(sft, tmp_path):
    """It still learns, and the weights stay fp32."""
    plain = metrics(run(train_dpo, tmp_path / "plain", init=sft))
    half = run(train_dpo, tmp_path / "half", init=sft, dtype="bfloat16", profile=True)
    assert {value.dtype for value in read_safetensors(half / "model.safetensors")[0].values()} == {
        torch.float32
    }
    assert metrics(half)[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.05)
    assert metrics(half) != plain
    assert len(json.loads((half / "trace.json").read_text())["traceEvents"]) > 100


def test_cut_prompts_and_responses(rows, tmp_path):
    cut = {"max_prompt_tokens": 3, "max_response_tokens": 2}
    log = metrics(run(train_sft, tmp_path / "cut", data=rows / "sft.jsonl", **cut))
    assert log[-1]["loss"] < log[0]["loss"] - 1


# ---------------------------------------------------------------- inputs that are made


def test_missing_policy_and_pairs_are_made(tmp_path, monkeypatch, capsys):
    """Without inputs, the commands that the user would type are
    printed and run; here tiny, in this process."""
    ran = []

    def run_here(command, *more):
        words = commands.command_line(command)[1:]
        if "-m" in words:
            words = words[1:]
        ran.append(words[0].rpartition("/")[2])
        if ran[-1] == "train_sft.py":
            train_sft.main(words[1:] + argv(train_sft))
        else:
            pairs.main(words[1:] + ["--n", "64"])
        return 0

    monkeypatch.setattr(commands, "run_command", run_here)
    init = tmp_path / "sft"
    flags = {"init": init, "data": "roadmap-short", "seed": 3, "steps": 2}
    run(train_dpo, tmp_path / "dpo", **flags)
    assert ran == ["train_sft.py", "nanoroads.world.pairs", "nanoroads.world.pairs"]
    assert capsys.readouterr().out.count("is missing; making it:\n  python ") == 3
    made = read_config(init)["args"]
    assert made["data"] == "roadmap-short" and made["seed"] == 3
    run(train_rlhf, tmp_path / "rlhf", reward="local", **flags)
    assert len(ran) == 3  # what is there is not made again


@pytest.mark.parametrize("code, error", [(1, InputError), (2, SystemExit)])
def test_an_input_that_could_not_be_made(code, error, tmp_path, monkeypatch):
    """Code 2: the command has said why, in a line of its own."""
    monkeypatch.setattr(commands, "run_command", lambda command, *more: code)
    wanted = {1: "sft/model.safetensors: the command above failed", 2: "2"}[code]
    with pytest.raises(error, match=wanted):
        run(train_dpo, tmp_path / "dpo", init=tmp_path / "sft")


def test_pairs_are_for_the_seed(sft, tmp_path):
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        made[name] = read_jsonl(run(pairs, tmp_path / name, policy=sft, n=20, seed=seed))
    assert made["a"] == made["b"] != made["c"]
    for row in made["a"]:
        assert row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"]
