"""Rewards of experiments/summarize.py -> win rates; its results.json -> report.md, also over seeds."""

import math

import torch

from nanoroads.report.drawing import COLOURS, INK, PALE, new_figure, svg_bytes
from nanoroads.report.evidence import (
    claim,
    differences,
    in_errors,
    is_above,
    is_below,
    over_seeds,
    values_of,
    with_errors,
)
from nanoroads.report.write import plus_minus, table
from nanoroads.score import ranked_right
from nanoroads.weights.files import json_bytes

COLUMNS = {
    "reward": "reward (T = 1)",
    "greedy_reward": "greedy",
    "win_rate": "win rate",
    "kl_to_ref": "KL to SFT",
    "objective": "objective",
    "words": "words",
}
POLICY_COLOURS = {"sft": COLOURS["sft"], "dpo": COLOURS["dpo"], "rlhf": COLOURS["rlhf_global"]}
MARKERS = "os^"  # of the settings
NO_GAP = 0.1  # a win rate that is nearer to one half by two standard errors shows no gap
ACCURATE = 0.6  # what a reward model's held-out accuracy has to be above, by two standard errors


def win_rates(one, other):
    """Rewards (N, k) of two policies -> (N,): the share of pairs of samples in which `one` has more.

    A tie is half a win."""
    margin = one[:, :, None] - other[:, None, :]  # (N, k, k): each sample against each
    return ranked_right(margin).mean((1, 2))


def rewards_of(texts, rows, reward):
    """Rewards of k texts for each of N rows, (N, k) fp64.

    They are rounded to fp32 on the way: to `ranked_right` rewards that differ only by rounding tie."""
    values = []
    for row, group in zip(rows, texts, strict=True):
        values.append([reward(row, text) for text in group])
    return torch.tensor(values, dtype=torch.float32).double()


def summaries_report(results: dict, model: str, example: dict) -> str:
    """The text of report.md.

    model: the name of the pretrained model. example: a held-out row {"document", "summary"}."""
    lines = ["# Summaries: both roads on a pretrained model\n"]
    lines.append(f"`{model}`: {size_line(results['size'])}")
    for setting, measures in results["settings"].items():
        lines += setting_section(setting, measures, example)

    total, peak = results["total_seconds"], results["peak_gib"]
    lines.append(
        f"\n## Seconds\n\n{total:.0f} in all phases together; at most {peak} GiB of host memory a process.\n"
    )
    rows = [[name, str(seconds)] for name, seconds in results["seconds"].items()]
    lines.append(table(["phase", "seconds"], rows))
    return "\n".join(lines) + "\n"


def setting_section(setting, measures, example):
    """One setting, a list of lines: table, comparisons, and what the policies write."""
    lines = [f"\n## {setting}\n", policies_table(measures)]

    reference = plus_minus(measures["reference"])
    lines.append(f"The documents' own summaries: {reference}. RLHF - DPO, paired: {gaps(measures)}.")
    reward_model = measures["reward_model"]
    lines.append(
        f"Reward model: {reward_model['nll']:.3f} nats per pair, "
        f"accuracy {plus_minus(accuracy(reward_model))}, {reward_model['pairs']} held-out pairs, in "
        f"{plus_minus(measures['labels_right'])} of which the chosen response has more true reward.\n"
    )
    lines.append(f"The paper: {paper_says(setting)}. Here: {comparison(measures['rlhf_against_dpo'])}.\n")

    document = " ".join(example["document"].split())
    lines += [f"> {document}\n", f"- its own: {example['summary']}"]
    for policy, row in measures["policies"].items():
        lines.append(f"- {policy.upper()}: {row['example'].strip()}")
    return lines


def size_line(size):
    """How much was read, sampled and trained, and what it is trained for."""
    sizes = ", ".join([f"{key} {value}" for key, value in size.items()])
    return (
        f"{sizes}\n\nobjective: reward - {size['kl']} KL(policy || SFT). Each road maximises it with the "
        "reward that it learns from the pairs; here it is measured with the true one.\n"
    )


def policies_table(measures):
    """A row of measures for each policy."""
    rows = []
    for policy, row in measures["policies"].items():
        rows.append([policy.upper()] + [plus_minus(row[column]) for column in COLUMNS])
    return table(["policy"] + list(COLUMNS.values()), rows)


