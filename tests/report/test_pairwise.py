"""Tables of pairs by hand: accuracy and its standard error, ties, groups, length bias, RewardBench."""

import math

import pytest
import torch

from nanoroads.report import rewardbench
from nanoroads.report.pairwise import (
    Column,
    accuracy,
    correlation,
    longer_wins,
    of_lengths,
    of_subsets,
    table,
)

MARGIN = torch.tensor([1.0, -2.0, 0.0, 3.0])  # right, wrong, a tie, right
LENGTHS = torch.tensor([[15, 10], [44, 40], [19, 21], [7, 7]])  # characters, chosen first
DIFFERENCE = torch.tensor([5, 4, -2, 0])


def test_accuracy_counts_a_tie_half():
    found = accuracy(MARGIN)
    assert found["mean"] == 2.5 / 4
    # Deviations .375, -.625, -.125, .375 from .625, and n - 1.
    assert found["se"] == pytest.approx(math.sqrt((0.375**2 * 2 + 0.625**2 + 0.125**2) / 3 / 4), abs=1e-12)


def test_the_longer_answer_wins():
    """Of three pairs of unequal lengths: it wins, it loses, a tie."""
    found = longer_wins(MARGIN, DIFFERENCE)
    assert found["mean"] == 0.5
    assert found["se"] == pytest.approx(0.5 / math.sqrt(3))
    shorter = longer_wins(torch.tensor([-1.0]), torch.tensor([-3]))  # the rejected one is longer, and wins
    assert shorter["mean"] == 1
    assert longer_wins(MARGIN, torch.zeros(4)) is None


def test_correlation():
    x = torch.tensor([1.0, 2.0, 4.0])
    assert correlation(x, 3 * x + 1) == pytest.approx(1)
    assert correlation(x, -x) == pytest.approx(-1)
    # Deviations of x -4/3, -1/3, 5/3; of y 1, -1, 0.
    wanted = -1 / math.sqrt((16 + 1 + 25) / 9 * 2)
    assert correlation(x, torch.tensor([2.0, 0.0, 1.0])) == pytest.approx(wanted)
    assert correlation(x, torch.ones(3)) is None


def test_groups():
    groups = of_subsets(["b", "a", "b"])
    assert list(groups) == ["a", "b"]
    assert groups["b"].tolist() == [True, False, True]
    lengths = {name: chosen.tolist() for name, chosen in of_lengths(LENGTHS).items()}
    assert lengths == {
        "chosen longer": [True, True, False, False],
        "  longer by up to 10 %": [False, True, False, False],  # 10 % to the character
        "  longer by more": [True, False, False, False],
        "same length": [False, False, False, True],
        "chosen shorter": [False, False, True, False],
        "  shorter by up to 10 %": [False, False, False, False],
        "  shorter by more": [False, False, True, False],  # by 2 of 19
    }


def test_a_table():
    columns = [Column("out/dpo", "log-prob", MARGIN), Column("a:\x1b[31mrule", "rule", -MARGIN)]
    lines = table(columns, ["x", "y", "y", "x"], LENGTHS)
    assert [" ".join(line.split()) for line in lines] == [
        "[1] out/dpo: log-prob",
        "[2] a:\\x1b[31mrule: rule",
        "",
        "accuracy ± its standard error over pairs; equal rewards count one half",
        "pairs [1] [2]",
        "all 4 0.625 ±0.239 0.375 ±0.239",
        "by subset",
        "x 2 1.000 ±0.000 0.000 ±0.000",
        "y 2 0.250 ±0.250 0.750 ±0.250",
        "by length",
        "chosen longer 2 0.500 ±0.500 0.500 ±0.500",
        "longer by up to 10 % 1 0.000 1.000",
        "longer by more 1 1.000 0.000",
        "same length 1 1.000 0.000",
        "chosen shorter 1 0.500 0.500",
        "shorter by more 1 0.500 0.500",
        "length bias: the chosen answer is the longer one in 66.7% of pairs of unequal lengths",
        "the longer one wins 0.500 ±0.289 0.500 ±0.289",
        "corr(margin, length) -0.315 +0.315",
    ]
    assert len({len(line) for line in lines if " ±0." in line}) == 1  # cells stand under one another
    assert "by subset" not in table(columns, None, LENGTHS)
    assert not [line for line in table(columns, None, torch.ones(4, 2)) if "bias" in line]


def test_many_subsets_are_cut_to_the_largest():
    names = [f"s{i:03}" for i in range(60)] + ["s059"]
    lines = table([Column("m", "rule", torch.ones(61))], names, torch.ones(61, 2))
    assert sum(line.startswith("  s0") for line in lines) == 50
    assert "  and 10 smaller ones" in lines
    assert [line for line in lines if line.startswith("  s059")]


def test_rewardbench_weighs_subsets_by_their_rows_and_math_as_code():
    accuracies = {}
    for weights in rewardbench.SECTIONS.values():
        for subset in weights:
            accuracies[subset] = {"mean": 0.5, "se": 0.0}
    accuracies["math-prm"] = {"mean": 1.0, "se": 0.02}
    accuracies["xstest-should-respond"] = {"mean": 0.9, "se": 0.01}
    scores = rewardbench.section_scores(accuracies)
    assert scores["Chat"] == {"mean": 0.5, "se": 0}
    assert scores["Reasoning"]["mean"] == pytest.approx(0.75)  # half of it is math
    assert scores["Reasoning"]["se"] == pytest.approx(0.01)
    safety = 0.5 + 0.4 * 250 / 740
    assert scores["Safety"]["mean"] == pytest.approx(safety)
    assert scores["Score"]["mean"] == pytest.approx((0.5 + 0.5 + safety + 0.75 + 0.5 / 2) / 4.5)
    del accuracies["shp"]
    scores = rewardbench.section_scores(accuracies)
    assert scores["Score"]["mean"] == pytest.approx((0.5 + 0.5 + safety + 0.75) / 4)
    del accuracies["hep-go"]
    assert rewardbench.section_scores(accuracies).keys() == {"Chat", "Chat Hard", "Safety"}


def test_rewardbench_is_known_by_its_subsets():
    names = list(rewardbench.SECTIONS["Chat"])
    lines = table([Column("m", "reward", torch.ones(10))], names * 2, torch.ones(10, 2))
    assert [line.split()[:2] for line in lines if line.startswith("  Chat ")] == [["Chat", "1.000"]]
    names[0] = "mine"
    lines = table([Column("m", "reward", torch.ones(10))], names * 2, torch.ones(10, 2))
    assert not [line for line in lines if "RewardBench" in line]
