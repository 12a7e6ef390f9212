"""The table and the figure of experiments/on_policy.py.

by_seed: of each seed {policy: {measure: number}}; pair_sources.py has the names of the policies. betas,
more_rounds: the script's BETAS and ROUNDS."""

from nanoroads.experiments.pair_sources import OFFLINE, ON_POLICY, RLHF_SAMPLES, SFT_SAMPLES, by_rounds, named
from nanoroads.report.cells import plus_minus
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import over_seeds
from nanoroads.report.write import table

MEASURES = {  # the columns
    "informative": "informative",
    "reward": "reward",
    "greedy_reward": "greedy",
    "kl_to_ref": "KL",
    "legal": "legal",
    "accuracy_sft": "true order, SFT's pairs",
    "accuracy_own": "true order, own pairs",
}
REWARDS = {"reward": "sampled", "greedy_reward": "greedy"}
ORANGE = "#e69f00"  # on-policy
LOOKS = {  # a marker and a colour for each source
    SFT_SAMPLES: ("s", COLOURS["dpo"]),
    ON_POLICY: ("^", ORANGE),
    OFFLINE: ("v", "#56b4e9"),
    RLHF_SAMPLES: ("D", INK),
}


def table_of(by_seed, betas, more_rounds):
    """A line a policy."""
    names = ["SFT"]
    for beta in betas:
        names += [*by_rounds(beta, more_rounds).values(), named(OFFLINE, beta), named(RLHF_SAMPLES, beta)]
    lines = []
    for name in [*names, "RLHF"]:
        cells = [name]
        for measure in MEASURES:
            measured = measure in by_seed[0][name]
            cells.append(plus_minus(over_seeds(by_seed, name, measure)) if measured else "")
        lines.append(cells)
    return table(["pairs", *MEASURES.values()], lines)


def figure_of(by_seed, betas, more_rounds):
    """Sampled and greedy reward against KL, a marker for each source; both against rounds."""
    fig, (sampled, greedy, rounds) = new_figure(14, 4.6, ncols=3, sharey=True)
    draw_sources(sampled, by_seed, betas, "reward")
    draw_sources(greedy, by_seed, betas, "greedy_reward")
    sampled.set(ylabel="true reward")
    fig.legend(*sampled.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    draw_rounds(rounds, by_seed, betas, more_rounds)
    return fig


def draw_sources(ax, by_seed, betas, measure):
    """A reward against KL; filled: the first beta, open: the second."""
    points = []
    for source, (marker, colour) in LOOKS.items():
        points.append((named(source, betas[0]), marker, colour, colour))
        points.append((named(source, betas[1]), marker, colour, "white"))
    points.append(("RLHF", "P", COLOURS["rlhf_global"], COLOURS["rlhf_global"]))
    for name, marker, colour, face in points:
        x = over_seeds(by_seed, name, "kl_to_ref")
        y = over_seeds(by_seed, name, measure)
        style = {"fmt": marker, "color": colour, "mfc": face, "ms": 8, "label": name}
        ax.errorbar(x["mean"], y["mean"], y["se"], x["se"], **style)
    ax.axhline(over_seeds(by_seed, "SFT", measure)["mean"], color=COLOURS["sft"], ls=":", label="SFT")
    ax.set(title=f"{REWARDS[measure]} reward", xlabel="KL to SFT, nats", xscale="log")
    ax.set_xticks([1, 2, 4], ["1", "2", "4"])
    ax.minorticks_off()


def draw_rounds(ax, by_seed, betas, more_rounds):
    """Both rewards against the number of rounds, beside RLHF's."""
    beside = {"textcoords": "offset points", "fontsize": 8}
    places = [1, *more_rounds]
    for beta, face in zip(betas, (ORANGE, "white"), strict=True):
        for measure, line in (("reward", "-"), ("greedy_reward", "--")):
            names = by_rounds(beta, more_rounds).values()
            cells = [over_seeds(by_seed, name, measure) for name in names]
            means = [cell["mean"] for cell in cells]
            errors = [cell["se"] for cell in cells]
            style = {"fmt": f"^{line}", "color": ORANGE, "mfc": face, "capsize": 3}
            ax.errorbar(places, means, errors, **style)
            ax.annotate(f"{REWARDS[measure]}, beta {beta}", (places[-1], means[-1]), (8, -3), **beside)
    for measure, word in REWARDS.items():
        height = over_seeds(by_seed, "RLHF", measure)["mean"]
        ax.plot([1, places[-1]], [height, height], color=COLOURS["rlhf_global"], lw=1)
        ax.annotate(f"RLHF, {word}", (1, height), (0, 4), **beside)
    ax.set(title="how often pairs are drawn", xlabel="rounds (1: DPO)", xscale="log", xlim=(0.8, 150))
    ax.set_xticks(places, [str(rounds) for rounds in places])
    ax.minorticks_off()
