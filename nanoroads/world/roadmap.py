"""The built-in world: the 48 contiguous US states and the 105 borders between them.

A prompt names a start and a goal, `WA>FL:`. A response is a route, an arrow and a state for each
move, `>OR>NV>AZ>NM>TX...`, then EOS.

The true reward r* is easy to verify and hard to plan: every hop must be a road, the last state the
goal, and shorter is better. Several worlds share the map. Two of them close the gap between verifying
and generating on purpose:

    roadmap         r* = 1 - 0.05 (moves - 1) for a legal route of at most 11 moves that arrives,
                    else 0; 2,000 prompts to train on, and 256 held-out ones
    roadmap-short   the same, but the goal is one move away and a route has one move: there is nothing
                    to plan
    roadmap-2       the same with two moves instead of one; roadmap-3, -5, -8 and -11 with as many as
                    they are named after: of a route at most, and to a goal at most
    roadmap-hidden  r* = F1 of the states named against a hidden random walk: verifying is as hard
                    as generating

All but the first have few prompts, 200 or 100, the same for training and for tests: they ask whether
a road arrives at all, not whether what it learns holds for new prompts.

Everything is a function of text without EOS. A response has at most max_moves moves, then EOS, so
sample max_moves + 1 tokens. In all worlds but the hidden one a response without EOS is over-long or
malformed, so its text alone scores it 0. The hidden world's F1 does not ask for EOS.
"""

import functools
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import tiktoken

from nanoroads import randomness
from nanoroads.errors import InputError

# A state, then the states it shares a border with. Neither the two pairs that meet only in the Four
# Corners point nor the borders that run through open water alone are roads.
ROADS = """
AL FL GA MS TN | AR LA MO MS OK TN TX | AZ CA NM NV UT | CA AZ NV OR | CO KS NE NM OK UT WY
CT MA NY RI | DE MD NJ PA | FL AL GA | GA AL FL NC SC TN | IA IL MN MO NE SD WI
ID MT NV OR UT WA WY | IL IA IN KY MO WI | IN IL KY MI OH | KS CO MO NE OK
KY IL IN MO OH TN VA WV | LA AR MS TX | MA CT NH NY RI VT | MD DE PA VA WV | ME NH | MI IN OH WI
MN IA ND SD WI | MO AR IA IL KS KY NE OK TN | MS AL AR LA TN | MT ID ND SD WY | NC GA SC TN VA
ND MN MT SD | NE CO IA KS MO SD WY | NH MA ME VT | NJ DE NY PA | NM AZ CO OK TX
NV AZ CA ID OR UT | NY CT MA NJ PA VT | OH IN KY MI PA WV | OK AR CO KS MO NM TX | OR CA ID NV WA
PA DE MD NJ NY OH WV | RI CT MA | SC GA NC | SD IA MN MT ND NE WY | TN AL AR GA KY MO MS NC VA
TX AR LA NM OK | UT AZ CO ID NV WY | VA KY MD NC TN WV | VT MA NH NY | WA ID OR | WI IA IL MI MN
WV KY MD OH PA VA | WY CO ID MT NE SD UT
"""


def read_roads() -> dict[str, list[str]]:
    """ROADS as {state: the states it shares a border with}."""
    neighbours = {}
    for entry in ROADS.strip().replace("\n", "|").split("|"):
        names = entry.split()
        neighbours[names[0]] = names[1:]
    return neighbours


NEIGHBOURS = read_roads()
STATES = sorted(NEIGHBOURS)  # 48; the order of token ids
INDEX = {state: i for i, state in enumerate(STATES)}
EOS = "<|end|>"

# The roads as tables, for many random walks at once. No state has more than 8 neighbours; the row
# of one that has fewer repeats them.
DEGREE = np.array([len(NEIGHBOURS[state]) for state in STATES])  # (48,)
NEXT = np.array([np.resize([INDEX[n] for n in NEIGHBOURS[state]], 8) for state in STATES])  # (48, 8)


