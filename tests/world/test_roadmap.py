"""The built-in world: geography, reward, splits, demonstrations, labels, the exact optimum by brute force."""

import itertools
import math

import numpy as np
import pytest
import torch

from nanoroads.errors import InputError
from nanoroads.randomness import generator
from nanoroads.report import figures
from nanoroads.world import optimum
from nanoroads.world import roadmap as rm

MAIN, ONE_MOVE, TWO_MOVES, HIDDEN = (
    rm.WORLDS[name] for name in ("roadmap", "roadmap-short", "roadmap-2", "roadmap-hidden")
)


# ---------------------------------------------------------------- the map


def test_roads():
    assert len(rm.STATES) == 48 and rm.STATES == sorted(set(rm.STATES))
    roads = {frozenset((a, b)) for a in rm.STATES for b in rm.NEIGHBOURS[a]}
    assert len(roads) == 105 and all(len(road) == 2 for road in roads)
    assert sum(map(len, rm.NEIGHBOURS.values())) == 210  # both ends list each road, once
    assert all(a in rm.NEIGHBOURS[b] for a in rm.STATES for b in rm.NEIGHBOURS[a])
    assert rm.NEIGHBOURS["ME"] == ["NH"]
    assert {s for s in rm.STATES if len(rm.NEIGHBOURS[s]) == 8} == {"MO", "TN"}
    assert set(rm.NEIGHBOURS["FL"]) == {"AL", "GA"} and set(rm.NEIGHBOURS["WA"]) == {"ID", "OR"}
    assert set(rm.NEIGHBOURS["KY"]) == {"IL", "IN", "MO", "OH", "TN", "VA", "WV"}
    for a, b in (("AZ", "CO"), ("NM", "UT"), ("MI", "IL"), ("MI", "MN"), ("NY", "RI")):  # a point, or water
        assert b not in rm.NEIGHBOURS[a]


def test_tables_agree_with_the_roads():
    for i, state in enumerate(rm.STATES):
        first = [rm.STATES[j] for j in rm.NEXT[i, : rm.DEGREE[i]]]
        assert first == rm.NEIGHBOURS[state]
        assert {rm.STATES[j] for j in rm.NEXT[i]} == set(first)


def test_distances():
    far = rm.distances()
    roads = np.array([[b in rm.NEIGHBOURS[a] for b in rm.STATES] for a in rm.STATES]).astype(np.int64)
    reached, power = np.eye(48, dtype=np.int64), np.eye(48, dtype=np.int64)
    expected = np.where(reached > 0, 0, -1)
    for moves in range(1, 12):  # powers of the adjacency matrix: another way than breadth-first search
        power = (power @ roads > 0).astype(np.int64)
        expected[(expected < 0) & (power > 0)] = moves
    assert (far == expected).all() and far.min() == 0  # connected
    ends = {(rm.STATES[a], rm.STATES[b]) for a, b in zip(*np.where(far == 11), strict=True) if a > b}
    assert far.max() == 11 and ends == {("WA", "ME"), ("OR", "ME"), ("NV", "ME"), ("ME", "CA")}


# ---------------------------------------------------------------- reward


