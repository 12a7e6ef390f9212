"""Masked log-probs, samples and losses, against the enumeration of all legal routes."""

import json

import pytest
import torch

import train_sft
from nanoroads.batch import pack
from nanoroads.model import GPT, GPTConfig
from nanoroads.world import legal
from nanoroads.world.roadmap import NEIGHBOURS, WORLDS, ends, reward_parts, route

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
