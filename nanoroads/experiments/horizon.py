"""Where RLHF leads DPO, where the most and where the least surely: for the verdict of experiments/horizon.py.

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


def least_sure(by_seed: list[dict], kind: str, horizons: Iterable[int]) -> tuple[int, dict[str, float]]:
    """Of the horizons from two moves on, the one at which RLHF's lead is the least sure, and this lead.

    It is the one with the smallest lead less two standard errors, which decides whether RLHF leads at all."""
    leads = {moves: lead(by_seed, kind, moves) for moves in horizons if moves > 1}
    moves = min(leads, key=lambda moves: leads[moves]["mean"] - 2 * leads[moves]["se"])
    return moves, leads[moves]


def longest_less_best(
    by_seed: list[dict], kind: str, horizons: Iterable[int]
) -> tuple[int, dict[str, float]]:
    """Of the horizons but the longest, the one with RLHF's largest lead, and the longest's lead less that.

    By H6 alone that would be a gain."""
    longest = max(horizons)
    shorter = [moves for moves in horizons if moves < longest]
    best = max(shorter, key=lambda moves: lead(by_seed, kind, moves)["mean"])
    return best, differences(leads_of(by_seed, kind, longest), leads_of(by_seed, kind, best))
