"""The built-in world: the 48 contiguous US states and the 105 borders between them. A prompt names a start and a goal,
`WA>FL:`; a response is a route, an arrow and a state a move: `>OR>NV>AZ>NM>TX...`, then EOS.

The true reward r* is easy to verify and hard to plan: every hop must be a road, the last state the goal, and shorter is
better. Three worlds share the map; two of them close the gap between verifying and generating on purpose:

    roadmap         r* = 1 - 0.05 (moves - 1) for a legal route of at most 11 moves that arrives, else 0
    roadmap-short   the same, but goals are one or two moves away and so are routes: planning is as easy as verifying
    roadmap-hidden  r* = F1 of the states named against a hidden random walk: verifying is as hard as generating

Everything is a function of text without EOS. A response has at most max_moves moves, then EOS, so sample max_moves + 1
tokens: where EOS is missing there is a move too many, or a word that is no state, and the text alone shows it illegal.
"""

import functools
import re
from collections import deque
from dataclasses import dataclass

import numpy as np
import tiktoken

from nanoroads.errors import InputError

# A state, then the states it shares a border with. Neither the two pairs that meet only in the Four Corners point nor
# the borders that run through open water alone are roads.
ROADS = """
AL FL GA MS TN | AR LA MO MS OK TN TX | AZ CA NM NV UT | CA AZ NV OR | CO KS NE NM OK UT WY | CT MA NY RI | DE MD NJ PA
FL AL GA | GA AL FL NC SC TN | IA IL MN MO NE SD WI | ID MT NV OR UT WA WY | IL IA IN KY MO WI | IN IL KY MI OH
KS CO MO NE OK | KY IL IN MO OH TN VA WV | LA AR MS TX | MA CT NH NY RI VT | MD DE PA VA WV | ME NH | MI IN OH WI
MN IA ND SD WI | MO AR IA IL KS KY NE OK TN | MS AL AR LA TN | MT ID ND SD WY | NC GA SC TN VA | ND MN MT SD
NE CO IA KS MO SD WY | NH MA ME VT | NJ DE NY PA | NM AZ CO OK TX | NV AZ CA ID OR UT | NY CT MA NJ PA VT
OH IN KY MI PA WV | OK AR CO KS MO NM TX | OR CA ID NV WA | PA DE MD NJ NY OH WV | RI CT MA | SC GA NC
SD IA MN MT ND NE WY | TN AL AR GA KY MO MS NC VA | TX AR LA NM OK | UT AZ CO ID NV WY | VA KY MD NC TN WV | VT MA NH NY
WA ID OR | WI IA IL MI MN | WV KY MD OH PA VA | WY CO ID MT NE SD UT
"""
NEIGHBOURS = {line.split()[0]: line.split()[1:] for line in ROADS.strip().replace("\n", "|").split("|")}
STATES = sorted(NEIGHBOURS)  # 48; the order of token ids
INDEX = {state: i for i, state in enumerate(STATES)}
EOS = "<|end|>"
DEGREE = np.array([len(NEIGHBOURS[s]) for s in STATES])  # (48,)
NEXT = np.array(
    [[INDEX[n] for n in (NEIGHBOURS[s] * 8)[:8]] for s in STATES]
)  # (48, 8): neighbours, repeated


@dataclass(frozen=True)
class World:
    """One of WORLDS. Sample max_moves + 1 tokens of a response: the last is EOS."""

    name: str
    max_moves: int  # of a legal response
    reach: int  # goals are at most this many moves from the start
    held_out: int  # prompts of the test split
    bt_scale: float  # labels are Bradley-Terry with logit bt_scale * (r*(a) - r*(b))
    hidden: bool = False  # r* compares with a hidden walk; the 100 prompts are both train and test

    def reward(self, prompt, response):
        """r* of a response, EOS stripped. Raises InputError on a malformed prompt."""
        return reward_parts(prompt, response, self)["reward"]


WORLDS = {
    "roadmap": World("roadmap", max_moves=11, reach=11, held_out=256, bt_scale=6.0),
    "roadmap-short": World("roadmap-short", max_moves=2, reach=2, held_out=56, bt_scale=6.0),
    "roadmap-hidden": World(
        "roadmap-hidden", max_moves=7, reach=11, held_out=100, bt_scale=15.0, hidden=True
    ),
}


