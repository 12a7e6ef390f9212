"""Figures of all_roads.py."""

from collections import Counter
from itertools import pairwise
from math import dist, nan

from matplotlib.figure import Figure

from nanoroads.report.drawing import COLOURS, INK, NAMES, PALE, new_figure
from nanoroads.world.roadmap import NEIGHBOURS, ends, reward_parts

# ---------------------------------------------------------------- the map

# Rough centres of the states, degrees west and degrees north. The small ones of the north-east are
# pulled apart.
CENTRES = {
    "AL": (86.7, 32.7),
    "AR": (92.4, 34.8),
    "AZ": (111.7, 34.3),
    "CA": (120.0, 37.0),
    "CO": (105.5, 39.0),
    "CT": (71.2, 41.0),
    "DE": (73.6, 37.6),
    "FL": (82.0, 28.5),
    "GA": (83.2, 32.4),
    "IA": (93.4, 42.0),
    "ID": (114.4, 44.0),
    "IL": (89.2, 40.0),
    "IN": (86.0, 40.1),
    "KS": (98.3, 38.5),
    "KY": (85.2, 37.5),
    "LA": (92.3, 30.9),
    "MA": (70.4, 42.7),
    "MD": (75.9, 38.5),
    "ME": (66.6, 46.6),
    "MI": (84.9, 43.6),
    "MN": (94.4, 46.2),
    "MO": (92.5, 38.3),
    "MS": (89.6, 32.7),
    "MT": (109.6, 47.0),
    "NC": (79.0, 35.0),
    "ND": (100.4, 47.4),
    "NE": (99.7, 41.4),
    "NH": (69.2, 44.9),
    "NJ": (72.6, 39.4),
    "NM": (106.1, 34.3),
    "NV": (116.8, 39.3),
    "NY": (75.2, 43.0),
    "OH": (82.5, 40.6),
    "OK": (97.3, 35.4),
    "OR": (120.5, 43.9),
    "PA": (77.6, 40.9),
    "RI": (68.4, 40.9),
    "SC": (80.4, 33.2),
    "SD": (100.2, 44.4),
    "TN": (87.0, 35.7),
    "TX": (99.2, 31.4),
    "UT": (111.6, 39.4),
    "VA": (78.6, 37.1),
    "VT": (72.2, 45.4),
    "WA": (120.3, 47.4),
    "WI": (89.9, 44.5),
    "WV": (80.5, 38.9),
    "WY": (107.5, 43.0),
}
# Where a state is drawn, (x, y) in degrees of latitude: one of longitude is shorter here.
PLACE = {state: (-0.72 * west, north) for state, (west, north) in CENTRES.items()}
COAST = "WA OR CA AZ NM TX LA MS AL FL GA SC NC VA DE NJ CT RI MA NH ME VT NY PA OH MI WI MN ND MT".split()
LANE = 0.45  # degrees between routes that earn a reward and routes that earn none
LAND = "#f2f4f6"
FAILED = "#bfc4cb"  # of routes that earn none
NARROWEST, WIDEST = 0.8, 12.0  # width of a road, in points, if one route takes it and if all do


def draw_samples(ax, prompt: str, samples: dict[str, int], colour: str):
    """Draw the sampled routes of one prompt on the map: the more of them use a road, the wider it is.

    samples: {route: how often it was drawn}, as {">ID>WY>NE>MO>TN>GA>FL": 3}.
    Routes that earn a true reward are drawn in `colour`, the others in grey beside them. A hop that
    is no road is dashed. The start is a dark disc, the goal a star. Words that are no state are left
    out. Raises InputError for a malformed prompt."""
    start, goal = ends(prompt)
    earning = Counter()  # {hop: how many routes that earn a reward take it}
    failing = Counter()
    visited = {goal}
    for response, times in samples.items():
        states = [start] + [word for word in response.split(">") if word in PLACE]
        visited.update(states)
        counts = earning if reward_parts(prompt, response)["reward"] > 0 else failing
        for hop in dict.fromkeys(pairwise(states)):  # a route that goes round and round counts once
            counts[hop] += times

    draw_roads(ax)
    total = sum(samples.values())
    draw_hops(ax, failing, total, -LANE / 2, FAILED)
    draw_hops(ax, earning, total, LANE / 2, colour)
    for state in PLACE:
        draw_state(ax, state, state == start, state == goal, state in visited)
    ax.margins(0.05, 0.09)
    ax.set_aspect("equal")
    ax.axis("off")


