"""Rewards with and without a prior: table and figure of experiments/prior_of_local.py.

by_seed: of each seed "truth" and "reference", best of 16, and {"global", "local": its `with_prior`}."""

from matplotlib.figure import Figure

from nanoroads.report.cells import plus_minus
from nanoroads.report.drawing import COLOURS, new_figure
from nanoroads.report.evidence import over_seeds, values_of
from nanoroads.report.write import table

SCORES = {  # where a seed's row has them
    "log pi_ref": ["reference"],
    "global": ["global", "curve", "0.0"],
    "global + w log pi_ref": ["global", "value"],
    "local": ["local", "curve", "0.0"],
    "local + w log pi_ref": ["local", "value"],
    "local - beta log pi_ref": ["local", "curve", "-0.3"],
    "true reward": ["truth"],
}


def table_of(by_seed: list[dict]) -> str:
    """A line a score."""
    lines = []
    for label, path in SCORES.items():
        cell = over_seeds(by_seed, *path)
        lines.append([label, plus_minus(cell)])
    for name in ("global", "local"):
        chosen = [str(pair) for pair in values_of(by_seed, name, "weights")]
        lines.append([f"w chosen for {name}, in both halves of each seed", ", ".join(chosen)])
    return table(["score", "best of 16"], lines)


def figure_of(by_seed: list[dict], weights: list[float]) -> Figure:
    """Best of 16 against the weight."""
    fig, ax = new_figure(7, 4)
    for name, road in (("global", "rlhf_global"), ("local", "rlhf_local")):
        cells = [over_seeds(by_seed, name, "curve", str(weight)) for weight in weights]
        means = [cell["mean"] for cell in cells]
        errors = [cell["se"] for cell in cells]
        ax.errorbar(weights, means, errors, fmt="o-", ms=3, color=COLOURS[road], capsize=3, label=name)
    ax.set(xlabel="w, the weight of log pi_ref beside the reward", ylabel="true reward of the best of 16")
    ax.set_title("A prior beside the reward")
    ax.legend()
    return fig
