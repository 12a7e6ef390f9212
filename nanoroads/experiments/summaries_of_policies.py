"""Policies on documents, for experiments/summarize.py: their samples, pairs of these, and their measures.

What ends in _file returns {file name: bytes}, for `make_or_keep`. `args` is that of one seed, see
summarize.py beside this, where the sizes are, too.
"""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

import torch

from nanoroads import randomness
from nanoroads.errors import InputError
from nanoroads.generate import generate
from nanoroads.losses import kl_k1
from nanoroads.progress import tracked
from nanoroads.run.folder import read_metrics
from nanoroads.run.optim import chunks
from nanoroads.run.run import pick_device, pick_dtype
from nanoroads.run.speed import host_peak_mib
from nanoroads.score import mean_se, ranked_right, sequence_logps
from nanoroads.text import tokenizer
from nanoroads.text.encode import encode_row
from nanoroads.text.rouge import WORD, words
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import json_bytes, jsonl_bytes

# ---------------------------------------------------------------- what is asked and imitated


def prompt_of(setting, row):
    """What is asked of a document."""
    length = "two words" if setting == "two-word" else "one line"
    return f"{row['document']}\n\nIn {length}:"


def summary_of(setting, row):
    """What SFT imitates: a document's own summary, in two-word the first two words of it."""
    if setting != "two-word":
        return row["summary"]
    ends = [word.end() for word in WORD.finditer(row["summary"].lower())]
    return row["summary"][: ends[1]]


def tokens_of(size, setting):
    """The most tokens that a response may have, EOS among them."""
    return size.two_word_tokens if setting == "two-word" else size.tokens


def demos_file(setting, rows):
    """The demonstrations, which SFT imitates: rows {"prompt", "response"}."""
    demos = []
    for row in rows:
        demos.append({"prompt": prompt_of(setting, row), "response": f" {summary_of(setting, row)}"})
    return {"demos.jsonl": jsonl_bytes(demos)}


# ---------------------------------------------------------------- samples and pairs


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
    """size.draws samples of the SFT policy for each row, a list of texts, without those of no use as pairs.

    The commands that train read texts, encode them, cut them at the most tokens and put EOS behind what
    is shorter. Left out are empty texts, and a sample that was cut off, so has no EOS, whose text fewer
    tokens spell: it would be trained on with an EOS that nobody drew. The file lies beside the SFT
    policy, since one-line and hidden label the same samples."""
    encoding = tokenizer.get(str(args.model))
    stop = tokenizer.stop_ids(encoding)
    seed = randomness.stream_key("pair samples", name, args.seed)
    samples = sample(args, size, setting, load(size, sft), rows, size.draws, seed=seed)
    drawn = []
    for group, texts in zip(samples.responses, samples.texts, strict=True):
        kept = []
        for response, text in zip(group, texts, strict=True):
            has_ended = response[-1] in stop
            is_as_drawn = has_ended or len(tokenizer.encode(encoding, text)) >= len(response)
            if text.strip() and is_as_drawn:
                kept.append(text)
        drawn.append(kept)
    return {name: json_bytes(drawn)}


def pairs_file(args, setting, sft, rows, reward, samples, name):
    """A pair for each row whose samples have different rewards, labelled by Bradley-Terry on the reward.

    Of a row's samples it takes the two whose rewards differ most: a label says more of them, and they
    are easier to rank than any two. samples: a file of `samples_file`."""
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
    """The measures of a setting as its file measures.json, with the memory of all that ran so far."""
    measures = measure(args, size, setting, folders, rows, reward)
    return {"measures.json": json_bytes({**measures, "peak_gib": round(peak_gib(), 2)})}


def measure(args, size, setting, folders, rows, reward):
    """Each policy on held-out documents, two samples of each at temperature 1 and the greedy one,
    and the reward model on held-out pairs, as results.json has it. folders: {policy: folder}.

    All policies sample with the same random numbers, so what they differ by is less due to chance."""
    sft = load(size, folders["sft"])
    policies = {}
    rewards, objectives = {}, {}  # {policy: (N, 2) fp64}
    for name, folder in folders.items():  # sft first: the others are compared with its rewards
        policy = sft if name == "sft" else load(size, folder)
        seed = randomness.stream_key("measures", args.seed)
        samples = sample(args, size, setting, policy, rows, 2, seed=seed)
        greedy = [texts[0] for texts in sample(args, size, setting, policy, rows, 1, temperature=0).texts]
        logp = sequence_logps(policy, samples.prompts, samples.responses, size.micro)  # (N, 2)
        ref_logp = logp  # (N, 2)
        if policy is not sft:
            ref_logp = sequence_logps(sft, samples.prompts, samples.responses, size.micro)
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
    lines = (folders["rlhf"].parent / "test.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    # As many as the file has; the accuracy is without those that --skip-bad-rows has left out, of which
    # stage 1's metrics do not tell the number.
    n = len(pairs)
    labels = labels_right(pairs, {prompt_of(setting, row): row for row in rows}, reward)
    demos = [reward(row, summary_of(setting, row)) for row in rows]
    return {
        "policies": policies,
        # Document by document, which removes what the two policies' rewards share.
        "rlhf_minus_dpo": mean_se((rewards["rlhf"] - rewards["dpo"]).mean(1)),
        "objective_gap": mean_se((objectives["rlhf"] - objectives["dpo"]).mean(1)),
        "rlhf_against_dpo": mean_se(win_rates(rewards["rlhf"], rewards["dpo"])),
        "demos": mean_se(demos),  # the reward of what SFT imitates
        "reward_model": {"nll": last["eval_loss"], "accuracy": last["eval_accuracy"], "pairs": n},
        "labels_right": labels,
    }


def win_rates(one, other):
    """Rewards (N, k) of two policies -> (N,): the share of pairs of samples in which `one` has more.

    A tie is half a win."""
    margin = one[:, :, None] - other[:, None, :]  # (N, k, k): each sample against each
    return ranked_right(margin).mean((1, 2))


def rewards_of(texts, rows, reward):
    """Rewards of k texts for each of N rows, (N, k) fp64.

    They are rounded to fp32 on the way: to `ranked_right` rewards that differ only by rounding tie."""
    values = []
    for row, group in zip(rows, texts, strict=True):
        values.append([reward(row, text) for text in group])
    return torch.tensor(values, dtype=torch.float32).double()


def labels_right(pairs, row_of, reward):
    """The share of pairs whose chosen response has more true reward: what a perfect reward model reaches.

    pairs: dicts. row_of: {prompt: its document's row}."""
    right = []
    for pair in pairs:
        row = row_of[pair["prompt"]]
        right.append(float(reward(row, pair["chosen"]) > reward(row, pair["rejected"])))
    return mean_se(right)


def peak_gib():
    """The most memory that one process has held since the script began, in GiB; 0 on Windows.

    Of the script, which samples and measures, and of the commands that have ended, which train."""
    return max(host_peak_mib() or 0, host_peak_mib(of_children=True) or 0) / 2**10
