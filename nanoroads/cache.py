"""The keys and values of what has been read and sampled so far: the third way to attend."""

import torch
from torch.nn import functional as F

from nanoroads import attention
from nanoroads.attention import upload


class KVCache:
    """The keys and values of N rows, in all layers. Rows begin as prompts and grow by a token at a time.

    Prompts end in the same column, so that the newest tokens of all rows have the same one. The first
    `padding` columns of a shorter prompt stay empty, and nobody looks at them."""

    def __init__(self, config, prompts, new_tokens, device="cpu", dtype=None):
        """prompts: P token lists, a row each. new_tokens: there is room for so many behind them."""
        self.prompts = prompts
        self.used = max(map(len, prompts))  # columns
        shape = (len(prompts), config.n_kv_head, self.used + new_tokens, config.head_size)
        # One (N, n_kv_head, columns, C) tensor per layer.
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        padding = torch.tensor([self.used - len(prompt) for prompt in prompts])
        self.any_padding = bool(padding.any())
        self.padding = upload(padding, device)  # (N,)
        self.bias = None  # added to the scores of the newest tokens, (N, 1, 1, columns); None: nothing is

    def read_prompts(self, model):
        """Run the prompts through the trunk as one stream of tokens, without padding -> the hidden states
        of their last tokens (P, D)."""
        tokens, position, row, column = [], [], [], []  # of each token of the stream
        for i, prompt in enumerate(self.prompts):
            tokens += prompt
            position += range(len(prompt))
            row += [i] * len(prompt)
            column += range(self.used - len(prompt), self.used)
        stream = upload(torch.tensor([tokens, position, row, column]), self.padding.device)
        tokens, position, row, column = stream  # (L,) each
        among_prompts = attention.of_groups([[len(prompt)] for prompt in self.prompts], stream.device)

        @torch.compiler.disable(recursive=False)  # as `of_groups` does
        def attend(layer_index, q, k, v):
            self.k[layer_index][row, :, column] = k
            self.v[layer_index][row, :, column] = v
            return among_prompts(layer_index, q, k, v)

        hidden = model.trunk(tokens, position, attend)  # (L, D)
        ends = torch.tensor([len(prompt) for prompt in self.prompts]).cumsum(0)  # (P,)
        return hidden[upload(ends - 1, hidden.device)]

    def next_position(self):
        """Every row gets a token more -> its position in its row, (N,) int64."""
        self.used += 1
        if self.any_padding:
            self.bias = self.hide(self.padding[:, None] > self.columns(self.used))
        return self.used - 1 - self.padding

    def attend(self, layer_index, q, k, v):
        """q (N, H, C), k and v (N, n_kv_head, C) of the newest tokens -> (N, H, C)."""
        self.k[layer_index].select(2, self.used - 1).copy_(k)
        self.v[layer_index].select(2, self.used - 1).copy_(v)
        seen_k = self.k[layer_index].narrow(2, 0, self.used)  # (N, n_kv_head, used, C)
        seen_v = self.v[layer_index].narrow(2, 0, self.used)
        return newest_token(q, seen_k, seen_v, self.bias)

    def columns(self, count):
        return torch.arange(count, device=self.padding.device)

    def hide(self, unseen):
        """unseen (N, columns) bool -> the bias that hides them, in the dtype in which it is added."""
        bias = torch.zeros_like(unseen, dtype=self.k[0].dtype).masked_fill(unseen, -torch.inf)
        return bias[:, None, None]

    def repeat(self, times):
        """Each row `times` times, so that one prompt, read once, serves all of its samples."""
        for layer_index in range(len(self.k)):
            self.k[layer_index] = self.k[layer_index].repeat_interleave(times, dim=0)
            self.v[layer_index] = self.v[layer_index].repeat_interleave(times, dim=0)
        self.padding = self.padding.repeat_interleave(times)

    def keep(self, rows):
        """Only these rows, (M,) int64."""
        for layer_index in range(len(self.k)):
            self.k[layer_index] = self.k[layer_index][rows]
            self.v[layer_index] = self.v[layer_index][rows]
        self.padding = self.padding[rows]


class FixedCache(KVCache):
    """A cache that always attends to all of its columns, those to come hidden: no shape depends on how many
    are used, and that number is on the device. So a step can be recorded as a CUDA graph. From then on the
    graph knows the cache's tensors by their addresses: rows are repeated before, and none is dropped."""

    def __init__(self, config, prompts, new_tokens, device="cpu", dtype=None):
        super().__init__(config, prompts, new_tokens, device, dtype)
        self.newest = torch.full((1,), self.used - 1, device=device)  # the newest tokens' column

    def next_position(self):
        self.newest += 1
        column = self.columns(self.k[0].shape[2])
        self.bias = self.hide((self.padding[:, None] > column) | (column > self.newest))
        return self.newest - self.padding

    def attend(self, layer_index, q, k, v):
        self.k[layer_index].index_copy_(2, self.newest, k[:, :, None])
        self.v[layer_index].index_copy_(2, self.newest, v[:, :, None])
        return newest_token(q, self.k[layer_index], self.v[layer_index], self.bias)


def newest_token(q, k, v, bias):
    """One query of each row, q (N, H, C), looks at k, v (N, n_kv_head, L, C) -> (N, H, C).

    Query heads that share a key head are treated as more queries of that head: nothing is copied."""
    queries = q.view(k.shape[0], k.shape[1], -1, q.shape[2])  # (N, n_kv_head, H / n_kv_head, C)
    return F.scaled_dot_product_attention(queries, k, v, attn_mask=bias).reshape(q.shape)
