"""Every file that a run keeps may be damaged: a run that finds it so says what to do, or is none the worse.

A damaged folder is resumed. Either it ends with code 2 and one line that names the file and what to
do next, or with the weights and the log of a run that nothing happened to. The same is asked of
finished runs.
"""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from helpers.refusals import copy
from helpers.runs import argv, metrics, run, weights
from safetensors.torch import load_file, save_file
from test_identity import interrupted

import train_dpo
import train_rlhf
import train_sft
from nanoroads.run.flags import run_script
from nanoroads.weights.files import read_safetensors

ADVICE = ("delete", "put it back", "move it away", "--out")  # what a line may say to do
FILES = ["config.json", "metrics.jsonl", "resume.safetensors", "model.safetensors", "demos.jsonl"]
FILES += ["ref_logp.safetensors", "ref_logp_test.safetensors", ".nanoroads-finished.json"]

# ---------------------------------------------------------------- kinds of damage


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def cut_the_end(path, rng):
    os.truncate(path, path.stat().st_size - 1)


def empty(path, rng):
    os.truncate(path, 0)


def flip_a_byte(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def flip_a_byte_of_the_beginning(path, rng):
    data = bytearray(path.read_bytes())
    data[rng.randrange(min(400, len(data)))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def noise(path, rng):
    path.write_bytes(rng.randbytes(path.stat().st_size))


def more(path, rng):
    with open(path, "ab") as file:
        file.write(b'\xff{"step": "x"}\n')


def remove(path, rng):
    path.unlink()


def make_a_folder(path, rng):
    path.unlink()
    path.mkdir()


def link_to_nothing(path, rng):
    path.unlink()
    path.symlink_to(path.parent / "nothing")


def link_to_itself(path, rng):
    path.unlink()
    path.symlink_to(path)


def make_a_pipe(path, rng):
    path.unlink()
    os.mkfifo(path)


DAMAGES = [truncate, cut_the_end, empty, flip_a_byte, flip_a_byte_of_the_beginning, noise, more, remove]
DAMAGES += [make_a_folder, link_to_nothing, link_to_itself, make_a_pipe]
QUICK = (truncate, flip_a_byte, make_a_pipe)

# ---------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def stages(sft, tmp_path_factory):
    """stages(name) -> (script, flags, folder of a run that was interrupted, folder of a finished one)."""
    rl = {"init": sft, "reward": "helpers.runs:brevity", "steps": 8}
    flags_of = {
        "sft": (train_sft, {"data": "roadmap-2", "rows": 200, "steps": 8}),
        "dpo": (train_dpo, {"init": sft, "steps": 8}),
        "reward": (train_rlhf, {"init": sft, "reward": "local", "reward_epochs": 1, "steps": 2}),
        "rl": (train_rlhf, {**rl, "samples": 2, "batch_size": 8}),
    }
    made = {}

    def get(stage):
        if stage not in made:
            script, flags = flags_of[stage]
            folder = tmp_path_factory.mktemp(stage)
            with pytest.MonkeyPatch.context() as patch:
                interrupted(script, folder / "begun", patch, **flags)
            run(script, folder / "finished", **flags)
            made[stage] = (script, flags, folder / "begun", folder / "finished")
        return made[stage]

    return get


def run_folder(stage, folder):
    """Where the stage's own run lies below --out."""
    return folder / "reward" if stage == "reward" else folder


def check_damaged(stages, stage, out, path, capfd):
    """Resume the run in `out`, whose file `path` is damaged. Returns the line with which it was refused."""
    script, flags, _, finished = stages(stage)
    capfd.readouterr()
    try:
        run_script(lambda: script.main(argv(script, out=out, resume=True, **flags)))
    except SystemExit as stopped:
        error = capfd.readouterr().err
        assert stopped.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        assert path.name in error and any(words in error for words in ADVICE), error
        return error
    one, other = run_folder(stage, out), run_folder(stage, finished)
    assert weights(one) == weights(other) and metrics(one) == metrics(other)
    assert weights(out) == weights(finished) and metrics(out) == metrics(finished)
    return ""


def quick_or_slow(stage, damage):
    """The quick tests damage the files of two stages in a few ways."""
    quick = (stage == "dpo" and damage in QUICK) or (stage == "reward" and damage is truncate)
    return pytest.param(stage, damage, marks=() if quick else pytest.mark.slow)


CASES = [quick_or_slow(stage, damage) for stage in ("sft", "dpo", "reward", "rl") for damage in DAMAGES]


@pytest.mark.parametrize("stage, damage", CASES)
def test_a_damaged_file_is_named_with_what_to_do(stage, damage, stages, tmp_path, capfd):
    rng = random.Random(f"{stage} {damage.__name__}")
    for state, source in zip(("begun", "finished"), stages(stage)[2:], strict=True):
        for name in FILES:
            out = tmp_path / f"{state} {name}"
            if not (run_folder(stage, source) / name).exists():
                continue
            shutil.copytree(source, out)
            path = run_folder(stage, out) / name
            damage(path, rng)
            check_damaged(stages, stage, out, path, capfd)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "reward", "rl"])
