"""Curves of true reward against pairs, table and figure of experiments/theorem_3_1.py.

seeds: of each seed the results {"sft", "optimum", "rloo", "simple", "dpo 1000", ...}, "simple" being
{"checks 30": numbers of both roads over R_sim, ...}.
"""

import numpy as np

from nanoroads.experiments.simple_rewards import CLASSES
from nanoroads.report.cells import above, below, every, plus_minus, with_errors
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import differences, over_seeds, values_of
from nanoroads.report.write import table
from nanoroads.score import mean_se

NAMES = {  # of the curves
    "checks": "both roads over R_sim, which has the true reward",
    "roads": "both roads over R_sim without the goal",
    "dpo": "DPO, unrestricted",
    "rlhf": "RLHF, a GPT as its reward model",
}


def furthest_apart(seeds, pairs):
    """How far parameters or log-probs of the two roads over R_sim are apart, the most of any seed."""
    apart = []
    for name in CLASSES:
        for distance in ("parameters_apart", "logp_apart"):
            apart += values_of(seeds, "simple", f"{name} {pairs}", distance)
    return float(np.max(apart))  # which keeps a nan, as max does not


def path_of(road, pairs):
    """Where a seed's results have a road's true reward: a class of R_sim, "dpo" or "rlhf"."""
    return ("simple", f"{road} {pairs}", "dpo") if road in CLASSES else (f"{road} {pairs}",)


def curves_of(seeds, simple_sizes, gpt_sizes):
    """{road: {pairs: {"mean", "se"}}} of the true reward over seeds."""
    curves = {}
    for road in (*CLASSES, "dpo", "rlhf"):
        sizes = simple_sizes if road in CLASSES else gpt_sizes
        curves[road] = {n: over_seeds(seeds, *path_of(road, n)) for n in sizes}
    return curves


def few_are_enough(seeds, curves, share):
    """The claim that over "checks" its fewest pairs reach a share of the optimum's reward, which a GPT does
    not with its most. The goal is each seed's own.

    -> whether it holds, and words: {"goal": the mean one, road: its pairs, its reward, and how far that is
    from the goal}."""
    goals = [share * optimum for optimum in values_of(seeds, "optimum")]
    ends = {"checks": min(curves["checks"]), "dpo": max(curves["dpo"]), "rlhf": max(curves["rlhf"])}
    beyond = {}
    words = {"goal": f"{mean_se(goals)['mean']:.3f}"}
    for road, pairs in ends.items():
        beyond[road] = differences(values_of(seeds, *path_of(road, pairs)), goals)
        words[road] = f"{pairs:,} pairs ({plus_minus(curves[road][pairs])}, by {with_errors(beyond[road])})"
    return every([above(beyond["checks"]), below(beyond["dpo"]), below(beyond["rlhf"])]), words


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
                apart = [
                    f"{np.max([fit[key] for fit in fits]):.0e}" for key in ("parameters_apart", "kl_apart")
                ]
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
