"""The claims of experiments/on_policy.py in words: whether each holds, and by how many standard errors.

text: what is claimed, as the script says it. by_seed: of each seed {policy: {measure: number}}."""

import numpy as np

from nanoroads.experiments.pair_sources import OFFLINE, ON_POLICY, SFT_SAMPLES, named
from nanoroads.report.cells import NEGLIGIBLE, above, below, beside_bound, claim, every, with_errors
from nanoroads.report.evidence import lead
from nanoroads.score import mean_se


def gain(text, by_seed, one, other, measure, end):
    """The claim that one policy is ahead of another. end: of the sentence, after the number."""
    ahead = lead(by_seed, one, other, measure)
    return claim(above(ahead), f"{text}: by {with_errors(ahead)}{end}")


def at_equal_beta(by_seed, betas, measure):
    """How far on-policy pairs are ahead of SFT's samples at each beta, in words."""
    text = ""
    for beta in betas:
        ahead = lead(by_seed, named(ON_POLICY, beta), named(SFT_SAMPLES, beta), measure)
        text += f" Both at {beta}: {with_errors(ahead)}."
    return text


def as_well_offline(text, by_seed, beta):
    """The claim that the pairs of the rounds do as well offline: in neither reward is on-policy ahead."""
    sampled = lead(by_seed, named(ON_POLICY, beta), named(OFFLINE, beta), "reward")
    greedy = lead(by_seed, named(ON_POLICY, beta), named(OFFLINE, beta), "greedy_reward")
    text += f": on-policy leads by {beside_bound(sampled, NEGLIGIBLE)} sampled, "
    text += f"{beside_bound(greedy, NEGLIGIBLE)} greedy."
    return claim(every([below(sampled, NEGLIGIBLE), below(greedy, NEGLIGIBLE)]), text)


def classifies_better(text, by_seed, dpo, on_policy):
    """The claim that DPO ranks SFT's held-out pairs better than on-policy DPO and than RLHF."""
    over_dpo = lead(by_seed, dpo, on_policy, "accuracy_sft")
    over_rlhf = lead(by_seed, dpo, "RLHF", "accuracy_sft")
    text += f": DPO leads on-policy DPO by {with_errors(over_dpo)}, RLHF by {with_errors(over_rlhf)}."
    return claim(every([above(over_dpo), above(over_rlhf)]), text)


def more_rounds_help(text, by_seed, names, measure):
    """The claim that more rounds bring more reward than few, and than DPO's. names: of `by_rounds`."""
    most = max(names)
    slope = mean_se([slope_of(row, names, measure) for row in by_seed])
    from_dpo = lead(by_seed, names[most], names[1], measure)
    to_rlhf = lead(by_seed, "RLHF", names[most], measure)
    text += f": {with_errors(slope)} for ten times as many. {most} rounds lead DPO by "
    text += f"{with_errors(from_dpo)}, RLHF leads them by {with_errors(to_rlhf)}."
    return claim(every([above(slope), above(from_dpo)]), text)


def slope_of(row, names, measure):
    """How much a measure grows when there are ten times as many rounds, by least squares."""
    values = [row[name][measure] for name in names.values()]
    return np.polyfit(np.log10(list(names)), values, 1)[0]
