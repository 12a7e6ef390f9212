"""Where RLHF leads DPO, and where the most: for the verdict of experiments/horizon.py.

by_seed and kinds as in nanoroads/report/to_optimum.py; a horizon is the most moves of a route."""

from collections.abc import Iterable

from nanoroads.report.evidence import differences, is_above
from nanoroads.report.to_optimum import lead, leads_of


def not_ahead(by_seed: list[dict], kind: str, horizons: Iterable[int]) -> list[str]:
    """The horizons, from two moves on, at which RLHF does not lead by two standard errors."""
    behind = []
    for moves in horizons:
        if moves > 1 and not is_above(lead(by_seed, kind, moves)):
            behind.append(str(moves))
    return behind


def largest_lead(by_seed: list[dict], kind: str, horizons: Iterable[int]) -> tuple[int, dict[str, float]]:
    """The horizon with RLHF's largest lead, and how far that is above the lead at the longest one.

    H6 alone would suggest that they are the same."""
    longest = max(horizons)
    largest = longest
    for moves in horizons:
        if lead(by_seed, kind, moves)["mean"] > lead(by_seed, kind, largest)["mean"]:
            largest = moves
    return largest, differences(leads_of(by_seed, kind, largest), leads_of(by_seed, kind, longest))
