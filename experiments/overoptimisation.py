"""Over-optimisation: with more KL the proxy goes on rising, while the true reward peaks and falls.

    python experiments/overoptimisation.py --seeds 0 1 2    175 seconds a seed on two CPU cores

Gao et al., 2210.10760, for RL and best of n; Rafailov et al., 2406.02900, for DPO. Gold is the
true reward, the proxy is the global reward model that RL climbs, both less SFT's of the same
seed; d = sqrt KL(policy || SFT). Points: RL at six kl, DPO at four beta (8 samples for each
held-out prompt), best of 2 to 64 of SFT's samples by the proxy (64 for each prompt, all choices
of n of them; its KL log n - (n - 1)/n is an upper bound where responses repeat). Gao's forms are
fitted by least squares to the end points of each seed, which has a reward model of its own:
d (a - b d) for best of n, d (a - b ln d) for RL, and the latter for DPO, which Gao did not have.
"Along RL" are the logged steps of kl .05, of training prompts; they are in no fit.

Settings are the scripts' defaults but for kl and beta, and for the steps at kl .1 and .05: 150 in
place of 300, since on seed 100 true reward and KL stood still from step 80 to 300 at kl .05.
Nothing else was tried.

Measured, seeds 0 to 2. RL's gold peaks at kl .5 (KL 1.5, +.267) and is below SFT's at kl .05 (KL
8.2, -.068), while the proxy is highest there. DPO's gold falls from +.221 at beta .3 to +.018 at
.05, where its held-out loss, .644, gives no sign of it. Best of n is flat from 32 to 64 (+.336,
+.337): no fall within 64. At RL's KL (kl .5) it has no more gold than RL (+.015 +- .014). Gao's
forms have an R2 of .97 for best of n, .88 for RL's gold and .80 for DPO's: RL's gold peaks later
and falls more steeply than its fit. A peak is the setting of the largest mean, so of few
settings.

Three seeds, one small world, one size of reward model, and seed 1's is weak. DPO's mean KL at
beta .05 (37 nats) is that of a few samples with a tiny pi_ref, so its place on the axis says
little.
"""

import math

import numpy as np
import torch

from nanoroads.losses import kl_k1
from nanoroads.randomness import stream_key
from nanoroads.report import evidence
from nanoroads.report.drawing import COLOURS, INK, new_figure
from nanoroads.report.evidence import (
    differences,
    dpo_run,
    is_above,
    is_below,
    means_with_errors,
    over_seeds,
    rlhf_run,
    values_of,
    with_errors,
)
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS
from nanoroads.report.phases import claim, run_phases
from nanoroads.report.write import plus_minus, table
from nanoroads.run.flags import run_script
from nanoroads.run.folder import read_metrics
from nanoroads.score import mean_se, scalar_rewards, sequence_logps
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_policy, load_reward_model
from nanoroads.world.roadmap import WORLDS, prompts
from nanoroads.world.task import sample_routes

WORLD = WORLDS["roadmap"]
KLS = [1, 0.5, 0.3, 0.2, 0.1, 0.05]  # of RL, whose reward model is the proxy
BETAS = [1, 0.3, 0.1, 0.05]  # of DPO
BEST_OF = [2, 4, 8, 16, 32, 64]  # of SFT's samples, by the proxy
SAMPLES = 8  # of a policy for each of the 256 held-out prompts
# Gao's two forms of gold and proxy, with d = sqrt(KL): d (a - b d) of best of n, d (a - b ln d) of RL.
ROADS = {"best of n": "d", "rl": "ln d", "dpo": "ln d"}

# ---------------------------------------------------------------- KL, gold and proxy


def sample(policy, reference, judge, k, key):
    """k samples for each held-out prompt -> log pi/pi_ref, gold, proxy: (256, k) each."""
    held_out = prompts(WORLD, "test")
    ids, responses = sample_routes(policy, WORLD, ENCODING, held_out, k, seed=key)
    gold = []
    for prompt, group in zip(held_out, responses, strict=True):
        gold.append([WORLD.reward(prompt, text) for text in tokenizer.decode_all(ENCODING, group)])
    logp = sequence_logps(policy, ids, responses, GROUPS_PER_PASS)
    ref_logp = sequence_logps(reference, ids, responses, GROUPS_PER_PASS)
    proxy = scalar_rewards(judge, ids, responses, GROUPS_PER_PASS)
    return kl_k1(logp, ref_logp).double(), torch.tensor(gold).double(), proxy.double()


