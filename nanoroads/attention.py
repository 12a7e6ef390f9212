"""Who sees whom. A model's trunk is handed one of these functions, and calls it in every layer:

    attend(layer_index, q, k, v) -> y         q, y (..., H, C); k, v (..., n_kv_head, C)

    causal(...)           rows of tokens (B, T): each sees itself and what is before it in its row
    of_groups(...)        a batch's stream of tokens (N,), groups of a prompt and its responses
    KVCache.attend        decoding: the newest tokens see all that the cache holds (cache.py). It alone
                          reads layer_index

A batch's stream (batch.py) is attended to in one of four ways, which agree but for rounding:

    by_segment   a CPU: one call for each prompt and each response, exact in its sizes
    by_group     short groups on a CPU, for which so many calls take longer than some padding: one call
                 in which each group is a row
    padded       short sequences in long groups on a CPU, a GPU without Triton, and what FlexAttention has
                 no kernel for (fp64, fewer than 16 channels): two calls, of prompts and of responses
    by_blocks    CUDA: FlexAttention, one kernel that skips the blocks of 128 x 128 tokens in which
                 nobody sees anybody

None of them has a mask of N x N. Shapes: H query heads share n_kv_head heads of keys and values, C
channels each; P tokens of a prompt and m of a response. A prompt with one response is one causal sequence
of P + m tokens, and has no rows or calls of its own; S counts the responses of the other prompts."""

import functools

import torch
from torch.nn import functional as F

from kernels.api import HAS_TRITON

SHORT = 32  # tokens: with shorter prompts and responses, on average, a CPU pads
SHORT_GROUP = 256  # tokens: up to here a group may have a mask of its own, T x T
BLOCK = 128  # tokens in a block of FlexAttention


def causal(layer_index, q, k, v):
    """Plain causal attention: q (B, T, H, C), k and v (B, T, n_kv_head, C) -> (B, T, H, C)."""
    return attention(q, k, v, is_causal=True)


def of_groups(group_lengths, device):
    """The attend function of a stream. group_lengths: of each group [P, m, m, ...], its prompt's length
    and those of its responses.

    torch.compile leaves it out of a trunk: it would compile each batch's lengths anew."""
    kind = torch.device(device).type
    mean_length = sum(map(sum, group_lengths)) / sum(map(len, group_lengths))
    if kind == "cuda" and HAS_TRITON:
        # Not recursive: the kernel inside is a compiled function of its own.
        return torch.compiler.disable(by_blocks(group_lengths, device), recursive=False)
    if kind == "cpu" and mean_length >= SHORT:
        return torch.compiler.disable(by_segment(group_lengths, device))
    if kind == "cpu" and max(map(sum, group_lengths)) <= SHORT_GROUP:
        return torch.compiler.disable(by_group(group_lengths, device))
    return torch.compiler.disable(padded(group_lengths, device))


