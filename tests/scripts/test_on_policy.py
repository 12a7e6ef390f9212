"""The loop over rounds: one round is train_dpo.py's run, more have the same budget. True order by hand,
verdicts that can come out either way, and the script end to end."""

import dataclasses
import json
import math

import pytest
import torch

from experiments import on_policy
from experiments.on_policy import BETAS, ROUNDS
from nanoroads.experiments import dpo_in_rounds, on_policy_claims, own_pairs
from nanoroads.experiments.pair_sources import OFFLINE, ON_POLICY, RLHF_SAMPLES, SFT_SAMPLES, by_rounds, named
from nanoroads.report import evidence, judged
from nanoroads.weights.checkpoint import load_policy
from nanoroads.world import pairs, roadmap
from tests.helpers.in_process import run_phases
from tests.helpers.runs import read_jsonl
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes


@pytest.fixture
def folder(sft, dpo, tmp_path, monkeypatch):
    """A seed's folder with tiny runs: 200 pairs, 30 steps."""
    (tmp_path / "sft").symlink_to(sft)
    (tmp_path / "dpo").symlink_to(dpo)
    monkeypatch.setattr(dpo_in_rounds, "PAIRS", 200)
    monkeypatch.setattr(pairs, "CHUNK", 64)
    return tmp_path


def test_one_round_is_dpo(folder):
    policy, used = dpo_in_rounds.train_on_policy(folder, 0, 1, "dpo")
    assert used == read_jsonl(folder / "sft/pairs.jsonl")
    dpo = load_policy(folder / "dpo").state_dict()
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, dpo[name]), name


def test_more_rounds_have_the_same_budget(folder, monkeypatch):
    """One optimizer, one schedule, as many pairs and steps; all pairs but the first are the policy's own."""
    steps, within, drawn, optimizers = [], [], [], []
    real_indices = dpo_in_rounds.batch_indices
    real_rate, real_draw = dpo_in_rounds.learning_rate, dpo_in_rounds.draw_labelled
    real_adamw = dpo_in_rounds.adamw
    reference = load_policy(folder / "sft").state_dict()

    def rate(peak, step, total, *rest):
        steps.append(step)
        assert total == 30
        return real_rate(peak, step, total, *rest)

    def draw(policy, n, *rest):
        moved = (policy.state_dict()["lm_head.weight"] - reference["lm_head.weight"]).abs().max().item()
        drawn.append((n, len(steps), moved, rest))
        return real_draw(policy, n, *rest)

    def indices(n, size, step, seed):
        within.append(step)
        return real_indices(n, size, step, seed)

    def adamw(*args):
        optimizers.append(real_adamw(*args))
        return optimizers[-1]

    replaced = {"learning_rate": rate, "draw_labelled": draw, "adamw": adamw, "batch_indices": indices}
    for name, function in replaced.items():
        monkeypatch.setattr(dpo_in_rounds, name, function)
    _, used = dpo_in_rounds.train_on_policy(folder, 7, 3, "dpo")
    assert steps == list(range(30)) and within == 3 * list(range(10)) and len(optimizers) == 1
    assert len(used) == 200 and used[:66] == read_jsonl(folder / "sft/pairs.jsonl")[:66]
    assert [(n, done) for n, done, _, _ in drawn] == [(67, 10), (67, 20)]
    assert 0 < drawn[0][2] < drawn[1][2]
    assert drawn[0][3] != drawn[1][3]  # other random numbers
    assert drawn[0][3][0] == drawn[1][3][0] == "train"


def test_labels_are_those_of_the_true_reward(folder, monkeypatch):
    policy = load_policy(folder / "sft")
    certain = dataclasses.replace(own_pairs.WORLD, bt_scale=500.0)
    monkeypatch.setattr(own_pairs, "WORLD", certain)
    rows = own_pairs.draw_labelled(policy, 100, "test", "labels")
    gaps = judged.true_margins(rows)
    assert gaps.min() >= 0 and gaps.max() > 0
    assert {row["prompt"] for row in rows} <= set(roadmap.prompts(certain, "test"))
    assert own_pairs.draw_labelled(policy, 100, "test", "labels") == rows