def test_random_damage(stage, stages, tmp_path, capfd):
    """More of the same, at random: two files, several kinds one after the other."""
    rng = random.Random(stage)
    for trial in range(60):
        source = rng.choice(stages(stage)[2:])
        out = tmp_path / str(trial)
        shutil.copytree(source, out)
        names = [name for name in FILES if (run_folder(stage, source) / name).exists()]
        path = run_folder(stage, out) / rng.choice(names)
        for damage in rng.sample([truncate, flip_a_byte, flip_a_byte_of_the_beginning, more], 2):
            if path.stat().st_size:
                damage(path, rng)
        check_damaged(stages, stage, out, path, capfd)
        shutil.rmtree(out)


# ---------------------------------------------------------------- a checkpoint that can be read


def rewrite(path, change):
    """Change {name: tensor} and {name: text} of a checkpoint, as an older version would have written it."""
    tensors, metadata = read_safetensors(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def first(tensors, ending):
    return next(name for name in tensors if name.endswith(ending))


CHANGES = {
    "no step": lambda tensors, metadata: metadata.pop("step"),
    "moments are missing": lambda tensors, _: tensors.pop(first(tensors, "exp_avg_sq")),
    "no moments at all": lambda tensors, _: [tensors.pop(n) for n in list(tensors) if "optimizer." in n],
    "a weight is missing": lambda tensors, _: tensors.pop("model.norm.weight"),
    "another shape": lambda tensors, _: tensors.update({"model.norm.weight": torch.ones(3)}),
    "another dtype": lambda tensors, _: tensors.update(
        {"model.norm.weight": tensors["model.norm.weight"].to(torch.bfloat16)}
    ),
    "moments of another shape": lambda tensors, _: tensors.update({first(tensors, "exp_avg"): torch.ones(3)}),
    "a weight is NaN": lambda tensors, _: tensors["model.norm.weight"].fill_(torch.nan),
    "a moment is infinite": lambda tensors, _: tensors[first(tensors, "exp_avg")].fill_(torch.inf),
}
for step in ("x", "-3", "0", "8", "9999999999999", "1.5", "", "²"):
    CHANGES[f"step {step}"] = lambda tensors, metadata, step=step: metadata.update(step=step)


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoint_that_says_something_impossible(name, stages, tmp_path, capfd):
    out = copy(stages("dpo")[2], tmp_path / "out")
    path = out / "resume.safetensors"
    rewrite(path, CHANGES[name])
    error = check_damaged(stages, "dpo", out, path, capfd)
    assert f"{path}: " in error and "delete it, and --resume begins again from the first step" in error
    if name == "no step":
        path.unlink()
        assert check_damaged(stages, "dpo", out, path, capfd) == ""  # what it says is right


@pytest.mark.parametrize(
    "text", ['{"stage": "dpo"', "[]", "\xff", "", '{"stage": "dpo", "args": 3}', '{"model_type": "gpt2"}',
             '{"stage": "dpo", "args": {}, "inputs": {}}', '{"stage": ["dpo"], "args": {}}', "{}"]
)  # fmt: skip
def test_a_config_that_says_something_else(text, stages, tmp_path, capfd):
    out = copy(stages("dpo")[2], tmp_path / "out")
    (out / "config.json").write_bytes(text.encode("latin1"))
    assert check_damaged(stages, "dpo", out, out, capfd)


@pytest.mark.parametrize("change", ["another type", "an unknown flag", "two values of one name"])
def test_flags_of_a_config_that_are_of_other_kinds(change, stages, tmp_path, capfd):
    out = copy(stages("dpo")[2], tmp_path / "out")
    path = out / "config.json"
    config = json.loads(path.read_text())
    if change == "another type":
        config["args"]["lr"] = {"a": [1]}
    elif change == "an unknown flag":
        config["args"]["lr_2"] = 3
    text = json.dumps(config)
    if change == "two values of one name":
        text = text.replace('"lr":', '"lr": 7, "lr":')
    path.write_text(text)
    check_damaged(stages, "dpo", out, out, capfd)


def test_the_hash_of_a_file_is_of_its_tensors_and_its_texts(stages):
    path = stages("dpo")[2] / "resume.safetensors"
    tensors, metadata = read_safetensors(path)
    assert metadata["step"] == "5" and metadata.keys() == {"step", "made_from"}
    lines = (stages("dpo")[2] / "metrics.jsonl").read_bytes()
    assert tensors["metrics"].numpy().astype(np.uint8).tobytes() == lines
    assert load_file(path).keys() == tensors.keys()