@dataclass(frozen=True)
class World:
    """One of WORLDS."""

    name: str
    max_moves: int  # of a legal response
    reach: int  # goals are at most this many moves from the start
    test_prompts: int
    same_prompts: bool  # whether those are the prompts of the train split too, or held out from it
    bt_scale: float  # labels are Bradley-Terry with logit bt_scale * (r*(a) - r*(b))
    hidden: bool = False  # r* compares with a hidden walk
    readout: str = "last"  # what suits a reward model here, see GPTConfig

    def reward(self, prompt: str, response: str) -> float:
        """r* of a response, EOS stripped. Raises InputError on a malformed prompt."""
        return reward_parts(prompt, response, self)["reward"]


def horizon_world(name: str, moves: int) -> World:
    """A world of 200 prompts in which routes have at most `moves` moves, and goals are no further away."""
    return World(name, max_moves=moves, reach=moves, test_prompts=200, same_prompts=True, bt_scale=6.0)


MAIN = World("roadmap", max_moves=11, reach=11, test_prompts=256, same_prompts=False, bt_scale=6.0)
HIDDEN = World(
    "roadmap-hidden",
    max_moves=7,
    reach=11,
    test_prompts=100,
    same_prompts=True,
    bt_scale=15.0,
    hidden=True,
    readout="sum",  # F1 is a sum over the states that are named
)
WORLDS = {
    "roadmap": MAIN,
    "roadmap-short": horizon_world("roadmap-short", 1),
    "roadmap-2": horizon_world("roadmap-2", 2),
    "roadmap-3": horizon_world("roadmap-3", 3),
    "roadmap-5": horizon_world("roadmap-5", 5),
    "roadmap-8": horizon_world("roadmap-8", 8),
    "roadmap-11": horizon_world("roadmap-11", 11),
    "roadmap-hidden": HIDDEN,
}


# ---------------------------------------------------------------- text and reward


def ends(prompt: str) -> tuple[str, str]:
    """`WA>FL:` -> ("WA", "FL"). Raises InputError for a malformed prompt."""
    match = re.fullmatch(r"([A-Z]{2})>([A-Z]{2}):", prompt)
    if not match or match[1] not in NEIGHBOURS or match[2] not in NEIGHBOURS:
        raise InputError(f"prompt {prompt!r} does not name a start and a goal of the map, as WA>FL: does")
    if match[1] == match[2]:
        raise InputError(f"prompt {prompt!r}: start and goal are the same state")
    return match[1], match[2]


def route(states: Iterable[str]) -> str:
    """["OR", "CA"] -> ">OR>CA"."""
    return "".join(f">{state}" for state in states)


def moves_of(response: str) -> list[str] | None:
    """`>OR>CA` -> ["OR", "CA"]; None if it is not a list of states, each after one arrow."""
    if not response.startswith(">"):
        return None
    states = response[1:].split(">")
    if any(state not in NEIGHBOURS for state in states):
        return None
    return states


def follows_roads(start: str, states: list[str]) -> bool:
    """Whether each move of a route that leaves from `start` follows a road."""
    here = start
    for there in states:
        if there not in NEIGHBOURS[here]:
            return False
        here = there
    return True


def reward_parts(prompt: str, response: str, world: World | None = None) -> dict[str, bool | int | float]:
    """{"legal", "arrives", "moves", "reward"} of one response in a world (default: the main one).

    The text has no EOS. legal: 1 to max_moves moves, each a road. arrives: the last state is the
    goal, by road or not. moves: the arrows of the response, whatever follows them. reward: r*, in
    the hidden world `hidden_f1`, whatever the other parts are. Text that is no list of states is
    not legal and does not arrive. Raises InputError for a malformed prompt."""
    world = world or MAIN
    start, goal = ends(prompt)
    moves = response.count(">")
    states = moves_of(response)
    legal = states is not None and moves <= world.max_moves and follows_roads(start, states)
    arrives = states is not None and states[-1] == goal
    reward = 0.0
    if world.hidden:
        reward = hidden_f1(prompt, response)
    elif legal and arrives:
        reward = 1.0 - 0.05 * (moves - 1)
    return {"legal": legal, "arrives": arrives, "moves": moves, "reward": reward}


