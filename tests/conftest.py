"""Fixtures: tiny runs that tests look at and do not touch."""

import pytest
import torch
from helpers.runs import make_sft, read_jsonl, run, write_jsonl

import train_dpo
import train_rlhf


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
    other = [
        row | {"prompt": row["prompt"][:3] + row["prompt"]} for row in read_jsonl(sft / "demos.jsonl")[:120]
    ]
    write_jsonl(folder / "sft.jsonl", other)
    two = [
        row | {"prompt": row["prompt"][:3] + row["prompt"]} for row in read_jsonl(sft / "pairs.jsonl")[:80]
    ]
    write_jsonl(folder / "pairs.jsonl", two)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in two[:3]])
    return folder
