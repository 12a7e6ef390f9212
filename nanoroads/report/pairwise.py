"""How well rewards rank pairs: accuracy in all, by subset and by length, as lines of a table.

N pairs; a margin is the reward of the chosen answer minus that of the rejected one, and a pair is
ranked right where it is positive. A tie counts one half (score.ranked_right)."""

from typing import NamedTuple

import torch

from nanoroads.errors import printable
from nanoroads.report.rewardbench import is_rewardbench, section_scores
from nanoroads.score import mean_se, ranked_right

LABEL_WIDTH = 26  # columns
CELL_WIDTH = 14
MOST_SUBSETS = 50  # lines of the table; the largest are shown


class Column(NamedTuple):
    """One reward of the table."""

    name: str  # of the model or rule
    measure: str  # what the reward is
    margin: torch.Tensor  # (N,)


# ---------------------------------------------------------------- measures


def accuracy(margin):
    """margin (N,) -> {"mean", "se"} of the share of pairs that are ranked right."""
    return mean_se(ranked_right(margin))


def longer_wins(margin, length_difference):
    """(N,), (N,) chosen minus rejected -> {"mean", "se"} of the share of pairs in which the longer answer
    has the higher reward. None where all pairs are of equal lengths."""
    differs = length_difference != 0
    if not differs.any():
        return None
    # A pair's reward prefers the longer answer where margin and difference have the same sign.
    toward_longer = margin[differs] * length_difference[differs].sign()
    return mean_se(ranked_right(toward_longer))


def correlation(x, y):
    """Pearson's correlation of x (N,) and y (N,); None where one of them is constant."""
    x = x.double() - x.double().mean()
    y = y.double() - y.double().mean()
    scale = x.norm() * y.norm()
    if scale == 0:
        return None
    return float(x @ y / scale)


def of_subsets(names):
    """N names -> {name: (N,) bool}, in alphabetical order."""
    groups = {}
    for name in sorted(set(names)):
        groups[name] = torch.tensor([other == name for other in names])
    return groups


def of_lengths(lengths):
    """(N, 2) characters, chosen first -> {how much longer the chosen answer is: (N,) bool}.

    Per cent are of the shorter answer."""
    chosen, rejected = lengths.unbind(1)
    longer, shorter = chosen > rejected, chosen < rejected
    far_apart = 10 * lengths.amax(1) > 11 * lengths.amin(1)
    return {
        "chosen longer": longer,
        "  longer by up to 10 %": longer & ~far_apart,
        "  longer by more": longer & far_apart,
        "same length": chosen == rejected,
        "chosen shorter": shorter,
        "  shorter by up to 10 %": shorter & ~far_apart,
        "  shorter by more": shorter & far_apart,
    }


# ---------------------------------------------------------------- the table


def table(columns, subsets, lengths):
    """The lines of a table.

    columns: Columns of N pairs. subsets: N names, or None. lengths: (N, 2) characters, chosen first."""
    count = len(lengths)
    lines = []
    for number, column in enumerate(columns, 1):
        lines.append(f"[{number}] {printable(column.name)}: {column.measure}")
    numbers = [f"[{number}]" for number in range(1, len(columns) + 1)]
    lines += ["", "accuracy ± its standard error over pairs; equal rewards count one half"]
    lines.append(line_of("", "pairs", numbers))
    lines += accuracy_lines(columns, {"all": torch.ones(count, dtype=torch.bool)})
    if subsets is not None:
        groups = of_subsets(subsets)
        shown = sorted(groups, key=lambda name: -int(groups[name].sum()))[:MOST_SUBSETS]
        lines += ["by subset", *accuracy_lines(columns, {name: groups[name] for name in sorted(shown)})]
        if len(groups) > MOST_SUBSETS:
            lines.append(f"  and {len(groups) - MOST_SUBSETS:,} smaller ones")
        lines += rewardbench_lines(columns, groups)
    lines += ["by length", *accuracy_lines(columns, of_lengths(lengths))]
    return lines + length_bias_lines(columns, lengths[:, 0] - lengths[:, 1])


def accuracy_lines(columns, groups):
    """One line for each group of pairs that is not empty. groups: {name: (N,) bool}."""
    lines = []
    for name, mask in groups.items():
        count = int(mask.sum())
        if count > 0:
            cells = [cell(accuracy(column.margin[mask]), count) for column in columns]
            lines.append(line_of(f"  {name}", f"{count:,}", cells))
    return lines


def length_bias_lines(columns, length_difference):
    """How much each reward goes by length, beside how much the pairs themselves do."""
    differs = length_difference != 0
    if not differs.any():
        return []
    share = (length_difference[differs] > 0).double().mean()
    lines = [f"length bias: the chosen answer is the longer one in {share:.1%} of pairs of unequal lengths"]
    wins = [longer_wins(column.margin, length_difference) for column in columns]
    correlations = [correlation(column.margin, length_difference) for column in columns]
    lines.append(line_of("  the longer one wins", "", [cell(win, int(differs.sum())) for win in wins]))
    cells = ["-" if value is None else f"{value:+.3f}" for value in correlations]
    lines.append(line_of("  corr(margin, length)", "", cells))
    return lines


def rewardbench_lines(columns, groups):
    """RewardBench's sections and its score, where the subsets are its own; else nothing."""
    if not is_rewardbench(groups):
        return []
    scores = []
    for column in columns:
        accuracies = {name: accuracy(column.margin[mask]) for name, mask in groups.items()}
        scores.append(section_scores(accuracies))
    lines = []
    for section in scores[0]:
        lines.append(line_of(f"  {section}", "", [cell(score[section]) for score in scores]))
    if lines:
        lines.insert(0, "by RewardBench's sections (its weights; to RewardBench itself a tie is wrong)")
    return lines


def cell(value, count=None):
    """{"mean", "se"} or None -> text. count: of pairs; a single one has no standard error."""
    if value is None:
        return "-"
    if count == 1:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} ±{value['se']:.3f}"


def line_of(label, count, cells):
    """One line: a label, the number of pairs, and a cell for each column."""
    label = printable(label)
    if len(label) > LABEL_WIDTH:
        label = label[: LABEL_WIDTH - 3] + "..."
    return f"{label:<{LABEL_WIDTH}}{count:>8}" + "".join(f"{text:>{CELL_WIDTH}}" for text in cells)