def gaps(measures):
    """How far RLHF is ahead of DPO."""
    reward, objective = plus_minus(measures["rlhf_minus_dpo"]), plus_minus(measures["objective_gap"])
    return f"{reward} of reward, {objective} of the objective"


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
    lead = {"mean": wins["mean"] - 0.5, "se": wins["se"]}
    return f"{finding(lead)}; RLHF wins {plus_minus(wins)} against DPO"


def finding(lead):
    """What a lead of RLHF over DPO, {"mean", "se"}, says."""
    if is_above(lead):
        return "RLHF is ahead"
    if is_below(lead):
        return "DPO is ahead"
    bound = abs(lead["mean"]) + 2 * lead["se"]
    return f"neither is ahead by two standard errors, and the gap is at most {bound:.3f}"


# ---------------------------------------------------------------- over seeds


def over_seeds_files(seeds: list[int], by_seed: list[dict]) -> tuple[dict, dict[str, bytes]]:
    """results.json over seeds, as a dict, and the files results.json and report.md.

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
    for name in ("reference", "rlhf_minus_dpo", "objective_gap", "rlhf_against_dpo", "labels_right"):
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
    """Lines for each setting: the paper's order, whether one-line's gap is larger, what both roads maximise,
    the reward model.

    settings: {setting: measures over seeds}. by_seed: each seed's results.json."""
    lines = []
    for setting, measures in settings.items():
        wins, share = measures["rlhf_against_dpo"], measures["accuracy"]
        here = f"RLHF wins {plus_minus(wins)} against DPO, {in_errors(wins, 0.5)}"
        if setting == "one-line":
            lines.append(claim(is_above(wins, 0.5), f"{setting}: RLHF is ahead. {here}."))
        else:
            bound = abs(wins["mean"] - 0.5) + 2 * wins["se"]
            text = f"{setting}: there is no gap above {NO_GAP}. {here}"
            lines.append(claim(bound < NO_GAP, f"{text}; within two errors the gap is at most {bound:.3f}."))
            if "one-line" in settings:
                more = wins_apart(by_seed, "one-line", setting)
                text = f"{setting}: RLHF wins less than in one-line, by {with_errors(more)}."
                lines.append(claim(is_above(more), text))
        text = f"{setting}: RLHF is ahead in the objective, by {with_errors(measures['objective_gap'])}."
        lines.append(claim(is_above(measures["objective_gap"]), text))
        text = f"{setting}: the reward model's accuracy is above {ACCURATE} by two standard errors"
        text += (
            f" ({plus_minus(share)}, {in_errors(share, ACCURATE)}; the labels agree with the true reward in "
        )
        lines.append(claim(is_above(share, ACCURATE), f"{text}{plus_minus(measures['labels_right'])})."))
    return lines


def wins_apart(by_seed, one, other):
    """{"mean", "se"} of how much more RLHF wins against DPO in one setting than in another.

    Over seeds, which share the documents; of one seed, over the documents of both, as if they were others."""
    wins = [values_of(by_seed, "settings", setting, "rlhf_against_dpo", "mean") for setting in (one, other)]
    more = differences(*wins)
    if len(by_seed) == 1:
        errors = [by_seed[0]["settings"][setting]["rlhf_against_dpo"]["se"] for setting in (one, other)]
        more["se"] = math.hypot(*errors)
    return more


def over_seeds_report(results):
    """The text of report.md. results: results.json over seeds."""
    lines = ["# Summaries: both roads on a pretrained model\n", size_line(results["by_seed"][0]["size"])]
    lines.append(errors_line(results["seeds"]))
    for line in results["verdict"]:
        lines.append(f"- {line}\n")
    lines.append("![RLHF's wins against DPO, and reward against KL, in each setting](figure.svg)\n")
    for setting, measures in results["settings"].items():
        lines += [f"## {setting}\n", policies_table(measures)]
        reference = plus_minus(measures["reference"])
        lines.append(f"The documents' own summaries: {reference}. RLHF - DPO: {gaps(measures)}.\n")
        lines.append(single_seeds_table(results["by_seed"], setting))
    rows = []
    for row in results["by_seed"]:
        rows.append([str(row["seed"]), f"{row['total_seconds']:.0f}", f"{row['peak_gib']:.2f}"])
    head = ["seed", "seconds of all phases together", "most GiB of host memory in a process"]
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
    right.set(title="Reward and distance", xlabel="KL(policy || SFT), nats", ylabel="true reward")
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
    head = ["seed", "RLHF wins against DPO", "RLHF - DPO", "of the objective", "reward model's accuracy"]
    return table(head, rows)
