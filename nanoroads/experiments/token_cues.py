"""The table, the figure and the wording of the verdict of experiments/token_cues.py."""

from matplotlib.figure import Figure

from nanoroads.experiments.two_names import WRITINGS
from nanoroads.report.cells import above, claim, every, plus_minus, with_errors
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import over_seeds, values_of
from nanoroads.report.write import table

REFERENCES = {  # of two_names.KNOWN
    "two_names": "SFT has seen mixed routes",
    "two_names_unmixed": "SFT has seen no mixed route",
}
HEADS = {"head_3e-4": "scalar head at rate 3e-4", "head_1e-3": "scalar head at rate 1e-3"}
LABELS = {"implicit": "implicit reward of DPO", **HEADS}
BARS = [COLOURS["dpo"], COLOURS["rlhf_global"], "#e69f00"]  # the last is Okabe and Ito's, too
TICKS = ["as trained\n>OR>NV>UT", "renamed\n>or>nv>ut", "mixed\n>OR>nv>UT"]


def leads_of_heads(by_seed: list[dict], reference: str, writing: str) -> list[list[float]]:
    """For each head, by how much its accuracy is above that of DPO's implicit reward, seed by seed."""
    implicit = values_of(by_seed, reference, "implicit", writing, "true_order")
    by_head = []
    for head in HEADS:
        accuracies = values_of(by_seed, reference, head, writing, "true_order")
        by_head.append([a - b for a, b in zip(accuracies, implicit, strict=True)])
    return by_head


def verdict_line(text: str, cells: list[dict[str, float]]) -> str:
    """A line of the verdict. cells: {"mean", "se"} of each head; the claim is that all are above 0."""
    found = []
    for label, cell in zip(HEADS.values(), cells, strict=True):
        found.append(f"{with_errors(cell)} ({label})")
    return claim(every(map(above, cells)), f"{text}: {'; '.join(found)}.")


def table_of(by_seed: list[dict]) -> str:
    """Accuracies: a row for each reference and reward model, a column for each writing."""
    rows = []
    for reference, title in REFERENCES.items():
        for name, label in LABELS.items():
            cells = []
            for writing in WRITINGS:
                cells.append(plus_minus(over_seeds(by_seed, reference, name, writing, "true_order")))
            rows.append([title, label] + cells)
    return table(["reference", "accuracy of the", *WRITINGS], rows)


def figure_of(by_seed: list[dict]) -> Figure:
    """The same as bars: a panel for each reference, a group for each writing; guessing is dotted."""
    fig, axes = new_figure(10.5, 3.9, ncols=2, sharey=True)
    for ax, (reference, title) in zip(axes, REFERENCES.items(), strict=True):
        for place, (name, label) in enumerate(LABELS.items()):
            cells = [over_seeds(by_seed, reference, name, writing, "true_order") for writing in WRITINGS]
            left = [group + 0.27 * (place - 1) for group in range(len(WRITINGS))]
            means, errors = values_of(cells, "mean"), values_of(cells, "se")
            ax.bar(left, means, 0.25, yerr=errors, color=BARS[place], capsize=2, label=label)
        ax.axhline(0.5, color=INK, lw=0.8, ls=":")
        ax.set_xticks(range(len(WRITINGS)), TICKS)
        ax.set(title=title, ylim=(0.0, 1.0))
    axes[0].set(ylabel="accuracy, by the true reward")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig
