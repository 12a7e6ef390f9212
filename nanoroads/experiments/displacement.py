"""The tables and the figure of experiments/displacement.py.

by_seed: of each seed {policy: its measures}, and "along": {policy: its changes along training}.
dpo_runs, rlhf_runs: the names of the policies of each road."""

from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import means_with_errors, over_seeds, values_of
from nanoroads.report.write import table


def table_of(by_seed, runs):
    """What happens to held-out pairs, and where the mass of the samples goes.

    runs: the names of all policies but SFT."""
    pairs = []
    for name in runs:
        cells = means_with_errors(by_seed, (name,), ("chosen", "rejected"), 2)
        cells += means_with_errors(by_seed, (name, "both"), ("mean",), 2)
        cells += means_with_errors(by_seed, (name, "kl_from_ref"), ("mean",), 2)
        cells += means_with_errors(by_seed, (name,), ("better", "ties", "rise", "chosen_mass"), 2)
        pairs.append([name] + cells)
    samples = []
    for name in ["SFT"] + list(runs):
        cells = means_with_errors(by_seed, (name,), ("kl", "reward", "arrives", "illegal", "unseen"))
        samples.append([name] + cells)
    pairs_head = ["held-out pairs", "chosen", "rejected", "mean of both", "KL(pi_ref to pi)"]
    pairs_head += ["better of unequal", "chosen of ties", "chosen that rise", "pi(chosen) / pi_ref, summed"]
    samples_head = ["samples", "KL(pi to pi_ref)", "true reward", "arrives", "illegal", "a token below .001"]
    return table(pairs_head, pairs) + "\n" + table(samples_head, samples)


def figure_of(by_seed, dpo_runs, rlhf_runs):
    """The pairs along DPO's training, and the two measures of leaving the data against KL."""
    fig, (along, illegal, unseen) = new_figure(13, 4, ncols=3)
    draw_training(along, by_seed)
    draw_against_kl(illegal, by_seed, dpo_runs, rlhf_runs, "illegal")
    draw_against_kl(unseen, by_seed, dpo_runs, rlhf_runs, "unseen")
    along.set(title="Held-out pairs along DPO")
    illegal.set(title="Illegal routes")
    unseen.set(title="A token with pi_ref < .001")
    return fig


def draw_training(ax, by_seed):
    """Change of log pi against the step of DPO, means over seeds: a width for each beta."""
    for beta, width in ((1, 1), (0.3, 2), (0.1, 3)):
        points = by_seed[0]["along"][f"DPO {beta}"]
        for response, style in (("chosen", "-"), ("rejected", "--")):
            means = []
            for place in range(len(points)):
                means.append(over_seeds(by_seed, "along", f"DPO {beta}", place, response)["mean"])
            label = f"{response}, beta {beta}"
            ax.plot(values_of(points, "step"), means, style, color=COLOURS["dpo"], lw=width, label=label)
    ax.axhline(0, color=INK, lw=0.8, ls=":")
    ax.set(xlabel="step", ylabel="change of log pi, nats")
    ax.legend(fontsize=8)


def draw_against_kl(ax, by_seed, dpo_runs, rlhf_runs, measure):
    """A share of the samples against KL: a line for each road and seed."""
    for runs, colour, label in (
        (dpo_runs, COLOURS["dpo"], "DPO"),
        (rlhf_runs, COLOURS["rlhf_global"], "RLHF"),
    ):
        for rows in by_seed:
            policies = [rows[name] for name in runs]
            kls = values_of(policies, "kl")
            ax.plot(kls, values_of(policies, measure), "o-", ms=4, mfc="none", color=colour)
        ax.plot([], [], "o-", ms=4, mfc="none", color=colour, label=label)  # once in the legend
    sft = over_seeds(by_seed, "SFT", measure)["mean"]
    ax.axhline(sft, color=COLOURS["sft"], lw=1, ls=":", label="SFT")
    ax.set(xscale="log", xlabel="KL(policy || SFT), nats")
    ax.set(ylabel="share of samples; a line a seed", ylim=(0, 1))
    ax.set_xticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
    ax.minorticks_off()
    ax.legend(loc="upper left")
