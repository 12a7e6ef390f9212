"""RLHF needs fewer pairs than DPO, which catches up as pairs are added, steps being equal (H6).

    python experiments/data_size.py --seeds 0 1 2    about 220 seconds a seed on two CPU cores

Swamy et al., 2503.01067, H6: a verifier is learnt from fewer samples than a generator, so with
pairs enough DPO should be as good. In the world of two moves, with 200 prompts, both roads have
1,000 to 80,000 pairs, EQUAL optimizer steps, so many that all 80,000 are seen once, and
beta = kl = .5, hence one soft optimum, known by enumeration. Twice, as in horizon.py: with any
token, and with legal moves only.

What came out, three seeds: with legal moves RLHF leads by .321 +- .022 on 1,000 pairs, and DPO
catches up: on 80,000 .013 +- .003 is left. But on 1,000 RLHF is .059 +- .012 behind DPO on 80,000. With any
token it leads by .302 +- .009 on 1,000; all three claims are undecided there.
Settings that were tried, and what it does not show: experiments/README.md
"""

from nanoroads.experiments.small_worlds import pairs_phase, reference_phase, write_subsets
from nanoroads.report import evidence, to_optimum
from nanoroads.report.cells import NEGLIGIBLE, above, below, beside_bound, claim, with_errors
from nanoroads.report.evidence import differences
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.report.to_optimum import KINDS, figure_of, rewards_of, rlhf_lead, rows_of, table_of
from nanoroads.run.flags import run_script
from nanoroads.weights.files import read_json_object

SIZES = [1000, 5000, 20_000, 80_000]  # pairs, the smaller sets the first rows of the largest
STEPS, RL_STEPS = 2500, 150  # of 32 pairs (any token: 2,560 at 1,000, 2,512 at 5,000), of 32 prompts x 8
WORLD = "roadmap-2"
BETA = 0.5  # of DPO and of RL's KL term, hence the same pi*
DPO_LR, REWARD_LR, RL_LR = 1e-4, 3e-4, 1e-3
LEGAL_LRS = ["--lr", 1e-3, "--reward-lr", 1e-3, "--rl-lr", 1e-3]


def pair_phases(out, seed):
    """The reference, the largest set of pairs, and pairs to watch the training on."""
    here = f"data_size/seed{seed}"
    return [
        evidence.sft_phase(out / f"seed{seed}", seed),
        reference_phase(out, seed, here, WORLD),
        pairs_phase(out, seed, here, f"{here}/pairs.jsonl", SIZES[-1], []),
    ]


def road_phases(out, seed):
    """Both roads on the first n pairs; and with masked logits, on the first n of pairs of its own."""
    here = f"data_size/seed{seed}"
    folder = out / here
    phases = []
    for n in SIZES:
        pairs, test = f"{here}/pairs_{n}.jsonl", f"{here}/pairs_test.jsonl"
        epochs = 32 * STEPS / n
        common = ["--init", folder / "sft", "--seed", seed]
        files = ["--data", out / pairs, "--eval-data", out / test, "--eval-every", 1000]  # seldom
        dpo = ["train_dpo.py"] + common + files + ["--beta", BETA, "--lr", DPO_LR, "--epochs", epochs]
        rlhf = ["train_rlhf.py"] + common + files + ["--kl", BETA, "--lr", RL_LR, "--steps", RL_STEPS]
        rlhf += ["--reward-lr", REWARD_LR, "--reward-epochs", epochs, "--max-new-tokens", 3]
        legal = ["-m", "nanoroads.world.legal"] + common + ["--n", n, "--beta", BETA] + LEGAL_LRS
        legal += ["--steps", STEPS, "--rl-steps", RL_STEPS]
        needs = [f"{here}/sft", pairs, test]
        phases.append(new_phase(out, f"{here}/legal_{n}.json", legal, [f"{here}/sft"]))  # longest, so first
        phases.append(new_phase(out, f"{here}/dpo_{n}", dpo, needs))
        phases.append(new_phase(out, f"{here}/rlhf_{n}", rlhf, needs))
    return phases


def measure(out, seed):
    """{kind: {pairs: {policy: its measures}}}."""
    folder = out / f"data_size/seed{seed}"
    runs = {}
    for n in SIZES:
        runs[f"dpo_{n}"] = folder / f"dpo_{n}"
        runs[f"rlhf_{n}"] = folder / f"rlhf_{n}"
    free = rows_of(WORLD, folder / "sft", runs, BETA)
    rows = {"any": {}, "legal": {}}
    for n in SIZES:
        roads = {"dpo": free[f"dpo_{n}"], "rlhf": free[f"rlhf_{n}"]}
        rows["any"][str(n)] = {"sft": free["sft"], "optimum": free["optimum"], **roads}
        rows["legal"][str(n)] = read_json_object(folder / f"legal_{n}.json")
    return rows


def verdict(by_seed):
    """Three lines for each kind of response."""
    lines = []
    fewest, most = SIZES[0], SIZES[-1]
    for kind, name in KINDS.items():
        fewer = differences(rewards_of(by_seed, kind, fewest, "rlhf"), rewards_of(by_seed, kind, most, "dpo"))
        text = f"{name}: RLHF needs fewer pairs: on {fewest:,} it is ahead of DPO on {most:,}, by "
        lines.append(claim(above(fewer), f"{text}{with_errors(fewer)}."))
        shrinks = to_optimum.lead_difference(by_seed, kind, fewest, most)
        text = f"{name}: at equal steps RLHF's lead shrinks from {fewest:,} to {most:,} pairs, by "
        lines.append(claim(above(shrinks), f"{text}{with_errors(shrinks)}."))
        left = rlhf_lead(by_seed, kind, most)
        text = f"{name}: with {most:,} pairs RLHF leads by less than {NEGLIGIBLE}: by "
        lines.append(claim(below(left, NEGLIGIBLE), f"{text}{beside_bound(left, NEGLIGIBLE)}."))
    return lines


def main(argv=None):
    """All numbers of pairs of all seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    phases = []
    for seed in args.seeds:
        phases += pair_phases(args.out, seed)
    run_phases(phases, args.out, args.jobs, lock)
    for seed in args.seeds:
        folder = args.out / f"data_size/seed{seed}"
        write_subsets(folder / "pairs.jsonl", folder, SIZES)
        phases += road_phases(args.out, seed)
    run_phases(phases, args.out, args.jobs, lock)
    by_seed = [measure(args.out, seed) for seed in args.seeds]
    table = table_of(by_seed, SIZES, "pairs")
    figure = figure_of(by_seed, SIZES, f"pairs, {STEPS} steps of 32 whatever their number", "log")
    evidence.write_results(args, "data_size", __doc__, by_seed, table, verdict(by_seed), figure)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
