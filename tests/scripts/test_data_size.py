"""experiments/data_size.py: verdicts that can come out either way, and the script at a tiny size."""

import copy
import json
from pathlib import Path

import pytest

from experiments import data_size
from nanoroads.experiments import small_worlds
from nanoroads.report import evidence, to_optimum
from nanoroads.run.optim import total_steps
from nanoroads.world import distance, roadmap
from nanoroads.world.roadmap import prompts
from tests.helpers.in_process import run_phases
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes

DPO = {1000: 0.5, 5000: 0.6, 20_000: 0.8, 80_000: 0.94}


def seeds_that_agree():
    """Two seeds for which every claim holds."""
    rows = {}
    for kind in data_size.KINDS:
        rows[kind] = {}
        for n, reward in DPO.items():
            rows[kind][str(n)] = {
                "sft": {"reward": 0.3},
                "optimum": {"reward": 0.97},
                "dpo": {"reward": reward, "kl_to_optimum": 0.5},
                "rlhf": {"reward": 0.95, "kl_to_optimum": 0.2},
            }
    return [rows, copy.deepcopy(rows)]


def test_every_claim_can_hold():
    lines = data_size.verdict(seeds_that_agree())
    assert outcomes(lines) == ["yes"] * 6
    assert "on 1,000 it is ahead of DPO on 80,000, by +0.010" in lines[0] and "pairs, by +0.440" in lines[1]
    assert "less than 0.02: by +0.010, 0.010 below 0.02" in lines[2]


@pytest.mark.parametrize("kind", data_size.KINDS)
@pytest.mark.parametrize(
    ("pairs", "road", "reward", "line"),
    [
        ("1000", "rlhf", 0.93, 0),  # ahead of DPO on as many, but not of DPO on 80,000
        ("1000", "dpo", 0.945, 1),  # the lead on few pairs is smaller than the one on many
        ("80000", "rlhf", 0.97, 2),
    ],
)
def test_every_claim_can_fail(kind, pairs, road, reward, line):
    seeds = seeds_that_agree()
    for row in seeds:
        row[kind][pairs][road]["reward"] = reward
    place = line + 3 * list(data_size.KINDS).index(kind)
    assert not_held(data_size.verdict(seeds)) == {place: NO}


@pytest.mark.parametrize("kind", data_size.KINDS)
@pytest.mark.parametrize(
    ("pairs", "road", "apart", "line", "errors"),
    [
        ("1000", "rlhf", 0.02, 0, "+0.010 ± 0.020, 0.5 standard errors"),
        ("1000", "dpo", 0.3, 1, "+0.440 ± 0.300, 1.5 standard errors"),
        ("80000", "rlhf", 0.01, 2, "+0.010 ± 0.010, 1.0 standard errors below"),
    ],
)
def test_a_mean_on_the_right_side_is_not_enough(kind, pairs, road, apart, line, errors):
    seeds = seeds_that_agree()
    for row, change in zip(seeds, (-apart, apart), strict=True):
        row[kind][pairs][road]["reward"] += change
    verdict = data_size.verdict(seeds)
    place = line + 3 * list(data_size.KINDS).index(kind)
    assert not_held(verdict) == {place: UNDECIDED} and errors in verdict[place]


def test_the_smaller_sets_are_the_first_pairs(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("a\nb\nc\n")
    small_worlds.write_subsets(tmp_path / "pairs.jsonl", tmp_path, [2, 3])
    assert (tmp_path / "pairs_2.jsonl").read_text() == "a\nb\n"
    assert (tmp_path / "pairs_3.jsonl").read_text() == "a\nb\nc\n"


def test_the_reference_goes_on_from_the_main_world_s_and_writes_the_pairs():
    _, reference, draw = data_size.pair_phases(Path("o"), 3)
    assert reference.command[reference.command.index("--init") + 1] == "o/seed3/sft"
    words = ["--policy", "o/data_size/seed3/sft", "--seed", "3", "--n", "80000"]
    words += ["--test-out", "o/data_size/seed3/pairs_test.jsonl", "--out", "o/data_size/seed3/pairs.jsonl"]
    assert draw.command[2:] == words


def test_steps_are_equal():
    """Whatever the number of pairs, as the scripts count: epochs x batches of 32."""
    for n, phases in zip(data_size.SIZES, batched(data_size.road_phases(Path("o"), 0)), strict=True):
        legal, dpo, rlhf = [phase.command for phase in phases]
        epochs = dpo[dpo.index("--epochs") + 1]
        assert epochs == rlhf[rlhf.index("--reward-epochs") + 1]
        steps = total_steps(n, 32, float(epochs))
        assert data_size.STEPS <= steps <= 1.024 * data_size.STEPS  # an epoch's last batch may be small
        assert legal[legal.index("--steps") + 1] == str(data_size.STEPS)


def test_every_pair_of_the_largest_set_is_seen():
    assert 32 * data_size.STEPS == max(data_size.SIZES)


def batched(phases):
    return [phases[i : i + 3] for i in range(0, len(phases), 3)]


TINY = ["--rows", "500", "--steps", "30", "--lr", "2e-2"]


def few_prompts(world, split):
    return prompts(world, split)[:40]


def test_the_command(tmp_path, monkeypatch, capsys):
    for module in (roadmap, distance, to_optimum):
        monkeypatch.setattr(module, "prompts", few_prompts)
    monkeypatch.setattr(evidence, "SFT", [*TINY, "--n-layer", "1", "--n-embd", "16"])
    monkeypatch.setattr(small_worlds, "SFT", TINY)
    small = {"SIZES": [40, 64], "STEPS": 2, "RL_STEPS": 2, "run_phases": run_phases}
    for name, value in small.items():
        monkeypatch.setattr(data_size, name, value)
    out = tmp_path / "out"
    data_size.main(["--seeds", "3", "--out", str(out)])
    written = json.loads((out / "data_size/results.json").read_text())
    assert written["seeds"] == [3] and len(written["verdict"]) == 6
    assert "<svg" in (out / "data_size/figure.svg").read_text()
    assert (out / "data_size/table.md").read_text() in capsys.readouterr().out
    (row,) = written["by_seed"]
    assert row["any"]["40"]["dpo"] != row["any"]["64"]["dpo"]
    assert row["any"]["40"]["sft"] == row["any"]["64"]["sft"]
    assert row["legal"]["40"]["rlhf"]["reward"] < row["legal"]["40"]["optimum"]["reward"] <= 1
