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
from nanoroads.weights.packed import PackedLinear, can_pack, decoding_twin

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


def seconds(work):
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def step_time(sample, new):
    """Of one of `new` tokens, without what comes before the first one."""
    return (seconds(lambda: sample(new)) - seconds(lambda: sample(1))) / (new - 1)


@torch.no_grad()
def floor_of_a_step(model, rows, columns):
    """What a decoding step can't go below, in seconds: (bytes it reads over the memory's rate, its bare
    products). columns: of the cache, on average."""
    dtype = model.embedding.weight.dtype
    twin = decoding_twin(model, dtype, rows)
    matrices = [module for module in twin.modules() if isinstance(module, PackedLinear)]
    inputs = [torch.randn(rows, matrix.packed.size(1)).to(matrix.product_dtype) for matrix in matrices]
    weight_bytes = sum(matrix.packed.numel() * matrix.packed.element_size() for matrix in matrices)
    c = model.config
    cache_bytes = 2 * c.n_layer * rows * c.n_kv_head * columns * c.head_size * dtype.itemsize
    large = torch.ones(2**27)  # 512 MB, more than a cache holds

    def products():
        for matrix, x in zip(matrices, inputs, strict=True):
            matrix.product(x)

    def median_time(work):
        return statistics.median(seconds(work) for _ in range(9))

    rate = large.numel() * large.element_size() / median_time(large.sum)
    return (weight_bytes + cache_bytes) / rate, median_time(products)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sampling_is_faster_than_transformers_and_near_its_floor(dtype, request, tokens, two_threads):
    """Batch 8, 128 new tokens, two cores, interleaved with transformers and with the floor.

    What is asserted leaves room for a busy machine; `pytest -s` prints what was measured."""
    if not can_pack({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]):
        pytest.skip(f"this CPU multiplies no packed {dtype}: there is no lead to measure")
    ours, theirs = request.getfixturevalue(dtype)
    prompts, new = tokens[:8], 128
    columns = max(map(len, prompts)) + new // 2
    times = {"memory": [], "products": [], "ours": [], "transformers": []}  # of a step, in ms
    for _ in range(2):
        memory, products = floor_of_a_step(ours, len(prompts), columns)
        our_step = step_time(lambda length: generate(ours, prompts, 1, length, temperature=0), new)
        their_step = step_time(
            lambda length: their_greedy(theirs, prompts, length, min_new_tokens=length), new
        )
        steps = (memory, products, our_step, their_step)
        for name, step in zip(times, steps, strict=True):
            times[name].append(1000 * step)
    medians = {name: statistics.median(values) for name, values in times.items()}
    floor = max(medians["memory"], medians["products"])
    ratios = {name: medians[name] / floor for name in ("ours", "transformers")}
    print(f"\n{dtype}, ms a step: {medians}; times the floor: {ratios}")
    assert medians["ours"] < 2.5 * floor
    assert medians["transformers"] > 0.9 * medians["ours"]
