"""experiments/beta.py: the exact policy, what is measured of it, and a verdict that can fail."""

import copy
import json
import math

import pytest
import torch

from experiments import beta
from experiments.beta import BETAS, REF_LOGP, REWARD, measures, verdict
from nanoroads.world.optimum import soft_optimum


def best_policy(weight):
    return soft_optimum(REF_LOGP, REWARD, weight)


def value(logp, weight):
    """E_pi[r] - weight KL(pi || pi_ref)."""
    return (logp.exp() * (REWARD - weight * (logp - REF_LOGP))).sum()


@pytest.mark.parametrize("weight", [0.03, 0.3, 3.0])
def test_no_other_policy_has_more_reward_less_kl(weight):
    """Its value is beta log E_ref[exp(r / beta)], and every step away from it loses."""
    best = value(best_policy(weight), weight)
    closed_form = weight * (REF_LOGP.exp() * (REWARD / weight).exp()).sum().log()
    assert best.item() == pytest.approx(closed_form.item(), abs=1e-12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = best_policy(weight) + 0.1 * torch.randn(9, generator=generator, dtype=torch.float64)
        assert value(torch.log_softmax(other, 0), weight) < best


def test_one_nat_of_log_ratio_costs_beta():
    ratio = best_policy(0.3) - REF_LOGP
    torch.testing.assert_close(0.3 * (ratio - ratio[0]), REWARD - REWARD[0])


def test_two_responses_by_hand():
    logp = soft_optimum(torch.tensor([0.75, 0.25]).log(), torch.tensor([0.0, 1.0]), 0.5)
    assert logp.exp()[1].item() == pytest.approx(0.25 * math.e**2 / (0.75 + 0.25 * math.e**2))


def test_the_measures_at_both_ends():
    """No penalty: all mass on the best response. All penalty: the reference."""
    far, near = measures(1e-4), measures(1e6)
    assert far["reward"] == pytest.approx(1) and far["entropy"] == pytest.approx(0, abs=1e-9)
    assert far["kl"] == pytest.approx(-REF_LOGP[-1].item())
    probability = REF_LOGP.exp()
    assert near["kl"] == pytest.approx(0, abs=1e-9)
    assert near["reward"] == pytest.approx((probability * REWARD).sum().item(), abs=1e-5)
    assert near["entropy"] == pytest.approx(-(probability * REF_LOGP).sum().item(), abs=1e-5)


def test_the_command_and_its_verdict(tmp_path, capsys):
    beta.main(["--out", str(tmp_path / "new")])
    written = json.loads((tmp_path / "new/results.json").read_text())
    rows = written["rows"]
    assert list(rows) == [str(weight) for weight in BETAS] and rows["0.3"] == measures(0.3)
    assert written["verdict"] == verdict(rows) and verdict(rows)[0].startswith("yes: ")
    table = (tmp_path / "new/table.md").read_text()
    assert table in capsys.readouterr().out and "| 0.1 | 1.891 | 0.847 | 1.478 |" in table
    assert "<svg" in (tmp_path / "new/figure.svg").read_text()
    for name, weight, other in (
        ("kl", "0.1", 5.0),
        ("reward", "0.1", 2.0),
        ("kl", "10.0", 0.011),
        ("kl", "0.1", rows["0.3"]["kl"]),
    ):  # the last: no smaller
        changed = copy.deepcopy(rows)
        changed[weight][name] = other
        assert verdict(changed)[0].startswith("NO: ")


def test_the_figure_draws_what_the_table_says():
    kl, reward, entropy, policies = beta.figure_of().axes
    for ax, name in ((kl, "kl"), (reward, "reward"), (entropy, "entropy")):
        xs, ys = ax.lines[0].get_data()
        middle = list(xs).index(pytest.approx(1.0))
        assert ys[middle] == pytest.approx(measures(1.0)[name])
    assert len(policies.lines) == 6  # the reference and five policies
    assert policies.lines[1].get_ydata()[-1] == pytest.approx(best_policy(0.03).exp()[-1].item())
