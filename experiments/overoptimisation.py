"""Over-optimisation: with more KL the proxy goes on rising, while the true reward peaks and falls.

    python experiments/overoptimisation.py --seeds 0 1 2    175 seconds a seed on two CPU cores

Gao et al., 2210.10760, for RL and best of n; Rafailov et al., 2406.02900, for DPO. Gold is the
true reward, the proxy is the global reward model that RL climbs, and SFT's value is taken off
both. d = sqrt KL(policy || SFT). Three roads go away from SFT, a point for each setting:

rl         RL at six kl: 8 samples for each held-out prompt
dpo        DPO at four beta: the same
best of n  the proxy's favourite of n samples of SFT, over all choices of n of 64 for each prompt.
           Its KL, log n - (n - 1) / n, is an upper bound where responses repeat.

Gao's forms are fitted to the points of each seed by least squares: gold or proxy = d (a - b d) for
best of n, d (a - b ln d) for RL. DPO, which Gao did not have, gets the form of RL. The figure also
has the logged steps of RL at kl .05, on training prompts; they are in no fit.

Settings are the scripts' defaults but for kl and beta, and 150 steps in place of 300 at kl .1 and
.05: on seed 100 true reward and KL stood still from step 80 on. Nothing else was tried.

Result, three seeds. RL's gold peaks at kl .5 (KL 1.5, +.267) and is below SFT's at kl .05 (KL 8.2,
-.068), while the proxy is highest there. DPO's gold falls from +.221 at beta .3 to +.018 at .05,
where its held-out loss, .644, gives no sign of it, and its proxy hardly rises (+.06 +- .08). Best
of n is flat from 32 to 64 (+.336, +.337): no fall within 64. At RL's KL (kl .5) its lead in gold is
within two errors (+.015 +- .014). For gold, Gao's forms have an R2 of .97 (best of n), .88 (RL,
which peaks later and falls more steeply than its fit) and .80 (DPO).

Three seeds, one small world, one size of reward model, and seed 1's is weak. A peak is one of a few
settings. DPO's KL of 37 nats at beta .05 comes from samples with a tiny pi_ref: this point's place
on the axis says little, and DPO's fit depends on it.
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
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS, true_rewards
from nanoroads.report.phases import claim_folder, run_phases
from nanoroads.report.write import plus_minus, table
from nanoroads.run.flags import run_script
from nanoroads.run.folder import read_metrics
from nanoroads.score import mean_se, scalar_rewards, sequence_logps
from nanoroads.weights.checkpoint import load_policy, load_reward_model
from nanoroads.world.roadmap import WORLDS, prompts
from nanoroads.world.task import sample_routes

WORLD = WORLDS["roadmap"]
KLS = [1, 0.5, 0.3, 0.2, 0.1, 0.05]  # of RL, whose reward model is the proxy
BETAS = [1, 0.3, 0.1, 0.05]  # of DPO
BEST_OF = [2, 4, 8, 16, 32, 64]  # of SFT's samples, by the proxy
SAMPLES = 8  # of a policy for each of the 256 held-out prompts
ROADS = {"best of n": "d", "rl": "ln d", "dpo": "ln d"}  # {road: x of its form d (a - b x)}

# ---------------------------------------------------------------- KL, gold and proxy


def sample(policy, reference, proxy_model, k, key):
    """k samples for each held-out prompt -> log pi/pi_ref, gold, proxy: (256, k) each."""
    held_out = prompts(WORLD, "test")
    ids, responses = sample_routes(policy, WORLD, ENCODING, held_out, k, seed=key)
    gold = true_rewards(WORLD, held_out, responses)
    logp = sequence_logps(policy, ids, responses, GROUPS_PER_PASS)
    ref_logp = sequence_logps(reference, ids, responses, GROUPS_PER_PASS)
    proxy = scalar_rewards(proxy_model, ids, responses, GROUPS_PER_PASS)
    return kl_k1(logp, ref_logp).double(), gold.double(), proxy.double()


def best_of_n(proxy, value, n):
    """The mean value of the sample that the proxy likes best, over all choices of n of the N samples.

    proxy, value (P, N). Of the C(N, n) choices a sample is the best in those C(i, n - 1) whose other
    n - 1 samples are among the i that the proxy likes less."""
    total = proxy.shape[1]
    counts = [math.comb(i, n - 1) for i in range(total)]
    weights = torch.tensor(counts, dtype=value.dtype)  # (N,)
    from_below = value.gather(1, proxy.argsort(1))  # (P, N): the proxy's favourite last
    return (from_below @ weights / math.comb(total, n)).mean().item()


def best_of_n_rows(gold, proxy):
    """A row for each n. gold, proxy (256, 64): of SFT's samples."""
    rows = []
    for n in BEST_OF:
        kl = math.log(n) - (n - 1) / n  # an upper bound: a response that is drawn twice makes it less
        best_gold = best_of_n(proxy, gold, n)
        best_proxy = best_of_n(proxy, proxy, n)
        rows.append({"setting": n, "kl": kl, "gold": best_gold, "proxy": best_proxy})
    return rows


def policy_rows(runs, reference, proxy_model, key):
    """A row for each run. runs: {setting: folder}."""
    rows = []
    for setting, folder in runs.items():
        log_ratio, gold, proxy = sample(load_policy(folder), reference, proxy_model, SAMPLES, key)
        kl = max(log_ratio.mean().item(), 1e-6)  # the estimate of a small KL may be negative
        rows.append({"setting": setting, "kl": kl, "gold": gold.mean().item(), "proxy": proxy.mean().item()})
    return rows


def logged_rows(metrics):
    """A row for each step that RL has logged: of 256 samples, on 32 training prompts."""
    rows = []
    for row in metrics:
        gold = row["true_reward"]
        rows.append({"setting": row["step"], "kl": row["kl"], "gold": gold, "proxy": row["reward"]})
    return rows


def measure_seed(folder, seed):
    """{road: a row {"setting", "kl", "gold", "proxy"} for each setting}, the fits, and DPO's losses."""
    reference = load_policy(folder / "sft")
    proxy_model = load_reward_model(folder / "rlhf_global/reward")
    key = stream_key("over-optimisation", seed)
    _, gold, proxy = sample(reference, reference, proxy_model, BEST_OF[-1], key)
    rl_runs = {kl: folder / rlhf_run(kl) for kl in KLS}
    dpo_runs = {beta: folder / dpo_run(beta) for beta in BETAS}
    results = {
        "best of n": best_of_n_rows(gold, proxy),
        "rl": policy_rows(rl_runs, reference, proxy_model, key),
        "dpo": policy_rows(dpo_runs, reference, proxy_model, key),
        "along rl": logged_rows(read_metrics(rl_runs[KLS[-1]])),
    }

    # From here on, gold and proxy are less SFT's.
    sft_gold = gold.mean().item()
    sft_proxy = proxy.mean().item()
    for rows in results.values():
        for row in rows:
            row["gold"] -= sft_gold
            row["proxy"] -= sft_proxy

    results["dpo_loss"] = [read_metrics(run)[-1]["eval_loss"] for run in dpo_runs.values()]
    for road, form in ROADS.items():
        gold_fit = fit(results[road], "gold", form)
        results[f"{road}, fits"] = {"gold": gold_fit, "proxy": fit(results[road], "proxy", form)}
    return results


# ---------------------------------------------------------------- Gao's forms


def terms(d, form):
    """d (points,) -> (points, 2): d and -d x, of which a and b are the weights."""
    x = d
    if form == "ln d":
        x = d.log()
    return torch.stack([d, -d * x], 1)


def fit(rows, name, form):
    """Least squares over a road's settings -> {"a", "b", "r2"}. name: "gold" or "proxy"."""
    d = torch.tensor(values_of(rows, "kl"), dtype=torch.float64).sqrt()
    height = torch.tensor(values_of(rows, name), dtype=torch.float64)
    weights = torch.linalg.lstsq(terms(d, form), height[:, None]).solution  # (2, 1)
    error = height - (terms(d, form) @ weights).squeeze(1)
    r2 = 1 - error.square().sum() / (height - height.mean()).square().sum()
    return {"a": weights[0].item(), "b": weights[1].item(), "r2": r2.item()}


# ---------------------------------------------------------------- the verdict


def verdict(by_seed):
    """A line for each claim."""
    loss = plus_minus(over_seeds(by_seed, "dpo_loss", len(BETAS) - 1))
    dpo = falls_line(by_seed, "dpo", "DPO", "beta")
    lines = [
        falls_line(by_seed, "rl", "RL", "kl"),
        f"{dpo} At beta {BETAS[-1]} its held-out loss is {loss} (ln 2 is .693).",
        falls_line(by_seed, "best of n", "best of n", "n"),
    ]
    lead = mean_se([lead_at_equal_kl(results) for results in by_seed])
    text = f"best of n has more gold than RL at equal KL: at that of kl 0.5 by {with_errors(lead)}."
    lines.append(evidence.claim(is_above(lead), text))
    for road, form in ROADS.items():
        gold = over_seeds(by_seed, f"{road}, fits", "gold", "r2")
        proxy = over_seeds(by_seed, f"{road}, fits", "proxy", "r2")
        text = f"Gao's form d (a - b {form}) fits {road} with R2 above .9: {plus_minus(gold)} of gold, "
        text += f"{plus_minus(proxy)} of the proxy."
        lines.append(evidence.claim(is_above(gold, 0.9) and is_above(proxy, 0.9), text))
    return lines


