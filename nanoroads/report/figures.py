"""Figures of the main job. They need no display: `fig, ax = new(10, 6)`, draw on `ax`, `fig.savefig(path)`."""

import matplotlib as mpl
from matplotlib.figure import Figure

from nanoroads.world.roadmap import NEIGHBOURS, ends, reward_parts

INK, PALE = "#2b2d33", "#d9dce1"
COLOURS = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
]  # Okabe and Ito: safe for the colour-blind
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


def new(width, height, **subplots):
    """A figure of width x height inches and its axes (arguments of Figure.subplots), in the project's style."""
    mpl.rcParams.update(STYLE)
    fig = Figure((width, height), dpi=150, layout="constrained")
    return fig, fig.subplots(**subplots)


# ---------------------------------------------------------------- the map

# Rough centres of the states: degrees west, degrees north; the small ones of the north-east are pulled apart.
CENTRES = """
AL 86.7 32.7 AR 92.4 34.8 AZ 111.7 34.3 CA 120.0 37.0 CO 105.5 39.0 CT 71.6 40.6 DE 72.6 37.9 FL 82.0 28.5 GA 83.2 32.4
IA 93.4 42.0 ID 114.4 44.0 IL 89.2 40.0 IN 86.0 40.1 KS 98.3 38.5 KY 85.2 37.5 LA 92.3 30.9 MA 70.4 42.6 MD 75.9 38.5
ME 66.6 46.6 MI 84.9 43.6 MN 94.4 46.2 MO 92.5 38.3 MS 89.6 32.7 MT 109.6 47.0 NC 79.0 35.0 ND 100.4 47.4 NE 99.7 41.4
NH 69.2 44.9 NJ 72.9 39.7 NM 106.1 34.3 NV 116.8 39.3 NY 75.2 43.0 OH 82.5 40.6 OK 97.3 35.4 OR 120.5 43.9 PA 77.6 40.9
RI 68.5 40.9 SC 80.4 33.2 SD 100.2 44.4 TN 87.0 35.7 TX 99.2 31.4 UT 111.6 39.4 VA 78.6 37.1 VT 72.2 45.4 WA 120.3 47.4
WI 89.9 44.5 WV 80.5 38.9 WY 107.5 43.0
""".split()
AT = {s: (-0.72 * float(w), float(n)) for s, w, n in zip(*(CENTRES[i::3] for i in range(3)), strict=True)}
COAST = "WA OR CA AZ NM TX LA MS AL FL GA SC NC VA DE NJ CT RI MA NH ME VT NY PA OH MI WI MN ND MT".split()


def draw_map(ax, routes):
    """Draw the map and routes on it. routes: {label: prompt + response}, as {"DPO": "WA>FL:>ID>WY>NE>MO>TN>GA>FL"}.

    Routes that share a road lie side by side, with arrows for the direction; a hop that is no road is dashed. The start
    is a dark disc, the goal a star. Words that are no state are left out. Raises InputError on a malformed prompt."""
    land = {"color": "#f2f4f6", "lw": 46, "joinstyle": "round", "zorder": 0, "clip_on": False}
    ax.fill(*zip(*(AT[s] for s in COAST), strict=True), **land)
    for a, neighbours in NEIGHBOURS.items():
        for b in neighbours:
            ax.plot(*zip(AT[a], AT[b], strict=True), color=PALE, lw=1, zorder=1)
    drives = {
        label: [text[:2], *(s for s in text[6:].split(">") if s in AT)] for label, text in routes.items()
    }
    prompts = [ends(text[:6]) for text in routes.values()]
    starts, goals = {p[0] for p in prompts}, {p[1] for p in prompts}
    hops = {label: list(zip(states, states[1:], strict=False)) for label, states in drives.items()}
    users = {}  # of each hop, whichever way it is driven: the routes that share it
    for label in routes:
        for hop in {tuple(sorted(hop)) for hop in hops[label]}:
            users.setdefault(hop, []).append(label)
    for label, colour in zip(routes, COLOURS * len(routes), strict=False):
        ax.plot([], [], color=colour, lw=3.2, label=label)
        for a, b in dict.fromkeys(hop for hop in hops[label] if hop[0] != hop[1]):
            sharing = users[min(a, b), max(a, b)]
            lane = 0.36 * (sharing.index(label) - (len(sharing) - 1) / 2)  # degrees to the side
            (x0, y0), (x1, y1) = AT[a], AT[b]
            shift = lane * (1 if x0 < x1 else -1) / ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
            x, y = (
                [x0 + (y0 - y1) * shift, x1 + (y0 - y1) * shift],
                [y0 + (x1 - x0) * shift, y1 + (x1 - x0) * shift],
            )
            ax.plot(x, y, ls="-" if b in NEIGHBOURS[a] else (0, (1.6, 1)), color=colour, lw=3.2, zorder=2)
            tail, head = [(x[0] + (x[1] - x[0]) * f, y[0] + (y[1] - y[0]) * f) for f in (0.4, 0.64)]
            arrow = {"arrowstyle": "-|>,head_length=.6,head_width=.36", "color": colour, "lw": 0.5}
            ax.annotate("", head, tail, arrowprops=arrow | {"shrinkA": 0, "shrinkB": 0}, zorder=3)
    seen = {state for states in drives.values() for state in states} | goals
    for state, (x, y) in AT.items():
        marker, size = ("*", 900) if state in goals else ("o", 290 if state in starts else 215)
        face = INK if state in starts else "#ffd23f" if state in goals else "white"
        edge, ink = (INK, INK) if state in seen else ("#c3c8cf", "#8b9099")
        ax.scatter(x, y, size, face, marker=marker, edgecolors=edge, linewidths=1.1, zorder=4)
        ink, weight = "white" if state in starts else ink, "bold" if state in seen else "normal"
        ax.text(x, y - 0.03, state, color=ink, size=7.5, weight=weight, ha="center", va="center", zorder=5)
    ax.margins(0.05, 0.09)
    ax.set_aspect("equal")
    ax.axis("off")
    if routes:
        ax.legend(loc="lower left", fontsize=10.5, handlelength=1.6)


