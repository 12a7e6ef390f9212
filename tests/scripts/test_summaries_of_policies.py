"""What experiments/summarize.py draws from policies: pairs of samples, and measures, by hand."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.made_up_summaries import ROWS, args_of_first_seed
from helpers.runs import write_jsonl

from experiments import summarize
from nanoroads.errors import InputError
from nanoroads.experiments import summaries_of_policies
from nanoroads.run.made_from import make_or_keep
from nanoroads.text.rouge import words
from nanoroads.weights.identity import of_file


def test_new_samples_have_their_pairs_labelled_again(tmp_path, monkeypatch):
    """And pairs that somebody has changed are refused."""
    samples, pairs = tmp_path / "samples_pairs.json", tmp_path / "pairs.jsonl"
    args, _ = args_of_first_seed("--tiny")

    def label():
        labelled_from = {"samples": of_file(samples)}
        make = partial(
            summaries_of_policies.pairs_file, args, "one-line", tmp_path, ROWS, reward, samples, pairs.name
        )
        make_or_keep(pairs, labelled_from, make)
        return pairs.read_text()

    reward = summarize.reward_function("one-line", ROWS)
    samples.write_text(json.dumps([["pango", "b"], [], ["c", "d"]]))  # of the third both are worth nothing
    first = label()
    assert label() == first and first.count("\n") == 1
    samples.write_text(json.dumps([["pango", "b"], ["vector", "e"], ["c", "c"]]))
    assert label().count("\n") == 2
    pairs.write_text(first)
    with pytest.raises(InputError, match="pairs.jsonl: has changed since it was made"):
        label()


@pytest.mark.parametrize("first", [[], ["pango lays text cairo"]])
def test_a_pair_is_of_the_two_samples_whose_rewards_differ_most(first, tmp_path):
    """And almost always the better one is chosen, drawn first or last, where they are 8 nats apart."""
    samples = tmp_path / "samples.json"
    texts = [*first, "pango", "nothing", "pango text", "pango lays text cairo", "nothing"]
    rows = ROWS[:1] * 20
    samples.write_text(json.dumps([texts] * 20))
    args, _ = args_of_first_seed("--tiny")
    reward = {"pango": 2.0, "nothing": 0.0, "pango text": 4.0, "pango lays text cairo": 8.0}

    def reward_of(row, text):
        return reward[text]

    files = summaries_of_policies.pairs_file(
        args, "one-line", tmp_path, rows, reward_of, samples, "pairs.jsonl"
    )
    pairs = [json.loads(line) for line in files["pairs.jsonl"].splitlines()]
    assert len(pairs) == 20
    for pair in pairs:
        assert {pair["chosen"], pair["rejected"]} == {"nothing", "pango lays text cairo"}
    assert sum(pair["chosen"] == "pango lays text cairo" for pair in pairs) >= 19


def test_what_is_asked_and_imitated():
    row = {"document": "Pango lays out text.", "summary": "The state-of-the-art layout of text"}
    demos = {}
    for setting in ("one-line", "two-word"):
        (demos[setting],) = map(
            json.loads, summaries_of_policies.demos_file(setting, [row])["demos.jsonl"].splitlines()
        )
    assert demos["one-line"] == {
        "prompt": "Pango lays out text.\n\nIn one line:",
        "response": " The state-of-the-art layout of text",
    }
    # Words as the reward counts them.
    assert demos["two-word"] == {"prompt": "Pango lays out text.\n\nIn two words:", "response": " The state"}
    assert len(words(demos["two-word"]["response"])) == 2
    # The sign of the kelvin is a k in lower case; this I with a dot is two characters there.
    for summary, beginning in (("\u212a 0 or below", "\u212a 0"), ("\u0130 a b", "\u0130 a")):
        assert summaries_of_policies.summary_of("two-word", {"summary": summary}).strip() == beginning


def test_of_a_documents_samples_those_that_cannot_be_trained_on_as_drawn_are_left_out(monkeypatch, tmp_path):
    """Empty ones, and those that were cut off and whose text has room for the EOS that they lack."""
    drawn = summaries_of_policies.Samples(
        [[1]], [[[5, 0], [5, 6], [5, 6, 7], [0], [7, 8, 0]]], [["five", "56", "567", "", "78"]]
    )
    lengths = {"56": 2, "567": 2}  # of the texts, as tokens
    monkeypatch.setattr(summaries_of_policies, "sample", lambda *args, **kwargs: drawn)
    monkeypatch.setattr(summaries_of_policies, "load", lambda *args: None)
    monkeypatch.setattr(summaries_of_policies.tokenizer, "get", lambda name: None)
    monkeypatch.setattr(summaries_of_policies.tokenizer, "stop_ids", lambda encoding: (0,))
    monkeypatch.setattr(summaries_of_policies.tokenizer, "encode", lambda encoding, text: [1] * lengths[text])
    args, size = args_of_first_seed("--tiny")
    files = summaries_of_policies.samples_file(args, size, "one-line", tmp_path, ROWS[:1], "samples.json")
    assert json.loads(files["samples.json"]) == [["five", "56", "78"]]


def test_measures_by_hand(monkeypatch, tmp_path):
    """One document, two samples a policy; rewards are the texts' lengths, log-probs those given here."""
    texts = {"sft": ["a", "bbb"], "dpo": ["dddd", "dd"], "rlhf": ["rrr", "rrrrr"]}
    logps = {"sft": [-3.0, -5.0], "dpo": [-1.0, -2.0], "rlhf": [-2.5, -4.5]}  # SFT's own, of any samples

    def sample(args, size, setting, policy, rows, k, temperature=1.0, seed=0):
        return summaries_of_policies.Samples([[1]], [[[2], [3]]], [texts[policy][:k]])

    def sequence_logps(policy, prompts, responses, micro):
        return torch.tensor([logps[policy]], dtype=torch.float64)

    monkeypatch.setattr(summaries_of_policies, "load", lambda size, folder: folder.name)
    monkeypatch.setattr(summaries_of_policies, "sample", sample)
    monkeypatch.setattr(summaries_of_policies, "sequence_logps", sequence_logps)
    last = {"eval_loss": 0.5, "eval_accuracy": 0.75}
    monkeypatch.setattr(summaries_of_policies, "read_metrics", lambda folder: [{}, last])
    prompt = summaries_of_policies.prompt_of("two-word", ROWS[0])
    pairs = [{"prompt": prompt, "chosen": "aa", "rejected": "a"}] * 3
    pairs.append({"prompt": prompt, "chosen": "a", "rejected": "a"})
    write_jsonl(tmp_path / "test.jsonl", pairs)
    folders = {name: tmp_path / name for name in texts}
    args, size = args_of_first_seed("--tiny")
    size = replace(size, kl=0.5)

    def reward(row, text):
        return float(len(text))

    measures = summaries_of_policies.measure(args, size, "two-word", folders, ROWS[:1], reward)

    means = {}
    for policy, row in measures["policies"].items():
        means[policy] = {name: cell["mean"] for name, cell in row.items() if name != "example"}
    names = ("reward", "greedy_reward", "win_rate", "kl_to_ref", "objective", "words")
    assert means["sft"] == pytest.approx(dict(zip(names, (2, 1, 0.5, 0, 2, 1), strict=True)))
    assert means["dpo"] == pytest.approx(dict(zip(names, (3, 4, 0.75, 2.5, 1.75, 1), strict=True)))
    # 3 - .5 .5 and 5 - .5 .5. Wins against SFT: 3 > 1, 3 = 3, 5 > 1, 5 > 3; against DPO: 3 > 2, 5 > 4, 5 > 2.
    assert means["rlhf"] == pytest.approx(dict(zip(names, (4, 3, 0.875, 0.5, 3.75, 1), strict=True)))
    assert measures["rlhf_minus_dpo"]["mean"] == 1 and measures["objective_gap"]["mean"] == pytest.approx(2)
    assert measures["rlhf_against_dpo"]["mean"] == 3 / 4
    assert measures["reward_model"] == {"nll": 0.5, "accuracy": 0.75, "pairs": 4}
    assert measures["labels_right"]["mean"] == 3 / 4
    assert measures["demos"]["mean"] == len("text layout")


