"""What a mean with its error shows, by two standard errors or not at all, and how it is written."""

import math

import pytest

from nanoroads import score
from nanoroads.report import cells


def cell(mean, se):
    return {"mean": mean, "se": se}


@pytest.mark.parametrize(
    ("mean", "se", "bound", "above", "below"),
    [
        (0.5, 0.1, 0.29, True, False),  # 2.1 errors above
        (0.5, 0.1, 0.31, None, None),  # 1.9
        (0.5, 0.1, 0.69, None, None),
        (0.5, 0.1, 0.71, False, True),
        (-0.5, 0.1, -0.71, True, False),
        (-0.5, 0.1, -0.29, False, True),
        (0.3, 0.0, 0.2, True, False),  # one seed: its number decides
        (0.3, 0.0, 0.4, False, True),
        (0.3, 0.0, 0.3, None, None),
    ],
)
def test_a_mean_beside_a_bound(mean, se, bound, above, below):
    assert cells.above(cell(mean, se), bound) is above and cells.is_above(cell(mean, se), bound) is bool(
        above
    )
    assert cells.below(cell(mean, se), bound) is below and cells.is_below(cell(mean, se), bound) is bool(
        below
    )


def test_the_bound_is_zero_unless_another_is_given():
    assert cells.above(cell(0.3, 0.1)) is True and cells.below(cell(-0.3, 0.1)) is True
    assert (
        cells.above(cell(0.1, 0.1)) is None and cells.is_above(cell(0.3, 0.1)) and cells.is_below(cell(-1, 0))
    )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("mean", "se", "holds"),
    [
        (0.5, 0.1, True),  # within 1 by five errors
        (0.5, 0.24, True),
        (0.5, 0.26, None),  # 1.9 errors
        (0.0, 0.6, None),  # nothing is shown of a wide error
        (1.1, 0.1, None),
        (1.1, 0.04, False),  # outside by 2.5
        (0.9, 0.0, True),
        (1.1, 0.0, False),
    ],
)
def test_within(sign, mean, se, holds):
    assert cells.within(cell(sign * mean, se), 1) is holds
    assert cells.is_within(cell(sign * mean, se), 1) is bool(holds)


@pytest.mark.parametrize(
    ("holds", "all_of_them"),
    [
        ([True, True], True),
        ([True, None], None),
        ([None, False], False),  # one that is refuted refutes all
        ([False, True], False),
        ([None], None),
    ],
)
def test_every(holds, all_of_them):
    assert cells.every(holds) is all_of_them and cells.every(iter(holds)) is all_of_them


def test_a_claim_has_three_outcomes():
    assert cells.claim(True, "x") == "yes: x"
    assert cells.claim(False, "x") == "NO: x"
    assert cells.claim(None, "x") == "NO, undecided: x"


def test_the_least_sure_lead_decides_whether_all_are_above_zero():
    leads = {"small": cell(0.1, 0.01), "wide": cell(0.3, 0.1), "large": cell(1.0, 0.1)}
    assert cells.least_sure(leads) == "wide"  # 3 errors, the others 10
    leads["none"] = cell(-0.01, 0.1)
    assert cells.least_sure(leads) == "none"
    leads["refuted"] = cell(-0.01, 0.001)
    assert cells.least_sure(leads) == "refuted"
    for some in (["small", "wide"], ["wide", "none"], ["none", "refuted"]):
        chosen = {name: leads[name] for name in some}
        assert cells.above(leads[cells.least_sure(chosen)]) is cells.every(map(cells.above, chosen.values()))
    assert cells.least_sure({"more": cell(0.2, 0), "less": cell(0.1, 0)}) == "less"  # of one seed, by size
    assert cells.least_sure({"more": cell(-0.1, 0), "less": cell(-0.2, 0)}) == "less"


