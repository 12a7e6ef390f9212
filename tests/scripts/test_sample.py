"""sample.py: greedy and drawn responses, prompts from a file, the best of N, and a chat."""

import re

import pytest
import tiktoken
from helpers.runs import argv, run, write_jsonl

import sample
import train_sft
from nanoroads import score
from nanoroads.generate import generate
from nanoroads.text import tokenizer
from nanoroads.weights.checkpoint import load_model


@pytest.fixture
def output(capsys):
    """output(**flags): the lines that sample.py prints."""

    def lines(**flags):
        capsys.readouterr()
        sample.main(argv(sample, device="cpu", **flags))
        return capsys.readouterr().out.splitlines()

    return lines


def test_greedy_and_drawn(sft, output):
    encoding = tokenizer.get("roadmap")
    greedy = output(model=sft, prompt="WA>FL:", temperature=0)
    prompt, eos = tokenizer.encode(encoding, "WA>FL:"), tokenizer.eos_id(encoding)
    responses = generate(load_model(sft), [prompt], 1, 12, temperature=0, eos=eos)
    assert greedy[0] == "WA>FL:" + tokenizer.decode_all(encoding, responses[0])[0]
    assert re.fullmatch(r"  true reward \d\.\d\d \(legal \w+, arrives \w+, \d+ moves\)", greedy[1])
    assert greedy == output(model=sft, temperature=0, seed=5)  # WA>FL: is the default
    drawn = output(model=sft, seed=0, num_samples=3)
    assert drawn == output(model=sft, seed=0, num_samples=3) != output(model=sft, seed=9, num_samples=3)
    assert len(drawn) == 6
    # Sample i of seed s is sample 0 of seed s + i.
    assert drawn[2:4] == output(model=sft, seed=1) != drawn[:2]
    assert output(model=sft, top_k=1)[0] == greedy[0] == output(model=sft, top_p=1e-6)[0]


def test_prompts_of_a_file(sft, tmp_path, output):
    texts = ["WA>FL:", "ME>CA:", "TX>NY:"]
    path = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    lines = output(model=sft, prompts=path, num_samples=2)
    assert len(lines) == 12
    assert [line[:6] for line in lines[::2]] == [text for text in texts for _ in range(2)]


@pytest.mark.parametrize("kind", ["global", "policy"])
def test_best_of(kind, sft, dpo, rlhf, output):
    reward, reference = rlhf / "reward", None
    if kind == "policy":
        reward, reference = dpo, load_model(sft)
    lines = output(model=sft, prompt="WA>OR:", reward=reward, best_of=8, seed=1)
    encoding = tokenizer.get("roadmap")
    prompt, eos = tokenizer.encode(encoding, "WA>OR:"), tokenizer.eos_id(encoding)
    responses = generate(load_model(sft), [prompt], 8, 12, eos=eos, seed=1)
    value = score.rewards(load_model(reward), reference, [prompt], responses, 0.3)[0]  # (8,)
    assert lines[0] == "WA>OR:" + tokenizer.decode_all(encoding, responses[0])[value.argmax()]
    assert lines[1] == f"  score {value.max():.3f}, the best of 8 (mean {value.mean():.3f})"


class Typed:
    """A stdin on which these lines are typed."""

    def __init__(self, lines):
        self.lines = iter(lines)

    def isatty(self):
        return False

    def readline(self):
        return next(self.lines) + "\n"


def test_chat(tmp_path, monkeypatch, output):
    """A byte-level model that learnt one answer gives it, and sees the conversation so far."""
    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tokenizer, "get", lambda name: encoding)
    rows = [{"prompt": [{"role": "user", "content": f"number {i}"}], "response": "öko"} for i in range(40)]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    model = run(train_sft, tmp_path / "sft", data=path, tokenizer="bytes", block_size=64, rows=None)
    monkeypatch.setattr("sys.stdin", Typed(["number 7", "and so on", ""]))
    assert output(model=model, chat=True, temperature=0, max_new_tokens=12) == [" öko", " öko"]
