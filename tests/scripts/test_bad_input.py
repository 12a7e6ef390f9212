"""Whatever a user gets wrong is one line on stderr that names what and where, exit code 2, and no file is overwritten."""

import json
import pickle
import shutil
import subprocess
import sys
import types

import pytest
import torch
from helpers.runs import argv, metrics, read_jsonl, run, weights, write_jsonl

import all_roads
import sample
import train_dpo
import train_rlhf
import train_sft
from nanoroads import common, pairs
from nanoroads.weights.checkpoint import load_model


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def refuses(capfd, tmp_path):
    """refuses(script, *words, **flags): it ends with one line of stderr that holds every word, and exit code 2. Files that
    were there are as they were. Returns the line."""

    def check(script, *words, exact=True, **flags):
        before = files(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            common.run_script(lambda: script.main(argv(script, **flags)))
        error = capfd.readouterr().err
        assert stopped.value.code == 2, error
        assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1, error
        assert "Traceback" not in error and len(error) < 400
        for word in words:
            assert str(word) in error, f"{word!r} is not in {error!r}"
        after = files(tmp_path)
        assert {p: after.get(p) for p in before} == before
        assert not [
            p for p in after if p.suffix == ".tmp" or p.name == "model.safetensors" and p not in before
        ]
        return error

    return check


# ---------------------------------------------------------------- the real thing: processes


@pytest.mark.parametrize(
    "command, words",
    [
        (["train_sft.py", "--data", "no/such.jsonl"], ["no/such.jsonl: no such file"]),
        (["sample.py", "--model", "no/run"], ["no/run", "config.json"]),
        (
            ["-m", "nanoroads.world.pairs", "--policy", "no/run", "--out", "x.jsonl"],
            ["no/run", "config.json"],
        ),
        (["train_dpo.py", "--loss", "ppo"], ["train_dpo.py", "--loss", "'ppo'", "simpo"]),
    ],
)
def test_a_process_says_one_line_and_exits_with_2(command, words, tmp_path):
    done = subprocess.run(
        common.python(command), cwd=tmp_path, env=common.environment(), capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert all(word in done.stderr for word in words) and not done.stdout and not files(tmp_path)


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("script", [train_sft, train_dpo, train_rlhf])
@pytest.mark.parametrize(
    "flag, value",
    [
        ("steps", 0), ("steps", -1), ("steps", 1.5), ("epochs", "nan"), ("lr", 0), ("lr", "inf"), ("lr", "fast"), ("clip", 0),
        ("batch_size", 0), ("micro_batch_size", -2), ("save_every", 0), ("warmup", -1), ("weight_decay", -1),
        ("weight_decay", "nan"), ("seed", -1), ("seed", 2**64), ("seed", "x"), ("device", "tpu"), ("dtype", "int8"),
        ("schedule", "linear"), ("max_prompt_tokens", 0),
    ],
)  # fmt: skip
def test_values_that_no_run_can_have(script, flag, value, refuses, tmp_path):
    flags = {"out": tmp_path / "out", "data": tmp_path / "none.jsonl"}  # the flags are read before any file
    refuses(script, f"--{flag.replace('_', '-')}", value, **flags | {flag: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (train_sft, {"n_layer": 0}, ["--n-layer", "0"]),
        (train_sft, {"n_embd": 30, "n_head": 4}, ["--n-embd 30", "--n-head 4"]),
        (train_sft, {"tokenizer": "t5"}, ["t5", "roadmap", "gpt2"]),
        (train_dpo, {"beta": 0}, ["--beta", "0"]),
        (train_dpo, {"loss": "ppo"}, ["--loss", "ppo"]),
        (train_rlhf, {"algo": "ppo"}, ["--algo", "ppo"]),
        (train_rlhf, {"samples": 1}, ["--samples 1", "rloo"]),
        (train_rlhf, {"samples": 3, "algo": "rebel"}, ["--samples 3", "rebel", "even"]),
        (train_rlhf, {"temperature": 0}, ["--temperature", "0"]),
        (train_rlhf, {"kl": -1}, ["--kl", "-1"]),
        (sample, {"model": "x", "temperature": -1}, ["--temperature"]),
        (sample, {"model": "x", "top_p": 0}, ["--top-p"]),
        (sample, {"model": "x", "best_of": 4}, ["--best-of", "--reward"]),
        (sample, {"model": "x", "prompt": "a", "chat": True}, ["--chat", "--prompt"]),
        (sample, {}, ["--model"]),
        (pairs, {"policy": "x", "out": "y", "n": 0}, ["--n"]),
        (all_roads, {"jobs": 0}, ["--jobs"]),
        (all_roads, {"seeds": "one"}, ["--seeds"]),
    ],
)
def test_values_of_one_script(script, flags, words, refuses, tmp_path):
    if script not in (sample, pairs, all_roads):
        flags = {"out": tmp_path / "out", "data": tmp_path / "none.jsonl"} | flags
    refuses(script, *words, **flags)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", [train_sft, train_dpo, train_rlhf, sample])
def test_a_device_that_is_not_there(script, refuses, sft, tmp_path):
    refuses(
        script,
        "--device cuda",
        **{"model": sft} if script is sample else {"out": tmp_path / "out"},
        device="cuda",
    )
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- data


def stages(sft, tmp_path):
    return [(train_sft, {}), (train_dpo, {"init": sft}), (train_rlhf, {"init": sft, "max_new_tokens": 12})]


def test_data_that_is_not_there_or_holds_nothing(refuses, sft, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    for i, (script, flags) in enumerate(stages(sft, tmp_path)):
        out = tmp_path / f"out{i}"
        refuses(
            script, tmp_path / "none.jsonl", "no such file", out=out, data=tmp_path / "none.jsonl", **flags
        )
        refuses(script, tmp_path / "empty.jsonl", "no rows", out=out, data=tmp_path / "empty.jsonl", **flags)
        refuses(script, tmp_path / "folder", out=out, data=tmp_path / "folder", **flags)
        refuses(
            script, "roadmap-tiny", out=out, data="roadmap-tiny", **flags
        )  # an unknown world is no file either


ROW = {"prompt": "WA>FL:", "response": ">OR", "chosen": ">OR", "rejected": ">CA"}
LONG = ">OR" * 40


@pytest.mark.parametrize(
    "second, words",
    [
        ('{"prompt": "WA>FL:", "resp', ["not a JSON object"]),
        ('["WA>FL:"]', ["not a JSON object", "list"]),
        (json.dumps(ROW | {"prompt": "\xff"}), ["no tokens"]),
        ("", ["not a JSON object"]),
        ('{"answer": ">OR"}', ["no field"]),
        (json.dumps(ROW | {"prompt": 3}), ["'prompt'", "int"]),
        (json.dumps(ROW | {"prompt": ""}), ["'prompt'", "empty"]),
        (json.dumps(ROW | {"prompt": "Seattle"}), ["no tokens for 'Seattle'"]),
        (json.dumps(ROW | {"response": LONG, "chosen": LONG}), ["take 44 tokens", "context is 32"]),
        (json.dumps(ROW | {"prompt": "WA" + ">FL" * 40 + ":"}), ["tokens", "context is 32"]),
    ],
)
def test_a_row_that_is_wrong_is_named_by_its_line(second, words, refuses, sft, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + second + "\n")
    for i, (script, flags) in enumerate(stages(sft, tmp_path)):
        refuses(script, f"{path}:2: ", *words, out=tmp_path / f"out{i}", data=path, **flags)


def test_a_pair_of_the_same_response(refuses, sft, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW, ROW, ROW | {"rejected": ">OR"}])
    for i, (script, flags) in enumerate(stages(sft, tmp_path)[1:]):
        refuses(script, f"{path}:3: ", "same", out=tmp_path / f"out{i}", data=path, **flags)


def test_held_out_pairs_that_are_not_there(refuses, sft, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW] * 5)
    for i, (script, flags) in enumerate(stages(sft, tmp_path)[1:]):
        refuses(
            script, tmp_path / "no", out=tmp_path / f"out{i}", data=path, eval_data=tmp_path / "no", **flags
        )


# ---------------------------------------------------------------- checkpoints


def copy(run_, path):
    shutil.copytree(run_, path)
    return path


def users_of(folder, tmp_path):
    """Everything that opens a run by its folder."""
    out, data = tmp_path / "out", tmp_path / "rows.jsonl"
    write_jsonl(data, [ROW] * 5)
    rule = {"reward": "helpers.runs:brevity", "max_new_tokens": 12}
    return [
        (train_sft, {"init": folder, "data": data, "out": out / "0"}),
        (train_dpo, {"init": folder, "data": data, "out": out / "1"}),
        (train_rlhf, {"init": folder, "data": data, "out": out / "2", **rule}),
        (sample, {"model": folder, "device": "cpu"}),
        (pairs, {"policy": folder, "out": out / "pairs.jsonl", "n": 4}),
    ]


def test_a_policy_of_another_world(refuses, sft, tmp_path):
    """Its pairs are of that world, and would be taken for pairs of this one."""
    for script in (train_dpo, train_rlhf):
        refuses(
            script,
            f"{sft}: a policy of --data roadmap,",
            "roadmap-short",
            out=tmp_path / "x",
            init=sft,
            data="roadmap-short",
        )


def test_a_policy_that_is_not_there(refuses, tmp_path):
    for script, flags in users_of(tmp_path / "no", tmp_path):
        refuses(script, tmp_path / "no", "config.json", **flags)


def break_weights(path, how):
    whole = path.read_bytes()
    if how == "pickle":
        path.write_bytes(pickle.dumps({"embedding.weight": [0.0]}))
    elif how == "torch.save":
        torch.save({"embedding.weight": torch.zeros(3)}, path)
    else:
        path.write_bytes(
            whole[: {"empty": 0, "a few bytes": 5, "in the header": 100, "truncated": len(whole) - 1}[how]]
        )


@pytest.mark.parametrize(
    "how", ["empty", "a few bytes", "in the header", "truncated", "pickle", "torch.save"]
)
def test_weights_that_are_no_safetensors(how, refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "sft")
    break_weights(folder / "model.safetensors", how)
    for script, flags in users_of(folder, tmp_path):
        refuses(script, folder / "model.safetensors", "not a whole safetensors file", **flags)


def test_weights_of_another_shape(refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "sft")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"block_size": 64}}))
    for script, flags in users_of(folder, tmp_path):
        refuses(
            script, folder / "model.safetensors", "position_embedding.weight", "(32, 16)", "(64, 16)", **flags
        )
    (folder / "config.json").write_text(json.dumps(config | {"model": config["model"] | {"n_layer": 2}}))
    for script, flags in users_of(folder, tmp_path):
        refuses(script, folder / "model.safetensors", "no tensor blocks.1.", **flags)


