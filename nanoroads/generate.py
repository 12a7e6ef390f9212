"""Batched sampling with a KV cache. Each prompt is prefilled once, however many samples it has."""

from collections.abc import Sequence

import torch

from nanoroads.decoding import decode
from nanoroads.model import GPT
from nanoroads.sampling import sample_token  # noqa: F401  (for those who bring their own logits)


@torch.no_grad()
def stream(model, prompts, k, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None, seed=0):
    """Yields (tokens (P*k,), finished (P*k,) bool) per step, until all rows are finished or long enough.

    Row p*k + i is sample i of prompt p; its random numbers depend on the seed, the prompt and i alone.
    eos: the id that ends a response, or several; a finished row goes on yielding the one that it ended
    with. The caller may stop at any step. Raises InputError where logits are not finite; ValueError if a
    prompt is empty, prompt + max_new_tokens is over the model's block_size, or a number is out of range.
    On CUDA both the end and the logits are looked at every few steps: some more steps may follow the end,
    and some come before the error."""
    for step in draw_steps(model, prompts, k, max_new_tokens, (temperature, top_k, top_p), eos, seed):
        yield step.tokens, step.finished


def draw_steps(model, prompts, k, max_new_tokens, settings, eos, seed):
    """What `stream` yields, with log-probs: see decoding.Step. settings: (temperature, top_k, top_p)."""
    check_prompts(model, prompts, max_new_tokens)
    check_numbers(k, max_new_tokens, *settings)
    stop = torch.tensor(stop_list(eos), dtype=torch.int64, device=model.embedding.weight.device)
    return decode(model, prompts, k, max_new_tokens, stop, settings, seed)


def stop_list(eos):
    """The ids that end a response, as a list. eos: one id, several, or None."""
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def check_prompts(model, prompts, max_new_tokens):
    """Raises ValueError for a prompt that can't be answered."""
    if not prompts:
        raise ValueError("generate: no prompts")
    if not all(prompts):
        raise ValueError("generate: an empty prompt")
    width = max(len(prompt) for prompt in prompts)
    context = model.config.block_size
    if width + max_new_tokens > context:
        both = f"a prompt of {width} tokens and {max_new_tokens} new ones"
        raise ValueError(f"{both} exceed the model's context, {context}")


def check_numbers(k, max_new_tokens, temperature, top_k, top_p):
    """Raises ValueError naming the one that is out of range."""
    if k < 1 or max_new_tokens < 1:
        raise ValueError(f"generate: {k} samples of {max_new_tokens} tokens: both must be at least 1")
    if not temperature >= 0:
        raise ValueError(f"generate: temperature is {temperature}, not 0 or more")
    if top_k < 0:
        raise ValueError(f"generate: top_k is {top_k}, not 0 or more")
    if not top_p > 0:
        raise ValueError(f"generate: top_p is {top_p}, not above 0")


def generate(
    model: GPT,
    prompts: list[list[int]],
    k: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    eos: int | Sequence[int] | None = None,
    seed: int = 0,
) -> list[list[list[int]]]:
    """P prompts as token lists -> P lists of k responses, each ending in EOS unless it was cut off.

    eos: the id that ends a response, or several ids; the first that is drawn ends it.
    seed: any integer, preferably from `randomness.stream_key`. Sample i of a prompt is the same one
    whatever else is in the batch, but for rounding. Raises what `stream` raises."""
    options = {"top_k": top_k, "top_p": top_p, "eos": eos, "seed": seed}
    responses, _ = generate_with_logps(model, prompts, k, max_new_tokens, temperature, **options)
    return responses


@torch.no_grad()
def generate_with_logps(
    model, prompts, k, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None, seed=0
):
    """What `generate` returns, and the log-probs of its tokens in nats, as lists of the same shape.

    They are those of the distribution that was sampled from, temperature, top_k and top_p included."""
    stop = stop_list(eos)
    tokens, logps = [], []  # (P*k,) of each step
    # Autocast is opened anew at every step; within this outer one the weights that were cast are kept.
    with model.autocast():
        for step in draw_steps(model, prompts, k, max_new_tokens, (temperature, top_k, top_p), eos, seed):
            tokens.append(step.tokens)
            logps.append(step.logps)
    responses = [up_to_eos(row, stop) for row in torch.stack(tokens, dim=1).tolist()]
    response_logps = [
        row[: len(response)]
        for row, response in zip(torch.stack(logps, dim=1).tolist(), responses, strict=True)
    ]
    return by_prompt(responses, k), by_prompt(response_logps, k)


def by_prompt(rows, k):
    """P*k rows -> P lists of k."""
    return [rows[i : i + k] for i in range(0, len(rows), k)]


def up_to_eos(response, stop):
    """The tokens up to and including the first that is in the list `stop`."""
    for place, token in enumerate(response):
        if token in stop:
            return response[: place + 1]
    return response
