"""What score.py scores pairs with: a policy, alone or with its reference, a reward model, or a rule."""

from typing import NamedTuple

import torch

from nanoroads.errors import InputError, printable
from nanoroads.losses import implicit_reward
from nanoroads.progress import tracked
from nanoroads.score import check_fitted, check_reference, scalar_rewards, sequence_logps
from nanoroads.text import chat_template, tokenizer
from nanoroads.text.data import Limits
from nanoroads.text.pairs import encode_pairs
from nanoroads.weights.checkpoint import load_policy, load_reward_model
from nanoroads.weights.files import local_folder, read_config
from nanoroads.weights.identity import find


class Scorer(NamedTuple):
    """A model or a rule."""

    kind: str  # policy | reward | rule
    place: str  # a folder, or module:function
    reference: str | None = None  # a folder; None: there is no implicit reward
    beta: float = 1.0  # of the implicit reward


def policy_scorer(folder, reference=None):
    """The Scorer of a policy. reference: a folder; None: the one that the run records, if it does, whatever
    its loss was.

    Raises InputError where that is gone, or was trained again."""
    config = read_config(folder)
    if reference is None and "reference" in config:
        reference = find(folder, config, "reference")
        check_reference(folder, reference, "--policy")
    # RL with a KL of weight kl ends in the policy whose reward is kl log pi/pi_ref: that is its beta.
    beta = config.get("beta") or config.get("kl") or 1.0
    return Scorer("policy", folder, reference, beta)


def reward_scorer(folder):
    """The Scorer of a reward model of either class. Raises InputError, as policy_scorer does."""
    config = read_config(folder)
    if config.get("model", {}).get("head") != "lm":
        return Scorer("reward", folder)
    check_fitted(folder)  # the local class: a policy with its reference
    reference = find(folder, config, "reference")
    check_reference(folder, reference)
    return Scorer("reward", folder, reference, config["beta"])


def names_of(all_scorers):
    """A name for each Scorer: its place, and where that stands there before, a number behind it."""
    names = []
    for scorer in all_scorers:
        name, number = scorer.place, 1
        while name in names:
            number += 1
            name = f"{scorer.place} ({number})"
        names.append(name)
    return names


def read_for(scorer, pairs, args, machine):
    """What a model reads of the pairs: {row's number: EncodedRow}, {row's number: error}.

    Raises InputError where the model, its tokenizer or its reference cannot be used."""
    load = load_policy if scorer.kind == "policy" else load_reward_model
    model = load(scorer.place, *machine)
    if model.config.head == "lm" and scorer.kind == "reward" and not scorer.reference:
        raise InputError(f"--reward {scorer.place}: a policy without a reference is no reward; see --policy")
    _, encoding = tokenizer.of(scorer.place, model)
    if scorer.reference:
        load_policy(scorer.reference, *machine, like=model)
        tokenizer.check_same(scorer.reference, encoding, scorer.place)
    if pairs and chat_template.template(encoding) and isinstance(pairs[0].texts.prompt, str):
        hint = "rows of text, read as they are; --chat writes its chat template around them"
        print(printable(f"{scorer.place}: {hint}"))
    cuts = (args.max_prompt_tokens, args.max_response_tokens)
    hint = " (--max-prompt-tokens and --max-response-tokens cut)"
    return encode_pairs(pairs, encoding, Limits(model.config.block_size, *cuts, hint=hint))


# ---------------------------------------------------------------- the numbers


def policy_logps(folder, rows, machine, groups_per_pass, known):
    """log pi (N, 2) of N pairs. known: {folder: log-probs}, added to: policies may share a reference."""
    key = str(local_folder(folder).resolve())
    if key not in known:
        policy = load_policy(folder, *machine)
        known[key] = sequence_logps(policy, rows.prompts, rows.responses, groups_per_pass)
    return known[key]


def model_measures(scorer, rows, machine, groups_per_pass, known):
    """{measure: (N, 2)} of N pairs, chosen first. known: see policy_logps."""
    if scorer.kind == "reward" and not scorer.reference:
        reward_model = load_reward_model(scorer.place, *machine)
        return {"reward": scalar_rewards(reward_model, rows.prompts, rows.responses, groups_per_pass)}
    lengths = torch.tensor(rows.lengths())  # (N, 2) tokens, EOS included
    logp = policy_logps(scorer.place, rows, machine, groups_per_pass, known)  # (N, 2)
    measures = {"tokens": lengths, "logp": logp, "logp_per_token": logp / lengths}
    if scorer.reference:
        measures["ref_logp"] = policy_logps(scorer.reference, rows, machine, groups_per_pass, known)
        measures["reward"] = implicit_reward(logp, measures["ref_logp"], scorer.beta)
    return measures


def rule_measures(judge, pairs):
    """{"reward": (N, 2)}: what a rule says of the texts of N pairs."""
    values = []
    for pair in tracked(pairs, "scoring", "pair"):
        values.append([judge.value(pair.prompt, answer) for answer in pair.answers])
    return {"reward": torch.tensor(values)}
