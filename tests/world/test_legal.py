"""Masked log-probs, samples and losses, against the enumeration of all legal routes."""

import json
from argparse import Namespace

import pytest
import torch

import train_sft
from nanoroads import randomness
from nanoroads.batch import pack
from nanoroads.model import GPT, GPTConfig
from nanoroads.world import legal
from nanoroads.world.roadmap import NEIGHBOURS, WORLDS, ends, prompts, reward_parts, route

WORLD = WORLDS["roadmap-3"]
PROMPT = "ME>VT:"


def model(head="lm"):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=98, n_layer=1, n_embd=16, block_size=16, tied=False, head=head)
    return GPT(config)


def legal_routes(here, moves):
    """All routes of 1 to `moves` moves, as lists of states."""
    found = []
    for there in NEIGHBOURS[here]:
        found.append([there])
        if moves > 1:
            found += [[there, *rest] for rest in legal_routes(there, moves - 1)]
    return found


def all_texts(prompt):
    return [route(states) for states in legal_routes(ends(prompt)[0], WORLD.max_moves)]


def test_the_legal_routes_have_all_of_the_mass():
    for prompt in (PROMPT, "WA>FL:", "TN>CO:"):
        texts = all_texts(prompt)
        assert all(reward_parts(prompt, text, WORLD)["legal"] for text in texts)
        (logp,) = legal.route_logps(model(), {prompt: texts}, WORLD.max_moves).values()
        assert logp.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_log_prob_by_hand():
    """Each token's softmax over the roads and, after a move, EOS, as the plain forward pass has it."""
    policy = model()
    text = ">OR>ID"
    tokens = legal.prompt_tokens(["WA>FL:"])
    ids = torch.cat([tokens, legal.route_tokens([text], 2)], 1)
    logits = policy.logits(ids)[0, 2:]  # predicts OR, ID, EOS
    logp = 0.0
    for i, (here, there) in enumerate([("WA", "OR"), ("OR", "ID"), ("ID", None)]):
        names = [legal.ENCODING.encode_single_token(f">{state}") for state in NEIGHBOURS[here]]
        target = legal.EOS if there is None else legal.ENCODING.encode_single_token(f">{there}")
        if i > 0:
            names.append(legal.EOS)
        logp += logits[i, target] - logits[i, names].logsumexp(0)
    three = legal.log_probs(policy, tokens, legal.route_tokens([text], 3))
    torch.testing.assert_close(three, logp[None])
    # Where only two moves are allowed nothing is left to decide after them.
    two = legal.log_probs(policy, tokens, legal.route_tokens([text], 2))
    last = logits[2, legal.EOS] - logits[2, names].logsumexp(0)
    torch.testing.assert_close(two, logp[None] - last)


def test_routes_are_texts_and_tokens():
    texts = [">OR", ">OR>CA>AZ", ">ID>MT"]
    routes = legal.route_tokens(texts, 3)
    assert routes.shape == (3, 3) and legal.route_texts(routes) == texts


def test_samples_follow_the_log_probs():
    policy = model()
    k = 4000
    routes = legal.sample(policy, legal.prompt_tokens([PROMPT]), k, WORLD.max_moves, seed=5)
    drawn = legal.route_texts(routes)
    texts = all_texts(PROMPT)
    assert set(drawn) <= set(texts)
    (logp,) = legal.route_logps(policy, {PROMPT: texts}, WORLD.max_moves).values()
    for text, p in zip(texts, logp.exp().tolist(), strict=True):
        assert drawn.count(text) / k == pytest.approx(p, abs=4 * (p / k) ** 0.5 + 1e-4)


def test_the_reward_model_reads_what_the_scripts_read():
    reward_model = model("scalar")
    texts = [">NH", ">NH>VT", ">NH>MA>VT"]
    tokens, routes = legal.prompt_tokens([PROMPT] * 3), legal.route_tokens(texts, 3)
    lists = [[legal.ENCODING.encode(text) + [legal.EOS]] for text in texts]
    expected = reward_model(pack(tokens.tolist(), lists))
    torch.testing.assert_close(legal.scalar_rewards(reward_model, tokens, routes), expected)


