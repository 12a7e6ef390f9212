"""What experiments/overoptimisation.py compares of its points, and its table and figure.

`by_seed` has of each seed {road: rows} as gold_and_proxy.py makes them, and for each of ROADS
{"ROAD, fits": {"gold", "proxy"}} as gao.py does."""

import math

import numpy as np
import torch

from nanoroads.experiments.gao import terms
from nanoroads.report.cells import above, below, claim, every, in_errors, plus_minus, with_errors
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import differences, means_with_errors, over_seeds, values_of
from nanoroads.report.write import table

ROADS = {"best of n": "d", "rl": "ln d", "dpo": "ln d"}  # {road: x of its form d (a - b x)}


# ---------------------------------------------------------------- what is compared


def changes_from_peak(by_seed, road):
    """{"mean", "se"} of gold and of the proxy: the last setting less that of `peaks_of`, seed by seed."""
    changes = []
    for name in ("gold", "proxy"):
        at_peak = [row[road][peak][name] for row, peak in zip(by_seed, peaks_of(by_seed, road), strict=True)]
        changes.append(differences(values_of(by_seed, road, -1, name), at_peak))
    return changes


def peaks_of(by_seed, road):
    """For each seed the place, among a road's settings but the last, where the others' mean gold is largest.

    Of the seeds that choose a peak none is measured from it: its own noise would make each peak a fall. One
    seed alone chooses its own."""
    peaks = []
    for seed in range(len(by_seed)):
        others = by_seed[:seed] + by_seed[seed + 1 :]
        peaks.append(peak_of(others or by_seed, road))
    return peaks


def peak_of(by_seed, road):
    """The place, among a road's settings but the last, where the mean of gold over seeds is largest."""
    places = range(len(by_seed[0][road]) - 1)
    return max(places, key=lambda place: over_seeds(by_seed, road, place, "gold")["mean"])


def peaks_text(by_seed, road):
    """The settings of `peaks_of`, and what has chosen them."""
    settings = [str(by_seed[0][road][peak]["setting"]) for peak in peaks_of(by_seed, road)]
    if len(set(settings)) == 1:
        settings = settings[:1]
    chosen_on = "the other seeds" if len(by_seed) > 1 else "the same seed"
    return f"{', '.join(settings)}, the peak of gold before the end in {chosen_on},"


def falls_line(by_seed, road, title, knob):
    """Whether gold falls from its peak to the last setting, while the proxy rises if the road climbs it.

    knob: the name of what is set."""
    settings = values_of(by_seed[0][road], "setting")
    gold, proxy = changes_from_peak(by_seed, road)
    holds = [below(gold)]
    if road != "dpo":
        holds.append(above(proxy))
    text = f"{title} over-optimises: from {knob} {peaks_text(by_seed, road)} to {settings[-1]} gold changes "
    text += f"by {with_errors(gold)}, the proxy by "
    return claim(every(holds), f"{text}{with_errors(proxy, 2)}.")


def loss_text(by_seed):
    """What DPO's held-out loss does from the beta where gold peaks to each smaller one, and where it ends."""
    betas = values_of(by_seed[0]["dpo"], "setting")
    peaks = peaks_of(by_seed, "dpo")
    at_peak = [row["dpo_loss"][peak] for row, peak in zip(by_seed, peaks, strict=True)]
    changes = []
    for place in range(max(peaks) + 1, len(betas)):
        change = differences(values_of(by_seed, "dpo_loss", place), at_peak)
        changes.append(f"{with_errors(change)}, to {betas[place]}")
    loss = over_seeds(by_seed, "dpo_loss", len(betas) - 1)
    text = f"Its held-out loss: from there on it changes by {' and by '.join(changes)}; at "
    return f"{text}{betas[-1]} it is {plus_minus(loss)}, {in_errors(loss, math.log(2))} (ln 2)."


def fits_line(by_seed, road, least):
    """The claim that Gao's form fits both measures of a road with an R2 above `least`."""
    gold, proxy = [over_seeds(by_seed, f"{road}, fits", name, "r2") for name in ("gold", "proxy")]
    text = f"Gao's form d (a - b {ROADS[road]}) fits {road} with R2 above {least}: {plus_minus(gold)} of "
    text += f"gold, {in_errors(gold, least)}; {plus_minus(proxy)} of the proxy, {in_errors(proxy, least)}."
    return claim(every([above(gold, least), above(proxy, least)]), text)


def lead_at_equal_kl(results, place):
    """Gold of best of n, on straight lines from SFT to n to n, less RL's at a place among its settings.

    nan beyond the largest n."""
    rl = results["rl"][place]
    kls = [0.0] + values_of(results["best of n"], "kl")
    gold = [0.0] + values_of(results["best of n"], "gold")
    return float(np.interp(rl["kl"], kls, gold, right=np.nan)) - rl["gold"]


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
