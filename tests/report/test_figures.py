"""Figures hold the numbers they are given: the heights, points and labels that a reader looks at."""

import pytest

from nanoroads.errors import InputError
from nanoroads.report import figures


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


def test_rewards_are_the_heights_of_the_bars(tmp_path):
    fig = figures.rewards(RESULTS)
    heights = sorted(bar.get_height() for bar in fig.axes[0].patches)
    assert heights == pytest.approx(sorted([0.1 * i for i in range(1, 6)] + [0.2 * i for i in range(1, 6)]))
    fig.savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5_000


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


def test_overoptimisation_shows_the_true_reward_and_the_score():
    rl = {
        "kl 0.5": [{"kl": 1.0, "true_reward": 0.4, "reward": -1.0}],
        "kl 0.05": [{"kl": 8.0, "true_reward": 0.1, "reward": 2.0}],
    }
    dpo = {"beta 0.3": [{"loss": 1.0}, {"map_kl": 1.5, "map_reward": 0.3}]}
    true, score, right = figures.overoptimisation(rl, dpo).axes
    points = lambda ax: [(*line.get_xdata(), *line.get_ydata()) for line in ax.lines]  # noqa: E731
    assert points(true) == [(1.0, 0.4), (8.0, 0.1)]
    assert points(score) == [(1.0, -1.0), (8.0, 2.0)]
    assert points(right) == [(1.5, 0.3)]


def test_routes_say_what_each_policy_earns(tmp_path):
    best = {"WA>CA:": ">OR>CA", "WA>NV:": ">OR>NV"}
    fig = figures.routes({"sft": {"WA>CA:": ">OR>CA", "WA>NV:": ">NV"}, "optimum": best})
    titles = [ax.get_title("left") for ax in fig.axes]
    assert titles[0] == "SFT: greedy routes, true reward 0.47"  # WA>NV is no road
    assert titles[1].endswith("0.95")
    labels = [line.get_label() for line in fig.axes[0].lines]
    assert "WA>CA   0.95" in labels and "WA>NV   0.00" in labels
    fig.savefig(tmp_path / "a.png")


def test_a_malformed_prompt_is_refused():
    fig, ax = figures.new_figure(4, 3)
    with pytest.raises(InputError, match="start and a goal"):
        figures.draw_map(ax, {"x": "WAFL:>OR"})
