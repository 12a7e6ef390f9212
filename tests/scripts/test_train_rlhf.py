"""train_rlhf.py end to end, tiny: the files it leaves, the keys it
logs, the numbers of step 0, and that it learns."""

import gc
import itertools
import json
import math
import shutil
from statistics import mean

import numpy as np
import pytest
import torch
from helpers.runs import check_run, load_rows, metrics, read_jsonl, run, weights, write_jsonl

import train_rlhf
from nanoroads import score
from nanoroads.errors import InputError
from nanoroads.randomness import uniform
from nanoroads.run import rollouts
from nanoroads.run.folder import RECORD
from nanoroads.run.run import Run
from nanoroads.text import layouts, tokenizer
from nanoroads.text.split import hold_out
from nanoroads.weights import checkpoint
from nanoroads.weights.files import read_config

MAP_KEYS = {"map_reward", "map_legal", "map_arrives", "map_moves", "map_greedy_reward", "map_kl"}
REWARD_KEYS = {"step", "loss", "accuracy", "grad_norm"}
REWARD_EVAL_KEYS = {"eval_loss", "eval_accuracy"}
KEYS = {"step", "loss", "reward", "kl", "entropy", "clip_fraction", "length", "cut", "grad_norm"}
KEYS.add("sampling_gap")


def check_rl(out, on_map=True):
    """A finished stage 2 that began at its reference. Returns the lines of metrics.jsonl."""
    if on_map:
        log = check_run(out, "rlhf", KEYS | {"true_reward"}, MAP_KEYS)
    else:
        log = check_run(out, "rlhf", KEYS, set())
    assert (log[0]["kl"], log[0]["clip_fraction"]) == (
        0.0,
        0.0,
    )  # the policy is the reference, and the sampler
    assert log[0]["entropy"] > 0 and 1 <= log[0]["length"] <= 12
    assert log[-1]["kl"] != 0
    assert all(0 < row["sampling_gap"] < 1e-4 for row in log)  # fp32: the last bits of a log-prob
    return log


# ---------------------------------------------------------------- the reward classes


def test_global(rlhf, sft):
    log = check_run(rlhf / "reward", "reward", REWARD_KEYS, REWARD_EVAL_KEYS)
    assert len(log) == 10  # 1.5 epochs of 7 steps
    assert mean(row["loss"] for row in log[-3:]) < mean(row["loss"] for row in log[:3])
    config = read_config(rlhf / "reward")
    assert config["model"]["head"] == "scalar" and config["reference"] == str(sft)
    assert "beta" not in config  # it has none
    check_rl(rlhf)
    assert read_config(rlhf)["kl"] == 0.5


def test_the_folder_of_a_reward_model_makes_the_same_run(rlhf, sft, tmp_path):
    out = run(train_rlhf, tmp_path / "again", init=sft, reward=rlhf / "reward")
    assert not (out / "reward").exists()
    assert weights(out) == weights(rlhf) and metrics(out) == metrics(rlhf)


def test_a_global_reward_of_an_older_version_has_a_beta_that_nothing_reads(rlhf, sft, tmp_path):
    old = tmp_path / "reward"
    shutil.copytree(rlhf / "reward", old)
    (old / "config.json").write_text(json.dumps({**read_config(old), "beta": 7.0}))
    (old / RECORD).unlink()  # of the file as it is now
    out = run(train_rlhf, tmp_path / "again", init=sft, reward=old)
    assert weights(out) == weights(rlhf) and read_config(out)["kl"] == 0.5
    # And the run that it is the stage 1 of goes on.
    before = weights(old)
    out = run(train_rlhf, tmp_path, init=sft, resume=True)
    assert weights(old) == before and weights(out) == weights(rlhf)


def test_local(sft, tmp_path):
    out = run(train_rlhf, tmp_path / "local", init=sft, reward="local", beta=0.25)
    log = check_run(out / "reward", "reward", REWARD_KEYS, REWARD_EVAL_KEYS)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["loss"] < log[0]["loss"]
    check_rl(out)
    assert read_config(out)["kl"] == 0.25  # Theorem 2.2 wants the same beta on both sides
    assert read_config(out / "reward")["beta"] == 0.25

    # No KL is neither that beta nor the map's default.
    for reward in (out / "reward", "helpers.runs:brevity"):
        without = run(train_rlhf, tmp_path / "without", init=sft, reward=reward, kl=0, steps=2)
        assert read_config(without)["kl"] == 0
        shutil.rmtree(without)


