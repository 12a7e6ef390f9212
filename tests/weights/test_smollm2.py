"""A real pretrained model against transformers: logits, greedy tokens, and the speed of sampling."""

import statistics
import time

import pytest
import torch

pytest.importorskip("transformers")
import transformers
from helpers import smollm2

from nanoroads.generate import generate
from nanoroads.model import GPT
from nanoroads.weights.packed import can_pack

PROMPTS = """The capital of France is
Water boils at
def fibonacci(n):
Once upon a time there was a
The three primary colours are
Debian is a free operating system that
import torch
Q: What is 12 + 30? A:
The opposite of hot is
SELECT name FROM users WHERE
In 1969, the first man
A haiku about rain:
Photosynthesis is the process by which
The chemical symbol of gold is
My favourite recipe for pancakes starts with
git commit -m
To be, or not to be,
A triangle has three sides; a hexagon
Es war einmal
The quick brown fox jumps over the lazy dog because"""
NEW = 64


@pytest.fixture(scope="module")
def tokens():
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.folder())
    return [tokenizer(line, add_special_tokens=False)["input_ids"] for line in PROMPTS.splitlines()]


def load_both(dtype):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.folder(), dtype=dtype, attn_implementation="sdpa"
    )
    return GPT.from_pretrained(smollm2.folder(), dtype=dtype).eval(), theirs.eval()


@pytest.fixture(scope="module")
def fp32():
    return load_both(torch.float32)


@pytest.fixture(scope="module")
def bf16():
    return load_both(torch.bfloat16)


def padded(prompts, pad=0):
    """Left padding and its mask, as transformers' generate takes them."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


@torch.no_grad()
def their_greedy(model, prompts, new, **options):
    settings = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new} | options
    inputs = padded(prompts)
    return model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()


@torch.no_grad()
def logits(models, tokens):
    ids = torch.tensor([sum(tokens, [])])
    ours, theirs = models
    return ours.logits(ids).float(), theirs(ids).logits.float()


def test_logits(fp32, bf16, tokens):
    ours, theirs = logits(fp32, tokens)
    assert (ours - theirs).abs().max() < 1e-3  # of logits up to 40; 30 layers of fp32
    low, their_low = logits(bf16, tokens)
    apart = (low.log_softmax(-1) - ours.log_softmax(-1)).abs().mean()
    their_apart = (their_low.log_softmax(-1) - ours.log_softmax(-1)).abs().mean()
    assert apart < 1.1 * their_apart  # bf16 rounds: no further from fp32 than transformers is
    agree = (low.argmax(-1) == their_low.argmax(-1)).float().mean()
    assert agree > 0.9


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(fp32, tokens):
    ours, theirs = fp32
    eos = theirs.generation_config.eos_token_id
    found = [group[0] for group in generate(ours, tokens, 1, NEW, temperature=0, eos=eos)]
    wanted = their_greedy(theirs, tokens, NEW)
    wanted = [row[: row.index(eos) + 1] if eos in row else row for row in wanted]
    assert len(found) == 20
    assert found == wanted


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sampling_is_no_slower_than_transformers(dtype, request, tokens, two_threads):
    """Batch 8, 24 new tokens, two cores: medians of three, interleaved with transformers.

    The lead depends on the CPU: 2.2 and 1.6 times as fast were measured on an AMD EPYC (Zen 4), 1.3 and 1.4
    on an Intel Xeon (Sapphire Rapids). What is asserted leaves room for a busy machine."""
    if not can_pack({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]):
        pytest.skip(f"this CPU multiplies no packed {dtype}: there is no lead to measure")
    ours, theirs = request.getfixturevalue(dtype)
    prompts, new = tokens[:8], 24
    runs = {
        "ours": lambda: generate(ours, prompts, 1, new, temperature=0),
        "transformers": lambda: their_greedy(theirs, prompts, new, min_new_tokens=new),
    }
    seconds = {name: [] for name in runs}
    for _ in range(3):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begun)
    ours, theirs = (statistics.median(seconds[name]) for name in runs)
    speeds = f"{8 * new / ours:.0f} tokens/s, transformers {8 * new / theirs:.0f}"
    print(f"\n{dtype}: {speeds}: {theirs / ours:.2f} times as fast")
    assert theirs / ours > 0.9
