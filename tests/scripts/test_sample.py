"""sample.py: greedy and drawn responses, prompts from a file, the best of N, and a chat."""

import copy
import re
from pathlib import Path

import pytest
import tiktoken
import torch
from helpers.runs import argv, run, write_jsonl

import sample
import train_sft
from nanoroads import score
from nanoroads.generate import generate
from nanoroads.text import tokenizer
from nanoroads.text.encode import EncodedRow
from nanoroads.weights.checkpoint import load_model
from nanoroads.world import roadmap


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
    true_rewards = [
        roadmap.true_reward("WA>OR:", answer) for answer in tokenizer.decode_all(encoding, responses[0])
    ]
    best, mean = true_rewards[value.argmax()], sum(true_rewards) / 8
    assert lines[2].startswith(f"  true reward {best:.2f} (legal ")
    assert lines[2].endswith(f" moves); mean of the 8: {mean:.2f}")
    assert len(lines) == 3


class Typed:
    """A stdin on which these lines are typed; CTRL_C is a key."""

    def __init__(self, lines):
        self.lines = iter(lines)

    def isatty(self):
        return False

    def readline(self):
        line = next(self.lines, None)
        if line is None:
            return ""  # the end of the input
        if line == CTRL_C:
            raise KeyboardInterrupt
        return line + "\n"


CTRL_C = "^C"


@pytest.fixture
def chatty(tmp_path, monkeypatch):
    """A byte-level model that learnt one answer."""
    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tokenizer, "get", lambda name: encoding)
    rows = [{"prompt": [{"role": "user", "content": f"number {i}"}], "response": "öko"} for i in range(40)]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    return run(train_sft, tmp_path / "sft", data=path, tokenizer="bytes", block_size=64, rows=None)


def test_chat(chatty, monkeypatch, output):
    """It gives its answer, and sees the conversation so far."""
    monkeypatch.setattr("sys.stdin", Typed(["number 7", "and so on", ""]))
    assert output(model=chatty, chat=True, temperature=0, max_new_tokens=12) == [" öko", " öko"]


# ---------------------------------------------------------------- Ctrl-C


class Conversation:
    """Takes the place of `encode_row` and of `stream` in a chat, and says these texts as tokens."""

    def __init__(self, texts, monkeypatch):
        self.texts = iter(texts)
        self.asked = []  # the messages before each answer
        monkeypatch.setattr(sample, "encode_row", self.encode_row)
        monkeypatch.setattr(sample, "stream", self.stream)

    def encode_row(self, encoding, messages, typed=False):
        self.asked.append(copy.deepcopy(messages))
        return EncodedRow([1], [], "")

    def stream(self, *args, **settings):
        for byte in next(self.texts).encode():
            if byte == ord("!"):
                raise KeyboardInterrupt
            yield torch.tensor([byte]), torch.tensor([byte == 0])


@pytest.mark.parametrize("end", [[""], [], [CTRL_C]])
def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(end, chatty, monkeypatch, capsys):
    talk = Conversation(["Once upon! a time", "!", "yes\0"], monkeypatch)
    monkeypatch.setattr("sys.stdin", Typed(["a story", "go on", "are you there?", *end]))
    capsys.readouterr()
    sample.main(argv(sample, device="cpu", model=chatty, chat=True, max_new_tokens=12))  # ends quietly
    said = capsys.readouterr()
    assert said.out == "Once upon [stopped]\n [stopped]\nyes\n" and said.err == ""
    assert [[message["content"] for message in messages] for messages in talk.asked] == [
        ["a story"],
        ["a story", "Once upon", "go on"],
        ["a story", "Once upon", "go on", "", "are you there?"],
    ]


def test_ctrl_c_in_plain_sampling_stops_and_speaks_of_no_resume(chatty, monkeypatch, capsys):
    Conversation(["Once upon! a time"], monkeypatch)
    words = argv(sample, device="cpu", model=chatty, prompt="a story", max_new_tokens=12)
    monkeypatch.setattr("sys.argv", ["sample.py", *words])
    with pytest.raises(SystemExit) as stopped:
        runpy_main(sample)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "\nstopped\n"


def runpy_main(script):
    """What stands under `if __name__ == "__main__"`, in this process."""
    last_line = Path(script.__file__).read_text().strip().splitlines()[-1]
    exec(last_line.strip(), vars(script))


# ---------------------------------------------------------------- control characters

ESCAPES = "\x1b]0;title\x07 \x1b[2J\r\x08\x7f\x9b31m\u202etxt\u2066 ok\ttab"
ESCAPED = r"\x1b]0;title\x07 \x1b[2J\x0d\x08\x7f\x9b31m\u202etxt\u2066 ok" + "\ttab"


@pytest.mark.parametrize("flags", [{"chat": True}, {"prompt": ESCAPES}, {"best_of": 2, "prompt": ESCAPES}])
def test_what_a_model_or_a_prompt_says_does_not_reach_the_terminal_raw(flags, chatty, monkeypatch, capsys):
    """A token is a byte here, so every escape sequence comes in several."""
    if "best_of" in flags:
        flags = {**flags, "reward": chatty}
        monkeypatch.setattr(sample, "load_reward_model", lambda *args, **options: load_model(chatty))
        monkeypatch.setattr(sample, "check_fitted", lambda folder: None)
        monkeypatch.setattr(sample, "read_config", lambda folder: {"reference": str(chatty), "beta": 1.0})
        monkeypatch.setattr(sample, "load_policy", lambda *args, **options: load_model(chatty))
        monkeypatch.setattr(sample, "generate", lambda *args, **options: [[list(ESCAPES.encode())] * 2])
        monkeypatch.setattr(sample, "rewards", lambda *args: torch.zeros(1, 2))
    else:
        Conversation([ESCAPES], monkeypatch)
    monkeypatch.setattr("sys.stdin", Typed(["hello"]))
    sample.main(argv(sample, device="cpu", model=chatty, max_new_tokens=12, **flags))
    out = capsys.readouterr().out
    assert ESCAPED in out
    if "prompt" in flags:
        assert out.count(ESCAPED) == 2  # of the prompt and of the answer
    assert not set(out) & set("\x1b\x07\r\x08\x7f\x9b\u202e\u2066")
