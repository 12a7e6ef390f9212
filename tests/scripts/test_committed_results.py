"""What the repository shows of each experiment is what its code makes of the numbers beside it."""

import json
from pathlib import Path

import pytest
from matplotlib.container import ErrorbarContainer

from experiments import (
    best_of_n,
    data_size,
    displacement,
    horizon,
    hypotheses,
    misspecified,
    on_policy,
    overoptimisation,
    prior_of_local,
    reward_classes,
    theorem_3_1,
    token_cues,
    verify_not_generate,
    wider_data,
)
from nanoroads.experiments.theorem_3_1 import curves_of
from nanoroads.report.compared import policies_figure, policies_table
from nanoroads.report.evidence import mean_se


def results_of(script):
    """The folder with a script's results, and its numbers: a row for each seed, if it has seeds."""
    folder = Path(script.__file__).with_suffix("")
    results = json.loads((folder / "results.json").read_text())
    return folder, results, results.get("by_seed", results)


def curves(rows):
    return curves_of(rows, theorem_3_1.SIMPLE_SIZES, theorem_3_1.GPT_SIZES)


TABLES = {
    best_of_n: lambda rows: policies_table(rows, best_of_n.LABELS),
    data_size: lambda rows: data_size.table_of(rows, data_size.SIZES, "pairs"),
    displacement: lambda rows: displacement.table_of(rows, displacement.RUNS),
    horizon: lambda rows: horizon.table_of(rows, horizon.WORLDS, "most moves"),
    hypotheses: lambda rows: policies_table(rows, hypotheses.LABELS),
    misspecified: misspecified.table_of,
    on_policy: lambda rows: on_policy.table_of(rows, on_policy.BETAS, on_policy.ROUNDS),
    overoptimisation: overoptimisation.table_of,
    prior_of_local: prior_of_local.table_of,
    reward_classes: lambda rows: reward_classes.table_of(rows, reward_classes.LADDER),
    theorem_3_1: lambda rows: theorem_3_1.table_of(rows, curves(rows), theorem_3_1.RLOO_PAIRS),
    token_cues: token_cues.table_of,
    verify_not_generate: verify_not_generate.table_of,
    wider_data: lambda rows: policies_table(rows, wider_data.LABELS),
}


@pytest.mark.parametrize("script", TABLES, ids=lambda script: script.__name__)
def test_claim_verdict_and_table(script):
    folder, results, rows = results_of(script)
    lines = script.verdict(rows)
    assert results["claim"] == script.__doc__.splitlines()[0] and results["verdict"] == lines
    text = TABLES[script](rows) + "".join(f"\n{line}\n" for line in lines)
    assert (folder / "table.md").read_text() == text


# ---------------------------------------------------------------- figures

FIGURES = {
    best_of_n: lambda rows: policies_figure(rows, best_of_n.LABELS, ""),
    displacement: lambda rows: displacement.figure_of(rows, displacement.DPO_RUNS, displacement.RLHF_RUNS),
    hypotheses: lambda rows: policies_figure(rows, hypotheses.LABELS, ""),
    on_policy: lambda rows: on_policy.figure_of(rows, on_policy.BETAS, on_policy.ROUNDS),
    theorem_3_1: lambda rows: theorem_3_1.figure_of(rows, curves(rows)),
    token_cues: token_cues.figure_of,
    verify_not_generate: verify_not_generate.figure_of,
    wider_data: lambda rows: policies_figure(rows, wider_data.LABELS, ""),
}
GUESSING = {0.0, 0.5}  # lines that the figures have beside their numbers


def numbers_of(rows):
    """All numbers of all seeds, and the mean over seeds of each."""
    if isinstance(rows[0], dict):
        found = set()
        for name in rows[0]:
            found |= numbers_of([row[name] for row in rows])
        return found
    if isinstance(rows[0], list):
        found = set()
        for parts in zip(*rows, strict=True):
            found |= numbers_of(list(parts))
        return found
    if isinstance(rows[0], str):
        return set()
    return {*rows, mean_se(rows)["mean"]}


@pytest.mark.parametrize("script", FIGURES, ids=lambda script: script.__name__)
def test_what_is_drawn_are_the_numbers(script):
    _, _, rows = results_of(script)
    known = numbers_of(rows)
    drawn = 0
    for ax in FIGURES[script](rows).axes:
        heights = [bar.get_height() for bar in ax.patches]
        places = []
        error_bars = [container for container in ax.containers if isinstance(container, ErrorbarContainer)]
        of_error_bars = []
        for container in error_bars:
            of_error_bars += container.get_children()
            points = container.lines[0]  # None: those of bars
            if points is not None:
                heights += list(points.get_ydata())
                places += list(points.get_xdata())
        for line in ax.lines:
            if line not in of_error_bars:
                heights += list(line.get_ydata())
        if script in (best_of_n, hypotheses, wider_data):  # rows of points: their numbers lie along x
            heights = places
        for height in heights:
            assert height in known or height in GUESSING, (script.__name__, height)
        drawn += len(set(heights))
    assert drawn > 4
