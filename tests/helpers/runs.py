"""Tiny runs that several test files share. Everything runs in this process, on one thread, so that it is exact and quick."""

import json

import train_dpo
import train_rlhf
import train_sft
from nanoroads.run.run import read_metrics
from nanoroads.world import pairs

STEPS = {"device": "cpu", "steps": 12, "warmup": 2, "log_every": 1, "eval_every": 6, "save_every": 5}
TINY = {
    train_sft: STEPS | {"steps": 60, "lr": 2e-2, "rows": 500, "n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 32},
    train_dpo: STEPS | {"lr": 3e-3},
    train_rlhf: STEPS | {"lr": 3e-3, "samples": 4, "reward_epochs": 1.5, "reward_lr": 3e-3},
}


def argv(script, **flags):
    """Tiny settings of a script, and `flags` over them (None: without that flag, True: without a value) -> argv."""
    words = []
    for name, value in (TINY.get(script, {}) | flags).items():
        if value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def run(script, out=None, **flags):
    """Run a script's main with tiny settings; returns --out."""
    script.main(argv(script, out=out, **flags))
    return out


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def metrics(folder):
    """metrics.jsonl without what differs from run to run."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in read_metrics(folder)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def brevity(prompt, response):
    """A rule with something to say of every response: --reward helpers.runs:brevity."""
    return -float(response.count(">"))


def indifference(prompt, response):
    return 0.5


def make_sft(out, world, **flags):
    run(train_sft, out, data=world, **flags)
    run(pairs, out / "pairs.jsonl", policy=out, n=200)
    run(pairs, out / "pairs_test.jsonl", policy=out, n=40, split="test")
    return out
