"""Pairs of a policy's samples: what is drawn, what is redrawn, and that the command keeps what is there."""

import copy
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from nanoroads.errors import InputError
from nanoroads.model import GPT, GPTConfig
from nanoroads.run.made_from import read_record
from nanoroads.text import tokenizer
from nanoroads.text.data import Limits, load
from nanoroads.text.layouts import preference_texts
from nanoroads.weights.checkpoint import save_model
from nanoroads.weights.files import write_json
from nanoroads.world import pairs, roadmap, task

ENCODING = tokenizer.get("roadmap")
EOS = tokenizer.eos_id(ENCODING)
WORLD = roadmap.WORLDS["roadmap-2"]
PROMPTS = roadmap.prompts(WORLD, "train")


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=ENCODING.n_vocab, n_layer=1, n_embd=16, block_size=16, tied=False))
    with torch.no_grad():  # an untrained policy seldom stops: a third of the tokens shall be EOS
        model.norm.bias[0] = 10.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[EOS, 0] = 0.4
    return model


def test_samples_are_different_whole_and_of_the_prompts_given(policy):
    triples = pairs.draw_pairs(policy, ENCODING, WORLD, PROMPTS[:20], 300, seed=3)
    assert len(triples) == 300 and {p for p, _, _ in triples} == set(PROMPTS[:20])
    for _, first, second in triples:
        assert first != second
        assert 1 <= len(tokenizer.encode(ENCODING, first)) <= WORLD.max_moves
        assert 1 <= len(tokenizer.encode(ENCODING, second)) <= WORLD.max_moves
    assert triples == pairs.draw_pairs(policy, ENCODING, WORLD, PROMPTS[:20], 300, seed=3)
    assert triples != pairs.draw_pairs(policy, ENCODING, WORLD, PROMPTS[:20], 300, seed=4)


def test_a_policy_that_says_one_thing_gives_no_pairs(policy, monkeypatch):
    monkeypatch.setattr(task, "generate", lambda model, ids, k, *a, **b: [[[5, EOS]] * k for _ in ids])
    with pytest.raises(InputError, match="hardly ever"):
        pairs.draw_pairs(policy, ENCODING, WORLD, PROMPTS, 10, seed=0)
    monkeypatch.setattr(
        task, "generate", lambda model, ids, k, *a, **b: [[[5, 6, 7], [5, 6, EOS]] for _ in ids]
    )
    with pytest.raises(InputError, match="hardly ever"):  # one of the two was cut before its EOS
        pairs.draw_pairs(policy, ENCODING, WORLD, PROMPTS, 10, seed=0)


def test_each_draw_has_a_seed_of_its_own_and_room_for_the_longest_route(monkeypatch):
    seen = []

    def generate(model, ids, k, length, temperature, eos, seed):
        assert temperature == 1
        seen.append((length, seed))
        return [[[5, EOS], [6, EOS]]] * len(ids)

    monkeypatch.setattr(task, "generate", generate)
    assert len(pairs.draw_pairs(None, ENCODING, WORLD, PROMPTS, 60_000, seed=3)) == 60_000
    seeds = [seed for _, seed in seen]
    assert {length for length, _ in seen} == {WORLD.max_moves + 1}
    assert len(seeds) == len(set(seeds)) == 118


def test_the_splits_draw_other_prompts_even_from_the_same_ones(monkeypatch):
    answers = [[5, EOS], [6, EOS]]  # good for a pair, so that no prompt is drawn again
    monkeypatch.setattr(task, "generate", lambda model, ids, k, *a, **b: [answers] * len(ids))
    drawn = {}
    for split in ("train", "test"):
        triples = pairs.draw_pairs(None, ENCODING, WORLD, PROMPTS, 300, seed=3, split=split)
        drawn[split] = [prompt for prompt, _, _ in triples]
    equal = sum(a == b for a, b in zip(drawn["train"], drawn["test"], strict=True))
    assert equal < 10  # by luck, one in 200


