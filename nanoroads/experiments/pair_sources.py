"""Where the pairs of experiments/on_policy.py come from, and what DPO on them is called in its results."""

from nanoroads.report.evidence import dpo_run

# The words of its table.
SFT_SAMPLES = "SFT's samples"
ON_POLICY = "on-policy, 10 rounds"
OFFLINE = "the same 10 rounds, offline"
RLHF_SAMPLES = "RLHF's samples"


def named(source, beta):
    """What DPO on pairs from `source` is called."""
    return f"{source}, beta {beta}"


def by_rounds(beta, more_rounds):
    """{rounds: the policy's name}: 1, which is DPO on SFT's samples, and each of `more_rounds`."""
    names = {1: named(SFT_SAMPLES, beta)}
    for rounds in more_rounds:
        names[rounds] = named(f"on-policy, {rounds} rounds", beta)
    return names


def in_files(beta):
    """{source: (its run, the file of its pairs)} of the sources that are drawn before training."""
    return {
        SFT_SAMPLES: (dpo_run(beta), "sft/pairs.jsonl"),
        OFFLINE: (f"dpo_on_policy_pairs_beta_{beta}", f"on_policy_pairs_beta_{beta}.jsonl"),
        RLHF_SAMPLES: (f"dpo_rlhf_pairs_beta_{beta}", "rlhf_global/pairs.jsonl"),
    }