# ---------------------------------------------------------------- the main job

NAMES = {
    "sft": "SFT",
    "dpo": "DPO",
    "rlhf_local": "RLHF, local reward",
    "rlhf_global": "RLHF, global reward",
    "optimum": "shortest routes",
}


def rewards(results):
    """True reward of each policy, sampled and greedy, with standard errors."""
    fig, ax = new(7, 3.6)
    names = [n for n in NAMES if n in results["policies"]]
    for i, (key, label) in enumerate((("reward", "sampled at temperature 1"), ("greedy_reward", "greedy"))):
        cells = [results["policies"][n][key] for n in names]
        x = [j + 0.38 * (i - 0.5) for j in range(len(names))]
        error = {"ecolor": INK, "capsize": 3, "lw": 1}
        ax.bar(
            x, [c["mean"] for c in cells], 0.36, yerr=[c["se"] for c in cells], error_kw=error, label=label
        )
    ax.set_xticks(range(len(names)), [NAMES[n].replace(", ", ",\n") for n in names])
    ax.set_ylabel("true reward")
    ax.set_title("Two roads from the same pairs")
    ax.legend(loc="upper left")
    return fig


def best_of_n(results):
    """True reward of the sample that each reward model likes best, against N."""
    fig, ax = new(5.2, 3.6)
    labels = {
        "dpo": "DPO's implicit reward",
        "local": "local, without reference",
        "global": "global: scalar head",
    }
    for name, row in results["reward_models"].items():
        ax.plot([int(n) for n in row["best_of_n"]], row["best_of_n"].values(), "o-", label=labels[name])
    truth = results["best_of_n_true_reward"]
    ax.plot([int(n) for n in truth], truth.values(), "--", color=INK, lw=1, label="true reward")
    ax.set_xscale("log", base=2)
    ax.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    ax.set(xlabel="N samples of the SFT policy", ylabel="true reward of the best", title="Best of N")
    ax.legend()
    return fig


def equivalence(results, metrics):
    """KL(pi_DPO || pi) along RL on the local reward: Theorem 2.2 says that it falls to zero."""
    fig, ax = new(5.2, 3.6)
    points = [(row["step"], row["kl_compare"]) for row in metrics if "kl_compare" in row]
    points = [(0, results["equivalence"]["kl_dpo_sft"]), *points]
    ax.plot(*zip(*points, strict=True), "o-")
    for step, kl in points[1:]:
        ax.annotate(f"{kl:.3f}", (step, kl), (0, 7), textcoords="offset points", ha="center")
    ax.set(
        xlabel="RL steps on DPO's own reward",
        ylabel="KL(DPO || policy), nats",
        title="The roads are one (Theorem 2.2)",
    )
    ax.set_ylim(bottom=0)
    return fig


def overoptimisation(rl, dpo):
    """Three panels against KL: true reward of RL's samples, the reward model's score of the same samples, and DPO's true
    reward; each with a fair regulariser and with one that is too weak. rl, dpo: {label: rows of metrics.jsonl}."""
    fig, (true, score, right) = new(12, 3.6, ncols=3)
    for label, rows in rl.items():
        kl = [row["kl"] for row in rows]
        true.plot(kl, [row["true_reward"] for row in rows], "o", ms=4, label=label)
        score.plot(kl, [row["reward"] for row in rows], "o", ms=4, label=label)
    for label, rows in dpo.items():
        rows = [row for row in rows if "map_kl" in row]
        right.plot(
            [row["map_kl"] for row in rows], [row["map_reward"] for row in rows], "o-", ms=4, label=label
        )
    true.set(title="RLHF: what is wanted", ylabel="true reward")
    score.set(title="RLHF: what is maximised", ylabel="reward model's score")
    right.set(title="DPO", ylabel="true reward")
    for ax in (true, score, right):
        ax.margins(y=0.1)
        ax.set_xlabel("KL(policy || SFT), nats")
        ax.legend()
    for ax in (true, right):
        ax.set_ylim(bottom=0)
    return fig


def routes(by_policy):
    """A map for each policy with its greedy routes. by_policy: {name: {prompt: response}}, in any order."""
    fig, axes = new(13, 8.6, nrows=2, ncols=2)
    for ax, name in zip(axes.flat, [n for n in NAMES if n in by_policy], strict=False):
        reward = {p: reward_parts(p, r)["reward"] for p, r in by_policy[name].items()}
        draw_map(ax, {f"{p[:-1]}   {reward[p]:.2f}": p + r for p, r in by_policy[name].items()})
        ax.set_title(f"{NAMES[name]}: greedy routes, true reward {sum(reward.values()) / len(reward):.2f}")
    return fig