def attention(q, k, v, mask=None, is_causal=False):
    """scaled_dot_product_attention with the heads behind the tokens: q (B, T, H, C), k and v
    (B, L, n_kv_head, C) -> (B, T, H, C). mask: bool, or 0 and -inf, (T, L) or (B, 1, T, L)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    has_flash = mask is None and q.dtype in (torch.float16, torch.bfloat16)
    if grouped and q.is_cuda and not has_flash:
        # With grouped keys CUDA would compute the whole (T, L) matrix of scores. The memory-efficient
        # kernel does not, but wants a key for every query head.
        repeats = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(repeats, dim=1)
        v = v.repeat_interleave(repeats, dim=1)
        grouped = False
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16:
        # The backward pass of torch's CPU kernel takes four times as long in bf16 as in fp32.
        if mask is not None and mask.dtype == torch.bfloat16:
            mask = mask.float()
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)
        return y.bfloat16().transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=grouped)
    return y.transpose(1, 2)


# ---------------------------------------------------------------- a call for each prompt and response


def by_segment(group_lengths, device):
    """Attention to a stream in a plain loop over its groups."""
    piece_sizes = []  # of the stream, in tokens: the queries of one call
    longest_prompt = 0
    longest_response = 0
    for prompt_length, *response_lengths in group_lengths:
        longest_prompt = max(longest_prompt, prompt_length)
        longest_response = max([longest_response, *response_lengths])
        if len(response_lengths) == 1:  # a prompt and its only response are one causal sequence
            piece_sizes.append(prompt_length + response_lengths[0])
        else:
            piece_sizes += [prompt_length, *response_lengths]

    @functools.cache
    def whole_mask(dtype):
        """0 or -inf, for the longest response behind the longest prompt; for any other, a part of it will
        do. Made once for all layers, and of the scores' dtype: a bool mask would be turned into one, and
        kept for the backward, in every layer."""
        not_seen = torch.full((longest_response, longest_prompt + longest_response), -torch.inf, dtype=dtype)
        return not_seen.triu(longest_prompt + 1).to(device)

    def attend(layer_index, q, k, v):
        # Split once: the backward of each slice would write gradients of the whole stream.
        q_pieces, k_pieces, v_pieces = (iter(x[None].split(piece_sizes, dim=1)) for x in (q, k, v))
        out = []
        for prompt_length, *response_lengths in group_lengths:
            k_prompt, v_prompt = next(k_pieces), next(v_pieces)  # (1, P, n_kv_head, C)
            out.append(attention(next(q_pieces), k_prompt, v_prompt, is_causal=True))  # (1, P, H, C)
            if len(response_lengths) == 1:
                continue  # it was in the same piece
            for response_length in response_lengths:
                k_seen = torch.cat((k_prompt, next(k_pieces)), dim=1)  # (1, P + m, n_kv_head, C)
                v_seen = torch.cat((v_prompt, next(v_pieces)), dim=1)
                columns = slice(longest_prompt - prompt_length, longest_prompt + response_length)
                mask = whole_mask(q.dtype)[:response_length, columns]  # (m, P + m)
                out.append(attention(next(q_pieces), k_seen, v_seen, mask))  # (1, m, H, C)
        return torch.cat(out, dim=1)[0]  # (N, H, C)

    return attend


# ---------------------------------------------------------------- one or two calls, with padding


def by_group(group_lengths, device):
    """Attention to a stream of which each group becomes a row, T tokens long, with a mask of T x T."""
    rows = []  # (first token, number of tokens) of each group
    start = 0
    for lengths in group_lengths:
        length = sum(lengths)
        rows.append((start, length))
        start += length
    index, is_token = rectangle(rows)  # (G, T) each
    mask = None  # where each prompt has one response: all is causal
    if max(map(len, group_lengths)) > 2:
        mask = upload(group_mask(group_lengths, is_token), device)
    if is_token.all():  # the groups are equally long: the stream is already what the rows are

        def attend_without_padding(layer_index, q, k, v):
            q_rows, k_rows, v_rows = (x.unflatten(0, index.shape) for x in (q, k, v))
            out = attention(q_rows, k_rows, v_rows, mask, is_causal=mask is None)  # (G, T, H, C)
            return out.flatten(0, 1)  # (N, H, C)

        return attend_without_padding

    place = upload(is_token.flatten().nonzero().squeeze(1), device)  # (N,) of each token among the rows
    index = upload(index, device)

    def attend(layer_index, q, k, v):
        q_rows, k_rows, v_rows = (gather(x, index) for x in (q, k, v))  # (G, T, heads, C) each
        out = attention(q_rows, k_rows, v_rows, mask, is_causal=mask is None)  # (G, T, H, C)
        return gather(out.flatten(0, 1), place)  # (N, H, C)

    return attend


def group_mask(group_lengths, is_token):
    """is_token (G, T) -> (G, 1, T, T) bool: a query sees its prompt and its own response, no later than
    itself."""
    of_tokens = []  # 0 in a prompt, 1..K in the responses
    for lengths in group_lengths:
        for number, length in enumerate(lengths):
            of_tokens += [number] * length
    segment = torch.full(is_token.shape, -1)
    segment[is_token] = torch.tensor(of_tokens)
    longest = is_token.shape[1]
    shared = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])  # (G, query, key)
    not_later = torch.ones(longest, longest, dtype=torch.bool).tril()
    return (shared & not_later)[:, None]


def padded(group_lengths, device):
    """Attention to a stream gathered into rows of equal length: one call for what is causal, and one in
    which each response is a row that sees its prompt and itself."""
    causal_rows, response_rows, prompt_rows = [], [], []  # (first token, number of tokens) of each row
    start = 0
    for prompt_length, *response_lengths in group_lengths:
        if len(response_lengths) == 1:  # a prompt and its only response are one causal sequence
            length = prompt_length + response_lengths[0]
            causal_rows.append((start, length))
            start += length
            continue
        prompt_row = (start, prompt_length)
        causal_rows.append(prompt_row)
        start += prompt_length
        for response_length in response_lengths:
            response_rows.append((start, response_length))
            prompt_rows.append(prompt_row)
            start += response_length

    causal_index, causal_is_token = rectangle(causal_rows)  # (A, L): A causal sequences, L the longest
    own_index, own_is_token = rectangle(response_rows)  # (S, m), m the longest; S may be 0
    prompt_index, is_prompt = rectangle(prompt_rows)  # (S, P)
    key_index = torch.cat((prompt_index, own_index), 1)  # (S, P + m)

    # Where each token of the stream is among the rows, laid end to end: the inverse of index, whose
    # padding is left out.
    index = torch.cat((causal_index.flatten(), own_index.flatten()))
    is_token = torch.cat((causal_is_token.flatten(), own_is_token.flatten()))
    place = torch.empty(start, dtype=torch.int64)
    place[index[is_token]] = is_token.nonzero().squeeze(1)

    # A response's query sees the whole prompt, and the response up to itself.
    longest = own_index.shape[1]
    not_later = torch.ones(longest, longest, dtype=torch.bool).tril()
    sees_prompt = is_prompt[:, None, :].expand(-1, longest, -1)  # (S, m, P)
    mask = torch.cat((sees_prompt, not_later.expand(len(own_index), -1, -1)), 2)[:, None]  # (S, 1, m, P + m)

    tables = (causal_index, own_index, key_index, place, mask)
    causal_index, own_index, key_index, place, mask = (upload(table, device) for table in tables)

    def attend(layer_index, q, k, v):
        q_rows, k_rows, v_rows = (gather(x, causal_index) for x in (q, k, v))  # (A, L, heads, C) each
        out = attention(q_rows, k_rows, v_rows, is_causal=True).flatten(0, 1)  # (A L, H, C)
        if response_rows:
            k_rows, v_rows = gather(k, key_index), gather(v, key_index)  # (S, P + m, n_kv_head, C) each
            of_responses = attention(gather(q, own_index), k_rows, v_rows, mask)  # (S, m, H, C)
            out = torch.cat((out, of_responses.flatten(0, 1)))
        return gather(out, place)  # (N, H, C)

    return attend


def rectangle(rows):
    """(start, length) of B rows -> (B, L) int64 places in the stream, and (B, L) bool: not padding.

    Padding repeats a row's last token."""
    table = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)  # (B, 2), also where B is 0
    start = table[:, :1]  # (B, 1)
    length = table[:, 1:]  # (B, 1)
    longest = max([row_length for _, row_length in rows], default=0)
    column = torch.arange(longest)  # (L,)
    return start + column.minimum(length - 1), column < length


