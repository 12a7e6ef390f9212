"""Flags that no run can have: one line on stderr that names the
flag, exit code 2, and nothing is written."""

import re
import subprocess

import pytest
import torch
from helpers.refusals import RULE, files, row_file

import all_roads
import sample
import train_dpo
import train_rlhf
import train_sft
from nanoroads.run.commands import ROOT, child_environment, command_line
from nanoroads.run.flags import run_script
from nanoroads.world import pairs

TRAINING = [train_sft, train_dpo, train_rlhf]

# ---------------------------------------------------------------- the real thing: processes


@pytest.mark.parametrize(
    "command, words",
    [
        (["train_sft.py", "--data", "no/such.jsonl"], ["no/such.jsonl: no such file"]),
        (
            ["-m", "nanoroads.world.pairs", "--policy", "no/run", "--out", "x.jsonl"],
            ["no/run", "config.json"],
        ),
        (["train_dpo.py", "--loss", "ppo"], ["train_dpo.py", "--loss", "'ppo'", "simpo"]),
    ],
)
def test_a_process_says_one_line_and_exits_with_2(command, words, tmp_path):
    done = subprocess.run(
        command_line(command), cwd=tmp_path, env=child_environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert all(word in done.stderr for word in words)
    assert all(line.startswith("using: ") for line in done.stdout.splitlines())
    assert not files(tmp_path)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize(
    "flag, value",
    [
        ("steps", 0), ("steps", -1), ("steps", 1.5), ("epochs", "nan"), ("lr", 0), ("lr", "inf"),
        ("lr", "fast"), ("clip", 0), ("batch_size", 0), ("micro_batch_size", -2), ("save_every", 0),
        ("warmup", -1), ("weight_decay", -1), ("weight_decay", "nan"), ("seed", -1), ("seed", 2**64),
        ("seed", "x"), ("device", "tpu"), ("dtype", "int8"), ("schedule", "linear"),
        ("max_prompt_tokens", 0),
    ],
)  # fmt: skip
def test_values_that_no_run_can_have(script, flag, value, refuses, tmp_path):
    flags = {"out": tmp_path / "out", "data": tmp_path / "none.jsonl"}  # the flags are read before any file
    flags[flag] = value
    refuses(script, f"--{flag.replace('_', '-')}", value, **flags)
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
        (train_rlhf, {"temperature": 1e-38}, ["--temperature", "1e-38", "1e-20"]),
        (train_rlhf, {"kl": -1}, ["--kl", "-1"]),
        (train_rlhf, {"kl": 0, "algo": "online-dpo"}, ["--kl 0", "online-dpo", "DPO's beta"]),
        (train_rlhf, {"clip_low": 0.1}, ["--clip-low", "nothing is clipped with --updates 1"]),
        (train_rlhf, {"clip_high": 0.1, "algo": "gspo"}, ["--clip-high", "--updates 1"]),
        (train_rlhf, {"clip_low": 0.1, "algo": "rebel", "updates": 2}, ["--clip-low", "rebel"]),
        (train_rlhf, {"clip_high": 0.1, "algo": "online-dpo", "updates": 2}, ["--clip-high", "online-dpo"]),
    ],
)
def test_values_of_one_training_script(script, flags, words, refuses, tmp_path):
    refuses(script, *words, **{"out": tmp_path / "out", "data": tmp_path / "none.jsonl", **flags})


@pytest.mark.parametrize(
    "script, flags, words",
    [
        (sample, {"model": "x", "temperature": -1}, ["--temperature"]),
        (sample, {"model": "x", "top_p": 0}, ["--top-p"]),
        (sample, {"model": "x", "best_of": 4}, ["--best-of", "--reward"]),
        (sample, {"model": "x", "prompt": "a", "chat": True}, ["--chat", "--prompt"]),
        (sample, {}, ["--model"]),
        (pairs, {"policy": "x", "out": "y", "n": 0}, ["--n"]),
    ],
)
def test_values_of_another_script(script, flags, words, refuses):
    refuses(script, *words, **flags)


@pytest.mark.parametrize("flag, value", [("jobs", 0), ("seeds", "one")])
def test_values_of_all_roads(flag, value, refuses):
    refuses(all_roads, f"--{flag}", **{flag: value})


