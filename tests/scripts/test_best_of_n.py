"""Best of n distilled: which samples become rows, verdicts that can come out either way, and the script."""

import json

import pytest
import torch

from experiments import best_of_n
from nanoroads.experiments import best_of_n as samples_to_choose
from nanoroads.report import evidence
from nanoroads.report.on_map import ENCODING
from nanoroads.score import scalar_rewards
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_policy, load_reward_model
from nanoroads.world import pairs, roadmap
from tests.helpers.in_process import run_phases
from tests.helpers.runs import read_jsonl
from tests.helpers.verdicts import NO, UNDECIDED, not_held, outcomes

EOS = tokenizer.eos_id(ENCODING)


def test_each_favourite_is_the_best_of_its_own_samples():
    score = torch.zeros(2, 32)
    score[0, [3, 6, 20]] = torch.tensor([1.0, 2.0, 3.0])
    score[1, [0, 5, 17, 31]] = torch.tensor([2.0, 1.0, 4.0, 5.0])
    assert best_of_n.favourites(score, 4).tolist() == [[3, 6], [0, 5]]
    assert best_of_n.favourites(score, 16).tolist() == [[6, 20], [0, 31]]


def test_what_is_cut_off_or_empty_is_no_favourite(monkeypatch):
    """The best score does not help it; the other scores are the reward model's, in their order."""
    end, road = [EOS], [1]
    groups = [[road + end, road, end, road + road + end] * 8, [road + road, road + end, end, road + end] * 8]
    scores = torch.arange(64.0).view(2, 32)
    monkeypatch.setattr(samples_to_choose, "prompts", lambda world, split: ["WA>OR:", "WA>ID:"])
    monkeypatch.setattr(samples_to_choose, "sample_routes", lambda *_, **__: ("ids", groups))
    monkeypatch.setattr(samples_to_choose, "scalar_rewards", lambda model, ids, samples, size: scores)
    split_prompts, responses, score = best_of_n.sample_and_score("policy", "reward model", "train", 32, 0)
    assert split_prompts == ["WA>OR:", "WA>ID:"] and responses == groups
    whole = torch.tensor([[True, False, False, True] * 8, [False, True, False, True] * 8])
    assert torch.equal(score[whole], scores[whole])
    assert (score[~whole] == -torch.inf).all()


# ---------------------------------------------------------------- the verdict


def seeds_that_agree():
    """Results of two seeds for which every claim holds."""
    by_seed = []
    for more in (0.0, 0.002):  # no standard error is 0
        row = {}
        for height, name in enumerate(best_of_n.LABELS):
            row[name] = {}
            for measure in ("reward", "greedy_reward", "kl_to_ref", "legal"):
                row[name][measure] = {"mean": 0.2 + 0.01 * height + more}
        row["sft_best_of_16"]["reward"]["mean"] += 0.1 + more
        row["itself"] = {}
        for n, run in best_of_n.BEST_OF.items():
            row["itself"][str(n)] = row[run]["reward"]["mean"] - 0.01 * (1 + more)
        by_seed.append(row)
    return by_seed


def test_every_claim_can_hold():
    lines = best_of_n.verdict(seeds_that_agree())
    assert outcomes(lines) == ["yes"] * 6
    assert "than DPO: +0.121" in lines[0] and "greedy +0.020" in lines[0] and "than RLHF: +0.091" in lines[1]
    assert (
        "distilled loses less than 0.02: -0.010" in lines[2]
        and "within 0.636 nats" in lines[3]
        and "within 1.84 nats" in lines[5]
    )


MAKE_IT_FAIL = [  # lines, run, measure, what is added
    ([0], "dpo", "reward", 0.2),
    ([1], "rlhf_global", "reward", 0.2),
    ([2], "itself", "4", 0.035),  # .025 is lost
    ([3], "sft_best_of_4", "kl_to_ref", 0.7),
    ([4], "itself", "16", 0.1),
    ([5], "sft_best_of_16", "kl_to_ref", 1.8),
]