def best_of_n(proxy, value, n):
    """The mean value of the sample that the proxy likes best, over all choices of n of the N samples.

    proxy, value (P, N). The sample with i below it is the best of C(i, n - 1) of C(N, n) choices."""
    total = proxy.shape[1]
    weights = torch.tensor([math.comb(i, n - 1) for i in range(total)], dtype=value.dtype)  # (N,)
    from_below = value.gather(1, proxy.argsort(1))  # (P, N)
    return (from_below @ weights / math.comb(total, n)).mean().item()


def measure(folder, seed):
    """{road: a row {"setting", "kl", "gold", "proxy"} for each setting}, gold and proxy less SFT's."""
    reference = load_policy(folder / "sft")
    judge = load_reward_model(folder / "rlhf_global/reward")
    key = stream_key("over-optimisation", seed)
    _, gold, proxy = sample(reference, reference, judge, BEST_OF[-1], key)
    sft_gold, sft_proxy = gold.mean().item(), proxy.mean().item()
    rows = {"best of n": [], "rl": [], "dpo": [], "along rl": []}

    def add(road, setting, kl, gold, proxy):
        row = {"setting": setting, "kl": kl, "gold": gold - sft_gold, "proxy": proxy - sft_proxy}
        rows[road].append(row)

    for n in BEST_OF:
        kl = math.log(n) - (n - 1) / n  # an upper bound: a response that is drawn twice makes it less
        add("best of n", n, kl, best_of_n(proxy, gold, n), best_of_n(proxy, proxy, n))
    for road, settings, run_of in (("rl", KLS, rlhf_run), ("dpo", BETAS, dpo_run)):
        for setting in settings:
            policy = load_policy(folder / run_of(setting))
            log_ratio, gold, proxy = sample(policy, reference, judge, SAMPLES, key)
            kl = max(log_ratio.mean().item(), 1e-6)  # the estimate of a small KL may be negative
            add(road, setting, kl, gold.mean().item(), proxy.mean().item())
    for row in read_metrics(folder / rlhf_run(KLS[-1])):  # of 256 samples on 32 training prompts each
        add("along rl", row["step"], row["kl"], row["true_reward"], row["reward"])
    rows["dpo_loss"] = [read_metrics(folder / dpo_run(beta))[-1]["eval_loss"] for beta in BETAS]
    for road, form in ROADS.items():
        rows[f"{road}, fits"] = {name: fit(rows[road], name, form) for name in ("gold", "proxy")}
    return rows


# ---------------------------------------------------------------- Gao's forms


def terms(d, form):
    """d (points,) -> (points, 2): what a and b are the weights of."""
    falls = d
    if form == "ln d":
        falls = d.log()
    return torch.stack([d, -d * falls], 1)


def fit(rows, name, form):
    """Least squares over a road's settings -> {"a", "b", "r2"}."""
    d = torch.tensor([row["kl"] for row in rows], dtype=torch.float64).sqrt()
    height = torch.tensor([row[name] for row in rows], dtype=torch.float64)
    weights = torch.linalg.lstsq(terms(d, form), height[:, None]).solution  # (2, 1)
    error = height - (terms(d, form) @ weights).squeeze(1)
    r2 = 1 - error.square().sum() / (height - height.mean()).square().sum()
    return {"a": weights[0].item(), "b": weights[1].item(), "r2": r2.item()}


# ---------------------------------------------------------------- the report


def falls_line(by_seed, road, name, knob):
    """Whether gold falls from its peak, the setting with the largest mean, to the last one, while the
    proxy does not."""
    settings = [row["setting"] for row in by_seed[0][road]]
    gold = [over_seeds(by_seed, road, place, "gold")["mean"] for place in range(len(settings))]
    peak, last = gold.index(max(gold)), len(settings) - 1
    if peak == last:
        text = f"gold is still at its largest at {knob} {settings[last]}."
        return evidence.claim(False, f"{name} over-optimises: {text}")
    change = {}
    for of in ("gold", "proxy"):
        change[of] = differences(values_of(by_seed, road, last, of), values_of(by_seed, road, peak, of))
    return evidence.claim(
        is_below(change["gold"]) and not is_below(change["proxy"]),
        f"{name} over-optimises: from {knob} {settings[peak]}, where gold peaks, to {settings[last]} gold "
        f"changes by {with_errors(change['gold'])}, the proxy by {with_errors(change['proxy'], 2)}.",
    )


def ahead_at_equal_kl(seed):
    """Gold of best of n, on a straight line between two n, less RL's at the KL of its default, .5."""
    rl = seed["rl"][KLS.index(0.5)]
    kls, gold = [0.0], [0.0]  # SFT's
    for row in seed["best of n"]:
        kls.append(row["kl"])
        gold.append(row["gold"])
    return float(np.interp(rl["kl"], kls, gold)) - rl["gold"]


