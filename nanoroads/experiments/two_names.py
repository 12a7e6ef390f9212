"""The map with a second name for each move, the world of experiments/token_cues.py.

`>or` is a token beside `>OR`, and means the same. Only responses are written in such tokens; a
prompt is always `WA>FL:`.
"""

import re
from pathlib import Path

from nanoroads.randomness import generator
from nanoroads.text import tokenizer
from nanoroads.weights.files import jsonl_bytes, write_bytes, write_json
from nanoroads.world import roadmap
from nanoroads.world.roadmap import EOS, STATES

WORLD = roadmap.MAIN
WRITINGS = ["as trained", "renamed", "mixed"]  # >OR>NV; >or>nv; each of its moves in either way
# Two references, and the writings of the routes that their SFT imitates, each equally often.
KNOWN = {"two_names": WRITINGS, "two_names_unmixed": ["as trained", "renamed"]}


def write_tokenizer(folder: Path):
    """A tokenizer as a Hugging Face folder, for `train_sft.py --tokenizer`.

    It has 146 tokens: the map's 98 with the same ids, then `>al` to `>wy`."""
    words = STATES + [f">{state}" for state in STATES] + [":", EOS]
    words += [f">{state.lower()}" for state in STATES]
    ids = {word: i for i, word in enumerate(words)}
    eos = {"id": ids.pop(EOS), "content": EOS, "special": True}
    pieces = {"type": "Split", "behavior": "Isolated", "invert": False}
    pieces["pattern"] = {"Regex": "[A-Z]{2}|>[A-Za-z]{2}|:"}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    specification = {
        "added_tokens": [eos],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pieces, as_bytes]},
        "model": {"type": "BPE", "vocab": ids, "merges": [], "ignore_merges": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", specification)
    write_json(folder / "tokenizer_config.json", {"eos_token": EOS})


def rewritten(route: str, writing: str, rng) -> str:
    """A route as trained -> the same route in one of WRITINGS. rng: NumPy's, which mixes."""

    def name(move):
        if writing == "renamed" or (writing == "mixed" and rng.random() < 0.5):
            return move[0].lower()
        return move[0]

    return re.sub(">[A-Z]{2}", name, route)


def demonstrations(known: list[str], n: int, seed: int) -> list[dict[str, str]]:
    """The map's n rows {"prompt", "response"}, each response in one of the writings `known`."""
    rng = generator("two names: demonstrations", seed)
    rows = []
    for row in roadmap.demonstrations(WORLD, n, seed):
        writing = known[rng.integers(len(known))]
        rows.append({"prompt": row["prompt"], "response": rewritten(row["response"], writing, rng)})
    return rows


def write_world(folder: Path, n: int, seed: int):
    """What SFT learns from: a tokenizer and n demonstrations, in a folder for each of KNOWN.

    Returns the tokenizer's encoding."""
    for reference, known in KNOWN.items():
        write_tokenizer(folder / reference / "tokenizer")
        rows = demonstrations(known, n, seed)
        write_bytes(folder / reference / "demonstrations.jsonl", jsonl_bytes(rows))
    return tokenizer.get(str(folder / reference / "tokenizer"))


def pairs_as_tokens(pairs: list[dict[str, str]], writing: str, encoding, seed: int):
    """P pairs as trained -> (prompts, [chosen, rejected] of each) as tokens, in one of WRITINGS."""
    rng = generator("two names: pairs", seed)
    eos = tokenizer.eos_id(encoding)
    prompts = []
    responses = []
    for pair in pairs:
        chosen = tokenizer.encode(encoding, rewritten(pair["chosen"], writing, rng)) + [eos]
        rejected = tokenizer.encode(encoding, rewritten(pair["rejected"], writing, rng)) + [eos]
        prompts.append(tokenizer.encode(encoding, pair["prompt"]))
        responses.append([chosen, rejected])
    return prompts, responses
