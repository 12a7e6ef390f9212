"""Random damage to every file of a folder: a model that works, or an error in one line; and soon.

The slow test goes on for NANOROADS_FUZZ_SECONDS (default: 30):

    NANOROADS_FUZZ_SECONDS=3600 pytest tests/weights/test_fuzz_folder.py -m slow
"""

import json
import os
import random
import shutil
import time

import pytest
import torch
from helpers.folders import FILES, small_folder

from nanoroads.errors import InputError
from nanoroads.text import chat_template, tokenizer
from nanoroads.text.encode import encode_row
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import read_config
from nanoroads.world.task import task_of_run

MESSAGES = [{"role": "user", "content": "Hi there, <|end|> 12 é 日本"}]
ANSWER = [{"role": "assistant", "content": "Yes."}]
LONGEST = 20  # seconds of processor time for one folder
SECONDS = float(os.environ.get("NANOROADS_FUZZ_SECONDS", "30"))
ODD_VALUES = [None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, float("nan"), float("inf"), "", "a",
              "\0", "\ud800", "../x", "x" * 5000, [], {}, [[]], {"a": {}}, [1, "a"], "[a-z", "(?=a)", "a*",
              "{{", "{{ 1 // 0 }}", "{% for i in range(9) %}a{% endfor %}"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(sft, tmp_path_factory):
    """Three folders: weights in one file, weights with an index, and one of our runs."""
    one = small_folder(tmp_path_factory.mktemp("one"))
    two = tmp_path_factory.mktemp("two") / "model"
    shutil.copytree(one, two)
    (two / "model.safetensors").rename(two / "model-1.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (two / "model.safetensors.index.json").write_text(json.dumps(index))
    three = tmp_path_factory.mktemp("three")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(sft / name, three)
    return [one, two, three]


# ---------------------------------------------------------------- damage


def damage_bytes(contents, rng):
    """Some bytes flipped, cut off, taken out or doubled."""
    contents = bytearray(contents)
    # A safetensors file is mostly numbers; its header is what is read.
    end = min(len(contents), rng.choice([64, 2000, len(contents)]))
    begin = rng.randrange(max(1, end))
    length = rng.choice([1, 1, 2, 8, 100])
    how = rng.choice(["flip", "set", "cut off", "take out", "double"])
    if how == "flip":
        for place in range(begin, min(end, begin + rng.choice([1, 3]))):
            contents[place] ^= 1 << rng.randrange(8)
    elif how == "set":
        contents[begin : begin + length] = bytes(rng.randrange(256) for _ in range(length))
    elif how == "cut off":
        del contents[begin:]
    elif how == "take out":
        del contents[begin : begin + length]
    else:
        contents[begin:begin] = contents[begin : begin + length]
    return bytes(contents)


def damage_json(contents, rng):
    """One value somewhere in it replaced by an odd one, or taken out."""
    value = json.loads(contents)
    node = value
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return json.dumps(rng.choice(ODD_VALUES)).encode()
        key = rng.choice(keys)
        if isinstance(node[key], (dict, list)) and rng.random() < 0.7:
            node = node[key]
        elif rng.random() < 0.2:
            del node[key]
            break
        else:
            node[key] = rng.choice(ODD_VALUES)
            break
    return json.dumps(value).encode()


def damaged_copy(whole, folder, rng):
    """A copy with one or two files damaged. Returns what was done, to name it where the test fails."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(rng.choice(whole), folder)
    names = [name for name in (*FILES, "model.safetensors.index.json", "model-1.safetensors")]
    names = [name for name in names if (folder / name).exists()]
    damaged = rng.sample(names, rng.choice([1, 1, 2]))
    for name in damaged:
        path = folder / name
        damage = damage_bytes
        if name.endswith(".json") and rng.random() < 0.7:
            damage = damage_json
        path.write_bytes(damage(path.read_bytes(), rng))
    return ", ".join(damaged)


# ---------------------------------------------------------------- use


def use(folder):
    """Load, tokenise and compute as a script does. Returns "works", or the message of the error."""
    tokenizer.get.cache_clear()
    chat_template.template.cache_clear()
    try:
        policy = load_policy(folder)
        _, encoding = tokenizer.of(folder, policy)
        task_of_run(read_config(folder))
        row = encode_row(encoding, MESSAGES, [ANSWER])
        tokens = [*row.prompt, *row.responses[0]][: policy.config.block_size]
        tokenizer.decode(encoding, tokens)
    except (InputError, OSError) as error:  # run_script makes one line of either
        assert "\n" not in str(error).strip()
        return str(error)
    if tokens:
        logits = policy.logits(torch.tensor([tokens]))
        assert logits.shape == (1, len(tokens), policy.config.vocab_size)
    return "works"


def fuzz(whole, folder, seed):
    """One damaged folder; its result. Whatever run_script would not print as one line fails the test."""
    rng = random.Random(seed)
    done = damaged_copy(whole, folder, rng)
    began = time.process_time()
    try:
        result = use(folder)
    except Exception as error:
        raise AssertionError(f"seed {seed}, damaged {done}: {error!r}") from error
    assert time.process_time() - began < LONGEST, f"seed {seed}, damaged {done}"
    return result


def test_damaged_folders(whole, tmp_path):
    results = [fuzz(whole, tmp_path / "model", seed) for seed in range(80)]
    works = results.count("works")
    assert 8 < works < 72  # both happen, or the damage is none, or all of it


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
def test_many_damaged_folders(whole, tmp_path):
    end = time.monotonic() + SECONDS
    seed = 10**6  # other damage than that of the quick test
    while time.monotonic() < end:
        fuzz(whole, tmp_path / "model", seed)
        seed += 1
    print(f"{seed - 10**6:,} damaged folders")