@pytest.mark.parametrize(
    "response, legal, arrives, moves, reward",
    [
        (">ID>WY>NE>MO>TN>GA>FL", True, True, 7, 0.7),
        (">OR>CA>AZ>NM>TX>LA>MS>AL>FL", True, True, 9, 0.6),
        # Visiting a state twice is a detour, not a fault.
        (">OR>ID>OR>ID>WY>NE>MO>TN>GA>FL", True, True, 10, 0.55),
        (">ID>WY>NE>MO>TN>GA", True, False, 6, 0.0),
        (">ID>WY>NE>MO>GA>FL", False, True, 6, 0.0),  # MO-GA is no road
        (">MT>WY>NE>MO>TN>GA>FL", False, True, 7, 0.0),  # nor is WA-MT, the first hop
        (">FL", False, True, 1, 0.0),
        (">WA", False, False, 1, 0.0),  # staying is no move
        (">OR>ID>OR>ID>WY>NE>MO>TN>GA>AL>FL", True, True, 11, 0.5),
        # One more than max_moves: EOS cannot follow.
        (">OR>ID>OR>ID>WY>NE>MO>TN>GA>SC>GA>FL", False, True, 12, 0.0),
        ("", False, False, 0, 0.0),
        (" ", False, False, 0, 0.0),
        ("ID>WY>NE>MO>TN>GA>FL", False, False, 6, 0.0),
        (">ID >WY>NE>MO>TN>GA>FL", False, False, 7, 0.0),
        (">ID>WY>NE>MO>TN>GA>FL ", False, False, 7, 0.0),
        (">ID>WY>NE>MO>TN>GA>FL\n", False, False, 7, 0.0),
        (">ID>WY>NE>MO>TN>GA>FL<|end|>", False, False, 8, 0.0),
        (">ID>WYNE:>MO>TN>GA>FL", False, False, 6, 0.0),
        (">id>WY>NE>MO>TN>GA>FL", False, False, 7, 0.0),
    ],
)
def test_reward_parts(response, legal, arrives, moves, reward):
    parts = rm.reward_parts("WA>FL:", response)
    assert parts == {
        "legal": legal,
        "arrives": arrives,
        "moves": moves,
        "reward": pytest.approx(reward, abs=1e-12),
    }
    assert parts["reward"] == rm.true_reward("WA>FL:", response) == MAIN.reward("WA>FL:", response)


def test_reward_of_the_short_worlds():
    assert TWO_MOVES.reward("WA>OR:", ">OR") == 1.0 and TWO_MOVES.reward("WA>CA:", ">OR>CA") == 0.95
    assert TWO_MOVES.reward("WA>OR:", ">ID>OR") == 0.95
    assert TWO_MOVES.reward("WA>OR:", ">OR>CA>OR") == 0.0 and MAIN.reward("WA>OR:", ">OR>CA>OR") == 0.9
    assert ONE_MOVE.reward("WA>OR:", ">OR") == 1.0
    assert ONE_MOVE.reward("WA>OR:", ">ID>OR") == ONE_MOVE.reward("WA>OR:", ">ID") == 0.0


@pytest.mark.parametrize(
    "prompt", ["", "WA>", "WA>FL", "WA>FL: ", "WA>XX:", "XX>FL:", "FL:WA>", "WA>FL:\n", "WA>WA:"]
)
def test_malformed_prompts(prompt):
    for function in (optimum.shortest_routes, rm.ends, lambda p: rm.true_reward(p, ">OR")):
        with pytest.raises(InputError, match="prompt"):
            function(prompt)


def test_hidden_reward():
    prompt = rm.prompts(HIDDEN, "test")[0]
    hidden = sorted(rm.hidden_walks()[prompt])
    others = [s for s in rm.STATES if s not in hidden]
    assert HIDDEN.reward(prompt, rm.route(hidden)) == 1.0
    shuffled = rm.route(hidden[::-1] + hidden[:1])  # order and repeats do not matter
    assert HIDDEN.reward(prompt, shuffled) == 1.0
    assert HIDDEN.reward(prompt, rm.route(others[:4])) == HIDDEN.reward(prompt, "") == 0.0
    hits, wrong = hidden[:2], others[:3]
    precision, recall = 2 / 5, 2 / len(hidden)
    f1 = 2 * precision * recall / (precision + recall)
    assert HIDDEN.reward(prompt, rm.route(hits + wrong)) == pytest.approx(f1)
    last_word_is_no_state = rm.route(hits + wrong[:2]) + "WA>"
    assert HIDDEN.reward(prompt, last_word_is_no_state) == pytest.approx(2 * 2 / (4 + len(hidden)))
    parts = rm.reward_parts(prompt, rm.route(hits + wrong), HIDDEN)
    assert parts["moves"] == 5 and parts["reward"] == pytest.approx(f1)
    with pytest.raises(InputError, match="roadmap-hidden"):
        HIDDEN.reward(next(p for p in rm.prompts(MAIN, "train") if p not in rm.hidden_walks()), ">OR")


