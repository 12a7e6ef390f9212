"""experiments/summarize.py over seeds: means, errors and verdicts by hand, out of files of single seeds."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers.made_up_summaries import made_up_measures, one_seed

from nanoroads.errors import InputError
from nanoroads.experiments import summaries_over_seeds
from nanoroads.report import page, summaries

EXAMPLE = {"document": "A  long\ntext.", "summary": "short"}
COMMITTED = Path(__file__).parents[2] / "experiments/summarize/results.json"


def over_seeds(*by_seed):
    return summaries.over_seeds_files([results["seed"] for results in by_seed], list(by_seed))


def test_means_and_errors_are_over_seeds():
    """Of .5, .6 and .7 the standard deviation is .1. What each seed says of its own error is not used."""
    by_seed = []
    for seed in range(3):
        accuracy = 0.6 + 0.03 * seed
        by_seed.append(one_seed(seed, one_line=made_up_measures(0.5 + 0.1 * seed, 9.0, accuracy)))
    results, files = over_seeds(*by_seed)
    measures = results["settings"]["one-line"]
    cell = {"mean": pytest.approx(0.6), "se": pytest.approx(0.1 / 3**0.5)}
    for policy in ("sft", "dpo", "rlhf"):
        assert measures["policies"][policy] == dict.fromkeys(summaries.COLUMNS, cell)
    assert measures["demos"] == measures["rlhf_minus_dpo"] == measures["rlhf_against_dpo"] == cell
    assert measures["accuracy"] == {"mean": pytest.approx(0.63), "se": pytest.approx(0.03 / 3**0.5)}
    assert (results["seeds"], results["by_seed"], results["seconds"]) == ([0, 1, 2], by_seed, 304.2)
    assert json.loads(files["results.json"]) == results

    text = files["report.md"].decode()
    assert "Seeds 0, 1, 2: standard errors are over seeds" in text
    assert f"| RLHF |{' 0.600 ± 0.058 |' * len(summaries.COLUMNS)}\n" in text
    gaps = "RLHF - DPO: 0.600 ± 0.058 nats of reward, 0.600 ± 0.058 of the objective"
    assert f"What SFT imitates has the reward 0.600 ± 0.058. {gaps}" in text
    # And each seed with the error of its own; sqrt(.63 .37 / 210) = .033.
    assert "| 1 | 0.600 ± 9.000 | 0.600 ± 9.000 | 0.600 ± 9.000 | 0.630 ± 0.033 |" in text
    assert "| 2 | 102 | 1.50 |" in text


def test_of_one_seed_errors_are_those_over_documents_and_pairs():
    results, files = over_seeds(one_seed(4, hidden=made_up_measures(0.52, 0.03)))
    measures = results["settings"]["hidden"]
    assert measures["policies"]["dpo"]["reward"] == measures["rlhf_against_dpo"] == {"mean": 0.52, "se": 0.03}
    assert measures["accuracy"] == {"mean": 0.7, "se": pytest.approx((0.7 * 0.3 / 210) ** 0.5)}
    assert "Seed 4 alone: standard errors are over held-out documents" in files["report.md"].decode()


@pytest.mark.parametrize(
    "setting, win_rate, se, line",
    [
        ("one_line", 0.56, 0.02, "yes: .*RLHF wins 0.560 ± 0.020 against DPO, 3.0 standard errors above 0.5"),
        ("one_line", 0.56, 0.04, "NO, undecided: .*1.5 standard errors above 0.5"),
        ("one_line", 0.35, 0.05, "NO: .*3.0 standard errors below 0.5"),
        ("two_word", 0.53, 0.01, "yes: .*3.0 standard errors above 0.5; .* is at most 0.050"),
        ("hidden", 0.47, 0.02, "yes: .*1.5 standard errors below 0.5; .* is at most 0.070"),
        ("two_word", 0.45, 0.03, "NO, undecided: .*1.7 standard errors below 0.5; .* is at most 0.110"),
        ("hidden", 0.5, 0.06, "NO, undecided: .*0.0 standard errors above 0.5; .* is at most 0.120"),
        ("hidden", 0.65, 0.01, "NO: .*15.0 standard errors above 0.5; .* is at most 0.170"),
        ("hidden", 0.5, 0.0, "yes: .*0.000 above 0.5, no error"),
    ],
)
def test_the_verdict_can_come_out_either_way(setting, win_rate, se, line):
    results, _ = over_seeds(one_seed(0, **{setting: made_up_measures(win_rate, se)}))
    gap = results["verdict"][0]
    word, _, rest = line.partition(": ")
    assert gap.startswith(f"{word}: {setting.replace('_', '-')}: ")
    claims = "RLHF is ahead" if setting == "one_line" else "there is no gap above 0.1"
    assert claims in gap
    assert re.search(rest, gap)


@pytest.mark.parametrize(
    "one_line, hidden, line",
    [
        ((0.6, 0.62), (0.5, 0.51), "yes: hidden: .*one-line - hidden: +0.105 ± 0.005, 21.0 "),
        ((0.6, 0.7), (0.55, 0.45), "NO, undecided: hidden: .*one-line - hidden: +0.150 ± 0.100, 1.5 "),
        ((0.5, 0.51), (0.6, 0.62), "NO: hidden: .*one-line - hidden: -0.105 ± 0.005"),
        (
            (0.6,),
            (0.5,),
            "yes: hidden: .*one-line - hidden: +0.100 ± 0.050, 2.00 ",
        ),  # .03 and .04, hypotenuse .05
    ],
)
def test_the_gap_is_larger_in_one_line_by_two_standard_errors_seed_by_seed(one_line, hidden, line):
    by_seed = []
    for seed, (one, other) in enumerate(zip(one_line, hidden, strict=True)):
        settings = {"one_line": made_up_measures(one, 0.03), "hidden": made_up_measures(other, 0.0399)}
        by_seed.append(one_seed(seed, **settings))
    found = over_seeds(*by_seed)[0]["verdict"][4]
    assert re.match(line.replace("+", r"\+"), found), found


def objective_line(gaps, setting):
    """The line of two seeds with these gaps in the objective."""
    by_seed = []
    for seed, gap in enumerate(gaps):
        measures = {**made_up_measures(0.6), "objective_gap": {"mean": gap, "se": 9.0}}
        by_seed.append(one_seed(seed, **{setting: measures}))
    return over_seeds(*by_seed)[0]["verdict"][1]


def test_rlhf_is_ahead_in_the_objective_by_two_standard_errors():
    """.2 and .3: .25 +- .05; .09 and .3: .195 +- .105, less than two errors; -.2 and -.3."""
    for gaps, word in (((0.2, 0.3), "yes"), ((0.09, 0.3), "NO, undecided"), ((-0.2, -0.3), "NO")):
        text = "one-line: RLHF is ahead in the objective. RLHF - DPO:"
        assert objective_line(gaps, "one_line").startswith(f"{word}: {text} {sum(gaps) / 2:+.3f} ± ")


@pytest.mark.parametrize("setting", ["two_word", "hidden"])
def test_where_the_paper_says_so_there_is_no_gap_in_the_objective(setting):
    """The bound is .405: .3 ± .05; .35 ± .05, 1.1 errors below; .6 ± .05; and the same of DPO's lead."""
    for sign in (1, -1):
        for gaps, word in (((0.25, 0.35), "yes"), ((0.3, 0.4), "NO, undecided"), ((0.55, 0.65), "NO")):
            line = objective_line([sign * gap for gap in gaps], setting)
            text = (
                f"{setting.replace('_', '-')}: there is no gap in the objective above 0.405 nats. RLHF - DPO:"
            )
            assert line.startswith(f"{word}: {text} {sign * sum(gaps) / 2:+.3f} ± 0.050, ")
    reward = torch.tensor(summaries.NO_GAP_NATS)
    assert torch.sigmoid(reward).item() == pytest.approx(0.5 + summaries.NO_GAP)  # how labels are drawn


