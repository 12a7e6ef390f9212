"""The map's files beside a run: used again only if they are what was made, and of this very policy."""

import os
import shutil

import pytest
from helpers.refusals import copy
from helpers.runs import run
from safetensors.torch import load_file, save_file

import train_dpo
import train_rlhf
import train_sft
from nanoroads.errors import InputError
from nanoroads.run import commands
from nanoroads.run.made_from import policy_hash, read_record
from nanoroads.world import pairs, roadmap, task

MAP = task.MapTask(roadmap.WORLDS["roadmap"])


@pytest.fixture
def init(sft, tmp_path):
    """A policy with its pairs, to be changed."""
    return copy(sft, tmp_path / "sft")


def train_again(folder):
    """Another policy in the same folder, of the same size and date."""
    path = folder / "model.safetensors"
    before = path.stat()
    tensors = {name: tensor + 0.01 for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_record_says_what_pairs_were_drawn_from(sft):
    for name, split, n in (("pairs.jsonl", "train", 200), ("pairs_test.jsonl", "test", 40)):
        made_from = read_record(sft / name)["made_from"]
        assert made_from == {
            "policy": policy_hash(sft),
            "world": "roadmap",
            "split": split,
            "n": n,
            "seed": 0,
        }


def test_another_seed_of_training_uses_the_pairs_that_are_there(init, tmp_path):
    assert MAP.pairs(init, 1, None) == (init / "pairs.jsonl", init / "pairs_test.jsonl")


@pytest.mark.parametrize("script", [train_dpo, train_rlhf])
def test_pairs_of_a_policy_that_was_trained_again_are_refused(script, init, refuses, tmp_path):
    train_again(init)
    pairs_path = init / "pairs.jsonl"
    refuses(script, pairs_path, "drawn from another policy; delete it", init=init, out=tmp_path / "out")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs_test.jsonl"])
def test_pairs_that_somebody_has_changed_are_refused(name, init, refuses, tmp_path):
    path = init / name
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b">OR", b">CA", 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    refuses(train_dpo, path, "has changed since it was made", init=init, out=tmp_path / "out")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs_test.jsonl"])
def test_pairs_without_a_record_are_refused(name, init):
    (init / f"{name}.made_from.json").unlink()
    with pytest.raises(InputError, match=f"{init / name}: no record says what it was made from; delete it"):
        MAP.pairs(init, 0, None)


def test_pairs_of_the_other_split_or_another_world_are_refused(init):
    shutil.copy(init / "pairs.jsonl", init / "pairs_test.jsonl")
    record = (init / "pairs.jsonl.made_from.json").read_text()
    (init / "pairs_test.jsonl.made_from.json").write_text(record.replace("pairs.jsonl", "pairs_test.jsonl"))
    with pytest.raises(InputError, match="pairs_test.jsonl: was drawn from another split"):
        MAP.pairs(init, 0, None)
    (init / "pairs.jsonl.made_from.json").write_text(record.replace('"roadmap"', '"roadmap-short"'))
    with pytest.raises(InputError, match="pairs.jsonl: was drawn from another world"):
        MAP.pairs(init, 0, None)


def test_a_policy_with_the_same_weights_and_another_shape_is_another(init):
    config = (init / "config.json").read_text()
    before = policy_hash(init)
    (init / "config.json").write_text(config.replace('"n_head": 1', '"n_head": 2'))
    assert policy_hash(init) != before


def test_pairs_that_were_deleted_are_drawn_again(init, monkeypatch):
    train_again(init)
    for name in ("pairs.jsonl", "pairs_test.jsonl"):
        (init / name).unlink()
    monkeypatch.setattr(
        commands, "run_command", lambda command, *more: pairs.main(list(map(str, command[2:])))
    )
    monkeypatch.setattr(pairs, "draw_pairs", lambda *arguments: [("WA>FL:", ">OR", ">CA")])
    train, _ = MAP.pairs(init, 0, None)
    assert read_record(train)["made_from"]["policy"] == policy_hash(init)


# ---------------------------------------------------------------- world.pairs


def test_a_policy_by_a_relative_path(init, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(pairs, "new.jsonl", policy="sft", n=10)
    assert read_record(tmp_path / "new.jsonl")["made_from"]["policy"] == policy_hash(init)


@pytest.mark.parametrize("moment", ["drawing", "record", "file"])
def test_killed_it_leaves_nothing_that_is_half_written(moment, init, monkeypatch, tmp_path):
    out = tmp_path / "new.jsonl"

    def kill(*arguments):
        raise KeyboardInterrupt

    if moment == "drawing":
        monkeypatch.setattr(roadmap, "label_pairs", kill)
    replace = os.replace

    def kill_at(source, target):
        if str(target).endswith({"record": ".json", "file": ".jsonl"}[moment]):
            raise KeyboardInterrupt
        replace(source, target)

    if moment != "drawing":
        monkeypatch.setattr(os, "replace", kill_at)
    with pytest.raises(KeyboardInterrupt):
        run(pairs, out, policy=init, n=10)
    monkeypatch.undo()
    assert not out.exists() and not list(tmp_path.glob("*.tmp"))
    run(pairs, out, policy=init, n=10)


# ---------------------------------------------------------------- demonstrations


def test_a_users_file_in_the_place_of_the_demonstrations_stays(refuses, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "demos.jsonl").write_text("mine\n")
    refuses(train_sft, out / "demos.jsonl", "holds other rows than the map's; delete it", out=out)


def test_demonstrations_that_are_there_are_used_again(tmp_path):
    path = MAP.demonstrations(tmp_path, 20, 3)
    before = path.read_bytes()
    assert MAP.demonstrations(tmp_path, 20, 3).read_bytes() == before
    for rows, seed in ((20, 4), (21, 3)):
        with pytest.raises(InputError, match="demos.jsonl: holds other rows"):
            MAP.demonstrations(tmp_path, rows, seed)
    assert path.read_bytes() == before