@pytest.mark.parametrize(
    "config",
    ["{", "[" * 100_000, "[]", "3", "{}", '{"model": 3}', '{"model": {"depth": 3}}', '{"model": {"n_head": 5}}',
     '{"model": {"norm": "batch"}}', '{"model_type": "bert"}'],
)  # fmt: skip
def test_a_config_that_is_none(config, refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "sft")
    (folder / "config.json").write_text(config)
    for script, flags in users_of(folder, tmp_path)[:4]:
        refuses(script, folder, **flags)


def test_an_unfinished_run_is_no_policy(refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "sft")
    (folder / "model.safetensors").rename(folder / "resume.safetensors")
    for script, flags in users_of(folder, tmp_path):
        refuses(script, folder / "model.safetensors", "not finished", **flags)


@pytest.mark.parametrize("how", ["a few bytes", "truncated", "pickle", "no optimizer"])
def test_a_checkpoint_to_resume_that_is_broken(how, refuses, sft, tmp_path):
    flags = {"data": sft / "demos.jsonl", "steps": 6, "out": tmp_path / "run", "resume": True}
    path = tmp_path / "run/resume.safetensors"
    run(train_sft, **flags)
    (tmp_path / "run/model.safetensors").rename(path)
    if how != "no optimizer":
        break_weights(path, how)
    refuses(train_sft, path, **flags)


