"""The project's style of drawing: `fig, ax = new_figure(10, 6)`, draw on `ax`, `save(fig, path)`.

No display is needed."""

import io

import matplotlib as mpl
from matplotlib.figure import Figure

INK = "#2b2d33"
PALE = "#d9dce1"
# A road has the same colour in every figure. Okabe and Ito's, which the colour-blind can tell apart.
COLOURS = {
    "sft": "#cc79a7",
    "dpo": "#0072b2",
    "rlhf_local": "#009e73",
    "rlhf_global": "#d55e00",
    "optimum": INK,
}
NAMES = {
    "sft": "SFT",
    "dpo": "DPO",
    "rlhf_local": "RLHF, local reward",
    "rlhf_global": "RLHF, global reward",
    "optimum": "shortest routes",
}
STYLE = {
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans", "Verdana"],  # an SVG names them in each of its texts
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
    # Text stays text: smaller files, and a page may choose its colour. The same drawing is the same file.
    "svg.fonttype": "none",
    "svg.hashsalt": "nanoroads",
}


def new_figure(width, height, **subplots):
    """A figure of width x height inches and its axes, in the project's style.

    subplots: arguments of Figure.subplots."""
    mpl.rcParams.update(STYLE)
    fig = Figure((width, height), dpi=150, layout="constrained")
    return fig, fig.subplots(**subplots)


def svg_bytes(fig):
    """What `save` writes to an SVG file."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def save(fig, path):
    """Write a figure as the path's suffix says, on a white ground, so that its ink shows on a dark page.

    The same drawing gives the same bytes."""
    fig.savefig(path, metadata={"Date": None})
