"""H2 to H4: verdicts that can come out either way; and the four scripts of H2 to H5 end to end in one folder,
whose runs they share."""

import json
import math

import numpy as np
import pytest
import torch

from experiments import hypotheses, prior_of_local, reward_classes, wider_data
from nanoroads.experiments.wider_data import relabel
from nanoroads.report import compared, evidence, judged
from nanoroads.world.roadmap import prompts
from tests.helpers.in_process import run_phases
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes

SEEDS = 3


def policies(labels, rewards):
    """Rows of three seeds: each policy's true reward is the one in `rewards`, or .2, and a little more
    from seed to seed."""
    by_seed = []
    for seed in range(SEEDS):
        row = {}
        for name in labels:
            reward = rewards.get(name, 0.2) + 0.0001 * seed * len(name)
            cell = {"mean": reward, "se": 0.01}
            row[name] = {measure: dict(cell) for measure in compared.MEASURES}
        by_seed.append(row)
    return by_seed


# ---------------------------------------------------------------- verdicts


FOR_RLHF = {"rlhf_global": 0.5, "rlhf_from_dpo": 0.51, "dpo": 0.4, "dpo_12_epochs": 0.409}
FOR_RLHF |= {"rlhf_8_epochs": 0.55, "dpo_8_epochs": 0.41}


def budget_rows(changed):
    by_seed = policies(hypotheses.LABELS, {**FOR_RLHF, **changed})
    for row in by_seed:
        row["nll"] = {"rlhf_global": 0.61, "rlhf_8_epochs": 0.6}
    return by_seed


def test_budgets_can_leave_a_gap():
    lines = hypotheses.verdict(budget_rows({}))
    assert outcomes(lines) == ["yes"] * 6
    assert "+0.101" in lines[0] and "+0.111" in lines[1] and "+0.010" in lines[2]
    assert "DPO, three times the epochs, adds +0.010" in lines[3]
    assert "over DPO, three times, lower rate: +0.299" in lines[4]
    assert "ahead: +0.140" in lines[5] and "is then 0.600, else 0.610" in lines[5]


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"rlhf_global": 0.3}, [0, 2, 4]),
        ({"rlhf_from_dpo": 0.3}, [1, 2]),
        ({"rlhf_from_dpo": 0.53}, [2]),
        ({"dpo_8_epochs": 0.43}, [3]),
        ({"dpo_ipo": 0.6}, [3, 4]),
        ({"rlhf_8_epochs": 0.3}, [5]),
    ],
)
def test_a_budget_can_close_the_gap(changed, fails):
    assert not_held(hypotheses.verdict(budget_rows(changed))) == dict.fromkeys(fails, NO)


@pytest.mark.parametrize(
    ("name", "undecided"),
    [
        ("rlhf_global", [0, 2, 4]),
        ("rlhf_from_dpo", [1, 2]),
        ("dpo_12_epochs", [3, 4]),
        ("rlhf_8_epochs", [5]),
    ],
)
def test_a_mean_without_two_errors_decides_nothing(name, undecided):
    by_seed = budget_rows({})
    for row, off in zip(by_seed, (-0.4, 0.0, 0.4), strict=True):
        row[name]["reward"]["mean"] += off
    assert not_held(hypotheses.verdict(by_seed)) == dict.fromkeys(undecided, UNDECIDED)


WIDER = {"rlhf_global": 0.5, "dpo": 0.4, "rlhf_relabelled": 0.52, "dpo_relabelled": 0.45}
WIDER |= {"rlhf_half": 0.45, "rlhf_augmented": 0.46}


def wider_rows(changed):
    by_seed = policies(wider_data.LABELS, {**WIDER, **changed})
    for row in by_seed:
        row["nll"] = {"rlhf_global": 0.6, "rlhf_half": 0.61, "rlhf_relabelled": 0.59}
    return by_seed


def test_wider_data_can_leave_a_gap():
    lines = wider_data.verdict(wider_rows({}))
    assert outcomes(lines) == ["yes"] * 4
    assert "it adds +0.011" in lines[1] and "half is more by +0.040" in lines[2]
    assert "+0.070" in lines[3] and "gains +0.051" in lines[3] and "RLHF +0.020" in lines[3]
    assert "0.590, without them 0.600" in lines[3]


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({"rlhf_global": 0.39}, [0, 2]),  # where there is no gap, every gain is more than half of it
        ({"rlhf_augmented": 0.48}, [1]),
        ({"rlhf_augmented": 0.51}, [1, 2]),
        ({"dpo_relabelled": 0.53}, [3]),
    ],
)
def test_wider_data_can_close_the_gap(changed, fails):
    assert not_held(wider_data.verdict(wider_rows(changed))) == dict.fromkeys(fails, NO)


