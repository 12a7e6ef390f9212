"""Measures of experiments/summarize.py -> report.md of a seed; results.json, report.md, figure over seeds."""

import math

from nanoroads.report.cells import (
    ERRORS_THAT_SHOW,
    above,
    beside_nearer_bound,
    claim,
    in_errors,
    is_above,
    is_below,
    plus_minus,
    with_errors,
    within,
)
from nanoroads.report.drawing import COLOURS, INK, PALE, new_figure, svg_bytes
from nanoroads.report.evidence import differences, over_seeds, values_of
from nanoroads.report.write import table
from nanoroads.weights.files import json_bytes

COLUMNS = {
    "reward": "reward at T = 1, nats",
    "greedy_reward": "reward, greedy, nats",
    "win_rate": "wins against SFT",
    "kl_to_ref": "KL to SFT, nats",
    "objective": "objective, nats",
    "words": "words",
}
POLICY_COLOURS = {"sft": COLOURS["sft"], "dpo": COLOURS["dpo"], "rlhf": COLOURS["rlhf_global"]}
MARKERS = "os^"  # of the settings
# "No gap" is a win rate that is nearer to one half than this by two standard errors. With 240 documents
# two errors of one seed are .05, so that a bound of .05 could hardly be met.
NO_GAP = 0.1
# The same in nats of reward or of the objective: of two responses that are so far apart, Bradley-Terry labels
# the better one right as often, .6.
NO_GAP_NATS = math.log((0.5 + NO_GAP) / (0.5 - NO_GAP))
# What a reward model's held-out accuracy has to be above by two standard errors: one near chance, .5,
# verifies nothing, and then RLHF says nothing of the paper.
ACCURATE = 0.6


# ---------------------------------------------------------------- one seed


def summaries_report(results: dict, model: str, example: dict) -> str:
    """The text of report.md.

    model: the name of the pretrained model. example: a held-out row {"document", "summary"}."""
    lines = ["# Summaries: both roads on a pretrained model\n"]
    lines.append(f"`{model}`: {size_line(results['size'])}")
    for setting, measures in results["settings"].items():
        lines += setting_section(setting, measures, example)

    total, peak = results["total_seconds"], results["peak_gib"]
    memory = f"at most {peak} GiB of host memory in a process since the script began"
    lines.append(f"\n## Seconds\n\n{total:.0f} in all phases together; {memory}.\n")
    rows = [[name, str(seconds)] for name, seconds in results["seconds"].items()]
    lines.append(table(["phase", "seconds"], rows))
    return "\n".join(lines) + "\n"


def setting_section(setting, measures, example):
    """One setting, a list of lines: table, comparisons, and what the policies write."""
    lines = [f"\n## {setting}\n", policies_table(measures)]

    lines.append(f"{demos_line(measures)} RLHF - DPO, paired: {gaps(measures)}.")
    reward_model = measures["reward_model"]
    lines.append(
        f"Reward model: {reward_model['nll']:.3f} nats per pair, "
        f"accuracy {plus_minus(accuracy(reward_model))}, {reward_model['pairs']} held-out pairs, in "
        f"{plus_minus(measures['labels_right'])} of which the chosen response has more true reward. "
        "A pair is the two most different of several samples.\n"
    )
    lines.append(f"The paper: {paper_says(setting)}. Here: {comparison(measures['rlhf_against_dpo'])}.\n")

    document = " ".join(example["document"].split())
    lines += [f"> {document}\n", f"- its own: {example['summary']}"]
    for policy, row in measures["policies"].items():
        lines.append(f"- {policy.upper()}: {row['example'].strip()}")
    return lines


def size_line(size):
    """How much was read, sampled and trained, and what it is trained for."""
    sizes = []
    for name, value in size.items():
        if isinstance(value, dict):  # a rate in each setting
            value = ", ".join([f"{setting} {rate}" for setting, rate in value.items()])
            value = f"({value})"
        sizes.append(f"{name} {value}")
    return (
        f"{', '.join(sizes)}\n\nobjective: reward - {size['kl']} KL(policy || SFT). Each road maximises it "
        "with the reward that it learns from the pairs; here it is measured with the true one.\n"
    )


def policies_table(measures):
    """A row of measures for each policy."""
    rows = []
    for policy, row in measures["policies"].items():
        rows.append([policy.upper()] + [plus_minus(row[column]) for column in COLUMNS])
    return table(["policy"] + list(COLUMNS.values()), rows)


def demos_line(measures):
    """What the demonstrations are worth, the documents' own summaries or the first words of these."""
    return f"What SFT imitates has the reward {plus_minus(measures['demos'])}."


def gaps(measures):
    """How far RLHF is ahead of DPO."""
    reward, objective = plus_minus(measures["rlhf_minus_dpo"]), plus_minus(measures["objective_gap"])
    return f"{reward} nats of reward, {objective} of the objective"


