"""Pairs of a policy's own samples, and the measures of the policies of experiments/on_policy.py."""

from nanoroads.randomness import generator, stream_key
from nanoroads.report.judged import WORLD, pair_measures, pairs_as_tokens, true_margins
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS, policy_row
from nanoroads.score import sequence_logps
from nanoroads.world import roadmap
from nanoroads.world.pairs import draw_pairs

OWN_PAIRS = 2000  # of each policy's samples on held-out prompts


def draw_labelled(policy, n, split, *stream):
    """n pairs of a policy's samples with Bradley-Terry labels, as nanoroads.world.pairs draws them.

    stream: names the random numbers."""
    split_prompts = roadmap.prompts(WORLD, split)
    key = stream_key("on-policy pairs", *stream)
    triples = draw_pairs(policy, ENCODING, WORLD, split_prompts, n, key)
    prompts, first, second = zip(*triples, strict=True)
    return roadmap.label_pairs(WORLD, prompts, first, second, generator("on-policy labels", *stream))


def measure_all(policies, pairs, test_pairs, seed):
    """{policy: {measure: number}}. policies: {name: policy}, with "SFT", the reference of all.

    pairs: {name: those that the policy was trained on}; "informative" is the share of them whose true
    rewards differ. test_pairs: of SFT's samples."""
    rows = {}
    for name, policy in policies.items():
        rows[name] = measure(policy, policies["SFT"], test_pairs, seed)
        if name in pairs:
            rows[name]["informative"] = (true_margins(pairs[name]) != 0).double().mean().item()
    return rows


def measure(policy, reference, test_pairs, seed):
    """{measure: number} on held-out prompts, on SFT's held-out pairs, and on pairs of the policy's own."""
    on_prompts = policy_row(policy, reference, WORLD, roadmap.prompts(WORLD, "test"))
    row = {name: cell["mean"] for name, cell in on_prompts.items()}
    row["accuracy_sft"] = true_order_accuracy(policy, reference, test_pairs)
    own = draw_labelled(policy, OWN_PAIRS, "test", "own", seed)
    row["accuracy_own"] = true_order_accuracy(policy, reference, own)
    return row


def true_order_accuracy(policy, reference, pairs):
    """How often log pi/pi_ref puts the truly better response first, of the pairs that have one."""
    prompts, responses = pairs_as_tokens(pairs)
    logp = sequence_logps(policy, prompts, responses, GROUPS_PER_PASS)  # (P, 2)
    log_ratio = logp - sequence_logps(reference, prompts, responses, GROUPS_PER_PASS)
    margin = log_ratio[:, 0] - log_ratio[:, 1]  # (P,)
    return pair_measures(margin, true_margins(pairs))["true_order"]
