"""results.json of experiments/summarize.py -> its report.md."""

from nanoroads.report.write import table

COLUMNS = {
    "reward": "reward (T = 1)",
    "greedy_reward": "greedy",
    "win_rate": "win rate",
    "kl_to_ref": "KL to SFT",
    "words": "words",
}


def with_error(value: dict) -> str:
    """{"mean", "se"} as text."""
    return f"{value['mean']:.3f} ± {value['se']:.3f}"


def summaries_report(results: dict, model: str, example: dict) -> str:
    """The text of report.md.

    model: the name of the pretrained model. example: a held-out row {"document", "summary"}."""
    lines = ["# Summaries: both roads on a pretrained model\n"]
    size = ", ".join([f"{key} {value}" for key, value in results["size"].items()])
    lines.append(f"`{model}`: {size}\n")
    for setting, measures in results["settings"].items():
        lines += setting_section(setting, measures, example)

    total, peak = results["total_seconds"], results["peak_gib"]
    lines.append(f"\n## Seconds\n\n{total:.0f} in all; at most {peak} GiB in a process.\n")
    rows = [[name, str(seconds)] for name, seconds in results["seconds"].items()]
    lines.append(table(["phase", "seconds"], rows))
    return "\n".join(lines) + "\n"


def setting_section(setting, measures, example):
    """One setting, a list of lines: table, comparisons, and what the policies write."""
    rows = []
    for policy, row in measures["policies"].items():
        rows.append([policy.upper()] + [with_error(row[column]) for column in COLUMNS])
    lines = [f"\n## {setting}\n", table(["policy"] + list(COLUMNS.values()), rows)]

    reference = with_error(measures["reference"])
    gap = with_error(measures["rlhf_minus_dpo"])
    lines.append(f"The documents' own summaries: {reference}. RLHF - DPO, document by document: {gap}.")
    reward_model = measures["reward_model"]
    lines.append(
        f"Reward model: {reward_model['nll']:.3f} nats per pair, "
        f"accuracy {reward_model['accuracy']:.2f}, {reward_model['pairs']} held-out pairs.\n"
    )
    lines.append(f"The paper: {claim(setting)}. Here: {finding(measures['rlhf_minus_dpo'])}.\n")

    document = " ".join(example["document"].split())
    lines += [f"> {document}\n", f"- its own: {example['summary']}"]
    for policy, row in measures["policies"].items():
        lines.append(f"- {policy.upper()}: {row['example'].strip()}")
    return lines


def claim(setting):
    """What the paper says of a setting."""
    if setting == "one-line":
        return "RLHF is ahead"
    return "there is no gap"


def finding(gap):
    """What a difference of rewards, RLHF - DPO as {"mean", "se"}, says."""
    if abs(gap["mean"]) <= 2 * gap["se"]:
        return "there is no gap beyond two standard errors"
    if gap["mean"] > 0:
        return "RLHF is ahead"
    return "DPO is ahead"
