"""Curves of true reward against pairs, table and figure of experiments/theorem_3_1.py.

seeds: of each seed the results {"sft", "optimum", "rloo", "simple", "dpo 1000", ...}, "simple" being
{"checks 30": numbers of both roads over R_sim, ...}.
"""

import math

from nanoroads.experiments.simple_rewards import CLASSES
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import in_errors, is_above, is_below, over_seeds, values_of
from nanoroads.report.write import plus_minus, table

NAMES = {  # of the curves
    "checks": "both roads over R_sim, which has the true reward",
    "roads": "both roads over R_sim without the goal",
    "dpo": "DPO, unrestricted",
    "rlhf": "RLHF, a GPT as its reward model",
}


def furthest_apart(seeds, pairs):
    """How far parameters or log-probs of the two roads over R_sim are apart, the most of any seed."""
    apart = 0.0
    for name in CLASSES:
        for distance in ("parameters_apart", "logp_apart"):
            apart = max([apart] + values_of(seeds, "simple", f"{name} {pairs}", distance))
    return apart


def curves_of(seeds, simple_sizes, gpt_sizes):
    """{road: {pairs: {"mean", "se"}}} of the true reward over seeds."""
    curves = {}
    for name in CLASSES:
        curves[name] = {n: over_seeds(seeds, "simple", f"{name} {n}", "dpo") for n in simple_sizes}
    for road in ("dpo", "rlhf"):
        curves[road] = {n: over_seeds(seeds, f"{road} {n}") for n in gpt_sizes}
    return curves


def pairs_needed(curve, goal, reaches):
    """The fewest pairs from which on a curve reaches `goal`; infinity: more than there are.

    reaches(cell, goal): whether {"mean", "se"} does."""
    needed = math.inf
    for n in reversed(curve):
        if not reaches(curve[n], goal):
            break
        needed = n
    return needed


def shown(cell, goal):
    """Whether a mean is shown to be above the goal."""
    return is_above(cell, goal)


def possible(cell, goal):
    """Whether a mean is not shown to be below the goal."""
    return not is_below(cell, goal)


def needs_fewer(curves, goal):
    """Whether "checks" needs fewer pairs for `goal` than either GPT, and how many each needs, in words.

    By two standard errors: "checks" as many as are shown to do, the GPTs the fewest that may do."""
    needed = {"checks": pairs_needed(curves["checks"], goal, shown)}
    for road in ("dpo", "rlhf"):
        needed[road] = pairs_needed(curves[road], goal, possible)
    words = {}
    for road, n in needed.items():
        number = f"{n:,}"
        if n == math.inf:
            n = max(curves[road])
            number = f"more than {n:,}"
        cell = curves[road][n]
        words[road] = f"{number} ({plus_minus(cell)} there, {in_errors(cell, goal)})"
    return needed["checks"] < min(needed["dpo"], needed["rlhf"]), words


def table_of(seeds, curves, rloo_pairs):
    """True rewards, and how far the two roads over R_sim are apart."""
    lines = []
    for name in ("sft", "optimum", "rloo"):
        pairs = rloo_pairs if name == "rloo" else ""
        lines.append([name, str(pairs), plus_minus(over_seeds(seeds, name)), "", ""])
    for road, curve in curves.items():
        for n, cell in curve.items():
            apart = ["", ""]
            if road in CLASSES:
                fits = [row["simple"][f"{road} {n}"] for row in seeds]
                apart = [f"{max(fit[key] for fit in fits):.0e}" for key in ("parameters_apart", "kl_apart")]
            lines.append([road, str(n), plus_minus(cell), *apart])
    return table(["policy", "pairs", "true reward", "parameters apart", "KL apart, nats"], lines)


def figure_of(seeds, curves):
    """True reward against pairs."""
    fig, ax = new_figure(7, 4)
    styles = {
        "checks": ("o-", COLOURS["rlhf_local"]),
        "roads": ("o--", COLOURS["sft"]),
        "dpo": ("s-", COLOURS["dpo"]),
        "rlhf": ("^-", COLOURS["rlhf_global"]),
    }
    for road, curve in curves.items():
        style, colour = styles[road]
        means = [cell["mean"] for cell in curve.values()]
        errors = [cell["se"] for cell in curve.values()]
        ax.errorbar(list(curve), means, errors, fmt=style, color=colour, capsize=3, label=NAMES[road])
    for name in ("sft", "optimum"):
        height = over_seeds(seeds, name)["mean"]
        ax.axhline(height, color=INK, lw=0.8, ls=":")
        ax.annotate(name, (min(curves["checks"]), height), (0, 3), textcoords="offset points")
    ax.set(xscale="log", xlabel="pairs", ylabel="true reward", title="How many pairs each search needs")
    ax.legend()
    return fig
