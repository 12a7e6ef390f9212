"""Pairs with one defect each, what is counted, verdicts that can come out either way, the whole script."""

import copy
import json

import pytest
import torch
from helpers.in_process import run_phases

from experiments import verify_not_generate as script
from nanoroads.experiments import verifies_and_generates as counted
from nanoroads.experiments.pairs_with_one_defect import WORLD, demonstrations, pairs
from nanoroads.losses import implicit_reward
from nanoroads.report.evidence import values_of
from nanoroads.report.judged import read_pairs
from nanoroads.report.on_map import ENCODING
from nanoroads.score import sequence_logps
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_policy, load_reward_model
from nanoroads.world.roadmap import ends, moves_of, prompts, reward_parts
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes

# ---------------------------------------------------------------- the rows


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_rejected_route_has_exactly_one_defect(split):
    rows = pairs(400, split, seed=3)
    assert len(rows) == 400 and {row["prompt"] for row in rows} <= set(prompts(WORLD, split))
    defects = {"ends elsewhere": 0, "illegal hop": 0}
    for row in rows:
        chosen = reward_parts(row["prompt"], row["chosen"])
        rejected = reward_parts(row["prompt"], row["rejected"])
        assert chosen["legal"] and chosen["arrives"] and chosen["moves"] == rejected["moves"]
        if rejected["legal"]:
            defects["ends elsewhere"] += 1
            # A route that ends where it began would show its defect without the goal.
            assert moves_of(row["rejected"])[-1] not in ends(row["prompt"])
        else:
            defects["illegal hop"] += 1
            pair = zip(moves_of(row["chosen"]), moves_of(row["rejected"]), strict=True)
            assert rejected["arrives"] and sum(a != b for a, b in pair) == 1
    assert 160 < defects["illegal hop"] < 220


def test_rows_are_functions_of_the_seed():
    assert pairs(20, "train", 1) == pairs(20, "train", 1) != pairs(20, "train", 2)
    assert demonstrations(20, 1) == demonstrations(20, 1) != demonstrations(20, 2)


def test_demonstrations_follow_roads_and_no_goal():
    rows = demonstrations(2000, seed=3)
    parts = [reward_parts(row["prompt"], row["response"]) for row in rows]
    assert all(part["legal"] for part in parts)
    assert {part["moves"] for part in parts} == set(range(1, 12))
    assert sum(part["arrives"] for part in parts) < 100  # about one in 48
    assert {row["prompt"] for row in rows} <= set(prompts(WORLD, "train"))


# ---------------------------------------------------------------- what is counted

ROWS = [
    {"prompt": "WA>OR:", "chosen": ">OR", "rejected": ">ID"},
    {"prompt": "WA>CA:", "chosen": ">OR>CA", "rejected": ">FL>CA"},
    {"prompt": "WA>FL:", "chosen": ">OR>NV>AZ>NM>TX>LA>MS>AL>FL", "rejected": ">OR>NV>AZ>NM>TX>LA>MS>AL>GA"},
    {"prompt": "WA>AZ:", "chosen": ">OR>CA>AZ", "rejected": ">OR>NY>AZ"},
    {"prompt": "WA>CA:", "chosen": ">ID>OR>CA", "rejected": ">ID>OR>NV"},
]


def test_groups_of_pairs():
    groups = {name: mask.tolist() for name, mask in counted.groups_of(ROWS).items()}
    assert groups == {
        "all": [True] * 5,
        "ends elsewhere": [True, False, True, False, True],
        "illegal hop": [False, True, False, True, False],
        "1": [True, False, False, False, False],
        "2": [False, True, False, False, True],
        "3-4": [False, False, False, True, False],
        "5 or more": [False, False, True, False, False],
        "3 or more": [False, False, True, True, False],
    }


