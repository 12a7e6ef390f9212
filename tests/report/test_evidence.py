"""What the experiments share: flags, runs, statistics over seeds, files."""

import json
import math

import pytest

from nanoroads.report import evidence
from nanoroads.report.drawing import new_figure, save


def test_flags(capsys):
    args = evidence.parse_flags("A claim.", ["--seeds", "2", "0", "2"])
    assert args.seeds == [2, 0] and str(args.out) == "out/experiments" and args.jobs == 2
    with pytest.raises(SystemExit) as stopped:
        evidence.parse_flags("A claim.", ["--seeds", "x"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_shared_phases(tmp_path):
    phases = evidence.shared_phases(tmp_path, 3, "rlhf_global")
    made = []
    for phase in phases:
        made += [str(path.relative_to(tmp_path)) for path in phase.results]
    assert made == ["sft", "sft/pairs.jsonl", "sft/pairs_test.jsonl", "rlhf_global"]
    for phase in phases:
        assert phase.command[phase.command.index("--seed") + 1] == "3"
        assert all(need.startswith(str(tmp_path)) for need in phase.needs)


def test_regularised_phases(tmp_path):
    phases = {}
    for phase in evidence.regularised_phases(tmp_path, 3, [0.3, 0.05], [0.5, 1]):
        phases[str(phase.result.relative_to(tmp_path))] = phase.command
    shared = ["sft", "sft/pairs.jsonl", "dpo", "rlhf_global"]
    assert list(phases) == [*shared, "dpo_beta_0.05", "rlhf_kl_1"]  # .3 and .5 are the shared ones
    assert "--beta 0.05" in " ".join(phases["dpo_beta_0.05"])
    assert f"--reward {tmp_path}/rlhf_global/reward --kl 1" in " ".join(phases["rlhf_kl_1"])


def test_statistics_over_seeds():
    rows = [{"dpo": {"reward": 1.0}}, {"dpo": {"reward": 2.0}}, {"dpo": {"reward": 6.0}}]
    cell = evidence.over_seeds(rows, "dpo", "reward")
    assert cell["mean"] == pytest.approx(3) and cell["se"] == pytest.approx(math.sqrt(7 / 3))
    # Seed by seed: what the seeds share falls out.
    cell = evidence.differences([1.0, 2.0, 6.0], [0.5, 1.6, 5.4])
    assert cell["mean"] == pytest.approx(0.5) and cell["se"] == pytest.approx(0.1 / math.sqrt(3))
    rows = [{"one": {"a": [1.0]}, "other": {"a": [0.5]}}, {"one": {"a": [2.0]}, "other": {"a": [1.0]}}]
    assert evidence.lead(rows, "one", "other", "a", 0) == {"mean": 0.75, "se": pytest.approx(0.25)}
    rows = [{"rl": [{"kl": 1.0, "gold": 3.0}]}, {"rl": [{"kl": 2.0, "gold": 5.0}]}]
    assert evidence.means_with_errors(rows, ("rl", 0), ("gold", "kl"), 1) == ["4.0 ± 1.0", "1.5 ± 0.5"]


def drawing():
    fig, ax = new_figure(3, 2)
    ax.plot([0, 1], [0, 1], label="a line")
    ax.legend()
    return fig


def test_the_same_drawing_is_the_same_file(tmp_path):
    for name in ("one.svg", "two.svg"):
        save(drawing(), tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert ">a line</text>" in text and "<dc:date>" not in text


def test_results(tmp_path, capsys):
    args = evidence.parse_flags("", ["--seeds", "4", "--out", str(tmp_path)])
    doc = "\nThe claim, in one line.\n\nMore.\n"
    evidence.write_results(args, "name", doc, [{"a": 1}], "| a |\n", ["yes: it holds"], drawing())
    written = json.loads((tmp_path / "name/results.json").read_text())
    assert written.pop("seconds") >= 0
    assert written == {
        "claim": "The claim, in one line.",
        "seeds": [4],
        "verdict": ["yes: it holds"],
        "by_seed": [{"a": 1}],
    }
    assert (tmp_path / "name/table.md").read_text() == "| a |\n\nyes: it holds\n"
    assert (tmp_path / "name/figure.svg").exists() and "yes: it holds" in capsys.readouterr().out