@pytest.mark.parametrize(("lines", "name", "measure", "more"), MAKE_IT_FAIL)
def test_every_claim_can_fail(lines, name, measure, more):
    by_seed = seeds_that_agree()
    for row in by_seed:
        if name == "itself":
            row[name][measure] += more
        else:
            row[name][measure]["mean"] += more
    assert not_held(best_of_n.verdict(by_seed)) == dict.fromkeys(lines, NO)


def test_a_loss_that_is_not_shown_does_not_show_that_there_is_none():
    by_seed = seeds_that_agree()
    for row, more in zip(by_seed, (-0.06, 0.06), strict=True):
        row["itself"]["16"] += more
    assert not_held(best_of_n.verdict(by_seed)) == {4: UNDECIDED}


@pytest.mark.parametrize(("line", "run"), [(3, "sft_best_of_4"), (5, "sft_best_of_16")])
def test_a_kl_below_its_bound_by_less_than_two_errors_is_not_enough(line, run):
    by_seed = seeds_that_agree()
    for row, kl in zip(by_seed, (-0.4, 1.0), strict=True):
        row[run]["kl_to_ref"]["mean"] = kl + (line == 5)  # .3 ± .7, 1.3 ± .7
    verdict = best_of_n.verdict(by_seed)
    assert not_held(verdict) == {line: UNDECIDED}
    assert "± 0.700, 0." in verdict[line] and "standard errors below" in verdict[line]


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path, monkeypatch, capsys):
    real_prompts = roadmap.prompts
    monkeypatch.setattr(roadmap, "prompts", lambda world, split: real_prompts(world, split)[:12])
    monkeypatch.setattr(samples_to_choose, "prompts", roadmap.prompts)
    monkeypatch.setattr(pairs, "CHUNK", 16)
    model = "--n-layer 1 --n-embd 16 --n-head 1 --rows 500 --steps 60 --lr 2e-2".split()
    for name, value in {"PAIRS": 60, "TEST_PAIRS": 40, "SFT": model, "RLHF": ["--steps", "2"]}.items():
        monkeypatch.setattr(evidence, name, value)
    monkeypatch.setattr(best_of_n, "run_phases", run_phases)
    out = tmp_path / "out"
    best_of_n.main(["--seeds", "0", "--out", str(out)])
    written = json.loads((out / "best_of_n/results.json").read_text())
    assert written["seeds"] == [0] and len(written["verdict"]) == 6
    assert "</svg>" in (out / "best_of_n/figure.svg").read_text()
    assert (out / "best_of_n/table.md").read_text() in capsys.readouterr().out
    (row,) = written["by_seed"]
    assert row["sft"]["kl_to_ref"]["mean"] == 0 and set(row["itself"]) == {"4", "16"}

    # The rows are the favourites, and what SFT went on with.
    folder = out / "seed0"
    reward_model = load_reward_model(folder / "rlhf_global/reward")
    best = {}
    for n, run in best_of_n.BEST_OF.items():
        rows = read_jsonl(folder / f"best_of_{n}.jsonl")
        assert [r["prompt"] for r in rows] == [
            p for p in roadmap.prompts(best_of_n.WORLD, "train") for _ in range(2)
        ]
        flags = json.loads((folder / run / "config.json").read_text())["args"]
        assert flags["data"] == str(folder / f"best_of_{n}.jsonl") and flags["init"] == str(folder / "sft")
        prompts = [tokenizer.encode(ENCODING, r["prompt"]) for r in rows]
        responses = [[tokenizer.encode(ENCODING, r["response"]) + [EOS]] for r in rows]
        best[n] = scalar_rewards(reward_model, prompts, responses).mean().item()
    _, _, score = best_of_n.sample_and_score(load_policy(folder / "sft"), reward_model, "train", 32, 0)
    for n in best_of_n.BEST_OF:
        assert best[n] == pytest.approx(score[:, : 2 * n].view(12, 2, n).amax(2).mean().item(), abs=1e-5)
    assert best[4] < best[16]