def falls_line(by_seed, road, title, knob):
    """Whether from gold's peak to the last setting gold falls, and the proxy does not.

    The peak is the setting with the largest mean. knob: the name of what is set."""
    settings = values_of(by_seed[0][road], "setting")
    last = len(settings) - 1
    gold = [over_seeds(by_seed, road, place, "gold")["mean"] for place in range(len(settings))]
    peak = gold.index(max(gold))
    if peak == last:
        text = f"{title} over-optimises: gold is still at its largest at {knob} {settings[last]}."
        return evidence.claim(False, text)

    def change(name):
        """{"mean", "se"} of gold or proxy, the last setting less the peak."""
        return differences(values_of(by_seed, road, last, name), values_of(by_seed, road, peak, name))

    gold_change = change("gold")
    proxy_change = change("proxy")
    text = (
        f"{title} over-optimises: from {knob} {settings[peak]}, where gold peaks, to {settings[last]} gold "
    )
    text += f"changes by {with_errors(gold_change)}, the proxy by {with_errors(proxy_change, 2)}."
    return evidence.claim(is_below(gold_change) and not is_below(proxy_change), text)


def lead_at_equal_kl(results):
    """Gold of best of n, on straight lines from SFT to n to n, less RL's at its default kl, .5."""
    rl = results["rl"][KLS.index(0.5)]
    kls = [0.0] + values_of(results["best of n"], "kl")
    gold = [0.0] + values_of(results["best of n"], "gold")
    return float(np.interp(rl["kl"], kls, gold)) - rl["gold"]


# ---------------------------------------------------------------- table and figure


def table_of(by_seed):
    """The settings of each road, and Gao's fits."""
    points = []
    fits = []
    for road, form in ROADS.items():
        for place, row in enumerate(by_seed[0][road]):
            cells = means_with_errors(by_seed, (road, place), ("kl", "gold", "proxy"))
            points.append([road, str(row["setting"])] + cells)
        for name in ("gold", "proxy"):
            cells = means_with_errors(by_seed, (f"{road}, fits", name), ("a", "b", "r2"))
            fits.append([road, name, f"d (a - b {form})"] + cells)
    text = table(["road", "n, kl or beta", "KL, nats", "gold - SFT's", "proxy - SFT's"], points)
    return text + "\n" + table(["road", "of", "form, d = sqrt KL", "a", "b", "R2"], fits)


def figure_of(by_seed):
    """Gold and proxy against sqrt KL: points of all seeds, and the curves of the mean fits."""
    fig, axes = new_figure(11, 4.2, ncols=2)
    for ax, name in zip(axes, ("gold", "proxy"), strict=True):
        draw(ax, by_seed, "best of n", name, "s", INK, "best of n = 2 to 64")
        draw(ax, by_seed, "rl", name, "^", COLOURS["rlhf_global"], "RL, kl 1 to .05")
        draw(ax, by_seed, "dpo", name, "o", COLOURS["dpo"], "DPO, beta 1 to .05")
        d, along = points_of(by_seed, "along rl", name)
        ax.plot(d, along, ".", color="#f0b48a", zorder=0, label="along RL, kl .05")
        ax.axhline(0, color=COLOURS["sft"], lw=0.8, ls=":")
        ax.set(xscale="log", xlabel="d = sqrt KL(policy || SFT), KL in nats")
        ax.set_xticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
        ax.minorticks_off()
    axes[0].set(title="Gold: the true reward", ylabel="true reward - SFT's")
    axes[1].set(title="Proxy: the reward model's score", ylabel="score - SFT's")
    axes[1].legend()
    return fig


def draw(ax, by_seed, road, name, marker, colour, label):
    """A road's points of all seeds, and its form with the means of a and b over seeds."""
    d, height = points_of(by_seed, road, name)
    ax.plot(d, height, marker, color=colour, ms=5, mfc="none")
    a = over_seeds(by_seed, f"{road}, fits", name, "a")["mean"]
    b = over_seeds(by_seed, f"{road}, fits", name, "b")["mean"]
    x = torch.linspace(d.min(), d.max(), 200, dtype=torch.float64)
    y = terms(x, ROADS[road]) @ torch.tensor([a, b], dtype=torch.float64)
    ax.plot(x, y, color=colour, label=label)


def points_of(by_seed, road, name):
    """d, and gold or proxy, of all settings of all seeds."""
    points = []
    for results in by_seed:
        points += results[road]
    d = torch.tensor(values_of(points, "kl"), dtype=torch.float64).sqrt()
    return d, values_of(points, name)


def main(argv=None):
    """All runs, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    phases = []
    for seed in args.seeds:
        phases += evidence.regularised_phases(args.out / f"seed{seed}", seed, BETAS, KLS)
    run_phases(phases, args.out, args.jobs, lock)
    by_seed = []
    for seed in args.seeds:
        by_seed.append(measure_seed(args.out / f"seed{seed}", seed))
    report = table_of(by_seed), verdict(by_seed), figure_of(by_seed)
    evidence.write_results(args, "overoptimisation", __doc__, by_seed, *report)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