@pytest.mark.parametrize(
    "accuracies, word", [((0.64, 0.66), "yes"), ((0.6, 0.7), "NO, undecided"), ((0.5, 0.52), "NO")]
)
def test_a_reward_model_is_accurate_by_two_standard_errors(accuracies, word):
    """.65 ± .01, five errors above .6; .65 ± .05, one; .51 ± .01, nine below."""
    by_seed = []
    for seed, accuracy in enumerate(accuracies):
        by_seed.append(one_seed(seed, hidden=made_up_measures(0.5, 0.01, accuracy)))
    line = over_seeds(*by_seed)[0]["verdict"][2]
    assert line.startswith(f"{word}: hidden: the reward model's accuracy is above 0.6. It is 0.")
    errors = {(0.64, 0.66): "5.0 standard errors above", (0.6, 0.7): "1.0 standard errors above"}
    assert errors.get(accuracies, "9.0 standard errors below") in line


def test_the_report_of_one_seed():
    results = one_seed(1, one_line=made_up_measures(0.65), hidden=made_up_measures(0.52))
    results["size"] = {"sft": 9, "dpo_lr": {"one-line": 0.1, "hidden": 0.2}, "kl": 0.1}
    text = summaries.summaries_report(results, "a-model", EXAMPLE)
    assert "`a-model`: sft 9, dpo_lr (one-line 0.1, hidden 0.2), kl 0.1\n\nobjective:" in text
    assert "objective: reward - 0.1 KL(policy || SFT)." in text
    one_line, hidden = text.split("\n## ")[1:3]
    assert f"| DPO |{' 0.650 ± 0.050 |' * len(summaries.COLUMNS)}\n" in one_line
    gaps = "RLHF - DPO, paired: 0.650 ± 0.050 nats of reward,"
    assert f"What SFT imitates has the reward 0.650 ± 0.050. {gaps}" in one_line
    assert (
        "Reward model: 0.600 nats per pair, accuracy 0.700 ± 0.032, 210 held-out pairs, in 0.650" in one_line
    )
    assert "The paper: RLHF is ahead. Here: RLHF is ahead; RLHF wins 0.650 ± 0.050 against DPO." in one_line
    assert "> A long text.\n\n- its own: short\n- SFT: as it is\n" in one_line
    assert (
        "The paper: there is no gap. Here: neither is ahead by two standard errors; within these the"
        in hidden
    )
    assert "101 in all phases together; at most 1.5 GiB of host memory in a process since" in text
    assert "| one-line/sft | 101.4 |" in text


