"""Theorem 3.1's two roads by enumeration; its script end to end; verdicts that can come out either way."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from helpers.in_process import run_phases

from experiments import theorem_3_1
from experiments.theorem_3_1 import GPT_SIZES, SIMPLE_SIZES, WORLD
from nanoroads.experiments import simple_rewards
from nanoroads.experiments.simple_rewards import CLASSES
from nanoroads.model import GPT, GPTConfig
from nanoroads.report.ledger import Ledger
from nanoroads.run.optim import total_steps
from nanoroads.text import tokenizer
from nanoroads.world import distance, roadmap
from nanoroads.world.optimum import exact_optimum, rewarded_routes, soft_optimum
from nanoroads.world.roadmap import prompts
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes


@pytest.fixture(scope="module")
def world():
    """The enumeration under a small GPT with random weights."""
    torch.manual_seed(0)
    vocabulary = tokenizer.get("roadmap").n_vocab
    reference = GPT(GPTConfig(vocab_size=vocabulary, n_layer=1, n_embd=16, block_size=16, tied=False))
    return simple_rewards.enumerate_world(reference)


def test_every_text_is_counted_once(world):
    places, ref_logp, f, truth = world
    torch.testing.assert_close(ref_logp.exp().sum(1), torch.ones(200, dtype=torch.float64))
    assert len(places) == len(set(places.values())) and not f[:, -1].any() and not truth[:, -1].any()
    for prompt in prompts(WORLD, "train")[:20]:
        rewarded = {route for p, route in places if p == prompt and WORLD.reward(p, route) > 0}
        assert rewarded == set(rewarded_routes(WORLD, prompt))


def test_the_true_reward_is_in_the_class_of_checks(world):
    _, _, f, truth = world
    phi = torch.tensor([0, 1, 0, -0.05], dtype=torch.float64)
    torch.testing.assert_close(f @ phi, truth)
    without_goal = f[..., CLASSES["roads"]].flatten(0, 1)
    left = truth.flatten() - without_goal @ torch.linalg.lstsq(without_goal, truth.flatten()).solution
    assert left.abs().max() > 0.5


def test_the_optimum_is_the_worlds(world):
    _, ref_logp, _, truth = world
    logp = soft_optimum(ref_logp, WORLD.bt_scale * truth, simple_rewards.BETA)
    exact = exact_optimum(ref_logp[:, :-1], WORLD.bt_scale * truth[:, :-1], simple_rewards.BETA)
    ours = (logp.exp() * WORLD.bt_scale * truth).sum(1)
    torch.testing.assert_close(ours, exact["reward"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", CLASSES)
def test_the_roads_over_a_simple_class_are_one(name, world):
    """Pairs of two random routes, labelled by the other rule that is neither's truth: a coin, nearly."""
    places, _, _, _ = world
    generator = torch.Generator().manual_seed(1)
    by_prompt = {}
    for prompt, text in places:
        by_prompt.setdefault(prompt, []).append(text)
    rows = []
    for prompt, texts in by_prompt.items():
        for _ in range(6):
            a, b = torch.randint(len(texts) + 1, (2,), generator=generator).tolist()
            first, second = ([*texts, ">WA>FL"][i] for i in (a, b))  # the last is not legal anywhere
            rows.append({"prompt": prompt, "chosen": first, "rejected": second})
    row = simple_rewards.both_roads(world, rows, CLASSES[name], seed=0)
    assert row["parameters_apart"] < 1e-6 and row["logp_apart"] < 1e-6 and row["kl_apart"] < 1e-12
    assert row["dpo"] == pytest.approx(row["rlhf"], abs=1e-7)


def test_the_judge_is_phi_times_f(tmp_path, monkeypatch):
    monkeypatch.setenv(simple_rewards.PHI, "")  # taken back after the test
    simple_rewards.set_judge(tmp_path / "phi.json", [1, 10, 100, 1000])
    assert simple_rewards.judge("WA>OR:", ">OR") == 11
    assert simple_rewards.judge("WA>CA:", ">OR>CA") == 1111
    assert simple_rewards.judge("WA>CA:", ">OR>NV") == 101
    assert simple_rewards.judge("WA>CA:", ">ID") == 1
    assert simple_rewards.judge("WA>CA:", ">CA") == 0


