"""Three responses, exactly: closed forms, theorems, and verdicts that can come out either way."""

import copy
import json

import pytest
import torch

from experiments import misspecified
from nanoroads import losses
from nanoroads.experiments import three_responses
from nanoroads.experiments.three_responses import OWN_PARAMETERS, REF_LOGP, fp64


@pytest.fixture(scope="module")
def results():
    return {
        "pairs": misspecified.compare_pairs(),
        "classes": misspecified.compare_classes(),
        "unseen": misspecified.compare_unseen(),
    }


def close(actual, expected, atol=1e-8):
    torch.testing.assert_close(torch.as_tensor(actual), torch.as_tensor(expected), rtol=0, atol=atol)


def theta_of(logp, phi, ref_logp=REF_LOGP):
    """The parameter of a policy ref exp(theta phi), from its first and its last response."""
    log_ratio = logp - ref_logp
    return ((log_ratio[0] - log_ratio[2]) / (phi[0] - phi[2])).item()


# ---------------------------------------------------------------- which pairs are compared

REWARD, PHI = fp64(1, 0.5, -1), fp64(0.5, 1, -1)


def dpo_at(share):
    weights = fp64(share, (1 - share) / 2, (1 - share) / 2)
    return three_responses.dpo(REWARD, weights, PHI[:, None], 0.5)


def test_dpo_leaves_the_reference_on_the_wrong_side_from_a_share_that_is_known():
    """DPO's loss is convex in theta, so the sign of its slope at zero decides on which side it ends."""
    half = fp64(0.5, 2, 1.5).sigmoid() - 0.5  # of the pairs 12, 13, 23
    against, towards = 0.5 * half[0], 0.5 * (1.5 * half[1] + 2 * half[2])
    share = (towards / (against + towards)).item()
    assert share == pytest.approx(0.9078, abs=1e-4)
    reference = three_responses.value(REF_LOGP, REWARD)
    assert three_responses.value(dpo_at(share - 1e-3), REWARD) > reference
    assert three_responses.value(dpo_at(share + 1e-3), REWARD) < reference


def test_with_one_pair_dpo_fits_its_margin():
    logp = dpo_at(1.0)
    close(losses.margin(logp[0], logp[1], REF_LOGP[0], REF_LOGP[1], 0.5), fp64(0.5).squeeze())
    assert theta_of(logp, PHI) == pytest.approx(-2)


def test_numbers_of_the_pairs(results):
    rows = results["pairs"]
    assert rows["0.333"]["dpo"] == pytest.approx(0.6112, abs=1e-4)
    assert rows["0.980"]["dpo"] == pytest.approx(-0.6667, abs=1e-4)
    assert rows["1.000"]["dpo"] == pytest.approx(-0.8811, abs=1e-4)
    assert {round(row["rlhf"], 4) for share, row in rows.items() if share != "1.000"} == {0.5683}
    assert rows["1.000"]["rlhf"] < rows["1.000"]["reference"]  # no pair shows it y3


@pytest.mark.parametrize("ref", [fp64(0.6, 0.3, 0.1), fp64(0.2, 0.5, 0.3)])
def test_for_small_rewards_pairs_of_the_references_samples_make_dpo_the_natural_gradient(ref, monkeypatch):
    """theta / c at a reward c r: RLHF has Cov(phi, r) / (beta Var(phi)), DPO too on pairs ~ ref x ref."""
    monkeypatch.setattr(three_responses, "REF_LOGP", ref.log())
    c, beta = 1e-3, 0.5
    features = PHI[:, None]
    sampled = ref[three_responses.FIRST] * ref[three_responses.SECOND]
    covariance = (ref * PHI * REWARD).sum() - (ref * PHI).sum() * (ref * REWARD).sum()
    variance = (ref * PHI**2).sum() - (ref * PHI).sum() ** 2
    limit = (covariance / (beta * variance)).item()
    rlhf = three_responses.best_policy(c * REWARD, features, beta)
    on_samples = three_responses.dpo(c * REWARD, sampled / sampled.sum(), features, beta)
    on_all_pairs = three_responses.dpo(c * REWARD, fp64(1, 1, 1) / 3, features, beta)
    assert theta_of(rlhf, PHI, ref.log()) / c == pytest.approx(limit, rel=5e-3)
    assert theta_of(on_samples, PHI, ref.log()) / c == pytest.approx(limit, rel=1e-4)
    assert abs(theta_of(on_all_pairs, PHI, ref.log()) / c - limit) > 0.05 * limit


# ---------------------------------------------------------------- which class is too small


def test_each_road_wins_one_row(results):
    rows = results["classes"]
    best = 0.2 * (fp64(0, 0, -5).exp().mean().log()).item()  # beta log E_ref[exp(r / beta)]
    assert best == pytest.approx(-0.0804, abs=1e-4)
    for road in ("dpo", "rlhf", "online"):
        assert rows["neither"][road] == pytest.approx(best, abs=1e-9)
    assert rows["policy"]["rlhf"] == pytest.approx(-0.2183, abs=1e-4)
    assert rows["policy"]["dpo"] == pytest.approx(-1 / 3) and rows["both"]["dpo"] == pytest.approx(-1 / 3)
    assert rows["reward"]["dpo"] == pytest.approx(best, abs=1e-9)
    assert rows["reward"]["rlhf"] == pytest.approx(-1 / 3) and rows["both"]["rlhf"] == pytest.approx(-1 / 3)
    assert rows["both"]["online"] == pytest.approx(rows["policy"]["rlhf"], abs=1e-6)


