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
    assert [line[:4] for line in lines] == ["yes:"] * 8
    assert "any token" in lines[0] and "legal moves" in lines[4]
    assert "(the further one 0.25 ± 0.00, 0.050 below 0.3 " in lines[0] and "at 2: +0.100" in lines[2]
    assert "11 moves" in lines[3] and "less that at 8, the largest of the others, +0.050" in lines[3]


@pytest.mark.parametrize("kind", horizon.KINDS)
@pytest.mark.parametrize("line", range(4))
def test_every_claim_can_fail(kind, line):
    seeds = seeds_that_agree()
    for row in seeds:
        if line == 0:
            row[kind]["1"]["rlhf"]["reward"] -= 0.02
        if line == 1:
            row[kind]["2"]["rlhf"]["reward"] -= 0.06
        if line == 2:
            row[kind]["5"]["dpo"]["reward"] += 0.3
        if line == 3:
            row[kind]["11"]["dpo"]["reward"] += 0.1
    verdict = horizon.verdict(seeds)
    place = line + 4 * list(horizon.KINDS).index(kind)
    assert verdict[place].startswith("NO: ") and sum(text.startswith("yes") for text in verdict) == 7
    if line == 2:
        assert "(not at 5)" in verdict[place] and "least sure lead, at 5: -0.050" in verdict[place]
    if line == 3:
        assert "less that at 8, the largest of the others, -0.050" in verdict[place]


@pytest.mark.parametrize("road", ["dpo", "rlhf"])
def test_a_distant_optimum_is_no_closed_gap(road):
    seeds = seeds_that_agree()
    for row in seeds:
        row["any"]["1"][road]["kl_to_optimum"] = 5.0
    verdict = horizon.verdict(seeds)
    assert verdict[0].startswith("NO: ") and "the further one 5.00" in verdict[0]
    assert sum(text.startswith("yes") for text in verdict) == 7


@pytest.mark.parametrize(
    ("line", "moves", "measure", "apart", "errors"),
    [
        (0, "1", "reward", 0.02, "+0.000 ± 0.010, 1.0 standard errors below 0.01"),
        (0, "1", "kl_to_optimum", 0.1, "the further one 0.25 ± 0.05, 1.0 standard errors below 0.3"),
        (1, "2", "reward", 0.06, "+0.100 ± 0.030, 1.7 standard errors above 0.05"),
        (2, "5", "reward", 0.4, "at 5: +0.250 ± 0.200, 1.2 standard errors"),
        (3, "11", "reward", 0.1, "less that at 8, the largest of the others, +0.050 ± 0.050, 1.0"),
    ],
)
def test_a_mean_on_the_right_side_of_its_bound_is_not_enough(line, moves, measure, apart, errors):
    seeds = seeds_that_agree()
    for row, change in zip(seeds, (-apart / 2, apart / 2), strict=True):
        row["any"][moves]["dpo"][measure] += change
    verdict = horizon.verdict(seeds)
    assert verdict[line].startswith("NO: ") and errors in verdict[line]
    assert sum(text.startswith("yes") for text in verdict) == 7


def test_the_further_road_is_the_one_that_may_be_further():
    """By its error, too: .25 ± 0 and .2 ± .05."""
    seeds = seeds_that_agree()
    for row, nats in zip(seeds, (0.15, 0.25), strict=True):
        row["any"]["1"]["rlhf"]["kl_to_optimum"] = nats
    assert to_optimum.further_road(seeds, "any", 1)["mean"] == pytest.approx(0.2)


def test_the_lead_is_taken_seed_by_seed():
    seeds = seeds_that_agree()
    for road in ("dpo", "rlhf"):
        seeds[1]["any"]["2"][road]["reward"] += 0.3  # the seeds differ, the lead does not
    cell = to_optimum.lead(seeds, "any", 2)
    assert cell["mean"] == pytest.approx(0.1) and cell["se"] == pytest.approx(0, abs=1e-12)
    text = to_optimum.table_of(seeds, horizon.WORLDS, "most moves")
    assert "| any token | 2 | 0.200 ± 0.000 | 0.650 ± 0.150 | 0.750 ± 0.150 | 0.100 ± 0.000 | 0.950 |" in text
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
    assert written["seeds"] == [3] and len(written["verdict"]) == 8
    assert "<svg" in (out / "horizon/figure.svg").read_text()
    assert (out / "horizon/table.md").read_text() in capsys.readouterr().out
    (row,) = written["by_seed"]
    for kind in horizon.KINDS:
        two = row[kind]["2"]
        assert 0 < two["dpo"]["reward"] < two["optimum"]["reward"] <= 1
        assert two["sft"]["kl_to_ref"] == 0 and two["dpo"]["kl_to_optimum"] > 1
    # The mask takes from the reference what is illegal, so that more of it arrives.
    assert row["any"]["2"]["sft"]["reward"] < row["legal"]["2"]["sft"]["reward"]
