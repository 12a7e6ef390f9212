"""Tiny runs that several test files share. Everything runs in this
process, on one thread: exact, and quick."""

import json
import math

import train_dpo
import train_rlhf
import train_sft
from nanoroads.run.folder import read_metrics
from nanoroads.text import data, tokenizer
from nanoroads.weights.checkpoint import load_model
from nanoroads.weights.files import read_config
from nanoroads.world import pairs

STEPS = {"device": "cpu", "steps": 12, "warmup": 2, "log_every": 1, "eval_every": 6, "save_every": 5}
MODEL = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 32}
STAGE_1 = {"reward_epochs": 1.5, "reward_lr": 3e-3}  # of train_rlhf.py, unless the reward is given
TINY = {
    train_sft: {**STEPS, **MODEL, "steps": 60, "lr": 2e-2, "rows": 500},
    train_dpo: {**STEPS, "lr": 3e-3},
    train_rlhf: {**STEPS, "lr": 3e-3, "samples": 4},
}

# ---------------------------------------------------------------- running a script


def argv(script, **flags):
    """Tiny settings of a script, and `flags` over them (None: without
    that flag, True: without a value) -> argv."""
    words = []
    settings = TINY.get(script, {})
    if script is train_rlhf and flags.get("reward", "global") in train_rlhf.REWARD_CLASSES:
        settings = settings | STAGE_1
    for name, value in {**settings, **flags}.items():
        if value is None or value is False:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(str(value))
    return words


def run(script, out=None, **flags):
    """Run a script's main with tiny settings; returns --out."""
    script.main(argv(script, out=out, **flags))
    return out


def make_sft(out, world, **flags):
    """A policy of a world of the map, with its pairs."""
    run(train_sft, out, data=world, **flags)
    run(pairs, out / "pairs.jsonl", policy=out, n=200)
    run(pairs, out / "pairs_test.jsonl", policy=out, n=40, split="test")
    return out


# ---------------------------------------------------------------- what it left


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def metrics(folder):
    """The lines of metrics.jsonl."""
    return read_metrics(folder)


def samples(folder):
    """samples.jsonl; [] of a reward model, which answers nothing."""
    path = folder / "samples.jsonl"
    return read_jsonl(path) if path.exists() else []


def check_run(folder, stage, every, at_evaluation):
    """A finished run has the documented files, and in each line of
    metrics.jsonl these keys. Returns the lines."""
    assert {path.name for path in folder.iterdir()} >= {"model.safetensors", "config.json", "metrics.jsonl"}
    assert not list(folder.glob("*.tmp")) and not (folder / "resume.safetensors").exists()
    config = json.loads((folder / "config.json").read_text())
    assert config["stage"] == stage and {"model", "tokenizer", "args"} <= config.keys()
    load_model(folder)
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    eval_every = read_config(folder)["args"]["eval_every"]
    for row in rows:
        wanted = set(every)
        if row["step"] % eval_every == 0 or row["step"] == len(rows):
            wanted.update(at_evaluation)
        assert row.keys() == wanted, row["step"]
        assert all(math.isfinite(value) for value in row.values())
    return rows


# ---------------------------------------------------------------- rows


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_rows(path, layout):
    """A file for the map's tokenizer and the tiny model's context, as data Rows."""
    return data.load(path, layout, tokenizer.get("roadmap"), data.Limits(MODEL["block_size"]))


# ---------------------------------------------------------------- rules


def brevity(prompt, response):
    """A rule with something to say of every response: --reward helpers.runs:brevity."""
    return -float(response.count(">"))


def indifference(prompt, response):
    return 0.5
