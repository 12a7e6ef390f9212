"""Best of n, distilled by SFT, has more reward than DPO and RLHF, and loses none on the way.

    python experiments/best_of_n.py --seeds 0 1 2    about 25 s a seed after hypotheses.py

RAFT (Dong et al., 2304.06767). Gui et al. (BoNBoN), 2406.00832, and Sessa et al. (BOND),
2407.14622, distil best of n with other losses. RLHF's reward model chooses the favourite of n whole
samples of SFT, twice for each of 2,000 training prompts; train_sft.py goes on with these 4,000
rows. It is compared with best of n itself on held-out prompts, whose KL to SFT is at most log n -
(n - 1) / n.

Result, three seeds: whether best of 16, distilled, has more reward than DPO is undecided (+.023 ±
.028), and than RLHF (-.016 ± .020). It loses .077 ± .005 to best of 16 itself, within its KL.
Settings that were tried, and what it does not show: experiments/README.md
"""

import torch

from nanoroads.experiments.best_of_n import sample_and_score
from nanoroads.experiments.gao import kl_of_best_of
from nanoroads.report import evidence
from nanoroads.report.cells import (
    NEGLIGIBLE,
    above,
    below,
    beside_bound,
    claim,
    in_errors,
    plus_minus,
    with_errors,
)
from nanoroads.report.compared import WORLD, policies_figure, policies_table, policy_rows, reward_lead
from nanoroads.report.evidence import over_seeds, values_of
from nanoroads.report.on_map import ENCODING, true_rewards
from nanoroads.report.phases import claim_folder, new_phase, run_phases
from nanoroads.run.flags import run_script
from nanoroads.score import mean_se
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_policy, load_reward_model
from nanoroads.weights.files import jsonl_bytes, write_bytes

BEST_OF = {4: "sft_best_of_4", 16: "sft_best_of_16"}  # n: the run of the distilled policy
CHOICES = 2  # times that a favourite is chosen for each prompt, each time of n new samples
SAMPLES = CHOICES * max(BEST_OF)  # of each prompt
DISTIL = ["--lr", 1e-3, "--epochs", 10]
LABELS = {
    "sft": "SFT",
    "dpo": "DPO",
    "sft_best_of_4": "best of 4, distilled",
    "sft_best_of_16": "best of 16, distilled",
    "rlhf_global": "RLHF",
}


def favourites(score, n):
    """Where the best of n is, CHOICES times: (P, 32) -> places (P, CHOICES), each among n of its own."""
    blocks = score[:, : CHOICES * n].view(len(score), CHOICES, n)
    return blocks.argmax(2) + n * torch.arange(CHOICES)


def run_seed(args, seed, lock):
    """All runs of a seed -> {policy: its measures}, and {"itself": {n: true reward of best of n}}."""
    folder = args.out / f"seed{seed}"
    run_phases(evidence.shared_phases(folder, seed, "dpo", "rlhf_global"), args.out, args.jobs, lock)
    sft, reward_model = load_policy(folder / "sft"), load_reward_model(folder / "rlhf_global/reward")
    train_prompts, responses, score = sample_and_score(sft, reward_model, "train", SAMPLES, seed)
    phases = []
    for n, run in BEST_OF.items():
        rows = []
        for prompt, group, places in zip(
            train_prompts, responses, favourites(score, n).tolist(), strict=True
        ):
            for text in tokenizer.decode_all(ENCODING, [group[place] for place in places]):
                rows.append({"prompt": prompt, "response": text})
        data = folder / f"best_of_{n}.jsonl"
        write_bytes(data, jsonl_bytes(rows))
        command = ["train_sft.py", "--seed", seed, "--init", folder / "sft", "--data", data] + DISTIL
        phases.append(new_phase(folder, run, command, ["sft", data.name]))
    run_phases(phases, args.out, args.jobs, lock)
    held_out, responses, score = sample_and_score(sft, reward_model, "test", SAMPLES, seed)
    true_reward = true_rewards(WORLD, held_out, responses)  # (256, 32)
    itself = {str(n): true_reward.gather(1, favourites(score, n)).mean().item() for n in BEST_OF}
    return {**policy_rows(folder, LABELS), "itself": itself}


def verdict(by_seed):
    """A line for each claim."""
    lines = []
    for other in ("dpo", "rlhf_global"):
        ahead = reward_lead(by_seed, "sft_best_of_16", other)
        greedy = reward_lead(by_seed, "sft_best_of_16", other, "greedy_reward")
        text = f"best of 16, distilled, has more reward than {LABELS[other]}: {with_errors(ahead)}; greedy "
        lines.append(claim(above(ahead), f"{text}{with_errors(greedy)}."))
    for n, run in BEST_OF.items():
        itself = values_of(by_seed, "itself", str(n))
        lost = evidence.differences(itself, values_of(by_seed, run, "reward", "mean"))
        text = f"best of {n}, {plus_minus(mean_se(itself))}, distilled loses less than {NEGLIGIBLE}: "
        lines.append(claim(below(lost, NEGLIGIBLE), f"{text}{beside_bound(lost, NEGLIGIBLE)}."))
        bound = kl_of_best_of(n)
        kl = over_seeds(by_seed, run, "kl_to_ref", "mean")
        text = f"best of {n}, distilled, is within {bound:.3g} nats of SFT, as itself: {plus_minus(kl)}, "
        lines.append(claim(below(kl, bound), f"{text}{in_errors(kl, bound)}."))
    return lines


def main(argv=None):
    """All seeds, then the table, the figure and the verdict."""
    args = evidence.parse_flags(__doc__, argv)
    lock = claim_folder(args.out)
    by_seed = [run_seed(args, seed, lock) for seed in args.seeds]
    figure = policies_figure(by_seed, LABELS, "Best of n, distilled, and itself (crosses)")
    for n, run in BEST_OF.items():
        itself = over_seeds(by_seed, "itself", str(n))["mean"]
        figure.axes[0].plot(itself, -list(LABELS).index(run), "x", color="black", ms=8)
    rows = policies_table(by_seed, LABELS)
    evidence.write_results(args, "best_of_n", __doc__, by_seed, rows, verdict(by_seed), figure)


if __name__ == "__main__":
    run_script(main, resumes="the same command goes on from there", less_memory=None)