def test_a_pair_is_right_where_the_chosen_route_scores_higher(monkeypatch):
    seen = {}

    def scores(model, reference, asked, answers, beta, groups_per_pass):
        seen.update(reference=reference, asked=asked, answers=answers)
        return torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, -1.0], [-1.0, 0.0]])

    monkeypatch.setattr(counted, "rewards", scores)
    assert counted.verifies("model", "reference", ROWS).tolist() == [1, 0, 0.5, 1, 0]
    assert seen["reference"] == "reference"
    eos = tokenizer.eos_id(ENCODING)
    first, second = seen["answers"][0]
    assert tokenizer.decode_all(ENCODING, [first, second]) == [">OR", ">ID"]
    assert first[-1] == second[-1] == eos and tokenizer.decode(ENCODING, seen["asked"][0]) == "WA>OR:"


def test_a_prompt_counts_once_for_each_of_its_pairs(monkeypatch):
    def measures(policy, reference, world, encoding, asked, groups_per_pass, samples):
        assert asked == ["WA>OR:", "WA>CA:", "WA>FL:", "WA>AZ:"] and samples == 8
        reward = [0.95] * 8 + [0.5] * 2 + [0.0] * 6 + [0.0] * 16
        return {"reward": reward, "greedy_reward": [0, 0.9, 0, 1], "legal": [1.0] * 8 + [0.0] * 24}

    monkeypatch.setattr(counted, "measure_on_map", measures)
    values = counted.generates(None, None, ROWS)
    assert values["valid"].tolist() == [1, 0.25, 0, 0, 0.25]
    assert values["greedy"].tolist() == [0, 1, 0, 1, 1]
    assert values["legal"].tolist() == [1, 0, 0, 0, 0]


# ---------------------------------------------------------------- the verdict


def seeds_that_agree():
    """Results of two seeds for which every claim holds."""
    numbers = {  # accuracy, valid, greedy
        "sft": (0.7, 0.02, 0.02),
        "dpo": (0.9, 0.03, 0.04),
        "rlhf": (0.85, 0.3, 0.4),
        "imitation": (0.75, 0.7, 0.9),
    }
    row = {}
    for name, (accuracy, valid, greedy) in numbers.items():
        measures = {"accuracy": accuracy, "valid": valid, "greedy": greedy, "legal": 0.8}
        row[name] = {}
        for measure, value in measures.items():
            row[name][measure] = dict.fromkeys(counted.groups_of(ROWS), value)
    return [row, copy.deepcopy(row)]


def test_every_claim_can_hold():
    lines = script.verdict(seeds_that_agree())
    assert outcomes(lines) == ["yes"] * 5
    assert "(0.900, 0.100 above 0.8, " in lines[0]
    assert "(0.030, 0.020 below 0.05, " in lines[1]
    assert "by +0.670" in lines[2] and "by +0.150" in lines[2]
    assert "-0.050, 0.070 below 0.02" in lines[3] and "+0.270" in lines[4] and "greedy +0.360" in lines[4]


@pytest.mark.parametrize(
    ("line", "name", "measure", "group", "value"),
    [
        (0, "dpo", "valid", "all", 0.06),
        (1, "dpo", "accuracy", "3 or more", 0.78),
        (1, "dpo", "valid", "3 or more", 0.06),
        (2, "imitation", "valid", "all", 0.02),
        (2, "imitation", "accuracy", "all", 0.95),
        (3, "rlhf", "accuracy", "all", 0.92),
        (4, "rlhf", "valid", "all", 0.02),
    ],
)
def test_every_claim_can_fail(line, name, measure, group, value):
    seeds = seeds_that_agree()
    for row in seeds:
        row[name][measure][group] = value
    assert not_held(script.verdict(seeds)) == {line: NO}


def test_a_lead_that_is_not_shown_does_not_show_that_there_is_none():
    seeds = seeds_that_agree()
    for row, accuracy in zip(seeds, (0.84, 0.96), strict=True):
        row["rlhf"]["accuracy"]["all"] = accuracy
    assert not_held(script.verdict(seeds)) == {3: UNDECIDED}


