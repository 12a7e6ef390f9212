"""Metrics of training runs, side by side: a panel for each measure, a colour for each run.

    python -m nanoroads.report.curves out/dpo
    python -m nanoroads.report.curves out/dpo out/rlhf out/rlhf/reward --out curves.svg

A pale line is of the batches that were trained on, a line with dots of what is held out. Where
nothing is held out the strong line is a mean of the training batches, over seven logged steps. In
the panels against KL a circle is the last step. Runs of different stages and runs that are not
finished are drawn as well; a run is a folder with config.json and metrics.jsonl.
"""

import math
from pathlib import Path
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib.lines import Line2D

from nanoroads.errors import InputError, printable
from nanoroads.report.drawing import COLOURS, INK, PALE, new_figure, save
from nanoroads.run.flags import Parser, run_script
from nanoroads.run.folder import read_metrics
from nanoroads.weights.files import read_config, write_atomic


class Panel(NamedTuple):
    """What is drawn over what."""

    title: str
    x: str  # a name in metrics.jsonl
    measures: dict[str, str]  # {name in metrics.jsonl: style of its line}


PANELS = [
    Panel("loss", "step", {"loss": "-"}),
    Panel("accuracy", "step", {"accuracy": "-"}),
    Panel("margin", "step", {"margin": "-"}),
    Panel("log-prob, rejected dashed", "step", {"chosen_logp": "-", "rejected_logp": "--"}),
    Panel("reward against KL", "kl", {"reward": "-"}),
    Panel("reward", "step", {"reward": "-"}),
    Panel("length, tokens", "step", {"length": "-"}),
    Panel("entropy, nats per token", "step", {"entropy": "-"}),
    Panel("true reward against KL", "map_kl", {"map_reward": "-"}),
]
X_LABELS = {"step": "step", "kl": "KL to the reference, nats", "map_kl": "KL to the reference, nats"}
ON_HELD_OUT = ("map_kl",)  # panels whose x is measured on held-out prompts
MOST_COLUMNS = 4
WINDOW = 7  # logged steps in a mean; odd


class Curves(NamedTuple):
    """A run that is drawn."""

    label: str
    rows: list[dict]  # of its metrics.jsonl


# ---------------------------------------------------------------- reading


def read_runs(folders: list[Path]) -> list[Curves]:
    """The runs with their labels: a folder's name, or its path where two have the same name.

    Raises InputError for a folder that is no run, and for a run that has logged nothing."""
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        if "stage" not in read_config(folder):
            raise InputError(f"{folder}: is no run of nanoroads; name a folder that a training script wrote")
        rows = read_metrics(folder, whole=False)
        if not rows:
            raise InputError(f"{folder}/metrics.jsonl: holds no line yet; wait until the run logs a step")
        check_numbers(folder, rows)
        label = name if names.count(name) == 1 else str(folder)
        runs.append(Curves(plain_label(label), rows))
    return runs


def check_numbers(folder, rows):
    """Raises InputError for a value that is no number."""
    for row in rows:
        for name, value in row.items():
            if not isinstance(value, (int, float)):
                place = f"{folder}/metrics.jsonl: step {row['step']}"
                raise InputError(f"{place}: {name} is {value!r}, no number")


def plain_label(text):
    """A folder's name as matplotlib shows it: "$" would begin a formula, "_" hide the entry."""
    text = printable(" ".join(text.split())).replace("$", r"\$")
    return f"./{text}" if text.startswith("_") else text


def points(rows: list[dict], x: str, y: str) -> tuple[list[float], list[float]]:
    """The values of x and of y in the rows that have both."""
    both = [row for row in rows if x in row and y in row]
    return [row[x] for row in both], [row[y] for row in both]


# ---------------------------------------------------------------- drawing