def test_pairs_differ_and_favour_what_is_better():
    tokens, chosen, rejected = legal.draw_pairs(model(), WORLD, 2000, seed=1)
    assert len(tokens) == len(chosen) == len(rejected) == 2000
    assert (chosen != rejected).any(1).all()
    right, wrong = 0, 0
    for prompt, a, b in zip(
        tokens.tolist(), legal.route_texts(chosen), legal.route_texts(rejected), strict=True
    ):
        gap = WORLD.reward(legal.ENCODING.decode(prompt), a) - WORLD.reward(legal.ENCODING.decode(prompt), b)
        right += gap > 0.5
        wrong += gap < -0.5
    assert right > 50 and wrong < 0.02 * right  # sigmoid(6 x 0.9) is .995
    fewer, _, _ = legal.draw_pairs(model(), WORLD, 100, seed=1)
    assert torch.equal(fewer, tokens[:100])  # fewer pairs are the first ones


def test_every_draw_has_random_numbers_of_its_own(monkeypatch):
    monkeypatch.setattr(legal, "ROUTES_PER_PASS", 64)
    keys = []
    drawn = []  # prompts

    def recorded(policy, prompts, k, moves, seed):
        keys.append(seed)
        drawn.append(prompts)
        return sample(policy, prompts, k, moves, seed)

    sample = legal.sample
    monkeypatch.setattr(legal, "sample", recorded)
    legal.draw_pairs(model(), WORLD, 100, seed=1)
    legal.draw_pairs(model(), WORLD, 100, seed=2)
    assert len(keys) > 3 and len(set(keys)) == len(keys)
    assert not torch.equal(drawn[0], drawn[-2]) and not torch.equal(drawn[0], drawn[-1])
    tokens = legal.prompt_tokens([PROMPT])
    assert not torch.equal(sample(model(), tokens, 50, 3, seed=5), sample(model(), tokens, 50, 3, seed=6))


# ---------------------------------------------------------------- the loops

LONG, SHORT = ">NH>VT", ">NH"


def one_pair():
    """32 times the same pair: the longer route is chosen."""
    tokens = legal.prompt_tokens([PROMPT] * 32)
    return tokens, legal.route_tokens([LONG] * 32, 3), legal.route_tokens([SHORT] * 32, 3)


def margin_of(policy):
    """log pi(longer) - log pi(shorter)."""
    (logp,) = legal.route_logps(policy, {PROMPT: [LONG, SHORT]}, 3).values()
    return (logp[0] - logp[1]).item()


def test_dpo_learns_the_pair():
    reference = model()
    before = margin_of(reference)
    policy = legal.train_dpo(reference, one_pair(), beta=0.5, lr=1e-2, steps=20, seed=0)
    assert margin_of(policy) > before + 1 and margin_of(reference) == before


def test_dpo_s_loss_by_hand(monkeypatch):
    """Of a policy that is not the reference any more."""
    reference = model()

    def one_loss(policy, lr, steps, name, loss_of):
        with torch.no_grad():
            policy.lm_head.weight.mul_(30)
        margin = margin_of(policy) - margin_of(reference)
        expected = torch.tensor(-0.3 * margin).exp().log1p().expand(32)
        assert abs(margin) > 0.1 and abs(margin_of(reference)) > 0.1
        torch.testing.assert_close(loss_of(0), expected, rtol=1e-4, atol=1e-5)

    monkeypatch.setattr(legal, "train", one_loss)
    legal.train_dpo(reference, one_pair(), beta=0.3, lr=1e-2, steps=1, seed=0)


def test_the_reward_model_learns_the_pair(monkeypatch):
    monkeypatch.setattr(legal, "new_reward_model", lambda init: model("scalar"))
    tokens, chosen, rejected = one_pair()
    reward_model = legal.train_reward(None, one_pair(), lr=1e-2, steps=20, seed=0)
    gap = legal.scalar_rewards(reward_model, tokens, chosen) - legal.scalar_rewards(
        reward_model, tokens, rejected
    )
    assert (gap > 1).all()


def longer_is_better(reward_model, prompts, routes):
    return (routes != legal.EOS).sum(1).float()


