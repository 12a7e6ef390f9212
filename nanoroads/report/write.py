"""results.json of all_roads.py -> report.md, figures, and a verdict on each claim of the paper."""

import tempfile
from pathlib import Path

from nanoroads.report import figures
from nanoroads.report.cells import above, below, claim, plus_minus, with_errors
from nanoroads.report.drawing import save
from nanoroads.report.evidence import differences, lead, over_seeds, values_of
from nanoroads.report.gap_closed import closed_line
from nanoroads.report.page import report_page
from nanoroads.run.folder import read_metrics
from nanoroads.score import mean_se
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
    if len(results["seeds"]) > 1:
        parts += seeds_section(results)
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
    """What the numbers say, for or against the paper. Differences are taken seed by seed."""
    by_seed = results["by_seed"]
    policies = values_of(by_seed, "policies")
    ahead = lead(policies, "rlhf_global", "dpo", "reward", "mean")
    gain = lead(policies, "dpo", "sft", "reward", "mean")
    lines = [
        claim(above(ahead), f"RLHF on the global reward beats DPO in true reward (by {with_errors(ahead)})."),
        claim(above(gain), f"DPO beats SFT (by {with_errors(gain)})."),
        comes_back_line(by_seed),
    ]
    for name, row in results["gap_closed"].items():
        lines.append(gap_closed_line(IN_WORDS[name], row, alone=len(by_seed) == 1))
    return lines


def comes_back_line(by_seed):
    """Theorem 2.2: at least three quarters of the KL that DPO has to SFT's policy are gone."""
    before = values_of(by_seed, "equivalence", "kl_dpo_sft")
    after = values_of(by_seed, "equivalence", "kl_dpo_rlhf_local")
    too_far = differences(after, [kl / 4 for kl in before])
    text = "RLHF on the local reward comes back to DPO's policy (Theorem 2.2), three quarters of the KL are "
    text += f"gone: {plus_minus(mean_se(before))} nats before, {plus_minus(mean_se(after))} after; this less "
    text += f"a quarter of before: {with_errors(too_far)}."
    return claim(below(too_far), text)


IN_WORDS = {
    "short_horizon": "at one move, where nothing is left to plan,",
    "two_moves": "at two moves, with one state in between to plan,",
    "hidden_reference": "against a hidden walk",
}


def gap_closed_line(setting, row, alone):
    """Whether RLHF and DPO are one, in a setting of IN_WORDS. row: of `gap_closed.gap_closed_row`.

    alone: of one seed. Its errors, over prompts, are left out, as no line has others than over seeds."""

    def over_seeds_only(cell):
        return {"mean": cell["mean"], "se": 0.0} if alone else cell

    lead = over_seeds_only(row["rlhf_minus_dpo"])
    if "optimum" not in row:
        text = f"{setting.capitalize()} RLHF - DPO is {with_errors(lead)}; how near the optimum either is, "
        return f"{text}is not known: no claim."
    distances = [over_seeds_only(row[road]["kl_to_optimum"]) for road in ("dpo", "rlhf_global")]
    return closed_line(setting, lead, *distances)


# ---------------------------------------------------------------- the sections


def opening(results):
    spread = "seeds"
    if len(results["seeds"]) == 1:
        spread = "prompts (one seed: run-to-run spread is larger, and the lines below have no error)"
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
    by_seed, truth = results["by_seed"], results["best_of_n_true_reward"]
    rows = []
    for name in results["reward_models"]:
        cells = [over_seeds(by_seed, "reward_models", name, column) for column in ("nll", "accuracy")]
        cells += [over_seeds(by_seed, "reward_models", name, "best_of_n", n) for n in truth]
        rows.append([name] + [plus_minus(cell) for cell in cells])
    limits = [plus_minus(over_seeds(by_seed, "best_of_n_true_reward", n)) for n in truth]
    rows.append(["true reward", "", ""] + limits)
    models = results["reward_models"]
    by_nll = sorted(models, key=lambda name: models[name]["nll"])
    by_best_of_n = sorted(models, key=lambda name: -models[name]["best_of_n"]["16"])
    return [
        "## Reward models: held-out pairs, and the true reward of the best of N SFT samples\n",
        table(["reward model", "nll", "accuracy"] + [f"best of {n}" for n in truth], rows),
        "`dpo`: beta log pi/pi_ref of DPO's policy; `local`: Bradley-Terry on log pi alone; "
        "`global`: a scalar head. "
        f"Their means, the best first, by held-out likelihood: {', '.join(by_nll)}; by best of 16: "
        f"{', '.join(by_best_of_n)}.\n",
        "![best of N](best_of_n.svg)\n",
    ]


def equivalence_section(results):
    before, after = [
        plus_minus(over_seeds(results["by_seed"], "equivalence", name))
        for name in ("kl_dpo_sft", "kl_dpo_rlhf_local")
    ]
    return [
        "## Theorem 2.2: RL on the local reward comes back to DPO\n",
        f"KL(DPO || SFT) {before}, KL(DPO || RLHF-local) {after} nats. Stage 1 of the local road and DPO end "
        f"{results['equivalence']['stage_1_weights_apart']:.1e} apart in their largest weight.\n",
        "![equivalence](equivalence.svg)\n",
    ]


def seeds_section(results):
    """What the verdict is about, seed by seed."""
    rows = []
    for seed, row in zip(results["seeds"], results["by_seed"], strict=True):
        policies = row["policies"]
        numbers = []
        for column in ("reward", "greedy_reward"):
            numbers += [policies[name][column]["mean"] for name in ("sft", "dpo", "rlhf_global")]
        numbers += [policies[name]["kl_to_ref"]["mean"] for name in ("dpo", "rlhf_global")]
        numbers += [row["reward_models"]["global"]["accuracy"], row["equivalence"]["kl_dpo_rlhf_local"]]
        rows.append([str(seed)] + [f"{number:.3f}" for number in numbers])
    head = ["seed", "SFT", "DPO", "RLHF", "greedy: SFT", "DPO", "RLHF", "KL to SFT: DPO", "RLHF"]
    head += ["accuracy of the global reward", "KL(DPO, RLHF-local)"]
    return ["## Seed by seed: true reward, and the rest\n", table(head, rows)]


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