def test_true_order(monkeypatch):
    """Three pairs: the better response is chosen, rejected, and none."""
    rows = [
        {"prompt": "WA>OR:", "chosen": ">OR", "rejected": ">ID"},
        {"prompt": "WA>OR:", "chosen": ">ID>OR", "rejected": ">OR"},
        {"prompt": "WA>OR:", "chosen": ">ID", "rejected": ">CA"},
    ]
    assert judged.true_margins(rows).tolist() == pytest.approx([1, -0.05, 0])
    _, ((first, second), _, _) = judged.pairs_as_tokens(rows)
    assert first[-1] == second[-1] == roadmap.encoding().n_vocab - 1 and len(first) == len(second) == 2

    def accuracy(policy, reference):
        logps = {"policy": torch.tensor(policy), "reference": torch.tensor(reference)}
        monkeypatch.setattr(own_pairs, "sequence_logps", lambda name, *_: logps[name])
        return own_pairs.true_order_accuracy("policy", "reference", rows)

    nothing = [[0.0, 0.0]] * 3
    assert accuracy(nothing, nothing) == 0.5
    assert accuracy([[2.0, 1.0], [1.0, 2.0], [9.0, 0.0]], nothing) == 1
    assert accuracy([[1.0, 2.0], [2.0, 1.0], [9.0, 0.0]], nothing) == 0
    assert accuracy([[2.0, 1.0], [2.0, 1.0], [9.0, 0.0]], nothing) == 0.5
    assert accuracy([[2.0, 1.0], [2.0, 1.0], [9.0, 0.0]], [[0.0, 0.0], [3.0, 1.0], [0.0, 0.0]]) == 1


# ---------------------------------------------------------------- the verdict


def seeds_that_agree():
    """Results of two seeds for which every claim holds."""
    by_seed = []
    for more in (0.0, 0.001):  # no standard error is 0
        row = {}
        for beta in BETAS:
            for height, name in enumerate([*by_rounds(beta, ROUNDS).values(), "RLHF"]):
                row[name] = {"accuracy_sft": 0.8, "accuracy_own": 0.5, "kl_to_ref": 1.0, "legal": 0.9}
                row[name]["reward"] = 0.4 + 0.02 * height + more * (height + 1)
                row[name]["greedy_reward"] = 0.6 + 0.02 * height + more * (height + 1)
            row[named(OFFLINE, beta)] = dict(row[named(ON_POLICY, beta)])
            row[named(OFFLINE, beta)]["reward"] += 0.01 - more
            row[named(OFFLINE, beta)]["greedy_reward"] += 0.01 - more
            row[named(RLHF_SAMPLES, beta)] = dict(row["RLHF"])
        row[named(SFT_SAMPLES, 0.3)]["accuracy_sft"] += 0.05 + more
        row[named(ON_POLICY, 0.1)]["accuracy_own"] += 0.2 + more
        row["SFT"] = dict(row["RLHF"])
        by_seed.append(row)
    return by_seed


def test_every_claim_can_hold():
    lines = on_policy.verdict(seeds_that_agree())
    assert outcomes(lines) == ["yes"] * 11
    assert "beta: by +0.041" in lines[0] and "DPO by +0.05" in lines[5] and "RLHF by +0.05" in lines[5]
    assert "lead DPO by +0.06" in lines[7] and "leads them by +0.02" in lines[7]


def test_slope_is_of_ten_times_as_many_rounds():
    row = {}
    names = by_rounds(0.3, ROUNDS)
    for rounds, name in names.items():
        row[name] = {"reward": 0.4 + 0.07 * math.log10(rounds)}
    assert on_policy_claims.slope_of(row, names, "reward") == pytest.approx(0.07)


