"""Batched sampling with a KV cache. Each prompt is prefilled once, however many samples it has."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from nanoroads.cache import KVCache
from nanoroads.errors import InputError
from nanoroads.model import GPT
from nanoroads.randomness import uniform
from nanoroads.weights.packed import decoding_twin


def sample_token(logits, u, temperature, top_k, top_p):
    """logits (N, V), u (N,) uniform in [0, 1), fp64 where the device has it -> tokens (N,).

    temperature 0 is greedy; top_k 0 and top_p 1 keep every token. Ties with the k-th logit are kept.
    Raises InputError where a row of logits has a NaN, an infinity, or nothing above -infinity."""
    largest, likeliest = logits.max(-1)  # (N,) each; on a CPU several times as fast as argmax
    if not torch.isfinite(largest).all():  # a NaN is the largest of its row
        hint = "in training a lower --lr may help; the run's last checkpoint is kept"
        raise InputError(f"the policy's logits are not finite, so nothing can be sampled ({hint})")
    if temperature == 0:
        return likeliest
    # Subtract the largest logit first, so that no small temperature gives +infinity.
    logits = (logits.float() - largest.float()[:, None]) / max(temperature, 1e-30)
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    # The smallest set of tokens whose probabilities add up to top_p; the likeliest always stays.
    if top_p < 1:
        ordered, index = logits.sort(descending=True)  # (N, V) each
        probability = ordered.softmax(-1)
        mass_before = probability.cumsum(-1) - probability  # (N, V) of all likelier tokens
        removed = torch.zeros_like(mass_before, dtype=torch.bool).scatter(1, index, mass_before >= top_p)
        logits = logits.masked_fill(removed, -torch.inf)
    # Invert the cumulative distribution: one random number per row, where torch.multinomial draws V.
    # In fp64, u too: with 24 random bits rare tokens of a large vocabulary get wrong probabilities.
    cdf = logits.softmax(-1, dtype=u.dtype).cumsum(-1)  # (N, V)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp(max=logits.shape[-1] - 1)


class Running(NamedTuple):
    """The rows that are still being written; when some are finished, all three shrink together."""

    index: torch.Tensor  # (N,) which of the P*k rows each is
    padding: torch.Tensor  # (N,) columns of padding on its left
    visible: torch.Tensor  # (N, width + max_new_tokens) bool, False for the padding

    def keep(self, kept):
        """Only these rows, (M,) int64."""
        return Running(self.index[kept], self.padding[kept], self.visible[kept])


def prefill(model, prompts, cache, k, max_new_tokens):
    """Run P prompts through the trunk -> the hidden states of their last tokens (P*k, D), and Running.

    Prompts end in the same column: shorter ones are padded on the left, and the padding is masked."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    padded = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(padded, device=device)  # (P, width)
    padding = (width - lengths).to(device)  # (P,)
    column = torch.arange(width + max_new_tokens, device=device)
    visible = column >= padding[:, None]  # (P, width + max_new_tokens)

    if bool((lengths < width).any()):
        causal = column[None, :width] <= column[:width, None]
        # A padding query sees itself; with nothing to see it would be NaN.
        itself = torch.eye(width, dtype=torch.bool, device=device)
        cache.mask = ((causal & visible[:, None, :width]) | itself).unsqueeze(1)  # (P, 1, width, width)
    position = (column[:width] - padding[:, None]).clamp(min=0)
    hidden = model.trunk(tokens, position, cache.attend)[:, -1]  # (P, D)

    # From here on each sample is a row; the samples of a prompt begin with copies of its cache.
    if k > 1:
        cache.repeat(k)
        hidden = hidden.repeat_interleave(k, dim=0)
        padding = padding.repeat_interleave(k, dim=0)
        visible = visible.repeat_interleave(k, dim=0)
    return hidden, Running(torch.arange(len(prompts) * k, device=device), padding, visible)