@pytest.mark.parametrize("algo", train_rlhf.ALGORITHMS)
def test_a_rule(algo, sft, tmp_path):
    flags = {"reward": "nanoroads.world.roadmap:true_reward"}
    if algo == "grpo":
        flags["updates"] = 2
    out = run(train_rlhf, tmp_path / algo, init=sft, algo=algo, **flags)
    log = check_rl(out)
    assert all(row["reward"] == pytest.approx(row["true_reward"], abs=2e-6) for row in log)
    assert not (out / "reward").exists()
    if algo == "grpo":
        assert all(row["clip_fraction"] == 0 for row in log[::2])  # the first of two updates is on policy
        assert any(row["clip_fraction"] > 0 for row in log[1::2])
    if algo == "online-dpo":
        # ln 2 for each of the 32 prompts whose samples are not all equally good
        compared = log[0]["loss"] / math.log(2) * 32
        assert compared == pytest.approx(round(compared), abs=1e-3) and compared > 0.5


def test_on_rows_of_the_user(rows, sft, tmp_path):
    flags = {"init": sft, "data": rows / "pairs.jsonl", "max_new_tokens": 12}
    for reward in train_rlhf.REWARD_CLASSES:
        out = run(train_rlhf, tmp_path / reward, reward=reward, **flags)
        check_rl(out, on_map=False)
        check_run(out / "reward", "reward", REWARD_KEYS, REWARD_EVAL_KEYS)


def test_the_answers_shown_are_as_long_as_those_trained_on(rows, sft, tmp_path):
    """And `cut` is the share of samples that end without EOS."""
    flags = {"init": sft, "data": rows / "pairs.jsonl", "reward": "helpers.runs:brevity", "steps": 2}
    out = run(train_rlhf, tmp_path / "out", max_new_tokens=2, **flags)
    shown = [record["response"] for record in read_jsonl(out / "samples.jsonl")]
    encoding = tokenizer.get("roadmap")
    assert max(len(tokenizer.encode(encoding, response)) for response in shown) == 2
    for row in metrics(out):
        assert row["cut"] > 0.5 and row["length"] <= 2


def prompts_of(out, sampled):
    """The prompts that a run has sampled from, and those whose answers it has shown."""
    shown = {record["prompt"] for record in read_jsonl(out / "samples.jsonl")}
    return set(sampled), shown


def test_rl_never_samples_a_prompt_whose_pairs_are_held_out(rows, sft, tmp_path, monkeypatch):
    """Without --eval-data both stages hold out the same prompts, and show their answers."""
    sampled = []
    original = train_rlhf.sample_responses

    def recorded(args, policy, batch_rows, *rest):
        sampled.extend(batch_rows.texts)
        return original(args, policy, batch_rows, *rest)

    monkeypatch.setattr(train_rlhf, "sample_responses", recorded)
    pairs = load_rows(rows / "pairs.jsonl", layouts.preference_texts)
    train, test = hold_out(pairs)
    everything = {"steps": None, "epochs": 1, "reward_epochs": 0.1, "init": sft, "max_new_tokens": 12}
    out = run(train_rlhf, tmp_path / "out", data=rows / "pairs.jsonl", **everything)
    trained, shown = prompts_of(out, sampled)
    assert trained == set(train.texts) and not trained & set(test.texts)
    assert shown == set(test.texts[:3]) and len(shown) == 3

    # With a file of held-out pairs every prompt of --data is sampled, and those of the file are shown.
    sampled.clear()
    held_out = write_jsonl(tmp_path / "test.jsonl", read_jsonl(rows / "pairs.jsonl")[:1])
    everything["eval_data"] = held_out
    out = run(train_rlhf, tmp_path / "file", data=rows / "pairs.jsonl", **everything)
    assert prompts_of(out, sampled) == (set(pairs.texts), {pairs.texts[0]})

    # A reward that is given needs no pairs, so none are held out.
    sampled.clear()
    rule = {"reward": "helpers.runs:brevity", "reward_epochs": None, "eval_data": None}
    out = run(train_rlhf, tmp_path / "rule", data=rows / "prompts.jsonl", **{**everything, **rule})
    texts = {row["prompt"] for row in read_jsonl(rows / "prompts.jsonl")}
    assert prompts_of(out, sampled) == (texts, texts)


def test_the_seconds_of_its_parts_are_in_speed_jsonl(rlhf):
    """And not in metrics.jsonl, whose bytes are the same on every machine."""
    for row in read_jsonl(rlhf / "speed.jsonl"):
        parts = [row[f"seconds_{name}"] for name in ("sampling", "scoring", "training")]
        assert all(seconds > 0 for seconds in parts)
        assert sum(parts) <= row["seconds"] * 1.001  # they are of this line's steps, as all else in it


