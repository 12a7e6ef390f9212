"""RL, DPO and best of n over-optimise: the true reward peaks and falls, as Gao's forms have it.

    python experiments/overoptimisation.py --seeds 0 1 2    about 40 s a seed after displacement.py

Gao et al., 2210.10760, for RL and best of n; Rafailov et al., 2406.02900, for DPO. Gold is the
true reward, the proxy is the global reward model that RL climbs, and SFT's value is taken off
both. d = sqrt KL(policy || SFT). Three roads go away from SFT, a point for each setting: RL at six
kl, DPO at four beta, and best of n, the proxy's favourite of n samples of SFT, over all choices of
n of 64 for each prompt. A fall is from the setting where the other seeds' mean gold peaks. Gao's
forms are fitted to the points of each seed by least squares.

Result, three seeds. From kl .5 to .05 RL's gold falls by .335 +- .044 while the proxy rises by
1.28. From beta .3 to .05 DPO's falls by .203 +- .018; its held-out loss has changed by -.005 +-
.004 at .1 and by .008 +- .003 at .05. Best of n is undecided: from 32 to 64 samples +.000 +- .005.
Gao's forms fit best of n (R2 of gold .972 +- .004, above .9), not DPO (.795 +- .022); RL is
undecided (.878 +- .026), and so is whether best of n has more gold than RL at equal KL (+.015 +-
.014).
Settings that were tried, and what it does not show: experiments/README.md.
"""

from nanoroads.experiments.gao import fit
from nanoroads.experiments.gold_and_proxy import best_of_n_rows, logged_rows, policy_rows, sample
from nanoroads.experiments.overoptimisation import (
    ROADS,
    falls_line,
    figure_of,
    fits_line,
    lead_at_equal_kl,
    loss_text,
    table_of,
)
from nanoroads.randomness import stream_key
from nanoroads.report import evidence
from nanoroads.report.cells import above, claim, with_errors
from nanoroads.report.evidence import dpo_run, rlhf_run
from nanoroads.report.phases import claim_folder, run_phases
from nanoroads.run.flags import run_script
from nanoroads.run.folder import read_metrics
from nanoroads.score import mean_se
from nanoroads.weights.checkpoint import load_policy, load_reward_model

KLS = [1, 0.5, 0.3, 0.2, 0.1, 0.05]  # of RL, on the proxy; .1 and .05 for half as many steps
DEFAULT_KL = 0.5
BETAS = [1, 0.3, 0.1, 0.05]  # of DPO
BEST_OF = [2, 4, 8, 16, 32, 64]  # of SFT's samples, by the proxy
SAMPLES = 8  # of a policy for each of the 256 held-out prompts
FITS_ABOVE = 0.9  # R2 of a form that fits


def measure_seed(folder, seed):
    """{road: a row {"setting", "kl", "gold", "proxy"} for each setting}, the fits, and DPO's losses."""
    reference = load_policy(folder / "sft")
    proxy_model = load_reward_model(folder / "rlhf_global/reward")
    key = stream_key("over-optimisation", seed)
    _, gold, proxy = sample(reference, reference, proxy_model, BEST_OF[-1], key)
    rl_runs = {}
    for kl in KLS:
        rl_runs[kl] = folder / rlhf_run(kl)
    dpo_runs = {}
    for beta in BETAS:
        dpo_runs[beta] = folder / dpo_run(beta)
    results = {
        "best of n": best_of_n_rows(gold, proxy, BEST_OF),
        "rl": policy_rows(rl_runs, reference, proxy_model, SAMPLES, key),
        "dpo": policy_rows(dpo_runs, reference, proxy_model, SAMPLES, key),
        "along rl": logged_rows(read_metrics(rl_runs[KLS[-1]])),
    }
    sft_gold = gold.mean().item()
    sft_proxy = proxy.mean().item()
    for rows in results.values():
        for row in rows:  # from here on, gold and proxy are less SFT's
            row["gold"] -= sft_gold
            row["proxy"] -= sft_proxy
    results["dpo_loss"] = [read_metrics(run)[-1]["eval_loss"] for run in dpo_runs.values()]
    for road, form in ROADS.items():
        gold_fit = fit(results[road], "gold", form)
        results[f"{road}, fits"] = {"gold": gold_fit, "proxy": fit(results[road], "proxy", form)}
    return results


def verdict(by_seed):
    """A line for each claim."""
    lead = mean_se([lead_at_equal_kl(results, KLS.index(DEFAULT_KL)) for results in by_seed])
    text = f"best of n has more gold than RL at equal KL: at that of kl {DEFAULT_KL} by {with_errors(lead)}."
    return [
        falls_line(by_seed, "rl", "RL", "kl"),
        f"{falls_line(by_seed, 'dpo', 'DPO', 'beta')} {loss_text(by_seed)}",
        falls_line(by_seed, "best of n", "best of n", "n"),
        claim(above(lead), text),
        *[fits_line(by_seed, road, FITS_ABOVE) for road in ROADS],
    ]


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
