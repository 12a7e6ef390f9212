"""Means with standard errors: what they show, and how they are written.

A cell is {"mean", "se"}. Where it has no error, its se being 0, it is of one seed, or the same for all seeds:
then the number decides alone. One that is not finite decides nothing."""

import math
from collections.abc import Iterable

Cell = dict[str, float]
NEGLIGIBLE = 0.02  # of a reward or an accuracy: a lead that is shown to be below it counts as none
ERRORS_THAT_SHOW = 2  # what is more standard errors than these from a bound, is shown to be


# ---------------------------------------------------------------- what they show


def has_error(cell: Cell) -> bool:
    """Whether there is a standard error that is more than rounding."""
    return cell["se"] > 1e-12


def errors_above(cell: Cell, bound: float = 0.0) -> float:
    """By how many standard errors a mean is above `bound`, negative below it; infinite without an error.

    nan where a number is not finite."""
    distance = cell["mean"] - bound
    if not (math.isfinite(distance) and math.isfinite(cell["se"])):
        return math.nan
    if has_error(cell):
        return distance / cell["se"]
    return math.copysign(math.inf, distance) if distance else 0.0


def is_above(cell: Cell, bound: float = 0.0) -> bool:
    """Whether a mean is shown to be above `bound`, by more than two standard errors."""
    return errors_above(cell, bound) > ERRORS_THAT_SHOW


def is_below(cell: Cell, bound: float = 0.0) -> bool:
    """Whether a mean is shown to be below `bound`."""
    return errors_above(cell, bound) < -ERRORS_THAT_SHOW


def is_within(cell: Cell, bound: float) -> bool:
    """Whether a mean is shown to be between -bound and bound."""
    return is_above(cell, -bound) and is_below(cell, bound)


# ---------------------------------------------------------------- whether a claim holds

# True: it is shown to. False: the opposite is shown. None: neither is, it is undecided.


def above(cell: Cell, bound: float = 0.0) -> bool | None:
    """The claim that a mean is above `bound`."""
    return decided(is_above(cell, bound), is_below(cell, bound))


def below(cell: Cell, bound: float = 0.0) -> bool | None:
    """The claim that a mean is below `bound`.

    A claim of "no more than" needs this: that a mean is not shown to be above says as much of the errors."""
    return decided(is_below(cell, bound), is_above(cell, bound))


def within(cell: Cell, bound: float) -> bool | None:
    """The claim that a mean is between -bound and bound, as one of "no difference" needs it."""
    return decided(is_within(cell, bound), is_above(cell, bound) or is_below(cell, -bound))


def every(holds: Iterable[bool | None]) -> bool | None:
    """The claim that several claims hold."""
    holds = list(holds)
    return decided(all(holds), False in holds)


def decided(holds: bool, fails: bool) -> bool | None:
    """True, False or None of whether a claim, and whether its opposite, is shown."""
    if holds:
        return True
    return False if fails else None


def least_sure(leads: dict) -> str:
    """The name of the lead that is above 0 by the fewest standard errors: it decides whether all are.

    One that is not finite comes before all but the refuted."""

    def sureness(name):
        errors = errors_above(leads[name])
        return (-ERRORS_THAT_SHOW, 0) if math.isnan(errors) else (errors, leads[name]["mean"])

    return min(leads, key=sureness)


def room_below(cell: Cell, bound: float) -> Cell:
    """How far a mean is below `bound`, for `least_sure`."""
    return {"mean": bound - cell["mean"], "se": cell["se"]}


def room_within(cell: Cell, bound: float) -> Cell:
    """How far a mean is from the nearer of -bound and bound, negative beyond it, for `least_sure`."""
    return {"mean": bound - abs(cell["mean"]), "se": cell["se"]}


def claim(holds: bool | None, text: str) -> str:
    """A line of a verdict: `yes: ...`, `NO: ...` or `NO, undecided: ...`."""
    if holds is None:
        return f"NO, undecided: {text}"
    return f"yes: {text}" if holds else f"NO: {text}"


# ---------------------------------------------------------------- how they are written


def plus_minus(cell: Cell, digits: int = 3) -> str:
    """`0.512 ± 0.008`; without an error, `0.512`."""
    number = f"{cell['mean']:.{digits}f}"
    return f"{number} ± {cell['se']:.{digits}f}" if has_error(cell) else number


def signed(cell: Cell, digits: int = 3) -> str:
    """A difference: `+0.097 ± 0.006`."""
    text = plus_minus(cell, digits)
    return text if text.startswith("-") else f"+{text}"


def with_errors(cell: Cell, digits: int = 3) -> str:
    """A difference, and how far it is from 0: `+0.097 ± 0.006, 16.2 standard errors`."""
    return f"{signed(cell, digits)}, {count_of(cell, 0)}"


def in_errors(cell: Cell, bound: float) -> str:
    """How far a mean is from a bound: `7.2 standard errors above 0.5`."""
    errors = errors_above(cell, bound)
    count = count_of(cell, bound)
    beside = f"{'below' if errors < 0 else 'above'} {bound:.3g}"
    if math.isnan(errors):
        return count
    return f"{count} {beside}" if has_error(cell) else f"{abs(cell['mean'] - bound):.3f} {beside}, {count}"


def count_of(cell: Cell, bound: float) -> str:
    """`7.2 standard errors`; so near to 2 that rounding would hide the side, `2.03 standard errors`."""
    errors = abs(errors_above(cell, bound))
    if math.isnan(errors):
        return "not finite"
    if not has_error(cell):
        return "no error"
    digits = 2 if abs(errors - ERRORS_THAT_SHOW) < 0.05 else 1
    return f"{errors:.{digits}f} standard errors"


def beside_bound(cell: Cell, bound: float, digits: int = 3) -> str:
    """A difference beside a bound: `+0.163 ± 0.069, 1.6 standard errors above 0.05`."""
    return f"{signed(cell, digits)}, {in_errors(cell, bound)}"


def beside_nearer_bound(cell: Cell, bound: float, digits: int = 3) -> str:
    """The same beside -bound or bound, whichever is on the mean's side: where `within` decides."""
    return beside_bound(cell, math.copysign(bound, cell["mean"]), digits)