def test_start_and_compare(dpo, sft, tmp_path):
    """--start from the policy compared with: the two are one at first,
    and the distance to the reference is not 0."""
    flags = {"reward": "nanoroads.world.roadmap:true_reward", "init": sft, "compare": dpo}
    flags.update(lr=1e-12, steps=2, eval_every=1)
    first = metrics(run(train_rlhf, tmp_path / "a", start=dpo, **flags))[0]
    assert first["kl_compare"] == pytest.approx(0, abs=1e-5) and abs(first["kl"]) > 1e-4
    first = metrics(run(train_rlhf, tmp_path / "b", start=sft, **flags))[0]
    assert first["kl_compare"] > 1e-4 and first["kl"] == 0


# ---------------------------------------------------------------- stage 1 is a run of its own


def test_stage_1_is_the_same_run_whatever_the_flags_of_stage_2(rlhf, sft, dpo, tmp_path):
    """Train the reward model alone, then decide how to use it."""
    out = run(train_rlhf, tmp_path / "out", init=sft, stop_after="reward")
    assert [path.name for path in out.iterdir()] == ["reward"]
    assert weights(out / "reward") == weights(rlhf / "reward")  # the one of a run through both stages
    before = (out / "reward/model.safetensors").stat().st_mtime_ns
    stage_2 = {"algo": "grpo", "kl": 0.1, "updates": 2, "samples": 3, "temperature": 0.9, "start": dpo}
    stage_2.update(max_new_tokens=10, compare=dpo, lr=1e-4, batch_size=16, steps=4)
    run(train_rlhf, out, init=sft, resume=True, **stage_2)
    assert (out / "reward/model.safetensors").stat().st_mtime_ns == before  # it was not trained again
    config = read_config(out)
    assert (config["kl"], config["args"]["algo"]) == (0.1, "grpo")
    assert metrics(out)[-1]["step"] == 4


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("readout", "sum", "had --readout last, this one has sum"),
        ("reward_lr", 1e-5, "had --reward-lr 0.003, this one has 1e-05"),
        ("reward_epochs", 2, "had --reward-epochs 1.5, this one has 2.0"),
        ("reward_batch_size", 8, "had --reward-batch-size 32, this one has 8"),
        ("reward", "local", "had --reward global, this one has local"),
        ("seed", 3, "had --seed 0, this one has 3"),
    ],
)
def test_another_stage_1_is_refused_by_the_flag_that_differs(flag, value, words, rlhf, sft, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "reward").symlink_to(rlhf / "reward")
    before = weights(rlhf / "reward")
    with pytest.raises(InputError, match=words) as error:
        run(train_rlhf, out, init=sft, resume=True, **{flag: value})
    assert str(out / "reward") in str(error.value)
    assert weights(rlhf / "reward") == before and not (out / "config.json").exists()


def test_another_beta_of_a_local_reward_is_refused(sft, tmp_path):
    flags = {"init": sft, "reward": "local", "stop_after": "reward"}
    out = run(train_rlhf, tmp_path / "out", beta=0.3, **flags)
    with pytest.raises(InputError, match="had --beta 0.3, this one has 1.0"):
        run(train_rlhf, out, beta=1.0, resume=True, **flags)


def test_the_local_reward_has_a_rate_of_its_own(sft, tmp_path):
    out = run(train_rlhf, tmp_path / "out", init=sft, reward="local", reward_lr=None, stop_after="reward")
    args = read_config(out / "reward")["args"]
    assert args["lr"] == args["reward_lr"] == train_rlhf.DEFAULTS["small"]["reward_lr"]["local"]


# ---------------------------------------------------------------- how long, and how many samples


def test_an_epoch_samples_each_prompt_once_whatever_the_updates(sft, tmp_path):
    goals = ("FL", "GA", "ME", "NY", "TX")
    data = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"WA>{goal}:"} for goal in goals])
    flags = {"init": sft, "data": data, "reward": "helpers.runs:brevity", "max_new_tokens": 12}
    out = run(train_rlhf, tmp_path / "out", epochs=1, updates=3, batch_size=2, steps=None, **flags)
    assert metrics(out)[-1]["step"] == 3 * 3


def test_checkpoints_are_between_two_batches_of_samples(sft, tmp_path, monkeypatch):
    """With two updates on a batch and --save-every 3: at the first
    such place where three steps have passed."""
    written = []
    monkeypatch.setattr(
        checkpoint, "save_state", lambda out, model, optimizer, step, made_from: written.append(step)
    )
    flags = {"init": sft, "reward": "helpers.runs:brevity", "updates": 2, "save_every": 3, "steps": 14}
    run(train_rlhf, tmp_path / "out", **flags)
    assert written == [4, 8, 12]


