"""Local rewards lead global ones in best of N because they keep a prior, log pi_ref.

    python experiments/prior_of_local.py --seeds 0 1 2    about 20 s a seed after hypotheses.py

A hypothesis of ours beside H5 of Swamy et al., 2503.01067: local rewards lead global ones because
of their prior. beta log pi is trained from pi_ref on, so it prefers what pi_ref finds likely; a
scalar head knows nothing of that. The test: w log pi_ref is added to the global reward, with the w
that is best on one half of the held-out prompts, measured on the other half, and the other way
round. The same is done to the local reward, where w = -beta takes the prior away. Best of 16, with
64 samples of SFT for each of 256 held-out prompts.

Result, three seeds: that local leads is undecided (+.055 ± .033). The prior lifts global, by .017 ±
.007; whether that is more than half way to local is undecided (-.010 ± .009). Without any prior
local is below global, by .299 ± .029.

Settings that were tried, and what it does not show: experiments/README.md
"""

from nanoroads.experiments.prior_of_local import figure_of, table_of
from nanoroads.report import evidence
from nanoroads.report.cells import above, claim, every, with_errors
from nanoroads.report.evidence import differences, values_of
from nanoroads.report.judged import samples_of
from nanoroads.report.measures import best_of_n
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.run.flags import run_script
from nanoroads.score import rewards, sequence_logps
from nanoroads.weights.checkpoint import load_policy, load_reward_model

BETA = 0.3  # of the local reward; reward_classes.py has .1. At the weight -BETA no prior is left.
WEIGHTS = [-0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0]  # of log pi_ref
SAMPLES = 64  # of the SFT policy for each held-out prompt


def phases_of(folder, seed):
    """The shared runs, and the paper's local reward."""
    local = ["train_dpo.py", "--seed", seed, "--data", "roadmap", "--init", folder / "sft"] + evidence.DPO
    local += ["--loss", "reference-free", "--beta", BETA]
    shared = evidence.shared_phases(folder, seed, "rlhf_global")
    return shared + [new_phase(folder, "local", local, ["sft/pairs.jsonl"])]


def with_prior(reward, ref_logp, truth):
    """Best of 16 by reward + w log pi_ref -> {"curve": {w: value on all prompts}, "weights", "value"}.

    All (prompts, samples). value: w is chosen on every other prompt and measured on those between,
    then the other way round; the mean of the two."""

    def best_of_16(weight, first, step=2):
        score = reward + weight * ref_logp
        return best_of_n(score[first::step], truth[first::step])["16"]

    chosen = []
    values = []
    for choosing, measuring in ((0, 1), (1, 0)):
        weight = max(WEIGHTS, key=lambda weight: best_of_16(weight, choosing))
        chosen.append(weight)
        values.append(best_of_16(weight, measuring))
    curve = {str(weight): best_of_16(weight, 0, step=1) for weight in WEIGHTS}
    return {"curve": curve, "weights": chosen, "value": sum(values) / 2}


def measure(folder, seed):
    """Both rewards with and without the prior, on SFT's samples."""
    sft = load_policy(folder / "sft")
    prompts, samples, truth = samples_of(sft, SAMPLES, seed)
    ref_logp = sequence_logps(sft, prompts, samples)  # (256, SAMPLES)
    row = {"truth": best_of_n(truth, truth)["16"], "reference": best_of_n(ref_logp, truth)["16"]}
    for name, run in (("global", folder / "rlhf_global/reward"), ("local", folder / "local")):
        # Without a reference: a scalar head's reward, or log pi.
        reward = rewards(load_reward_model(run), None, prompts, samples)
        if name == "local":
            reward = BETA * reward
        row[name] = with_prior(reward, ref_logp, truth)
    return row


def verdict(by_seed):
    """A line for each claim."""
    plain = values_of(by_seed, "global", "curve", "0.0")
    helped = values_of(by_seed, "global", "value")
    local = values_of(by_seed, "local", "curve", "0.0")
    bare = values_of(by_seed, "local", "curve", str(-BETA))
    ahead = differences(local, plain)
    gain = differences(helped, plain)
    left = differences(local, helped)
    lost = differences(plain, bare)
    halfway = [(one + other) / 2 for one, other in zip(plain, local, strict=True)]
    beyond_half = differences(helped, halfway)
    return [
        claim(above(ahead), f"local leads global in best of 16, by {with_errors(ahead)}."),
        claim(above(gain), f"log pi_ref lifts global, by {with_errors(gain)}."),
        claim(
            every([above(ahead), above(beyond_half)]),
            f"local leads, and with log pi_ref global is more than half way to it, by "
            f"{with_errors(beyond_half)}; what is left of the lead is {with_errors(left)}.",
        ),
        claim(above(lost), f"local without its prior is below global, by {with_errors(lost)}."),
    ]


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    by_seed = []
    for seed in args.seeds:
        folder = args.out / f"seed{seed}"
        run_phases(phases_of(folder, seed), args.out, args.jobs, lock)
        by_seed.append(measure(folder, seed))
    results = table_of(by_seed), verdict(by_seed), figure_of(by_seed, WEIGHTS)
    evidence.write_results(args, "prior_of_local", __doc__, by_seed, *results)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