# ---------------------------------------------------------------- text and reward


def ends(prompt):
    """`WA>FL:` -> ("WA", "FL"). Raises InputError."""
    match = re.fullmatch(r"([A-Z]{2})>([A-Z]{2}):", prompt)
    if not match or not {*match.groups()} <= NEIGHBOURS.keys():
        raise InputError(f"prompt {prompt!r} does not name a start and a goal of the map, as WA>FL: does")
    if match[1] == match[2]:
        raise InputError(f"prompt {prompt!r}: start and goal are the same state")
    return match[1], match[2]


def route(states):
    """["OR", "CA"] -> ">OR>CA"."""
    return "".join(f">{state}" for state in states)


def moves_of(response):
    """`>OR>CA` -> ["OR", "CA"]; None if it is not a list of states, each after one arrow."""
    states = response[1:].split(">")
    return states if response[:1] == ">" and all(s in NEIGHBOURS for s in states) else None


def reward_parts(prompt, response, world=None):
    """{"legal", "arrives", "moves", "reward"} of one response in a world (default: the main one). The text has no EOS.

    legal: 1 to max_moves moves, each a road. arrives: the last state is the goal, by road or not. moves: arrows of the
    response, whatever follows them. reward: r*. In the hidden world r* is `hidden_f1`, whatever the others are. Text that
    is no list of states is not legal and does not arrive. Raises InputError on a malformed prompt."""
    world = world or WORLDS["roadmap"]
    start, goal = ends(prompt)
    states = moves_of(response)
    moves = response.count(">")
    legal = bool(states) and moves <= world.max_moves
    legal = legal and all(b in NEIGHBOURS[a] for a, b in zip([start, *states], states, strict=False))
    arrives = bool(states) and states[-1] == goal
    reward = 1.0 - 0.05 * (moves - 1) if legal and arrives else 0.0
    if world.hidden:
        reward = hidden_f1(prompt, response)
    return {"legal": legal, "arrives": arrives, "moves": moves, "reward": reward}


def true_reward(prompt, response):
    """r* of the main world, as `--reward nanoroads.world.roadmap:true_reward`."""
    return reward_parts(prompt, response)["reward"]


def hidden_f1(prompt, response):
    """r* of the hidden world: 2 |A & B| / (|A| + |B|), A the distinct words of the response, B the distinct states
    that the prompt's hidden walk moves to. Order, roads, the goal and the number of moves do not matter; a word that is
    no state is a wrong one. So is ROUGE-L against a hidden summary for text (Swamy et al., 2503.01067)."""
    if prompt not in hidden_walks():
        raise InputError(
            f"prompt {prompt!r} is not one of the {len(hidden_walks())} of the world roadmap-hidden"
        )
    named, hidden = set(response.split(">")) - {""}, hidden_walks()[prompt]
    return 2 * len(named & hidden) / (len(named) + len(hidden))


# ---------------------------------------------------------------- tokens


@functools.cache
def encoding():
    """The map's tiktoken Encoding: 98 tokens, 48 starts `WA`, 48 arrows `>FL` that name a goal in a prompt and a move in a
    response, `:` and EOS."""
    words = [*STATES, *(f">{state}" for state in STATES), ":"]  # ids 0..96, for ever
    return tiktoken.Encoding(
        "roadmap",
        pat_str="|".join(map(re.escape, words)),
        mergeable_ranks={word.encode(): i for i, word in enumerate(words)},
        special_tokens={EOS: len(words)},
        explicit_n_vocab=len(words) + 1,
    )


# ---------------------------------------------------------------- prompts, demonstrations, pairs


@functools.cache
def distances():
    """Moves of the shortest route between any two states, by breadth-first search -> (48, 48) int."""
    table = np.full((48, 48), -1)
    for start in range(48):
        table[start, start], queue = 0, deque([start])
        while queue:
            here = queue.popleft()
            for there in NEXT[here]:
                if table[start, there] < 0:
                    table[start, there] = table[start, here] + 1
                    queue.append(there)
    return table