@torch.no_grad()
def stream(model, prompts, k, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None, seed=0):
    """Yields (tokens (P*k,), finished (P*k,) bool) per step, until all rows are finished or long enough.

    Row p*k + i is sample i of prompt p; its random numbers depend on the seed, the prompt and i alone.
    eos: the id that ends a response, or several; a finished row goes on yielding the one that it ended
    with. The caller may stop at any step. Raises InputError where logits are not finite; ValueError if a
    prompt is empty, or prompt + max_new_tokens is over the model's block_size."""
    width = check_prompts(model, prompts, max_new_tokens)
    any_padding = any(len(prompt) < width for prompt in prompts)
    device = model.embedding.weight.device
    dtype = model.compute_dtype or model.embedding.weight.dtype
    model = decoding_twin(model, dtype, len(prompts) * k)  # the same model; faster matrices on an x86 CPU
    cache = KVCache(model.config, len(prompts), width + max_new_tokens, device, dtype)
    with model.autocast():
        hidden, running = prefill(model, prompts, cache, k, max_new_tokens)  # (P*k, D)
        head = model.sampling_head()
    stop = torch.tensor(stop_list(eos), dtype=torch.int64, device=device)
    u = torch.tensor(uniform(prompts, k, max_new_tokens, seed))  # (P*k, max_new_tokens) fp64
    if device.type == "mps":  # it has no fp64, in which numbers just below 1 stay below it
        u = u.float().clamp(max=1 - 2**-24)
    u = u.to(device)
    tokens = torch.zeros(len(prompts) * k, dtype=torch.int64, device=device)
    finished = torch.zeros_like(tokens, dtype=torch.bool)

    for step in range(max_new_tokens):
        with model.autocast():
            logits = head(hidden)  # (N, V), N rows that are still being written
        drawn = sample_token(logits, u[running.index, step], temperature, top_k, top_p)  # (N,)
        # Rows that have finished but are not dropped yet are drawn, too; they keep their EOS.
        tokens = torch.where(finished, tokens, tokens.index_copy(0, running.index, drawn))
        finished = finished | torch.isin(tokens, stop)
        yield tokens, finished

        unfinished = (~finished[running.index]).nonzero().squeeze(1)
        if step + 1 == max_new_tokens or len(unfinished) == 0:
            return
        # Drop finished rows once a quarter are done; earlier, copying the cache costs more than it saves.
        if len(unfinished) <= 0.75 * len(running.index):
            cache.keep(unfinished)
            running = running.keep(unfinished)
        if any_padding:
            cache.mask = running.visible[:, None, None, : width + step + 1]
        position = (width + step - running.padding)[:, None]
        with model.autocast():
            hidden = model.trunk(tokens[running.index, None], position, cache.attend)[:, -1]  # (N, D)


def stop_list(eos):
    """The ids that end a response, as a list. eos: one id, several, or None."""
    if eos is None:
        return []
    return [eos] if isinstance(eos, int) else list(eos)


def check_prompts(model, prompts, max_new_tokens):
    """Raises ValueError for a prompt that can't be answered. Returns the longest one's length, in tokens."""
    if not prompts:
        raise ValueError("generate: no prompts")
    if not all(prompts):
        raise ValueError("generate: an empty prompt")
    width = max(len(prompt) for prompt in prompts)
    context = model.config.block_size
    if width + max_new_tokens > context:
        both = f"a prompt of {width} tokens and {max_new_tokens} new ones"
        raise ValueError(f"{both} exceed the model's context, {context}")
    return width


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
    # `stream` opens autocast at every step; within this outer one the weights that were cast are kept.
    with model.autocast():
        columns = [
            token
            for token, _ in stream(model, prompts, k, max_new_tokens, temperature, top_k, top_p, eos, seed)
        ]
    responses = torch.stack(columns, dim=1).tolist()  # (P*k, steps)
    responses = [up_to_eos(response, stop_list(eos)) for response in responses]
    return [responses[p * k : (p + 1) * k] for p in range(len(prompts))]


def up_to_eos(response, stop):
    """The tokens up to the first that is in the list `stop`, which stays."""
    for place, token in enumerate(response):
        if token in stop:
            return response[: place + 1]
    return response