def test_room_makes_other_bounds_leads():
    """Without errors, too, the nearest to its bound is the least sure."""
    gains = {"near": cell(0.019, 0), "far": cell(-0.1, 0)}
    assert cells.least_sure({name: cells.room_below(gain, 0.02) for name, gain in gains.items()}) == "near"
    gains = {"above": cell(0.5, 0), "further": cell(0.1, 0)}
    assert cells.least_sure({name: cells.room_below(gain, 0.02) for name, gain in gains.items()}) == "above"
    gaps = {"small": cell(0.1, 0.01), "negative": cell(-0.25, 0.02), "wide": cell(0.0, 0.1)}
    rooms = {name: cells.room_within(gap, 0.3) for name, gap in gaps.items()}
    assert rooms["negative"]["mean"] == pytest.approx(0.05)
    assert cells.least_sure(rooms) == "negative"  # 2.5 errors, the others 20 and 3


@pytest.mark.parametrize(
    "odd", [cell(math.nan, 0.0), cell(math.nan, math.nan), cell(math.inf, 0.0), cell(1, math.nan)]
)
def test_what_is_not_finite_decides_nothing(odd):
    for holds in (
        cells.above(odd),
        cells.below(odd),
        cells.within(odd, 1),
        cells.above(cell(1, 0), math.nan),
    ):
        assert holds is None
    assert cells.every([cells.above(cell(1, 0)), cells.above(odd)]) is None
    assert cells.least_sure({"odd": odd, "undecided": cell(-1, 1), "sure": cell(1, 0)}) == "odd"
    assert cells.least_sure({"odd": odd, "refuted": cell(-3, 1)}) == "refuted"  # it decides whether all are
    assert cells.with_errors(odd).endswith(", not finite") and cells.in_errors(odd, 0.5) == "not finite"


def test_no_values_have_no_mean():
    assert score.mean_se([2.0]) == cell(2.0, 0.0)
    with pytest.raises(ValueError, match="no values"):
        score.mean_se([])


@pytest.mark.parametrize(("errors", "text"), [(1.94, "1.9"), (1.96, "1.96"), (2.04, "2.04"), (2.06, "2.1")])
def test_rounding_does_not_hide_what_is_shown(errors, text):
    assert cells.with_errors(cell(errors * 0.1, 0.1)).endswith(f", {text} standard errors")
    assert cells.in_errors(cell(1 - errors * 0.1, 0.1), 1) == f"{text} standard errors below 1"


def test_how_they_are_written():
    lead = cell(0.5, 0.058)
    assert cells.plus_minus(lead) == "0.500 ± 0.058" and cells.plus_minus(lead, 1) == "0.5 ± 0.1"
    assert cells.signed(lead) == "+0.500 ± 0.058" and cells.signed(cell(-0.5, 0.25), 2) == "-0.50 ± 0.25"
    assert cells.with_errors(lead) == "+0.500 ± 0.058, 8.6 standard errors"
    assert cells.with_errors(cell(-0.5, 0.25), 2) == "-0.50 ± 0.25, 2.00 standard errors"
    assert cells.in_errors(lead, 0.4) == "1.7 standard errors above 0.4"
    assert cells.in_errors(lead, 1.8353) == "23.0 standard errors below 1.84"
    assert cells.beside_bound(lead, 0.4) == "+0.500 ± 0.058, 1.7 standard errors above 0.4"
    assert cells.beside_nearer_bound(lead, 0.4) == "+0.500 ± 0.058, 1.7 standard errors above 0.4"
    assert cells.beside_nearer_bound(cell(-0.5, 0.25), 1) == "-0.500 ± 0.250, 2.00 standard errors above -1"


def test_what_has_no_error_is_told_in_one_way():
    alone = cell(0.25, 0.0)
    assert (
        cells.plus_minus(alone) == "0.250"
        and cells.signed(alone) == "+0.250"
        and cells.with_errors(alone) == "+0.250, no error"
    )
    assert cells.signed(cell(-0.25, 0.0)) == "-0.250" and cells.signed(cell(0.25, 1e-17)) == "+0.250"
    assert (
        cells.above(cell(0.1, 1e-17), 0.2) is False
        and cells.with_errors(cell(0.1, 1e-17)) == "+0.100, no error"
    )
    assert cells.in_errors(alone, 0.5) == "0.250 below 0.5, no error"
    assert cells.beside_bound(cell(-0.5, 0.0), -1, 1) == "-0.5, 0.500 above -1, no error"
