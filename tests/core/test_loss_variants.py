"""The variants of the losses against hand arithmetic, and which way their gradients push."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from nanoroads import loss_variants, losses
from nanoroads.loss_variants import (
    apo_down,
    apo_zero,
    cispo,
    dpo_norm,
    gspo,
    kto,
    log_odds,
    of_pairs,
    orpo,
    rpo,
)
from nanoroads.losses import grpo

LN2 = math.log(2)


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    """-log sigmoid(-x), by its definition."""
    return math.log(1 + math.exp(x))


# ---------------------------------------------------------------- pairs: hand arithmetic

# chosen -10 (reference -13), rejected -20 (reference -18): h+ = 3, h- = -2
FOUR = t(-10), t(-20), t(-13), t(-18)
LENGTHS = torch.tensor([5]), torch.tensor([4])


def test_pairs_by_hand():
    close(dpo_norm(*FOUR, *LENGTHS, 2.0), [softplus(-2 * (3 / 5 + 2 / 4))])
    close(rpo(*FOUR, LENGTHS[0], 0.1, 0.3), [softplus(-0.1 * 5) + 0.3 * 10 / 5])
    close(apo_zero(*FOUR, 0.1), [1 - sigmoid(0.3) + sigmoid(-0.2)])
    close(apo_down(*FOUR, 0.1), [1 + sigmoid(0.3) - sigmoid(0.5)])
    p_chosen, p_rejected = math.exp(-10 / 5), math.exp(-20 / 4)
    odds_ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
    close(orpo(FOUR[0], FOUR[1], *LENGTHS, 0.7), [2 - 0.7 * math.log(sigmoid(math.log(odds_ratio)))])


def test_kto_by_hand():
    """Two pairs: h+ = 3 and 1, h- = -2 and 6, so the chosen's baseline is 2, and the rejected's 2 as well;
    then the two halves apart: h- = -2 and -4 have a negative mean, which counts as 0."""
    chosen, rejected, zero = t(3, 1), t(-2, 6), t(0, 0)
    expected = []
    for win, lose in ((3, -2), (1, 6)):
        expected.append(((1 - sigmoid(0.5 * (win - 2))) + (1 - sigmoid(0.5 * (2 - lose)))) / 2)
    close(kto(chosen, rejected, zero, zero, 0.5), expected)
    expected = []
    for win, lose in ((3, -2), (1, -4)):
        expected.append(((1 - sigmoid(0.5 * win)) + (1 - sigmoid(0.5 * (2 - lose)))) / 2)
    close(kto(chosen, t(-2, -4), zero, zero, 0.5), expected)
    # With a baseline of the caller's, the reference taken off.
    given = kto(t(-10), t(-20), t(-13), t(-18), 0.5, kl=torch.tensor(0.4, dtype=torch.float64))
    close(given, [((1 - sigmoid(0.5 * (3 - 0.4))) + (1 - sigmoid(0.5 * (0.4 + 2)))) / 2])


def test_kto_is_half_of_apo_zero_where_both_halves_have_fallen():
    logps = t(-3, -1), t(-2, -6), t(-1, -1), t(0, -5.5)
    close(kto(*logps, 0.5), apo_zero(*logps, 0.5) / 2)


def test_step_0():
    logps = t(-12), t(-30), t(-12), t(-30)
    close(dpo_norm(*logps, *LENGTHS, 5.0), [LN2])
    close(rpo(*logps, LENGTHS[0], 0.3, 0.5), [LN2 + 0.5 * 12 / 5])
    close(apo_zero(*logps, 0.3), [1])
    close(apo_down(*logps, 0.3), [1])
    close(kto(*logps, 0.3), [0.5])


@pytest.mark.parametrize("name", loss_variants.PAIR_LOSSES)
def test_of_pairs_names_each_loss(name):
    """And gives each argument its place: the numbers all differ."""
    logp, ref_logp = torch.cat(FOUR[:2])[None], torch.cat(FOUR[2:])[None]
    lengths = torch.cat(LENGTHS)[None]
    known = {"beta": 0.3, "nll_weight": 0.6, "odds_weight": 0.9}
    known.update(
        zip(("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp"), FOUR, strict=True)
    )
    known.update(chosen_length=LENGTHS[0], rejected_length=LENGTHS[1])
    known.update(kl=None, chosen_mean=None, rejected_mean=None)
    function = getattr(loss_variants, name.replace("-", "_"))
    wanted = function(**{argument: known[argument] for argument in inspect.signature(function).parameters})
    close(of_pairs(name, logp, ref_logp, lengths, 0.3, 0.6, 0.9), wanted)


# ---------------------------------------------------------------- pairs: gradients

LONG, SHORT = torch.tensor([3, 4, 5, 6, 7]), torch.tensor([7, 5, 3, 2, 2])
GRADCHECKS = {
    "dpo_norm": lambda *x: dpo_norm(*x, LONG, SHORT, 2.0),
    "rpo": lambda *x: rpo(*x, LONG, 0.3, 0.7),
    "apo_zero": lambda *x: apo_zero(*x, 0.3),
    "apo_down": lambda *x: apo_down(*x, 0.3),
    "kto": lambda *x: kto(*x, 0.3, kl=t(0.2)),
    "orpo": lambda a, b, *_: orpo(-1 - a**2, -2 - b**2, LONG, SHORT, 0.4),
}


@pytest.mark.parametrize("name", GRADCHECKS)
def test_gradcheck(name):
    torch.manual_seed(0)
    assert gradcheck(GRADCHECKS[name], torch.randn(4, 5, dtype=torch.float64, requires_grad=True).unbind(0))


def slopes(loss, chosen, rejected):
    """d loss / d log pi of the chosen and of the rejected response, at references of 0."""
    chosen, rejected = t(chosen).requires_grad_(), t(rejected).requires_grad_()
    loss(chosen, rejected, t(0), t(0)).sum().backward()
    return chosen.grad.item(), rejected.grad.item()


def test_directions():
    """Descent raises where the slope is below 0, and lowers where it is above."""
    both = {
        "dpo_norm": lambda *x: dpo_norm(*x, *LENGTHS, 1.0),
        "rpo": lambda *x: rpo(*x, LENGTHS[0], 1.0, 0.5),
        "apo_zero": lambda *x: apo_zero(*x, 1.0),
        "kto": lambda *x: kto(*x, 1.0),
        "orpo": lambda chosen, rejected, *_: orpo(chosen - 3, rejected - 3, *LENGTHS, 0.5),
    }
    for name, loss in both.items():
        for chosen, rejected in ((0, 0), (0.3, -0.8), (-0.4, -0.1)):
            raised, lowered = slopes(loss, chosen, rejected)
            assert raised < 0 < lowered, name


def test_apo_down_lowers_both_the_rejected_one_further():
    slope = slopes(lambda *x: apo_down(*x, 1.0), 0.0, 0.0)
    assert slope == (0.0, 0.25)  # at step 0 only the rejected one
    for chosen, rejected in ((0.1, -0.8), (-0.3, -2.0)):
        of_chosen, of_rejected = slopes(lambda *x: apo_down(*x, 1.0), chosen, rejected)
        assert 0 < of_chosen and 0 < of_rejected
    of_chosen, of_rejected = slopes(lambda *x: apo_down(*x, 1.0), 0.1, -0.8)
    assert of_chosen < of_rejected


def test_rpo_pulls_the_chosen_response_up_after_dpo_is_content():
    assert slopes(lambda *x: rpo(*x, LENGTHS[0], 1.0, 0.5), 40.0, -40.0) == pytest.approx(
        (-0.1, 0.0), abs=1e-12
    )


def test_the_baseline_of_kto_has_no_gradient():
    logps = [t(3, 1).requires_grad_(), t(-2, 6).requires_grad_()]
    kto(*logps, t(0, 0), t(0, 0), 0.5)[0].backward()
    assert logps[0].grad[1] == 0 and logps[1].grad[1] == 0  # the second pair is in the baseline alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_of_a_certain_response_stay_finite(dtype):
    log_p = torch.tensor([0.0, -1e-12, -1e-3, -50.0], dtype=dtype, requires_grad=True)
    odds = log_odds(log_p)
    assert odds[:2].tolist() == pytest.approx([20, 20], abs=1e-4)
    assert odds[3].item() == pytest.approx(-50)
    odds.sum().backward()
    assert log_p.grad.isfinite().all()
    length = torch.ones(1)
    certain = torch.zeros(1, dtype=dtype)
    assert orpo(certain, certain, length, length, 1.0).item() == pytest.approx(LN2)


# ---------------------------------------------------------------- on-policy

TOKENS = [2, 1, 3]  # of three responses
N = torch.tensor(TOKENS)
ADVANTAGE = t(0.7, -1.3, 0.4)


def draw():
    torch.manual_seed(0)
    return torch.randn(3, 6, dtype=torch.float64).mul(0.4).unbind(0)  # now, old, ref


def responses(*of_tokens):
    """For each response its advantage and its tokens' values."""
    parts = [x.split(TOKENS) for x in of_tokens]
    return zip(ADVANTAGE.tolist(), *parts, strict=True)


