"""Over-optimisation: best of n by brute force, fits of known curves, verdicts, and the command."""

import itertools
import json
import math

import pytest
import torch

from experiments import overoptimisation
from experiments.overoptimisation import BEST_OF, BETAS, KLS
from nanoroads.experiments import gao, gold_and_proxy
from nanoroads.experiments import overoptimisation as over
from nanoroads.experiments.overoptimisation import ROADS, lead_at_equal_kl
from nanoroads.report import evidence
from nanoroads.world import roadmap
from nanoroads.world.roadmap import World, prompts
from tests.helpers.in_process import run_phases
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes

# ---------------------------------------------------------------- exact parts


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_choices(n):
    generator = torch.Generator().manual_seed(0)
    proxy = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    value = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    best = []
    for prompt in range(2):
        for choice in itertools.combinations(range(5), n):
            favourite = max(choice, key=lambda i: proxy[prompt, i])
            best.append(value[prompt, favourite].item())
    assert gao.best_of_n(proxy, value, n) == pytest.approx(sum(best) / len(best), abs=1e-12)


@pytest.mark.parametrize("form, falls", [("d", lambda d: d), ("ln d", math.log)])
def test_a_fit_finds_the_curve_it_is_of(form, falls):
    rows = []
    for kl in (0.25, 1.0, 4.0, 9.0):
        d = math.sqrt(kl)
        rows.append({"kl": kl, "gold": d * (0.5 - 0.2 * falls(d))})
    fit = gao.fit(rows, "gold", form)
    assert fit == pytest.approx({"a": 0.5, "b": 0.2, "r2": 1.0}, abs=1e-9)


def test_r2_of_what_does_not_fit():
    rows = [
        {"kl": 1.0, "gold": height} for height in (0.0, 2.0, 2.0, 0.0)
    ]  # of one d: no better than the mean
    assert gao.fit(rows, "gold", "ln d")["r2"] == pytest.approx(0, abs=1e-9)


def test_best_of_n_beside_rl_at_equal_kl():
    seed = {"rl": [{}, {"kl": 1.0, "gold": 0.3}]}
    seed["best of n"] = [{"kl": 0.5, "gold": 0.2}, {"kl": 1.5, "gold": 0.6}]
    assert lead_at_equal_kl(seed, place=1) == pytest.approx(0.1)


# ---------------------------------------------------------------- the verdict


def seeds_that_agree():
    """Two seeds for which every claim holds: gold rises, then falls; the proxy rises."""
    settings = {"best of n": BEST_OF, "rl": KLS, "dpo": BETAS}
    seeds = []
    for shift in (0.0, 0.001):
        seed = {"dpo_loss": [0.65 + shift] * len(BETAS), "along rl": []}
        for road, values in settings.items():
            seed[road] = []
            for place, setting in enumerate(values):
                gold = 0.1 + shift if place == len(values) - 1 else 0.3
                if road == "best of n":
                    gold *= 2
                row = {"setting": setting, "kl": 1.0 + place, "gold": gold, "proxy": place + shift}
                seed[road].append(row)
            good = {"a": 1.0, "b": 0.1, "r2": 0.95 + shift}
            seed[f"{road}, fits"] = {"gold": good, "proxy": dict(good)}
        seeds.append(seed)
    return seeds


def test_every_claim_can_hold():
    lines = overoptimisation.verdict(seeds_that_agree())
    assert outcomes(lines) == ["yes"] * 7
    assert "at 0.05 it is 0.651 ± 0.001, 85.3 standard errors below 0.693 (ln 2)" in lines[1]
    for line, road in enumerate(ROADS):
        assert f"fits {road} with R2 above 0.9: 0.950 ± 0.001 of gold, 101.0 standard" in lines[4 + line]
        assert "; 0.950 ± 0.001 of the proxy, 101.0 standard errors above 0.9." in lines[4 + line]


@pytest.mark.parametrize("line, road", list(enumerate(["rl", "dpo", "best of n"])))
def test_gold_may_not_fall_and_the_proxy_may_not_rise(line, road):
    """DPO does not climb this proxy: what it does there is said, and not claimed."""
    for measure, value in (("gold", 0.9), ("proxy", -1.0)):
        if (road, measure) == ("dpo", "proxy"):
            continue
        seeds = seeds_that_agree()
        for seed in seeds:
            seed[road][-1][measure] = value
        verdict = overoptimisation.verdict(seeds)
        assert not_held(verdict) == {line: NO}
        if measure == "gold":
            assert "gold changes by +0.300" in verdict[line] or "gold changes by +0.600" in verdict[line]


@pytest.mark.parametrize("line, road", list(enumerate(["rl", "dpo", "best of n"])))
def test_a_fall_within_two_standard_errors_is_none(line, road):
    seeds = seeds_that_agree()
    top = seeds[0][road][0]["gold"]
    for seed, gold in zip(seeds, (top - 0.3, top + 0.2), strict=True):
        seed[road][-1]["gold"] = gold
    assert not_held(overoptimisation.verdict(seeds)) == {line: UNDECIDED}


def test_what_the_held_out_loss_does_is_counted_from_where_gold_peaks():
    seeds = seeds_that_agree()
    for seed, losses in zip(seeds, ([0.66, 0.64, 0.63, 0.65], [0.66, 0.64, 0.66, 0.66]), strict=True):
        seed["dpo_loss"] = losses
        seed["dpo"][1]["gold"] = 0.4
    text = overoptimisation.verdict(seeds)[1]
    assert (
        "from there on it changes by +0.005 ± 0.015, 0.3 standard errors, to 0.1 and by +0.015 ± 0.005"
        in text
    )
    assert "3.0 standard errors, to 0.05; at 0.05 it is 0.655 ± 0.005, 7.6 standard errors below" in text


