"""python -m nanoroads.report.curves: which panels, which lines, which runs are refused."""

import json

import pytest
from matplotlib.colors import to_hex

from nanoroads.errors import InputError
from nanoroads.report import curves
from nanoroads.report.drawing import COLOURS


def make_run(folder, rows, tail="", **config):
    """A run's folder as far as curves.py looks."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"nanoroads": "dpo", "stage": "dpo", **config}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def dpo_rows(shift=0.0):
    rows = []
    for step in (10, 20, 30):
        row = {"step": step, "loss": 0.7 - step / 100 + shift, "accuracy": 0.5, "margin": 0.1 * step}
        row.update(chosen_logp=-10.0 - step, rejected_logp=-12.0 - step)
        rows.append(row)
    rows[2].update(eval_loss=0.6, eval_accuracy=0.55, eval_chosen_logp=-11.0, eval_rejected_logp=-13.0)
    rows[2].update(map_kl=1.5, map_reward=0.4)
    return rows


RL_ROWS = [{"step": 10 * i, "loss": 0.1, "reward": i**2, "kl": 2.0 * i, "length": 5} for i in range(1, 10)]


def panels_of(*folders):
    """{title: axes} of the figure of these runs, without empty axes."""
    fig = curves.figure_of(curves.read_runs(list(folders)))
    return {ax.get_title(loc="left"): ax for ax in fig.axes if ax.axison}, fig


def lines_of(ax, colour=COLOURS["dpo"]):
    """What is drawn in this colour: (alpha, style, points)."""
    lines = []
    for line in ax.lines:
        if to_hex(line.get_color()) == colour:
            points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            lines.append((line.get_alpha(), line.get_linestyle(), points))
    return lines


def test_the_panels_are_those_of_what_the_runs_have(tmp_path):
    dpo = make_run(tmp_path / "dpo", dpo_rows())
    panels, _ = panels_of(dpo)
    common = ["loss", "accuracy", "margin", "log-prob, rejected dashed"]
    assert list(panels) == [*common, "true reward against KL"]
    rl = make_run(tmp_path / "rl", RL_ROWS)
    panels, fig = panels_of(rl)
    assert list(panels) == ["loss", "reward against KL", "reward", "length, tokens"]
    panels, fig = panels_of(dpo, rl)  # of different stages
    assert len(panels) == 8 and len(lines_of(panels["loss"])) == 2
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["dpo", "rl"]


def test_training_batches_are_pale_and_what_is_held_out_is_strong(tmp_path):
    panels, _ = panels_of(make_run(tmp_path / "dpo", dpo_rows()))
    pale, strong = lines_of(panels["loss"])
    assert pale == (0.3, "-", [(10, pytest.approx(0.6)), (20, pytest.approx(0.5)), (30, pytest.approx(0.4))])
    assert strong == (None, "-", [(30, 0.6)])
    chosen, held_out_chosen, rejected, held_out_rejected = lines_of(panels["log-prob, rejected dashed"])
    assert (chosen[1], rejected[1]) == ("-", "--") and rejected[2][0] == (10, -22)
    assert held_out_chosen[2] == [(30, -11)] and held_out_rejected[1:] == ("--", [(30, -13)])
    (true_reward, last) = lines_of(panels["true reward against KL"])
    assert true_reward[2] == last[2] == [(1.5, 0.4)]


def test_a_row_that_lacks_one_of_two_measures_is_no_point(tmp_path):
    rows = [{"step": 10, "kl": 1.0}, {"step": 20, "reward": 2.0}, {"step": 30, "kl": 3.0, "reward": 4.0}]
    panels, _ = panels_of(make_run(tmp_path / "rl", rows))
    assert lines_of(panels["reward against KL"])[0][2] == [(3, 4)]
    assert lines_of(panels["reward"])[0][2] == [(20, 2), (30, 4)]


def test_without_held_out_values_a_mean_is_strong(tmp_path):
    panels, _ = panels_of(make_run(tmp_path / "rl", RL_ROWS))
    pale, strong = lines_of(panels["reward"])
    assert pale[2] == [(row["step"], row["reward"]) for row in RL_ROWS]
    assert strong[2][0] == (10, (1 + 4 + 9 + 16) / 4)
    assert strong[2][4] == (50, sum(i**2 for i in range(2, 9)) / 7)
    pale, strong, last = lines_of(panels["reward against KL"])
    assert pale[2] == [(row["kl"], row["reward"]) for row in RL_ROWS]
    assert strong[2][4] == (10, sum(i**2 for i in range(2, 9)) / 7)  # KL is smoothed, too
    assert strong[2][0] == (5, 7.5) and last[2] == strong[2][-1:]
    # The reference, at a KL of zero, is in the picture.
    assert panels["reward against KL"].get_xlim()[0] < 0 < panels["reward"].get_xlim()[0] + 20


def test_each_run_has_a_colour_and_a_name_of_its_own(tmp_path):
    names = ["a/dpo", "b/dpo", "_x", "$x_", "bad\x1b[2J"]
    folders = [make_run(tmp_path / name, dpo_rows(shift)) for shift, name in enumerate(names)]
    panels, fig = panels_of(*folders)
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels == [str(folders[0]), str(folders[1]), "./_x", r"\$x_", r"bad\x1b[2J"]
    assert len({line.get_color() for line in panels["margin"].lines}) == 5
    assert len(set(curves.colours_of(20))) == 20
    fig.savefig(tmp_path / "a.svg")


def test_a_run_that_was_killed_is_drawn_as_far_as_it_came(tmp_path):
    folder = make_run(tmp_path / "dpo", dpo_rows(), tail='{"step": 40, "lo')
    panels, _ = panels_of(folder)
    assert [x for x, _ in lines_of(panels["margin"])[0][2]] == [10, 20, 30]


@pytest.mark.parametrize(
    "config, metrics, words",
    [
        (None, "", "none: no such run"),
        ('{"model_type": "llama"}', '{"step": 1}\n', "none: is no run of nanoroads"),
        ('{"stage": "dpo"}', None, "none/metrics.jsonl: no such file"),
        ('{"stage": "dpo"}', '{"step": 1', "none/metrics.jsonl: holds no line yet"),
        ('{"stage": "dpo"}', '{"loss": 1}\n{"step": 2}\n', "metrics.jsonl:1: not a JSON object"),
        ('{"stage": "dpo"}', '{"step": 1, "loss": "x"}\n', "step 1: loss is 'x', no number"),
        ('{"stage": "dpo"}', '{"step": 1, "other": 1}\n', "none of these runs has logged a measure"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(config, metrics, words, tmp_path):
    folder = tmp_path / "none"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    if metrics is not None:
        (folder / "metrics.jsonl").write_text(metrics)
    with pytest.raises(InputError, match=words) as error:
        curves.main([str(folder), "--out", str(tmp_path / "x.svg")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.svg").exists()


def test_the_command_writes_a_white_svg_and_only_over_its_own(tmp_path, capsys):
    run = make_run(tmp_path / "dpo", dpo_rows())
    out = tmp_path / "new/curves.svg"
    for _ in range(2):  # the second time over the first
        curves.main([str(run), str(run), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n{out}\n"
    assert "<svg" in out.read_text() and "#ffffff" in out.read_text() and ">dpo</text>" in out.read_text()
    for name in ("notes.svg", "metrics.jsonl"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError, match=name):
            curves.main([str(run), "--out", str(tmp_path / name)])
        assert (tmp_path / name).read_text() == "mine"
