"""Tokens a second, operations and MFU: counted one by one, with a clock that is set by hand."""

import json
import subprocess
import sys

import pytest
import torch
from helpers.runs import argv, read_jsonl
from helpers.tiny import tiny
from torch.utils.flop_counter import FlopCounterMode

import train_dpo
from nanoroads.batch import pack
from nanoroads.model import MLP, GPTConfig
from nanoroads.run import run as run_module
from nanoroads.run import speed
from nanoroads.run.run import Run
from nanoroads.run.speed import Speed, host_peak_mib, training_operations, words

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PAIRS = [[3, 2, 4], [5, 1, 1]]  # two prompts of 3 and 5 tokens with two responses each


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 50.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def gpu(monkeypatch, name):
    """A GPU of this name, as far as speed.py asks. Returns the list of its synchronisations."""
    waited = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 20)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    return waited


@pytest.mark.parametrize(
    "stage, unit, count",
    [("dpo", "pairs", 2), ("reward", "pairs", 2), ("rlhf", "samples", 4), ("sft", "samples", 4)],
)
def test_tokens_and_pairs_or_samples_a_second(stage, unit, count, clock):
    of_run = Speed(None, CPU, stage)
    clock.now += 2
    of_run.count(PAIRS[:1])
    of_run.count(PAIRS[1:])
    of_run.stop()
    row = of_run.take_row()
    assert row.pop("peak_mib") > 50  # MiB of this very process
    assert row == {"seconds": 2, "tokens_per_second": 8, f"{unit}_per_second": count / 2}  # 16 tokens


def test_the_clock_stands_still_while_nothing_is_trained(clock):
    of_run = Speed(None, CPU, "dpo")
    clock.now += 2
    of_run.stop()
    clock.now += 100  # an evaluation
    of_run.stop()
    clock.now += 100
    of_run.start()
    clock.now += 3
    of_run.count(PAIRS)
    of_run.stop()
    assert of_run.take_row()["seconds"] == 5
    assert of_run.take_row() == {}  # each row is of what came since the last one
    of_run.start()
    clock.now += 1
    of_run.count(PAIRS[:1])
    of_run.stop()
    assert of_run.take_row()["tokens_per_second"] == 9


def test_what_a_run_logs_is_the_speed_of_its_steps_alone(clock, tmp_path):
    args = train_dpo.flags(argv(train_dpo, out=tmp_path, log_every=2, eval_every=4, save_every=1))
    run = Run(args, "dpo")
    save = run_module.checkpoint.save_state
    try:
        run_module.checkpoint.save_state = lambda *_: setattr(clock, "now", clock.now + 1000)
        for step in run.steps(None, None, 6):
            clock.now += 0.5
            batch = pack([[1, 2, 3], [1, 2, 3, 4, 5]], [[[1] * 2, [1] * 4], [[1], [2]]])
            assert run.counted(batch) is batch
            if run.evaluates(step):
                clock.now += 1000
            run.log(step, {"loss": 1.0})
            run.save(step, None, None)
    finally:
        run_module.checkpoint.save_state = save
    rows = read_jsonl(tmp_path / "speed.jsonl")
    assert [(row["step"], row["seconds"], row["pairs_per_second"]) for row in rows] == [
        (2, 1.0, 4.0), (4, 1.0, 4.0), (6, 1.0, 4.0)
    ]  # fmt: skip
    # metrics.jsonl is the same on every machine.
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0]) == {"step": 2, "loss": 1.0}
    assert "32.00 tokens/s, 4.00 pairs/s" in run.progress.text