def test_a_win_rate_compares_each_sample_with_each():
    one = torch.tensor([[1.0, 3.0], [0.0, 0.0]])
    other = torch.tensor([[2.0, 3.0], [0.0, 5.0]])
    # 1 < 2, 1 < 3, 3 > 2, 3 = 3; 0 = 0, 0 < 5, twice
    assert summaries_of_policies.win_rates(one, other).tolist() == [1.5 / 4, 1 / 4]


def test_rewards_are_rounded_so_that_equal_ones_tie():
    def reward(row, text):
        return {"a": 0.1 + 0.2, "b": 0.3, "c": row["more"]}[text]

    rewards = summaries_of_policies.rewards_of(
        [["a", "b"], ["c", "b"]], [{"more": 1.0}, {"more": 2.0}], reward
    )
    assert rewards[0, 0] == rewards[0, 1] and rewards[1, 0] == 2 and rewards.dtype == torch.float64


def test_the_memory_is_the_most_of_the_script_and_of_its_commands(monkeypatch):
    peaks = {False: 2048.0, True: 5120.0}
    monkeypatch.setattr(summaries_of_policies, "host_peak_mib", lambda of_children=False: peaks[of_children])
    assert summaries_of_policies.peak_gib() == 5
    peaks[False] = 7168.0
    assert summaries_of_policies.peak_gib() == 7
    peaks.update({False: None, True: None})  # Windows
    assert summaries_of_policies.peak_gib() == 0
