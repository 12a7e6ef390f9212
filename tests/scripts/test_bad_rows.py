"""Rows that do not fit: one line on stderr that names file and
row, exit code 2, and nothing is written."""

import json

import pytest
from helpers.refusals import ROW, row_file, stages
from helpers.runs import run, write_jsonl

import train_dpo

LONG = ">OR" * 40


def test_data_that_is_not_there_or_holds_nothing(refuses, sft, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    for i, (script, flags) in enumerate(stages(sft)):
        flags["out"] = tmp_path / f"out{i}"
        refuses(script, tmp_path / "none.jsonl", "no such file", data=tmp_path / "none.jsonl", **flags)
        refuses(script, tmp_path / "empty.jsonl", "no rows", data=tmp_path / "empty.jsonl", **flags)
        refuses(script, tmp_path / "folder", data=tmp_path / "folder", **flags)
        refuses(script, "roadmap-tiny", data="roadmap-tiny", **flags)  # an unknown world is no file either


@pytest.mark.parametrize(
    "second, words",
    [
        ('{"prompt": "WA>FL:", "resp', ["not a JSON object"]),
        ('["WA>FL:"]', ["not a JSON object", "list"]),
        (json.dumps({**ROW, "prompt": "\xff"}), ["no tokens"]),
        ("null", ["not a JSON object"]),
        ('{"answer": ">OR"}', ["no field"]),
        (json.dumps({**ROW, "prompt": 3}), ["'prompt'", "int"]),
        (json.dumps({**ROW, "prompt": ""}), ["'prompt'", "empty"]),
        (json.dumps({**ROW, "prompt": "Seattle"}), ["no tokens for 'Seattle'"]),
        (json.dumps({**ROW, "response": LONG, "chosen": LONG}), ["take 44 tokens", "context is 32"]),
        (json.dumps({**ROW, "prompt": "WA" + ">FL" * 40 + ":"}), ["tokens", "context is 32"]),
    ],
)
def test_a_row_that_is_wrong_is_named_by_its_line(second, words, refuses, sft, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + second + "\n")
    for i, (script, flags) in enumerate(stages(sft)):
        advice = ["--skip-bad-rows", "--inspect"]
        refuses(script, f"{path}:2: ", *words, *advice, out=tmp_path / f"out{i}", data=path, **flags)


def test_a_pair_of_the_same_response(refuses, sft, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW, ROW, {**ROW, "rejected": ">OR"}])
    for i, (script, flags) in enumerate(stages(sft)[1:]):
        refuses(script, f"{path}:3: ", "same", out=tmp_path / f"out{i}", data=path, **flags)


def test_held_out_pairs_that_are_not_there(refuses, sft, tmp_path):
    for i, (script, flags) in enumerate(stages(sft)[1:]):
        flags.update(data=row_file(tmp_path), eval_data=tmp_path / "no")
        refuses(script, tmp_path / "no", out=tmp_path / f"out{i}", **flags)


def test_a_single_row(refuses, sft, tmp_path):
    """Nothing could be held out of it."""
    path = row_file(tmp_path, rows=1)
    for i, (script, flags) in enumerate(stages(sft)):
        refuses(script, path, out=tmp_path / f"out{i}", data=path, **flags)


def test_other_data_under_the_same_name(refuses, sft, tmp_path):
    """The kept reference log-probs, and the steps that were done, were of other rows."""
    path, out = row_file(tmp_path), tmp_path / "out"
    run(train_dpo, out, init=sft, data=path, resume=True)
    (out / "model.safetensors").unlink()
    for rows in ([ROW] * 9, [{**ROW, "rejected": ">MT"}] * 5):
        write_jsonl(path, rows)
        words = [out, "another --data", path, "--out"]
        refuses(train_dpo, *words, out=out, init=sft, data=path, resume=True)
