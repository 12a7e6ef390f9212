"""Policies on documents, for experiments/summarize.py: their samples, pairs of these, and their measures.

What ends in _file returns {file name: bytes}, for `make_or_keep`. `args` is that of one seed, see
summarize.py beside this, where the sizes are, too.
"""

import json
import re
import resource
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from nanoroads import randomness
from nanoroads.errors import InputError
from nanoroads.generate import generate
from nanoroads.losses import kl_k1
from nanoroads.progress import tracked
from nanoroads.report.summaries import rewards_of, win_rates
from nanoroads.run.folder import read_metrics
from nanoroads.run.optim import chunks
from nanoroads.run.run import pick_device, pick_dtype
from nanoroads.score import mean_se, sequence_logps
from nanoroads.text import tokenizer
from nanoroads.text.encode import encode_row
from nanoroads.text.rouge import words
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import json_bytes, jsonl_bytes

WORD = re.compile(r"[a-zA-Z0-9]+")  # as nanoroads/text/rouge.py counts them


def prompt_of(setting, row):
    """What is asked of a document."""
    length = "two words" if setting == "two-word" else "one line"
    return f"{row['document']}\n\nIn {length}:"


def summary_of(setting, row):
    """What SFT imitates: a document's own summary, or the beginning of it with two words."""
    if setting != "two-word":
        return row["summary"]
    ends = [word.end() for word in WORD.finditer(row["summary"])]
    return row["summary"][: ends[1]]


def tokens_of(size, setting):
    """The most tokens that a response may have, EOS among them."""
    return size.two_word_tokens if setting == "two-word" else size.tokens


def demos_file(setting, rows):
    """What SFT imitates, rows {"prompt", "response"}."""
    demos = []
    for row in rows:
        demos.append({"prompt": prompt_of(setting, row), "response": f" {summary_of(setting, row)}"})
    return {"demos.jsonl": jsonl_bytes(demos)}


class Samples(NamedTuple):
    """k responses to the prompt of each document."""

    prompts: list  # as tokens
    responses: list  # for each prompt k token lists
    texts: list  # for each prompt k strings


def load(size, folder):
    """The policy in a folder, on the fastest device there is."""
    device = pick_device("auto")
    return load_policy(folder, device, pick_dtype(size.dtype, device))


def sample(args, size, setting, policy, rows, k, temperature=1.0, seed=0):
    """k responses of a policy to the prompt of each row: Samples."""
    encoding = tokenizer.get(str(args.model))
    eos = tokenizer.stop_ids(encoding)
    prompts = [encode_row(encoding, prompt_of(setting, row)).prompt for row in rows]
    tokens = tokens_of(size, setting)
    responses = []
    for chunk in tracked(chunks(prompts, 64), "sampling", "batch"):
        responses += generate(policy, chunk, k, tokens, temperature, eos=eos, seed=seed)
    return Samples(prompts, responses, [tokenizer.decode_all(encoding, group) for group in responses])


def samples_file(args, size, setting, sft, rows, name):
    """The texts of size.draws samples for each row, less the empty ones.

    One that was cut off at the most tokens is trained on without EOS, since its text has no room for
    one; those few whose text has, as fewer tokens spell it, are left out. The file lies beside the SFT
    policy: one-line and hidden label the same samples."""
    encoding = tokenizer.get(str(args.model))
    stop = tokenizer.stop_ids(encoding)
    seed = randomness.stream_key("pair samples", name, args.seed)
    samples = sample(args, size, setting, load(size, sft), rows, size.draws, seed=seed)
    drawn = []
    for group, texts in zip(samples.responses, samples.texts, strict=True):
        kept = []
        for response, text in zip(group, texts, strict=True):
            has_ended = response[-1] in stop
            if text.strip() and (has_ended or len(tokenizer.encode(encoding, text)) >= len(response)):
                kept.append(text)
        drawn.append(kept)
    return {name: json_bytes(drawn)}