def test_hidden_walks_are_walks():
    assert len(rm.hidden_walks()) == 100
    for prompt, seen in rm.hidden_walks().items():
        start, _ = rm.ends(prompt)
        reached = {start}
        for _ in range(7):
            reached |= {b for a in reached for b in rm.NEIGHBOURS[a] if b in seen}
        assert seen <= reached and 2 <= len(seen) <= 7 and seen & set(rm.NEIGHBOURS[start])
    assert 4.5 < np.mean([len(seen) for seen in rm.hidden_walks().values()]) < 6


# ---------------------------------------------------------------- prompts, demonstrations, labels


def test_splits():
    everything = {f"{a}>{b}:" for a in rm.STATES for b in rm.STATES if a != b}
    train, test = rm.prompts(MAIN, "train"), rm.prompts(MAIN, "test")
    assert (len(train), len(test)) == (2000, 256) and set(train) | set(test) == everything
    for name, world in rm.WORLDS.items():
        assert world.name == name
        train, test = rm.prompts(world, "train"), rm.prompts(world, "test")
        assert (train == test) == world.same_prompts == (world is not MAIN)
        assert len(set(test)) == len(test) == {MAIN: 256, HIDDEN: 100}.get(world, 200)
        assert max(optimum.moves_apart(prompt) for prompt in train) <= world.reach
    moves = {name: world.max_moves for name, world in rm.WORLDS.items() if world.reach == world.max_moves}
    short = {"roadmap-short": 1, "roadmap-2": 2, "roadmap-3": 3, "roadmap-5": 5, "roadmap-8": 8}
    assert moves == {"roadmap": 11, **short, "roadmap-11": 11}
    assert rm.prompts(HIDDEN, "train") == rm.prompts(HIDDEN, "test") == list(rm.hidden_walks())
    with pytest.raises(InputError, match="'dev'"):
        rm.prompts(MAIN, "dev")


def test_the_splits_never_change():
    """Held-out prompts stay held out: these may only change together with every published number."""
    assert rm.prompts(MAIN, "test")[:3] == PINNED["main"]
    assert rm.prompts(MAIN, "train")[:3] == PINNED["main, train"]
    assert rm.prompts(ONE_MOVE, "test")[:3] == PINNED["one move"]
    assert rm.prompts(TWO_MOVES, "test")[:3] == PINNED["two moves"]
    prompt, seen = next(iter(rm.hidden_walks().items()))
    assert (prompt, sorted(seen)) == PINNED["hidden"]


PINNED = {
    "main": ["RI>CA:", "NH>ND:", "KY>LA:"],
    "main, train": ["IA>NV:", "AL>MI:", "CO>VA:"],
    "one move": ["AZ>NV:", "ME>NH:", "GA>NC:"],
    "two moves": ["GA>MS:", "IL>VA:", "IA>MI:"],
    "hidden": ("RI>CA:", ["CT", "MA", "NY", "RI", "VT"]),
}