@pytest.mark.parametrize(
    ("line", "measure", "group", "values", "errors"),
    [
        (0, "accuracy", "all", (0.8, 1.0), "0.900 ± 0.100, 1.0 standard errors above 0.8"),
        (0, "valid", "all", (0.01, 0.05), "0.030 ± 0.020, 1.0 standard errors below 0.05"),
        (1, "accuracy", "3 or more", (0.8, 1.0), "0.900 ± 0.100, 1.0 standard errors above 0.8"),
        (1, "valid", "3 or more", (0.01, 0.05), "0.030 ± 0.020, 1.0 standard errors below 0.05"),
    ],
)
def test_bounds_are_passed_by_two_standard_errors(line, measure, group, values, errors):
    seeds = seeds_that_agree()
    for row, value in zip(seeds, values, strict=True):
        row["dpo"][measure][group] = value
    for row in seeds:  # lines 2 and 3 look at all pairs: DPO stays ahead in them
        row["imitation"]["accuracy"]["all"] = row["rlhf"]["accuracy"]["all"] = 0.5
    verdict = script.verdict(seeds)
    assert outcomes(verdict)[line] == UNDECIDED and errors in verdict[line]
    assert verdict[1 - line].startswith("yes: ")


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path, monkeypatch, capsys):
    model = ["--n-layer", "1", "--n-embd", "16", "--steps", "20", "--lr", "2e-2"]
    small = {"SFT": model, "DEMONSTRATIONS": 200, "PAIRS": 60, "TEST_PAIRS": 40}
    small["DPO"] = ["--steps", "2", "--lr", "1e-2"]
    small["IMITATION"] = ["--steps", "2"]
    small["RLHF"] = ["--reward-epochs", "1", "--steps", "2", "--batch-size", "4", "--max-new-tokens", "12"]
    for name, value in {**small, "run_phases": run_phases}.items():
        monkeypatch.setattr(script, name, value)
    out = tmp_path / "out"
    script.main(["--seeds", "0", "--out", str(out)])
    folder = out / "verify_not_generate"
    written = json.loads((folder / "results.json").read_text())
    assert written["seeds"] == [0] and len(written["verdict"]) == 5
    assert (folder / "figure.svg").read_text().startswith("<?xml")
    assert (folder / "table.md").read_text() in capsys.readouterr().out

    # Imitation learns from the better route of each pair.
    imitated = read_pairs(folder / "seed0/chosen.jsonl")
    assert values_of(imitated, "response") == values_of(read_pairs(folder / "seed0/pairs.jsonl"), "chosen")

    # The numbers again, from the files that the commands left.
    (row,) = written["by_seed"]
    rows = read_pairs(folder / "seed0/pairs_test.jsonl")
    sft = load_policy(folder / "seed0/sft")
    assert row["pairs"]["all"] == 40
    assert row["sft"]["accuracy"]["all"] == counted.verifies(sft, None, rows).mean()
    head = load_reward_model(folder / "seed0/rlhf/reward")
    assert row["rlhf"]["accuracy"]["all"] == counted.verifies(head, None, rows).mean()
    for name in ("dpo", "imitation"):
        policy = load_policy(folder / "seed0" / name)
        right = []
        for pair in rows:
            asked = [tokenizer.encode(ENCODING, pair["prompt"])]
            both = [tokenizer.encode(ENCODING, pair[key]) for key in ("chosen", "rejected")]
            answers = [[answer + [tokenizer.eos_id(ENCODING)] for answer in both]]
            logps = [sequence_logps(model, asked, answers) for model in (policy, sft)]
            chosen, rejected = implicit_reward(*logps, 0.3)[0].tolist()
            right.append(chosen > rejected)
        assert row[name]["accuracy"]["all"] == pytest.approx(sum(right) / 40, abs=0.03)