def pairs_file(args, setting, sft, rows, reward, samples, name):
    """A pair for each row whose samples have different rewards, labelled by Bradley-Terry on the reward.

    Of a row's samples it takes the two whose rewards differ most: a label says more of them. samples:
    a file of `samples_file`."""
    rng = randomness.generator("labels", args.seed, Path(name).stem)
    pairs = []
    for row, texts in zip(rows, json.loads(samples.read_text()), strict=True):
        rewards = {text: reward(row, text) for text in texts}
        if len(set(rewards.values())) < 2:
            continue
        best, worst = max(rewards, key=rewards.get), min(rewards, key=rewards.get)
        best_wins = torch.sigmoid(torch.tensor(rewards[best] - rewards[worst]))
        pair = {"prompt": prompt_of(setting, row), "chosen": best, "rejected": worst}
        if rng.random() >= best_wins:
            pair.update(chosen=worst, rejected=best)
        pairs.append(pair)
    if not pairs:
        raise InputError(f"{sft}: no two of its samples have different rewards; more SFT would help")
    return {name: jsonl_bytes(pairs)}


# ---------------------------------------------------------------- measures


def measures_file(args, size, setting, folders, rows, reward):
    """The measures of a setting as its file measures.json, with this process's memory."""
    measures = measure(args, size, setting, folders, rows, reward)
    return {"measures.json": json_bytes({**measures, "peak_gib": round(peak_gib(), 2)})}


def measure(args, size, setting, folders, rows, reward):
    """Each policy on held-out documents, two samples of each at temperature 1 and the greedy one,
    and the reward model on held-out pairs, as results.json has it. folders: {policy: folder}."""
    sft = load(size, folders["sft"])
    policies = {}
    rewards, objectives = {}, {}  # {policy: (N, 2) fp64}
    for name, folder in folders.items():  # sft first: the others are compared with its rewards
        policy = load(size, folder)
        seed = randomness.stream_key("measures", args.seed)  # the same numbers for each policy
        samples = sample(args, size, setting, policy, rows, 2, seed=seed)
        greedy = [texts[0] for texts in sample(args, size, setting, policy, rows, 1, temperature=0).texts]
        logp = sequence_logps(policy, samples.prompts, samples.responses, size.micro)  # (N, 2)
        ref_logp = sequence_logps(sft, samples.prompts, samples.responses, size.micro)  # (N, 2)
        kl = kl_k1(logp, ref_logp)  # (N, 2)
        rewards[name] = rewards_of(samples.texts, rows, reward)
        objectives[name] = rewards[name] - size.kl * kl
        greedy_rewards = [reward(row, text) for row, text in zip(rows, greedy, strict=True)]
        mean_words = [statistics.mean(len(words(text)) for text in texts) for texts in samples.texts]
        policies[name] = {
            "reward": mean_se(rewards[name].mean(1)),
            "greedy_reward": mean_se(greedy_rewards),
            "win_rate": mean_se(win_rates(rewards[name], rewards["sft"])),
            "kl_to_ref": mean_se(kl.mean(1)),
            "objective": mean_se(objectives[name].mean(1)),
            "words": mean_se(mean_words),
            "example": greedy[0],
        }

    last = read_metrics(folders["rlhf"] / "reward")[-1]
    pairs = (folders["dpo"].parent / "test.jsonl").read_text().splitlines()
    labels = labels_right(map(json.loads, pairs), {prompt_of(setting, row): row for row in rows}, reward)
    return {
        "policies": policies,
        # Document by document, which removes what the two policies' rewards share.
        "rlhf_minus_dpo": mean_se((rewards["rlhf"] - rewards["dpo"]).mean(1)),
        "objective_gap": mean_se((objectives["rlhf"] - objectives["dpo"]).mean(1)),
        "rlhf_against_dpo": mean_se(win_rates(rewards["rlhf"], rewards["dpo"])),
        # Not the reference policy: what SFT imitates.
        "reference": mean_se([reward(row, summary_of(setting, row)) for row in rows]),
        "reward_model": {"nll": last["eval_loss"], "accuracy": last["eval_accuracy"], "pairs": len(pairs)},
        "labels_right": labels,
    }


def labels_right(pairs, row_of, reward):
    """The share of pairs whose chosen response has more true reward: what a perfect reward model reaches.

    row_of: {prompt: its document's row}."""
    right = []
    for pair in pairs:
        row = row_of[pair["prompt"]]
        right.append(float(reward(row, pair["chosen"]) > reward(row, pair["rejected"])))
    return mean_se(right)


def peak_gib():
    """The most memory that this process or one of its children has held, in GiB."""
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(process).ru_maxrss for process in processes) / 2**20  # KiB
