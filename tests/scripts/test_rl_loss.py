"""train_rlhf.py's rl_loss on a rollout that is written down: what --kl weighs, and what the limits clip."""

import math
from types import SimpleNamespace

import pytest
import torch

import train_rlhf
from nanoroads import loss_variants
from nanoroads.model import LogProbs
from nanoroads.run.rollouts import Rollout


def test_the_limits_of_the_ratio_are_those_of_the_papers_unless_given():
    wanted = {"rloo": (0.2, 0.2), "grpo": (0.2, 0.2), "dr-grpo": (0.2, 0.2), "dapo": (0.2, 0.28)}
    wanted.update(gspo=(3e-4, 4e-4), cispo=(1.0, 4.0))
    for algo, limits in wanted.items():
        args = train_rlhf.flags(["--algo", algo])
        assert (args.clip_low, args.clip_high) == limits
    args = train_rlhf.flags(["--algo", "gspo", "--updates", "2", "--clip-high", "0.5"])
    assert (args.clip_low, args.clip_high, args.clip) == (3e-4, 0.5, 1.0)


def rollout_of_two(ref_logp=-1.0):
    """Two responses of two tokens to one prompt, the first one better, and pi_old -1 of each token."""
    old = LogProbs(torch.tensor([-2.0, -2.0]), torch.full((4,), -1.0))
    tokens = torch.tensor([ref_logp, -1.0, -1.0, -1.0])
    ref = LogProbs(tokens.view(2, 2).sum(1), tokens)
    batch, reward = SimpleNamespace(lengths=torch.tensor([2, 2])), torch.tensor([1.0, 0.0])
    return Rollout(batch, old.token, ref, reward, torch.zeros(2), step_length=2.0, old=old)


@pytest.mark.parametrize("algo", [algo for algo in train_rlhf.ALGORITHMS if algo != "online-dpo"])
def test_without_a_kl_the_reference_has_no_say(algo):
    args = train_rlhf.flags(["--algo", algo, "--samples", "2", "--updates", "2"])
    near, far = rollout_of_two(-1.5), rollout_of_two(-3.0)
    for kl_weight in (0.0, 0.5):
        one, other = (train_rlhf.rl_loss(args, kl_weight, 5, r.old, r)[0] for r in (near, far))
        assert torch.equal(one, other) == (kl_weight == 0), kl_weight


@pytest.mark.parametrize("algo", ["rloo", *loss_variants.LIKE_GRPO])
def test_the_limits_of_the_ratio_are_used(algo):
    """The policy has moved by a factor of 2 up or down: each limit alone decides how much is clipped."""
    rollout = rollout_of_two()
    old = rollout.old
    up, down = math.log(2.0), -math.log(2.0)
    # The better response has become likelier and the worse one less likely: both limits are reached.
    change = torch.tensor([up, up, down, down])
    now = LogProbs(old.sequence + change.view(2, 2).sum(1), old.token + change)
    shares = {}
    for low, high in ((0.1, 0.1), (0.9, 0.1), (0.1, 9.0), (0.9, 9.0)):
        flags = ["--algo", algo, "--samples", "2", "--updates", "2"]
        args = train_rlhf.flags([*flags, "--clip-low", str(low), "--clip-high", str(high)])
        _, clipped = train_rlhf.rl_loss(args, 0.5, 5, now, rollout)
        shares[low, high] = clipped.mean().item()
    assert shares == {(0.1, 0.1): 1.0, (0.9, 0.1): 0.5, (0.1, 9.0): 0.5, (0.9, 9.0): 0.0}