@pytest.mark.parametrize("world", rm.WORLDS.values(), ids=rm.WORLDS)
def test_demonstrations(world):
    rows = rm.demonstrations(world, 6001, 3)
    train = set(rm.prompts(world, "train"))
    lengths, at_goal = np.zeros(world.max_moves + 2), 0
    for row in rows:
        parts = rm.reward_parts(row["prompt"], row["response"], world)
        assert parts["legal"] and row["prompt"] in train
        lengths[parts["moves"]] += 1
        at_goal += parts["arrives"]
    assert len(rows) == 6001 and lengths[0] == lengths[-1] == 0
    share = lengths[1:-1] / 6001 * world.max_moves
    assert (abs(share - 1) < 0.3).all()  # uniform, less the walks that end where they begin
    # A walk to a random goal arrives by luck: the more often, the nearer the goals are.
    by_luck = {"roadmap-short": 0.11, "roadmap-2": 0.04, "roadmap-3": 0.02}
    expected = by_luck.get(world.name, 0.01) + (0.01 if world.hidden else 0.5)
    assert abs(at_goal / 6001 - expected) < 0.02
    assert at_goal >= 3001 or world.hidden
    assert {row["prompt"] for row in rows[:3000]} > {row["prompt"] for row in rows[:50]}
    first_half = np.mean([row["response"].endswith(row["prompt"][3:5]) for row in rows[:3000]])
    assert abs(first_half - expected) < 0.04  # shuffled
    assert rows == rm.demonstrations(world, 6001, 3) != rm.demonstrations(world, 6001, 4)
    assert len(rm.demonstrations(world, 1, 0)) == 1


def test_walks_are_uniform():
    states = rm.walks(np.full(40_000, rm.INDEX["MO"]), 2, np.random.default_rng(0))
    assert states.shape == (40_000, 2)
    for state in rm.NEIGHBOURS["MO"]:
        assert abs((states[:, 0] == rm.INDEX[state]).mean() - 1 / 8) < 0.01
    second = states[states[:, 0] == rm.INDEX["KY"], 1]
    for state in rm.NEIGHBOURS["KY"]:
        assert abs((second == rm.INDEX[state]).mean() - 1 / 7) < 0.025


@pytest.mark.parametrize("world, gap, scale", [(MAIN, 0.1, 6.0), (TWO_MOVES, 0.05, 6.0), (MAIN, 0.7, 6.0)])
def test_labels_are_bradley_terry(world, gap, scale):
    n = 8_000
    good, bad = {0.1: (">OR", ">OR>CA>OR"), 0.05: (">OR", ">ID>OR"), 0.7: (">OR>CA>OR>ID>OR>ID>OR", ">CA")}[
        gap
    ]
    assert world.reward("WA>OR:", good) - world.reward("WA>OR:", bad) == pytest.approx(gap)
    expected = 1 / (1 + math.exp(-scale * gap))
    for first, second in ((good, bad), (bad, good)):
        rows = rm.label_pairs(world, ["WA>OR:"] * n, [first] * n, [second] * n, seed=1)
        assert abs(np.mean([row["chosen"] == good for row in rows]) - expected) < 0.015
        assert all(
            {row["chosen"], row["rejected"]} == {good, bad} and row["prompt"] == "WA>OR:" for row in rows
        )


def test_labels_of_the_hidden_world_and_of_single_pairs():
    prompt = rm.prompts(HIDDEN, "train")[0]
    hidden = sorted(rm.hidden_walks()[prompt])
    a, b = rm.route(hidden[:2]), rm.route(hidden[:1])
    gap = 4 / (2 + len(hidden)) - 2 / (1 + len(hidden))
    rng = generator("labels", 0)
    rows = [rm.label(HIDDEN, prompt, a, b, rng) for _ in range(4000)]
    assert abs(np.mean([row["chosen"] == a for row in rows]) - 1 / (1 + math.exp(-15 * gap))) < 0.02
    assert rows[:50] == rm.label_pairs(HIDDEN, [prompt] * 50, [a] * 50, [b] * 50, seed=0)


# ---------------------------------------------------------------- what is best


def test_shortest_routes():
    assert optimum.shortest_routes("ME>NH:") == [">NH"]
    assert sorted(optimum.shortest_routes("CA>CO:")) == [">AZ>NM>CO", ">AZ>UT>CO", ">NV>UT>CO"]
    assert optimum.optimal_reward("ME>NH:") == 1.0 and optimum.optimal_reward("WA>ME:") == pytest.approx(0.5)
    for prompt in rm.prompts(MAIN, "test"):
        start, goal = rm.ends(prompt)
        found = optimum.shortest_routes(prompt)
        assert len(found) == len(set(found))
        best = 1 - 0.05 * (rm.distances()[rm.INDEX[start], rm.INDEX[goal]] - 1)
        assert optimum.optimal_reward(prompt) == pytest.approx(best)
        assert all(rm.true_reward(prompt, text) == pytest.approx(best) for text in found)
    assert np.mean([optimum.optimal_reward(p) for p in rm.prompts(MAIN, "test")]) == pytest.approx(
        0.8443, abs=1e-4
    )


