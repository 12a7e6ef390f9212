"""DPO verifies as well as a scalar head what it cannot generate, and RL on that head can.

    python experiments/verify_not_generate.py --seeds 0 1 2    about 75 seconds a seed on two cores

Razin et al., 2507.07981, against H6 of "All Roads Lead to Likelihood" (Swamy et al., 2503.01067):
DPO trails because its reward, a policy's log-ratio, cannot be learnt without learning to generate.
Here SFT imitates walks that ignore the goal. From 5,000 pairs without noise (a walk to the goal,
and one as long with one defect) learn DPO, RLHF (a scalar head, then RL on it) and imitation (SFT
on the chosen routes alone). To verify is to rank 2,000 held-out pairs, to generate is to write
valid routes (legal, and they arrive) for their prompts.

Result, three seeds. DPO ranks .920 of the pairs right; of its samples .067 +- .018 are valid, for
goals three moves away or more .026 +- .007, below the bound of .05. Imitation has .789 and .705.
The head ranks no better, to .02 (-.017 +- .007). Whether RL on it generates more is undecided.
Settings that were tried, and what it does not show: experiments/README.md.
"""

from nanoroads.experiments.pairs_with_one_defect import WORLD, pairs, write_rows
from nanoroads.experiments.verifies_and_generates import FAR, generates, group_means, groups_of, verifies
from nanoroads.experiments.verify_not_generate import bounds_text, figure_of, table_of
from nanoroads.report import evidence
from nanoroads.report.cells import NEGLIGIBLE, above, below, beside_bound, claim, every, with_errors
from nanoroads.report.evidence import lead, over_seeds
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.run.flags import run_script
from nanoroads.weights.checkpoint import load_policy, load_reward_model

DEMONSTRATIONS = 40_000
PAIRS = 5000
TEST_PAIRS = 2000
SFT = ["--steps", 700]  # flags of the four commands, without their files
IMITATION = ["--lr", "1e-3", "--epochs", 8]
DPO = ["--lr", "3e-4", "--beta", 0.3]
# With a file, RL's defaults would be kl .05 and 64 tokens.
RLHF = ["--reward-lr", "1e-3", "--kl", 0.5, "--max-new-tokens", WORLD.max_moves + 1]
VERIFIES_ABOVE = 0.8  # the bounds of the verdict: DPO's accuracy
GENERATES_BELOW = 0.05  # and its share of valid samples


def phases_of(folder, seed):
    """Write the rows to files -> the commands that learn from them."""
    write_rows(folder, DEMONSTRATIONS, PAIRS, TEST_PAIRS, seed)
    train_sft = ["train_sft.py", "--data", folder / "demonstrations.jsonl", "--seed", seed] + SFT
    from_sft = ["--init", folder / "sft", "--seed", seed, "--data"]
    imitate = ["train_sft.py"] + from_sft + [folder / "chosen.jsonl"] + IMITATION
    on_pairs = from_sft + [folder / "pairs.jsonl", "--eval-data", folder / "pairs_test.jsonl"]
    reads = ["sft", "pairs.jsonl", "pairs_test.jsonl"]
    return [
        new_phase(folder, "sft", train_sft, ["demonstrations.jsonl"]),
        new_phase(folder, "imitation", imitate, ["sft", "chosen.jsonl"]),
        new_phase(folder, "dpo", ["train_dpo.py"] + on_pairs + DPO, reads),
        new_phase(folder, "rlhf", ["train_rlhf.py"] + on_pairs + RLHF, reads),
    ]


def measure_seed(folder, seed):
    """{road: {measure: {group: mean}}} of one seed, and "pairs": how many each group has."""
    rows = pairs(TEST_PAIRS, "test", seed)
    policies = {}
    for road in ("sft", "dpo", "rlhf", "imitation"):
        policies[road] = load_policy(folder / road)
    sft = policies["sft"]
    right = {
        "sft": verifies(sft, None, rows),
        "dpo": verifies(policies["dpo"], sft, rows),
        "rlhf": verifies(load_reward_model(folder / "rlhf/reward"), None, rows),
        "imitation": verifies(policies["imitation"], sft, rows),
    }
    groups = groups_of(rows)
    results = {"pairs": {name: int(mask.sum()) for name, mask in groups.items()}}
    for road, policy in policies.items():
        measures = {"accuracy": right[road], **generates(policy, sft, rows)}
        results[road] = group_means(groups, measures)
    return results


def verdict(by_seed):
    """A line for each claim."""
    lines = []
    for group in ("all", FAR):  # FAR: three moves or more, added after seed 100 was seen
        verifies_well = above(over_seeds(by_seed, "dpo", "accuracy", group), VERIFIES_ABOVE)
        generates_badly = below(over_seeds(by_seed, "dpo", "valid", group), GENERATES_BELOW)
        text = bounds_text(by_seed, group, VERIFIES_ABOVE, GENERATES_BELOW)
        lines.append(claim(every([verifies_well, generates_badly]), text))

    more_valid = lead(by_seed, "imitation", "dpo", "valid", "all")
    more_right = lead(by_seed, "dpo", "imitation", "accuracy", "all")
    text = "the two come apart both ways: a policy that imitates the chosen routes generates more than DPO's "
    text += f"(by {with_errors(more_valid)}), and DPO verifies more (by {with_errors(more_right)})."
    lines.append(claim(every([above(more_valid), above(more_right)]), text))

    head = lead(by_seed, "rlhf", "dpo", "accuracy", "all")
    text = f"a scalar head verifies no better than DPO, to {NEGLIGIBLE} (its lead: "
    lines.append(claim(below(head, NEGLIGIBLE), f"{text}{beside_bound(head, NEGLIGIBLE)})."))

    rl = lead(by_seed, "rlhf", "dpo", "valid", "all")
    greedy = with_errors(lead(by_seed, "rlhf", "dpo", "greedy", "all"))
    text = "RL on the scalar head generates more valid routes than DPO, as H6 says of a search (by "
    lines.append(claim(above(rl), f"{text}{with_errors(rl)}; greedy {greedy})."))
    return lines


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    folders = {seed: args.out / "verify_not_generate" / f"seed{seed}" for seed in args.seeds}
    phases = []
    for seed, folder in folders.items():
        phases += phases_of(folder, seed)
    run_phases(phases, args.out, args.jobs, lock)
    by_seed = []
    for seed, folder in folders.items():
        by_seed.append(measure_seed(folder, seed))
    report = table_of(by_seed), verdict(by_seed), figure_of(by_seed)
    evidence.write_results(args, "verify_not_generate", __doc__, by_seed, *report)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
