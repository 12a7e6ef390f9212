"""The choice of a token against a plain softmax, cumulative sum and search, all in fp64."""

import math

import pytest
import torch

from nanoroads import sampling
from nanoroads.sampling import BLOCK, choose

SIZES = [1, 2, 98, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 17, 49_152]


def plain(logits, u, temperature, top_k=0, top_p=1.0):
    """-> tokens (N,), all probabilities (N, V), and their cumulative sums (N, V)."""
    scaled = (logits.float() - logits.max(-1, keepdim=True).values.float()) / temperature
    probability = sampling.keep_likeliest(scaled, top_k, top_p).softmax(-1, dtype=torch.float64)
    cdf = probability.cumsum(-1)
    cdf = cdf / cdf[:, -1:]
    return torch.searchsorted(cdf, u[:, None], right=True).squeeze(1), probability, cdf


def rows_of(size):
    """Rows of logits of every kind: smooth, peaked, one token alone, a few possible ones, and huge."""
    generator = torch.Generator().manual_seed(size)
    normal = torch.randn(12, size, generator=generator)
    one_hot = torch.full((3, size), -torch.inf)
    one_hot[torch.arange(3), torch.tensor([0, size // 2, size - 1])] = 1e4
    few = torch.where(torch.rand(6, size, generator=generator) < 0.01, 3 * normal[:6], -torch.inf)
    few[:, size // 3] = 0.0  # at least one is possible
    return torch.cat((normal, 30 * normal, 1e4 * normal, one_hot, few, torch.zeros(2, size)))


def check(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """The tokens are the plain ones, or u lies within 1e-12 of the boundary between them. Returns how
    many are not the same."""
    tokens, logps = choose(logits, u, temperature, top_k, top_p)
    wanted, probability, cdf = plain(logits, u, temperature, top_k, top_p)
    chosen = probability[torch.arange(len(logits)), tokens]
    assert (chosen > 0).all()  # a token of probability 0 is never drawn
    torch.testing.assert_close(logps.exp(), chosen, rtol=1e-9, atol=0)
    other = (tokens != wanted).nonzero().squeeze(1)
    for i in other.tolist():
        between = cdf[i, min(tokens[i], wanted[i]) : max(tokens[i], wanted[i])]
        assert (between - u[i]).abs().max() < 1e-12
    return len(other)


@pytest.mark.parametrize("size", SIZES)
def test_it_draws_what_a_plain_inversion_draws(size):
    """Here no draw is so near to a boundary that the order of a sum could decide."""
    rows = rows_of(size)
    for seed in range(20 if size < 10_000 else 2):
        u = torch.rand(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert check(rows, u) == 0
        assert check(rows, u, temperature=0.7, top_k=40, top_p=0.9) == 0
        assert check(rows, u, temperature=3.0, top_p=0.5) == 0
    for end in (0.0, 2**-53, 1 - 2**-53):
        check(rows, torch.full((len(rows),), end, dtype=torch.float64))


@pytest.mark.parametrize("size", [98, 5 * BLOCK + 17, 4096])
def test_at_a_boundary_it_draws_one_of_the_two_neighbours(size):
    """u is the cumulative probability itself, and the numbers next to it: where blocks begin, and at
    every 29th token."""
    rows = rows_of(size)[:12]
    *_, cdf = plain(rows, torch.zeros(12, dtype=torch.float64), 1.0)
    places = sorted({*range(0, size - 1, 29), *range(BLOCK - 1, size - 1, BLOCK)})
    other = 0
    for place in places:
        u = cdf[:, place].clamp(max=1 - 2**-53)
        for step in (0.0, 2.0):
            other += check(rows, u)
            other += check(rows, torch.nextafter(u, torch.full_like(u, step)).clamp(0, 1 - 2**-53))
    assert other > 0  # the order of the sums does decide here


def test_the_first_and_the_last_possible_token_of_a_block():
    """Impossible tokens at both ends of every block, and u at both ends of every block's share."""
    size = 4 * BLOCK
    logits = torch.full((1, size), -torch.inf)
    possible = torch.arange(size).view(4, BLOCK)[:, 3:-5].flatten()
    logits[0, possible] = torch.linspace(-3, 3, len(possible))
    *_, cdf = plain(logits, torch.zeros(1, dtype=torch.float64), 1.0)
    ends = cdf[0, BLOCK - 1 :: BLOCK]  # (4,)
    u = torch.cat((ends, ends - 1e-16, ends + 1e-16, torch.zeros(1, dtype=torch.float64)))
    u = u.clamp(0, 1 - 2**-53)
    check(logits.expand(len(u), -1), u)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_rows_do_not_depend_on_how_many_are_worked_through_at_a_time(rows, monkeypatch):
    logits, u = rows_of(1000), torch.rand(47, dtype=torch.float64)
    wanted = choose(logits, u, 1.0, 0, 1.0)
    monkeypatch.setattr(sampling, "IN_CACHE", 1000 * rows)
    tokens, logps = choose(logits, u, 1.0, 0, 1.0)
    assert torch.equal(tokens, wanted[0]) and torch.equal(logps, wanted[1])


def test_in_fp32_as_on_a_device_without_fp64():
    """No impossible token is drawn, and shares are right to what fp32 can hold."""
    logits = rows_of(5 * BLOCK + 17)
    u = torch.rand(len(logits)).clamp(max=1 - 2**-24)
    for ends in (u, torch.zeros_like(u), torch.full_like(u, 1 - 2**-24)):
        tokens, logps = choose(logits, ends, 1.0, 0, 1.0)
        row = torch.arange(len(logits))
        wanted = logits.double().log_softmax(-1)[row, tokens]
        assert logps.dtype == torch.float32 and (wanted > -110).all()
        torch.testing.assert_close(logps.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_greedy_token_is_certain():
    logits = torch.randn(5, 40)
    tokens, logps = choose(logits, torch.rand(5, dtype=torch.float64), 0, 0, 1.0)
    assert torch.equal(tokens, logits.argmax(-1)) and not logps.any()


@pytest.mark.parametrize("size", [5, 3 * BLOCK + 1])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_have_a_log_prob_of_nan(size, temperature):
    """And a token that exists, for on a GPU it is looked up before anyone has seen the NaN."""
    logits = torch.zeros(4, size)
    logits[0, 1] = math.nan
    logits[1, 1] = math.inf
    logits[2] = -math.inf
    tokens, logps = choose(logits, torch.full((4,), 0.99, dtype=torch.float64), temperature, 0, 1.0)
    assert logps.isnan().tolist() == [True, True, True, False]
    assert ((tokens >= 0) & (tokens < size)).all()