def test_shortest_routes_are_all_of_them():
    roads = np.array([[b in rm.NEIGHBOURS[a] for b in rm.STATES] for a in rm.STATES]).astype(np.int64)
    for prompt in rm.prompts(MAIN, "test")[:80]:
        start, goal = (rm.INDEX[s] for s in rm.ends(prompt))
        walks = np.linalg.matrix_power(roads, rm.distances()[start, goal])[start, goal]  # their number
        assert len(optimum.shortest_routes(prompt)) == walks


def test_routes_are_all_that_is_rewarded():
    everything = [rm.route(s) for n in (1, 2) for s in itertools.product(rm.STATES, repeat=n)]
    for world in (ONE_MOVE, TWO_MOVES):
        for prompt in rm.prompts(world, "test")[:6]:
            rewarded = [text for text in everything if world.reward(prompt, text) > 0]
            assert sorted(optimum.rewarded_routes(world, prompt)) == sorted(rewarded)
    roads = np.array([[b in rm.NEIGHBOURS[a] for b in rm.STATES] for a in rm.STATES]).astype(np.int64)
    walks = sum(np.linalg.matrix_power(roads, moves) for moves in range(1, 6))  # (48, 48) their number
    found = optimum.rewarded_routes(rm.WORLDS["roadmap-5"], "ME>NH:")
    assert len(found) == len(set(found)) == walks[rm.INDEX["ME"], rm.INDEX["NH"]]
    for world in (MAIN, HIDDEN, rm.WORLDS["roadmap-8"]):
        with pytest.raises(InputError, match=world.name):
            optimum.rewarded_routes(world, rm.prompts(world, "train")[0])


def test_routes_may_pass_through_the_goal():
    found = optimum.rewarded_routes(rm.WORLDS["roadmap-3"], "ME>NH:")
    assert sorted(found) == [">NH", ">NH>MA>NH", ">NH>ME>NH", ">NH>VT>NH"]


def brute_force(prompts, beta):
    """A random pi_ref over all texts of at most 3 words of a tiny vocabulary; its optimum by definition."""
    generator = torch.Generator().manual_seed(0)
    words = "AL AZ CA FL GA MS NV OR TN".split()
    space = [rm.route(s) for n in (0, 1, 2, 3) for s in itertools.product(words, repeat=n)]
    result = []
    for prompt in prompts:
        ref = torch.randn(len(space), generator=generator, dtype=torch.float64).mul(2).log_softmax(0)
        reward = torch.tensor([TWO_MOVES.reward(prompt, text) for text in space], dtype=torch.float64)
        unnormalised = ref + reward / beta
        log_z = unnormalised.logsumexp(0)
        result.append((space, ref, reward, log_z, unnormalised - log_z))
    return result