def true_reward(prompt: str, response: str) -> float:
    """r* of the main world, as `--reward nanoroads.world.roadmap:true_reward`."""
    return reward_parts(prompt, response)["reward"]


def hidden_f1(prompt: str, response: str) -> float:
    """r* of the hidden world: 2 |A & B| / (|A| + |B|).

    A: the distinct words of the response; a word that is no state is a wrong one. B: the distinct
    states that the prompt's hidden walk moves to. Order, roads, the goal and the number of moves do
    not matter. ROUGE-L against a hidden summary is the same for text (Swamy et al., 2503.01067)."""
    if prompt not in hidden_walks():
        count = len(hidden_walks())
        raise InputError(f"prompt {prompt!r} is not one of the {count} of the world roadmap-hidden")
    hidden = hidden_walks()[prompt]
    named = set(response.split(">")) - {""}
    return 2 * len(named & hidden) / (len(named) + len(hidden))


# ---------------------------------------------------------------- tokens


@functools.cache
def encoding() -> tiktoken.Encoding:
    """The map's tiktoken Encoding of 98 tokens.

    48 starts `WA`; 48 arrows `>FL`, which name a goal in a prompt and a move in a response; `:` and
    EOS."""
    words = STATES + [f">{state}" for state in STATES] + [":"]  # ids 0 to 96, for ever
    return tiktoken.Encoding(
        "roadmap",
        pat_str="|".join(re.escape(word) for word in words),
        mergeable_ranks={word.encode(): i for i, word in enumerate(words)},
        special_tokens={EOS: len(words)},
        explicit_n_vocab=len(words) + 1,
    )


# ---------------------------------------------------------------- prompts, demonstrations, pairs


@functools.cache
def distances() -> np.ndarray:
    """Moves of the shortest route between two states, by breadth-first search -> (48, 48) int."""
    table = np.full((48, 48), -1)
    for start in range(48):
        table[start, start] = 0
        queue = deque([start])
        while queue:
            here = queue.popleft()
            for there in NEXT[here]:
                if table[start, there] < 0:  # not reached yet
                    table[start, there] = table[start, here] + 1
                    queue.append(there)
    return table


@functools.cache
def shuffled_prompts(reach: int) -> list[str]:
    """Every prompt whose goal is 1 to `reach` moves away, in one fixed order."""
    prompts_in_order = []
    for start in STATES:
        for goal in STATES:
            if 1 <= distances()[INDEX[start], INDEX[goal]] <= reach:
                prompts_in_order.append(f"{start}>{goal}:")
    # The seed belongs to the world, as its roads do; RandomState's stream never changes.
    order = np.random.RandomState(0).permutation(len(prompts_in_order))
    return [prompts_in_order[i] for i in order]


def prompts(world: World, split: str) -> list[str]:
    """Prompts of a split, "train" or "test", always the same ones.

    2,000 and 256 in the main world. In the others both are the same 200, in the hidden world 100: a
    hidden walk can only be learnt prompt by prompt. Raises InputError for another split."""
    if split not in ("train", "test"):
        raise InputError(f"split {split!r} is neither 'train' nor 'test'")
    everything = shuffled_prompts(world.reach)
    if split == "test" or world.same_prompts:
        return everything[: world.test_prompts]
    return everything[world.test_prompts :]


def walks(start: np.ndarray, moves: int, rng) -> np.ndarray:
    """Random walks in which each road out of a state is equally likely.

    start (N,) int -> the states after each move, (N, moves) int64. rng: NumPy's, of either kind."""
    states = np.empty((len(start), moves), dtype=np.int64)
    here = start
    for i in range(moves):
        road = (rng.random(len(start)) * DEGREE[here]).astype(np.int64)
        here = NEXT[here, road]
        states[:, i] = here
    return states