def draw_roads(ax):
    """The land, and all roads on it."""
    x = [PLACE[state][0] for state in COAST]
    y = [PLACE[state][1] for state in COAST]
    ax.fill(x, y, color=LAND, lw=46, joinstyle="round", zorder=0, clip_on=False)
    # All roads are one line with gaps: a thousand lines of their own would make a large and slow file.
    x = []
    y = []
    for here, neighbours in NEIGHBOURS.items():
        for there in neighbours:
            if here < there:
                x += [PLACE[here][0], PLACE[there][0], nan]
                y += [PLACE[here][1], PLACE[there][1], nan]
    ax.plot(x, y, color=PALE, lw=1, zorder=1)


def draw_hops(ax, counts, total, lane, colour):
    """Hops of `total` routes. counts: {(here, there): how many of them take it}."""
    for (here, there), count in counts.items():
        if here != there:
            draw_hop(ax, here, there, lane, colour, width=NARROWEST + WIDEST * count / total)


def draw_hop(ax, here, there, lane, colour, width):
    """One hop, with an arrow in the middle. width: in points."""
    start, end = beside(PLACE[here], PLACE[there], lane)
    dashes = (0, (1.6, 1))
    style = "-" if there in NEIGHBOURS[here] else dashes
    draw_line(ax, start, end, ls=style, color=colour, lw=width, zorder=2)
    tip = between(start, end, 0.62)
    x = (end[0] - start[0]) / dist(start, end)  # one degree along the hop
    y = (end[1] - start[1]) / dist(start, end)
    back = (tip[0] - 0.5 * x, tip[1] - 0.5 * y)
    corners_x = [tip[0], back[0] - 0.3 * y, back[0] + 0.3 * y]
    corners_y = [tip[1], back[1] + 0.3 * x, back[1] - 0.3 * x]
    ax.fill(corners_x, corners_y, color=colour, lw=0.5, zorder=3)


def draw_state(ax, state, is_start, is_goal, is_named):
    """A disc with the name of the state; is_named: it is on a route or a goal."""
    x, y = PLACE[state]
    marker = "o"
    size = 215
    face = "white"
    edge = "#c3c8cf"
    ink = "#8b9099"
    weight = "normal"
    if is_named:
        edge = INK
        ink = INK
        weight = "bold"
    if is_goal:
        marker = "*"
        size = 900
        face = "#ffd23f"
    if is_start:
        face = INK
        ink = "white"
        size = 290
    ax.scatter(x, y, size, face, marker=marker, edgecolors=edge, linewidths=1.1, zorder=4)
    ax.text(x, y - 0.03, state, color=ink, size=7.5, weight=weight, ha="center", va="center", zorder=5)


def draw_line(ax, start, end, **style):
    """A straight line between two points (x, y)."""
    ax.plot([start[0], end[0]], [start[1], end[1]], **style)


def beside(start, end, lane):
    """The line between two points (x, y), moved `lane` degrees to its side -> its two ends.

    A lane is on the same side of the road whichever way the road is driven."""
    dx = end[0] - start[0]
    dy = end[1] - start[1]
    shift = lane / (dx**2 + dy**2) ** 0.5
    if dx <= 0:
        shift = -shift
    return (start[0] - dy * shift, start[1] + dx * shift), (end[0] - dy * shift, end[1] + dx * shift)


def between(start, end, fraction):
    """The point (x, y) at a fraction of the way from start to end."""
    return start[0] + (end[0] - start[0]) * fraction, start[1] + (end[1] - start[1]) * fraction


# ---------------------------------------------------------------- figures of the results

REWARD_MODELS = {
    "dpo": "DPO's implicit reward",
    "local": "local, without a reference",
    "global": "global: a scalar head",
}
# The global reward model and DPO's have the colours of their roads; the local one is on no road. Two
# of the lines hide each other, so one is wide and one dashed.
REWARD_MODEL_LINES = {
    "dpo": {"color": COLOURS["dpo"], "marker": "s"},
    "local": {"color": "#e69f00", "marker": "o", "lw": 4, "ms": 8},
    "global": {"color": COLOURS["rlhf_global"], "marker": "^", "ls": "--"},
}


def rewards(results: dict) -> Figure:
    """True reward of each policy's samples, with standard errors and the numbers."""
    fig, ax = new_figure(7, 3.6)
    policies = results["policies"]
    names = [name for name in NAMES if name in policies]
    means = [policies[name]["reward"]["mean"] for name in names]
    errors = [policies[name]["reward"]["se"] for name in names]
    error_style = {"ecolor": INK, "capsize": 3, "lw": 1}
    colours = [COLOURS[name] for name in names]
    bars = ax.bar(range(len(names)), means, 0.66, yerr=errors, color=colours, error_kw=error_style)
    ax.bar_label(bars, fmt="%.3f", padding=3, fontweight="bold")
    ax.set_xticks(range(len(names)), [NAMES[name].replace(", ", ",\n") for name in names])
    ax.set_ylabel("true reward")
    ax.margins(y=0.12)
    ax.set_title("True reward of samples at temperature 1, held-out prompts")
    return fig


