"""Policies on documents, for experiments/summarize.py: their samples, pairs of these, and their measures.

What ends in _file returns {file name: bytes}, for `make_or_keep`. `args` is that of one seed, see
summarize.py beside this, where the sizes are, too.
"""

import json
import resource
import statistics
from itertools import combinations
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
from nanoroads.text.rouge import words
from nanoroads.weights.checkpoint import load_policy
from nanoroads.weights.files import json_bytes, jsonl_bytes

PROMPT = "{document}\n\nIn one line:"


def demos_file(setting, rows):
    """What SFT imitates, rows {"prompt", "response"}: the summaries, or their first two words."""
    demos = []
    for row in rows:
        summary = row["summary"]
        if setting == "two-word":
            summary = " ".join(summary.split()[:2])
        demos.append({"prompt": PROMPT.format(**row), "response": f" {summary}"})
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


def sample(args, size, policy, rows, k, temperature=1.0, seed=0):
    """k responses of a policy to the prompt of each row: Samples."""
    encoding = tokenizer.get(str(args.model))
    eos = tokenizer.stop_ids(encoding)
    prompts = [tokenizer.encode(encoding, PROMPT.format(**row)) for row in rows]
    responses = []
    for chunk in tracked(chunks(prompts, 64), "sampling", "batch"):
        responses += generate(policy, chunk, k, size.tokens, temperature, eos=eos, seed=seed)
    return Samples(prompts, responses, [tokenizer.decode_all(encoding, group) for group in responses])


def samples_file(args, size, sft, rows, name):
    """The texts of size.draws samples for each row, less those that are empty or did not end within
    size.tokens. They lie beside the SFT policy: one-line and hidden label the same samples."""
    stop = tokenizer.stop_ids(tokenizer.get(str(args.model)))
    seed = randomness.stream_key("pair samples", name, args.seed)
    samples = sample(args, size, load(size, sft), rows, size.draws, seed=seed)
    drawn = []
    for group, texts in zip(samples.responses, samples.texts, strict=True):
        whole = []
        for response, text in zip(group, texts, strict=True):
            if len(response) > 1 and response[-1] in stop:  # more than the EOS alone
                whole.append(text)
        drawn.append(whole)
    return {name: json_bytes(drawn)}


def pairs_file(args, size, sft, rows, reward, samples, name):
    """A pair for each row that has two different samples, labelled by Bradley-Terry on the reward.

    Of a row's samples it takes the two whose rewards differ most: a label says more of them. samples:
    a file of `samples_file`."""
    rng = randomness.generator("labels", args.seed, Path(name).stem)
    pairs = []
    for row, texts in zip(rows, json.loads(samples.read_text()), strict=True):
        rewards = {text: reward(row, text) for text in texts}
        if len(rewards) < 2:
            continue
        two = combinations(rewards, 2)
        first, second = max(two, key=lambda pair: abs(rewards[pair[0]] - rewards[pair[1]]))
        first_wins = torch.sigmoid(torch.tensor(rewards[first] - rewards[second]))
        pair = {"prompt": PROMPT.format(**row), "chosen": first, "rejected": second}
        if rng.random() >= first_wins:
            pair.update(chosen=second, rejected=first)
        pairs.append(pair)
    if not pairs:
        why = f"no two of its samples differ and both end within {size.tokens} tokens"
        raise InputError(f"{sft}: {why}; more SFT would help")
    return {name: jsonl_bytes(pairs)}


# ---------------------------------------------------------------- measures


def measures_file(args, size, folders, rows, reward):
    """The measures of a setting as its file measures.json, with this process's memory."""
    measures = measure(args, size, folders, rows, reward)
    return {"measures.json": json_bytes({**measures, "peak_gib": round(peak_gib(), 2)})}


def measure(args, size, folders, rows, reward):
    """Each policy on held-out documents, two samples of each at temperature 1 and the greedy one,
    and the reward model on held-out pairs, as results.json has it. folders: {policy: folder}."""
    sft = load(size, folders["sft"])
    policies = {}
    rewards = {}  # {policy: (N, 2) fp64}
    for name, folder in folders.items():  # sft first: the others are compared with its rewards
        policy = load(size, folder)
        samples = sample(args, size, policy, rows, 2, seed=randomness.stream_key("measures"))
        greedy = [texts[0] for texts in sample(args, size, policy, rows, 1, temperature=0).texts]
        logp = sequence_logps(policy, samples.prompts, samples.responses, size.micro)  # (N, 2)
        ref_logp = sequence_logps(sft, samples.prompts, samples.responses, size.micro)  # (N, 2)
        rewards[name] = rewards_of(samples.texts, rows, reward)
        greedy_rewards = [reward(row, text) for row, text in zip(rows, greedy, strict=True)]
        mean_words = [statistics.mean(len(words(text)) for text in texts) for texts in samples.texts]
        policies[name] = {
            "reward": mean_se(rewards[name].mean(1)),
            "greedy_reward": mean_se(greedy_rewards),
            "win_rate": mean_se(win_rates(rewards[name], rewards["sft"])),
            "kl_to_ref": mean_se(kl_k1(logp, ref_logp).mean(1)),
            "words": mean_se(mean_words),
            "example": greedy[0],
        }

    last = read_metrics(folders["rlhf"] / "reward")[-1]
    pair_count = (folders["dpo"].parent / "test.jsonl").read_text().count("\n")
    return {
        "policies": policies,
        # Document by document, which removes what the two policies' rewards share.
        "rlhf_minus_dpo": mean_se(rewards["rlhf"].mean(1) - rewards["dpo"].mean(1)),
        "rlhf_against_dpo": mean_se(win_rates(rewards["rlhf"], rewards["dpo"])),
        # Not the reference policy: the documents' own summaries.
        "reference": mean_se([reward(row, row["summary"]) for row in rows]),
        "reward_model": {"nll": last["eval_loss"], "accuracy": last["eval_accuracy"], "pairs": pair_count},
    }


def peak_gib():
    """The most memory that this process or one of its children has held, in GiB."""
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(process).ru_maxrss for process in processes) / 2**20  # KiB
