"""RLHF leads DPO, and neither more prompts (H3) nor relabelled samples (H4) is why.

    python experiments/wider_data.py --seeds 0 1 2    about 80 s a seed after hypotheses.py

Swamy et al., 2503.01067, section 3: is RLHF ahead because it also sees prompts without pairs (H3),
or because its reward model labels more samples (H4)? All runs are the scripts' own commands; true
reward is measured on 256 held-out prompts.

augmentation  5,000 pairs of one half of the training prompts and a reward model of them; RL with it
              on this half of the prompts, and on all of them.
relabelling   5,000 more pairs of SFT's samples, whose labels are drawn by Bradley-Terry from the
              rewards of the first reward model: no new word of the true reward. Both roads train on
              true and relabelled pairs together, for as many steps as on the true ones alone.

Result, three seeds: whether RLHF leads is undecided (+.040 ± .047). All prompts add .003 ± .003 to
it, less than .02, but not surely less than half of that lead (by .017 ± .021). With relabelled
samples for both RLHF leads by .069 ± .018; that they add anything to either road is not shown.
Settings that were tried, and what it does not show: experiments/README.md
"""

from nanoroads.experiments.wider_data import write_data_files
from nanoroads.report import cells, compared, evidence
from nanoroads.report.compared import WORLD, policy_rows, reward_lead, rewards_of
from nanoroads.report.evidence import over_seeds
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.run.flags import run_script
from nanoroads.run.folder import read_metrics
from nanoroads.score import mean_se

DRAWN = 11000  # pairs, so that 5,000 and more are of one half of the prompts
MAP = ["--kl", 0.5, "--max-new-tokens", WORLD.max_moves + 1]  # the map's settings, for files of pairs
LABELS = {
    "sft": "SFT",
    "dpo": "DPO",
    "dpo_relabelled": "DPO, relabelled samples too",
    "rlhf_global": "RLHF",
    "rlhf_relabelled": "RLHF, relabelled samples too",
    "rlhf_half": "RLHF, half of the prompts",
    "rlhf_augmented": "RLHF, that reward model, all prompts",
}


def run_seed(args, seed, lock):
    """All runs of a seed -> {policy: its measures}, and {"nll": {reward model: held-out loss}}."""
    folder = args.out / f"seed{seed}"
    sft = folder / "sft"
    draw = ["-m", "nanoroads.world.pairs", "--policy", sft, "--n", DRAWN, "--seed", seed]
    phases = evidence.shared_phases(folder, seed, "dpo", "rlhf_global")
    phases.append(new_phase(folder, "more_pairs.jsonl", draw, ["sft"]))
    run_phases(phases, args.out, args.jobs, lock)

    # Which pairs are of half of the prompts, and which are relabelled: nanoroads/experiments/wider_data.py.
    write_data_files(folder, seed)
    flags = ["--seed", seed, "--init", sft]
    held_out = ["--eval-data", sft / "pairs_test.jsonl"]
    half = ["--data", folder / "half_pairs.jsonl"] + held_out
    relabelled = ["--data", folder / "relabelled_pairs.jsonl"] + held_out
    augmented = ["--data", folder / "all_prompts.jsonl", "--reward", folder / "rlhf_half/reward"]
    dpo = ["train_dpo.py"] + flags + evidence.DPO
    rlhf = ["train_rlhf.py"] + flags + evidence.RLHF + MAP
    files = ["half_pairs.jsonl", "all_prompts.jsonl", "relabelled_pairs.jsonl", "sft/pairs.jsonl"]
    phases = [
        new_phase(folder, "rlhf_half", rlhf + half, files),
        new_phase(folder, "rlhf_augmented", rlhf + augmented, ["rlhf_half"] + files),
        # Twice the pairs for half of the default's four epochs.
        new_phase(folder, "rlhf_relabelled", rlhf + relabelled + ["--reward-epochs", 2], files),
        new_phase(folder, "dpo_relabelled", dpo + relabelled + ["--epochs", 2], files),
    ]
    run_phases(phases, args.out, args.jobs, lock)

    row = {**policy_rows(folder, LABELS), "nll": {}}
    for name in ("rlhf_global", "rlhf_half", "rlhf_relabelled"):
        row["nll"][name] = read_metrics(folder / name / "reward")[-1]["eval_loss"]
    return row


def verdict(by_seed):
    """A line for each claim."""
    gap = reward_lead(by_seed, "rlhf_global", "dpo")
    ahead = f"RLHF is ahead of DPO: {cells.with_errors(gap)}"
    greedy = cells.with_errors(reward_lead(by_seed, "rlhf_global", "dpo", "greedy_reward"))
    added = reward_lead(by_seed, "rlhf_augmented", "rlhf_half")
    half_lead = (rewards_of(by_seed, "rlhf_global") - rewards_of(by_seed, "dpo")) / 2  # of each seed
    spare = mean_se(half_lead - (rewards_of(by_seed, "rlhf_augmented") - rewards_of(by_seed, "rlhf_half")))
    relabelled = reward_lead(by_seed, "rlhf_relabelled", "dpo_relabelled")
    dpo_gains = cells.with_errors(reward_lead(by_seed, "dpo_relabelled", "dpo"))
    rlhf_gains = cells.with_errors(reward_lead(by_seed, "rlhf_relabelled", "rlhf_global"))
    nll = {name: cells.plus_minus(over_seeds(by_seed, "nll", name)) for name in by_seed[0]["nll"]}
    return [
        cells.claim(cells.above(gap), f"{ahead}; of greedy responses {greedy}."),
        cells.claim(
            cells.below(added, cells.NEGLIGIBLE),
            "against H3: RL on all prompts, not only on those with pairs, adds less than "
            f"{cells.NEGLIGIBLE}: it adds {cells.beside_bound(added, cells.NEGLIGIBLE)}.",
        ),
        cells.claim(
            cells.every([cells.above(gap), cells.above(spare)]),
            f"against H3: RLHF leads, by more than twice that: half is more by {cells.with_errors(spare)}.",
        ),
        cells.claim(
            cells.above(relabelled),
            "against H4: RLHF is ahead with relabelled samples for both roads: "
            f"{cells.with_errors(relabelled)}. DPO gains {dpo_gains}, RLHF {rlhf_gains}; its reward model's "
            f"held-out loss is {nll['rlhf_relabelled']}, without them {nll['rlhf_global']}.",
        ),
    ]


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    by_seed = [run_seed(args, seed, lock) for seed in args.seeds]
    rows = compared.policies_table(by_seed, LABELS)
    figure = compared.policies_figure(by_seed, LABELS, "Wider data")
    evidence.write_results(args, "wider_data", __doc__, by_seed, rows, verdict(by_seed), figure)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
