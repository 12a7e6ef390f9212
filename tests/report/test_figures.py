"""Figures hold the numbers they are given: the heights, points and labels that a reader looks at."""

import itertools
import math

import matplotlib as mpl
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nanoroads.errors import InputError
from nanoroads.report import figures
from nanoroads.world.roadmap import STATES


def cell(mean):
    return {"mean": mean, "se": 0.01}


RESULTS = {
    "policies": {
        n: {"reward": cell(0.1 * i), "greedy_reward": cell(0.2 * i)} for i, n in enumerate(figures.NAMES, 1)
    },
    "reward_models": {
        n: {"best_of_n": {"1": 0.2, "4": 0.3, "16": 0.4 + i}}
        for i, n in enumerate(("dpo", "local", "global"))
    },
    "best_of_n_true_reward": {"1": 0.2, "4": 0.5, "16": 0.9},
    "equivalence": {"kl_dpo_sft": 1.25},
}


def test_rewards_are_the_heights_of_the_bars_and_the_numbers_on_them(tmp_path):
    fig = figures.rewards(RESULTS)
    ax = fig.axes[0]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])  # sampled
    numbers = [text.get_text() for text in ax.texts]
    assert numbers == ["0.100", "0.200", "0.300", "0.400", "0.500"]
    assert "held-out" in ax.get_title("left") and "samples" in ax.get_title("left")
    fig.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_a_road_has_one_colour_in_every_figure():
    colour = figures.COLOURS
    assert len(set(colour.values())) == len(colour) == len(figures.NAMES)
    bars = figures.rewards(RESULTS).axes[0].patches
    assert [mpl.colors.to_hex(bar.get_facecolor()) for bar in bars] == [colour[n] for n in figures.NAMES]
    lines = figures.best_of_n(RESULTS).axes[0].lines
    assert lines[0].get_color() == colour["dpo"] and lines[2].get_color() == colour["rlhf_global"]
    assert lines[1].get_color() not in colour.values()  # the local reward model is on no road
    assert figures.equivalence(RESULTS, []).axes[0].lines[0].get_color() == colour["rlhf_local"]
    maps = figures.routes({**RESULTS, "routes": ROUTES}).axes
    for ax, name in zip(maps, ("sft", "dpo"), strict=True):
        assert colour[name] in {line.get_color() for line in ax.lines}


def test_the_colours_differ_for_the_colour_blind():
    """Under simulated deuteranopia and protanopia (Vienot et al., 1999) no two of them are close."""
    simulations = [
        [[0.29275, 0.70725, -0.02234], [0.29275, 0.70725, 0.02234], [0, 0, 1]],
        [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]],
    ]
    for matrix in simulations:
        seen = []
        for colour in [*figures.COLOURS.values(), figures.FAILED]:
            linear = [value**2.2 for value in mpl.colors.to_rgb(colour)]
            mixed = [sum(a * b for a, b in zip(row, linear, strict=True)) for row in matrix]
            seen.append([max(0.0, value) ** (1 / 2.2) for value in mixed])
        for one, other in itertools.combinations(seen, 2):
            assert math.dist(one, other) > 0.14


def test_best_of_n_and_equivalence_are_the_points_of_the_lines():
    lines = figures.best_of_n(RESULTS).axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [
        [0.2, 0.3, 0.4],
        [0.2, 0.3, 1.4],
        [0.2, 0.3, 2.4],
        [0.2, 0.5, 0.9],
    ]
    assert list(lines[0].get_xdata()) == [1, 4, 16]
    rows = [{"step": 10, "kl": 3.0}, {"step": 100, "kl_compare": 0.5}, {"step": 200, "kl_compare": 0.25}]
    line = figures.equivalence(RESULTS, rows).axes[0].lines[0]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 100, 200], [1.25, 0.5, 0.25])


def boxes_of_texts(fig):
    """Where each text of the first axes stands, in pixels."""
    FigureCanvasAgg(fig).draw()
    return [text.get_window_extent() for text in fig.axes[0].texts]


def test_best_of_n_names_every_line_and_none_hides_another():
    equal = {"1": 0.2, "4": 0.3, "16": 0.4}
    results = {
        "reward_models": {name: {"best_of_n": equal} for name in ("dpo", "local", "global")},
        "best_of_n_true_reward": equal,
    }
    fig = figures.best_of_n(results)
    boxes = boxes_of_texts(fig)
    assert len(boxes) == 4
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert 0 <= box.x0 and box.x1 <= fig.bbox.x1 and 0 <= box.y0 and box.y1 <= fig.bbox.y1
    styles = {(line.get_linestyle(), line.get_linewidth()) for line in fig.axes[0].lines}
    assert len(styles) == 4