def k3(now, ref):
    return (math.exp(ref - now) - 1 - (ref - now)).item()


def rollout_of(old, ref, rewards, step_length):
    """A Rollout of the three responses above, as far as a loss reads it."""
    old, ref = SimpleNamespace(token=old), SimpleNamespace(token=ref)
    batch = SimpleNamespace(lengths=N)
    return SimpleNamespace(old=old, ref=ref, batch=batch, reward=rewards, step_length=step_length)


@pytest.mark.parametrize("name", loss_variants.LIKE_GRPO)
def test_like_grpo_names_each_loss(name):
    """With its advantage, its divisor and its limits in their places: the numbers all differ."""
    now, old, ref = draw()
    rewards = t(0.2, 1.0, 0.5)
    low, high = 0.1, 0.3
    options = {"samples": 3, "beta": 0.4, "clip": low, "clip_high": high, "longest": 9}
    actual = loss_variants.like_grpo(name, now, rollout_of(old, ref, rewards, 2.5), **options)
    advantage = rewards - rewards.mean()
    if name != "dr-grpo":
        advantage = advantage / (rewards.std() + 1e-4)
    inputs = now, old, ref, advantage, N, 0.4, low, high
    wanted = {
        "grpo": lambda: grpo(*inputs),
        "dr-grpo": lambda: grpo(*inputs, 9),
        "dapo": lambda: grpo(*inputs, 2.5),
        "gspo": lambda: gspo(*inputs),
        "cispo": lambda: cispo(*inputs, 2.5),
    }[name]()
    close(actual[0], wanted[0])
    close(actual[1], wanted[1])