@functools.cache
def hidden_walks() -> dict[str, set[str]]:
    """For the 100 prompts of the hidden world, {prompt: states that its walk of 7 moves visits}."""
    hidden_prompts = prompts(HIDDEN, "train")
    start = np.array([INDEX[ends(prompt)[0]] for prompt in hidden_prompts])
    states = walks(start, HIDDEN.max_moves, np.random.RandomState(1))  # (100, 7)
    visited = {}
    for prompt, walk in zip(hidden_prompts, states, strict=True):
        visited[prompt] = {STATES[state] for state in walk}
    return visited


def demonstrations(world: World, n: int, seed: int) -> list[dict[str, str]]:
    """n rows {"prompt", "response"} to imitate: random walks of 1 to max_moves moves.

    They teach the roads, not the way. In one half the goal is where the walk ends; in the other
    half, and in the hidden world always, it is a random one. All prompts are of the train split."""
    rng = randomness.generator("demonstrations", world.name, seed)
    train_prompts = [ends(prompt) for prompt in prompts(world, "train")]
    train = np.array([[INDEX[start], INDEX[goal]] for start, goal in train_prompts])  # (P, 2)
    is_train = np.zeros((48, 48), dtype=bool)
    is_train[train[:, 0], train[:, 1]] = True
    n_arriving = 0 if world.hidden else (n + 1) // 2
    rows = []
    # First the rows whose goal is where the walk ends, then the rows with a random goal. Each round
    # draws n walks and keeps as many as are still missing.
    while len(rows) < n:
        chosen = train[rng.integers(len(train), size=n)]  # (n, 2)
        start = chosen[:, 0]
        states = walks(start, world.max_moves, rng)  # (n, max_moves)
        moves = rng.integers(1, world.max_moves + 1, size=n)
        if len(rows) < n_arriving:
            goal = states[np.arange(n), moves - 1]
            end = n_arriving
        else:
            goal = chosen[:, 1]
            end = n
        # A walk may end where it began, or at a goal of the test split: such prompts are left out.
        usable = np.flatnonzero(is_train[start, goal])
        for i in usable[: end - len(rows)]:
            prompt = f"{STATES[start[i]]}>{STATES[goal[i]]}:"
            walk = states[i, : moves[i]]
            rows.append({"prompt": prompt, "response": route(STATES[state] for state in walk)})
    return [rows[i] for i in rng.permutation(n)]


def label_pairs(
    world: World,
    prompts: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    seed: int | np.random.Generator,
) -> list[dict[str, str]]:
    """Bradley-Terry on the true reward:

        P(first is chosen) = sigmoid(bt_scale (r*(first) - r*(second)))

    prompts, first, second: N strings each. Returns N rows {"prompt", "chosen", "rejected"} in the
    same order. seed: of the labels, or the generator that draws them."""
    gaps = []
    for prompt, a, b in zip(prompts, first, second, strict=True):
        gaps.append(world.reward(prompt, a) - world.reward(prompt, b))
    chance = 1 / (1 + np.exp(-world.bt_scale * np.array(gaps)))  # (N,) that the first is chosen
    if isinstance(seed, np.random.Generator):
        rng = seed
    else:
        rng = randomness.generator("labels", seed)
    first_wins = rng.random(len(gaps)) < chance
    rows = []
    for prompt, a, b, a_wins in zip(prompts, first, second, first_wins, strict=True):
        if a_wins:
            rows.append({"prompt": prompt, "chosen": a, "rejected": b})
        else:
            rows.append({"prompt": prompt, "chosen": b, "rejected": a})
    return rows


def label(
    world: World, prompt: str, response_a: str, response_b: str, rng: np.random.Generator
) -> dict[str, str]:
    """One row of `label_pairs`."""
    return label_pairs(world, [prompt], [response_a], [response_b], rng)[0]
