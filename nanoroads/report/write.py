"""results.json of all_roads.py -> report.md, figures, and a verdict on each claim of the paper."""

import tempfile
from pathlib import Path

from nanoroads.report import figures
from nanoroads.run.folder import read_metrics
from nanoroads.weights.files import json_bytes, read_config, write_text


def report_files(results: dict, folder: Path) -> dict[str, bytes]:
    """results.json, report.md and the figures as {file name: bytes}, for `made_from.make_or_keep`."""
    files = {"results.json": json_bytes(results)}
    with tempfile.TemporaryDirectory() as drawn:
        write_report(results, Path(drawn), folder)
        for path in sorted(Path(drawn).iterdir()):
            files[path.name] = path.read_bytes()
    return files


def write_report(results: dict, out: Path, folder: Path):
    """Figures and report.md in `out`. folder: the first seed's runs, for curves along training."""
    draw(results, out, folder)
    parts = opening(results) + policies_section(results)
    parts += reward_models_section(results) + equivalence_section(results)
    if results["gap_closed"]:
        parts += gap_closed_section(results["gap_closed"])
    rows = [[name, f"{seconds:.0f}"] for name, seconds in results["seconds"].items()]
    parts += ["## Seconds\n", table(["phase", "s"], rows)]
    write_text(out / "report.md", "\n".join(parts))


def draw(results, out, folder):
    """The figures."""
    figures.rewards(results).savefig(out / "rewards.png")
    figures.best_of_n(results).savefig(out / "best_of_n.png")
    figures.equivalence(results, read_metrics(folder / "rlhf_local")).savefig(out / "equivalence.png")
    figures.routes(results).savefig(out / "routes.png")
    if results["gap_closed"]:  # not a quick look, so the runs with too weak a regulariser are there
        rlhf = metrics_by_flag([folder / "rlhf_global", folder / "rlhf_low_kl"], "kl")
        dpo = metrics_by_flag([folder / "dpo", folder / "dpo_low_beta"], "beta")
        sft_reward = results["policies"]["sft"]["reward"]["mean"]
        figures.overoptimisation(sft_reward, rlhf, dpo).savefig(out / "overoptimisation.png")


def metrics_by_flag(runs, flag):
    """{"kl 0.5": rows of metrics.jsonl} of runs that differ in a flag."""
    return {f"{flag} {read_config(run)[flag]}": read_metrics(run) for run in runs}


# ---------------------------------------------------------------- the verdict


def verdict(results: dict) -> list[str]:
    """What the numbers say, for or against the paper."""
    rewards = {name: row["reward"] for name, row in results["policies"].items()}  # {"mean", "se"} each
    lead, lead_se = difference(rewards["rlhf_global"], rewards["dpo"])
    gain, gain_se = difference(rewards["dpo"], rewards["sft"])
    before = results["equivalence"]["kl_dpo_sft"]
    after = results["equivalence"]["kl_dpo_rlhf_local"]
    # "comes back": more than three quarters of the KL that SFT's policy had to DPO's are gone
    comes_back = after < before / 4
    lines = [
        f"{yes_or_no(lead > 0)}: RLHF on the global reward beats DPO in true reward "
        f"(by {with_se(lead, lead_se)}).",
        f"{yes_or_no(gain > 0)}: DPO beats SFT (by {with_se(gain, gain_se)}).",
        f"{yes_or_no(comes_back)}: RLHF on the local reward comes back to DPO's policy (Theorem 2.2): "
        f"KL {before:.3f} before, {after:.3f} nats after.",
    ]
    for name, row in results["gap_closed"].items():
        advantage, se = difference(row["rlhf_global"], row["dpo"])
        world = name.replace("_", " ")
        lines.append(
            f"{yes_or_no(advantage < lead / 2)}: with the gap closed ({world}) less than half "
            f"of RLHF's advantage is left ({advantage:+.3f} ± {se:.3f})."
        )
    models = results["reward_models"]
    by_nll = sorted(models, key=lambda name: models[name]["nll"])
    by_best_of_n = sorted(models, key=lambda name: -models[name]["best_of_n"]["16"])
    lines.append(
        f"Best reward models first, by held-out likelihood: {', '.join(by_nll)}; "
        f"by best-of-16: {', '.join(by_best_of_n)}."
    )
    return lines


def yes_or_no(holds):
    """How a claim that holds, or does not, begins its line."""
    return "yes" if holds else "NO"


def difference(one, other):
    """(one - other, its standard error) of two {"mean", "se"}, taken as independent."""
    return one["mean"] - other["mean"], (one["se"] ** 2 + other["se"] ** 2) ** 0.5


def with_se(gain, se):
    """A difference and its standard error, and a word where that is large."""
    doubt = ", less than two standard errors" if abs(gain) < 2 * se else ""
    return f"{gain:+.3f} ± {se:.3f}{doubt}"


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
        "![rewards](rewards.png)\n\n![routes](routes.png)\n",
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
        "![best of N](best_of_n.png)\n",
    ]


def equivalence_section(results):
    row = results["equivalence"]
    return [
        "## Theorem 2.2: RL on the local reward comes back to DPO\n",
        f"KL(DPO || SFT) {row['kl_dpo_sft']:.3f}, KL(DPO || RLHF-local) {row['kl_dpo_rlhf_local']:.3f} nats. "
        f"Stage 1 of the local road and DPO end {row['stage_1_weights_apart']:.1e} apart in their largest "
        "weight.\n",
        "![equivalence](equivalence.png)\n",
    ]


def gap_closed_section(worlds):
    rows = []
    for name, row in worlds.items():
        rewards = [plus_minus(row[policy]) for policy in ("sft", "dpo", "rlhf_global")]
        rows.append([name.replace("_", " ")] + rewards)
    short = worlds["short_horizon"]
    on_training_prompts = [f"{name} {plus_minus(row['on_training_prompts'])}" for name, row in short.items()]
    to_optimum = [f"{name} {short[name]['kl_to_optimum']:.2f}" for name in ("dpo", "rlhf_global")]
    return [
        "## The gap closed\n",
        table(["world", "SFT", "DPO", "RLHF"], rows),
        f"Short horizon, on prompts of the training pairs: {', '.join(on_training_prompts)}.\n",
        f"Short horizon, KL to the exact soft optimum of each one's beta, nats: {', '.join(to_optimum)}.\n",
        "## Over-optimisation: too weak a regulariser\n\n![over-optimisation](overoptimisation.png)\n",
    ]


# ---------------------------------------------------------------- text


def plus_minus(cell, digits=3):
    """{"mean", "se"} -> `0.512 ± 0.008`."""
    return f"{cell['mean']:.{digits}f} ± {cell['se']:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = []
    for cells in [head, ["---"] * len(head)] + rows:
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)
