"""Likelihood displacement: the identity by enumeration, hand-made rows, verdicts that can come out
either way, and the command."""

import copy
import json
import math

import pytest
import torch

from experiments import displacement
from nanoroads.experiments import displacement_claims, displacement_measures
from nanoroads.report import evidence
from nanoroads.report.on_map import ENCODING
from nanoroads.weights.checkpoint import load_policy
from nanoroads.world import roadmap
from nanoroads.world.roadmap import prompts
from nanoroads.world.task import measure_on_map
from tests.helpers.in_process import run_phases
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes

# ---------------------------------------------------------------- the identity


def every_pair():
    """(log pi, log pi_ref) of all 64 pairs of draws from (1/2, 1/4, 1/8, 1/8), (64, 2) each, the better by
    a made-up reward, and KL(pi_ref || pi)."""
    ref = torch.tensor([4, 2, 1, 1], dtype=torch.float64) / 8
    policy = torch.tensor([0.2, 0.1, 0.1, 0.6], dtype=torch.float64)
    reward = torch.tensor([1.0, 3.0, 3.0, 0.0])
    draws = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3])
    pairs = torch.cartesian_prod(draws, draws)  # (64, 2): whoever is chosen, the identity holds
    better = torch.full((64,), -1)
    better[reward[pairs[:, 0]] > reward[pairs[:, 1]]] = 0
    better[reward[pairs[:, 0]] < reward[pairs[:, 1]]] = 1
    kl = (ref * (ref / policy).log()).sum().item()
    return policy.log()[pairs], ref.log()[pairs], better, kl


def test_chosen_changes_by_half_the_margin_less_the_kl():
    logp, ref_logp, better, kl = every_pair()
    swap = better == 1  # so that the better one is chosen
    logp[swap], ref_logp[swap] = logp[swap].flip(1), ref_logp[swap].flip(1)
    row = displacement.pair_row(logp, ref_logp)
    change = logp - ref_logp
    margin = (change[:, 0] - change[:, 1]).mean().item()
    assert abs(margin) > 0.01
    assert row["both"]["mean"] == pytest.approx(-kl, abs=1e-12)
    assert row["chosen"] == pytest.approx(margin / 2 - kl, abs=1e-12)
    assert row["rejected"] == pytest.approx(-margin / 2 - kl, abs=1e-12)


def test_the_better_and_the_ties():
    logp = torch.tensor([[-1.0, -4.0], [-2.0, -3.0], [-5.0, -6.0]])
    ref_logp = torch.tensor([[-2.0, -4.5], [-3.0, -1.0], [-1.0, -1.0]])
    row = displacement_measures.which_rise(logp, ref_logp, torch.tensor([0, 1, -1]))
    assert row["better"] == pytest.approx((1 - 2) / 2) and row["ties"] == -4
    assert row["rise"] == pytest.approx(2 / 3)
    before = torch.tensor([-2.0, -3.0, -1.0]).exp().sum()
    assert row["chosen_mass"] == pytest.approx((logp[:, 0].exp().sum() / before).item())


def test_which_is_better():
    assert displacement_measures.better_of(torch.tensor([0.5, -0.2, 0.0])).tolist() == [0, 1, -1]


def test_dpo_at_the_kl_of_another_policy():
    rows = {"SFT": {"kl": 0, "illegal": 0.1}, "RLHF 1": {"kl": 1.5}, "RLHF 0.2": {"kl": 99}}
    for name, kl, illegal in (
        ("DPO 1", 1, 0.2),
        ("DPO 0.3", 2, 0.4),
        ("DPO 0.1", 4, 0.5),
        ("DPO 0.05", 30, 0.9),
    ):
        rows[name] = {"kl": kl, "illegal": illegal}
    at_equal_kl, dpo = displacement_claims.at_equal_kl, displacement.DPO_RUNS
    assert at_equal_kl(rows, dpo, "RLHF 1", "illegal") == pytest.approx(0.3)
    assert math.isnan(at_equal_kl(rows, dpo, "RLHF 0.2", "illegal"))  # DPO goes nowhere so far


# ---------------------------------------------------------------- the verdict


def seeds_that_agree():
    """Two seeds for which every claim holds."""
    seeds = []
    for shift in (0, 0.001):
        seed = {"SFT": {"kl": 0.0, "illegal": 0.1, "unseen": 0.0}}
        for place, name in enumerate(displacement.RUNS):
            share = 0.5 if name in displacement.DPO_RUNS else 0.2
            kl = 1.0 + place % 4
            seed[name] = {"kl": kl, "illegal": share + shift, "unseen": share - shift, "chosen": -1 + shift}
            seed[name] |= {"both": {"mean": -2 + shift, "se": 0.1}, "kl_from_ref": {"mean": 2.0, "se": 0.1}}
            seed[name] |= {"better": -0.5 + shift, "ties": -2 - shift, "chosen_mass": 1.5}
        seeds.append(seed)
    return seeds


def test_every_claim_can_hold():
    lines = displacement.verdict(seeds_that_agree())
    assert outcomes(lines) == ["yes"] * 5


@pytest.mark.parametrize(
    "line, name, measure, value",
    [
        (0, "DPO 1", "both", {"mean": -2.6, "se": 0.1}),
        (1, "RLHF 0.5", "chosen", 0.1),
        (1, "DPO 0.3", "chosen", 0.1),
        (2, "DPO 0.3", "better", 0.1),
        (3, "RLHF 0.5", "illegal", 0.6),
        (4, "RLHF 0.5", "unseen", 0.6),
    ],
)
def test_every_claim_can_fail(line, name, measure, value):
    seeds = seeds_that_agree()
    for seed in seeds:
        seed[name][measure] = copy.copy(value)
    assert not_held(displacement.verdict(seeds)) == {line: NO}


