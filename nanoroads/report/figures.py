"""Figures of all_roads.py.

They need no display: `fig, ax = new_figure(10, 6)`, draw on `ax`, `fig.savefig(path)`.
"""

from itertools import pairwise

import matplotlib as mpl
from matplotlib.figure import Figure

from nanoroads.world.roadmap import NEIGHBOURS, ends, reward_parts

INK = "#2b2d33"
PALE = "#d9dce1"
# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def new_figure(width, height, **subplots):
    """A figure of width x height inches and its axes, in the project's style.

    subplots: arguments of Figure.subplots."""
    mpl.rcParams.update(STYLE)
    fig = Figure((width, height), dpi=150, layout="constrained")
    return fig, fig.subplots(**subplots)


# ---------------------------------------------------------------- the map

# Rough centres of the states, degrees west and degrees north. The small ones of the north-east are
# pulled apart.
CENTRES = {
    "AL": (86.7, 32.7),
    "AR": (92.4, 34.8),
    "AZ": (111.7, 34.3),
    "CA": (120.0, 37.0),
    "CO": (105.5, 39.0),
    "CT": (71.6, 40.6),
    "DE": (72.6, 37.9),
    "FL": (82.0, 28.5),
    "GA": (83.2, 32.4),
    "IA": (93.4, 42.0),
    "ID": (114.4, 44.0),
    "IL": (89.2, 40.0),
    "IN": (86.0, 40.1),
    "KS": (98.3, 38.5),
    "KY": (85.2, 37.5),
    "LA": (92.3, 30.9),
    "MA": (70.4, 42.6),
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
    "NJ": (72.9, 39.7),
    "NM": (106.1, 34.3),
    "NV": (116.8, 39.3),
    "NY": (75.2, 43.0),
    "OH": (82.5, 40.6),
    "OK": (97.3, 35.4),
    "OR": (120.5, 43.9),
    "PA": (77.6, 40.9),
    "RI": (68.5, 40.9),
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
LANE = 0.36  # degrees between two routes on the same road
LINE = 3.2  # width of a route, in points


def draw_map(ax, routes: dict[str, str]):
    """Draw the map and routes on it.

    routes: {label: prompt + response}, as {"DPO": "WA>FL:>ID>WY>NE>MO>TN>GA>FL"}. Routes that share
    a road lie side by side, with arrows for the direction. A hop that is no road is dashed. The
    start is a dark disc, the goal a star. Words that are no state are left out. Raises InputError
    for a malformed prompt."""
    prompt_length = len("WA>FL:")
    starts = set()
    goals = set()
    visited = {}  # {label: the states of its route, start included}
    for label, text in routes.items():
        start, goal = ends(text[:prompt_length])
        starts.add(start)
        goals.add(goal)
        words = text[prompt_length:].split(">")
        visited[label] = [start] + [word for word in words if word in PLACE]
    sharing = {}  # {road, whichever way it is driven: the labels of the routes that use it}
    for label, states in visited.items():
        for road in {tuple(sorted(hop)) for hop in pairwise(states)}:
            sharing.setdefault(road, []).append(label)

    draw_roads(ax)
    for i, (label, states) in enumerate(visited.items()):
        colour = COLOURS[i % len(COLOURS)]
        ax.plot([], [], color=colour, lw=LINE, label=label)  # for the legend
        for hop in dict.fromkeys(pairwise(states)):  # each hop once
            here, there = hop
            if here != there:
                labels = sharing[tuple(sorted(hop))]
                lane = LANE * (labels.index(label) - (len(labels) - 1) / 2)
                draw_hop(ax, here, there, lane, colour)
    named = goals.union(*visited.values())
    for state in PLACE:
        draw_state(ax, state, state in starts, state in goals, state in named)

    ax.margins(0.05, 0.09)
    ax.set_aspect("equal")
    ax.axis("off")
    if routes:
        ax.legend(loc="lower left", fontsize=10.5, handlelength=1.6)


def draw_roads(ax):
    """The land, and all roads on it."""
    x = [PLACE[state][0] for state in COAST]
    y = [PLACE[state][1] for state in COAST]
    ax.fill(x, y, color="#f2f4f6", lw=46, joinstyle="round", zorder=0, clip_on=False)
    for here, neighbours in NEIGHBOURS.items():
        for there in neighbours:
            draw_line(ax, PLACE[here], PLACE[there], color=PALE, lw=1, zorder=1)


def draw_hop(ax, here, there, lane, colour):
    """One hop of a route, with an arrow in the middle."""
    start, end = beside(PLACE[here], PLACE[there], lane)
    dashes = (0, (1.6, 1))
    style = "-" if there in NEIGHBOURS[here] else dashes
    draw_line(ax, start, end, ls=style, color=colour, lw=LINE, zorder=2)
    arrow = {
        "arrowstyle": "-|>,head_length=.6,head_width=.36",
        "color": colour,
        "lw": 0.5,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    ax.annotate("", between(start, end, 0.64), between(start, end, 0.4), arrowprops=arrow, zorder=3)


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
        if not is_goal:  # a start that is another route's goal stays a large star
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

NAMES = {
    "sft": "SFT",
    "dpo": "DPO",
    "rlhf_local": "RLHF, local reward",
    "rlhf_global": "RLHF, global reward",
    "optimum": "shortest routes",
}
REWARD_MODELS = {
    "dpo": "DPO's implicit reward",
    "local": "local, without reference",
    "global": "global: scalar head",
}


def rewards(results: dict) -> Figure:
    """True reward of each policy, sampled and greedy, with standard errors."""
    fig, ax = new_figure(7, 3.6)
    policies = results["policies"]
    names = [name for name in NAMES if name in policies]
    draw_bars(ax, [policies[name]["reward"] for name in names], -0.19, "sampled at temperature 1")
    draw_bars(ax, [policies[name]["greedy_reward"] for name in names], 0.19, "greedy")
    ax.set_xticks(range(len(names)), [NAMES[name].replace(", ", ",\n") for name in names])
    ax.set_ylabel("true reward")
    ax.set_title("Two roads from the same pairs")
    ax.legend(loc="upper left")
    return fig


def draw_bars(ax, cells, shift, label):
    """A bar for each {"mean", "se"}, moved from its tick by `shift`."""
    x = [tick + shift for tick in range(len(cells))]
    heights = [cell["mean"] for cell in cells]
    errors = [cell["se"] for cell in cells]
    ax.bar(x, heights, 0.36, yerr=errors, error_kw={"ecolor": INK, "capsize": 3, "lw": 1}, label=label)


def best_of_n(results: dict) -> Figure:
    """True reward of the sample that each reward model likes best, against N."""
    fig, ax = new_figure(5.2, 3.6)
    for name, row in results["reward_models"].items():
        draw_best_of_n(ax, row["best_of_n"], "o-", label=REWARD_MODELS[name])
    draw_best_of_n(ax, results["best_of_n_true_reward"], "--", color=INK, lw=1, label="true reward")
    ax.set_xscale("log", base=2)
    ax.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    ax.set(xlabel="N samples of the SFT policy", ylabel="true reward of the best", title="Best of N")
    ax.legend()
    return fig


def draw_best_of_n(ax, rewards_by_n, line, **style):
    """rewards_by_n: {"1": reward, ..., "16": reward}, as JSON has it."""
    ax.plot([int(n) for n in rewards_by_n], list(rewards_by_n.values()), line, **style)


def equivalence(results: dict, metrics: list[dict]) -> Figure:
    """KL(pi_DPO || pi) along RL on the local reward: Theorem 2.2 says that it falls to zero.

    metrics: the rows of that run's metrics.jsonl."""
    fig, ax = new_figure(5.2, 3.6)
    compared = [row for row in metrics if "kl_compare" in row]
    steps = [0] + [row["step"] for row in compared]
    kls = [results["equivalence"]["kl_dpo_sft"]] + [row["kl_compare"] for row in compared]
    ax.plot(steps, kls, "o-")
    for row in compared:
        point = (row["step"], row["kl_compare"])
        ax.annotate(f"{row['kl_compare']:.3f}", point, (0, 7), textcoords="offset points", ha="center")
    ax.set(
        xlabel="RL steps on DPO's own reward",
        ylabel="KL(DPO || policy), nats",
        title="The roads are one (Theorem 2.2)",
    )
    ax.set_ylim(bottom=0)
    return fig


def overoptimisation(rlhf: dict[str, list], dpo: dict[str, list]) -> Figure:
    """Three panels over KL: RLHF's true reward, its reward model's score, and DPO's true reward.

    rlhf, dpo: {label: rows of metrics.jsonl}, one run with a fair regulariser and one whose
    regulariser is too weak. RLHF's true reward and score are of the same samples."""
    fig, (rlhf_true, rlhf_score, dpo_true) = new_figure(12, 3.6, ncols=3)
    for label, rows in rlhf.items():
        draw_metric(rlhf_true, rows, "kl", "true_reward", "o", label)
        draw_metric(rlhf_score, rows, "kl", "reward", "o", label)
    for label, rows in dpo.items():
        evaluations = [row for row in rows if "map_kl" in row]
        draw_metric(dpo_true, evaluations, "map_kl", "map_reward", "o-", label)
    rlhf_true.set(title="RLHF: what is wanted", ylabel="true reward")
    rlhf_score.set(title="RLHF: what is maximised", ylabel="reward model's score")
    dpo_true.set(title="DPO", ylabel="true reward")
    for ax in (rlhf_true, rlhf_score, dpo_true):
        ax.margins(y=0.1)
        ax.set_xlabel("KL(policy || SFT), nats")
        ax.legend()
    for ax in (rlhf_true, dpo_true):
        ax.set_ylim(bottom=0)
    return fig


def draw_metric(ax, rows, x_name, y_name, line, label):
    """One metric of metrics.jsonl against another."""
    ax.plot([row[x_name] for row in rows], [row[y_name] for row in rows], line, ms=4, label=label)


def routes(by_policy: dict[str, dict[str, str]]) -> Figure:
    """A map for each policy with its greedy routes: {policy: {prompt: response}}, in any order."""
    fig, axes = new_figure(13, 8.6, nrows=2, ncols=2)
    names = [name for name in NAMES if name in by_policy]
    for ax, name in zip(axes.flat, names, strict=False):  # a panel without a policy stays empty
        labelled = {}
        true_rewards = []
        for prompt, response in by_policy[name].items():
            true_reward = reward_parts(prompt, response)["reward"]
            true_rewards.append(true_reward)
            labelled[f"{prompt[:-1]}   {true_reward:.2f}"] = prompt + response
        draw_map(ax, labelled)
        mean = sum(true_rewards) / len(true_rewards)
        ax.set_title(f"{NAMES[name]}: greedy routes, true reward {mean:.2f}")
    return fig
