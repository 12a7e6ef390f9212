"""The claims of experiments/on_policy.py in words: whether each holds, and by how many standard errors.

by_seed: of each seed {policy: {measure: number}}. sft, on_policy, rlhf: the names of DPO on SFT's samples, on
its own, and on RLHF's, each at its best beta."""

import numpy as np

from nanoroads.experiments.on_policy import REWARDS
from nanoroads.experiments.pair_sources import OFFLINE, ON_POLICY, SFT_SAMPLES, named
from nanoroads.report.cells import NEGLIGIBLE, above, below, beside_bound, claim, every, with_errors
from nanoroads.report.evidence import lead
from nanoroads.score import mean_se


def own_pairs_beat(by_seed, on_policy, sft, betas, measure):
    """The claim that on-policy pairs bring more of a reward than SFT's samples."""
    ahead = lead(by_seed, on_policy, sft, measure)
    text = (
        f"on-policy pairs beat SFT's samples in {REWARDS[measure]} reward (Tajwar), each at its best beta: "
    )
    return claim(above(ahead), f"{text}by {with_errors(ahead)}.{at_equal_beta(by_seed, betas, measure)}")


def at_equal_beta(by_seed, betas, measure):
    """How far on-policy pairs are ahead of SFT's samples at each beta, in words."""
    text = ""
    for beta in betas:
        ahead = lead(by_seed, named(ON_POLICY, beta), named(SFT_SAMPLES, beta), measure)
        text += f" Both at {beta}: {with_errors(ahead)}."
    return text


def as_well_offline(by_seed, beta):
    """The claim that the pairs of the rounds do as well offline: on-policy leads by less than NEGLIGIBLE."""
    sampled = lead(by_seed, named(ON_POLICY, beta), named(OFFLINE, beta), "reward")
    greedy = lead(by_seed, named(ON_POLICY, beta), named(OFFLINE, beta), "greedy_reward")
    text = f"at beta {beta} the same pairs do as well offline and shuffled, to {NEGLIGIBLE} (in Tang's "
    text += f"ablation they do not): on-policy leads by {beside_bound(sampled, NEGLIGIBLE)} sampled, "
    text += f"{beside_bound(greedy, NEGLIGIBLE)} greedy."
    return claim(every([below(sampled, NEGLIGIBLE), below(greedy, NEGLIGIBLE)]), text)


def better_samples_are_better_pairs(by_seed, rlhf, sft):
    """The claim that DPO on RLHF's samples has more reward than on SFT's."""
    ahead = lead(by_seed, rlhf, sft, "reward")
    text = "samples of a better policy, RLHF's, are better pairs than SFT's, each at its best beta: by "
    return claim(above(ahead), f"{text}{with_errors(ahead)} in sampled reward.")


def classifies_better(by_seed, sft, on_policy):
    """The claim that DPO ranks SFT's held-out pairs better than on-policy DPO and than RLHF."""
    over_dpo = lead(by_seed, sft, on_policy, "accuracy_sft")
    over_rlhf = lead(by_seed, sft, "RLHF", "accuracy_sft")
    text = "offline policies classify SFT's held-out pairs better than online ones (Tang): DPO leads "
    text += f"on-policy DPO by {with_errors(over_dpo)}, RLHF by {with_errors(over_rlhf)}."
    return claim(every([above(over_dpo), above(over_rlhf)]), text)


def classifies_its_own(by_seed, on_policy, sft, betas):
    """The claim that on-policy DPO ranks pairs of its own samples better than DPO those of its."""
    ahead = lead(by_seed, on_policy, sft, "accuracy_own")
    text = f"on pairs of its own samples on-policy DPO classifies better than DPO: by {with_errors(ahead)}."
    return claim(above(ahead), text + at_equal_beta(by_seed, betas, "accuracy_own"))


def more_rounds_help(by_seed, beta, names, measure):
    """The claim that more rounds bring more reward than few, and than DPO's. names: of `by_rounds`."""
    most = max(names)
    slope = mean_se([slope_of(row, names, measure) for row in by_seed])
    from_dpo = lead(by_seed, names[most], names[1], measure)
    to_rlhf = lead(by_seed, "RLHF", names[most], measure)
    text = f"at beta {beta} more rounds bring more {REWARDS[measure]} reward, and more than DPO: "
    text += f"{with_errors(slope)} for ten times as many. {most} rounds lead DPO by {with_errors(from_dpo)}, "
    return claim(every([above(slope), above(from_dpo)]), f"{text}RLHF leads them by {with_errors(to_rlhf)}.")


def slope_of(row, names, measure):
    """How much a measure grows when there are ten times as many rounds, by least squares."""
    values = [row[name][measure] for name in names.values()]
    return np.polyfit(np.log10(list(names)), values, 1)[0]
