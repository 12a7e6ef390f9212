"""The claims of experiments/displacement.py in words: whether each holds, and by how many standard errors.

by_seed: of each seed {policy: its measures}. dpo, rlhf: the names of the policies at the scripts' defaults;
dpo_runs, rlhf_runs: those of all policies of each road."""

import numpy as np

from nanoroads.experiments.displacement_measures import UNSEEN
from nanoroads.report.cells import (
    above,
    below,
    beside_nearer_bound,
    claim,
    every,
    least_sure,
    plus_minus,
    room_within,
    with_errors,
    within,
)
from nanoroads.report.evidence import over_seeds, values_of
from nanoroads.score import mean_se

MISSES_BY = 0.3  # nats that the identity may miss by: it is of expectations, and measured on samples
OUTSIDE = {  # measures of leaving the data: shares of a policy's samples
    "illegal": "illegal routes",
    "unseen": f"routes with a token of pi_ref < {UNSEEN}",
}


def identity_holds(by_seed, runs):
    """The claim that the identity holds to MISSES_BY nats, shown by the policy of which it is least sure.

    runs: the names of the policies."""
    gaps = {name: identity_gap(by_seed, name) for name in runs}
    worst = least_sure({name: room_within(gap, MISSES_BY) for name, gap in gaps.items()})
    text = f"chosen and rejected together change by -KL(pi_ref || pi), to {MISSES_BY} nats: of {len(gaps)} "
    text += f"policies the least sure is {worst}, which misses by "
    text += f"{beside_nearer_bound(gaps[worst], MISSES_BY)}, errors of samples, not of seeds."
    return claim(every(within(gap, MISSES_BY) for gap in gaps.values()), text)


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


def chosen_fall(by_seed, dpo, rlhf):
    """The claim that the mean log-prob of the chosen falls on both roads, at their defaults."""
    of_dpo = over_seeds(by_seed, dpo, "chosen")
    of_rlhf = over_seeds(by_seed, rlhf, "chosen")
    text = f"chosen log-probs fall on both roads: {dpo} {with_errors(of_dpo)}; {rlhf} {with_errors(of_rlhf)}."
    return claim(every([below(of_dpo), below(of_rlhf)]), text)


def better_falls(by_seed, dpo, weak):
    """The claim that DPO lowers the response with the larger true reward; ties and a small beta beside it.

    weak: the name of DPO with the small beta."""
    better = over_seeds(by_seed, dpo, "better")
    ties = over_seeds(by_seed, dpo, "ties")
    mass = plus_minus(over_seeds(by_seed, dpo, "chosen_mass"), 2)
    text = f"{dpo} lowers the better response (Razin, Pal): where true rewards differ it changes by "
    text += f"{with_errors(better)}, with {weak} by {with_errors(over_seeds(by_seed, weak, 'better'))}; "
    text += f"the chosen of ties by {with_errors(ties)}. "
    text += f"With {dpo} the probability of all chosen together grows {mass} times."
    return claim(below(better), text)


def leaves_data(by_seed, dpo_runs, rlhf_runs, rlhf, measure):
    """The claim that DPO has more of a measure of OUTSIDE than RLHF, at equal KL; other kl beside it."""
    lead = {}
    text = f"DPO leaves the data further than RLHF at equal KL (Xu): its share of {OUTSIDE[measure]} less "
    text += "RLHF's, "
    for name in rlhf_runs:
        leads = []
        for rows in by_seed:
            leads.append(at_equal_kl(rows, dpo_runs, name, measure) - rows[name][measure])
        lead[name] = mean_se(leads)
        text += f"at the KL of {name} {with_errors(lead[name])}; "
    return claim(above(lead[rlhf]), f"{text}yes or NO is for {rlhf}.")


def at_equal_kl(rows, dpo_runs, name, measure):
    """A measure of DPO at the KL of the policy `name`, on straight lines from SFT to beta to beta.

    nan beyond the last. dpo_runs: the names of DPO's policies."""
    policies = [rows["SFT"]]
    for policy in dpo_runs:
        policies.append(rows[policy])
    policies.sort(key=lambda row: row["kl"])
    kls = values_of(policies, "kl")
    return float(np.interp(rows[name]["kl"], kls, values_of(policies, measure), left=np.nan, right=np.nan))
