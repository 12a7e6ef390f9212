"""The measures of the worlds of few moves against enumeration by hand."""

from dataclasses import asdict

import pytest
import torch

from nanoroads.model import GPT, GPTConfig
from nanoroads.report import gap_closed
from nanoroads.report.on_map import policy_row
from nanoroads.score import mean_se
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import save_model
from nanoroads.weights.files import write_json
from nanoroads.world import roadmap

ENCODING = tokenizer.get("roadmap")
WORLD = roadmap.WORLDS["roadmap-short"]
PROMPTS = roadmap.prompts(WORLD, "test")


def random_policy(seed):
    """Untrained, with wild weights, so that its probabilities are not all alike."""
    torch.manual_seed(seed)
    policy = GPT(GPTConfig(vocab_size=ENCODING.n_vocab, n_layer=1, n_embd=16, block_size=16, tied=False))
    with torch.no_grad():
        policy.lm_head.weight.mul_(40)
    return policy


def save_policy(folder, policy, **config):
    folder.mkdir()
    write_json(folder / "config.json", {"model": asdict(policy.config), "tokenizer": "roadmap", **config})
    save_model(folder, policy)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs of a world, all of them random policies."""
    path = tmp_path_factory.mktemp("runs")
    save_policy(path / "sft", random_policy(0))
    save_policy(path / "dpo", random_policy(1), beta=0.5)
    save_policy(path / "rlhf_global", random_policy(2), kl=2.0)
    return path


def probabilities(seed):
    """pi(route) (P,) of the only route that has a reward: the goal, then EOS."""
    policy = random_policy(seed)
    eos = tokenizer.eos_id(ENCODING)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(ENCODING, prompt)
        goal = tokenizer.encode(ENCODING, prompt[2:5])
        logits = policy.logits(torch.tensor([ids + goal]))[0].double()
        logp = logits.log_softmax(-1)
        found.append((logp[2, goal[0]] + logp[3, eos]).exp().item())
    return torch.tensor(found, dtype=torch.float64)


def test_rewards_are_exact_and_the_difference_is_prompt_by_prompt(folder):
    row = gap_closed.gap_closed_row(folder, "roadmap-short")
    exact = {name: probabilities(seed) for seed, name in enumerate(("sft", "dpo", "rlhf_global"))}
    for name, reward in exact.items():
        assert row[name]["mean"] == pytest.approx(reward.mean().item(), rel=1e-4)
    lead = exact["rlhf_global"] - exact["dpo"]
    assert row["rlhf_minus_dpo"]["mean"] == pytest.approx(lead.mean().item(), rel=1e-3)
    assert row["rlhf_minus_dpo"]["se"] == pytest.approx((lead.std() / len(lead) ** 0.5).item(), rel=1e-3)
    # One route has the reward e^(6 / 0.5), all others e^0; the optimum is that of DPO's beta.
    raised = exact["sft"] * torch.tensor(12.0).exp()
    optimum = raised / (raised + 1 - exact["sft"])
    assert row["optimum"]["mean"] == pytest.approx(optimum.mean().item(), rel=1e-4)


def test_the_distance_to_the_optimum_is_that_of_every_road_s_own_strength(folder, monkeypatch):
    """The mean of log pi/pi* of given samples, from log pi/pi_ref, the reward and log Z, by hand."""
    rewards = torch.zeros(len(PROMPTS), gap_closed.SAMPLES, dtype=torch.float64)
    rewards[:, 0] = 1.0
    log_ratio = torch.full_like(rewards, 0.25)
    given = {"reward": rewards.flatten().tolist(), "kl": log_ratio.flatten().tolist()}
    monkeypatch.setattr(gap_closed, "measure_on_map", lambda *arguments: given)
    row = gap_closed.gap_closed_row(folder, "roadmap-short")
    p = probabilities(0)
    for name, strength in {"dpo": 0.5, "rlhf_global": 2.0}.items():
        log_z = (p * torch.tensor(6 / strength).exp() + 1 - p).log()
        expected = 0.25 - 6 / strength / gap_closed.SAMPLES + log_z  # one sample in 8 has r = 1
        assert row[name]["kl_to_optimum"]["mean"] == pytest.approx(expected.mean().item(), rel=1e-4)
        se = (expected.std() / len(expected) ** 0.5).item()
        assert row[name]["kl_to_optimum"]["se"] == pytest.approx(se, rel=1e-3)


def test_each_road_s_distance_is_from_its_own_samples(folder):
    """Which never arrive here, so that the reward is 0."""
    row = gap_closed.gap_closed_row(folder, "roadmap-short")
    p = probabilities(0)
    for seed, name, strength in ((1, "dpo", 0.5), (2, "rlhf_global", 2.0)):
        measures = policy_row(random_policy(seed), random_policy(0), WORLD, PROMPTS)
        log_z = (p * torch.tensor(6 / strength).exp() + 1 - p).log()
        expected = measures["kl_to_ref"]["mean"] + log_z.mean().item()
        assert measures["reward"]["mean"] == 0
        assert row[name]["kl_to_optimum"]["mean"] == pytest.approx(expected, rel=1e-4)


def test_samples_are_those_of_the_main_world_s_measures(folder):
    """The policy's own, not the reference's, and with the same random numbers."""
    world = roadmap.WORLDS["roadmap-hidden"]
    policy, reference = random_policy(1), random_policy(0)
    reward, log_ratio = gap_closed.samples_of(policy, reference, world)
    row = policy_row(policy, reference, world, roadmap.prompts(world, "test"))
    assert reward.shape == log_ratio.shape == (100, 8) and row["kl_to_ref"]["mean"] > 1
    assert mean_se(log_ratio.mean(1)) == pytest.approx(row["kl_to_ref"])
    assert mean_se(reward.mean(1)) == pytest.approx(row["reward"]) and reward.sum() > 0
    hidden = gap_closed.gap_closed_row(folder, "roadmap-hidden")
    assert hidden["dpo"] == pytest.approx(row["reward"])


def test_in_the_hidden_world_there_is_no_optimum(folder):
    row = gap_closed.gap_closed_row(folder, "roadmap-hidden")
    assert row.keys() == {"sft", "dpo", "rlhf_global", "rlhf_minus_dpo"}
    lead = row["rlhf_global"]["mean"] - row["dpo"]["mean"]
    assert row["rlhf_minus_dpo"]["mean"] == pytest.approx(lead)
    assert row["dpo"].keys() == {"mean", "se"}


def test_each_world_has_a_folder_of_its_own(tmp_path):
    assert gap_closed.world_folder(tmp_path, "roadmap") == tmp_path
    assert gap_closed.world_folder(tmp_path, "roadmap-2") == tmp_path / "roadmap-2"