# ---------------------------------------------------------------- the machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("script", [*TRAINING, sample])
def test_a_device_that_is_not_there(script, refuses, sft, tmp_path):
    flags = {"out": tmp_path / "out"}
    if script is sample:
        flags = {"model": sft}
    refuses(script, "--device cuda", device="cuda", **flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_kernel_that_cannot_work_here(refuses, sft, tmp_path):
    refuses(train_dpo, "--kernel triton", out=tmp_path / "out", init=sft, kernel="triton")


TOO_LARGE = "[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 9 bytes"


@pytest.mark.parametrize(
    "script, error, hint",
    [
        ("train_sft.py", RuntimeError(TOO_LARGE), "(try a smaller --micro-batch-size)"),
        ("train_rlhf.py", torch.cuda.OutOfMemoryError("CUDA"), "(try a smaller --micro-batch-size)"),
        ("train_dpo.py", MemoryError("Unable to allocate 7 TiB"), None),  # NumPy's, of too many --rows
        ("train_dpo.py", MemoryError(), None),  # Python's
        ("sample.py", RuntimeError(TOO_LARGE), "(try a smaller --best-of or --max-new-tokens)"),
        ("experiments/ppo.py", RuntimeError(TOO_LARGE), "(try a smaller --batch-size)"),
        ("all_roads.py", MemoryError(), None),
        ("all_roads.py", RuntimeError(TOO_LARGE), None),
        ("nanoroads/world/pairs.py", RuntimeError(TOO_LARGE), None),
    ],
)
def test_memory_that_is_not_there(script, error, hint, capsys):
    """What is to be tried is a flag that the script has, and one that can help."""

    def main():
        raise error

    source = (ROOT / script).read_text()
    call = re.search(r"^    run_script\(main.*\)$", source, re.MULTILINE)[0]
    with pytest.raises(SystemExit):
        exec(call.strip(), {"main": main, "run_script": run_script})
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if hint is None:
        assert "try" not in said and "--" not in said
    else:
        assert said.endswith(f"{hint}\n")
        for flag in re.findall(r"--[a-z-]+", hint):
            shared = (ROOT / "nanoroads/run/flags.py").read_text() if script.startswith("train") else ""
            assert f'"{flag}"' in source + shared


def test_samples_that_do_not_fit_in_memory(refuses, sft, rlhf):
    flags = {"model": sft, "reward": rlhf / "reward", "best_of": 10**10, "device": "cpu"}
    refuses(sample, "memory", **flags)


# ---------------------------------------------------------------- names that there are not


def test_a_world_that_there_is_not(refuses, sft, tmp_path):
    for script, flags in ((train_sft, {}), (train_dpo, {"init": sft}), (train_rlhf, {"init": sft})):
        for name in ("roadmap-shrt", "Roadmap-Short", "short"):
            nearest_first = "those are roadmap-short, roadmap"
            refuses(script, name, nearest_first, "roadmap-hidden", out=tmp_path / "x", data=name, **flags)


def test_a_file_that_there_is_not(refuses, sft, tmp_path):
    row_file(tmp_path)
    flags = {"init": sft, "out": tmp_path / "x"}
    refuses(train_dpo, "no such file", "has rows.jsonl", data=tmp_path / "row.jsonl", **flags)
    refuses(train_dpo, "no such file, but a folder", data=tmp_path, **flags)
    refuses(train_dpo, "there is no folder", data=tmp_path / "none/rows.jsonl", **flags)
    eval_data = {"data": tmp_path / "rows.jsonl", "eval_data": tmp_path / "rwos.jsonl"}
    refuses(train_dpo, "rwos.jsonl", "has rows.jsonl", **eval_data, **flags)
    refuses(sample, "has rows.jsonl", model=sft, prompts=tmp_path / "rows.jsonl.gz", device="cpu")


def test_a_folder_of_a_model_that_there_is_not(refuses, sft, dpo, tmp_path):
    near = tmp_path / "dop"
    for name in ("dpo", "sft"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    refuses(sample, "dop", f"there is {tmp_path / 'dpo'}", model=near, device="cpu")
    refuses(sample, f"there is {tmp_path / 'dpo'}", model=sft, reward=near, best_of=2, device="cpu")
    refuses(pairs, f"there is {tmp_path / 'dpo'}", policy=near, out=tmp_path / "p.jsonl")
    out = tmp_path / "x"
    refuses(train_rlhf, f"there is {tmp_path / 'dpo'}", init=sft, out=out, compare=near)
    refuses(train_rlhf, f"there is {tmp_path / 'dpo'}", init=sft, out=out, start=near)
    refuses(sample, "there is", "/dpo", "/sft", model=tmp_path, device="cpu")  # the folder of the runs


def test_a_reward_that_there_is_not(refuses, sft, tmp_path):
    for name in ("globl", "locale", "out/rewrd"):
        refuses(
            train_rlhf, name, "global, local", "module:function", init=sft, out=tmp_path / "x", reward=name
        )
    refuses(train_sft, "gpt3", "roadmap", "gpt2", out=tmp_path / "x", tokenizer="gpt3")


# ---------------------------------------------------------------- flags that do not go together


def test_kto_takes_no_micro_batches(refuses, sft, tmp_path):
    """Its baseline is of the whole step. A pretrained model's default is 2."""
    refuses(
        train_dpo, "--micro-batch-size", "kto", out=tmp_path / "out", init=sft, loss="kto", micro_batch_size=2
    )
    args = train_dpo.flags(["--init", str(sft), "--loss", "kto", "--micro-batch-size", "32"])
    assert args.micro_batch_size == args.batch_size == 32
    with pytest.raises(SystemExit):
        train_dpo.flags(["--init", "hf:org/name", "--loss", "kto"])


def test_flags_of_rlhf_that_do_not_go_together(refuses, sft, tmp_path):
    flags = {"out": tmp_path / "out", "init": sft}
    refuses(train_rlhf, "--micro-batch-size", algo="reinforce", micro_batch_size=2, **flags)
    refuses(train_rlhf, "--stop-after", reward="helpers.runs:brevity", stop_after="reward", **flags)
    refuses(train_rlhf, "--eval-data", eval_data=tmp_path / "no.jsonl", **flags)


def test_flags_that_do_not_go_together(refuses, sft, tmp_path):
    refuses(train_dpo, "--init hf:org/name", out=tmp_path / "out", init="hf:org/name")
    refuses(sample, "--best-of", model=sft, reward=sft, best_of=2, num_samples=2)


def test_held_out_pairs_that_nothing_reads(refuses, sft, tmp_path):
    flags = {"init": sft, "data": row_file(tmp_path), "eval_data": row_file(tmp_path), **RULE}
    refuses(train_rlhf, "--eval-data", "no stage 1", out=tmp_path / "out", **flags)


@pytest.mark.parametrize(
    "reward, flag, value, words",
    [
        ("global", "beta", 0.1, "--beta: --reward global does not use it"),
        ("local", "readout", "sum", "--readout: --reward local does not use it"),
        ("RULE", "beta", 0.1, "--beta: --reward helpers.runs:brevity has no stage 1"),
        ("RULE", "readout", "sum", "no stage 1"),
        ("RULE", "reward_lr", 1e-3, "--reward-lr: --reward helpers.runs:brevity has no stage 1"),
        ("RULE", "reward_epochs", 1, "no stage 1"),
        ("RULE", "reward_batch_size", 8, "no stage 1"),
        ("FOLDER", "beta", 0.1, "no stage 1"),
        ("FOLDER", "reward_lr", 1e-3, "no stage 1"),
    ],
)
def test_flags_that_a_reward_would_ignore(reward, flag, value, words, refuses, sft, rlhf, tmp_path):
    named = {"RULE": "helpers.runs:brevity", "FOLDER": rlhf / "reward"}.get(reward, reward)
    refuses(train_rlhf, words, out=tmp_path / "out", init=sft, reward=named, **{flag: value})
    assert not (tmp_path / "out").exists()


def test_rl_that_does_not_fit_the_context(refuses, sft, tmp_path):
    flags = {"init": sft, "data": row_file(tmp_path), "reward": "helpers.runs:brevity"}
    words = ["context", "32", "--max-new-tokens"]
    refuses(train_rlhf, *words, out=tmp_path / "out", **{**flags, "max_new_tokens": 30})
    # Without the flag the length is what fits.
    train_rlhf.main(["--out", str(tmp_path / "out2"), "--steps", "1", "--init", str(sft)]
                    + ["--data", str(flags["data"]), "--reward", flags["reward"]])  # fmt: skip


# ---------------------------------------------------------------- --export-hf


def test_an_export_that_could_not_be_written_is_refused_before_the_training(refuses, sft, tmp_path):
    rows, out = row_file(tmp_path), tmp_path / "out"
    flags = {"init": sft, "data": rows, "out": out}
    refuses(train_dpo, "--export-hf", out, "--out itself", export_hf=out, **flags)
    for folder in (rows, rows / "below"):
        refuses(train_dpo, rows, "directory", export_hf=folder, **flags)
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").write_text("a")
    refuses(train_dpo, full, "not empty", out=out, init=sft, export_hf=full)
