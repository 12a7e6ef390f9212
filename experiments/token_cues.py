"""A policy's log-ratio ranks pairs worse than a scalar head, and leans on their tokens more.

    python experiments/token_cues.py --seeds 0 1 2    about 75 s a seed after hypotheses.py

Razin et al., 2507.07981: an implicit reward (DPO's) ranks worse than an explicit one (a scalar
head), and loses more where the same responses are written in other tokens.

Each move of the map gets a second name, `>or` beside `>OR`. SFT imitates routes in the first names,
in the second, or mixed; another policy has never seen mixed ones. From each, DPO and scalar heads
learn from the main world's 5,000 pairs, in the first names alone. They rank the 1,000 held-out
pairs in all three writings; counted are those whose true rewards differ.

Result, three seeds, for a head's two rates: mixed routes cost DPO more if SFT has never seen any,
by .118 +- .028 and .185 +- .036. If it has, neither they nor renaming do (one head loses more in
each). Without mixed routes renaming is undecided, and so it is for both policies who leads as
trained.
Settings that were tried, and what it does not show: experiments/README.md.
"""

from nanoroads.experiments.token_cues import (
    HEADS,
    REFERENCES,
    figure_of,
    leads_of_heads,
    table_of,
    verdict_line,
)
from nanoroads.experiments.two_names import WRITINGS, pairs_as_tokens, write_world
from nanoroads.report import evidence
from nanoroads.report.evidence import differences
from nanoroads.report.judged import pair_measures, read_pairs, true_margins
from nanoroads.report.on_map import GROUPS_PER_PASS
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.run.flags import run_script
from nanoroads.score import mean_se, rewards
from nanoroads.weights.checkpoint import load_policy, load_reward_model

DEMONSTRATIONS = 40_000
BETA = 0.3
# Two rates of the head are equally good on seed 100 as trained, and far apart where moves are renamed.
REWARDS = {
    "implicit": ["train_dpo.py", "--lr", "1e-4", "--beta", BETA],
    "head_3e-4": ["train_rlhf.py", "--stop-after", "reward", "--reward-lr", "3e-4"],
    "head_1e-3": ["train_rlhf.py", "--stop-after", "reward", "--reward-lr", "1e-3"],
}


def phases_of(folder, seed):
    """Policies that know both names; from each, reward models trained on the main world's pairs."""
    phases = evidence.shared_phases(folder, seed)
    pairs = ["--data", folder / "sft/pairs.jsonl", "--eval-data", folder / "sft/pairs_test.jsonl"]
    for reference in REFERENCES:
        reads = [f"{reference}/demonstrations.jsonl", f"{reference}/tokenizer/tokenizer.json"]
        train_sft = ["train_sft.py", "--seed", seed, "--data", folder / reference / "demonstrations.jsonl"]
        train_sft += ["--tokenizer", folder / reference / "tokenizer"] + evidence.SFT
        phases.append(new_phase(folder, f"{reference}/sft", train_sft, reads))
        on_pairs = ["--seed", seed, "--init", folder / reference / "sft"] + pairs
        for name, train in REWARDS.items():
            reads = [f"{reference}/sft", "sft/pairs.jsonl"]
            phases.append(new_phase(folder, f"{reference}/{name}", train + on_pairs, reads))
    return phases


def measure(model, reference, pairs, encoding, seed):
    """{writing: measures} of a reward model on the same P held-out pairs, written in three ways.

    reference: of an implicit reward; None for a scalar head."""
    row = {}
    for writing in WRITINGS:
        prompts, responses = pairs_as_tokens(pairs, writing, encoding, seed)
        reward = rewards(model, reference, prompts, responses, BETA, GROUPS_PER_PASS)  # (P, 2)
        row[writing] = pair_measures(reward[:, 0] - reward[:, 1], true_margins(pairs).float())
    return row


def run_seed(args, seed, lock):
    """{reference: {reward model: {writing: measures}}} of a seed."""
    folder = args.out / f"seed{seed}"
    encoding = write_world(folder, DEMONSTRATIONS, seed)
    run_phases(phases_of(folder, seed), args.out, args.jobs, lock)
    test = read_pairs(folder / "sft/pairs_test.jsonl")
    rows = {}
    for reference in REFERENCES:
        runs = folder / reference
        sft, dpo = load_policy(runs / "sft"), load_policy(runs / "implicit")
        rows[reference] = {"implicit": measure(dpo, sft, test, encoding, seed)}
        for name in HEADS:
            head = load_reward_model(runs / name / "reward")
            rows[reference][name] = measure(head, None, test, encoding, seed)
    return rows


def verdict(by_seed):
    """A line for each claim and reference; it holds if it holds for both heads."""
    lines = []
    for reference, title in REFERENCES.items():
        before = leads_of_heads(by_seed, reference, "as trained")
        text = f"{title}; as trained, a scalar head ranks more pairs right"
        lines.append(verdict_line(text, [mean_se(lead) for lead in before]))
        for writing in ("renamed", "mixed"):
            after = leads_of_heads(by_seed, reference, writing)  # after - before: what DPO loses more
            cells = [differences(now, then) for now, then in zip(after, before, strict=True)]
            text = f"{title}; {writing}, DPO's implicit reward loses more accuracy than a scalar head"
            lines.append(verdict_line(text, cells))
    return lines


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    by_seed = [run_seed(args, seed, lock) for seed in args.seeds]
    results = table_of(by_seed), verdict(by_seed), figure_of(by_seed)
    evidence.write_results(args, "token_cues", __doc__, by_seed, *results)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