def test_an_unknown_name_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="like_grpo: ppo is not one of grpo, dr-grpo, dapo, gspo, cispo"):
        loss_variants.like_grpo("ppo", None, None, samples=2, beta=1, clip=1, clip_high=1, longest=1)


def test_grpo_with_a_divisor_and_clip_higher():
    now, old, ref = draw()
    expected = []
    for a, now_y, old_y, ref_y in responses(now, old, ref):
        total = 0.0
        for i in range(len(now_y)):
            w = math.exp(now_y[i] - old_y[i])
            total += -min(w * a, min(max(w, 0.9), 1.5) * a) + 0.3 * k3(now_y[i], ref_y[i])
        expected.append(total / 7)
    loss, clipped = grpo(now, old, ref, ADVANTAGE, N, 0.3, 0.1, 0.5, divisor=7)
    close(loss, expected)
    assert 0 < clipped.sum() < 6
    of_own_length = grpo(now, old, ref, ADVANTAGE, N, 0.3, 0.1, 0.5)[0]
    close(grpo(now, old, ref, ADVANTAGE, N, 0.3, 0.1, 0.5, divisor=N)[0], of_own_length)


def test_the_mean_over_responses_is_the_mean_over_tokens():
    """DAPO: with the mean length as its divisor, also in two micro-batches."""
    now, old, ref = draw()
    whole = grpo(now, old, ref, ADVANTAGE, N, 0.3, 0.2, 0.28, divisor=2.0)[0].mean()
    of_tokens = losses.clipped_policy_gradient(now, old, ADVANTAGE.repeat_interleave(N), 0.2, 0.28)[0]
    close(whole, (of_tokens + 0.3 * losses.kl_k3(now, ref)).mean())
    first = grpo(now[:3], old[:3], ref[:3], ADVANTAGE[:2], N[:2], 0.3, 0.2, 0.28, divisor=2.0)[0]
    second = grpo(now[3:], old[3:], ref[3:], ADVANTAGE[2:], N[2:], 0.3, 0.2, 0.28, divisor=2.0)[0]
    close((first.sum() + second.sum()) / 3, whole)