def verdict(by_seed):
    """A line for each claim."""
    low = plus_minus(over_seeds(by_seed, "dpo_loss", len(BETAS) - 1))
    dpo = falls_line(by_seed, "dpo", "DPO", "beta")
    lines = [
        falls_line(by_seed, "rl", "RL", "kl"),
        f"{dpo} At beta {BETAS[-1]} its held-out loss is {low} (ln 2 is .693).",
        falls_line(by_seed, "best of n", "best of n", "n"),
    ]
    ahead = mean_se([ahead_at_equal_kl(seed) for seed in by_seed])
    text = f"best of n has more gold than RL at equal KL: at that of kl 0.5 by {with_errors(ahead)}."
    lines.append(evidence.claim(is_above(ahead), text))
    for road, form in ROADS.items():
        gold = over_seeds(by_seed, f"{road}, fits", "gold", "r2")
        proxy = over_seeds(by_seed, f"{road}, fits", "proxy", "r2")
        text = f"Gao's form d (a - b {form}) fits {road} with R2 above .9: {plus_minus(gold)} of gold, "
        text += f"{plus_minus(proxy)} of the proxy."
        lines.append(evidence.claim(is_above(gold, 0.9) and is_above(proxy, 0.9), text))
    return lines


def table_of(by_seed):
    """The settings of each road, and Gao's fits."""
    settings, fits = [], []
    for road, form in ROADS.items():
        for place, row in enumerate(by_seed[0][road]):
            cells = means_with_errors(by_seed, (road, place), ("kl", "gold", "proxy"))
            settings.append([road, str(row["setting"]), *cells])
        for name in ("gold", "proxy"):
            cells = means_with_errors(by_seed, (f"{road}, fits", name), ("a", "b", "r2"))
            fits.append([road, name, f"d (a - b {form})", *cells])
    text = table(["road", "n, kl or beta", "KL, nats", "gold - SFT's", "proxy - SFT's"], settings)
    return text + "\n" + table(["road", "of", "form, d = sqrt KL", "a", "b", "R2"], fits)


def figure_of(by_seed):
    """Gold and proxy against sqrt KL: points of all seeds, and the curves of the mean fits."""
    fig, axes = new_figure(11, 4.2, ncols=2)
    styles = {
        "best of n": ("s", INK, "best of n = 2 to 64"),
        "rl": ("^", COLOURS["rlhf_global"], "RL, kl 1 to .05"),
        "dpo": ("o", COLOURS["dpo"], "DPO, beta 1 to .05"),
    }
    for ax, name in zip(axes, ("gold", "proxy"), strict=True):
        for road, (marker, colour, label) in styles.items():
            points = [row for seed in by_seed for row in seed[road]]
            d = torch.tensor([row["kl"] for row in points], dtype=torch.float64).sqrt()
            ax.plot(d, [row[name] for row in points], marker, color=colour, ms=5, mfc="none")
            weights = [over_seeds(by_seed, f"{road}, fits", name, key)["mean"] for key in ("a", "b")]
            x = torch.linspace(d.min(), d.max(), 200, dtype=torch.float64)
            y = terms(x, ROADS[road]) @ torch.tensor(weights, dtype=torch.float64)
            ax.plot(x, y, color=colour, label=label)
        along = [row for seed in by_seed for row in seed["along rl"]]
        steps = [row["kl"] ** 0.5 for row in along]
        ax.plot(steps, [row[name] for row in along], ".", color="#f0b48a", zorder=0, label="along RL, kl .05")
        ax.axhline(0, color=COLOURS["sft"], lw=0.8, ls=":")
        ax.set(xscale="log", xlabel="d = sqrt KL(policy || SFT), KL in nats")
        ax.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        ax.minorticks_off()
    axes[0].set(title="Gold: the true reward", ylabel="true reward - SFT's")
    axes[1].set(title="Proxy: the reward model's score", ylabel="score - SFT's")
    axes[1].legend()
    return fig


def main(argv=None):
    """All runs, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim(args.out)
    folders = {seed: args.out / f"seed{seed}" for seed in args.seeds}
    phases = []
    for seed, folder in folders.items():
        phases += evidence.regularised_phases(folder, seed, BETAS, KLS)
    run_phases(phases, args.out, args.jobs, lock)
    by_seed = [measure(folder, seed) for seed, folder in folders.items()]
    text, lines = table_of(by_seed), verdict(by_seed)
    evidence.write_results(args, "overoptimisation", __doc__, by_seed, text, lines, figure_of(by_seed))


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
