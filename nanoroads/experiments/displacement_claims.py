"""The claims of experiments/displacement.py in words: whether each holds, and by how many standard errors.

text: what is claimed, as the script says it. by_seed: of each seed {policy: its measures}. dpo_runs,
rlhf_runs: the names of the policies of each road."""

import numpy as np

from nanoroads.report.cells import (
    above,
    below,
    beside_nearer_bound,
    claim,
    every,
    plus_minus,
    with_errors,
    within,
)
from nanoroads.report.evidence import over_seeds, values_of
from nanoroads.report.gap_closed import NEAR
from nanoroads.score import mean_se


def identity_holds(text, by_seed, runs):
    """The claim that the identity holds to NEAR nats, shown by the policy of which it is the least sure.

    runs: the names of the policies."""
    gaps = {name: identity_gap(by_seed, name) for name in runs}
    worst = max(gaps, key=lambda name: abs(gaps[name]["mean"]) + 2 * gaps[name]["se"])
    text += f", to {NEAR} nats: of {len(gaps)} policies the least sure is {worst}, which misses by "
    text += f"{beside_nearer_bound(gaps[worst], NEAR)}."
    return claim(every(within(gap, NEAR) for gap in gaps.values()), text)


def identity_gap(by_seed, name):
    """{"mean", "se"} over seeds of the pairs' mean change + KL(pi_ref || pi): zero, says the identity.

    The error is that of the samples, within each seed: 1,000 pairs and 256 prompts."""
    gap = 0.0
    variance = 0.0
    for rows in by_seed:
        change = rows[name]["both"]
        kl = rows[name]["kl_from_ref"]
        gap += change["mean"] + kl["mean"]
        variance += change["se"] ** 2 + kl["se"] ** 2
    return {"mean": gap / len(by_seed), "se": variance**0.5 / len(by_seed)}


def chosen_fall(text, by_seed):
    """The claim that the mean log-prob of the chosen falls on both roads, at their defaults."""
    dpo = over_seeds(by_seed, "DPO 0.3", "chosen")
    rlhf = over_seeds(by_seed, "RLHF 0.5", "chosen")
    text += f": DPO {with_errors(dpo)}; RLHF {with_errors(rlhf)}."
    return claim(every([below(dpo), below(rlhf)]), text)


def better_falls(text, by_seed):
    """The claim that DPO lowers the response with the larger true reward; ties and a small beta beside it."""
    better = over_seeds(by_seed, "DPO 0.3", "better")
    weak = over_seeds(by_seed, "DPO 0.05", "better")
    ties = over_seeds(by_seed, "DPO 0.3", "ties")
    mass = plus_minus(over_seeds(by_seed, "DPO 0.3", "chosen_mass"), 2)
    text += f": where true rewards differ it changes by {with_errors(better)}, at beta 0.05 by "
    text += f"{with_errors(weak)}; the chosen of ties by {with_errors(ties)}. "
    text += f"At .3 the probability of all chosen together grows {mass} times."
    return claim(below(better), text)


def leaves_data(text, by_seed, dpo_runs, rlhf_runs, measure):
    """The claim that DPO has more of a measure than RLHF at kl .5, at equal KL; the other kl beside it."""
    lead = {}
    for name in rlhf_runs:
        leads = []
        for rows in by_seed:
            leads.append(at_equal_kl(rows, dpo_runs, name, measure) - rows[name][measure])
        lead[name] = mean_se(leads)
        text += f"at the KL of {name} {with_errors(lead[name])}; "
    return claim(above(lead["RLHF 0.5"]), text + "yes or NO is for RLHF 0.5.")


def at_equal_kl(rows, dpo_runs, name, measure):
    """A measure of DPO at the KL of the policy `name`, on straight lines from SFT to beta to beta.

    dpo_runs: the names of DPO's policies."""
    policies = [rows["SFT"]]
    for policy in dpo_runs:
        policies.append(rows[policy])
    policies.sort(key=lambda row: row["kl"])
    return float(np.interp(rows[name]["kl"], values_of(policies, "kl"), values_of(policies, measure)))