# ---------------------------------------------------------------- --out


def test_a_directory_with_a_run_is_not_written_to(refuses, sft, dpo, tmp_path):
    mine, data = copy(dpo, tmp_path / "dpo"), write_jsonl(tmp_path / "rows.jsonl", [ROW] * 5)
    refuses(train_dpo, mine, "already holds a run", "--resume", "--out", out=mine, init=sft)
    refuses(train_sft, mine, "already holds a run", out=mine, data=data)
    refuses(train_sft, mine, "stage 'dpo'", "'sft'", out=mine, data=data, resume=True)
    refuses(train_rlhf, mine, "stage 'dpo'", "'rlhf'", out=mine, init=sft, resume=True)
    refuses(pairs, mine / "metrics.jsonl", "exists", policy=sft, n=4, out=mine / "metrics.jsonl")


def test_a_directory_with_an_unfinished_reward_model_is_not_written_to(refuses, sft, tmp_path):
    out = run(train_rlhf, tmp_path / "out", init=sft, stop_after="reward")
    refuses(train_rlhf, out / "reward", "already holds a run", out=out, init=sft)
    refuses(
        train_rlhf, out / "reward", "lr", "0.003", "1e-05", out=out, init=sft, resume=True, reward_lr=1e-5
    )


OTHER = [("lr", 5e-3), ("seed", 4), ("beta", 1.0), ("loss", "ipo"), ("steps", 31), ("batch_size", 8)]


