"""Of the same 5,000 labels DPO makes the most on pairs of its own samples, drawn again and again.

    python experiments/on_policy.py --seeds 0 1 2    about 135 s a seed after hypotheses.py

Tajwar et al., 2404.14367: on-policy pairs help. Tang et al., 2405.08448: the same pairs, shuffled
and offline, help less; offline policies classify better. Lanchantin et al., 2506.21495: pairs that
are refreshed now and then are nearly as good as online.

Each policy is DPO from SFT on 5,000 pairs with true Bradley-Terry labels. Only their source
differs: SFT's samples; the policy's own, drawn anew in 3, 10 or 30 rounds (one round is DPO on
SFT's samples, bit by bit); those of the 10 rounds again, shuffled and offline; RLHF's samples.

Each at its best beta, 10 on-policy rounds have .049 +- .011 more sampled reward than SFT's samples;
in greedy reward it is undecided (.014 +- .037). Offline their pairs lose .199 +- .024 at beta .1,
.013 +- .003 at .3. RLHF's samples are worse pairs than SFT's, by .025 +- .007.
Settings that were tried, and what it does not show: experiments/README.md
"""

from nanoroads.experiments import on_policy_claims as claims
from nanoroads.experiments import own_pairs, pair_sources
from nanoroads.experiments.dpo_in_rounds import train_on_policy
from nanoroads.experiments.on_policy import REWARDS, figure_of, table_of
from nanoroads.experiments.pair_sources import OFFLINE, ON_POLICY, RLHF_SAMPLES, SFT_SAMPLES
from nanoroads.report import evidence
from nanoroads.report.judged import read_pairs
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.run.flags import run_script
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import jsonl_bytes, write_bytes

BETAS = [0.3, 0.1]
ROUNDS = [3, 10, 30]  # times that pairs are drawn: once is DPO on SFT's samples
# Each source at its best beta of 1, .3, .1 and .03 on seed 100.
BEST_SFT = pair_sources.named(SFT_SAMPLES, 0.3)
BEST_ON_POLICY = pair_sources.named(ON_POLICY, 0.1)
BEST_RLHF = pair_sources.named(RLHF_SAMPLES, 0.1)


# ---------------------------------------------------------------- what is trained and measured


def run_seed(args, seed, lock):
    """All policies of one seed -> {policy: {measure: number}}."""
    folder = args.out / f"seed{seed}"
    phases = evidence.regularised_phases(folder, seed, BETAS, kls=[])
    sample = ["-m", "nanoroads.world.pairs", "--policy", folder / "rlhf_global"]
    sample += ["--n", evidence.PAIRS, "--seed", seed]
    phases.append(new_phase(folder, "rlhf_global/pairs.jsonl", sample, ["rlhf_global"]))
    run_phases(phases, args.out, args.jobs, lock)

    # train_on_policy has the loop over rounds, which no command has; the rest is train_dpo.py again.
    policies = {}
    pairs = {}
    from_files = []
    test_pairs = folder / "sft/pairs_test.jsonl"
    dpo = ["train_dpo.py", "--seed", seed, "--data"]
    held_out = ["--eval-data", test_pairs, "--init", folder / "sft"]
    for beta in BETAS:
        for rounds in ROUNDS:
            name = pair_sources.named(f"on-policy, {rounds} rounds", beta)
            policies[name], pairs[name] = train_on_policy(folder, seed, rounds, evidence.dpo_run(beta))
        _, file = pair_sources.in_files(beta)[OFFLINE]
        write_bytes(folder / file, jsonl_bytes(pairs[pair_sources.named(ON_POLICY, beta)]))
        for source in (OFFLINE, RLHF_SAMPLES):
            run, file = pair_sources.in_files(beta)[source]
            command = dpo + [folder / file] + held_out + ["--beta", beta]
            from_files.append(new_phase(folder, run, command, ["sft", "sft/pairs_test.jsonl", file]))
    run_phases(from_files, args.out, args.jobs, lock)

    # All policies are measured in the same way.
    policies["SFT"] = load_policy(folder / "sft")
    policies["RLHF"] = load_policy(folder / "rlhf_global")
    for beta in BETAS:
        for source, (run, file) in pair_sources.in_files(beta).items():
            policies[pair_sources.named(source, beta)] = load_policy(folder / run)
            pairs[pair_sources.named(source, beta)] = read_pairs(folder / file)
    return own_pairs.measure_all(policies, pairs, read_pairs(test_pairs), seed)


# ---------------------------------------------------------------- the verdict


def verdict(by_seed):
    """A line for each claim. by_seed: of each seed {policy: {measure: number}}."""
    lines = []
    for measure in REWARDS:
        lines.append(claims.own_pairs_beat(by_seed, BEST_ON_POLICY, BEST_SFT, BETAS, measure))
    for beta in BETAS:
        lines.append(claims.as_well_offline(by_seed, beta))
    lines.append(claims.better_samples_are_better_pairs(by_seed, BEST_RLHF, BEST_SFT))
    lines.append(claims.classifies_better(by_seed, BEST_SFT, BEST_ON_POLICY))
    lines.append(claims.classifies_its_own(by_seed, BEST_ON_POLICY, BEST_SFT, BETAS))
    for beta in BETAS:
        names = pair_sources.by_rounds(beta, ROUNDS)
        for measure in REWARDS:
            lines.append(claims.more_rounds_help(by_seed, beta, names, measure))
    return lines


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    by_seed = [run_seed(args, seed, lock) for seed in args.seeds]
    table = table_of(by_seed, BETAS, ROUNDS)
    figure = figure_of(by_seed, BETAS, ROUNDS)
    evidence.write_results(args, "on_policy", __doc__, by_seed, table, verdict(by_seed), figure)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on, with all rounds anew", less_memory=None)
