"""Rewards and prompts that give nothing: one line on stderr that says
what, exit code 2, and nothing is written."""

import json
import sys

import pytest
from helpers.refusals import change_config, copy, row_file
from helpers.runs import run, write_jsonl

import sample
import train_rlhf
from nanoroads.weights.checkpoint import load_model, save_model

# ---------------------------------------------------------------- rules


@pytest.mark.parametrize(
    "reward, words",
    [
        ("nosuchmodule:f", ["nosuchmodule"]),
        ("nanoroads.world.roadmap:nosuchfunction", ["nosuchfunction"]),
        ("nanoroads.world.roadmap:", []),
        (":f", []),
        ("nanoroads.world.roadmap:STATES", ["not callable"]),
    ],
)
def test_a_rule_that_is_not_there(reward, words, refuses, sft, tmp_path):
    refuses(train_rlhf, f"--reward {reward}", *words, out=tmp_path / "out", init=sft, reward=reward)


def test_a_reward_that_is_neither_a_class_nor_a_folder(refuses, sft, tmp_path):
    refuses(train_rlhf, "gobal", out=tmp_path / "out", init=sft, reward="gobal")


def test_a_rule_that_knows_other_prompts(refuses, sft, rows, tmp_path):
    rule = {"reward": "nanoroads.world.roadmap:true_reward", "data": rows / "pairs.jsonl"}
    words = ["does not name a start and a goal"]
    refuses(train_rlhf, *words, out=tmp_path / "out", init=sft, max_new_tokens=12, **rule)


def test_a_rule_whose_module_is_broken(refuses, sft, tmp_path, monkeypatch):
    (tmp_path / "brokenrule.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)  # modules of the user's own directory are found
    words = ["--reward brokenrule:f", "SyntaxError"]
    refuses(train_rlhf, *words, out=tmp_path / "out", init=sft, reward="brokenrule:f")


@pytest.mark.parametrize(
    "body, words",
    [
        ("return float('nan')", ["says nan", "WA>FL:"]),
        ("return 1e300", ["says 1e+300"]),
        ("return None", ["raised TypeError"]),
        ("raise SystemExit(1)", ["raised SystemExit"]),
        ("pass\nraise SystemExit(3)", ["SystemExit: 3"]),  # when it is imported
    ],
)
def test_a_rule_that_gives_no_number(body, words, refuses, sft, tmp_path, monkeypatch):
    (tmp_path / "rule.py").write_text(f"def f(prompt, response): {body}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "rule", raising=False)
    flags = {"init": sft, "data": row_file(tmp_path), "max_new_tokens": 12}
    refuses(train_rlhf, "--reward rule:f", *words, out=tmp_path / "out", reward="rule:f", **flags)


# ---------------------------------------------------------------- local rewards


def test_a_policy_without_a_beta_is_no_reward(refuses, sft, tmp_path):
    refuses(train_rlhf, sft, out=tmp_path / "out", init=sft, reward=sft)
    refuses(sample, sft, model=sft, reward=sft, best_of=2)


def test_an_rlhf_policy_was_fitted_to_no_pairs(refuses, sft, rlhf):
    refuses(sample, rlhf, "no reward", model=sft, reward=rlhf, best_of=2)


@pytest.mark.parametrize("loss", ["reference-free", "simpo", "orpo", "dpo-norm"])
def test_a_loss_without_a_reference_fits_no_log_ratio(loss, refuses, sft, dpo, tmp_path):
    free = copy(dpo, tmp_path / "free")
    args = json.loads((free / "config.json").read_text())["args"]
    change_config(free, args={**args, "loss": loss})
    refuses(train_rlhf, free, "no reward", out=tmp_path / "out", init=sft, reward=free)


def test_a_local_reward_of_another_reference(refuses, sft, dpo, rows, tmp_path):
    same = copy(sft, tmp_path / "same")
    run(train_rlhf, tmp_path / "moved", init=same, reward=dpo, steps=1)  # what it holds is the same
    other = copy(sft, tmp_path / "other")
    save_model(other, load_model(dpo))
    data = rows / "pairs.jsonl"  # those beside --init would be refused first
    refuses(train_rlhf, dpo, sft, other, out=tmp_path / "out", init=other, reward=dpo, data=data)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("prompt", ["WA>XX:", "Seattle"])
def test_a_prompt_that_has_no_tokens(prompt, refuses, sft):
    refuses(sample, "no tokens", model=sft, prompt=prompt)


@pytest.mark.parametrize("prompt", ["WA>WA:", "WA>FL", "", "WA>FL:" * 20])
def test_a_prompt_that_the_map_does_not_have(prompt, refuses, sft):
    refuses(sample, "prompt", model=sft, prompt=prompt)


def test_sampling_from_what_gives_no_text(refuses, sft, tmp_path):
    refuses(sample, tmp_path / "no.jsonl", "no such file", model=sft, prompts=tmp_path / "no.jsonl")
    refuses(sample, "32", "--max-new-tokens", model=sft, max_new_tokens=40)
    refuses(sample, tmp_path / "no", model=sft, reward=tmp_path / "no", best_of=2)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "WA>FL:"}, {"text": "x"}])
    refuses(sample, f"{path}:2: ", "'prompt'", model=sft, prompts=path)