@pytest.mark.parametrize("flag, value", OTHER)
def test_resume_with_other_flags(flag, value, refuses, sft, dpo, tmp_path):
    mine = copy(dpo, tmp_path / "dpo")
    name = f"--{flag.replace('_', '-')}"
    refuses(
        train_dpo,
        mine,
        f"{name} ",
        value,
        **{"out": mine, "init": sft, "resume": True, "steps": 30} | {flag: value},
    )


def test_resume_with_flags_that_only_say_where_and_how_often(sft, dpo, tmp_path):
    mine = copy(dpo, tmp_path / "dpo")
    before = files(mine)
    run(train_dpo, mine, init=sft, steps=30, resume=True, eval_every=7, save_every=1, log_every=4)
    assert files(mine) == before


def test_a_directory_that_is_none_of_ours(refuses, sft, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [ROW] * 5)
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(sft / "model.safetensors", other)
    refuses(train_sft, other, "is not a run", out=other, data=data)
    for config in ('{"model_type": "gpt2"}', "[]", "{", '{"stage": "sft"}'):
        (other / "config.json").write_text(config)
        refuses(train_sft, other, out=other, data=data, resume=True)
    refuses(train_sft, data, "is not a run", out=data, data=data)  # a file
    refuses(train_sft, "rows.jsonl", out=data / "below", data=data)  # below a file


# ---------------------------------------------------------------- losses that are not finite


@pytest.mark.parametrize("script", [train_sft, train_dpo, train_rlhf])
def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(script, refuses, sft, tmp_path, monkeypatch):
    flags = (
        {"data": sft / "demos.jsonl"}
        if script is train_sft
        else {"init": sft, "reward": "helpers.runs:brevity"}
    )
    flags = {k: v for k, v in flags.items() if not (script is train_dpo and k == "reward")}
    flags |= {"out": tmp_path / "run", "steps": 12, "save_every": 1, "warmup": 0, "schedule": "constant"}
    assert "a lower --lr" in refuses(script, "step ", "loss is nan", tmp_path / "run", lr=1e30, **flags)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1]
    from safetensors.torch import load_file

    assert all(v.isfinite().all() for v in load_file(tmp_path / "run/resume.safetensors").values())