def best_of_n(results: dict) -> Figure:
    """True reward of the sample that each reward model likes best, against N."""
    fig, ax = new_figure(6.6, 3.8)
    last = {}  # {label: (true reward at the largest N, colour)}
    for name, row in results["reward_models"].items():
        style = REWARD_MODEL_LINES[name]
        draw_best_of_n(ax, row["best_of_n"], **style)
        last[REWARD_MODELS[name]] = (list(row["best_of_n"].values())[-1], style["color"])
    truth = results["best_of_n_true_reward"]
    draw_best_of_n(ax, truth, color=INK, ls=":", lw=1.5)
    last["the true reward"] = (list(truth.values())[-1], INK)
    ax.set_xscale("log", base=2)
    ax.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    ax.set(xlabel="N samples of the SFT policy", ylabel="true reward of the favourite")
    ax.set_title("The best of N samples, as each reward model judges")
    label_ends(ax, max(int(n) for n in truth), last)
    return fig


def draw_best_of_n(ax, rewards_by_n, **style):
    """rewards_by_n: {"1": reward, ..., "16": reward}, as JSON has it."""
    ax.plot([int(n) for n in rewards_by_n], list(rewards_by_n.values()), **style)


def label_ends(ax, x, last):
    """Write the names of lines behind their ends, apart where the ends are not.

    last: {name: (y of the line's end, colour)}."""
    bottom, top = ax.get_ylim()
    spacing = 0.07 * (top - bottom)
    place = bottom - spacing  # of the name below
    for name, (y, colour) in sorted(last.items(), key=lambda item: item[1][0]):
        place = max(y, place + spacing)
        text = f"{name} {y:.3f}"
        ax.annotate(text, (x, place), (9, 0), textcoords="offset points", color=colour, va="center")
    ax.set_ylim(bottom, max(top, place))  # names of equal lines may need more room


def equivalence(results: dict, metrics: list[dict]) -> Figure:
    """KL(pi_DPO || pi) along RL on the local reward: Theorem 2.2 says that it falls to zero.

    metrics: the rows of that run's metrics.jsonl."""
    fig, ax = new_figure(6, 3.6)
    compared = [row for row in metrics if "kl_compare" in row]
    steps = [0] + [row["step"] for row in compared]
    kls = [results["equivalence"]["kl_dpo_sft"]] + [row["kl_compare"] for row in compared]
    ax.plot(steps, kls, "o-", color=COLOURS["rlhf_local"], clip_on=False)
    for step, kl in zip(steps, kls, strict=True):
        text = f"{kl:.3f}"
        if step == 0:
            text += ", the SFT policy"
        # To the upper right, where the line, which falls, does not pass.
        ax.annotate(text, (step, kl), (5, 5), textcoords="offset points")
    ax.set(
        xlabel="RL steps on DPO's own reward",
        ylabel="KL(DPO || policy), nats",
        title="How far RL on the local reward is from DPO's policy",
    )
    ax.set_ylim(0, 1.12 * max(kls))
    ax.margins(x=0.1)
    return fig


def routes(results: dict) -> Figure:
    """The samples that results["routes"] holds, a row of maps for each prompt, a column per policy."""
    shown = results["routes"]["prompts"]
    names = [name for name in NAMES if name in shown[0]["samples"]]
    rows, columns = len(shown), len(names)
    fig, axes = new_figure(5 * columns, 2.95 * rows + 0.8, nrows=rows, ncols=columns, squeeze=False)
    for row, axes_of_row in zip(shown, axes, strict=True):
        prompt = row["prompt"]
        for name, ax in zip(names, axes_of_row, strict=True):
            samples = row["samples"][name]
            draw_samples(ax, prompt, samples, COLOURS[name])
            mean = mean_reward(prompt, samples)
            ax.set_title(f"{prompt[:-1]}   {NAMES[name]}: {mean:.2f}", color=COLOURS[name])

    averages = [f"{NAMES[name]} {results['policies'][name]['reward']['mean']:.3f}" for name in names]
    sample_count = sum(shown[0]["samples"][names[0]].values())
    text = [
        f"{sample_count} samples of each policy at temperature 1, and their mean true reward. "
        "The wider a road, the more samples take it; grey: samples that earn nothing.",
        results["routes"]["rule"],
        f"Mean over all held-out prompts: {'; '.join(averages)}.",
    ]
    fig.suptitle("\n".join(text), fontsize=11, x=0.01, ha="left")
    return fig


def mean_reward(prompt, samples):
    """The mean true reward of samples as `draw_samples` takes them."""
    total = 0.0
    for response, times in samples.items():
        total += times * reward_parts(prompt, response)["reward"]
    return total / sum(samples.values())
