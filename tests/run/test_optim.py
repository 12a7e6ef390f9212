"""Optimizer steps: learning rate, update, data order, and means that wait for nothing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanoroads.run import optim
from nanoroads.run.optim import Mean

# ---------------------------------------------------------------- learning rate


def rates(steps, warmup=0, schedule="cosine"):
    """The learning rate of each of `steps` steps, with a peak of 2."""
    return [optim.learning_rate(2.0, step, steps, warmup, schedule) for step in range(steps)]


def test_learning_rate_at_its_corners():
    quarters = (0, 0.25, 0.5, 0.75)
    assert rates(4) == pytest.approx([2 * 0.5 * (1 + math.cos(math.pi * done)) for done in quarters])
    assert rates(3, schedule="constant") == [2.0, 2.0, 2.0]
    assert rates(6, warmup=3, schedule="constant") == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    # Never 0: a run of a single step does something.
    assert rates(1) == [2.0]
    assert rates(1, warmup=10) == [pytest.approx(2 / 11)]
    both = rates(100, warmup=9)
    assert both[0] == pytest.approx(0.2)
    assert max(both) == both[9] and 0 < both[-1] < 2e-3
    assert all(before > after for before, after in zip(both[9:], both[10:], strict=False))


@given(st.integers(1, 300), st.integers(0, 300), st.sampled_from(["cosine", "constant"]))
def test_learning_rate_is_positive_and_at_most_the_peak(steps, warmup, schedule):
    assert all(0 < lr <= 2.0 for lr in rates(steps, warmup, schedule))


# ---------------------------------------------------------------- the update


def test_update_clips_steps_and_forgets():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)  # update() sets the rate of the step
    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    norm = optim.update(model, optimizer, lr=0.5, clip=1.0)
    assert norm.item() == 5.0  # before it was clipped
    change = before - model.weight
    assert torch.allclose(change, torch.tensor([[0.3, 0.4]]), atol=1e-6)  # 0.5 x a gradient of norm 1
    assert model.weight.grad is None

    before = model.weight.detach().clone()
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optim.update(model, optimizer, lr=0.5, clip=2.0)
    change = before - model.weight
    assert torch.allclose(change, torch.tensor([[0.6, 0.8]]), atol=1e-6)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    decay = {}
    for group in optim.adamw(model, lr=1.0, weight_decay=0.1).param_groups:
        assert group["lr"] == 1.0
        for parameter in group["params"]:
            decay[id(parameter)] = group["weight_decay"]
    assert [decay[id(parameter)] for parameter in model.parameters()] == [0.1, 0.0, 0.0, 0.0]


# ---------------------------------------------------------------- data order


@given(st.integers(1, 60), st.integers(1, 70), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_an_epoch_shows_every_example_once(examples, size, seed, epoch):
    per_epoch = math.ceil(examples / size)
    batches = [optim.batch_indices(examples, size, epoch * per_epoch + i, seed) for i in range(per_epoch)]
    assert sorted(sum(batches, [])) == list(range(examples))
    assert all(len(batch) == size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= size


def test_data_order_is_a_function_of_seed_and_step():
    def order(seed, steps=range(10)):
        return [optim.batch_indices(40, 8, step, seed) for step in steps]

    wanted = order(3)
    torch.manual_seed(99)  # the state of torch's generator does not matter, nor which steps came before
    optim.epoch_order.cache_clear()
    assert order(3, reversed(range(10)))[::-1] == wanted == order(3)
    assert order(4) != wanted and wanted[:5] != wanted[5:]  # other seeds and epochs are other shuffles
    assert order(4)[:5] != wanted[5:]  # also those that seed + epoch would confuse
    optim.batch_indices(40, 8, 0, 3).clear()  # a caller may change its list
    assert order(3) == wanted


def test_steps_and_chunks():
    assert optim.total_steps(95, 10, epochs=2.5) == 25
    assert optim.total_steps(1, 10, epochs=2.5) == 2
    assert optim.total_steps(95, 10, epochs=2.5, steps=7) == 7
    assert optim.total_steps(95, 10, epochs=None, steps=7) == 7
    assert optim.total_steps(95, 10, epochs=0.001) == 1
    assert optim.total_steps(95, 10, epochs=2.5, updates=4) == 100
    assert optim.total_steps(95, 10, epochs=2.5, steps=7, updates=4) == 7
    assert optim.chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
    assert optim.chunks([1, 2, 3], None) == [[1, 2, 3]] == optim.chunks([1, 2, 3], 9)


# ---------------------------------------------------------------- Mean


def test_a_mean_counts_each_value_once_whatever_the_chunks():
    values = torch.arange(24.0)
    for size in (1, 5, 7, 24):
        metrics = Mean()
        for chunk in values.split(size):
            metrics.add(loss=chunk)
        assert metrics.means()["loss"].item() == pytest.approx(11.5)


def test_a_mean_takes_any_shape():
    metrics = Mean()
    metrics.add(loss=torch.tensor(6.0), reward=torch.ones(2, 3), length=torch.tensor([2, 4]))
    metrics.add(loss=torch.tensor([[1.0, 2.0]]), reward=torch.zeros(2), length=torch.tensor([9]))
    means = metrics.means()
    assert list(means) == ["loss", "reward", "length"]
    assert means["loss"].item() == 3.0  # (6 + 1 + 2) / 3
    assert means["reward"].item() == 0.75  # 6 of 8
    assert means["length"].item() == 5.0  # integers too


def test_of_some_metrics_the_largest_value_counts():
    metrics = Mean()
    for chunk in ([1.0, -7.0], [5.0], [[2.0], [4.0]]):
        metrics.add(loss=torch.tensor(chunk))
        metrics.add_largest(gap=torch.tensor(chunk, requires_grad=True))
    assert metrics.means() == {"loss": 1.0, "gap": 5.0}
    assert not metrics.means()["gap"].requires_grad


def test_a_mean_has_no_gradient_and_keeps_no_graph():
    weight = torch.ones(3, requires_grad=True)
    metrics = Mean()
    metrics.add(loss=weight * 2)
    mean = metrics.means()["loss"]
    assert mean.item() == 2.0 and not mean.requires_grad


def test_a_mean_never_waits_for_the_device():
    """On the meta device there are no values at all, so whatever asked for one would raise."""
    metrics = Mean()
    for rows in (4, 3):
        metrics.add(loss=torch.empty(rows, 2, device="meta"), accuracy=torch.empty(rows, device="meta"))
        metrics.add_largest(gap=torch.empty(rows, device="meta"))
    means = metrics.means()
    assert all(isinstance(value, torch.Tensor) and value.shape == () for value in means.values())
    assert {value.device.type for value in means.values()} == {"meta"}
    with pytest.raises(RuntimeError):
        means["loss"].item()


def test_an_empty_mean_has_no_entries():
    assert Mean().means() == {}