def test_what_the_report_says_of_a_difference():
    assert summaries.finding({"mean": 0.3, "se": 0.1}) == "RLHF is ahead"
    assert summaries.finding({"mean": -0.3, "se": 0.1}) == "DPO is ahead"
    assert "neither is ahead" in summaries.finding({"mean": -0.1, "se": 0.1})
    assert "neither is ahead" in summaries.finding({"mean": 0.0, "se": 0.0})
    assert "the gap is at most 0.070" in summaries.finding({"mean": -0.03, "se": 0.02})
    said = summaries.comparison({"mean": 0.6, "se": 0.02})
    assert said == "RLHF is ahead; RLHF wins 0.600 ± 0.020 against DPO"
    assert summaries.comparison({"mean": 0.4, "se": 0.02}).startswith("DPO is ahead")


def test_the_committed_report_is_that_of_the_committed_results():
    folder = COMMITTED.parent
    results = json.loads(COMMITTED.read_text())
    again, files = over_seeds(*results["by_seed"])
    assert again == results
    for name in ("results.json", "report.md"):
        assert (folder / name).read_bytes() == files[name]
    for seed, row in zip(results["seeds"], results["by_seed"], strict=True):
        text = (folder / f"seed{seed}.md").read_text()
        example = {"document": line_after(text, "> "), "summary": line_after(text, "- its own: ")}
        assert summaries.summaries_report(row, "SmolLM2-135M-Instruct", example) == text


def line_after(text, start):
    return next(line.removeprefix(start) for line in text.splitlines() if line.startswith(start))


# ---------------------------------------------------------------- the command


def write(path, results):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(results))
    return str(path)


def test_the_command_takes_files_of_single_seeds(tmp_path, capsys):
    """As they are in the repository: the run that it holds, and the same run as if it were another seed's."""
    committed = json.loads(COMMITTED.read_text())
    one = committed["by_seed"][0] if "by_seed" in committed else committed
    paths = [write(tmp_path / "a.json", one), write(tmp_path / "b.json", {**one, "seed": 77})]
    summaries_over_seeds.main([*paths, "--out", str(tmp_path / "new/over")])
    results = json.loads((tmp_path / "new/over/results.json").read_text())
    assert results["by_seed"] == [one, {**one, "seed": 77}]
    for setting, measures in one["settings"].items():
        wins = {"mean": pytest.approx(measures["rlhf_against_dpo"]["mean"]), "se": 0.0}
        assert results["settings"][setting]["rlhf_against_dpo"] == wins
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-1] == results["verdict"] and len(results["verdict"]) == 11

    # And the page of all experiments has the verdicts of such a report.
    text = page.experiments_page(tmp_path / "new")
    assert text.count('<p class="verdict') == len(results["verdict"])
    assert "<h2>Summaries: both roads on a pretrained model</h2>" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 0}, "there are two files of seed 0"),
        ({"seed": "1"}, "other.json: 'seed' is missing or damaged; give the results.json of one seed"),
        ({"settings": None}, "other.json: 'settings' is missing or damaged"),
        ({"size": {"sft": 9, "kl": 0.2}}, "other.json: its kl is not that of seed 0"),
        ({"model": None}, "other.json: 'model' is missing or damaged"),
        ({"model": "c" * 64}, "other.json: made with another model than that of seed 0"),
        ({"documents": "c" * 64}, "other.json: made with another documents than that of seed 0"),
        ({"settings": {"hidden": {}}}, "other.json: its settings are not those of seed 0"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(change, message, tmp_path):
    results = one_seed(0, one_line=made_up_measures(0.5))
    path = write(tmp_path / "one.json", results)
    other = write(tmp_path / "other.json", {**results, "seed": 1, **change})
    with pytest.raises(InputError, match=message):
        summaries_over_seeds.main([path, other, "--out", str(tmp_path / "over")])
    assert not (tmp_path / "over").exists()


def test_somebodys_results_are_not_written_over(tmp_path):
    path = write(tmp_path / "results.json", one_seed(0, one_line=made_up_measures(0.5)))
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(InputError, match="results.json: no record says what it was made from"):
        summaries_over_seeds.main([path, "--out", str(tmp_path)])
    assert (tmp_path / "results.json").read_bytes() == before
