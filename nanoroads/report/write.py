"""results.json of the main job -> report.md, its figures, and a verdict on each claim of the paper."""

from nanoroads import common, figures
from nanoroads.checkpoint import read_config, write_atomic


def pm(cell, digits=3):
    return f"{cell['mean']:.{digits}f} ± {cell['se']:.{digits}f}"


def table(head, rows):
    return "\n".join(["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]) + "\n"


def verdict(results):
    """What the numbers say, for or against the paper; nothing here is decided beforehand."""
    policies, same = results["policies"], results["equivalence"]
    sft, dpo, rlhf = (policies[n]["reward"]["mean"] for n in ("sft", "dpo", "rlhf_global"))
    yes = lambda holds: "yes" if holds else "NO"  # noqa: E731
    lines = [
        f"{yes(rlhf > dpo)}: RLHF on the global reward beats DPO in true reward (by {rlhf - dpo:+.3f}).",
        f"{yes(dpo > sft)}: DPO beats SFT (by {dpo - sft:+.3f}).",
        f"{yes(same['kl_dpo_rlhf_local'] < same['kl_dpo_sft'] / 4)}: RLHF on the local reward comes back to DPO's policy "
        f"(Theorem 2.2): KL {same['kl_dpo_sft']:.3f} before, {same['kl_dpo_rlhf_local']:.3f} nats after.",
    ]
    for name, row in results["gap_closed"].items():
        left = row["rlhf_global"]["mean"] - row["dpo"]["mean"]
        se = (row["rlhf_global"]["se"] ** 2 + row["dpo"]["se"] ** 2) ** 0.5
        lines.append(
            f"{yes(left < (rlhf - dpo) / 2)}: with the gap closed ({name.replace('_', ' ')}) less than half of RLHF's advantage "
            f"is left ({left:+.3f} ± {se:.3f})."
        )
    models = results["reward_models"]
    by_nll = sorted(models, key=lambda n: models[n]["nll"])
    by_best = sorted(models, key=lambda n: -models[n]["best_of_n"]["16"])
    lines.append(
        f"Best reward models first, by held-out likelihood: {', '.join(by_nll)}; by best-of-16: {', '.join(by_best)}."
    )
    return lines


def draw(results, out, at):
    """The figures; curves over training are those of the runs in `at`, the first seed's."""
    figures.rewards(results).savefig(out / "rewards.png")
    figures.best_of_n(results).savefig(out / "best_of_n.png")
    figures.equivalence(results, common.read_metrics(at / "rlhf_local")).savefig(out / "equivalence.png")
    figures.routes(results["routes"]).savefig(out / "routes.png")
    if results["gap_closed"]:
        rl, dpo = (
            {f"{key} {read_config(at / n)[key]}": common.read_metrics(at / n) for n in names}
            for key, names in (("kl", ("rlhf_global", "rlhf_low_kl")), ("beta", ("dpo", "dpo_low_beta")))
        )
        figures.overoptimisation(rl, dpo).savefig(out / "overoptimisation.png")


def write(results, out, at):
    """Figures and report.md in `out`, a Path."""
    draw(results, out, at)
    models, gap, same = results["reward_models"], results["gap_closed"], results["equivalence"]
    spread = "seeds" if len(results["seeds"]) > 1 else "prompts (one seed: run-to-run spread is larger)"
    policies = [
        [name, pm(row["reward"]), pm(row["greedy_reward"]), pm(row["kl_to_ref"], 2)]
        for name, row in results["policies"].items()
    ]
    three = lambda values: [f"{x:.3f}" for x in values]  # noqa: E731
    best = [[name, *three([m["nll"], m["accuracy"], *m["best_of_n"].values()])] for name, m in models.items()]
    truth = ["true reward", "", "", *three(results["best_of_n_true_reward"].values())]
    text = [
        "# All roads on the map\n",
        f"Seeds {results['seeds']}, {results['pairs']:,} pairs, {results['seconds']['total']:.0f} s. ± is one standard error "
        f"over {spread}. What was tuned: experiments/sweep.md.\n",
        *[f"- {line}" for line in verdict(results)],
        "\n## Policies: true reward on held-out prompts\n",
        table(["policy", "reward (T = 1)", "greedy reward", "KL to SFT, nats"], policies),
        "`optimum` is the reference restricted to shortest routes, the limit of small beta, by enumeration.\n",
        "![rewards](rewards.png)\n\n![routes](routes.png)\n",
        "## Reward models: held-out pairs, and the true reward of the best of N SFT samples\n",
        table(
            ["reward model", "nll", "accuracy", *(f"best of {n}" for n in results["best_of_n_true_reward"])],
            [*best, truth],
        ),
        "`dpo`: beta log pi/pi_ref of DPO's policy; `local`: Bradley-Terry on log pi alone; `global`: a scalar head.\n",
        "![best of N](best_of_n.png)\n",
        "## Theorem 2.2: RL on the local reward comes back to DPO\n",
        f"KL(DPO || SFT) {same['kl_dpo_sft']:.3f}, KL(DPO || RLHF-local) {same['kl_dpo_rlhf_local']:.3f} nats. Stage 1 of the "
        f"local road and DPO end {same['stage_1_weights_apart']:.1e} apart in their largest weight.\n",
        "![equivalence](equivalence.png)\n",
    ]
    if gap:
        rows = [
            [name.replace("_", " "), *(pm(row[n]) for n in ("sft", "dpo", "rlhf_global"))]
            for name, row in gap.items()
        ]
        apart = [f"{n} {gap['short_horizon'][n]['kl_to_optimum']:.2f}" for n in ("dpo", "rlhf_global")]
        seen = [f"{n} {pm(row['on_training_prompts'])}" for n, row in gap["short_horizon"].items()]
        text += ["## The gap closed\n", table(["world", "SFT", "DPO", "RLHF"], rows)]
        text += [f"Short horizon, on prompts of the training pairs: {', '.join(seen)}.\n"]
        text += [
            f"Short horizon, KL to the exact soft optimum of each one's beta, nats: {', '.join(apart)}.\n"
        ]
        text += [
            "## Over-optimisation: too weak a regulariser\n\n![over-optimisation](overoptimisation.png)\n"
        ]
    text += [
        "## Seconds\n",
        table(["phase", "s"], [[name, f"{s:.0f}"] for name, s in results["seconds"].items()]),
    ]
    write_atomic(out / "report.md", lambda path: path.write_text("\n".join(text)))
