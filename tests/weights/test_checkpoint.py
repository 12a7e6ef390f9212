"""Files of a run: whole or the old ones, and a model that comes back from them is the model."""

import json
import os
from dataclasses import asdict

import pytest
import torch
from helpers.tiny import SHAPES, tiny
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanoroads.errors import InputError
from nanoroads.model import GPT
from nanoroads.run.optim import adamw, update
from nanoroads.weights import files
from nanoroads.weights.checkpoint import (
    drop_state,
    fill,
    is_finished,
    load_model,
    load_policy,
    load_reward_model,
    load_state,
    new_reward_model,
    save_model,
    save_state,
)
from nanoroads.weights.files import cpu_weights, read_config, write_atomic, write_json

TOKENS = torch.arange(20).view(2, 10)


def describe(out, model):
    """The part of a run's config.json that loading reads."""
    write_json(out / "config.json", {"stage": "sft", "model": asdict(model.config), "tokenizer": "roadmap"})


def saved(out, model):
    describe(out, model)
    save_model(out, model)
    return out


def equal(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---------------------------------------------------------------- writing


def test_write_atomic_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    write_atomic(path, lambda p: p.write_text("one"))

    def fails(p):
        p.write_text("tw")
        raise KeyboardInterrupt

    for write in (fails, lambda p: 1 / 0):
        with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
            write_atomic(path, write)
        assert path.read_text() == "one" and os.listdir(tmp_path) == ["file"]
    write_atomic(path, lambda p: p.write_text("two"))
    assert path.read_text() == "two" and os.listdir(tmp_path) == ["file"]

    def fully(p):
        raise SafetensorError("No space left on device")

    with pytest.raises(InputError, match=f"{path}: No space left"):
        write_atomic(path, fully)
    write_atomic(path, lambda p: (p.touch(), p.chmod(0o600)))  # as safetensors makes its files
    assert path.stat().st_mode & 0o777 == 0o666 & ~files.UMASK


def test_write_atomic_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, name=name, original=original: (done.append(name), original(*a))[1]
        )
    write_json(tmp_path / "a.json", {"a": 1})
    assert done == ["fsync", "replace"] and json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_disk_that_is_full_leaves_the_old_model(tmp_path, monkeypatch):
    saved(tmp_path, tiny().float())
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}

    def full(tensors, path, **more):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError):
        save_model(tmp_path, tiny(seed=1))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_comes_back_bit_for_bit(kind, tied, tmp_path):
    model = tiny(kind, tied=tied).float()
    again = load_model(saved(tmp_path, model))
    assert equal(again, model) and asdict(again.config) == asdict(model.config)
    assert torch.equal(again.logits(TOKENS), model.logits(TOKENS))
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not tied) and "embedding.weight" in names
    assert (again.lm_head.weight is again.embedding.weight) == tied
    assert equal(GPT.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("readout", ["last", "sum"])
def test_a_reward_model_comes_back(readout, tmp_path):
    model = tiny(head="scalar", readout=readout).float()
    again = load_model(saved(tmp_path, model))
    assert equal(again, model) and (again.config.head, again.config.readout) == ("scalar", readout)


@pytest.mark.parametrize("tied", [True, False])
def test_a_policy_becomes_the_trunk_of_a_reward_model(tied, tmp_path):
    policy = tiny(tied=tied).float()
    saved(tmp_path, policy)
    torch.manual_seed(0)
    reward = new_reward_model(tmp_path, readout="sum")
    assert (reward.config.head, reward.config.readout) == ("scalar", "sum") and not hasattr(reward, "lm_head")
    assert all(
        torch.equal(v, policy.state_dict()[k])
        for k, v in reward.state_dict().items()
        if k != "scalar_head.weight"
    )
    assert 0.5 < reward.scalar_head.weight.std().item() * 33**0.5 < 1.5


def test_a_reward_model_keeps_the_head_that_its_folder_holds(tmp_path):
    model = tiny(head="scalar").float()
    assert equal(new_reward_model(saved(tmp_path, model)), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_are_read_as_fp32(dtype, tmp_path):
    model = tiny().float()
    saved(tmp_path, model)
    rounded = {k: v.to(dtype) for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(rounded, tmp_path / "model.safetensors")
    again = load_model(tmp_path)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    assert all(torch.equal(again.state_dict()[k], v.float()) for k, v in rounded.items())
    half = load_model(tmp_path, dtype=torch.bfloat16)  # on request the model itself is
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


def test_fill_names_the_tensor(tmp_path):
    def refuses(match, change, **options):
        tensors = dict(cpu_weights(tiny(**options)))
        change(tensors)
        with pytest.raises(InputError, match=match) as error:
            fill(tiny(seed=1, **options), tensors, "some/path")
        assert str(error.value).startswith("some/path: ")

    refuses(r"no tensor blocks\.1\.mlp\.up\.weight", lambda t: t.pop("blocks.1.mlp.up.weight"))
    refuses(r"no tensor embedding\.weight", lambda t: t.pop("embedding.weight"))
    refuses(r"no tensor lm_head\.weight", lambda t: t.pop("lm_head.weight"), tied=False)
    refuses(r"no tensor scalar_head\.weight", lambda t: t.pop("scalar_head.weight"), head="scalar")
    refuses(r"tensor extra .* no place", lambda t: t.update(extra=torch.zeros(2)))
    refuses(
        r"norm\.weight is \(31,\), the config says \(32,\)",
        lambda t: t.update({"norm.weight": torch.zeros(31)}),
    )
    refuses(
        r"is \(32, 23\), the config says \(23, 32\)",
        lambda t: t.update({"embedding.weight": torch.zeros(32, 23)}),
    )


def test_fill_changes_nothing_when_it_refuses():
    model = tiny().float()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tensors = {k: v + 1 for k, v in cpu_weights(model).items()} | {"norm.weight": torch.zeros(3)}
    with pytest.raises(InputError):
        fill(model, tensors, "path")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_other_head_of_a_checkpoint_is_ignored():
    policy, reward = tiny(tied=False), tiny(seed=1, head="scalar")
    fill(reward, cpu_weights(policy), "path", may_be_new=("scalar_head.weight",))
    assert torch.equal(reward.embedding.weight, policy.embedding.weight)


# ---------------------------------------------------------------- resuming


def train(model, optimizer, steps):
    for step in steps:
        model.logits((TOKENS + step) % 23).logsumexp(-1).mean().backward()
        update(model, optimizer, lr=0.01, clip=1.0)


@pytest.mark.parametrize("tied", [True, False])
def test_state_is_all_that_training_needs(tied, tmp_path):
    model = tiny(tied=tied).float()
    optimizer = adamw(model, 0.01, 0.1)
    train(model, optimizer, range(4))
    save_state(tmp_path, model, optimizer, 4)
    again = tiny(seed=9, tied=tied).float()
    resumed = adamw(again, 0.01, 0.1)
    assert load_state(tmp_path, again, resumed) == 4 and equal(again, model)
    for m, o in ((model, optimizer), (again, resumed)):
        train(m, o, range(4, 8))
    assert equal(again, model)
    assert (tmp_path / "resume.safetensors").exists() and not is_finished(tmp_path)


def test_nothing_to_load_is_step_0(tmp_path):
    model = tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert load_state(tmp_path, model, adamw(model, 0.01, 0.1)) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_finish(tmp_path):
    model = tiny().float()
    save_state(tmp_path, model, adamw(model, 0.01, 0.1), 3)
    save_model(tmp_path, model)
    assert not is_finished(tmp_path)
    drop_state(tmp_path)
    assert is_finished(tmp_path) and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_replace_nothing(value, tmp_path):
    model = tiny().float()
    optimizer = adamw(model, 0.01, 0.1)
    save_state(tmp_path, model, optimizer, 3)
    save_model(tmp_path, model)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        model.norm.weight[3] = value
    for save in (lambda: save_state(tmp_path, model, optimizer, 4), lambda: save_model(tmp_path, model)):
        with pytest.raises(InputError, match="not finite") as error:
            save()
        assert str(tmp_path) in str(error.value) and {p: p.read_bytes() for p in tmp_path.iterdir()} == before


# ---------------------------------------------------------------- errors


def test_an_unfinished_run_says_so(tmp_path):
    model = tiny().float()
    describe(tmp_path, model)
    with pytest.raises(InputError, match="model.safetensors: no such file$"):
        load_model(tmp_path)
    save_state(tmp_path, model, adamw(model, 0.01, 0.1), 3)
    with pytest.raises(InputError, match="not finished; --resume it"):
        load_model(tmp_path)


@pytest.mark.parametrize("text", ["[]", "{", "3", '"a"', "\xff"])
def test_a_config_that_is_no_object(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match="config.json: not "):
        read_config(tmp_path)


def test_json_is_read_as_utf8(tmp_path):
    """Whatever encoding the locale has, and though some editors write a mark before the text."""
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + '{"name": "Zoë"}'.encode())
    assert read_config(tmp_path) == {"name": "Zoë"}


@pytest.mark.parametrize("load", [load_policy, load_reward_model])
def test_a_model_must_fit_its_place(load, tmp_path):
    folder = saved(tmp_path, tiny())
    load(folder)
    load(folder, like=tiny(block_size=24))
    with pytest.raises(InputError, match="block_size is 48, that of the policy 64"):
        load(folder, like=tiny(block_size=64))
    with pytest.raises(InputError, match="vocab_size is 23, that of the policy 22"):
        load(folder, like=tiny(vocab_size=22))


def test_a_reward_model_is_no_policy(tmp_path):
    folder = saved(tmp_path, tiny(head="scalar"))
    assert load_reward_model(folder).config.head == "scalar"
    with pytest.raises(InputError, match="a reward model, where a policy is wanted"):
        load_policy(folder)


@pytest.mark.parametrize(
    "load", [load_policy, load_reward_model, new_reward_model, load_model, GPT.from_pretrained]
)
def test_the_compute_dtype_is_the_callers(load, tmp_path):
    folder = saved(tmp_path, tiny())
    assert load(folder).compute_dtype is None
    model = load(folder, compute_dtype=torch.bfloat16)
    assert model.compute_dtype == torch.bfloat16 and model.embedding.weight.dtype == torch.float32


def test_a_reward_model_without_its_head_is_refused(tmp_path):
    save_model(saved(tmp_path, tiny(head="scalar")), tiny())  # the weights of a policy
    with pytest.raises(InputError, match="holds no tensor scalar_head.weight"):
        load_model(tmp_path)
