"""From logits to tokens: temperature, top-k, top-p, and one random number for each row."""

import torch
from torch.nn import functional as F

from nanoroads.errors import InputError

BLOCK = 256  # tokens whose probabilities are added up before any cumulative sum
IN_CACHE = 2**18  # fp64 numbers that fit the cache of a CPU's core: 2 MB


def sample_token(logits, u, temperature, top_k, top_p):
    """The tokens that `choose` draws, (N,). Raises InputError where `choose` can't draw."""
    tokens, logps = choose(logits, u, temperature, top_k, top_p)
    refuse_not_finite(logps)
    return tokens


def choose(logits, u, temperature, top_k, top_p):
    """logits (N, V), u (N,) uniform in [0, 1), fp64 where the device has it -> tokens (N,) and their
    log-probs (N,) in nats, in u's dtype, under the distribution that they were drawn from.

    temperature 0 is greedy; top_k 0 and top_p 1 keep every token. Ties with the k-th logit are kept.
    Nothing here waits for a GPU: where a row of logits has a NaN, an infinity, or nothing above
    -infinity, its log-prob is NaN, see `refuse_not_finite`."""
    largest, likeliest = logits.max(-1)  # (N,) each; on a CPU several times as fast as argmax
    largest = largest.to(u.dtype)
    if temperature == 0:
        return likeliest, largest - largest  # log 1; infinity - infinity and NaN - NaN are NaN
    # On a CPU a few rows at a time: all of them would go to memory and back for every line below.
    rows = max(1, IN_CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    tokens, logps = [], []
    for part, part_largest, part_u in zip(
        logits.split(rows), largest.split(rows), u.split(rows), strict=True
    ):
        # Subtract the largest logit first, so that no small temperature gives +infinity.
        part = (part.float() - part_largest.float()[:, None]).div_(max(temperature, 1e-30))
        part_tokens, part_logps = invert(keep_likeliest(part, top_k, top_p), part_u)
        tokens.append(part_tokens)
        logps.append(part_logps)
    return torch.cat(tokens), torch.cat(logps)


def keep_likeliest(logits, top_k, top_p):
    """logits (N, V) with -infinity for every token that top_k or top_p rules out."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (N, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    # The smallest set of tokens whose probabilities add up to top_p; the likeliest always stays.
    if top_p < 1:
        ordered, index = logits.sort(descending=True)  # (N, V) each
        probability = ordered.softmax(-1)
        mass_before = probability.cumsum(-1) - probability  # (N, V) of all likelier tokens
        removed = torch.zeros_like(mass_before, dtype=torch.bool).scatter(1, index, mass_before >= top_p)
        logits = logits.masked_fill(removed, -torch.inf)
    return logits


def invert(logits, u):
    """Invert the cumulative distribution. logits (N, V), the largest of each row 0; u (N,) -> tokens (N,)
    and their log-probs (N,).

    One random number per row, where torch.multinomial draws V. In fp64, u too: with 24 random bits rare
    tokens of a large vocabulary get wrong probabilities."""
    size = logits.shape[1]
    if size <= BLOCK:
        weights = logits.to(u.dtype).exp_()
        up_to = weights.cumsum(-1)  # (N, V) mass of a token and all before it
        total = up_to[:, -1:]  # (N, 1)
        token = first_above(up_to, u[:, None] * total)  # (N, 1)
    else:
        # A cumulative sum is slow: first by sums of blocks, then within the one that holds the draw.
        blocks = -(-size // BLOCK)
        weights = logits.new_zeros(len(logits), blocks * BLOCK, dtype=u.dtype)  # 0 behind the last token
        weights[:, :size] = logits
        weights[:, :size].exp_()
        total, token = invert_in_blocks(weights.view(len(logits), blocks, BLOCK), u)
    logps = (weights.gather(1, token) / total).log()
    return token.clamp(max=size - 1).squeeze(1), logps.squeeze(1)


def invert_in_blocks(weights, u):
    """weights (N, blocks, BLOCK) -> their sum (N, 1), and the place (N, 1) at which u of it lies before."""
    up_to = weights.sum(-1).cumsum(-1)  # (N, blocks) mass of a block and all before it
    total = up_to[:, -1:]
    mass = u[:, None] * total  # (N, 1) that lies before the draw
    block = first_above(up_to, mass)  # (N, 1)
    before = F.pad(up_to, (1, 0)).gather(1, block)  # (N, 1) mass of the blocks before it
    own = weights.gather(1, block[:, :, None].expand(-1, -1, BLOCK)).squeeze(1)  # (N, BLOCK)
    up_to_token = own.cumsum(-1)
    # Two sums of the same numbers may differ in their last bits. The draw must not fall behind the
    # block's last token of any probability.
    end = up_to_token[:, -1:] * (1 - torch.finfo(u.dtype).eps)
    return total, block * BLOCK + first_above(up_to_token, (mass - before).minimum(end))


def first_above(sums, mass):
    """sums (n, L), ascending; mass (n, 1) -> (n, 1) the first place whose sum is greater than mass.

    A token of probability 0 adds nothing to the sum, so it is never the first. (A GPU adds in a tree, in
    whose last bits a sum may fall; in fp64 that is too little to ever be seen.) NaN: the last place."""
    return torch.searchsorted(sums, mass, right=True).clamp(max=sums.shape[1] - 1)


def refuse_not_finite(logps):
    """Raises InputError if a token was drawn from logits that are not finite. logps: of any shape."""
    refuse_unless(torch.isfinite(logps).all())


def refuse_unless(all_finite):
    """Raises InputError unless the bool tensor all_finite is true."""
    if not all_finite:
        hint = "in training a lower --lr may help; the run's last checkpoint is kept"
        raise InputError(f"the policy's logits are not finite, so nothing can be sampled ({hint})")