def test_rl_climbs_the_reward_and_stays_near_the_reference(monkeypatch):
    monkeypatch.setattr(legal, "scalar_rewards", longer_is_better)
    tokens = legal.prompt_tokens([PROMPT] * 32)

    def after(kl):
        policy = legal.train_rl(model(), None, tokens, 3, kl=kl, lr=1e-2, steps=20, seed=0)
        routes = legal.sample(policy, tokens, 32, 3, seed=9)
        prompts = tokens.repeat_interleave(32, 0)
        log_ratio = legal.given_log_probs(policy, prompts, routes) - legal.given_log_probs(
            model(), prompts, routes
        )
        return longer_is_better(None, None, routes).mean().item(), log_ratio.mean().item()

    routes = legal.sample(model(), tokens, 32, 3, seed=9)
    before = longer_is_better(None, None, routes).mean().item()
    far, far_kl = after(0.01)
    near, near_kl = after(100.0)
    assert far > before + 0.3 and abs(near - before) < 0.15
    assert near_kl < 0.1 * far_kl


# ---------------------------------------------------------------- measures, and the command


def test_measures_are_of_the_policy_s_own_samples_prompt_by_prompt(monkeypatch):
    policy, reference = model(), model()
    with torch.no_grad():
        policy.lm_head.weight.mul_(30)
    monkeypatch.setattr(legal, "row_of", lambda reward, log_ratio, *optimum: (reward, log_ratio))
    reward, log_ratio = legal.measure(policy, reference, WORLD, None)
    everything = prompts(WORLD, "train")
    key = randomness.stream_key("legal measures")
    routes = legal.sample(policy, legal.prompt_tokens(everything), 16, WORLD.max_moves, key).view(200, 16, 3)
    for i, prompt in enumerate(everything):
        texts = legal.route_texts(routes[i])
        assert reward[i].tolist() == pytest.approx([WORLD.reward(prompt, text) for text in texts])
        repeated = legal.prompt_tokens([prompt] * 16)
        ours = legal.given_log_probs(policy, repeated, routes[i])
        expected = ours - legal.given_log_probs(reference, repeated, routes[i])
        torch.testing.assert_close(log_ratio[i], expected, rtol=1e-4, atol=1e-4)
    assert reward.sum() > 0 and log_ratio.mean() > 0.1


def test_each_road_has_its_own_flags(monkeypatch):
    flags = {"n": 9, "beta": 0.5, "lr": 1, "steps": 2, "reward_lr": 7, "rl_lr": 4, "rl_steps": 5, "seed": 6}

    def train_dpo(reference, pairs, beta, lr, steps, seed):
        return "dpo", reference, pairs, beta, lr, steps, seed

    def train_reward(init, pairs, lr, steps, seed):
        return "reward", init, pairs, lr, steps, seed

    def train_rl(reference, reward_model, prompts, moves, kl, lr, steps, seed):
        return "rl", reference, reward_model, moves, kl, lr, steps, seed

    for function in (train_dpo, train_reward, train_rl):
        monkeypatch.setattr(legal, function.__name__, function)
    monkeypatch.setattr(legal, "draw_pairs", lambda policy, world, n, seed: ("pairs", policy, n, seed))
    monkeypatch.setattr(legal, "measure", lambda policy, reference, world, optimum: (policy, reference))
    rows = legal.both_roads(Namespace(init="folder", **flags), "sft", WORLDS["roadmap-11"])
    pairs = ("pairs", "sft", 9, 6)
    reward_model = ("reward", "folder", pairs, 7, 2, 6)
    assert rows == {
        "sft": ("sft", "sft"),
        "dpo": (("dpo", "sft", pairs, 0.5, 1, 2, 6), "sft"),
        "rlhf": (("rl", "sft", reward_model, 11, 0.5, 4, 5, 6), "sft"),
    }


def test_the_command(tmp_path, monkeypatch, capsys):
    """A folder of a tiny reference -> JSON, and the same again."""
    reference = tmp_path / "sft"
    train_sft.main(["--data", "roadmap-2", "--out", str(reference), "--rows", "200", "--steps", "2", *SHAPE])
    few = ["--n", "64", "--steps", "2", "--rl-steps", "2", "--seed", "3"]
    for name in ("a.json", "b.json"):
        legal.main(["--init", str(reference), "--out", str(tmp_path / name), *few])
    rows = json.loads((tmp_path / "a.json").read_text())
    assert rows == json.loads((tmp_path / "b.json").read_text())
    assert set(rows) == {"sft", "optimum", "dpo", "rlhf"} and rows["sft"]["kl_to_ref"] == 0
    assert 0 < rows["sft"]["reward"] < rows["optimum"]["reward"] <= 1
    assert rows["dpo"]["kl_to_optimum"] > 1 and "true reward DPO" in capsys.readouterr().out


SHAPE = ["--n-layer", "1", "--n-embd", "16"]