def test_rloo_has_the_prompts_of_all_pairs(tmp_path):
    phases = {phase.name: phase.command for phase in theorem_3_1.gpt_phases(tmp_path, seed=3)}
    command = phases[str(tmp_path / "rloo")]
    assert command[command.index("--data") + 1] == str(tmp_path / f"pairs_{max(GPT_SIZES)}.jsonl")
    assert command[command.index("--reward") + 1] == "nanoroads.experiments.simple_rewards:judge"
    assert "--reward-epochs" not in command


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("phi.json", ["rloo"]),
        ("pairs_1000.jsonl", ["dpo_1000", "rlhf_1000"]),
        ("pairs_20000.jsonl", ["dpo_20000", "rlhf_20000", "rloo"]),
        ("sft", ["dpo_1000", "rlhf_1000", "dpo_5000", "rlhf_5000", "dpo_20000", "rlhf_20000", "rloo"]),
    ],
)
def test_a_gpt_is_trained_again_when_what_it_is_made_from_has_changed(changed, again, tmp_path):
    (tmp_path / "sft").mkdir()
    for name in ["phi.json", "sft/pairs_test.jsonl", *(f"pairs_{n}.jsonl" for n in GPT_SIZES)]:
        (tmp_path / name).write_text("first")
    ledger = Ledger(tmp_path)
    ledger.finished[f"{tmp_path}/sft"] = {
        "command": [],
        "read": {},
        "seconds": 1.0,
        "made": {"model": "first"},
    }
    phases = theorem_3_1.gpt_phases(tmp_path, seed=3)
    for phase in phases:
        ledger.start(phase)
        phase.result.mkdir()
        (phase.result / "model.safetensors").write_text("trained")
        ledger.finish(phase, 1.0)
    assert all(ledger.is_done(phase) for phase in phases)
    if changed == "sft":
        ledger.finished[f"{tmp_path}/sft"]["made"]["model"] = "another"
    else:
        (tmp_path / changed).write_text("another")
    assert [Path(phase.name).name for phase in phases if not ledger.is_done(phase)] == again


# ---------------------------------------------------------------- the verdict


def seeds_that_agree():
    """Results of two seeds for which every claim holds."""
    simple = {}
    for name, reward in (("checks", 0.95), ("roads", 0.3)):
        for n in SIMPLE_SIZES:
            simple[f"{name} {n}"] = {
                "phi": [],
                "parameters_apart": 1e-9,
                "logp_apart": 1e-9,
                "kl_apart": 1e-15,
            }
            simple[f"{name} {n}"] |= {"dpo": reward, "rlhf": reward}
    row = {"sft": 0.3, "optimum": 0.96, "rloo": 0.949, "simple": simple}
    for road in ("dpo", "rlhf"):
        for n in GPT_SIZES:
            row[f"{road} {n}"] = 0.5 if n < 20000 else 0.9
    return [row, copy.deepcopy(row)]


def test_every_claim_can_hold():
    lines = theorem_3_1.verdict(seeds_that_agree())
    assert outcomes(lines) == ["yes"] * 4
    assert "95% of each seed's optimum, 0.912 in the mean, are reached with 30 pairs (0.950, by" in lines[1]
    assert "does not with 20,000 pairs (0.900, by -0.012, no error), nor RLHF" in lines[1]


@pytest.mark.parametrize(
    ("names", "reward", "line"),
    [
        (["simple", "checks 30", "dpo"], 0.9, 1),
        (["dpo 20000"], 0.94, 1),
        (["rlhf 20000"], 0.94, 1),
        (["simple", "roads 20000", "dpo"], 0.95, 2),
        (["rloo"], 0.9, 3),
        (["simple", "roads 20000", "parameters_apart"], 1e-3, 0),
    ],
)
def test_every_claim_can_fail(names, reward, line):
    seeds = seeds_that_agree()
    for row in seeds:
        for name in names[:-1]:
            row = row[name]
        row[names[-1]] = reward
    assert not_held(theorem_3_1.verdict(seeds)) == {line: NO}


