"""Generalised advantage estimates against their definition; PPO moves the policy to where the reward is."""

from dataclasses import asdict

import pytest
import torch
from helpers.refusals import change_config, copy
from helpers.runs import metrics, weights
from helpers.tokens import byte_tokenizer

from experiments import ppo
from nanoroads.batch import pack
from nanoroads.errors import InputError
from nanoroads.model import GPT, GPTConfig
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import save_model
from nanoroads.weights.files import write_json


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
    torch.manual_seed(0)
    critic = GPT(GPTConfig(vocab_size=20, n_layer=1, n_embd=16, block_size=16, head="scalar"))
    batch = pack([[1, 2, 3]], [[[4, 5], [6]]])
    seen = ppo.values(critic, batch)  # V(prompt), V(prompt, 4), V(prompt)
    alone = critic.scalar_head(critic.trunk(torch.tensor([[1, 2, 3, 4]]), torch.arange(4)[None]))[0, :, 0]
    torch.testing.assert_close(seen, alone[[2, 3, 2]])


@pytest.mark.parametrize("flags", [["--epochs", "2"], ["--export-hf", "x"], ["--micro-batch-size", "2"]])
def test_flags_that_it_does_not_have(flags, capsys):
    with pytest.raises(SystemExit):
        ppo.flags(flags)
    assert f"unrecognized arguments: {flags[0]}" in capsys.readouterr().err


def test_it_refuses_to_resume_and_to_leave_the_map(capsys):
    with pytest.raises(SystemExit):
        ppo.flags(["--resume"])
    assert "--resume: not in this experiment" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        ppo.flags(["--data", "rows.jsonl"])
    assert "--data rows.jsonl: this experiment runs on the built-in map" in capsys.readouterr().err


def test_a_policy_is_no_reward_model(tiny_map):
    reference = ppo.load_policy(tiny_map / "sft")
    with pytest.raises(InputError, match="sft: not a reward model"):
        ppo.load_scalar(tiny_map / "sft", reference)


def test_models_that_do_not_read_the_maps_tokens_are_refused(tiny_map, refuses, tmp_path):
    """Their vocabulary may have the size of the map's."""
    other = copy(tiny_map / "reward", tmp_path / "other")
    change_config(other, tokenizer=str(byte_tokenizer(tmp_path / "bytes")))
    flags = {"data": "roadmap-2", "init": tiny_map / "sft", "reward": other, "out": tmp_path / "out"}
    refuses(ppo, other, "its tokenizer", "other meanings", **flags)


@pytest.fixture(scope="module")
def tiny_map(tmp_path_factory):
    """A folder with `sft`, a policy of the map's short world, and `reward`, a reward model that is an
    arbitrary function of the response."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ppo")
    encoding = tokenizer.get("roadmap")
    shape = {"vocab_size": encoding.n_vocab, "n_layer": 1, "n_embd": 16, "block_size": 32, "tied": False}
    for name, head in (("sft", "lm"), ("reward", "scalar")):
        model = GPT(GPTConfig(**shape, head=head))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_((0.5 if head == "scalar" else 0.1) * torch.randn_like(parameter))
        (folder / name).mkdir()
        config = {"model": asdict(model.config), "tokenizer": "roadmap", "args": {"data": "roadmap-2"}}
        write_json(folder / name / "config.json", config)
        save_model(folder / name, model)
    for name in ("pairs.jsonl", "pairs_test.jsonl"):
        (folder / "sft" / name).write_text("{}\n")
    return folder


def command(tiny_map, out, flags):
    inputs = ["--data", "roadmap-2", "--init", str(tiny_map / "sft"), "--reward", str(tiny_map / "reward")]
    return [*inputs, "--out", str(out), "--log-every", "1", "--samples", "4", *flags.split()]


def mean(name, rows):
    return sum(row[name] for row in rows) / len(rows)


def test_the_critic_learns_and_the_reward_rises(tiny_map, tmp_path):
    """With hardly any KL term."""
    flags = "--steps 60 --lr 1e-2 --critic-lr 1e-2 --kl 0.01 --updates 2"
    ppo.main(command(tiny_map, tmp_path / "ppo", flags))
    rows = metrics(tmp_path / "ppo")
    assert rows[0]["kl"] == 0 and rows[0]["clip_fraction"] == 0
    assert mean("reward", rows[-8:]) > mean("reward", rows[:8]) + 0.4
    assert mean("critic_loss", rows[-8:]) < mean("critic_loss", rows[:8])
    ppo.main(command(tiny_map, tmp_path / "near", flags.replace("--kl 0.01", "--kl 5")))
    near = metrics(tmp_path / "near")
    assert abs(mean("kl", near[-8:])) < 0.5 * mean("kl", rows[-8:])
    with pytest.raises(ValueError, match="already holds a run"):
        ppo.main(command(tiny_map, tmp_path / "ppo", flags))


def test_the_critic_has_a_learning_rate_of_its_own(tiny_map, tmp_path):
    """A lower one leaves the first step of the policy as it is, and the critic's loss higher later on."""
    for name, critic_lr in (("fast", "1e-2"), ("slow", "1e-5")):
        flags = f"--lr 1e-5 --critic-lr {critic_lr} --warmup 0 --schedule constant --updates 4 --steps"
        ppo.main(command(tiny_map, tmp_path / f"{name}-1", f"{flags} 1"))
        ppo.main(command(tiny_map, tmp_path / name, f"{flags} 8"))
    assert weights(tmp_path / "fast-1") == weights(tmp_path / "slow-1")
    fast, slow = metrics(tmp_path / "fast"), metrics(tmp_path / "slow")
    assert fast[0]["critic_loss"] == slow[0]["critic_loss"]
    assert fast[3]["critic_loss"] < slow[3]["critic_loss"]
