"""Tiny runs that several test files share. Everything runs in this process, on one thread, so that it is exact and quick."""

import json

import pytest
import torch

import train_dpo
import train_rlhf
import train_sft
from nanoroads import common, pairs

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
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in common.read_metrics(folder)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def brevity(prompt, response):
    """A rule with something to say of every response: --reward conftest:brevity."""
    return -float(response.count(">"))


def indifference(prompt, response):
    return 0.5


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_sft(out, world, **flags):
    run(train_sft, out, data=world, **flags)
    run(pairs, out / "pairs.jsonl", policy=out, n=200)
    run(pairs, out / "pairs_test.jsonl", policy=out, n=40, split="test")
    return out


@pytest.fixture(scope="session")
def sft(tmp_path_factory):
    """A finished SFT run on the map, with its pairs. Look, do not touch."""
    return make_sft(tmp_path_factory.mktemp("map") / "sft", "roadmap", steps=150, rows=2000, eval_every=75)


@pytest.fixture(scope="session")
def dpo(sft, tmp_path_factory):
    return run(train_dpo, tmp_path_factory.mktemp("map") / "dpo", init=sft, steps=30)


@pytest.fixture(scope="session")
def rlhf(sft, tmp_path_factory):
    """Both stages, with the global reward."""
    return run(train_rlhf, tmp_path_factory.mktemp("map") / "rlhf", init=sft)


@pytest.fixture(scope="session")
def rows(sft, tmp_path_factory):
    """A folder with a user's own files: sft.jsonl, pairs.jsonl, prompts.jsonl. Their prompts are no prompts of the map."""
    folder = tmp_path_factory.mktemp("rows")
    # "WA>FL:" -> "WA>WA>FL:", which the map's tokenizer reads and its reward does not.
    other = [row | {"prompt": row["prompt"][:3] + row["prompt"]} for row in read_jsonl(sft / "demos.jsonl")[:120]]
    write_jsonl(folder / "sft.jsonl", other)
    two = [row | {"prompt": row["prompt"][:3] + row["prompt"]} for row in read_jsonl(sft / "pairs.jsonl")[:80]]
    write_jsonl(folder / "pairs.jsonl", two)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in two[:3]])
    return folder