@pytest.mark.parametrize(
    ("name", "means", "line", "errors"),
    [
        ("checks 30", (0.88, 1.02), 1, "0.950 ± 0.070, by +0.038 ± 0.070, 0.5 standard errors"),
        ("dpo 20000", (0.86, 0.94), 1, "0.900 ± 0.040, by -0.012 ± 0.040, 0.3 standard errors"),
        ("rloo", (0.93, 0.96), 3, "+0.005 ± 0.015, 1.0 standard errors below 0.02"),
    ],
)
def test_a_mean_on_the_right_side_of_its_bound_is_not_enough(name, means, line, errors):
    seeds = seeds_that_agree()
    for row, mean in zip(seeds, means, strict=True):
        if name == "checks 30":
            row["simple"][name]["dpo"] = mean
        else:
            row[name] = mean
    verdict = theorem_3_1.verdict(seeds)
    assert not_held(verdict) == {line: UNDECIDED} and errors in verdict[line]


def test_the_goal_is_each_seeds_own():
    """Rewards and optima vary together, their distance does not."""
    seeds = seeds_that_agree()
    for row, change in zip(seeds, (-0.05, 0.05), strict=True):
        row["optimum"] += change
        row["dpo 20000"] += 0.95 * change
        row["rlhf 20000"] += 0.95 * change
        row["simple"]["checks 30"]["dpo"] += 0.95 * change
    assert outcomes(theorem_3_1.verdict(seeds)) == ["yes"] * 4


@pytest.mark.parametrize("distance", ["parameters_apart", "logp_apart"])
def test_a_distance_that_is_no_number_is_not_lost_among_the_others(distance):
    seeds = seeds_that_agree()
    seeds[0]["simple"]["roads 20000"][distance] = math.nan
    assert not_held(theorem_3_1.verdict(seeds)) == {0: UNDECIDED}


# ---------------------------------------------------------------- the command


def few_prompts(world, split):
    return prompts(world, split)[:40]


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    for module in (roadmap, distance, simple_rewards):
        monkeypatch.setattr(module, "prompts", few_prompts)
    small = {"SIMPLE_SIZES": [30, 100], "GPT_SIZES": [60, 100], "RLOO_PAIRS": 100, "STEPS": 2, "RL_STEPS": 2}
    model = ["--n-layer", "1", "--n-embd", "16", "--rows", "500", "--steps", "60", "--lr", "2e-2"]
    for name, value in {**small, "SFT": model, "run_phases": run_phases}.items():
        monkeypatch.setattr(theorem_3_1, name, value)
    monkeypatch.setenv(simple_rewards.PHI, "")  # taken back after the test
    out = tmp_path / "out"
    theorem_3_1.main(["--seeds", "0", "--out", str(out)])
    written = json.loads((out / "theorem_3_1/results.json").read_text())
    assert written["seeds"] == [0] and len(written["verdict"]) == 4
    assert "<svg" in (out / "theorem_3_1/figure.svg").read_text()
    assert (out / "theorem_3_1/table.md").read_text() in capsys.readouterr().out
    (row,) = written["by_seed"]
    # It may exceed the soft optimum's, which also stays near the reference.
    assert row["sft"] < row["simple"]["checks 100"]["dpo"] < 1 and 0 < row["dpo 100"] < row["optimum"]


def test_a_bad_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        theorem_3_1.main(["--seeds", "x"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_both_gpts_see_all_counted_pairs_for_the_same_steps(tmp_path):
    """Held-out pairs are drawn apart, by the command that draws the pairs, and not taken from these."""
    draw = theorem_3_1.sft_phases(tmp_path, 3)[1].command
    held_out = draw[draw.index("--test-out") + 1]
    phases = {phase.name: phase.command for phase in theorem_3_1.gpt_phases(tmp_path, 3)}
    for n in GPT_SIZES:
        dpo, rlhf = phases[f"{tmp_path}/dpo_{n}"], phases[f"{tmp_path}/rlhf_{n}"]
        for command in (dpo, rlhf):
            assert command[command.index("--data") + 1] == f"{tmp_path}/pairs_{n}.jsonl"
            assert command[command.index("--eval-data") + 1] == held_out
        steps = int(dpo[dpo.index("--steps") + 1])
        epochs = float(rlhf[rlhf.index("--reward-epochs") + 1])
        assert steps <= total_steps(n, 32, epochs) <= 1.024 * steps  # an epoch's last batch may be small
