"""Rewards of experiments/summarize.py -> win rates; its results.json -> its report.md."""

import torch

from nanoroads.report.evidence import is_above, is_below
from nanoroads.report.write import plus_minus, table
from nanoroads.score import ranked_right

COLUMNS = {
    "reward": "reward (T = 1)",
    "greedy_reward": "greedy",
    "win_rate": "win rate",
    "kl_to_ref": "KL to SFT",
    "words": "words",
}


def win_rates(one, other):
    """Rewards (N, k) of two policies -> (N,): the share of pairs of samples in which `one` has more.

    A tie is half a win."""
    margin = one[:, :, None] - other[:, None, :]  # (N, k, k): each sample against each
    return ranked_right(margin).mean((1, 2))


def rewards_of(texts, rows, reward):
    """Rewards of k texts for each of N rows, (N, k) fp64.

    They are rounded to fp32 on the way, so that rewards that differ only by rounding errors tie."""
    values = []
    for row, group in zip(rows, texts, strict=True):
        values.append([reward(row, text) for text in group])
    return torch.tensor(values, dtype=torch.float32).double()


def summaries_report(results: dict, model: str, example: dict) -> str:
    """The text of report.md.

    model: the name of the pretrained model. example: a held-out row {"document", "summary"}."""
    lines = ["# Summaries: both roads on a pretrained model\n"]
    size = ", ".join([f"{key} {value}" for key, value in results["size"].items()])
    lines.append(f"`{model}`: {size}\n")
    for setting, measures in results["settings"].items():
        lines += setting_section(setting, measures, example)

    total, peak = results["total_seconds"], results["peak_gib"]
    lines.append(f"\n## Seconds\n\n{total:.0f} in all phases together; at most {peak} GiB in a process.\n")
    rows = [[name, str(seconds)] for name, seconds in results["seconds"].items()]
    lines.append(table(["phase", "seconds"], rows))
    return "\n".join(lines) + "\n"


def setting_section(setting, measures, example):
    """One setting, a list of lines: table, comparisons, and what the policies write."""
    rows = []
    for policy, row in measures["policies"].items():
        rows.append([policy.upper()] + [plus_minus(row[column]) for column in COLUMNS])
    lines = [f"\n## {setting}\n", table(["policy"] + list(COLUMNS.values()), rows)]

    reference = plus_minus(measures["reference"])
    gap = plus_minus(measures["rlhf_minus_dpo"])
    lines.append(f"The documents' own summaries: {reference}. RLHF - DPO, document by document: {gap}.")
    reward_model = measures["reward_model"]
    accuracy = reward_model["accuracy"]
    accuracy_se = (accuracy * (1 - accuracy) / reward_model["pairs"]) ** 0.5
    lines.append(
        f"Reward model: {reward_model['nll']:.3f} nats per pair, "
        f"accuracy {accuracy:.3f} ± {accuracy_se:.3f}, {reward_model['pairs']} held-out pairs.\n"
    )
    lines.append(f"The paper: {paper_says(setting)}. Here: {comparison(measures['rlhf_against_dpo'])}.\n")

    document = " ".join(example["document"].split())
    lines += [f"> {document}\n", f"- its own: {example['summary']}"]
    for policy, row in measures["policies"].items():
        lines.append(f"- {policy.upper()}: {row['example'].strip()}")
    return lines


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
    return f"there is no gap beyond two standard errors, nor one above {bound:.3f}"
