"""How experiments/verify_not_generate.py counts pairs that are ranked right, and routes that are valid.

rows: N pairs of pairs_with_one_defect.py. Each measure is of a pair, and of all pairs of a group its mean."""

import torch

from nanoroads.report.evidence import values_of
from nanoroads.report.judged import pairs_as_tokens
from nanoroads.report.on_map import ENCODING, GROUPS_PER_PASS
from nanoroads.score import ranked_right, rewards
from nanoroads.world.optimum import moves_apart
from nanoroads.world.roadmap import MAIN, reward_parts
from nanoroads.world.task import measure_on_map

WORLD = MAIN
DISTANCES = {"1": (1, 1), "2": (2, 2), "3-4": (3, 4), "5 or more": (5, 11)}  # fewest moves to the goal
FAR = "3 or more"


def verifies(model, reference, rows):
    """(N,): 1 where a model ranks the pair right, 0 where wrong, 1/2 for a tie."""
    asked, answers = pairs_as_tokens(rows)
    # Whatever beta is, the order of two implicit rewards is the same.
    reward = rewards(model, reference, asked, answers, beta=1.0, groups_per_pass=GROUPS_PER_PASS)  # (N, 2)
    return ranked_right(reward[:, 0] - reward[:, 1])


def generates(policy, reference, rows):
    """{measure: (N,)} of a policy's own routes for the prompts of the pairs: 8 samples, and one greedy."""
    prompts = values_of(rows, "prompt")
    asked = list(dict.fromkeys(prompts))  # each once
    place = [asked.index(prompt) for prompt in prompts]  # (N,): where a pair's prompt stands in `asked`
    values = measure_on_map(policy, reference, WORLD, ENCODING, asked, GROUPS_PER_PASS, samples=8)
    reward = torch.tensor(values["reward"]).view(-1, 8)  # above 0 exactly for a legal route that arrives
    greedy_reward = torch.tensor(values["greedy_reward"])
    legal = torch.tensor(values["legal"]).view(-1, 8)
    return {
        "valid": (reward > 0).double().mean(1)[place],
        "greedy": (greedy_reward > 0).double()[place],
        "legal": legal.double().mean(1)[place],
    }


def groups_of(rows):
    """{name: (N,) bool}: all pairs, those with either defect, and those whose goal is so many moves away."""
    legal = torch.tensor([reward_parts(row["prompt"], row["rejected"])["legal"] for row in rows])
    moves = torch.tensor([moves_apart(row["prompt"]) for row in rows])
    groups = {"all": torch.ones_like(legal), "ends elsewhere": legal, "illegal hop": ~legal}
    for name, (least, most) in DISTANCES.items():
        groups[name] = (least <= moves) & (moves <= most)
    groups[FAR] = moves >= 3
    return groups


def group_means(groups, measures):
    """{measure: {group: mean}}. groups: of `groups_of`; measures: {name: (N,)}."""
    results = {}
    for measure, of_pairs in measures.items():
        results[measure] = {name: of_pairs[mask].double().mean().item() for name, mask in groups.items()}
    return results