def test_a_gpu_is_waited_for_at_logged_steps_alone(monkeypatch, tmp_path):
    waited = gpu(monkeypatch, "some GPU")
    args = train_dpo.flags(argv(train_dpo, out=tmp_path, log_every=5, eval_every=10))
    run = Run(args, "dpo")
    counts = []
    for step in run.steps(None, None, 10):
        run.speed.device = CUDA
        run.counted(pack([[1, 2]], [[[3], [4]]]))
        run.evaluates(step)
        run.log(step, {"loss": 1.0})
        counts.append(len(waited))
    assert counts == [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]
    assert read_jsonl(tmp_path / "speed.jsonl")[0]["peak_mib"] == 3


# ---------------------------------------------------------------- operations and MFU


@pytest.mark.parametrize("kind", ["learned", "gqa"])
def test_operations_are_those_of_every_product(kind):
    """Pairs of a query and a key, and weights of every product, counted one by one."""
    model = tiny(kind)
    c = model.config
    seen = 0
    tokens = 0
    for prompt, *responses in PAIRS:
        seen += sum(range(1, prompt + 1))
        for response in responses:
            seen += sum(prompt + t for t in range(1, response + 1))
        tokens += prompt + sum(responses)
    per_token = 0
    for name, weight in model.named_parameters():
        if "blocks" in name and weight.ndim == 2:
            per_token += weight.numel()
    forward = 2 * per_token * tokens + c.n_layer * 2 * (2 * c.n_head * c.head_size * seen)
    forward += 2 * c.vocab_size * c.n_embd * 8  # of the response tokens
    assert training_operations(model, PAIRS) == 3 * forward
    scalar = tiny(kind, head="scalar")
    assert training_operations(scalar, PAIRS) == 3 * (forward - 2 * c.vocab_size * c.n_embd * 8)


@pytest.mark.parametrize("frozen, per_weight", [(False, 6), (True, 4)])
def test_operations_of_a_weight_are_those_that_torch_counts(frozen, per_weight):
    mlp = MLP(GPTConfig(n_embd=8, mlp="swiglu")).requires_grad_(not frozen)
    with FlopCounterMode(display=False) as counter:
        mlp(torch.randn(5, 8, requires_grad=True)).sum().backward()
    weights = sum(p.numel() for p in mlp.parameters() if p.ndim == 2)
    assert counter.get_total_flops() == per_weight * weights * 5
    model = tiny().requires_grad_(not frozen)
    no_attention = training_operations(model, PAIRS) - 12 * 2 * 32 * (6 + 7 + 18 + 15 + 6 + 6)
    assert no_attention % per_weight == 0
    assert (training_operations(model, PAIRS) == training_operations(tiny(), PAIRS)) == (not frozen)


def test_mfu_is_of_the_peak_on_the_data_sheet(monkeypatch, clock):
    gpu(monkeypatch, "NVIDIA H100 PCIe")
    of_run = Speed(tiny(), CUDA, "dpo")
    assert of_run.peak == 756e12
    of_run.count(PAIRS)
    clock.now += 1e-9
    of_run.seconds = 1e-6
    of_run.begin = None
    row = of_run.take_row()
    assert row["mfu"] == pytest.approx(training_operations(tiny(), PAIRS) / 756e6, rel=1e-5)
    assert row["peak_mib"] == 3
    gpu(monkeypatch, "NVIDIA GeForce RTX 4090")
    assert Speed(tiny(), CUDA, "dpo").peak is None and Speed(tiny(), CPU, "dpo").peak is None


def test_words_of_the_status_line():
    row = {
        "seconds": 1.0,
        "tokens_per_second": 41203.4,
        "pairs_per_second": 6.618,
        "peak_mib": 5120.2,
        "mfu": 0.314,
    }
    assert words(row) == ["41,203 tokens/s", "6.62 pairs/s", "peak 5,120 MiB", "MFU 31 %"]
    assert words({}) == []


def test_host_memory_of_this_process_and_of_its_children():
    assert 50 < host_peak_mib() < 2**20
    subprocess.run([sys.executable, "-c", "data = bytearray(500 * 2**20)"], check=True)
    assert 500 < host_peak_mib(of_children=True) < 2**20