@pytest.mark.parametrize("kls", [[0.07, 0.016, 0.003], [0.2, 0.19, 0.18], [0.5, 0.1, 0.6]])
def test_no_label_of_the_equivalence_is_struck_through(kls):
    rows = [{"step": 100 * (i + 1), "kl_compare": kl} for i, kl in enumerate(kls)]
    fig = figures.equivalence(RESULTS, rows)
    boxes = boxes_of_texts(fig)
    texts = [text.get_text() for text in fig.axes[0].texts]
    assert texts[0] == "1.250, the SFT policy" and texts[1:] == [f"{kl:.3f}" for kl in kls]
    line = fig.axes[0].lines[0]
    path = line.get_transform().transform_path(line.get_path())
    falling = sorted(kls, reverse=True) == kls  # what it does unless the theorem fails
    if falling:
        assert not any(path.intersects_bbox(box, filled=False) for box in boxes)
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)


# ---------------------------------------------------------------- the map

ROUTES = {
    "rule": "Prompts: those of this test.",
    "prompts": [{"prompt": "WA>CA:", "samples": {"sft": {">NV": 3, ">OR>CA": 1}, "dpo": {">OR>CA": 4}}}],
}


def test_routes_say_what_each_policy_earns_and_how_the_prompts_were_chosen(tmp_path):
    fig = figures.routes({**RESULTS, "routes": ROUTES})
    titles = [ax.get_title("left") for ax in fig.axes]
    # WA>NV is no road; WA>OR>CA earns 0.95.
    assert titles == ["WA>CA   SFT: 0.24", "WA>CA   DPO: 0.95"]
    words = fig.get_suptitle()
    assert "4 samples" in words and "Prompts: those of this test." in words
    assert "Mean over all held-out prompts: SFT 0.100; DPO 0.200." in words
    fig.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_every_state_is_named_and_words_that_are_none_are_left_out(tmp_path):
    fig, ax = figures.new_figure(10, 6)
    figures.draw_samples(ax, "WA>FL:", {">OR>WA>XX>OR>OR>FL": 1}, "#0072b2")
    fig.savefig(tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 20_000
    assert sorted(text.get_text() for text in ax.texts if text.get_text()) == STATES
    dashed = [line for line in ax.lines if line.is_dashed()]
    assert len(dashed) == 1  # OR>FL; from OR to itself there is nothing to draw
    bold = {text.get_text() for text in ax.texts if text.get_weight() == "bold"}
    assert bold - {""} == {"WA", "OR", "FL"}


def test_routes_that_earn_lie_beside_those_that_do_not():
    """Also where they drive the same road the other way."""
    for failing in (">OR>NV", ">OR>WA"):
        _, ax = figures.new_figure(10, 6)
        figures.draw_samples(ax, "WA>OR:", {">OR": 1, failing: 1}, "#0072b2")
        earning = next(line for line in ax.lines if line.get_color() == "#0072b2")
        grey = [line for line in ax.lines if line.get_color() == figures.FAILED]
        x, y = earning.get_xdata()[0], earning.get_ydata()[0]
        apart = []
        for line in grey:
            for end in (0, 1):
                apart.append(math.dist((x, y), (line.get_xdata()[end], line.get_ydata()[end])))
        assert min(apart) == pytest.approx(figures.LANE)


def test_the_wider_a_road_the_more_samples_take_it():
    fig, ax = figures.new_figure(4, 3)
    figures.draw_samples(ax, "WA>CA:", {">OR>CA": 3, ">OR>NV>CA": 1, ">NV": 2}, "#0072b2")
    widths = {}  # {colour: widths of its hops}
    for line in ax.lines:
        widths.setdefault(line.get_color(), []).append(line.get_linewidth())
    narrow, wide = figures.NARROWEST, figures.WIDEST
    earning = [narrow + wide * count / 6 for count in (4, 3, 1, 1)]  # WA>OR, OR>CA, OR>NV, NV>CA
    assert widths["#0072b2"] == pytest.approx(earning)  # in the order of the samples, on every run
    assert widths[figures.FAILED] == pytest.approx([narrow + wide * 2 / 6])
    dashed = [line for line in ax.lines if line.get_color() == figures.FAILED]
    assert dashed[0].is_dashed()  # WA>NV is no road


def test_a_malformed_prompt_is_refused():
    fig, ax = figures.new_figure(4, 3)
    with pytest.raises(InputError, match="start and a goal"):
        figures.draw_samples(ax, "WAFL:", {">OR": 1}, "#000000")