def test_that_no_miss_is_shown_does_not_show_the_identity():
    """RLHF 1 misses by nothing, with an error that is as large as the bound."""
    seeds = seeds_that_agree()
    for seed in seeds:
        seed["RLHF 1"]["kl_from_ref"] = {"mean": 2.0, "se": 0.4}
    verdict = displacement.verdict(seeds)
    assert not_held(verdict) == {0: UNDECIDED}
    assert (
        "the least sure is RLHF 1, which misses by +0.000 ± 0.292, 1.0 standard errors below 0.3"
        in verdict[0]
    )


def test_the_identity_names_the_policy_that_decides():
    """DPO 1 misses by more, two errors included, but of RLHF 1 it is shown."""
    seeds = seeds_that_agree()
    for seed in seeds:
        seed["DPO 1"]["both"] = {"mean": -2.2, "se": 0.1}  # misses by .2 with an error of .1
        seed["RLHF 1"]["both"] = {"mean": -2.35, "se": 0.0}
        seed["RLHF 1"]["kl_from_ref"] = {"mean": 2.0, "se": 0.01}
    verdict = displacement.verdict(seeds)
    assert not_held(verdict) == {0: NO} and "the least sure is RLHF 1, which misses by -0.350" in verdict[0]


def test_where_dpo_does_not_go_so_far_nothing_is_claimed():
    seeds = seeds_that_agree()
    seeds[0]["RLHF 0.5"]["kl"] = 99.0
    verdict = displacement.verdict(seeds)
    assert not_held(verdict) == {3: UNDECIDED, 4: UNDECIDED}
    assert "at the KL of RLHF 0.5 +nan, not finite" in verdict[3]


@pytest.mark.parametrize(
    ("line", "name", "measure"),
    [
        (1, "RLHF 0.5", "chosen"),
        (2, "DPO 0.3", "better"),
        (3, "RLHF 0.5", "illegal"),
        (4, "RLHF 0.5", "unseen"),
    ],
)
def test_within_two_standard_errors_is_undecided(line, name, measure):
    seeds = seeds_that_agree()
    seeds[0][name][measure] += 0.9
    assert not_held(displacement.verdict(seeds)) == {line: UNDECIDED}


def test_the_error_of_the_identity_is_that_of_the_samples():
    gap = displacement_claims.identity_gap(seeds_that_agree(), "DPO 1")
    assert gap["mean"] == pytest.approx(0.0005) and gap["se"] == pytest.approx((4 * 0.01) ** 0.5 / 2)


# ---------------------------------------------------------------- the command


def few_prompts(world, split):
    return prompts(world or displacement.WORLD, split)[:12]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roadmap, "prompts", few_prompts)
    monkeypatch.setattr(displacement, "prompts", few_prompts)
    monkeypatch.setattr(displacement_measures, "prompts", few_prompts)
    monkeypatch.setattr(displacement, "run_phases", run_phases)
    model = ["--n-layer", 1, "--n-embd", 16, "--rows", 200, "--steps", 30, "--lr", 2e-2]
    steps = ["--steps", 2, "--lr", 3e-2]  # large enough for a KL that is positive beyond doubt
    small = {"PAIRS": 40, "TEST_PAIRS": 30, "SFT": model, "DPO": steps, "RLHF": steps}
    for name, value in small.items():
        monkeypatch.setattr(evidence, name, value)
    displacement.main(["--seeds", "0", "--out", str(tmp_path / "out")])
    folder = tmp_path / "out/displacement"
    assert (folder / "table.md").read_text() in capsys.readouterr().out
    (row,) = json.loads((folder / "results.json").read_text())["by_seed"]
    assert row["SFT"]["kl"] == pytest.approx(0, abs=1e-5)
    both = (row["RLHF 0.2"]["chosen"] + row["RLHF 0.2"]["rejected"]) / 2
    assert row["RLHF 0.2"]["both"]["mean"] == pytest.approx(both)
    for name, points in row["along"].items():  # the run's own measures and ours are of the same pairs
        assert points[-1]["chosen"] == pytest.approx(row[name]["chosen"], abs=1e-4)
        assert points[-1]["rejected"] == pytest.approx(row[name]["rejected"], abs=1e-4)

    assert row["DPO 0.05"]["kl"] > 0 and row["DPO 0.05"]["kl_from_ref"]["mean"] > 0

    sft, dpo = load_policy(tmp_path / "out/seed0/sft"), load_policy(tmp_path / "out/seed0/dpo")
    ours = displacement_measures.sample_row(dpo, sft, 1)
    values = measure_on_map(
        dpo, sft, displacement.WORLD, ENCODING, few_prompts(None, "test"), samples=8, seed=1
    )
    means = {name: sum(value) / len(value) for name, value in values.items()}
    assert ours["kl"] == pytest.approx(means["kl"], abs=1e-4) and ours["reward"] == means["reward"]
    assert ours["arrives"] == means["arrives"] and ours["illegal"] == pytest.approx(1 - means["legal"])
    for bound, share in ((0, 0), (1.1, 1)):
        monkeypatch.setattr(displacement_measures, "UNSEEN", bound)
        assert displacement_measures.sample_row(sft, sft, 1)["unseen"] == share