def test_gspo_by_hand():
    now, old, ref = draw()
    expected, outside = [], []
    for a, now_y, old_y, ref_y in responses(now, old, ref):
        s = math.exp((now_y.sum() - old_y.sum()) / len(now_y))
        bounded = min(max(s, 0.9), 1.2)
        kl = sum(k3(*pair) for pair in zip(now_y, ref_y, strict=True)) / len(now_y)
        expected.append(-min(s * a, bounded * a) + 0.3 * kl)
        outside.append(float(bounded * a < s * a))
    loss, clipped = gspo(now, old, ref, ADVANTAGE, N, 0.3, 0.1, 0.2)
    close(loss, expected)
    close(clipped, outside)
    assert 0 < clipped.sum() < 3


def test_cispo_by_hand():
    now, old, ref = draw()
    expected, outside = [], []
    for a, now_y, old_y, ref_y in responses(now, old, ref):
        total = 0.0
        for i in range(len(now_y)):
            w = math.exp(now_y[i] - old_y[i])
            total += -min(max(w, 0.8), 1.3) * a * now_y[i].item() + 0.3 * k3(now_y[i], ref_y[i])
            outside.append(float(not 0.8 <= w <= 1.3))
        expected.append(total / 4)
    loss, clipped = cispo(now, old, ref, ADVANTAGE, N, 0.3, 0.2, 0.3, divisor=4)
    close(loss, expected)
    close(clipped, outside)
    assert 0 < clipped.sum() < 6


def test_cispo_keeps_the_gradient_of_every_token():
    """-clamp(w) A of each token, where the clipped objective of GRPO has none."""
    now, old, _ = draw()
    now.requires_grad_()
    cispo(now, old, now.detach(), ADVANTAGE, N, 0.0, 1.0, 0.1, divisor=1)[0].sum().backward()
    ratio = (now - old).exp().detach()
    close(now.grad, -ratio.clamp(max=1.1) * ADVANTAGE.repeat_interleave(N))
    assert ratio.min() < 0.8  # a lower limit of 0 is none


def test_the_first_update():
    """pi = pi_old = pi_ref: no variant clips; GSPO's gradient is GRPO's, CISPO's that of DAPO."""
    _, old, _ = draw()
    now = old.clone().requires_grad_()
    inputs = now, old, old, ADVANTAGE, N, 0.3, 0.2, 0.2
    of_grpo, of_gspo = grpo(*inputs), gspo(*inputs)
    of_dapo, of_cispo = grpo(*inputs, divisor=2.0), cispo(*inputs, divisor=2.0)
    close(of_grpo[0], -ADVANTAGE)
    close(of_gspo[0], -ADVANTAGE)
    close(of_dapo[0], -ADVANTAGE * N / 2.0)
    gradients = []
    for loss, clipped in (of_grpo, of_gspo, of_dapo, of_cispo):
        assert not clipped.any()
        gradients.append(torch.autograd.grad(loss.sum(), now)[0])
    close(gradients[1], gradients[0])
    close(gradients[3], gradients[2])


def test_on_policy_gradchecks():
    """CISPO's weight has no gradient by intent, so its own is checked by hand above."""
    now, old, ref = draw()
    now.requires_grad_()
    assert gradcheck(lambda x: gspo(x, old, ref, ADVANTAGE, N, 0.3, 0.1, 0.2)[0], now)
    assert gradcheck(lambda x: grpo(x, old, ref, ADVANTAGE, N, 0.3, 0.1, 0.5, 7.0)[0], now)


@pytest.mark.parametrize("loss", [gspo, cispo])
def test_what_only_weights_a_loss_is_detached(loss):
    now, old, ref = (x.requires_grad_() for x in draw())
    advantage = ADVANTAGE.clone().requires_grad_()
    divisor = [2.0] if loss is cispo else []
    loss(now, old, ref.detach(), advantage, N, 0.3, 0.1, 0.2, *divisor)[0].sum().backward()
    assert old.grad is None and advantage.grad is None and now.grad.any()
