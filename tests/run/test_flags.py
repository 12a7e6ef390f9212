"""Command lines: the types of flags, the defaults that suit the
model, and what a user causes in one line."""

import argparse
import json
import re
import sys
from dataclasses import asdict

import pytest
import torch

import train_dpo
import train_rlhf
import train_sft
from nanoroads.model import GPTConfig
from nanoroads.run import flags
from nanoroads.run.optim import total_steps

SCRIPTS = [train_sft, train_dpo, train_rlhf]

# ---------------------------------------------------------------- types of flags


def test_numbers_of_flags():
    assert flags.positive(int)("3") == 3
    assert flags.positive(float)("0.5") == 0.5
    assert flags.non_negative(int)("0") == 0
    assert flags.non_negative(int, below=7)("6") == 6
    assert flags.SEED("4294967295") == 2**32 - 1
    refused = [
        (flags.positive(int), ["0", "-1"]),
        (flags.positive(float), ["0", "nan", "inf", "-inf"]),
        (flags.non_negative(int), ["-1"]),
        (flags.non_negative(int, below=7), ["7"]),
        (flags.non_negative(float), ["nan", "-inf", "inf"]),
        (flags.SEED, ["4294967296", "-1"]),
    ]
    for parse, texts in refused:
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError, match=f"^{text} is not a .* number"):
                parse(text)
    with pytest.raises(ValueError):
        flags.positive(int)("1.5")


# ---------------------------------------------------------------- help


def numbers_in(text):
    return {float(number) for number in re.findall(r"(?<![\w.])\d*\.?\d+(?:e-?\d+)?", text)}