def save_run(folder, policy, world):
    """What a finished SFT run in a world leaves."""
    config = {"model": asdict(policy.config), "tokenizer": "roadmap", "args": {"data": world}}
    write_json(folder / "config.json", config)
    save_model(folder, policy)


def test_the_command_writes_rows_that_the_training_scripts_read(policy, tmp_path, capsys):
    save_run(tmp_path, policy, "roadmap-2")
    out = tmp_path / "pairs.jsonl"
    command = ["--policy", str(tmp_path), "--n", "50", "--out", str(out)]
    pairs.main(command)
    assert f"next: python train_dpo.py --init {tmp_path} --data roadmap-2\n" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 50 and all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
    assert len(load(out, preference_texts, ENCODING, Limits(context=16))) == 50
    before = out.read_bytes()
    with pytest.raises(InputError, match="exists"):
        pairs.main(command)
    assert out.read_bytes() == before


def test_held_out_pairs_are_others_even_where_the_prompts_are_the_same(policy, tmp_path, monkeypatch):
    save_run(tmp_path, policy, "roadmap-hidden")
    rows, streams, label = {}, [], roadmap.label_pairs

    def label_pairs(*arguments):
        streams.append(copy.deepcopy(arguments[-1]).random(1000))  # what the labels are drawn with
        return label(*arguments)

    monkeypatch.setattr(roadmap, "label_pairs", label_pairs)
    for split in ("train", "test"):
        command = ["--policy", tmp_path, "--n", 100, "--split", split, "--seed", 7, "--out", tmp_path / split]
        pairs.main([str(word) for word in command])
        rows[split] = (tmp_path / split).read_text().splitlines()
    assert len(set(rows["train"]) & set(rows["test"])) < 5
    assert abs(np.corrcoef(*streams)[0, 1]) < 0.15


def test_one_command_draws_both_splits_as_two_commands_do(policy, tmp_path):
    save_run(tmp_path, policy, "roadmap-2")
    one = ["--policy", str(tmp_path), "--n", "50", "--seed", "7", "--out"]
    pairs.main([*one, str(tmp_path / "a"), "--test-out", str(tmp_path / "b"), "--test-n", "30"])
    pairs.main([*one, str(tmp_path / "c")])
    pairs.main([*one[:2], "--n", "30", "--seed", "7", "--split", "test", "--out", str(tmp_path / "d")])
    for both, alone in (("a", "c"), ("b", "d")):
        assert (tmp_path / both).read_bytes() == (tmp_path / alone).read_bytes()
        made_from = [read_record(tmp_path / name)["made_from"] for name in (both, alone)]
        assert made_from[0] == made_from[1]
    with pytest.raises(InputError, match="b exists"):
        pairs.main([*one, str(tmp_path / "e"), "--test-out", str(tmp_path / "b")])
    assert not (tmp_path / "e").exists()


def test_pairs_are_of_the_prompts_of_their_split(policy, tmp_path, monkeypatch):
    """Where the splits share no prompt; and as many pairs as the help says."""
    save_run(tmp_path, policy, "roadmap")
    asked = []

    def draw_pairs(policy, encoding, world, prompts, n, seed, split):
        asked.append((world.name, split, n, prompts))
        return [(prompt, ">OR", ">ID") for prompt in prompts[:3]]

    monkeypatch.setattr(pairs, "draw_pairs", draw_pairs)
    command = ["--policy", tmp_path, "--out", tmp_path / "a", "--test-out", tmp_path / "b"]
    pairs.main([str(word) for word in command])
    main = roadmap.WORLDS["roadmap"]
    train, test = roadmap.prompts(main, "train"), roadmap.prompts(main, "test")
    assert asked == [("roadmap", "train", 5000, train), ("roadmap", "test", 1000, test)]
    for name, prompts in (("a", train), ("b", test)):
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert [row["prompt"] for row in rows] == prompts[:3]
