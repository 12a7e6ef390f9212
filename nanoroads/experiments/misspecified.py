"""Table and figure of experiments/misspecified.py.

results: {"pairs", "classes", "unseen"}, of each example {case: {road: value}}.
"""

from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.write import table

LABELS = {"dpo": "DPO", "rlhf": "RLHF", "online": "online DPO", "reference": "reference"}
COLOUR = {
    "dpo": COLOURS["dpo"],
    "rlhf": COLOURS["rlhf_global"],
    "online": COLOURS["rlhf_local"],
    "reference": INK,
}


def table_of(results):
    """The three examples as one Markdown table."""
    lines = []
    for example, measure in (("pairs", "E[r]"), ("classes", "E[r] - 0.2 KL"), ("unseen", "E[r]")):
        for name, row in results[example].items():
            line = [example, name, measure]
            for road in LABELS:
                line.append(f"{row[road]:+.4f}" if road in row else "-")
            lines.append(line)
    return table(["example", "case", "measure", *LABELS.values()], lines)


def figure_of(results):
    """One panel an example."""
    fig, (pairs, classes, unseen) = new_figure(13, 3.8, ncols=3)
    shares = [float(share) for share in results["pairs"]]
    for road in ("dpo", "rlhf", "reference"):
        heights = [row[road] for row in results["pairs"].values()]
        pairs.plot(shares, heights, "o-", color=COLOUR[road], ms=3, label=LABELS[road])
    pairs.set(title="pairs: which are compared", xlabel="share of pairs (y1, y2)", ylabel="E[r]")
    for place, road in enumerate(("dpo", "rlhf", "online")):
        heights = [row[road] - row["reference"] for row in results["classes"].values()]
        left = [case + 0.27 * (place - 1) for case in range(4)]
        classes.bar(left, heights, 0.25, color=COLOUR[road], label=LABELS[road])
    classes.set_xticks(range(4), list(results["classes"]))
    classes.set(
        title="classes: which is too small", ylabel="E[r] - 0.2 KL, above the reference", ylim=(0, 0.4)
    )
    for case, style, label in (("policy", "-", "y1, y2 share features"), ("nobody", "--", "they share none")):
        mass = results["unseen"][case]["dpo_mass_on_y3"]
        unseen.plot(
            range(10, 10 * len(mass) + 1, 10), mass, style, color=COLOUR["dpo"], label=f"DPO, {label}"
        )
    unseen.set(title="unseen: mass on y3", xlabel="gradient step", ylabel="pi(y3)", ylim=(-0.03, 1.03))
    for ax in (pairs, classes, unseen):
        ax.legend()
    return fig
