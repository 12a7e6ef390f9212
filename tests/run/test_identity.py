"""A run goes on only with what it began with: contents are compared, never sizes, dates or places."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.refusals import change_config, copy
from helpers.runs import argv, metrics, read_jsonl, run, weights, write_jsonl
from helpers.tokens import byte_tokenizer
from safetensors.torch import save_file

import sample
import train_dpo
import train_rlhf
import train_sft
from nanoroads.errors import InputError
from nanoroads.run.run import Run
from nanoroads.text import tokenizer
from nanoroads.weights import identity
from nanoroads.weights.checkpoint import load_model, save_model
from nanoroads.weights.files import read_config, read_safetensors, write_json

RULE = """
def reward(prompt, response):
    return -float(response.count(">"))
"""


def interrupted(script, out, monkeypatch, **flags):
    """Run a script up to its first checkpoint."""
    original = Run.save

    def save(self, step, model, optimizer):
        original(self, step, model, optimizer)
        if self.saved:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", save)
        with pytest.raises(KeyboardInterrupt):
            run(script, out, **flags)
    return out


@pytest.fixture
def inputs(sft, dpo, rows, tmp_path, monkeypatch):
    """{stage: (script, flags)}. The flags name files in the current directory, which a test may change."""
    folder = tmp_path / "inputs"
    shutil.copytree(rows, folder)
    shutil.copytree(sft, folder / "sft")
    shutil.copytree(dpo, folder / "dpo")
    shutil.copy(folder / "pairs.jsonl", folder / "held_out.jsonl")
    (folder / "my_rule.py").write_text(RULE)
    monkeypatch.chdir(folder)
    monkeypatch.delitem(sys.modules, "my_rule", raising=False)
    pairs = {"init": "sft", "data": "pairs.jsonl", "steps": 8}
    rl = {**pairs, "start": "dpo", "compare": "dpo", "max_new_tokens": 12}
    return {
        "sft": (train_sft, {"data": "sft.jsonl", "init": "dpo", "steps": 8}),
        "dpo": (train_dpo, {**pairs, "eval_data": "held_out.jsonl"}),
        "map": (train_dpo, {"init": "sft", "steps": 8}),
        "rl": (train_rlhf, {**rl, "reward": "my_rule:reward"}),
        "rl on a model": (train_rlhf, {**rl, "reward": "dpo", "kl": 0.1}),
    }


def swap_columns(path):
    """The same rows with their columns swapped: a file of the same length."""
    swapped = []
    for row in read_jsonl(path):
        first, second = [name for name in row if name != "prompt"][:2]
        swapped.append({**row, first: row[second], second: row[first]})
    write_jsonl(path, swapped)


def swap_lines(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(reversed(lines)))


def change_a_weight(folder):
    model = load_model(folder)
    with torch.no_grad():
        model.embedding.weight[0, 0] += 1
    save_model(folder, model)


def change_beta(folder):
    change_config(folder, beta=0.4)


def change_the_rule(path):
    path.write_text(RULE.replace("-float", "+float"))


# stage, the file or folder that changes, how, and the words of the refusal
CHANGES = [
    ("sft", "sft.jsonl", swap_lines, "--data sft.jsonl"),
    ("sft", "dpo", change_a_weight, "--init dpo (different: weights)"),
    ("dpo", "pairs.jsonl", swap_columns, "--data pairs.jsonl"),
    ("dpo", "held_out.jsonl", swap_columns, "--eval-data held_out.jsonl"),
    ("dpo", "sft", change_a_weight, "--init sft (different: weights)"),
    ("map", "sft/pairs.jsonl", swap_columns, "--data roadmap (different: pairs.jsonl)"),
    ("map", "sft/pairs_test.jsonl", swap_columns, "--data roadmap (different: pairs_test.jsonl)"),
    ("rl", "pairs.jsonl", swap_lines, "--data pairs.jsonl"),
    ("rl", "my_rule.py", change_the_rule, "--reward my_rule:reward (different: source)"),
    ("rl", "dpo", change_a_weight, "--start dpo (different: weights)"),
    ("rl on a model", "dpo", change_beta, "--start dpo (different: config)"),
]


QUICK = ("pairs.jsonl", "sft.jsonl", "my_rule.py")  # the others are slow
CASES = []
for case in CHANGES:
    CASES.append(pytest.param(*case, marks=() if case[1] in QUICK else pytest.mark.slow))


@pytest.mark.parametrize("stage, name, edit, words", CASES)
def test_a_run_whose_input_has_changed_is_refused_by_the_flag(
    stage, name, edit, words, inputs, refuses, tmp_path, monkeypatch
):
    """Killed, and finished as well; though the file's length and its date are the same."""
    script, flags = inputs[stage]
    begun = interrupted(script, tmp_path / "begun", monkeypatch, **flags)
    finished = run(script, tmp_path / "finished", **flags)
    path = Path(name)
    before = os.stat(path)
    edit(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    for out in (begun, finished):
        refuses(script, out, words, "--out DIR", out=out, resume=True, **flags)


def test_what_was_moved_copied_or_touched_is_the_same(inputs, tmp_path, monkeypatch, capsys):
    """By another path as well; the run ends with the bits of one that was not interrupted."""
    script, flags = inputs["rl"]
    whole = run(script, tmp_path / "whole", **flags)
    begun = interrupted(script, tmp_path / "begun", monkeypatch, **flags)
    Path("sft").rename("moved")
    shutil.copytree("dpo", "copied")
    os.utime("pairs.jsonl", (0, 0))
    change_config(Path("copied"), args={**read_config("dpo")["args"], "log_every": 7})  # no part of the model
    flags = {**flags, "init": "moved", "start": "copied"}
    run(script, begun, resume=True, **flags)
    assert weights(begun) == weights(whole) and metrics(begun) == metrics(whole)
    assert read_config(begun)["args"]["init"] == "moved"
    run(script, begun, resume=True, **flags)
    assert f"{begun} is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_an_edited_tokenizer_is_noticed(inputs, refuses, tmp_path, monkeypatch):
    """It lies in a folder of its own, to which the run's config.json leads, and that of its reference."""
    one = byte_tokenizer(tmp_path / "one")
    rows = [{"prompt": "ab", "response": "ba", "chosen": "abba", "rejected": "b"}] * 40
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    sft = run(train_sft, tmp_path / "sft", data=data, tokenizer=one, steps=2)
    flags = {"data": data, "init": sft}
    begun = interrupted(train_dpo, tmp_path / "begun", monkeypatch, **flags)
    with open(one / "tokenizer_config.json", "a") as file:
        file.write(" ")
    refuses(train_dpo, f"--init {sft} (different: tokenizer)", out=begun, resume=True, **flags)
    words = f"--tokenizer {one} (different: tokenizer)"
    refuses(train_sft, words, data=data, out=sft, tokenizer=one, steps=2, resume=True)


def test_another_path_to_something_else_names_both(inputs, refuses, tmp_path):
    script, flags = inputs["dpo"]
    out = run(script, tmp_path / "out", **flags)
    words = ["began with sft, not with --init dpo", "(different: config, weights)"]
    refuses(script, *words, out=out, resume=True, **{**flags, "init": "dpo"})


def test_the_reward_model_of_a_run_is_refused_too(inputs, refuses, tmp_path, monkeypatch):
    """OUT has not begun yet when stage 1 is killed; its own folder has."""
    flags = {"init": "sft", "data": "pairs.jsonl", "reward_batch_size": 8, "max_new_tokens": 12, "steps": 2}
    begun = interrupted(train_rlhf, tmp_path / "begun", monkeypatch, **flags)
    swap_columns(Path("pairs.jsonl"))
    refuses(train_rlhf, begun / "reward", "--data pairs.jsonl", out=begun, resume=True, **flags)


def test_a_run_of_an_older_version_goes_on_with_a_word(inputs, tmp_path, monkeypatch, capsys):
    """Its config.json has no hashes, and its checkpoint neither a hash nor the log."""
    script, flags = inputs["dpo"]
    whole = run(script, tmp_path / "whole", **flags)
    begun = interrupted(script, tmp_path / "begun", monkeypatch, **flags)
    config = json.loads((begun / "config.json").read_text())
    for name in ("inputs", "machine", "places"):
        del config[name]
    write_json(begun / "config.json", config)
    path = begun / "resume.safetensors"
    tensors, metadata = read_safetensors(path)
    del tensors["metrics"], metadata["made_from"]
    save_file(tensors, path, metadata)
    run(script, begun, resume=True, **flags)
    assert "of an older version; its data and models are not compared" in capsys.readouterr().out
    assert weights(begun) == weights(whole) and metrics(begun) == metrics(whole)


def test_a_checkpoint_of_another_run_is_refused(inputs, tmp_path, monkeypatch):
    """Of the same shapes and the same step, from a run with another seed."""
    script, flags = inputs["dpo"]
    begun = interrupted(script, tmp_path / "begun", monkeypatch, **flags)
    other = interrupted(script, tmp_path / "other", monkeypatch, seed=1, **flags)
    path = begun / "resume.safetensors"
    shutil.copy(other / "resume.safetensors", path)
    with pytest.raises(InputError, match=f"{path}: is the checkpoint of another run; delete it, and --res"):
        run(script, begun, resume=True, **flags)


def test_other_threads_are_worth_a_word(inputs, tmp_path, monkeypatch, capsys):
    script, flags = inputs["sft"]
    begun = interrupted(script, tmp_path / "begun", monkeypatch, **flags)
    assert read_config(begun)["machine"]["threads"] == "1"
    torch.set_num_threads(2)
    try:
        run(script, begun, resume=True, **flags)
    finally:
        torch.set_num_threads(1)
    said = [line for line in capsys.readouterr().out.splitlines() if " before, " in line]
    assert len(said) == 1 and "threads 1 before, 2 now" in said[0] and "last bits" in said[0]


def test_only_a_models_own_files_are_hashed(sft, tmp_path):
    """A link out of the folder is not followed, a pipe not opened; both say so where they are loaded."""
    folder = copy(sft, tmp_path / "model")
    before = identity.of_model(folder)
    (folder / "tokenizer.json").symlink_to("/etc/hostname")
    os.mkfifo(folder / "more.safetensors")
    assert identity.of_model(folder) == before
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/hostname")
    assert identity.of_model(folder)["weights"] == identity.of_files([])


def test_a_chat_template_for_tools_is_a_part_of_the_tokenizer(tmp_path):
    folder = byte_tokenizer(tmp_path / "model")
    templates = folder / "additional_chat_templates"
    templates.mkdir()
    seen = [identity.of_tokenizer(folder)]
    for text in ("{{ tools }}", "{{ messages }}"):
        (templates / "tool_use.jinja").write_text(text)
        seen.append(identity.of_tokenizer(folder))
    assert len({made_of["tokenizer"] for made_of in seen}) == 3


# ---------------------------------------------------------------- where things are


def test_a_run_is_found_from_anywhere(sft, tmp_path, monkeypatch, capsys):
    """--init and the tokenizer as relative paths: config.json keeps what finds them again."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copytree(sft, project / "sft")
    monkeypatch.chdir(project)
    run(train_dpo, Path("dpo"), init="sft", steps=2)
    question = {"model": "sft", "reward": "dpo", "best_of": 2, "prompt": "WA>FL:", "device": "cpu"}
    sample.main(argv(sample, **question))
    expected = capsys.readouterr().out.splitlines()[-2:]

    def answers(folder):
        sample.main(argv(sample, **{**question, "model": folder / "sft", "reward": folder / "dpo"}))
        return capsys.readouterr().out.splitlines()[-2:]

    monkeypatch.chdir(tmp_path)
    assert answers(project) == expected  # from another directory
    project.rename(tmp_path / "moved")
    assert answers(tmp_path / "moved") == expected  # moved with all that it refers to
    (tmp_path / "moved").rename(project)
    shutil.copytree(project / "dpo", tmp_path / "alone")
    change_config(tmp_path / "alone", reference="../nowhere")
    monkeypatch.chdir("/")
    sample.main(argv(sample, **{**question, "model": project / "sft", "reward": tmp_path / "alone"}))
    assert capsys.readouterr().out.splitlines()[-2:] == expected  # the run alone was moved


def test_what_is_really_gone_is_named(sft, refuses, tmp_path):
    shutil.copytree(sft, tmp_path / "sft")
    out = run(train_dpo, tmp_path / "dpo", init=tmp_path / "sft", steps=2)
    shutil.rmtree(tmp_path / "sft")
    words = [out, "reference", tmp_path / "sft", "is gone"]
    refuses(sample, *words, model=sft, reward=out, best_of=2, prompt="WA>FL:", device="cpu")


def test_a_reference_that_was_trained_again_is_no_reference(sft, dpo, rows, refuses, tmp_path):
    """beta log pi/pi_ref with another pi_ref at the same place."""
    shutil.copytree(sft, tmp_path / "sft")
    out = run(train_dpo, tmp_path / "dpo", init=tmp_path / "sft", steps=2)
    save_model(tmp_path / "sft", load_model(dpo))
    words = [out, "was fitted against"]
    refuses(sample, *words, model=sft, reward=out, best_of=2, prompt="WA>FL:", device="cpu")
    data = rows / "pairs.jsonl"  # those beside --init would be refused first
    refuses(train_rlhf, *words, out=tmp_path / "rl", init=tmp_path / "sft", reward=out, data=data)


# ---------------------------------------------------------------- the same tokens


@pytest.fixture(scope="module")
def two_tokenizers(tmp_path_factory):
    """A policy and its DPO run over bytes, and copies that read two bytes the other way round."""
    folder = tmp_path_factory.mktemp("tokens")
    rows = [{"prompt": "ab", "response": "ba", "chosen": "abba", "rejected": "b"}] * 40
    data = write_jsonl(folder / "rows.jsonl", rows)
    one = byte_tokenizer(folder / "one")
    two = byte_tokenizer(folder / "two", swapped=True)
    run(train_sft, folder / "sft", data=data, tokenizer=one, steps=2)
    run(train_dpo, folder / "dpo", data=data, init=folder / "sft", steps=2)
    for name in ("sft", "dpo"):
        other = copy(folder / name, folder / f"other_{name}")
        config = read_config(other)
        place = {"relative": "../two", "absolute": str(two)}
        change_config(other, tokenizer=str(two), places={**config["places"], "tokenizer": place})
    return folder


def test_the_fingerprint_is_of_what_ids_mean(two_tokenizers, tmp_path):
    one = tokenizer.get(str(two_tokenizers / "one"))
    assert one.n_vocab == tokenizer.get(str(two_tokenizers / "two")).n_vocab
    copied = tokenizer.get(str(copy(two_tokenizers / "one", tmp_path / "copied")))
    prints = {tokenizer.fingerprint(tokenizer.get(str(two_tokenizers / name))) for name in ("one", "two")}
    assert len(prints) == 2 and tokenizer.fingerprint(copied) == tokenizer.fingerprint(one)


@pytest.mark.parametrize("flag, name", [("start", "sft"), ("compare", "sft"), ("reward", "dpo")])
def test_models_that_read_other_tokens_are_refused(flag, name, two_tokenizers, refuses, tmp_path):
    """Their vocabularies have the same size."""
    folder = two_tokenizers
    flags = {"init": folder / "sft", "data": folder / "rows.jsonl", "max_new_tokens": 4}
    if flag != "reward":
        flags["reward"] = "helpers.runs:brevity"
    run(train_rlhf, tmp_path / "same", steps=1, **{**flags, flag: folder / name})
    other = folder / f"other_{name}"
    words = [other, "its tokenizer", folder / "two", "other meanings"]
    refuses(train_rlhf, *words, out=tmp_path / "out", **{**flags, flag: other})


def test_a_judge_of_samples_that_reads_other_tokens_is_refused(two_tokenizers, refuses):
    folder = two_tokenizers
    flags = {"model": folder / "sft", "best_of": 2, "prompt": "ab", "max_new_tokens": 4, "device": "cpu"}
    sample.main(argv(sample, reward=folder / "dpo", **flags))
    other = folder / "other_dpo"
    refuses(sample, other, "other meanings", reward=other, **flags)
