"""Policies of the main world beside each other: measures, differences, a table and a figure.

labels: {run: what it is called}, in their order; a run is a folder in a seed's folder. Its name begins
with sft, dpo or rlhf, the road whose colour it has. by_seed: of each seed {run: its `policy_row`}."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

from nanoroads.report.cells import plus_minus
from nanoroads.report.drawing import COLOURS, new_figure
from nanoroads.report.evidence import lead, over_seeds, values_of
from nanoroads.report.on_map import policy_row
from nanoroads.report.write import table
from nanoroads.weights.checkpoint import load_policy
from nanoroads.world.roadmap import MAIN, prompts

WORLD = MAIN
MEASURES = {  # the columns
    "reward": "true reward",
    "greedy_reward": "greedy",
    "kl_to_ref": "KL to SFT, nats",
    "legal": "legal",
}


def policy_rows(folder: Path, labels: dict[str, str]) -> dict[str, dict]:
    """{run: `policy_row`} of one seed, on all held-out prompts."""
    reference = load_policy(folder / "sft")
    rows = {}
    for name in labels:
        rows[name] = policy_row(load_policy(folder / name), reference, WORLD, prompts(WORLD, "test"))
    return rows


def reward_lead(by_seed: list[dict], one: str, other: str, measure: str = "reward") -> dict[str, float]:
    """{"mean", "se"} over seeds of how far one policy is ahead of another in true reward, seed by seed.

    measure: "greedy_reward" for that of greedy responses."""
    return lead(by_seed, one, other, measure, "mean")


def rewards_of(by_seed: list[dict], name: str) -> torch.Tensor:
    """A policy's true reward, of each seed, (S,) fp64."""
    return torch.tensor(values_of(by_seed, name, "reward", "mean"), dtype=torch.float64)


def policies_table(by_seed: list[dict], labels: dict[str, str]) -> str:
    """A line a policy, with standard errors over seeds."""
    lines = []
    for name, label in labels.items():
        cells = [plus_minus(over_seeds(by_seed, name, measure, "mean")) for measure in MEASURES]
        lines.append([label] + cells)
    return table(["policy", *MEASURES.values()], lines)


def colour_of(name):
    """The colour of the road that a run's name begins with."""
    if name.startswith("rlhf"):
        return COLOURS["rlhf_global"]
    if name.startswith("dpo"):
        return COLOURS["dpo"]
    return COLOURS["sft"]


def policies_figure(by_seed: list[dict], labels: dict[str, str], title: str) -> Figure:
    """True reward of samples and of greedy responses, a line a policy, with standard errors."""
    fig, ax = new_figure(8, 1.2 + 0.33 * len(labels))
    for place, name in enumerate(labels):
        colour = colour_of(name)
        for measure, face in (("reward", colour), ("greedy_reward", "white")):
            cell = over_seeds(by_seed, name, measure, "mean")
            style = {"fmt": "o", "color": colour, "mfc": face, "capsize": 3}
            ax.errorbar(cell["mean"], -place, xerr=cell["se"], **style)
    ax.set_yticks(range(0, -len(labels), -1), list(labels.values()))
    ax.set_xlabel("true reward, held-out: samples (filled), greedy (open)")
    ax.set_title(title)
    ax.grid(axis="x", lw=0.4)
    return fig