@pytest.mark.parametrize("beta", [0.05, 0.3, 2.0])
def test_exact_optimum_equals_brute_force(beta):
    prompts = ["AL>GA:", "AZ>CA:", "FL>TN:", "FL>MS:"]  # 3, 2, 2 and 1 routes within the vocabulary
    full = brute_force(prompts, beta)
    ref_logp = torch.full((len(prompts), 5), -math.inf, dtype=torch.float64)
    reward = torch.zeros(len(prompts), 5, dtype=torch.float64)
    for i, (prompt, (space, ref, r, _, _)) in enumerate(zip(prompts, full, strict=True)):
        known = [text for text in optimum.rewarded_routes(TWO_MOVES, prompt) if text in space]
        assert len(known) == (r > 0).sum().item() == (3, 2, 2, 1)[i]
        for j, text in enumerate(known):
            ref_logp[i, j], reward[i, j] = ref[space.index(text)], r[space.index(text)]
    found = optimum.exact_optimum(ref_logp, reward, beta)
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {
        name: ((4,), torch.float64) for name in ("log_z", "reward", "kl_to_ref")
    }
    generator = torch.Generator().manual_seed(1)
    for i, (_, ref, r, log_z, best_logp) in enumerate(full):
        p = best_logp.exp()
        assert p.sum().item() == pytest.approx(1)
        assert found["log_z"][i].item() == pytest.approx(log_z.item(), abs=1e-12)
        assert found["reward"][i].item() == pytest.approx((p * r).sum().item(), abs=1e-12)
        assert found["kl_to_ref"][i].item() == pytest.approx((p * (best_logp - ref)).sum().item(), abs=1e-11)
        policy = torch.randn(len(ref), generator=generator, dtype=torch.float64).log_softmax(0)
        q = policy.exp()
        kl = optimum.kl_to_optimum((q * (policy - ref)).sum(), (q * r).sum(), found["log_z"][i], beta)
        assert kl.item() == pytest.approx((q * (policy - best_logp)).sum().item(), abs=1e-10)


def test_exact_optimum_at_the_limits():
    # pi_ref knows one route.
    one = optimum.exact_optimum(torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.95, 0.0]]), 0.1)
    assert one["reward"].item() == pytest.approx(0.95)
    assert one["kl_to_ref"].item() == pytest.approx(0, abs=1e-6)
    # e^(1/beta) is far beyond the largest fp64.
    cold = optimum.exact_optimum([[-3.0, -4.0]], [[1.0, 0.95]], 1e-3)
    assert cold["reward"].item() == pytest.approx(1.0) and cold["kl_to_ref"].item() == pytest.approx(3.0)
    hot = optimum.exact_optimum([[-3.0, -4.0]], [[1.0, 0.95]], 1e6)
    assert hot["reward"].item() == pytest.approx(math.exp(-3) + 0.95 * math.exp(-4), rel=1e-5)
    # Sums in fp32 may exceed 1.
    rounded = optimum.exact_optimum([[math.log(0.5), math.log(0.50001)]], [[1.0, 1.0]], 0.5)
    assert rounded["log_z"].item() == pytest.approx(2.0, abs=1e-4)
    flat = optimum.exact_optimum([-3.0, -4.0], [1.0, 0.95], 0.5)
    assert flat["log_z"].shape == ()
    for beta in (0.0, -1.0, math.nan):
        with pytest.raises(InputError, match="beta"):
            optimum.exact_optimum([[-3.0]], [[1.0]], beta)
    with pytest.raises(InputError, match="sum to 1.2"):
        optimum.exact_optimum([[math.log(0.6), math.log(0.6)]], [[1.0, 1.0]], 0.5)


# ---------------------------------------------------------------- the drawing


def test_places_are_roughly_right():
    assert figures.PLACE.keys() == rm.NEIGHBOURS.keys()
    x = {state: place[0] for state, place in figures.PLACE.items()}
    y = {state: place[1] for state, place in figures.PLACE.items()}
    assert (
        max(x, key=x.get) == "ME"
        and min(y, key=y.get) == "FL"
        and x["CA"] < x["NV"] < x["CO"] < x["MO"] < x["NC"]
    )
    assert y["ND"] > y["SD"] > y["NE"] > y["KS"] > y["OK"] > y["TX"]
    lengths = [math.dist(figures.PLACE[a], figures.PLACE[b]) for a in rm.STATES for b in rm.NEIGHBOURS[a]]
    assert (
        max(lengths) < 9.5
        and min(math.dist(figures.PLACE[a], figures.PLACE[b]) for a in x for b in x if a != b) > 1.2
    )
