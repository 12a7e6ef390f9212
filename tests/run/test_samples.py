"""A few held-out prompts, answered at every evaluation: the same for a seed, and without flooding."""

import json
from argparse import Namespace
from array import array

import pytest
import torch
from helpers.runs import read_jsonl, run

import train_dpo
import train_rlhf
import train_sft
from nanoroads.run import samples
from nanoroads.score import LocalJudge
from nanoroads.text import data, tokenizer
from nanoroads.weights.checkpoint import load_model
from nanoroads.world.task import FileTask, task_of


def said_lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample at step ")]


def test_each_evaluation_answers_held_out_prompts(sft, rows, tmp_path, capsys):
    out = run(train_dpo, tmp_path / "dpo", init=sft)  # 12 steps, evaluated at 6 and 12
    records = read_jsonl(out / "samples.jsonl")
    assert [record["step"] for record in records] == 3 * [6] + 3 * [12]
    held_out = {row["prompt"] for row in read_jsonl(sft / "pairs_test.jsonl")}
    prompts = [record["prompt"] for record in records]
    assert held_out.issuperset(prompts) and len(set(prompts)) == 3 and prompts[:3] == prompts[3:]
    assert records[0].keys() == {"step", "prompt", "response", "true_reward"}
    assert len(said_lines(capsys)) == 2  # one for each evaluation

    out = run(train_sft, tmp_path / "sft", init=sft, data=rows / "sft.jsonl", steps=6)
    records = read_jsonl(out / "samples.jsonl")  # of a file nobody knows the true reward
    assert records[0].keys() == {"step", "prompt", "response"}


def test_rl_answers_prompts_it_does_not_train_on_and_says_their_reward(sft, tmp_path, capsys):
    flags = {"init": sft, "reward": "helpers.runs:brevity", "lr": 1e-9}
    out = run(train_rlhf, tmp_path / "rl", **flags)
    records = read_jsonl(out / "samples.jsonl")
    held_out = {row["prompt"] for row in read_jsonl(sft / "pairs_test.jsonl")}
    trained = {row["prompt"] for row in read_jsonl(sft / "pairs.jsonl")}
    for record in records:
        assert record["prompt"] in held_out - trained
        assert record["reward"] == -record["response"].count(">")
    # At this rate the policy stays the same, and so do its random numbers: so do its answers.
    assert [record["response"] for record in records[:3]] == [record["response"] for record in records[3:]]
    assert f"reward {records[0]['reward']:.3f}" in said_lines(capsys)[0]


def test_a_reward_model_answers_nothing(rlhf):
    assert not (rlhf / "reward/samples.jsonl").exists()
    assert {"reward", "true_reward"} <= read_jsonl(rlhf / "samples.jsonl")[0].keys()


def test_the_local_reward_of_the_reference_is_zero(sft, tmp_path):
    """It is beta log pi/pi_ref, so the judge must be handed the reference's log-probs."""
    flags = {"init": sft, "reward": "local", "reward_lr": 1e-12, "reward_epochs": 0.2, "steps": 6}
    records = read_jsonl(run(train_rlhf, tmp_path / "rl", **flags) / "samples.jsonl")
    assert [record["reward"] for record in records] == pytest.approx([0, 0, 0], abs=1e-5)


def test_seeds_answer_differently(sft, tmp_path):
    answers = []
    for seed in (1, 1, 2):
        out = run(train_dpo, tmp_path / f"dpo{len(answers)}", init=sft, seed=seed, lr=1e-9, steps=1)
        answers.append(read_jsonl(out / "samples.jsonl"))
    assert answers[0] == answers[1]
    assert [a["response"] for a in answers[1]] != [b["response"] for b in answers[2]]


# ---------------------------------------------------------------- which prompts, and how they are shown


@pytest.fixture
def encoding():
    return tokenizer.get("roadmap")


def show(policy, prompts, encoding, out, task=None, **of_rl):
    prompts = [array("i", prompt) for prompt in prompts]
    responses = [[] for _ in prompts]
    texts = [tokenizer.decode(encoding, prompt) for prompt in prompts]
    rows = data.Rows(prompts, responses, texts)
    run = Namespace(writes=True, args=Namespace(seed=0, temperature=0.5), device=torch.device("cpu"), out=out)
    samples.show_samples(run, 4, policy, rows, encoding, task or FileTask("x"), **of_rl)
    return read_jsonl(out / "samples.jsonl") if (out / "samples.jsonl").exists() else []


def test_prompts_that_fill_the_context_are_left_out(sft, encoding, tmp_path):
    policy = load_model(sft)
    context = policy.config.block_size
    whole, room_for_one = list(range(1, context + 1)), list(range(1, context))
    assert show(policy, [whole], encoding, tmp_path) == []
    records = show(policy, [whole, room_for_one, room_for_one, [1, 2]], encoding, tmp_path)
    assert [len(tokenizer.encode(encoding, record["prompt"])) for record in records] == [context - 1, 2]
    # All answers are as long as the longest prompt leaves room for.
    assert all(len(tokenizer.encode(encoding, record["response"])) <= 1 for record in records)


def test_answers_of_a_file_are_short_and_prompts_few(sft, encoding, tmp_path, monkeypatch):
    asked = []

    def generate(policy, prompts, k, length, **options):
        asked.append((len(prompts), k, length))
        return [[[1]] for _ in prompts]

    monkeypatch.setattr(samples, "generate", generate)
    policy = load_model(sft)
    policy.config.block_size = 10_000
    records = show(policy, [[1], [2], [3], [4], [5]], encoding, tmp_path)
    assert asked == [(3, 1, 64)] and len(records) == 3
    show(policy, [tokenizer.encode(encoding, "WA>FL:")], encoding, tmp_path, task_of("roadmap"))
    assert asked[1] == (1, 1, task_of("roadmap").world.max_moves + 1)
    # In RL they are as long as the samples that it trains on, as far as the longest prompt leaves room.
    for length, room, wanted in ((100, 10_000, 100), (3, 10_000, 3), (100, 21, 20)):
        policy.config.block_size = room
        show(policy, [[1]], encoding, tmp_path, max_new_tokens=length)
        assert asked[-1] == (1, 1, wanted)


def test_a_local_reward_is_of_the_temperature_of_training(sft, encoding, tmp_path):
    """A policy that is the reference has none, at the temperature of both."""
    policy = load_model(sft)
    judge = LocalJudge(policy, beta=0.3, temperature=0.5)
    prompt = tokenizer.encode(encoding, "WA>FL:")
    [record] = show(policy, [prompt], encoding, tmp_path, judge=judge, reference=policy)
    assert record["response"] and record["reward"] == pytest.approx(0, abs=1e-5)


def test_a_policy_that_went_wrong_answers_nothing(sft, encoding, tmp_path):
    """What is said of it is said by `Run.log`, with the step and what to do."""
    policy = load_model(sft)
    policy.norm.weight.data.fill_(torch.nan)
    assert show(policy, [[1]], encoding, tmp_path) == []


def test_a_line_shows_where_the_prompt_ends_and_obeys_no_terminal():
    record = {
        "step": 5,
        "prompt": "a" * 100 + "end",
        "response": "b\n\x1b[2J\u202e" + "c" * 100,
        "reward": 0.25,
    }
    line = samples.line_of(record)
    assert line.startswith("sample at step 5: '...aaa") and "aend' -> 'b\\n\\x1b[2J\\u202ecc" in line
    assert line.endswith("c...', reward 0.250") and len(line) < 220 and "\n" not in line
    assert json.loads(json.dumps(record)) == record