@pytest.mark.parametrize(
    ("name", "undecided"), [("rlhf_global", [0, 2]), ("rlhf_augmented", [1, 2]), ("dpo_relabelled", [3])]
)
def test_a_wide_error_decides_nothing(name, undecided):
    by_seed = wider_rows({})
    for row, off in zip(by_seed, (-0.3, 0.0, 0.3), strict=True):
        row[name]["reward"]["mean"] += off
    assert not_held(wider_data.verdict(by_seed)) == dict.fromkeys(undecided, UNDECIDED)


def test_less_than_half_of_no_lead_is_not_claimed():
    """RL on all prompts loses more than half of what RLHF is behind."""
    changed = {"rlhf_global": 0.38, "rlhf_augmented": 0.43, "rlhf_half": 0.48}
    lines = wider_data.verdict(wider_rows(changed))
    assert not_held(lines) == {0: NO, 2: NO} and "half is more by +0.0" in lines[2]


def test_without_errors_the_budget_next_to_the_bound_is_the_least_sure():
    lines = hypotheses.verdict(budget_rows({"dpo_8_epochs": 0.3, "dpo_ipo": 0.3})[:1])
    assert "the least sure, DPO, three times the epochs, adds +0.009" in lines[3]


# ---------------------------------------------------------------- exact parts


def test_relabelling_follows_the_reward():
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"} for _ in range(4000)]
    reward = torch.tensor([[1.0, 0.0]] * 4000)
    kept = [row["chosen"] == "a" for row in relabel(rows, reward, np.random.default_rng(0))]
    chance = 1 / (1 + math.exp(-1))
    assert abs(sum(kept) / 4000 - chance) < 4 * math.sqrt(chance * (1 - chance) / 4000)
    certain = relabel(rows[:9], 100 * reward[:9].flip(1), np.random.default_rng(0))
    assert certain == [{"prompt": "p", "chosen": "b", "rejected": "a"}] * 9
    assert rows[0]["chosen"] == "a"  # the rows themselves stay as they are


# ---------------------------------------------------------------- the commands


def few_prompts(world, split):
    return prompts(world, split)[:6]


SMALL = {"SFT": ["--n-layer", 1, "--n-embd", 16, "--rows", 500, "--steps", 60, "--lr", 2e-2]}
SMALL |= {"DPO": ["--steps", 2], "RLHF": ["--steps", 1, "--samples", 2]}
SMALL |= {"PAIRS": 40, "TEST_PAIRS": 20}


def test_the_commands(tmp_path, monkeypatch, capsys):
    for name, value in SMALL.items():
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr(compared, "prompts", few_prompts)
    monkeypatch.setattr(judged, "prompts", few_prompts)
    monkeypatch.setattr(wider_data, "DRAWN", 120)
    monkeypatch.setattr(reward_classes, "EPOCHS", 1)
    scripts = {
        "hypotheses": hypotheses,
        "wider_data": wider_data,
        "reward_classes": reward_classes,
        "prior_of_local": prior_of_local,
    }
    for name, script in scripts.items():
        monkeypatch.setattr(script, "run_phases", run_phases)
        script.main(["--seeds", "5", "--out", str(tmp_path)])
        written = json.loads((tmp_path / name / "results.json").read_text())
        assert written["seeds"] == [5] and set(outcomes(written["verdict"])) <= {"yes", NO, UNDECIDED}
        assert written["claim"].endswith(".") and len(written["by_seed"]) == 1
        assert "<svg" in (tmp_path / name / "figure.svg").read_text()
        assert (tmp_path / name / "table.md").read_text() in capsys.readouterr().out

    folder = tmp_path / "seed5"
    rows = {}
    for name in ("more_pairs", "half_pairs", "relabelled_pairs", "all_prompts", "sft/pairs"):
        rows[name] = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert rows["more_pairs"][:40] == rows["sft/pairs"] == rows["relabelled_pairs"][:40]
    new = zip(rows["more_pairs"][40:80], rows["relabelled_pairs"][40:], strict=True)
    assert all({*before.values()} == {*after.values()} for before, after in new)
    everything = prompts(compared.WORLD, "train")
    assert [row["prompt"] for row in rows["all_prompts"]] == everything
    assert {row["prompt"] for row in rows["half_pairs"]} <= {*everything[: len(everything) // 2]}
    config = json.loads((folder / "rlhf_from_dpo/config.json").read_text())
    assert config["args"]["start"].endswith("seed5/dpo") and config["reference"].endswith("seed5/sft")
    config = json.loads((folder / "dpo_12_epochs_3e-5/config.json").read_text())
    assert config["args"]["lr"] == 3e-5 and config["args"]["epochs"] == 12
    config = json.loads((folder / "rlhf_augmented/config.json").read_text())
    assert config["args"]["reward"].endswith("rlhf_half/reward") and config["kl"] == 0.5