MAKE_IT_FAIL = [  # line, policy, measure, what is added
    (0, named(SFT_SAMPLES, 0.3), "reward", 0.05),
    (1, named(SFT_SAMPLES, 0.3), "greedy_reward", 0.05),
    (2, named(OFFLINE, 0.3), "reward", -0.1),
    (2, named(OFFLINE, 0.3), "greedy_reward", -0.1),
    (3, named(OFFLINE, 0.1), "reward", -0.1),
    (4, named(RLHF_SAMPLES, 0.1), "reward", -0.2),
    (5, named(ON_POLICY, 0.1), "accuracy_sft", 0.1),
    (5, "RLHF", "accuracy_sft", 0.1),
    (6, named(ON_POLICY, 0.1), "accuracy_own", -0.4),
    (7, "on-policy, 30 rounds, beta 0.3", "reward", -0.2),
    (8, "on-policy, 30 rounds, beta 0.3", "greedy_reward", -0.2),
    (9, "on-policy, 30 rounds, beta 0.1", "reward", -0.2),
    (10, "on-policy, 30 rounds, beta 0.1", "greedy_reward", -0.2),
]


@pytest.mark.parametrize(("line", "name", "measure", "more"), MAKE_IT_FAIL)
def test_every_claim_can_fail(line, name, measure, more):
    by_seed = seeds_that_agree()
    for row in by_seed:
        row[name][measure] += more
    assert not_held(on_policy.verdict(by_seed)) == {line: NO}


def test_a_slope_alone_is_not_enough():
    """More rounds bring more, but the most of them not surely more than DPO."""
    by_seed = seeds_that_agree()
    for row in by_seed:
        row["on-policy, 30 rounds, beta 0.3"]["greedy_reward"] -= 0.06
    assert not_held(on_policy.verdict(by_seed)) == {8: UNDECIDED}


@pytest.mark.parametrize("measure", ["reward", "greedy_reward"])
def test_a_lead_that_is_not_shown_does_not_show_that_there_is_none(measure):
    by_seed = seeds_that_agree()
    for row, more in zip(by_seed, (-0.06, 0.06), strict=True):
        row[named(OFFLINE, 0.3)][measure] += more
    assert not_held(on_policy.verdict(by_seed)) == {2: UNDECIDED}


# ---------------------------------------------------------------- the command


def few_prompts(world, split):
    return real_prompts(world, split)[:12]


real_prompts = roadmap.prompts


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(roadmap, "prompts", few_prompts)
    monkeypatch.setattr(pairs, "CHUNK", 16)
    model = "--n-layer 1 --n-embd 16 --n-head 1 --rows 500 --steps 60 --lr 2e-2".split()
    for name, value in {"PAIRS": 60, "TEST_PAIRS": 40, "SFT": model, "RLHF": ["--steps", "2"]}.items():
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr(dpo_in_rounds, "PAIRS", 60)
    monkeypatch.setattr(own_pairs, "OWN_PAIRS", 20)
    monkeypatch.setattr(on_policy, "run_phases", run_phases)
    out = tmp_path / "out"
    on_policy.main(["--seeds", "0", "--out", str(out)])
    written = json.loads((out / "on_policy/results.json").read_text())
    assert written["seeds"] == [0] and len(written["verdict"]) == 11
    assert "</svg>" in (out / "on_policy/figure.svg").read_text()
    assert (out / "on_policy/table.md").read_text() in capsys.readouterr().out
    (row,) = written["by_seed"]
    assert row["SFT"]["kl_to_ref"] == 0 and row["RLHF"]["kl_to_ref"] != 0 and len(row) == 14
    for beta in BETAS:
        assert row[named(ON_POLICY, beta)]["informative"] == row[named(OFFLINE, beta)]["informative"]
        same = out / f"seed0/on_policy_pairs_beta_{beta}.jsonl"
        used = read_jsonl(same)
        assert len(used) == 60 and used[:6] == read_jsonl(out / "seed0/sft/pairs.jsonl")[:6]
        informative = judged.true_margins(used).count_nonzero().item()
        assert row[named(ON_POLICY, beta)]["informative"] == pytest.approx(informative / 60)
        data = {evidence.dpo_run(beta): "roadmap", f"dpo_on_policy_pairs_beta_{beta}": str(same)}
        data[f"dpo_rlhf_pairs_beta_{beta}"] = str(out / "seed0/rlhf_global/pairs.jsonl")
        for name, path in data.items():
            flags = json.loads((out / f"seed0/{name}/config.json").read_text())["args"]
            assert flags["data"] == path and flags["beta"] == beta
    _, again = dpo_in_rounds.train_on_policy(out / "seed0", 0, 10, "dpo_beta_0.1")
    assert used == again  # of the last beta
