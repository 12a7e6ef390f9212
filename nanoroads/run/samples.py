"""What the policy says while it trains: a few prompts, answered at every evaluation."""

import json

import torch

from nanoroads.batch import pack
from nanoroads.errors import InputError, printable
from nanoroads.generate import generate
from nanoroads.progress import say
from nanoroads.randomness import stream_key
from nanoroads.run.folder import SAMPLES
from nanoroads.text import tokenizer
from nanoroads.weights.files import append_line

FEW = 3  # prompts that are answered
LONGEST = 80  # characters of a prompt, and of a response, that are printed


@torch.no_grad()
def show_samples(run, step, policy, rows, encoding, task, judge=None, reference=None, max_new_tokens=None):
    """Answer the first FEW different prompts of `rows`: OUT/samples.jsonl has all, the first is printed.

    Each prompt's random numbers are the same at every evaluation, so that answers can be compared;
    temperature 1. A line is {"step", "prompt", "response"}, on the map with "true_reward", and in
    RL with the "reward" of `judge`, which reads the reference's log-probs at --temperature.
    max_new_tokens: of RL's samples; None: the task's."""
    context = policy.config.block_size
    rows = rows.slice(0, 20 * FEW).unique_prompts()
    answered = [i for i in range(len(rows)) if len(rows.prompts[i]) < context][:FEW]
    if not answered:
        return
    rows = rows.select(answered)
    room = context - max(map(len, rows.prompts))
    length = min(room, max_new_tokens or task.max_new_tokens(room))
    seed = stream_key("shown samples", run.args.seed)
    eos = tokenizer.stop_ids(encoding)
    try:
        groups = generate(policy, rows.prompts, 1, length, eos=eos, seed=seed)  # one response each
    except InputError:  # logits that are not finite: `Run.log` says of which step, and what to do
        return
    responses = [group[0] for group in groups]

    records = []
    for text, response in zip(rows.texts, tokenizer.decode_all(encoding, responses), strict=True):
        records.append({"step": step + 1, "prompt": text, "response": response})
    if judge is not None:
        batch = pack(rows.prompts, groups, device=run.device)
        rewards = judge(batch, reference(batch, run.args.temperature), rows.texts, responses)  # (FEW,)
        for record, reward in zip(records, rewards.tolist(), strict=True):
            record["reward"] = round(reward, 6)
    for record, group in zip(records, groups, strict=True):
        record.update(task.true_reward([record["prompt"]], [group], encoding))  # {} where it is not known
        if run.writes:
            append_line(run.out / SAMPLES, json.dumps(record))
    say(line_of(records[0]))


def line_of(record):
    """A record of samples.jsonl in one line: the end of a long prompt, and the beginning of its answer."""
    prompt, response = record["prompt"], record["response"]
    if len(prompt) > LONGEST:
        prompt = "..." + prompt[-LONGEST:]
    if len(response) > LONGEST:
        response = response[:LONGEST] + "..."
    line = f"sample at step {record['step']}: {prompt!r} -> {response!r}"
    for name in ("reward", "true_reward"):
        if name in record:
            line += f", {name.replace('_', ' ')} {record[name]:.3f}"
    return printable(line)