def gather(x, index):
    """x (N, heads, C), index of any shape -> (*index, heads, C).

    F.embedding, not x[index]: on a CPU the backward of indexing sums the gradients of what is read
    several times in the order of threads, which differs from run to run."""
    return F.embedding(index, x.flatten(1)).unflatten(-1, x.shape[1:])


# ---------------------------------------------------------------- FlexAttention


@functools.cache
def compiled_flex_attention():
    """Compiled once for all lengths; again for other dtypes or numbers of heads, with gradients and
    without."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def by_blocks(group_lengths, device):
    """Attention to a stream by FlexAttention (Dong et al., 2412.05496): only blocks of BLOCK x BLOCK
    tokens in which somebody sees somebody are computed."""
    # Imported here, because it takes 0.3 s and a CPU does without.
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    prompt_start, prompt_end, own_start = [], [], []  # of each token; own: of its prompt or response
    tokens = sum(map(sum, group_lengths))
    blocks = (tokens + BLOCK - 1) // BLOCK  # rounded up
    is_seen = torch.zeros(blocks, blocks, dtype=torch.bool)  # (query blocks, key blocks)
    start = 0
    for lengths in group_lengths:
        first = start  # token of the group, and of its prompt
        after_prompt = first + lengths[0]
        prompt_blocks = slice(first // BLOCK, (after_prompt - 1) // BLOCK + 1)
        for length in lengths:
            end = start + length
            prompt_start += [first] * length
            prompt_end += [after_prompt] * length
            own_start += [start] * length
            own_blocks = slice(start // BLOCK, (end - 1) // BLOCK + 1)
            is_seen[own_blocks, prompt_blocks] = True
            is_seen[own_blocks, own_blocks] = True
            start = end
    is_seen = is_seen.tril()
    count = is_seen.sum(1, dtype=torch.int32)  # (blocks,) key blocks of each query block
    # Of each query block the key blocks, those seen first; FlexAttention reads `count` of them.
    seen_first = is_seen.int().argsort(dim=1, descending=True, stable=True).int()  # (blocks, blocks)
    tables = (torch.tensor(prompt_start), torch.tensor(prompt_end), torch.tensor(own_start))
    prompt_start, prompt_end, own_start = (upload(table, device) for table in tables)

    def sees(_batch, _head, query, key):
        of_prompt = (prompt_start[query] <= key) & (key < prompt_end[query])
        return (key <= query) & (of_prompt | (own_start[query] <= key))

    block_mask = BlockMask.from_kv_blocks(
        upload(count[None, None], device),
        upload(seen_first[None, None], device),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(start, start),
    )

    @torch.compiler.disable
    @functools.cache
    def without_kernel():
        return torch.compiler.disable(padded(group_lengths, device))

    def attend(layer_index, q, k, v):
        if q.is_cuda and (q.shape[-1] < 16 or q.dtype == torch.float64):  # there is no kernel for these
            return without_kernel()(layer_index, q, k, v)
        kernel = compiled_flex_attention() if q.is_cuda else flex_attention
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, N, C) each
        y = kernel(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
        return y[0].transpose(0, 1)  # (N, H, C)

    return attend


def upload(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """x on the device, without waiting for it: only from pinned memory is a copy asynchronous."""
    if torch.device(device).type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=torch.device(device).type == "cuda")