def test_weights_that_are_not_finite_are_never_saved(refuses, sft, rows, tmp_path):
    """Where no line of the log is due, the checkpoint itself looks; and so do the final weights."""
    huge = {"lr": 1e38, "warmup": 0, "schedule": "constant", "log_every": 100, "eval_every": 100}
    refuses(
        train_sft,
        tmp_path / "a",
        "not finite",
        out=tmp_path / "a",
        data=sft / "demos.jsonl",
        steps=12,
        **huge,
    )
    assert not (tmp_path / "a/resume.safetensors").exists() and not (tmp_path / "a/metrics.jsonl").exists()
    rl = {"init": sft, "data": rows / "pairs.jsonl", "reward": "helpers.runs:brevity", "max_new_tokens": 12}
    refuses(
        train_rlhf, tmp_path / "b", "not finite", out=tmp_path / "b", steps=1, **rl, **huge | {"lr": 3.4e38}
    )


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize(
    "reward, words",
    [
        ("nosuchmodule:f", ["--reward nosuchmodule:f", "nosuchmodule"]),
        (
            "nanoroads.world.roadmap:nosuchfunction",
            ["--reward nanoroads.world.roadmap:nosuchfunction", "nosuchfunction"],
        ),
        ("nanoroads.world.roadmap:", ["--reward nanoroads.world.roadmap:"]),
        (":f", ["--reward :f"]),
        ("nanoroads.world.roadmap:STATES", ["--reward nanoroads.world.roadmap:STATES", "not callable"]),
        ("gobal", ["gobal"]),
    ],
)
def test_a_reward_that_is_none(reward, words, refuses, sft, tmp_path):
    refuses(train_rlhf, *words, out=tmp_path / "out", init=sft, reward=reward)


def test_a_rule_that_knows_other_prompts(refuses, sft, rows, tmp_path):
    rule = {
        "reward": "nanoroads.world.roadmap:true_reward",
        "data": rows / "pairs.jsonl",
        "max_new_tokens": 12,
    }
    refuses(train_rlhf, "does not name a start and a goal", out=tmp_path / "out", init=sft, **rule)


def test_missing_start_and_compare(refuses, sft, tmp_path):
    for name in ("start", "compare"):
        flags = {"reward": "helpers.runs:brevity", "init": sft, name: tmp_path / "no"}
        refuses(train_rlhf, tmp_path / "no", "config.json", out=tmp_path / name, **flags)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("prompt", ["WA>XX:", "WA>WA:", "WA>FL", "Seattle", "", "WA>FL:" * 20])
def test_prompts_that_the_map_does_not_have(prompt, refuses, sft):
    refuses(
        sample,
        "prompt" if "XX" not in prompt and "Sea" not in prompt else "no tokens",
        model=sft,
        prompt=prompt,
    )


def test_sampling_from_what_gives_no_text(refuses, sft, rlhf, tmp_path):
    refuses(sample, rlhf / "reward", "reward model", model=rlhf / "reward")
    refuses(sample, tmp_path / "no.jsonl", "no such file", model=sft, prompts=tmp_path / "no.jsonl")
    refuses(sample, "32", "--max-new-tokens", model=sft, max_new_tokens=40)
    refuses(sample, tmp_path / "no", model=sft, reward=tmp_path / "no", best_of=2)
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "WA>FL:"}, {"text": "x"}])
    refuses(sample, f"{tmp_path}/rows.jsonl:2: ", "'prompt'", model=sft, prompts=tmp_path / "rows.jsonl")


def test_pairs_need_a_policy_of_the_map(refuses, rows, sft, tmp_path):
    other = run(train_sft, tmp_path / "other", data=rows / "sft.jsonl", steps=1)
    refuses(pairs, other, "built-in map", policy=other, out=tmp_path / "pairs.jsonl")
    assert len(read_jsonl(sft / "pairs.jsonl")) == 200 and weights(other)


def test_ctrl_c_says_how_to_go_on(capfd):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        common.run_script(main)
    assert stopped.value.code == 130 and "--resume" in capfd.readouterr().err


def test_out_of_memory_names_the_flag(capfd):
    def main():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with pytest.raises(SystemExit) as stopped:
        common.run_script(main)
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "--micro-batch-size" in error


def test_errors_of_the_code_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        common.run_script(lambda: 1 / 0)
    assert sys.stdout


def test_a_single_row(refuses, sft, tmp_path):
    """Nothing could be held out of it."""
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW])
    for i, (script, flags) in enumerate(stages(sft, tmp_path)):
        refuses(script, path, out=tmp_path / f"out{i}", data=path, **flags)