def accuracy(reward_model):
    """A reward model's held-out accuracy, {"mean", "se"}: the error is over its pairs."""
    share = reward_model["accuracy"]
    return {"mean": share, "se": (share * (1 - share) / reward_model["pairs"]) ** 0.5}


def paper_says(setting):
    """What the paper says of a setting."""
    if setting == "one-line":
        return "RLHF is ahead"
    return "there is no gap"


def comparison(wins):
    """RLHF's win rate against DPO, {"mean", "se"}, and what it says."""
    return f"{finding(lead_of(wins))}; RLHF wins {plus_minus(wins)} against DPO"


def lead_of(wins):
    """How far a win rate, {"mean", "se"}, is above one half."""
    return {"mean": wins["mean"] - 0.5, "se": wins["se"]}


def largest(lead):
    """The largest that a lead, {"mean", "se"}, of either road may be within two standard errors."""
    return abs(lead["mean"]) + ERRORS_THAT_SHOW * lead["se"]


def finding(lead):
    """What a lead of RLHF over DPO, {"mean", "se"}, says."""
    if is_above(lead):
        return "RLHF is ahead"
    if is_below(lead):
        return "DPO is ahead"
    return f"neither is ahead by two standard errors; within these the gap is at most {largest(lead):.3f}"


# ---------------------------------------------------------------- over seeds


def over_seeds_files(seeds: list[int], by_seed: list[dict]) -> tuple[dict, dict[str, bytes]]:
    """results.json over seeds, as a dict, and the files results.json, report.md and figure.svg.

    by_seed: each seed's results.json, all of the same settings."""
    settings = {}
    for setting in by_seed[0]["settings"]:
        settings[setting] = averaged(values_of(by_seed, "settings", setting))
    results = {"seeds": seeds, "verdict": verdict(settings, by_seed)}
    results["seconds"] = round(sum(values_of(by_seed, "total_seconds")), 1)
    results.update(settings=settings, by_seed=by_seed)
    files = {"results.json": json_bytes(results), "report.md": over_seeds_report(results).encode()}
    files["figure.svg"] = svg_bytes(figure_of(results))
    return results, files


def averaged(rows):
    """A setting's measures over seeds, {"policies": {policy: {column: cell}}, "rlhf_against_dpo": cell, ...}.

    rows: its measures for each seed. A cell: {"mean", "se"}. The error is over seeds; of one seed, it is
    over its held-out documents, as in its own report."""
    policies = {}
    for policy in rows[0]["policies"]:
        policies[policy] = {column: averaged_cell(rows, "policies", policy, column) for column in COLUMNS}
    measures = {"policies": policies}
    for name in ("demos", "rlhf_minus_dpo", "objective_gap", "rlhf_against_dpo", "labels_right"):
        measures[name] = averaged_cell(rows, name)
    measures["accuracy"] = accuracy(rows[0]["reward_model"])
    if len(rows) > 1:
        measures["accuracy"] = over_seeds(rows, "reward_model", "accuracy")
    return measures


def averaged_cell(rows, *path):
    """{"mean", "se"} over seeds of rows[i][path[0]]...["mean"]; of one seed, its own cell."""
    if len(rows) == 1:
        return values_of(rows, *path)[0]
    return over_seeds(rows, *path, "mean")


def verdict(settings, by_seed):
    """Lines for each setting: the paper's order, then what both roads maximise, then the reward model.

    settings: {setting: measures over seeds}. by_seed: each seed's results.json."""
    lines = []
    for setting, measures in settings.items():
        lines.append(paper_line(setting, measures["rlhf_against_dpo"]))
        if setting != "one-line" and "one-line" in settings:
            less = wins_apart(by_seed, "one-line", setting)
            text = f"{setting}: RLHF wins less than in one-line. one-line - {setting}: {with_errors(less)}."
            lines.append(claim(above(less), text))
        lines.append(objective_line(setting, measures["objective_gap"]))
        lines.append(reward_model_line(setting, measures))
    return lines


def paper_line(setting, wins):
    """What the paper says of a setting, and RLHF's win rate against DPO here, {"mean", "se"}."""
    here = f"RLHF wins {plus_minus(wins)} against DPO, {in_errors(wins, 0.5)}"
    lead = lead_of(wins)
    if setting == "one-line":
        return claim(above(lead), f"{setting}: RLHF is ahead. {here}.")
    at_most = f"within two errors the gap is at most {largest(lead):.3f}"
    return claim(within(lead, NO_GAP), f"{setting}: there is no gap above {NO_GAP}. {here}; {at_most}.")


def objective_line(setting, lead):
    """What the paper says of a setting, and RLHF's lead over DPO in the objective here, {"mean", "se"}."""
    if setting == "one-line":
        return claim(
            above(lead), f"{setting}: RLHF is ahead in the objective. RLHF - DPO: {with_errors(lead)}."
        )
    text = f"{setting}: there is no gap in the objective above {NO_GAP_NATS:.3f} nats. RLHF - DPO: "
    return claim(within(lead, NO_GAP_NATS), f"{text}{beside_nearer_bound(lead, NO_GAP_NATS)}.")


