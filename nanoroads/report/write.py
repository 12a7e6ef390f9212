"""results.json of all_roads.py -> report.md, figures, and a verdict on each claim of the paper."""

import math
import tempfile
from pathlib import Path

from nanoroads.report import figures
from nanoroads.report.cells import above, claim, decided, is_above, is_below, plus_minus, with_errors
from nanoroads.report.drawing import save
from nanoroads.report.gap_closed import closed_line
from nanoroads.report.page import report_page
from nanoroads.run.folder import read_metrics
from nanoroads.weights.files import json_bytes, read_json_object, write_text


def report_files(results: dict, folder: Path) -> dict[str, bytes]:
    """results.json, report.md, report.html and the figures as {file name: bytes}, for `make_or_keep`."""
    files = {"results.json": json_bytes(results)}
    with tempfile.TemporaryDirectory() as drawn:
        write_report(results, Path(drawn), folder)
        for path in sorted(Path(drawn).iterdir()):
            files[path.name] = path.read_bytes()
    return files


def write_report(results: dict, out: Path, folder: Path):
    """Figures, report.md and report.html in `out`.

    folder: the first seed's runs, for curves along training and the page's map."""
    draw(results, out, folder)
    text = report_text(results)
    write_text(out / "report.md", text)
    routes = None
    if (folder / "routes.json").exists():  # measures of earlier versions have none
        routes = read_json_object(folder / "routes.json")
    write_text(out / "report.html", report_page(text, out, routes))


def report_text(results: dict) -> str:
    """report.md."""
    parts = opening(results) + policies_section(results)
    parts += reward_models_section(results) + equivalence_section(results)
    if results["gap_closed"]:
        parts += gap_closed_section(results["gap_closed"])
    rows = [[name, f"{seconds:.0f}"] for name, seconds in results["seconds"].items()]
    parts += ["## Seconds\n", table(["phase", "s"], rows)]
    return "\n".join(parts)


def draw(results, out, folder):
    """The figures."""
    save(figures.rewards(results), out / "rewards.svg")
    save(figures.best_of_n(results), out / "best_of_n.svg")
    save(figures.equivalence(results, read_metrics(folder / "rlhf_local")), out / "equivalence.svg")
    save(figures.routes(results), out / "routes.svg")


# ---------------------------------------------------------------- the verdict


def verdict(results: dict) -> list[str]:
    """What the numbers say, for or against the paper."""
    rewards = {name: row["reward"] for name, row in results["policies"].items()}  # {"mean", "se"} each
    lead = independent_difference(rewards["rlhf_global"], rewards["dpo"])
    gain = independent_difference(rewards["dpo"], rewards["sft"])
    lines = [
        claim(above(lead), f"RLHF on the global reward beats DPO in true reward (by {with_errors(lead)})."),
        claim(above(gain), f"DPO beats SFT (by {with_errors(gain)})."),
        comes_back_line(results),
    ]
    for name, row in results["gap_closed"].items():
        lines.append(gap_closed_line(IN_WORDS[name], row))
    models = results["reward_models"]
    by_nll = sorted(models, key=lambda name: models[name]["nll"])
    by_best_of_n = sorted(models, key=lambda name: -models[name]["best_of_n"]["16"])
    lines.append(
        f"Best reward models first, by held-out likelihood: {', '.join(by_nll)}; "
        f"by best-of-16: {', '.join(by_best_of_n)}."
    )
    return lines


def comes_back_line(results):
    """Theorem 2.2: more than three quarters of the KL that DPO has to SFT's policy are gone."""
    before = results["policies"]["dpo"]["kl_to_ref"]
    after = results["equivalence"]["kl_dpo_rlhf_local"]
    # `after` has no error here. But of numbers that are not negative, as KLs, the mean's error over seeds
    # is at most the mean, and so two errors above it are at most three times the mean.
    comes_back = decided(is_above(before, 4 * 3 * after), is_below(before, 4 * after))
    text = f"RLHF on the local reward comes back to DPO's policy (Theorem 2.2): KL {plus_minus(before)}"
    return claim(comes_back, f"{text} before, {after:.3f} nats after.")


IN_WORDS = {
    "short_horizon": "at one move, where nothing is left to plan,",
    "two_moves": "at two moves, with one state in between to plan,",
    "hidden_reference": "against a hidden walk",
}


