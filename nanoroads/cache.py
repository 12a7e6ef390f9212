"""The keys and values of what has been read and sampled so far: the third way to attend."""

import torch
from torch.nn import functional as F

from nanoroads.attention import attention


class KVCache:
    """Preallocated keys and values of all layers, (B, n_kv_head, length, C) each; the first `used` are
    set.

    mask: (B, 1, T, used + T) bool, who sees whom in the next pass; None: all is causal, or T = 1."""

    def __init__(self, config, rows, length, device=None, dtype=None):
        shape = (config.n_layer, rows, config.n_kv_head, length, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.used = 0
        self.mask = None

    def attend(self, layer, q, k, v):
        """q (B, T, H, C), k and v (B, T, n_kv_head, C) of the T newest tokens -> (B, T, H, C)."""
        end = self.used + k.shape[1]
        self.k[layer, :, :, self.used : end] = k.transpose(1, 2)
        self.v[layer, :, :, self.used : end] = v.transpose(1, 2)
        if layer == len(self.k) - 1:
            self.used = end
        k, v = self.k[layer, :, :, :end], self.v[layer, :, :, :end]  # (B, n_kv_head, end, C)
        if q.shape[1] > 1:
            return attention(q, k.transpose(1, 2), v.transpose(1, 2), self.mask, is_causal=self.mask is None)
        # Decoding: the only query is the newest token, so it may see every key. With grouped-query
        # attention, treat the query heads that share a key head as more queries of that head; nothing
        # is copied.
        queries = q.view(k.shape[0], k.shape[1], -1, q.shape[3])  # (B, n_kv_head, H / n_kv_head, C)
        return F.scaled_dot_product_attention(queries, k, v, attn_mask=self.mask).reshape(q.shape)

    def repeat(self, times):
        """Each row `times` times, so that one prefilled prompt serves all of its samples."""
        self.k = self.k.repeat_interleave(times, dim=1)
        self.v = self.v.repeat_interleave(times, dim=1)

    def keep(self, rows):
        """Only these rows (N,) int64."""
        self.k = self.k[:, rows]
        self.v = self.v[:, rows]
