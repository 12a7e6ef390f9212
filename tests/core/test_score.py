"""Measures against their definitions: log-probs from plain logits, rewards from the map, standard errors by hand."""

from argparse import Namespace

import pytest
import torch

from nanoroads import evaluate, roadmap, tokenizer
from nanoroads.generate import generate
from nanoroads.model import GPT, GPTConfig

ARGS = Namespace(micro_batch_size=None, batch_size=3, dtype="float32")
CPU = torch.device("cpu")
ENCODING = tokenizer.get("roadmap")
EOS = tokenizer.eos_id(ENCODING)
WORLD = roadmap.WORLDS["roadmap"]
PROMPTS = roadmap.prompts(WORLD, "test")[:7]
IDS = [tokenizer.encode(ENCODING, p) for p in PROMPTS]


def policy(seed, **more):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=ENCODING.n_vocab, n_layer=1, n_embd=16, block_size=32, tied=False, **more))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def plain_logp(model, prompt, response):
    """Sum of log pi over the response, one sequence at a time, from model.logits."""
    with torch.no_grad():
        logp = model.logits(torch.tensor([prompt + response]))[0].double().log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


@pytest.fixture(scope="module")
def sampled():
    model, ref = policy(0), policy(1)
    return model, ref, generate(model, IDS, 4, WORLD.max_moves + 1, eos=EOS, seed=5)


def test_score_of_a_policy_is_its_sequence_logp(sampled):
    model, _, responses = sampled
    expected = torch.tensor([[plain_logp(model, p, r) for r in group] for p, group in zip(IDS, responses, strict=True)])
    for sizes in (ARGS, Namespace(micro_batch_size=2, batch_size=64, dtype="float32")):
        torch.testing.assert_close(evaluate.score(model, IDS, responses, sizes, CPU), expected, rtol=0, atol=1e-4)


def test_rewards_of_each_class(sampled):
    model, ref, responses = sampled
    logp, ref_logp = (evaluate.score(m, IDS, responses, ARGS, CPU) for m in (model, ref))
    torch.testing.assert_close(evaluate.rewards_of(model, ref, IDS, responses, ARGS, CPU, 0.3), 0.3 * (logp - ref_logp))
    torch.testing.assert_close(evaluate.rewards_of(model, None, IDS, responses, ARGS, CPU), logp)
    head = policy(2, head="scalar")
    scores = evaluate.rewards_of(head, ref, IDS, responses, ARGS, CPU, 0.3)
    assert scores.shape == (7, 4)
    hidden = head.trunk(torch.tensor([IDS[3] + responses[3][1]]), torch.arange(len(IDS[3] + responses[3][1]))[None])
    torch.testing.assert_close(scores[3, 1], head.scalar_head(hidden)[0, -1, 0])  # read at the last token


def test_on_map_is_the_true_reward_of_its_own_samples(sampled):
    model, ref, responses = sampled
    seen = evaluate.on_map(model, ref, WORLD, ENCODING, PROMPTS, ARGS, CPU, samples=4, seed=5)
    flat = [(p, i, r) for p, i, group in zip(PROMPTS, IDS, responses, strict=True) for r in group]
    text = lambda r: ENCODING.decode(r[:-1] if r[-1] == EOS else r)  # noqa: E731
    assert seen["reward"] == [roadmap.true_reward(p, text(r)) for p, _, r in flat]
    assert seen["legal"] == [float(roadmap.reward_parts(p, text(r))["legal"]) for p, _, r in flat]
    kl = [plain_logp(model, i, r) - plain_logp(ref, i, r) for _, i, r in flat]
    assert seen["kl"] == pytest.approx(kl, abs=1e-4)
    assert sum(kl) > 0  # samples of the policy, so the mean is KL(policy || reference)
    greedy = [g[0] for g in generate(model, IDS, 1, WORLD.max_moves + 1, temperature=0, eos=EOS)]
    assert seen["greedy_reward"] == [roadmap.true_reward(p, text(r)) for p, r in zip(PROMPTS, greedy, strict=True)]


def test_a_perfect_policy_has_the_optimal_reward(monkeypatch):
    best = {p: tokenizer.encode(ENCODING, roadmap.shortest_routes(p)[0]) + [EOS] for p in PROMPTS}
    temperatures = []

    def generate(model, ids, k, *_, temperature=1.0, **more):
        temperatures.append(temperature)
        return [[best[p]] * k for p in PROMPTS]

    monkeypatch.setattr(evaluate, "generate", generate)
    seen = evaluate.on_map(policy(0), policy(0), WORLD, ENCODING, PROMPTS, ARGS, CPU)
    assert seen["reward"] == seen["greedy_reward"] == [roadmap.optimal_reward(p) for p in PROMPTS]
    assert all(seen["legal"]) and all(seen["arrives"])
    assert seen["kl"] == [0.0] * 7 and temperatures == [1.0, 0]


def test_mean_and_standard_error():
    row = evaluate.mean_se([1.0, 2.0, 4.0, 5.0])
    assert row["mean"] == 3.0
    assert row["se"] == pytest.approx((10 / 3 / 4) ** 0.5)
    assert evaluate.mean_se([2.5]) == {"mean": 2.5, "se": 0.0}


def test_texts_leave_eos_out():
    assert evaluate.texts(ENCODING, [tokenizer.encode(ENCODING, ">OR>CA") + [EOS], tokenizer.encode(ENCODING, ">OR")]) == [
        ">OR>CA",
        ">OR",
    ]


def test_a_tie_is_half_right():
    assert evaluate.accuracy(torch.tensor([1.0, -1.0, 2.0, 0.0])).item() == 0.625
    assert evaluate.accuracy(torch.tensor([1e-6, -1e-6, 0.0])).item() == 0.5
    assert evaluate.accuracy(torch.tensor([1e-6, 2e-5])).item() == 0.75
