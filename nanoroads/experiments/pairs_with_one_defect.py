"""What experiments/verify_not_generate.py learns from: random walks, and pairs of walks without noise.

The rejected walk of a pair is as long as the chosen one and has one defect: it ends elsewhere, or one of
its hops is no road."""

import numpy as np

from nanoroads.randomness import generator
from nanoroads.weights.files import jsonl_bytes, write_bytes
from nanoroads.world import roadmap
from nanoroads.world.roadmap import INDEX, STATES, ends, route, walks

WORLD = roadmap.MAIN


def demonstrations(n, seed):
    """n random walks, whose prompts name a random goal: they teach the roads, not that a goal matters."""
    rng = generator("verify, not generate: demonstrations", seed)
    known = roadmap.prompts(WORLD, "train")
    drawn = []
    starts = []
    for i in rng.integers(len(known), size=n):
        start, _ = ends(known[i])
        drawn.append(known[i])
        starts.append(INDEX[start])
    states = walks(np.array(starts), WORLD.max_moves, rng)  # (n, max_moves)
    moves = rng.integers(1, WORLD.max_moves + 1, size=n)
    rows = []
    for prompt, walk, length in zip(drawn, states, moves, strict=True):
        rows.append({"prompt": prompt, "response": route(STATES[state] for state in walk[:length])})
    return rows


def pairs(n, split, seed):
    """n pairs without noise in the labels: a legal walk to the goal, and one as long with a defect."""
    rng = generator("verify, not generate: pairs", split, seed)
    in_split = set(roadmap.prompts(WORLD, split))
    rows = []
    while len(rows) < n:
        start = rng.integers(48)
        moves = rng.integers(1, WORLD.max_moves + 1)
        walk, other = walks(np.array([start, start]), moves, rng)
        goal = walk[-1]
        prompt = f"{STATES[start]}>{STATES[goal]}:"
        # Nor does the other walk end at the start, which is never a goal. Maine has one neighbour, so of
        # one move from there there is no other walk: such draws are dropped, not repeated.
        if prompt not in in_split or other[-1] in (start, goal):
            continue
        chosen = [STATES[state] for state in walk]
        rejected = [STATES[state] for state in other]
        if moves > 1 and rng.random() < 0.5:
            rejected = with_illegal_hop(STATES[start], chosen, rng)
        rows.append({"prompt": prompt, "chosen": route(chosen), "rejected": route(rejected)})
    return rows


def with_illegal_hop(start, states, rng):
    """The route with one state replaced, not the last, so that it arrives, and not by roads alone."""
    place = rng.integers(len(states) - 1)
    changed = list(states)
    while roadmap.follows_roads(start, changed):
        changed[place] = STATES[rng.integers(48)]
    return changed


def write_rows(folder, n_demonstrations, n_pairs, n_test_pairs, seed):
    """Files of a seed: demonstrations.jsonl, pairs.jsonl, pairs_test.jsonl, and chosen.jsonl.

    The last one has the chosen routes of pairs.jsonl, as demonstrations."""
    train = pairs(n_pairs, "train", seed)
    files = {
        "demonstrations.jsonl": demonstrations(n_demonstrations, seed),
        "pairs.jsonl": train,
        "pairs_test.jsonl": pairs(n_test_pairs, "test", seed),
        "chosen.jsonl": [{"prompt": row["prompt"], "response": row["chosen"]} for row in train],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_bytes(folder / name, jsonl_bytes(rows))