def test_under_a_strong_regulariser_no_road_of_the_small_class_leaves_the_reference():
    small = fp64(1, -1, 0)[:, None]
    for logp in (
        three_responses.best_policy(fp64(0, 0, -1), small, 0.5),
        three_responses.online_dpo(fp64(0, 0, -1), small, 0.5, rounds=200),
    ):
        close(logp, REF_LOGP, atol=1e-3)


# ---------------------------------------------------------------- what no pair shows


def test_the_loss_of_a_pair_is_blind_to_the_mass_elsewhere():
    for mass in (0.9, 0.1, 1e-6):
        logp = fp64(mass, 1e-40, 1 - mass).log()
        assert losses.dpo(logp[0], logp[1], REF_LOGP[0], REF_LOGP[1], 1.0) < 1e-30


def test_shared_features_send_the_mass_to_the_unseen_response(results):
    rows = results["unseen"]
    assert rows["policy"]["dpo"] == pytest.approx(-0.999, abs=1e-3)
    assert rows["nobody"]["dpo"] == pytest.approx(0.902, abs=1e-3)
    mass = rows["policy"]["dpo_mass_on_y3"]
    assert mass[-1] == pytest.approx(0.9995, abs=1e-4) and mass == sorted(mass)
    for case in ("nobody", "both"):  # Theorem 2.2: one class for both roads
        assert rows[case]["rlhf"] == pytest.approx(rows[case]["dpo"], abs=1e-6)


def test_the_descent_is_dpos(results):
    """Its last policy has the mass that gradient steps on DPO's own loss lead to."""
    shared = torch.stack([fp64(1, 0.2), fp64(1, 0), fp64(0, 1)])
    theta = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):
        theta.requires_grad_()
        logp = three_responses.log_policy(theta, shared)
        loss = losses.dpo(logp[0], logp[1], REF_LOGP[0], REF_LOGP[1], 1.0)
        theta = theta.detach() - 0.2 * torch.autograd.grad(loss, theta)[0]
    expected = three_responses.log_policy(theta, shared)[2].exp().item()
    assert results["unseen"]["policy"]["dpo_mass_on_y3"][9] == pytest.approx(expected, abs=1e-6)


# ---------------------------------------------------------------- the script


def test_every_claim_holds(results):
    assert [line[:4] for line in misspecified.verdict(results)] == ["yes:"] * 3


@pytest.mark.parametrize(
    "example, case, road, other, line",
    [
        ("pairs", "0.800", "rlhf", 0.4, 0),  # RLHF moves, too
        ("classes", "policy", "rlhf", -0.4, 1),
        ("classes", "reward", "rlhf", 0.1, 1),
        ("classes", "neither", "dpo", -0.1, 1),
        ("classes", "both", "dpo", -0.4, 1),
        ("classes", "both", "online", -0.4, 1),
        ("unseen", "policy", "dpo_mass_on_y3", [0.3], 2),
        ("unseen", "nobody", "dpo_mass_on_y3", [0.4], 2),
    ],
)
def test_a_claim_can_fail(example, case, road, other, line, results):
    changed = copy.deepcopy(results)
    changed[example][case][road] = other
    verdict = misspecified.verdict(changed)
    assert verdict[line].startswith("NO: ") and sum(text.startswith("yes") for text in verdict) == 2


def test_dpo_that_stays_above_the_reference_refutes_the_first(results):
    changed = copy.deepcopy(results)
    for row in changed["pairs"].values():
        row["dpo"] = 0.5
    assert (
        misspecified.verdict(changed)[0].startswith("NO: ")
        and "at no share" in misspecified.verdict(changed)[0]
    )


def test_one_share_above_the_reference_refutes_from_there_on(results):
    changed = copy.deepcopy(results)
    changed["pairs"]["0.980"]["dpo"] = 0.5
    line = misspecified.verdict(changed)[0]
    assert line.startswith("NO: ") and "below the reference at 0.910, 0.940, 0.990, 1.000." in line


def test_the_command_writes_a_table_a_figure_and_numbers(tmp_path, results, capsys):
    misspecified.main(["--out", str(tmp_path / "new" / "out")])
    out = tmp_path / "new" / "out"
    written = json.loads((out / "results.json").read_text())
    assert written["classes"] == results["classes"] and written["verdict"] == misspecified.verdict(results)
    assert "<svg" in (out / "figure.svg").read_text()
    assert (out / "table.md").read_text() in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"table.md", "figure.svg", "results.json"}


def test_a_bad_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        misspecified.main(["--seed", "1"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_all_policies_are_in_the_large_class():
    logp = torch.log_softmax(fp64(0.3, -2, 1), 0)
    close(three_responses.log_policy(logp - REF_LOGP, OWN_PARAMETERS), logp)
