"""Measures against their definitions: log-probs from plain
logits, true rewards, standard errors by hand."""

import pytest
import torch

from nanoroads import score
from nanoroads.generate import generate
from nanoroads.model import GPT, GPTConfig
from nanoroads.text import tokenizer
from nanoroads.world import optimum, roadmap, task

ENCODING = tokenizer.get("roadmap")
EOS = tokenizer.eos_id(ENCODING)
WORLD = roadmap.WORLDS["roadmap"]
PROMPTS = roadmap.prompts(WORLD, "test")[:7]
IDS = [tokenizer.encode(ENCODING, prompt) for prompt in PROMPTS]


def policy(seed, **more):
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=ENCODING.n_vocab, n_layer=1, n_embd=16, block_size=32, tied=False, **more)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def plain_logp(model, prompt, response):
    """Sum of log pi over the response, one sequence at a time, from model.logits."""
    with torch.no_grad():
        logp = model.logits(torch.tensor([prompt + response]))[0].double().log_softmax(-1)
    return sum(logp[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


def text(response):
    return ENCODING.decode(response[:-1] if response[-1] == EOS else response)


@pytest.fixture(scope="module")
def sampled():
    model, reference = policy(0), policy(1)
    return model, reference, generate(model, IDS, 4, WORLD.max_moves + 1, eos=EOS, seed=5)


# ---------------------------------------------------------------- log-probs and rewards


def test_sequence_logps_are_the_sums_of_token_logps(sampled):
    model, _, responses = sampled
    expected = []
    for prompt, group in zip(IDS, responses, strict=True):
        expected.append([plain_logp(model, prompt, response) for response in group])
    expected = torch.tensor(expected)  # (7, 4)
    for groups_per_pass in (2, 3, 64, None):
        logp = score.sequence_logps(model, IDS, responses, groups_per_pass)
        torch.testing.assert_close(logp, expected, rtol=0, atol=1e-4)
        assert not logp.requires_grad and logp.dtype == torch.float32


def test_rewards_of_each_class(sampled):
    model, reference, responses = sampled
    logp = score.sequence_logps(model, IDS, responses, 3)
    ref_logp = score.sequence_logps(reference, IDS, responses, 3)
    local = score.rewards(model, reference, IDS, responses, 0.3, 3)
    torch.testing.assert_close(local, 0.3 * (logp - ref_logp))
    torch.testing.assert_close(score.rewards(model, None, IDS, responses, groups_per_pass=3), logp)
    head = policy(2, head="scalar")
    scores = score.rewards(head, reference, IDS, responses, 0.3, 3)
    assert scores.shape == (7, 4)
    tokens = IDS[3] + responses[3][1]
    hidden = head.trunk(torch.tensor([tokens]), torch.arange(len(tokens))[None])
    torch.testing.assert_close(scores[3, 1], head.scalar_head(hidden)[0, -1, 0])  # read at the last token


# ---------------------------------------------------------------- on the map


def test_measures_on_the_map_are_the_true_reward_of_the_samples(sampled):
    model, reference, responses = sampled
    values = task.measure_on_map(model, reference, WORLD, ENCODING, PROMPTS, 3, samples=4, seed=5)
    flat = []
    for prompt, ids, group in zip(PROMPTS, IDS, responses, strict=True):
        flat += [(prompt, ids, response) for response in group]
    assert values["reward"] == [roadmap.true_reward(prompt, text(response)) for prompt, _, response in flat]
    for name in ("legal", "arrives", "moves"):
        parts = [roadmap.reward_parts(prompt, text(response)) for prompt, _, response in flat]
        assert values[name] == [float(part[name]) for part in parts]
    kl = [
        plain_logp(model, ids, response) - plain_logp(reference, ids, response) for _, ids, response in flat
    ]
    assert values["kl"] == pytest.approx(kl, abs=1e-4)
    assert sum(kl) > 0  # samples of the policy, so the mean is KL(policy || reference)
    likeliest = generate(model, IDS, 1, WORLD.max_moves + 1, temperature=0, eos=EOS)
    greedy = [roadmap.true_reward(p, text(group[0])) for p, group in zip(PROMPTS, likeliest, strict=True)]
    assert values["greedy_reward"] == greedy


def test_a_perfect_policy_has_the_optimal_reward(monkeypatch):
    best = [tokenizer.encode(ENCODING, optimum.shortest_routes(prompt)[0]) + [EOS] for prompt in PROMPTS]
    temperatures = []

    def generate(model, ids, k, length, temperature, eos, seed):
        temperatures.append(temperature)
        return [[route] * k for route in best]

    monkeypatch.setattr(task, "generate", generate)
    values = task.measure_on_map(policy(0), policy(0), WORLD, ENCODING, PROMPTS, 3)
    wanted = [optimum.optimal_reward(prompt) for prompt in PROMPTS]
    assert values["reward"] == values["greedy_reward"] == wanted
    assert all(values["legal"]) and all(values["arrives"])
    assert values["kl"] == [0.0] * 7
    assert temperatures == [1.0, 0]


# ---------------------------------------------------------------- statistics


def test_mean_and_standard_error():
    row = score.mean_se([1.0, 2.0, 4.0, 5.0])
    assert row["mean"] == 3.0
    assert row["se"] == pytest.approx((10 / 3 / 4) ** 0.5)
    assert score.mean_se([2.5]) == {"mean": 2.5, "se": 0.0}


def test_texts_leave_eos_out():
    whole, cut = tokenizer.encode(ENCODING, ">OR>CA") + [EOS], tokenizer.encode(ENCODING, ">OR")
    assert tokenizer.decode_all(ENCODING, [whole, cut]) == [">OR>CA", ">OR"]


def test_a_tie_is_half_right():
    right = score.ranked_right(torch.tensor([1.0, -1.0, 2.0, 0.0]))
    assert right.tolist() == [1.0, 0.0, 1.0, 0.5]
    assert right.mean().item() == 0.625
    assert score.ranked_right(torch.tensor([1e-6, -1e-6, 0.0])).mean().item() == 0.5
    assert score.ranked_right(torch.tensor([1e-6, 2e-5])).mean().item() == 0.75


def test_samples_of_another_policy_are_drawn_part_by_part_and_are_the_same(monkeypatch):
    """The cache holds those of a few prompts at a time."""
    other = policy(2)
    monkeypatch.setattr(score, "load_policy", lambda *arguments, **more: other)
    whole = generate(other, IDS, 4, WORLD.max_moves + 1, eos=EOS, seed=3)
    sizes = []

    def counting(model, prompts, *arguments, **more):
        sizes.append(len(prompts))
        return generate(model, prompts, *arguments, **more)

    monkeypatch.setattr(score, "generate", counting)
    samples = score.OtherSamples("dpo", other, IDS, WORLD.max_moves + 1, EOS, 3, groups_per_pass=3)
    assert sizes == [3, 3, 1] and samples.responses == whole
    torch.testing.assert_close(samples.logp, score.sequence_logps(other, IDS, whole))