def reward_model_line(setting, measures):
    """Whether the reward model verifies. The labels, drawn by Bradley-Terry, bound what it can reach."""
    share, labels = measures["accuracy"], plus_minus(measures["labels_right"])
    text = f"{setting}: the reward model's accuracy is above {ACCURATE}. It is {plus_minus(share)}"
    text += f", {in_errors(share, ACCURATE)}; the labels agree with the true reward in {labels}."
    return claim(above(share, ACCURATE), text)


def wins_apart(by_seed, one, other):
    """{"mean", "se"} of RLHF's win rate against DPO in the setting `one`, less that in `other`.

    The error is over seeds; of one seed, it is over documents, as if the settings shared none of them."""
    wins = [values_of(by_seed, "settings", setting, "rlhf_against_dpo", "mean") for setting in (one, other)]
    less = differences(*wins)
    if len(by_seed) == 1:
        errors = [by_seed[0]["settings"][setting]["rlhf_against_dpo"]["se"] for setting in (one, other)]
        less["se"] = math.hypot(*errors)
    return less


def over_seeds_report(results):
    """The text of report.md. results: results.json over seeds."""
    lines = ["# Summaries: both roads on a pretrained model\n", size_line(results["by_seed"][0]["size"])]
    lines.append(errors_line(results["seeds"]))
    for line in results["verdict"]:
        lines.append(f"- {line}\n")
    lines.append("![RLHF's wins against DPO, and reward against KL, in each setting](figure.svg)\n")
    for setting, measures in results["settings"].items():
        lines += [f"## {setting}\n", policies_table(measures)]
        lines.append(f"{demos_line(measures)} RLHF - DPO: {gaps(measures)}.\n")
        lines.append(single_seeds_table(results["by_seed"], setting))
    rows = []
    for row in results["by_seed"]:
        rows.append([str(row["seed"]), f"{row['total_seconds']:.0f}", f"{row['peak_gib']:.2f}"])
    head = ["seed", "seconds of all phases together"]
    head.append("most GiB of host memory in a process since the script began")
    lines += ["## Seconds\n", table(head, rows)]
    return "\n".join(lines)


def figure_of(results):
    """RLHF's wins against DPO, of each seed and over them; and reward against KL, seed by seed."""
    fig, (left, right) = new_figure(10.5, 3.6, ncols=2)
    settings = results["settings"]
    for place, (setting, measures) in enumerate(settings.items()):
        wins = measures["rlhf_against_dpo"]
        singles = values_of(results["by_seed"], "settings", setting, "rlhf_against_dpo", "mean")
        left.plot([place] * len(singles), singles, "o", color=PALE, ms=9, zorder=1)
        left.errorbar(place, wins["mean"], wins["se"], fmt="o", color=INK, ms=4, capsize=3)
        for policy, colour in POLICY_COLOURS.items():
            rows = values_of(results["by_seed"], "settings", setting, "policies", policy)
            kls, rewards = values_of(rows, "kl_to_ref", "mean"), values_of(rows, "reward", "mean")
            label = policy.upper() if place == 0 else None
            right.plot(kls, rewards, MARKERS[place], color=colour, label=label, alpha=0.8)
    left.axhline(0.5, color=INK, lw=0.8, ls=":")
    left.set_xticks(range(len(settings)), list(settings))
    left.set(title="RLHF wins against DPO", xlim=(-0.5, len(settings) - 0.5), ylim=(0, 1))
    right.set(title="Reward and distance", xlabel="KL(policy || SFT), nats", ylabel="true reward, nats")
    for marker, setting in zip(MARKERS, settings, strict=False):
        right.plot([], [], marker, color=INK, label=setting)
    right.legend()
    return fig


def errors_line(seeds):
    """What the standard errors are over."""
    single = "over held-out documents, an accuracy's over pairs.\n"
    if len(seeds) == 1:
        return f"Seed {seeds[0]} alone: standard errors are {single}"
    names = ", ".join([str(seed) for seed in seeds])
    return f"Seeds {names}: standard errors are over seeds; in the tables of single seeds {single}"


def single_seeds_table(by_seed, setting):
    """What the verdict is about, seed by seed."""
    rows = []
    for results in by_seed:
        measures = results["settings"][setting]
        cells = [str(results["seed"])]
        cells.append(plus_minus(measures["rlhf_against_dpo"]))
        cells.append(plus_minus(measures["rlhf_minus_dpo"]))
        cells.append(plus_minus(measures["objective_gap"]))
        cells.append(plus_minus(accuracy(measures["reward_model"])))
        rows.append(cells)
    head = ["seed", "RLHF wins against DPO", "RLHF - DPO in reward, nats", "in the objective, nats"]
    head.append("reward model's accuracy")
    return table(head, rows)
