"""The table, the figure and some words of experiments/verify_not_generate.py.

`by_seed` has of each seed {road: {measure: {group: mean}}}, where a road is one of GENERATORS, a measure
accuracy, valid, greedy or legal, and a group one of verifies_and_generates.py's `groups_of`."""

from nanoroads.experiments.verifies_and_generates import DISTANCES, FAR
from nanoroads.report.cells import in_errors, plus_minus
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import over_seeds, values_of
from nanoroads.report.write import table

# What each road verifies by, and what generates; with RLHF these are two models, the head and the policy.
VERIFIERS = {
    "sft": "log pi of SFT",
    "dpo": "implicit reward of DPO",
    "rlhf": "scalar head",
    "imitation": "implicit reward of imitation",
}
GENERATORS = {
    "sft": "SFT",
    "dpo": "DPO",
    "rlhf": "RL on the scalar head",
    "imitation": "SFT on the chosen routes",
}
GOALS = {"all": "whatever the goal", FAR: "three moves from the goal or more"}  # groups of the verdict


def bounds_text(by_seed, group, verifies_above, generates_below):
    """The claim that on a group of pairs DPO verifies and does not generate, with its numbers."""
    accuracy = over_seeds(by_seed, "dpo", "accuracy", group)
    valid = over_seeds(by_seed, "dpo", "valid", group)
    greedy = over_seeds(by_seed, "dpo", "greedy", group)
    return (
        f"{GOALS[group]}, DPO's implicit reward ranks more than {verifies_above} of the pairs right "
        f"({plus_minus(accuracy)}, {in_errors(accuracy, verifies_above)}), and its policy generates less "
        f"than {generates_below} valid routes ({plus_minus(valid)}, {in_errors(valid, generates_below)}; "
        f"greedy {plus_minus(greedy)})."
    )


def table_of(by_seed):
    """A row for each model: how it verifies, then how its policy generates, for the same prompts."""
    head = ["verifier", "accuracy", "ends elsewhere", "illegal hop"]
    head += ["its policy", "valid, T = 1", "valid, greedy", "legal, T = 1"]
    lines = []
    for name, verifier in VERIFIERS.items():
        cells = []
        for group in ("all", "ends elsewhere", "illegal hop"):
            cells.append(plus_minus(over_seeds(by_seed, name, "accuracy", group)))
        cells.append(GENERATORS[name])
        for measure in ("valid", "greedy", "legal"):
            cells.append(plus_minus(over_seeds(by_seed, name, measure, "all")))
        lines.append([verifier] + cells)
    return table(head, lines)


def figure_of(by_seed):
    """Accuracy and valid routes against the distance of the goal."""
    fig, (verify, generate) = new_figure(10, 3.8, ncols=2, sharey=True)
    colours = {"sft": COLOURS["sft"], "dpo": COLOURS["dpo"], "rlhf": COLOURS["rlhf_global"]}
    colours["imitation"] = COLOURS["rlhf_local"]
    for ax, measure, labels in ((verify, "accuracy", VERIFIERS), (generate, "valid", GENERATORS)):
        for name, label in labels.items():
            cells = [over_seeds(by_seed, name, measure, group) for group in DISTANCES]
            means = values_of(cells, "mean")
            errors = values_of(cells, "se")
            ax.errorbar(list(DISTANCES), means, errors, fmt="o-", color=colours[name], capsize=3, label=label)
        ax.set(xlabel="moves from the start to the goal", ylim=(-0.03, 1.03))
        ax.legend()
    verify.set(title="verify: held-out pairs ranked right", ylabel="share")
    verify.axhline(0.5, color=INK, lw=0.8, ls=":")
    generate.set(title="generate: samples that are valid")
    return fig
