"""What experiments/overoptimisation.py compares of its points, and its table and figure.

`by_seed` has of each seed {road: rows} as gold_and_proxy.py makes them, and for each of ROADS
{"ROAD, fits": {"gold", "proxy"}} as gao.py does."""

import math

import numpy as np
import torch

from nanoroads.experiments.gao import terms
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import (
    differences,
    in_errors,
    lead,
    means_with_errors,
    over_seeds,
    values_of,
    with_errors,
)
from nanoroads.report.write import plus_minus, table

ROADS = {"best of n": "d", "rl": "ln d", "dpo": "ln d"}  # {road: x of its form d (a - b x)}


# ---------------------------------------------------------------- what is compared


def changes_from_peak(by_seed, road):
    """{"mean", "se"} of gold and of the proxy: the last setting less the one where gold peaks.

    The peak is the setting with the largest mean."""
    peak = peak_of(by_seed, road)
    changes = []
    for name in ("gold", "proxy"):
        changes.append(differences(values_of(by_seed, road, -1, name), values_of(by_seed, road, peak, name)))
    return changes


def peak_of(by_seed, road, end=None):
    """The place, among a road's settings before `end`, where the mean of gold over seeds is largest."""
    places = range(len(by_seed[0][road]))[:end]
    gold = [over_seeds(by_seed, road, place, "gold")["mean"] for place in places]
    return gold.index(max(gold))


def falls_text(by_seed, road, title, knob):
    """The claim that gold falls from its peak, with the proxy's change. knob: the name of what is set."""
    settings = values_of(by_seed[0][road], "setting")
    peak = peak_of(by_seed, road)
    if peak == len(settings) - 1:
        second = peak_of(by_seed, road, peak)
        more = lead(by_seed, [road, peak, "gold"], [road, second, "gold"])
        return (
            f"{title} over-optimises: gold is still at its largest at {knob} {settings[peak]}, above that at "
            f"{settings[second]} by {with_errors(more)}."
        )
    gold, proxy = changes_from_peak(by_seed, road)
    return (
        f"{title} over-optimises: from {knob} {settings[peak]}, where gold peaks, to {settings[-1]} gold "
        f"changes by {with_errors(gold)}, the proxy by {with_errors(proxy, 2)}."
    )


def loss_text(by_seed):
    """What DPO's held-out loss does from the beta where gold peaks to each smaller one, and where it ends."""
    betas = values_of(by_seed[0]["dpo"], "setting")
    peak = peak_of(by_seed, "dpo")
    changes = []
    for place in range(peak + 1, len(betas)):
        change = with_errors(lead(by_seed, ["dpo_loss", place], ["dpo_loss", peak]))
        changes.append(f"{change}, to {betas[place]}")
    loss = over_seeds(by_seed, "dpo_loss", len(betas) - 1)
    text = f"at {betas[-1]} it is {plus_minus(loss)}, {in_errors(loss, math.log(2))} (ln 2)"
    if changes:
        text = f"from {betas[peak]} on it changes by {' and by '.join(changes)}; {text}"
    return f"Its held-out loss: {text}."


def fits_text(by_seed, road, above):
    """The claim that Gao's form fits both measures of a road with an R2 above a bound."""
    found = []
    for name, of in (("gold", "of gold"), ("proxy", "of the proxy")):
        r2 = over_seeds(by_seed, f"{road}, fits", name, "r2")
        found.append(f"{plus_minus(r2)} {of}, {in_errors(r2, above)}")
    return f"Gao's form d (a - b {ROADS[road]}) fits {road} with R2 above {above}: {'; '.join(found)}."


def lead_at_equal_kl(results, place):
    """Gold of best of n, on straight lines from SFT to n to n, less RL's at a place among its settings."""
    rl = results["rl"][place]
    kls = [0.0] + values_of(results["best of n"], "kl")
    gold = [0.0] + values_of(results["best of n"], "gold")
    return float(np.interp(rl["kl"], kls, gold)) - rl["gold"]


# ---------------------------------------------------------------- table and figure


def table_of(by_seed):
    """The settings of each road, and Gao's fits."""
    points = []
    fits = []
    for road, form in ROADS.items():
        for place, row in enumerate(by_seed[0][road]):
            cells = means_with_errors(by_seed, (road, place), ("kl", "gold", "proxy"))
            points.append([road, str(row["setting"])] + cells)
        for name in ("gold", "proxy"):
            cells = means_with_errors(by_seed, (f"{road}, fits", name), ("a", "b", "r2"))
            fits.append([road, name, f"d (a - b {form})"] + cells)
    text = table(["road", "n, kl or beta", "KL, nats", "gold - SFT's", "proxy - SFT's"], points)
    return text + "\n" + table(["road", "of", "form, d = sqrt KL", "a", "b", "R2"], fits)


def figure_of(by_seed):
    """Gold and proxy against sqrt KL: points of all seeds, and the curves of the mean fits."""
    fig, axes = new_figure(11, 4.2, ncols=2)
    for ax, name in zip(axes, ("gold", "proxy"), strict=True):
        draw(ax, by_seed, "best of n", name, "s", INK, "best of n = 2 to 64")
        draw(ax, by_seed, "rl", name, "^", COLOURS["rlhf_global"], "RL, kl 1 to .05")
        draw(ax, by_seed, "dpo", name, "o", COLOURS["dpo"], "DPO, beta 1 to .05")
        d, along = points_of(by_seed, "along rl", name)
        ax.plot(d, along, ".", color="#f0b48a", zorder=0, label="along RL, kl .05")
        ax.axhline(0, color=COLOURS["sft"], lw=0.8, ls=":")
        ax.set(xscale="log", xlabel="d = sqrt KL(policy || SFT), KL in nats")
        ax.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        ax.minorticks_off()
    axes[0].set(title="Gold: the true reward", ylabel="true reward - SFT's")
    axes[1].set(title="Proxy: the reward model's score", ylabel="score - SFT's")
    axes[1].legend()
    return fig


def draw(ax, by_seed, road, name, marker, colour, label):
    """A road's points of all seeds, and its form with the means of a and b over seeds."""
    d, height = points_of(by_seed, road, name)
    ax.plot(d, height, marker, color=colour, ms=5, mfc="none")
    a = over_seeds(by_seed, f"{road}, fits", name, "a")["mean"]
    b = over_seeds(by_seed, f"{road}, fits", name, "b")["mean"]
    x = torch.linspace(d.min(), d.max(), 200, dtype=torch.float64)
    y = terms(x, ROADS[road]) @ torch.tensor([a, b], dtype=torch.float64)
    ax.plot(x, y, color=colour, label=label)


def points_of(by_seed, road, name):
    """d, and gold or proxy, of all settings of all seeds."""
    points = []
    for results in by_seed:
        points += results[road]
    d = torch.tensor(values_of(points, "kl"), dtype=torch.float64).sqrt()
    return d, values_of(points, name)
