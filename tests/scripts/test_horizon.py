"""experiments/horizon.py: verdicts that can come out either way, and the script at a tiny size."""

import copy
import json

import pytest

from experiments import horizon
from nanoroads.experiments import small_worlds
from nanoroads.report import evidence, to_optimum
from nanoroads.world import distance, roadmap
from nanoroads.world.roadmap import prompts
from tests.helpers.in_process import run_phases
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes

LEADS = {1: 0.0, 2: 0.1, 3: 0.2, 5: 0.25, 8: 0.3, 11: 0.35}


def seeds_that_agree():
    """Two seeds for which every claim holds."""
    rows = {}
    for kind in horizon.KINDS:
        rows[kind] = {}
        for moves, lead in LEADS.items():
            row = {"sft": {"reward": 0.2}, "dpo": {"reward": 0.5}, "rlhf": {"reward": 0.5 + lead}}
            if moves <= 5:
                row["optimum"] = {"reward": 0.95}
                row["dpo"]["kl_to_optimum"], row["rlhf"]["kl_to_optimum"] = 0.25, 0.1
            rows[kind][str(moves)] = row
    return [rows, copy.deepcopy(rows)]


def test_every_claim_can_hold():
    lines = horizon.verdict(seeds_that_agree())
    assert outcomes(lines) == ["yes"] * 10
    assert "any token" in lines[0] and "legal moves" in lines[5]
    assert "DPO is 0.25 nats away, 0.050 below 0.3, no error" in lines[0] and "by +0.100" in lines[2]
    assert "at 2: +0.100" in lines[3]
    assert "at 11 moves, the longest; least surely above 8's, by +0.050" in lines[4]


@pytest.mark.parametrize("kind", horizon.KINDS)
@pytest.mark.parametrize(
    ("moves", "more", "lines"),
    [
        ("1", -0.02, [0]),
        ("1", 0.11, [0, 2]),  # the lead does not grow with the first state in between
        ("2", -0.06, [1]),
        ("5", -0.3, [3]),
        ("11", -0.1, [4]),
    ],
)
def test_every_claim_can_fail(kind, moves, more, lines):
    seeds = seeds_that_agree()
    for row in seeds:
        row[kind][moves]["rlhf"]["reward"] += more
    verdict = horizon.verdict(seeds)
    first = 5 * list(horizon.KINDS).index(kind)
    assert not_held(verdict) == {first + line: NO for line in lines}
    if moves == "5":
        assert "least sure lead, at 5: -0.050" in verdict[first + 3]
    if moves == "11":
        assert "least surely above 8's, by -0.050" in verdict[first + 4]


@pytest.mark.parametrize("road", ["dpo", "rlhf"])
def test_a_distant_optimum_is_no_closed_gap(road):
    seeds = seeds_that_agree()
    for row in seeds:
        row["any"]["1"][road]["kl_to_optimum"] = 5.0
    verdict = horizon.verdict(seeds)
    assert not_held(verdict) == {0: NO} and "5.00" in verdict[0]


@pytest.mark.parametrize(
    ("line", "moves", "measure", "apart", "errors"),
    [
        (0, "1", "reward", 0.02, "+0.000 ± 0.010, 1.0 standard errors below 0.01"),
        (0, "1", "kl_to_optimum", 0.1, "DPO is 0.25 ± 0.05 nats away, 1.0 standard errors below 0.3"),
        (1, "2", "reward", 0.06, "+0.100 ± 0.030, 1.7 standard errors above 0.05"),
        (3, "5", "reward", 0.4, "at 5: +0.250 ± 0.200, 1.2 standard errors"),
        (4, "11", "reward", 0.1, "least surely above 8's, by +0.050 ± 0.050, 1.0"),
    ],
)
def test_a_mean_on_the_right_side_of_its_bound_is_not_enough(line, moves, measure, apart, errors):
    seeds = seeds_that_agree()
    for row, change in zip(seeds, (-apart / 2, apart / 2), strict=True):
        row["any"][moves]["dpo"][measure] += change
    verdict = horizon.verdict(seeds)
    expected = {line: UNDECIDED}
    if moves == "5":  # what is not sure at 5 is not the least there either
        expected[4] = UNDECIDED
    assert not_held(verdict) == expected and errors in verdict[line]


def test_the_first_state_is_decided_seed_by_seed():
    """Both leads vary, and their difference does not."""
    seeds = seeds_that_agree()
    for row, change in zip(seeds, (-0.1, 0.1), strict=True):
        for moves in ("1", "2"):
            row["any"][moves]["dpo"]["reward"] += change
    verdict = horizon.verdict(seeds)
    assert not_held(verdict) == {0: UNDECIDED, 1: UNDECIDED, 3: UNDECIDED} and "by +0.100" in verdict[2]


def test_the_lead_is_taken_seed_by_seed():
    seeds = seeds_that_agree()
    for road in ("dpo", "rlhf"):
        seeds[1]["any"]["2"][road]["reward"] += 0.3  # the seeds differ, the lead does not
    cell = to_optimum.rlhf_lead(seeds, "any", 2)
    assert cell["mean"] == pytest.approx(0.1) and cell["se"] == pytest.approx(0, abs=1e-12)
    text = to_optimum.table_of(seeds, horizon.WORLDS, "most moves")
    assert "| any token | 2 | 0.200 | 0.650 ± 0.150 | 0.750 ± 0.150 | 0.100 | 0.950 |" in text
    assert "| legal moves only | 11 |" in text and text.count("| - | - | - |") == 4


TINY = ["--rows", "500", "--steps", "30", "--lr", "2e-2"]


def few_prompts(world, split):
    return prompts(world, split)[:40]


def test_the_command(tmp_path, monkeypatch, capsys):
    for module in (roadmap, distance, to_optimum):
        monkeypatch.setattr(module, "prompts", few_prompts)
    monkeypatch.setattr(evidence, "SFT", [*TINY, "--n-layer", "1", "--n-embd", "16"])
    monkeypatch.setattr(small_worlds, "SFT", TINY)
    small = {"PAIRS": 64, "TEST_PAIRS": 32, "STEPS": 2, "RL_STEPS": 2, "run_phases": run_phases}
    for name, value in {**small, "WORLDS": {1: "roadmap-short", 2: "roadmap-2"}}.items():
        monkeypatch.setattr(horizon, name, value)
    out = tmp_path / "out"
    horizon.main(["--seeds", "3", "--out", str(out)])
    written = json.loads((out / "horizon/results.json").read_text())
    assert written["seeds"] == [3] and len(written["verdict"]) == 10
    assert "<svg" in (out / "horizon/figure.svg").read_text()
    assert (out / "horizon/table.md").read_text() in capsys.readouterr().out
    (row,) = written["by_seed"]
    for kind in horizon.KINDS:
        two = row[kind]["2"]
        assert 0 < two["dpo"]["reward"] < two["optimum"]["reward"] <= 1
        assert two["sft"]["kl_to_ref"] == 0 and two["dpo"]["kl_to_optimum"] > 1
    # The mask takes from the reference what is illegal, so that more of it arrives.
    assert row["any"]["2"]["sft"]["reward"] < row["legal"]["2"]["sft"]["reward"]