def numbers_of(default):
    if isinstance(default, dict):
        return set(default.values())
    return {default} if isinstance(default, (int, float)) else set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_both_defaults_of_a_flag_are_in_its_help(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.flags(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"out/{script.__name__.removeprefix('train_')}" in text
    for kind in ("small", "pretrained"):
        for name, default in script.DEFAULTS[kind].items():
            flag = re.escape(f"--{name.replace('_', '-')}")
            entry = re.search(rf"^  {flag} [A-Z_]+\s(.*?)(?=^  --|\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
            assert numbers_of(default) <= numbers_in(entry[1]), (name, default, entry[1])


# ---------------------------------------------------------------- defaults by model


@pytest.fixture
def folders(tmp_path):
    """{what it is: a folder with the config.json of such a model}."""
    small, large = asdict(GPTConfig()), asdict(GPTConfig(vocab_size=20_000, n_embd=512))
    configs = {
        "map": {"stage": "sft", "model": small, "tokenizer": "roadmap", "args": {"data": "roadmap"}},
        "own rows": {"stage": "sft", "model": small, "tokenizer": "gpt2", "args": {"data": "rows.jsonl"}},
        "large": {"stage": "sft", "model": large, "tokenizer": "gpt2", "args": {"data": "rows.jsonl"}},
        "hugging face": {"model_type": "llama", "hidden_size": 576},
    }
    made = {"missing": tmp_path / "missing"}
    for name, config in configs.items():
        made[name] = tmp_path / name
        made[name].mkdir()
        (made[name] / "config.json").write_text(json.dumps(config))
    return made


KINDS = {"missing": "small", "map": "small", "own rows": "small", "large": "pretrained"}
KINDS["hugging face"] = "pretrained"


def expected(script, kind):
    """The script's defaults of that kind, as its flags have them with the global reward."""
    defaults = dict(script.DEFAULTS[kind])
    if script is train_rlhf:
        defaults["reward_lr"] = defaults["reward_lr"]["global"]
    return defaults


def parsed(script, *words):
    """The flags that have a default by model."""
    args = vars(script.flags([str(word) for word in words]))
    return {name: args[name] for name in script.DEFAULTS["small"]}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("what", KINDS)
def test_defaults_suit_the_model(what, script, folders):
    """What suits the map's small model would wreck a pretrained one. The data decides nothing."""
    for data in ("roadmap", "rows.jsonl"):
        chosen = parsed(script, "--init", folders[what], "--data", data)
        assert chosen == expected(script, KINDS[what]), (what, data)


def test_the_two_columns_are_far_apart():
    for script in SCRIPTS:
        small, large = script.DEFAULTS["small"], script.DEFAULTS["pretrained"]
        assert small.keys() == large.keys()
        assert small["lr"] >= 1e-4 and large["lr"] <= 1e-5 and large["epochs"] == 1
        assert small["micro_batch_size"] is None and large["micro_batch_size"] <= 4


def test_a_new_model_on_rows_of_yours_is_a_small_one():
    """It once was trained at the rate of a pretrained model, at which nothing is learned."""
    assert parsed(train_sft, "--data", "rows.jsonl") == train_sft.DEFAULTS["small"]
    assert parsed(train_sft, "--data", "rows.jsonl")["lr"] == 3e-3


def test_a_hub_name_is_a_pretrained_model_and_is_not_yet_downloaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for script in SCRIPTS:
        assert parsed(script, "--init", "hf:org/name", "--data", "x.jsonl") == expected(script, "pretrained")


def test_a_model_of_ten_million_parameters_is_the_border():
    width = {"n_embd": 512, "n_layer": 2, "d_ff": 2048}
    assert flags.parameters(asdict(GPTConfig(vocab_size=1000, **width))) < flags.SMALL_MODEL
    assert flags.parameters(asdict(GPTConfig(vocab_size=10_000, **width))) > flags.SMALL_MODEL
    model = GPTConfig()
    assert flags.parameters(asdict(model)) == pytest.approx(106_000, rel=0.05)
    assert flags.parameters({"n_embd": "x", "vocab_size": 3}) == 0  # whoever loads it says what is wrong


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("what", ["map", "hugging face"])
def test_what_is_given_stands(what, script, folders):
    given = {name: 7 for name in script.DEFAULTS["small"]}
    words = [word for name in given for word in (f"--{name.replace('_', '-')}", "7")]
    if script is train_rlhf:  # the class that has a beta
        words += ["--reward", "local"]
    assert parsed(script, "--init", folders[what], *words) == given
    chosen = parsed(script, "--init", folders[what], "--lr", "3e-4")
    assert chosen == {**expected(script, KINDS[what]), "lr": 3e-4}


@pytest.mark.parametrize("what", ["map", "hugging face"])
def test_every_default_is_printed(what, folders, capsys):
    kind = KINDS[what]
    for script in SCRIPTS:
        capsys.readouterr()
        script.flags(["--init", str(folders[what]), "--batch-size", "5"])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 1 and lines[0].startswith("using: ")
        words = []
        for name, default in expected(script, kind).items():
            if name == "batch_size":
                words.append("batch-size 5 (given)")
            elif script is train_rlhf and name == "beta":
                continue  # the global reward has none
            elif default is not None:
                words.append(f"{name.replace('_', '-')} {default} ({kind})")
        assert lines[0] == f"using: {', '.join(words)}"


# ---------------------------------------------------------------- defaults of RLHF


def test_the_rate_of_stage_1_is_that_of_its_reward_class(folders):
    """The local reward is trained as DPO trains; the global one three times as fast."""
    for what in ("map", "hugging face"):
        init = ["--init", folders[what]]
        rate = {}
        for reward in ("global", "local", "module:function"):
            rate[reward] = parsed(train_rlhf, *init, "--reward", reward)["reward_lr"]
        assert rate["local"] == parsed(train_dpo, *init)["lr"]
        assert rate["global"] == pytest.approx(3 * rate["local"]) == rate["module:function"]
    assert parsed(train_rlhf, "--reward", "local", "--reward-lr", "0.5")["reward_lr"] == 0.5


def rl_steps(*words):
    args = train_rlhf.flags([str(word) for word in words])
    return total_steps(320, args.batch_size, args.epochs, args.steps)


def test_epochs_of_rl_are_passes_over_the_prompts_and_override_the_usual_steps(folders):
    pretrained = ["--init", folders["hugging face"]]
    assert rl_steps() == 300
    assert rl_steps("--epochs", 2) == 20
    assert rl_steps("--steps", 7) == 7
    assert rl_steps("--steps", 7, "--epochs", 2) == 7
    assert rl_steps(*pretrained) == 10
    assert rl_steps(*pretrained, "--steps", 7) == 7


def test_defaults_need_no_flag():
    """On the map, each stage finds the one before it."""
    assert train_dpo.flags([]).init == train_rlhf.flags([]).init == train_sft.flags([]).out
    assert all(script.flags([]).data == "roadmap" for script in SCRIPTS)


# ---------------------------------------------------------------- running a script


def test_ctrl_c_says_how_to_go_on(capfd):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        flags.run_script(main)
    assert stopped.value.code == 130
    assert "--resume" in capfd.readouterr().err


def test_out_of_memory_names_the_flag(capfd):
    def main():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    with pytest.raises(SystemExit) as stopped:
        flags.run_script(main)
    error = capfd.readouterr().err
    assert stopped.value.code == 2
    assert error.count("\n") == 1 and "--micro-batch-size" in error


def test_errors_of_the_code_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        flags.run_script(lambda: 1 / 0)
    with pytest.raises(RuntimeError, match="a bug"):
        flags.run_script(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