def test_several_updates_of_rloo_are_clipped_ratios(sft, tmp_path):
    """The second step on a batch is off policy: with a large rate its
    ratio leaves the interval, and is clipped."""
    flags = {"reward": "helpers.runs:brevity", "updates": 2, "lr": 0.05, "steps": 8}
    log = metrics(run(train_rlhf, tmp_path / "out", init=sft, **flags))
    assert all(row["clip_fraction"] == 0 for row in log[::2])
    assert max(row["clip_fraction"] for row in log[1::2]) > 0


def test_it_samples_a_few_micro_batches_at_a_time(sft, tmp_path, monkeypatch):
    """In order. How many at a time changes neither the samples nor what is logged."""
    sizes, samples, generate = [], [], rollouts.generate_with_logps

    def recorded(policy, prompts, *rest, **options):
        sizes.append(len(prompts))
        responses, logps = generate(policy, prompts, *rest, **options)
        samples.extend(responses)
        return responses, logps

    monkeypatch.setattr(rollouts, "generate_with_logps", recorded)
    rule = {"reward": "helpers.runs:brevity", "batch_size": 20, "steps": 3, "updates": 1}
    logs, drawn = [], []
    for size in (1, 2, 3, None):
        flags = rule | ({"micro_batch_size": size} if size else {})
        logs.append(metrics(run(train_rlhf, tmp_path / f"out{size}", init=sft, **flags)))
        drawn.append(list(samples))
        samples.clear()
    assert sizes == 3 * [8, 8, 4] + 3 * [16, 4] + 3 * [20] + 3 * [20]
    first_batch = [[list(response) for response in group] for group in drawn[0][:20]]
    assert len({str(group) for group in first_batch}) > 15  # no two parts have the same random numbers
    for other, log in zip(drawn, logs, strict=True):
        assert other == drawn[0]
        for row, wanted in zip(log, logs[0], strict=True):
            for name in ("loss", "reward", "kl", "entropy", "length", "grad_norm"):
                assert row[name] == pytest.approx(wanted[name], rel=1e-4, abs=2e-5), name


def test_nothing_waits_for_the_device_within_a_step(sft, tmp_path, monkeypatch):
    """What a step hands to the log are tensors: they become numbers
    there, where a line is due, and nowhere else."""
    logged = []
    original = Run.log

    def log(self, step, row, **options):
        if self.stage == "rlhf":
            logged.append(row)
        original(self, step, row, **options)

    monkeypatch.setattr(Run, "log", log)
    run(train_rlhf, tmp_path / "out", init=sft, reward="helpers.runs:brevity", steps=2, log_every=2)
    for name in ("loss", "reward", "kl", "entropy", "length", "clip_fraction", "grad_norm"):
        assert isinstance(logged[0][name], torch.Tensor), name


def test_the_reward_model_does_not_depend_on_where_stage_2_starts(sft, dpo, tmp_path, monkeypatch):
    """--start and --compare may change between a killed stage 1 and its --resume, and after it."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", lambda run, model: 1 / 0)  # killed at its end
        with pytest.raises(ZeroDivisionError):
            run(train_rlhf, out, init=sft, start=dpo, save_every=1, stop_after="reward")
    # What `held` refers to is gone with the run that ended.
    gc.collect()
    run(train_rlhf, out, init=sft, compare=dpo, resume=True, stop_after="reward")
    before = weights(out / "reward")
    run(train_rlhf, out, init=sft, start=sft, resume=True)
    assert weights(out / "reward") == before


def test_each_batch_has_random_numbers_of_its_own(sft, dpo, tmp_path, monkeypatch):
    """And so has --compare."""
    seeds, numbers = [], []
    for module, name in ((rollouts, "generate_with_logps"), (score, "generate")):
        original = getattr(module, name)

        def recorded(policy, prompts, k, *rest, seed, generate=original, **options):
            seeds.append(seed)
            numbers.append(uniform([[1, 2]], k, 50, seed))
            return generate(policy, prompts, k, *rest, seed=seed, **options)

        monkeypatch.setattr(module, name, recorded)
    flags = {"reward": "helpers.runs:brevity", "compare": dpo, "steps": 4, "batch_size": 8}
    run(train_rlhf, tmp_path / "out", init=sft, micro_batch_size=8, **flags)
    first_of_seed = dict(zip(seeds, numbers, strict=True))
    assert len(first_of_seed) == 5  # four batches, and the samples that are compared
    for one, other in itertools.combinations(first_of_seed.values(), 2):
        assert not np.intersect1d(one, other).size
