"""Batched sampling with a KV cache. Each prompt is prefilled once, whatever the number of its samples."""

import copy

import torch
from torch import nn

from nanoroads.model import KVCache

PACK = 1 << 20  # parameters; below, packing takes longer than it saves


class PackedLinear(nn.Module):
    """A matrix product whose weight is in the layout that oneDNN multiplies with: for the few rows of a decoding step it takes a
    third (fp32) or half (bf16) of the time of nn.Linear, which works through a plain weight at a fraction of memory's speed."""

    def __init__(self, linear, dtype, rows):
        super().__init__()
        self.dtype, self.bias = dtype, None if linear.bias is None else linear.bias.to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), rows)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")


def packed(model, dtype, rows):
    """The model to decode `rows` rows with in `dtype`: on an x86 CPU a twin with PackedLinear modules, elsewhere itself.

    The twin shares all parameters but the matrices, of which it holds a copy; the model stays as it is."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # where it was measured
    onednn = model.embedding.weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and x86
    onednn = onednn and (dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not onednn or "trunk" in vars(model) or sum(w.numel() for w in weights) < PACK:  # trunk: a compiled one
        return model
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, dtype, rows))
    return twin


def sample_token(logits, u, temperature, top_k, top_p):
    """logits (N, V), u (N,) uniform in [0, 1) -> tokens (N,). temperature 0 is greedy; top_k 0 and top_p 1 cut nothing.

    Of equally likely tokens at the edge of top_k all stay."""
    if temperature == 0:
        return logits.max(-1).indices  # on a CPU several times as fast as argmax
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:  # the smallest set of tokens whose probabilities add up to top_p; the likeliest always stays
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(1, index, before >= top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    # Invert the cumulative distribution: one random number a row, where torch.multinomial draws V.
    wide = torch.float32 if logits.device.type == "mps" else torch.float64  # mps has no fp64
    cdf = logits.softmax(-1, dtype=wide).cumsum(-1)  # (N, V)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return token.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def stream(model, prompts, k, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None, seed=0):
    """Yields (tokens (P*k,), finished (P*k,) bool) a step, until every row is finished or max_new_tokens is reached.

    Row p*k + i is sample i of prompt p. After its EOS a row yields EOS. The caller may stop at any step.
    Raises ValueError if a prompt is empty, or prompt + max_new_tokens is over the model's block_size."""
    if not prompts or not all(prompts):
        raise ValueError("generate: an empty prompt" if prompts else "generate: no prompts")
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    if width + max_new_tokens > (size := model.config.block_size):
        raise ValueError(f"a prompt of {width} tokens and {max_new_tokens} new ones exceed the model's context, {size}")
    # Prompts end in the same column: shorter ones are padded on the left, and the padding is masked (P, width).
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    padding = (width - lengths).to(device)  # (P,)
    column = torch.arange(width + max_new_tokens, device=device)
    visible = column >= padding[:, None]  # (P, width + max_new)
    padded = bool((lengths < width).any())
    mask = None
    if padded:
        causal = column[None, :width] <= column[:width, None]
        itself = torch.eye(width, dtype=torch.bool, device=device)  # a padding query must see something, or it is NaN
        mask = ((causal & visible[:, None, :width]) | itself).unsqueeze(1)  # (P, 1, width, width)

    model = packed(model, dtype, len(prompts) * k)
    cache = KVCache(model.config, len(prompts), width + max_new_tokens, device, dtype)
    position = (column[:width] - padding[:, None]).clamp(min=0)
    hidden = model.trunk(tokens, position, mask, cache)[:, -1]  # (P, D)
    if k > 1:
        cache.repeat(k)
        hidden, padding, visible = (x.repeat_interleave(k, dim=0) for x in (hidden, padding, visible))
    head = model.sampling_head()
    generator = torch.Generator(device=device).manual_seed(seed)
    token = torch.zeros(len(prompts) * k, dtype=torch.int64, device=device)
    finished = torch.zeros_like(token, dtype=torch.bool)
    rows = torch.arange(len(token), device=device)  # which of the P*k rows the model still works on
    for step in range(max_new_tokens):
        # Drawn for all rows, so that a sample does not depend on when the others finish.
        u = torch.rand(len(token), generator=generator, device=device)
        token = token.index_copy(0, rows, sample_token(head(hidden), u[rows], temperature, top_k, top_p))
        if eos is not None:
            token = torch.where(finished, eos, token)
            finished = finished | (token == eos)
        yield token, finished
        running = (~finished[rows]).nonzero().squeeze(1)
        if step + 1 == max_new_tokens or len(running) == 0:
            return
        if len(running) <= 0.75 * len(rows):  # finished rows go when enough of them are to pay for moving the cache
            cache.keep(running)
            rows, padding, visible = rows[running], padding[running], visible[running]
        end = width + step + 1
        mask = visible[:, None, None, :end] if padded else None
        hidden = model.trunk(token[rows, None], (width + step - padding)[:, None], mask, cache)[:, -1]  # (rows, D)


def generate(model, prompts, k, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, eos=None, seed=0):
    """prompts: list of P token lists -> P lists of k responses: token lists that end in EOS unless they were cut off.

    Deterministic for a seed (torch's generator of the model's device). Raises what `stream` raises."""
    steps = [token for token, _ in stream(model, prompts, k, max_new_tokens, temperature, top_k, top_p, eos, seed)]
    rows = torch.stack(steps, dim=1).tolist()  # (P*k, steps)
    if eos is not None:
        rows = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return [rows[p * k : (p + 1) * k] for p in range(len(prompts))]