def figure_of(runs: list[Curves]):
    """The panels that a run has something for. Raises InputError if there is none."""
    panels = [panel for panel in PANELS if any(has(run, panel) for run in runs)]
    if not panels:
        raise InputError("none of these runs has logged a measure that is drawn")
    columns = min(MOST_COLUMNS, len(panels))
    if len(panels) in (5, 6, 9):  # which leave fewer places empty in three columns
        columns = 3
    lines = math.ceil(len(panels) / columns)
    fig, axes = new_figure(3.3 * columns, 2.7 * lines + 0.4, nrows=lines, ncols=columns, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    colours = colours_of(len(runs))
    for ax, panel in zip(axes.flat, panels, strict=False):  # the last line may have axes to spare
        ax.set(title=panel.title, xlabel=X_LABELS[panel.x])
        for run, colour in zip(runs, colours, strict=True):
            for name, style in panel.measures.items():
                draw(ax, run, panel, name, style, colour)
    handles = [Line2D([], [], color=colour) for colour in colours]
    labels = [run.label for run in runs]
    fig.legend(handles, labels, loc="outside upper left", ncols=min(6, len(runs)))
    return fig


def smooth(values: list[float]) -> list[float]:
    """Each value's mean with its neighbours, WINDOW in all, at the ends with as many as there are."""
    means = []
    for i in range(len(values)):
        around = values[max(0, i - WINDOW // 2) : i + WINDOW // 2 + 1]
        means.append(sum(around) / len(around))
    return means


def has(run, panel):
    """Whether a run has logged one of the panel's measures."""
    return any(points(run.rows, panel.x, name)[0] for name in panel.measures)


def draw(ax, run, panel, name, style, colour):
    """One measure of one run: of the training batches pale, over them what is held out, or a mean."""
    trained = points(run.rows, panel.x, name)
    strong = points(run.rows, panel.x, f"eval_{name}")
    if not trained[0]:
        return
    marker = "o"
    if panel.x in ON_HELD_OUT:
        strong = trained
    else:
        ax.plot(*trained, style, color=colour, lw=0.8, alpha=0.3)
        if not strong[0]:
            strong = (trained[0], smooth(trained[1]))
            if panel.x != "step":  # as noisy as what stands over it
                strong = (smooth(trained[0]), strong[1])
            marker = ""
    ax.plot(*strong, style, color=colour, marker=marker, ms=3)
    if panel.x != "step":
        ax.axvline(0, color=PALE, lw=0.8, zorder=0)  # the reference
        ax.plot(strong[0][-1:], strong[1][-1:], marker="o", ms=7, mfc="none", color=colour)


def colours_of(count):
    """A colour for each of `count` runs: of the roads' figures, from many runs on a scale."""
    if count <= len(COLOURS):
        return [COLOURS["dpo"], COLOURS["rlhf_global"], COLOURS["rlhf_local"], COLOURS["sft"], INK][:count]
    return [colormaps["viridis"](0.95 * i / (count - 1)) for i in range(count)]


# ---------------------------------------------------------------- the command


def check_place(path):
    """Raises InputError unless --out is a new .svg, or one that this command may have drawn."""
    if path.suffix != ".svg":
        raise InputError(f"--out {path}: must end in .svg")
    if path.exists() and not (path.is_file() and b"Matplotlib" in path.read_bytes()):
        raise InputError(f"--out {path}: exists, and is no figure of this command; move it away")


def main(argv=None):
    """Draw the runs' curves into one file."""
    parser = Parser("RUN [RUN ...]", description=__doc__)
    add = parser.add_argument_group("what is drawn").add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training run")
    out = Path("out/curves.svg")
    add("--out", type=Path, default=out, metavar="FILE.svg", help="the figure (default: %(default)s)")
    args = parser.parse_args(argv)
    check_place(args.out)
    fig = figure_of(read_runs(list(dict.fromkeys(args.runs))))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(args.out, lambda temporary: save(fig, temporary))
    print(args.out)


if __name__ == "__main__":
    run_script(main, resumes=False, less_memory=None)