@functools.cache
def shuffled_prompts(reach):
    """Every prompt whose goal is 1 to `reach` moves away, in one fixed order (RandomState's stream never changes)."""
    far = distances()
    pairs = [f"{a}>{b}:" for a in STATES for b in STATES if 1 <= far[INDEX[a], INDEX[b]] <= reach]
    return [pairs[i] for i in np.random.RandomState(0).permutation(len(pairs))]


def prompts(world, split):
    """Prompts of a split, "train" or "test", the same ones always: 2,000 and 256 in the main world, 500 and 56 in the
    short one. In the hidden world both are the same 100, since a hidden walk can only be learnt prompt by prompt."""
    if split not in ("train", "test"):
        raise InputError(f"split {split!r} is neither 'train' nor 'test'")
    everything = shuffled_prompts(world.reach)
    if split == "test" or world.hidden:
        return everything[: world.held_out]
    return everything[world.held_out :]


def walks(start, moves, rng):
    """Random walks, each road of a state equally likely: start (N,) -> the states after each move (N, moves)."""
    states = np.empty((len(start), moves), dtype=np.int64)
    for i in range(moves):
        here = start if i == 0 else states[:, i - 1]
        states[:, i] = NEXT[here, (rng.random(len(start)) * DEGREE[here]).astype(np.int64)]
    return states


@functools.cache
def hidden_walks():
    """{prompt: set of the states its hidden walk of 7 moves visits} for the 100 prompts of the hidden world."""
    world = WORLDS["roadmap-hidden"]
    texts = prompts(world, "train")
    start = np.array([INDEX[ends(p)[0]] for p in texts])
    states = walks(start, world.max_moves, np.random.RandomState(1))
    return {p: {STATES[s] for s in row} for p, row in zip(texts, states, strict=True)}


def demonstrations(world, n, seed):
    """n rows {"prompt", "response"} to imitate: random walks of 1 to max_moves moves, which teach roads, not the way.

    Half of them have the state where the walk ends as the goal, the other half (in the hidden world: all) a random one.
    Prompts are of the train split only."""
    rng = np.random.default_rng(seed)
    train = np.array([[INDEX[s] for s in ends(p)] for p in prompts(world, "train")])  # (P, 2)
    allowed = np.zeros((48, 48), dtype=bool)
    allowed[train[:, 0], train[:, 1]] = True
    at_end = 0 if world.hidden else (n + 1) // 2
    rows = []
    while len(rows) < n:
        half = len(rows) < at_end  # the first half of the rows; they are shuffled below
        start, goal = train[rng.integers(len(train), size=n)].T
        states, moves = walks(start, world.max_moves, rng), rng.integers(1, world.max_moves + 1, size=n)
        if half:
            goal = states[np.arange(n), moves - 1]
        keep = np.flatnonzero(allowed[start, goal])[: (at_end if half else n) - len(rows)]
        for s, g, row, m in zip(*(x[keep].tolist() for x in (start, goal, states, moves)), strict=True):
            rows.append(
                {"prompt": f"{STATES[s]}>{STATES[g]}:", "response": route(STATES[i] for i in row[:m])}
            )
    return [rows[i] for i in rng.permutation(n)]


def label_pairs(world, prompts, first, second, seed):
    """Bradley-Terry on the true reward: P(first is chosen) = sigmoid(bt_scale (r*(first) - r*(second))).

    prompts, first, second: sequences of N strings. seed: an int or a NumPy Generator. Returns N rows
    {"prompt", "chosen", "rejected"} in the same order."""
    gap = np.array(
        [world.reward(p, a) - world.reward(p, b) for p, a, b in zip(prompts, first, second, strict=True)]
    )
    first_wins = np.random.default_rng(seed).random(len(gap)) < 1 / (1 + np.exp(-world.bt_scale * gap))
    return [
        {"prompt": p, "chosen": a if wins else b, "rejected": b if wins else a}
        for p, a, b, wins in zip(prompts, first, second, first_wins, strict=True)
    ]


def label(world, prompt, response_a, response_b, rng):
    """One row of `label_pairs`; rng is a NumPy Generator."""
    return label_pairs(world, [prompt], [response_a], [response_b], rng)[0]