def gap_closed_line(setting, row):
    """Whether RLHF and DPO are one, in a setting of IN_WORDS. row: of `gap_closed.gap_closed_row`."""
    lead = row["rlhf_minus_dpo"]
    if "optimum" not in row:
        text = f"{setting.capitalize()} RLHF - DPO is {with_errors(lead)}; how near the optimum either is, "
        return f"{text}is not known: no claim."
    return closed_line(setting, lead, row["dpo"]["kl_to_optimum"], row["rlhf_global"]["kl_to_optimum"])


def independent_difference(one, other):
    """one - other of two {"mean", "se"}, taken as independent."""
    return {"mean": one["mean"] - other["mean"], "se": math.hypot(one["se"], other["se"])}


# ---------------------------------------------------------------- the sections


def opening(results):
    spread = "seeds"
    if len(results["seeds"]) == 1:
        spread = "prompts (one seed: run-to-run spread is larger)"
    lines = [f"- {line}\n" for line in verdict(results)]
    return [
        "# All roads on the map\n",
        f"Seeds {results['seeds']}, {results['pairs']:,} pairs, {results['seconds']['total']:.0f} s. "
        f"± is one standard error over {spread}. What was tuned: experiments/sweep.md.\n",
        "".join(lines),
    ]


def policies_section(results):
    rows = []
    for name, row in results["policies"].items():
        reward = plus_minus(row["reward"])
        greedy_reward = plus_minus(row["greedy_reward"])
        kl = plus_minus(row["kl_to_ref"], digits=2)
        rows.append([name, reward, greedy_reward, kl])
    return [
        "## Policies: true reward on held-out prompts\n",
        table(["policy", "reward (T = 1)", "greedy reward", "KL to SFT, nats"], rows),
        "`optimum` is the reference restricted to shortest routes, the limit of small beta, "
        "by enumeration.\n",
        "![rewards](rewards.svg)\n\n![routes](routes.svg)\n",
    ]


def reward_models_section(results):
    truth = results["best_of_n_true_reward"]
    head = ["reward model", "nll", "accuracy"] + [f"best of {n}" for n in truth]
    rows = []
    for name, row in results["reward_models"].items():
        numbers = [row["nll"], row["accuracy"]] + list(row["best_of_n"].values())
        rows.append([name] + [f"{number:.3f}" for number in numbers])
    rows.append(["true reward", "", ""] + [f"{number:.3f}" for number in truth.values()])
    return [
        "## Reward models: held-out pairs, and the true reward of the best of N SFT samples\n",
        table(head, rows),
        "`dpo`: beta log pi/pi_ref of DPO's policy; `local`: Bradley-Terry on log pi alone; "
        "`global`: a scalar head.\n",
        "![best of N](best_of_n.svg)\n",
    ]


def equivalence_section(results):
    row = results["equivalence"]
    return [
        "## Theorem 2.2: RL on the local reward comes back to DPO\n",
        f"KL(DPO || SFT) {row['kl_dpo_sft']:.3f}, KL(DPO || RLHF-local) {row['kl_dpo_rlhf_local']:.3f} nats. "
        f"Stage 1 of the local road and DPO end {row['stage_1_weights_apart']:.1e} apart in their largest "
        "weight.\n",
        "![equivalence](equivalence.svg)\n",
    ]


def gap_closed_section(settings):
    rows = []
    for name, row in settings.items():
        cells = [name.replace("_", " ")]
        cells += [plus_minus(row[policy]) for policy in ("sft", "dpo", "rlhf_global", "rlhf_minus_dpo")]
        if "optimum" in row:
            cells.append(f"{row['optimum']['mean']:.3f}")
            cells += [plus_minus(row[policy]["kl_to_optimum"], digits=2) for policy in ("dpo", "rlhf_global")]
        else:
            cells += ["-", "-", "-"]
        rows.append(cells)
    head = ["setting", "SFT", "DPO", "RLHF", "RLHF - DPO", "optimum", "KL(DPO, optimum)", "KL(RLHF, optimum)"]
    return [
        "## The gap between verifying and generating closed\n",
        table(head, rows),
        "True reward, and KL in nats. The optimum is the soft optimum of the true reward at the beta = kl "
        "of both roads, by enumeration. The two of few moves: 200 prompts, on which both roads train and "
        "are measured; their rewards are exact. The hidden reference: 100 prompts, sampled.\n",
        "Over-optimisation is shown by experiments/overoptimisation.py.\n",
    ]


# ---------------------------------------------------------------- text


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = []
    for cells in [head, ["---"] * len(head)] + rows:
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)
