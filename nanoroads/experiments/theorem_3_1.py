"""Curves of true reward against pairs, table and figure of experiments/theorem_3_1.py.

seeds: of each seed the results {"sft", "optimum", "rloo", "simple", "dpo 1000", ...}, "simple" being
{"checks 30": numbers of both roads over R_sim, ...}.
"""

from nanoroads.experiments.simple_rewards import CLASSES
from nanoroads.report.cells import above, below, every, in_errors, plus_minus
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import over_seeds, values_of
from nanoroads.report.write import table

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


def few_are_enough(curves, goal):
    """The claim that over "checks" its fewest pairs reach `goal`, which a GPT does not with its most.

    -> whether it holds, and in words the number of pairs and the reward of each."""
    ends = {"checks": min(curves["checks"]), "dpo": max(curves["dpo"]), "rlhf": max(curves["rlhf"])}
    cells = {road: curves[road][pairs] for road, pairs in ends.items()}
    holds = every([above(cells["checks"], goal), below(cells["dpo"], goal), below(cells["rlhf"], goal)])
    words = {}
    for road, pairs in ends.items():
        words[road] = f"{pairs:,} pairs ({plus_minus(cells[road])}, {in_errors(cells[road], goal)})"
    return holds, words


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