def test_rl_that_does_not_fit_the_context(refuses, sft, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [ROW] * 5)
    flags = {"init": sft, "data": path, "reward": "helpers.runs:brevity"}
    refuses(train_rlhf, "context", "32", "--max-new-tokens", out=tmp_path / "out", max_new_tokens=30, **flags)
    train_rlhf.main(
        [
            str(w)
            for w in (
                "--out",
                tmp_path / "out2",
                "--steps",
                1,
                *(x for k, v in flags.items() for x in (f"--{k}", v)),
            )
        ]
    )


def test_a_policy_without_a_beta_is_no_reward(refuses, sft, tmp_path):
    refuses(train_rlhf, sft, out=tmp_path / "out", init=sft, reward=sft)
    refuses(sample, sft, model=sft, reward=sft, best_of=2)


def test_a_hub_name_that_cannot_be_had(refuses, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refuses(
        train_dpo,
        "hf:org/name",
        "pip install huggingface_hub",
        out=tmp_path / "out",
        init="hf:org/name",
        data="x.jsonl",
    )
    hub = types.SimpleNamespace(snapshot_download=lambda name, allow_patterns: f"{tmp_path}/{1 / 0}")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    refuses(
        train_dpo, "hf:org/name", "division by zero", out=tmp_path / "out", init="hf:org/name", data="x.jsonl"
    )


def test_a_hub_name_is_its_downloaded_folder(sft, monkeypatch):
    hub = types.SimpleNamespace(snapshot_download=lambda name, allow_patterns: {"org/name": str(sft)}[name])
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    theirs, ours = (load_model(folder).state_dict() for folder in ("hf:org/name", sft))
    assert all(torch.equal(theirs[k], ours[k]) for k in ours)


def test_a_reward_model_is_no_policy(refuses, sft, rlhf, tmp_path):
    model, out = rlhf / "reward", tmp_path / "out"
    refuses(
        train_sft,
        model,
        "reward model",
        out=out,
        init=model,
        rows=100,
        n_layer=None,
        n_embd=None,
        n_head=None,
        block_size=None,
    )
    refuses(train_dpo, model, "reward model", out=out, init=model, data=row_file(tmp_path))
    for name in ("start", "compare"):
        refuses(
            train_rlhf,
            model,
            "reward model",
            out=tmp_path / name,
            init=sft,
            reward="helpers.runs:brevity",
            **{name: model},
        )
    refuses(sample, model, "reward model", model=model)


def row_file(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [ROW] * 5)


def test_a_local_reward_needs_its_scale_and_its_reference(refuses, sft, dpo, rlhf, tmp_path):
    refuses(
        sample, rlhf, "no reward", model=sft, reward=rlhf, best_of=2
    )  # an RLHF policy was fitted to no pairs
    free = tmp_path / "free"
    shutil.copytree(dpo, free)
    config = json.loads((free / "config.json").read_text())
    (free / "config.json").write_text(
        json.dumps(config | {"args": config["args"] | {"loss": "reference-free"}})
    )
    refuses(train_rlhf, free, "no reward", out=tmp_path / "out", init=sft, reward=free)
    other = tmp_path / "other"
    shutil.copytree(sft, other)
    refuses(train_rlhf, dpo, sft, other, out=tmp_path / "out2", init=other, reward=dpo)


def test_flags_that_do_not_go_together(refuses, sft, tmp_path):
    out = tmp_path / "out"
    refuses(train_rlhf, "--micro-batch-size", out=out, init=sft, algo="reinforce", micro_batch_size=2)
    refuses(train_rlhf, "--stop-after", out=out, init=sft, reward="helpers.runs:brevity", stop_after="reward")
    refuses(train_rlhf, "--eval-data", out=out, init=sft, eval_data=tmp_path / "no.jsonl")
    refuses(train_dpo, "--init hf:org/name", out=out, init="hf:org/name")
    refuses(sample, "--best-of", model=sft, reward=sft, best_of=2, num_samples=2)
    if not torch.cuda.is_available():
        refuses(train_dpo, "--kernel triton", out=out, init=sft, kernel="triton")
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").write_text("a")
    refuses(train_dpo, full, "not empty", out=out, init=sft, export_hf=full)


def test_a_rule_whose_module_is_broken(refuses, sft, tmp_path, monkeypatch):
    (tmp_path / "brokenrule.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)  # modules of the user's own directory are found
    refuses(
        train_rlhf,
        "--reward brokenrule:f",
        "SyntaxError",
        out=tmp_path / "out",
        init=sft,
        reward="brokenrule:f",
    )


# ---------------------------------------------------------------- what was found by trying


def test_an_export_that_could_not_be_written_is_refused_before_the_training(refuses, sft, tmp_path):
    data, out = row_file(tmp_path), tmp_path / "out"
    refuses(train_dpo, "--export-hf", out, "--out itself", out=out, init=sft, data=data, export_hf=out)
    for folder in (data, data / "below"):
        refuses(train_dpo, data, "directory", out=out, init=sft, data=data, export_hf=folder)


def test_held_out_pairs_that_nothing_reads(refuses, sft, tmp_path):
    flags = {"init": sft, "data": row_file(tmp_path), "reward": "helpers.runs:brevity", "max_new_tokens": 12}
    refuses(
        train_rlhf, "--eval-data", "no stage 1", out=tmp_path / "out", eval_data=row_file(tmp_path), **flags
    )


@pytest.mark.parametrize(
    "body, words",
    [
        ("return float('nan')", ["says nan", "WA>FL:"]),
        ("return 1e300", ["says 1e+300"]),
        ("return None", ["raised TypeError"]),
        ("raise SystemExit(1)", ["raised SystemExit"]),
        ("pass\nraise SystemExit(3)", ["SystemExit: 3"]),  # when it is imported
    ],
)
def test_a_rule_that_gives_no_number(body, words, refuses, sft, tmp_path, monkeypatch):
    (tmp_path / "rule.py").write_text(f"def f(prompt, response): {body}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "rule", raising=False)
    flags = {"init": sft, "data": row_file(tmp_path), "max_new_tokens": 12}
    refuses(train_rlhf, "--reward rule:f", *words, out=tmp_path / "out", reward="rule:f", **flags)


def test_a_reward_model_has_no_pairs(refuses, rlhf, tmp_path):
    refuses(pairs, rlhf / "reward", "reward model", policy=rlhf / "reward", n=4, out=tmp_path / "pairs.jsonl")


@pytest.mark.parametrize(
    "entry",
    [
        {"tokenizer": 3},
        {"args": None},
        {"reference": 3},
        {"beta": "x"},
        {"n_layer": "2"},
        {"n_embd": -16, "n_head": -1},
    ],
)
def test_a_config_of_the_wrong_kinds(entry, refuses, sft, tmp_path):
    folder = copy(sft, tmp_path / "sft")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model": config["model"] | entry} if "n_" in str(entry) else entry
    (folder / "config.json").write_text(json.dumps(config))
    for script, flags in users_of(folder, tmp_path):
        refuses(script, folder / "config.json", **flags)


def test_other_data_under_the_same_name(refuses, sft, tmp_path):
    path, out = row_file(tmp_path), tmp_path / "out"
    run(train_dpo, out, init=sft, data=path, resume=True)
    (out / "model.safetensors").unlink()
    write_jsonl(path, [ROW] * 9)
    refuses(
        train_dpo, out / "ref_logp.safetensors", "4 pairs", "8 now", out=out, init=sft, data=path, resume=True
    )


def test_a_ledger_that_is_none(refuses, tmp_path):
    for text in ("{", "[]"):
        (tmp_path / "phases.json").write_text(text)
        refuses(all_roads, tmp_path / "phases.json", out=tmp_path, quick=True)


def test_memory_that_is_not_there(refuses, sft, rlhf):
    refuses(
        sample,
        "memory",
        "--micro-batch-size",
        model=sft,
        reward=rlhf / "reward",
        best_of=10**10,
        device="cpu",
    )