def test_a_seed_is_measured_from_the_peak_of_the_others():
    """Gold is noise: each seed's own highest point lies elsewhere, and what follows is no fall."""
    seeds = seeds_that_agree() + seeds_that_agree()[:1]
    for seed, heights in zip(
        seeds, ([0.3, 0.0, 0.1, 0.1], [0.0, 0.2, 0.1, 0.1], [0.1, 0.2, 0.0, 0.1]), strict=True
    ):
        for row, gold in zip(seed["dpo"], heights, strict=True):
            row["gold"] = gold
    assert over.peaks_of(seeds, "dpo") == [1, 0, 0]
    gold, _ = over.changes_from_peak(seeds, "dpo")
    assert gold["mean"] == pytest.approx((0.1 - 0.0 + 0.1 - 0.0 + 0.1 - 0.1) / 3)
    line = overoptimisation.verdict(seeds)[1]
    assert "from beta 0.3, 1, 1, the peak of gold before the end in the other seeds, to 0.05 gold" in line
    (alone,) = [over.falls_line(seeds[:1], "dpo", "DPO", "beta")]
    assert "from beta 1, the peak of gold before the end in the same seed, to 0.05 gold" in alone


def test_where_best_of_n_does_not_go_so_far_nothing_is_claimed():
    seeds = seeds_that_agree()
    seeds[0]["rl"][1]["kl"] = 99.0
    assert not_held(overoptimisation.verdict(seeds)) == {3: UNDECIDED}


def test_that_the_proxy_does_not_fall_does_not_show_that_it_rises():
    seeds = seeds_that_agree()
    for seed, change in zip(seeds, (-0.5, 1.5), strict=True):
        peak = max(range(len(KLS)), key=lambda i, road=seed["rl"]: road[i]["gold"])
        seed["rl"][-1]["proxy"] = seed["rl"][peak]["proxy"] + change
    assert not_held(overoptimisation.verdict(seeds)) == {0: UNDECIDED}


@pytest.mark.parametrize("line, road", list(enumerate(ROADS)))
def test_fits_may_be_bad(line, road):
    for measure in ("gold", "proxy"):
        seeds = seeds_that_agree()
        for seed in seeds:
            seed[f"{road}, fits"][measure]["r2"] = 0.8
        assert not_held(overoptimisation.verdict(seeds)) == {4 + line: NO}


@pytest.mark.parametrize("line, road", list(enumerate(ROADS)))
def test_a_mean_r2_above_its_bound_by_less_than_two_errors_is_not_enough(line, road):
    for measure in ("gold", "proxy"):
        seeds = seeds_that_agree()
        for seed, r2 in zip(seeds, (0.9, 1.0), strict=True):
            seed[f"{road}, fits"][measure]["r2"] = r2
        verdict = overoptimisation.verdict(seeds)
        assert not_held(verdict) == {4 + line: UNDECIDED} and "0.950 ± 0.050" in verdict[4 + line]


def test_rl_may_have_more_gold_at_equal_kl():
    seeds = seeds_that_agree()
    for seed in seeds:
        seed["rl"][1]["gold"] = 0.8
    assert not_held(overoptimisation.verdict(seeds)) == {3: NO}


# ---------------------------------------------------------------- the command


class Counting(World):
    """Its reward is the number of letters: a tiny SFT's true reward may be zero."""

    def reward(self, prompt, response):
        return float(len(response))


def few_prompts(world, split):
    return prompts(world, split)[:12]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roadmap, "prompts", few_prompts)
    model = ["--n-layer", 1, "--n-embd", 16, "--rows", 200, "--steps", 30, "--lr", 2e-2]
    small = {"PAIRS": 40, "TEST_PAIRS": 30, "SFT": model, "DPO": ["--steps", 2], "RLHF": ["--steps", 2]}
    for name, value in small.items():
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr(gold_and_proxy, "WORLD", Counting(**vars(gold_and_proxy.WORLD)))
    monkeypatch.setattr(gold_and_proxy, "prompts", few_prompts)
    small = {"run_phases": run_phases, "BEST_OF": [1, 2, 4, 8], "BETAS": [0.3, 0.1], "KLS": [0.5, 0.1]}
    for name, value in small.items():
        monkeypatch.setattr(overoptimisation, name, value)
    overoptimisation.main(["--seeds", "0", "--out", str(tmp_path / "out")])
    folder = tmp_path / "out/overoptimisation"
    assert (folder / "table.md").read_text() in capsys.readouterr().out
    (row,) = json.loads((folder / "results.json").read_text())["by_seed"]
    one, two, four, eight = row["best of n"]
    assert one["gold"] == pytest.approx(0, abs=1e-9) and one["proxy"] == pytest.approx(0, abs=1e-6)
    assert 0 < two["proxy"] < four["proxy"] < eight["proxy"] and eight["kl"] == math.log(8) - 7 / 8
    assert abs(row["rl"][0]["proxy"]) < eight["proxy"]  # two steps do not lead far
    assert [point["setting"] for point in row["along rl"]] == [2] and len(row["dpo_loss"]) == 2
