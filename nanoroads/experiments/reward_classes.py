"""Classes of rewards beside each other: table, figure and order of experiments/reward_classes.py.

by_seed: of each seed {class: its measures on held-out pairs, and "best_of_n"}."""

from itertools import pairwise

from matplotlib.figure import Figure

from nanoroads.report.cells import plus_minus
from nanoroads.report.drawing import INK, new_figure
from nanoroads.report.evidence import lead, over_seeds
from nanoroads.report.figures import label_ends
from nanoroads.report.measures import BEST_OF
from nanoroads.report.write import table

COLUMNS = {  # of the table, and where a class's row has them
    "nll": ["nll"],
    "nll, rescaled": ["nll_rescaled"],
    "accuracy": ["accuracy"],
    "true order": ["true_order"],
}
for n in BEST_OF:
    COLUMNS[f"best of {n}"] = ["best_of_n", str(n)]
# Of the six classes in the order of the paper, and of the truth.
COLOURS = ["#d55e00", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#0072b2", INK]


def better_by(by_seed: list[dict], one: str, other: str, column: str) -> dict[str, float]:
    """{"mean", "se"} over seeds of how much better one class is; of a loss, less is better."""
    if column.startswith("nll"):
        one, other = other, one
    return lead(by_seed, one, other, *COLUMNS[column])


def ordered(by_seed: list[dict], classes: list[str], column: str) -> list[str]:
    """The classes, that with the largest mean over seeds first."""
    means = {}
    for name in classes:
        means[name] = over_seeds(by_seed, name, *COLUMNS[column])["mean"]
    return sorted(classes, key=means.get, reverse=True)


def neighbours(by_seed: list[dict], classes: list[str], column: str) -> dict[str, dict[str, float]]:
    """{"one over the next": {"mean", "se"} of how much better it is} down the list of classes."""
    steps = {}
    for one, other in pairwise(classes):
        steps[f"{one} over {other}"] = better_by(by_seed, one, other, column)
    return steps


def table_of(by_seed: list[dict], classes: list[str]) -> str:
    """A line a class."""
    lines = []
    for name in classes + ["reference", "truth"]:
        cells = [plus_minus(over_seeds(by_seed, name, *path)) for path in COLUMNS.values()]
        lines.append([name] + cells)
    return table(["reward"] + list(COLUMNS), lines)


def figure_of(by_seed: list[dict], paper: dict[str, float]) -> Figure:
    """The ladder's accuracies, beside `paper`'s {class: accuracy}, and best of N."""
    fig, (ladder, best) = new_figure(11, 4.2, ncols=2)
    ends = {}  # {class: (where its line ends, colour)}
    for name, colour in zip(list(paper) + ["truth"], COLOURS, strict=True):
        means = [over_seeds(by_seed, name, "best_of_n", str(n))["mean"] for n in BEST_OF]
        best.plot(BEST_OF, means, "o-", ms=3, color=colour)
        ends[name] = (means[-1], colour)
        cell = over_seeds(by_seed, name, "accuracy")
        ladder.errorbar(name, cell["mean"], cell["se"], fmt="o", color=colour, capsize=3)
    ladder.plot(list(paper), list(paper.values()), ":", color=INK, label="the paper's, on summaries")
    ladder.set(ylabel="accuracy on held-out labels", title="The ladder")
    ladder.legend()
    best.set_xscale("log", base=2)
    best.set_xticks(BEST_OF, [str(n) for n in BEST_OF])
    best.set(xlabel="N samples of the SFT policy", ylabel="true reward of the favourite", title="Best of N")
    label_ends(best, BEST_OF[-1], ends)
    return fig
