"""Generalised advantage estimates against their definition, and that PPO moves the policy where the reward is."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from nanoroads import tokenizer
from nanoroads.weights.checkpoint import save_config, save_model
from nanoroads.model import GPT, GPTConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
import ppo  # noqa: E402


def test_gae_is_the_weighted_sum_of_td_errors():
    torch.manual_seed(0)
    length, gamma, lam = 5, 0.9, 0.7
    reward, value = torch.randn(1, length), torch.randn(1, length)
    advantage = ppo.gae(reward, value, gamma, lam)[0]
    v = torch.cat([value[0], torch.zeros(1)])
    delta = reward[0] + gamma * v[1:] - v[:-1]
    for t in range(length):
        expected = sum((gamma * lam) ** (i - t) * delta[i] for i in range(t, length))
        torch.testing.assert_close(advantage[t], expected)


def test_its_limits_and_its_padding():
    reward, value = (
        torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]),
        torch.tensor([[0.5, 0.25, 0.125], [1.0, 0.0, 0.0]]),
    )
    to_go = ppo.gae(reward, value, 1.0, 1.0) + value  # lambda 1: reward to go
    assert to_go.tolist() == [[6.0, 5.0, 3.0], [4.0, 0.0, 0.0]]
    one_step = ppo.gae(reward, value, 1.0, 0.0)  # lambda 0: the TD error
    assert one_step.tolist() == [[0.75, 1.875, 2.875], [3.0, 0.0, 0.0]]


def test_values_are_read_before_each_token():
    from nanoroads.batch import pack

    torch.manual_seed(0)
    critic = GPT(GPTConfig(vocab_size=20, n_layer=1, n_embd=16, block_size=16, head="scalar"))
    batch = pack([[1, 2, 3]], [[[4, 5], [6]]])
    seen = ppo.values(critic, batch)  # V(prompt), V(prompt, 4), V(prompt)
    alone = critic.scalar_head(critic.trunk(torch.tensor([[1, 2, 3, 4]]), torch.arange(4)[None]))[0, :, 0]
    torch.testing.assert_close(seen, alone[[2, 3, 2]])


@pytest.mark.parametrize(
    "flags", [["--epochs", "2"], ["--resume"], ["--export-hf", "x"], ["--micro-batch-size", "2"]]
)
def test_flags_that_it_does_not_have(flags, capsys):
    with pytest.raises(SystemExit):
        ppo.flags(flags)
    assert f"{flags[0]}: not in this experiment" in capsys.readouterr().err


def test_the_critic_learns_and_the_reward_rises(tmp_path):
    """On a reward model that is any function of the response, with hardly any KL term."""
    torch.manual_seed(0)
    encoding = tokenizer.get("roadmap")
    shape = {"vocab_size": encoding.n_vocab, "n_layer": 1, "n_embd": 16, "block_size": 32, "tied": False}
    for name, head in (("sft", "lm"), ("reward", "scalar")):
        model = GPT(GPTConfig(**shape, head=head))
        with torch.no_grad():
            for p in model.parameters():
                p.add_((0.5 if head == "scalar" else 0.1) * torch.randn_like(p))
        (tmp_path / name).mkdir()
        save_config(tmp_path / name, Namespace(data="roadmap-short"), "sft", model, "roadmap")
        save_model(tmp_path / name, model)
    for name in ("pairs.jsonl", "pairs_test.jsonl"):
        (tmp_path / "sft" / name).write_text("{}\n")
    out = tmp_path / "ppo"
    flags = "--data roadmap-short --steps 60 --lr 1e-2 --samples 4 --kl 0.01 --log-every 1 --updates 2"
    flags += f" --init {tmp_path / 'sft'} --out {out}"
    ppo.main([*flags.split(), "--reward", str(tmp_path / "reward")])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    mean = lambda name, some: sum(row[name] for row in some) / len(some)  # noqa: E731
    assert rows[0]["kl"] == 0 and rows[0]["clip_fraction"] == 0
    assert mean("reward", rows[-8:]) > mean("reward", rows[:8]) + 0.4
    assert mean("critic_loss", rows[-8:]) < mean("critic_loss", rows[:8])
    near = flags.replace("--kl 0.01", "--kl 5").replace(str(out), str(tmp_path / "near"))
    ppo.main([*near.split(), "--reward", str(tmp_path / "reward")])
    held = [json.loads(line) for line in (tmp_path / "near/metrics.jsonl").read_text().splitlines()]
    assert abs(mean("kl", held[-8:])) < 0.5 * mean("kl", rows[-8:])
    with pytest.raises(ValueError, match="already holds a run"):
        ppo.main([*flags.split(), "--reward", str(tmp_path / "reward")])
