"""--lora and --checkpoint-activations as flags of the scripts: what is written, read, resumed and refused."""

import json
import shutil

import pytest
import torch
from helpers.runs import argv, metrics, run, weights, write_jsonl

import sample
import train_dpo
import train_rlhf
import train_sft
from nanoroads import model, score
from nanoroads.model import GPT
from nanoroads.run.run import Run
from nanoroads.weights.checkpoint import load_model, load_policy, load_reference, with_run_adapters
from nanoroads.weights.files import read_config, read_safetensors
from nanoroads.weights.lora import adapters

PROMPTS = ["WA>FL:", "OR>TX:", "NV>ME:", "CA>NY:", "UT>GA:", "ID>OH:", "AZ>VT:", "NM>KY:"]
TOKENS = [[1, 2, 3], [4, 5]], [[[6, 7], [8, 9, 10]], [[11], [12, 13]]]  # prompts, responses
SHORT = {"steps": 4, "eval_every": 4, "save_every": 3, "warmup": 0, "batch_size": 4, "lora": 2}
STAGE_1 = {"reward_epochs": 1, "reward_batch_size": 4, "reward_lr": 3e-2}
RL = SHORT | {"samples": 2, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of the map, hardly trained, and a file of pairs. Look, do not touch."""
    folder = tmp_path_factory.mktemp("lora") / "sft"
    run(train_sft, folder, steps=2, rows=60, eval_every=2)
    rows = [{"prompt": prompt, "chosen": "OR>CA>NV", "rejected": "TX>OK"} for prompt in PROMPTS]
    write_jsonl(folder.parent / "pairs.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def flags(base):
    return {"init": base, "data": base.parent / "pairs.jsonl"}


@pytest.fixture(scope="module")
def adapted(flags, tmp_path_factory):
    """A finished DPO run of --lora 2. Look, do not touch."""
    return run(train_dpo, tmp_path_factory.mktemp("lora") / "dpo", **flags, **SHORT | {"lr": 3e-2})


def logps(policy):
    return score.sequence_logps(policy, *TOKENS)


def stop_at(monkeypatch, step):
    """Ctrl-C in the optimizer step number `step` of this process."""
    calls = []
    original = torch.optim.AdamW.step

    def stopping(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", stopping)


# ---------------------------------------------------------------- what a run leaves


def test_a_run_holds_what_it_trained_and_finds_the_rest(base, adapted):
    names = read_safetensors(adapted / "model.safetensors")[0].keys()
    assert all(name.endswith(("lora_A", "lora_B")) for name in names) and len(names) == 2 * 4
    config = read_config(adapted)
    assert config["lora"]["rank"] == 2 and config["base"] == str(base)
    policy = load_policy(adapted)
    assert not adapters(policy) and all(p.requires_grad for p in policy.parameters())
    apart = with_run_adapters(load_reference(base), adapted, config)
    assert len(adapters(apart)) == 4
    torch.testing.assert_close(logps(policy), logps(apart), rtol=0, atol=1e-5)
    assert (logps(policy) - logps(load_policy(base))).abs().max() > 1e-2
    peft_config = json.loads((adapted / "adapter_config.json").read_text())
    assert peft_config["base_model_name_or_path"] == str(base)
    assert len(read_safetensors(adapted / "adapter_model.safetensors")[0]) == len(names)


def test_it_is_read_in_one_dtype(adapted):
    """Also its merged matrices, which the adapters have in fp32."""
    policy = GPT.from_pretrained(adapted, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    policy.logits(torch.tensor([[1, 2, 3]]))  # nothing has to be cast


def test_it_is_sampled_from_exported_and_trained_further(adapted, flags, tmp_path, capsys):
    sample.main(["--model", str(adapted), "--prompt", "WA>FL:", "--max-new-tokens", "3"])
    assert "WA>FL:" in capsys.readouterr().out
    more = {**flags, "init": adapted, "lr": 3e-2}
    second = run(train_dpo, tmp_path / "second", export_hf=tmp_path / "hf", **more, **SHORT)
    expected = logps(load_policy(second))
    torch.testing.assert_close(logps(load_policy(tmp_path / "hf")), expected, rtol=0, atol=1e-5)
    first = logps(load_policy(adapted))
    assert (expected - first).abs().max() > 1e-3
    assert read_config(second)["lora"]["base"]["weights"] != read_config(adapted)["lora"]["base"]["weights"]
    # Before its first step it was the first: a loss of ln 2.
    assert metrics(second)[0]["loss"] == pytest.approx(0.693147, abs=1e-5)


def test_the_base_may_move_and_must_not_change(base, flags, tmp_path):
    shutil.copytree(base, tmp_path / "here" / "sft")
    out = run(train_dpo, tmp_path / "here" / "dpo", **{**flags, "init": tmp_path / "here" / "sft"}, **SHORT)
    expected = logps(load_policy(out))
    (tmp_path / "here").rename(tmp_path / "there")
    assert torch.equal(logps(load_policy(tmp_path / "there" / "dpo")), expected)
    other = tmp_path / "there" / "sft" / "model.safetensors"
    run(train_sft, tmp_path / "other", steps=2, rows=60, eval_every=2, seed=1)
    shutil.copy(tmp_path / "other" / "model.safetensors", other)
    with pytest.raises(ValueError, match="dpo: its base .*sft is not what it was trained on"):
        load_policy(tmp_path / "there" / "dpo")


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_a_resumed_run_ends_in_the_same_bits(stage, flags, tmp_path, monkeypatch, refuses):
    script = {"dpo": train_dpo, "sft": train_sft}[stage]
    if stage == "sft":
        rows = [{"prompt": prompt, "response": "OR>CA>NV"} for prompt in PROMPTS]
        flags = {**flags, "data": write_jsonl(tmp_path / "rows.jsonl", rows), "n_layer": None}
    flags = flags | SHORT | {"lr": 3e-2}
    whole = run(script, tmp_path / "whole", **flags)
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run(script, tmp_path / "out", **flags)
    state = read_safetensors(tmp_path / "out" / "resume.safetensors")[0]
    names = {name.partition(".")[2] for name in state if name.startswith("model.")}
    assert names == read_safetensors(whole / "model.safetensors")[0].keys()
    again = {"out": tmp_path / "out", "resume": True}
    refuses(script, "--lora 2", "this one has 3", **again, **flags | {"lora": 3})
    refuses(script, "--lora 2", "this one has None", **again, **flags | {"lora": None})
    # Recomputing changes no bit, and so may begin in the middle.
    recomputed = []
    original = model.checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(model, "checkpoint", lambda *args, **kw: recomputed.append(1) or original(*args, **kw))
        run(script, **again, checkpoint_activations=True, **flags)
    assert recomputed
    assert weights(tmp_path / "out") == weights(whole) and metrics(tmp_path / "out") == metrics(whole)


# ---------------------------------------------------------------- RL


@pytest.mark.parametrize("reward", ["global", "local"])
def test_rl_has_one_trunk(reward, base, flags, tmp_path, monkeypatch):
    """Reference, reward model and policy share its memory. And a run that is stopped between the stages
    draws the same adapters when it goes on."""
    trunks = []
    describe = Run.describe

    def watched(self, trained, *args, **kwargs):
        trunks.append(trained.blocks[0].mlp.up.weight.data_ptr())
        describe(self, trained, *args, **kwargs)

    load_judge = score.load_judge

    def watched_judge(source, reference, *args):
        judge = load_judge(source, reference, *args)
        judging = judge.model if reward == "global" else judge.policy
        assert len(adapters(judging)) == 4
        trunks.append(judging.blocks[0].mlp.up.weight.data_ptr())
        trunks.append(reference.blocks[0].mlp.up.weight.data_ptr())
        return judge

    flags = flags | RL | STAGE_1 | {"reward": reward}
    with monkeypatch.context() as patch:
        patch.setattr(Run, "describe", watched)
        patch.setattr(score, "load_judge", watched_judge)
        whole = run(train_rlhf, tmp_path / "whole", **flags)
    assert len(trunks) == 4 and len(set(trunks)) == 1

    names = read_safetensors(whole / "reward" / "model.safetensors")[0].keys()
    assert ("scalar_head.weight" in names) == (reward == "global") and len(names) in (8, 9)
    row = metrics(whole)[0]  # the first samples are the reference's own
    assert row["kl"] == pytest.approx(0, abs=1e-5)
    assert row["sampling_gap"] < 1e-4
    # As the judge, and loaded alone with its adapters merged, the reward model says the same.
    judge_model = with_run_adapters(load_reference(base), whole / "reward", read_config(whole / "reward"))
    alone = load_model(whole / "reward")
    rewards = [score.rewards(each, None, *TOKENS) for each in (judge_model, alone)]
    torch.testing.assert_close(*rewards, rtol=0, atol=1e-5)

    with monkeypatch.context() as patch:
        stop_at(patch, 2 + 2)  # two steps of stage 1, and one of stage 2, before its first checkpoint
        with pytest.raises(KeyboardInterrupt):
            run(train_rlhf, tmp_path / "out", **flags)
    assert not (tmp_path / "out" / "resume.safetensors").exists()
    run(train_rlhf, tmp_path / "out", resume=True, **flags)
    assert weights(tmp_path / "out") == weights(whole) and metrics(tmp_path / "out") == metrics(whole)


def test_rl_goes_on_with_the_adapters_of_a_start(adapted, base, flags, tmp_path, refuses):
    rule = flags | RL | {"reward": "helpers.runs:brevity", "start": adapted}
    out = run(train_rlhf, tmp_path / "rl", **rule | {"steps": 1, "lr": 1e-9})
    torch.testing.assert_close(logps(load_policy(out)), logps(load_policy(adapted)), rtol=0, atol=1e-4)
    assert read_config(out)["base"] == str(base)
    refuses(train_rlhf, f"--start {adapted}", "a run of --lora 3", out=tmp_path / "b", **rule | {"lora": 3})
    refuses(train_rlhf, f"--start {base}", "--lora 2", out=tmp_path / "c", **rule | {"start": base})


# ---------------------------------------------------------------- flags


def test_what_does_not_go_together_is_refused(flags, tmp_path, refuses):
    refuses(train_sft, "--lora 2", "name it by --init", out=tmp_path / "a", lora=2)
    refuses(train_rlhf, "--start", "a run of --lora 2", out=tmp_path / "c", start=flags["init"], **flags | RL)
    both = {"compile": True, "checkpoint_activations": True}
    refuses(train_dpo, "--checkpoint-activations", "--compile", out=tmp_path / "b", **flags, **SHORT, **both)


def test_lora_has_ten_times_the_default_learning_rate(flags, capsys):
    for script, expected in ((train_dpo, 1e-3), (train_rlhf, 1e-2), (train_sft, 3e-2)):
        given = argv(script, out="x", lora=4, init=flags["init"], lr=None, reward_lr=None)
        args = script.flags(given)
        assert args.lr == expected
        assert script.flags([*given, "--lr", "0.5"]).lr == 0.5
        if script is train_rlhf:
            assert args.reward_lr == 3e-3
    assert "x 10, for --lora" in capsys.readouterr().out
