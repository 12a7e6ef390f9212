"""Groups of one prompt and K responses -> one Batch in which the prompt stands once.

    row:       p p p p a a a b b b b           prompt p, responses a and b
    position:  0 1 2 3 4 5 6 4 5 6 7           each response goes on from the prompt
    segment:   0 0 0 0 1 1 1 2 2 2 2           b sees p and itself, never a

With 512 prompt and 53 response tokens a pair costs 618 positions instead of 1,130; 25 samples, 1,837 instead of 14,125.
"""

import functools
from dataclasses import dataclass, fields

import numpy as np
import torch


@dataclass
class Batch:
    tokens: torch.Tensor  # (B, T) int64; several groups may share a row
    position: torch.Tensor  # (B, T) int64; restarts at each prompt and continues from it in each response
    group: torch.Tensor  # (B, T) int64; -1 is padding
    segment: torch.Tensor  # (B, T) int64; 0 is the prompt, 1..K the responses
    rows: torch.Tensor  # (R,) int64; flat index of the hidden state that predicts each response token
    own: torch.Tensor  # (R,) int64; flat index of each response token itself
    target: torch.Tensor  # (R,) int64; the response tokens, EOS included
    cu_seqlens: torch.Tensor  # (S+1,) int32; where each response starts in rows; S = all responses, in the order given
    causal: bool  # one response a row: the plain causal mask is right

    def to(self, device):
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "causal"}
        moved = {name: upload(x, device) for name, x in moved.items()}
        return Batch(**moved, causal=self.causal)

    @property
    def last(self):
        """(S,) flat index of each response's last token, where a reward model is read."""
        return self.own[self.cu_seqlens[1:].long() - 1]

    @property
    def lengths(self):
        """(S,) int64 tokens in each response."""
        return self.cu_seqlens.diff().long()

    def mask(self):
        """None where plain causal attention is right, else (B, 1, T, T) bool, built once for all layers and models."""
        return None if self.causal else self._mask

    @functools.cached_property
    def _mask(self):
        g, s = self.group, self.segment
        index = torch.arange(g.shape[1], device=g.device)
        same_group = g[:, :, None] == g[:, None, :]  # (B, q, kv)
        shared = (s[:, None, :] == 0) | (s[:, :, None] == s[:, None, :])
        return (same_group & shared & (index[None, :] <= index[:, None])).unsqueeze(1)


def upload(x, device):
    """x on the device, without waiting for it: only from pinned memory is a copy asynchronous."""
    pin = torch.device(device).type == "cuda" and not x.is_cuda
    return (x.pin_memory() if pin else x).to(device, non_blocking=True)


def pack(prompts, responses, row_length=None, pad=0, device="cpu"):
    """prompts: list of G token lists; responses: for each its K token lists (EOS included) -> Batch.

    row_length: groups share rows of at most this many positions, first-fit decreasing (None: as long as the longest).
    Whatever the rows, rows/target/cu_seqlens keep the order given: group 0's responses, then group 1's, ...
    Raises ValueError for an empty prompt or response, or a group longer than row_length."""
    if not prompts:
        raise ValueError("no groups to pack")
    sizes = []
    for g, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        if not prompt or not group or not all(group):
            raise ValueError(f"group {g}: an empty prompt or response")
        sizes.append(len(prompt) + sum(map(len, group)))
    bins = first_fit(sizes, row_length or max(sizes))
    length = max(sum(sizes[g] for g in members) for members in bins)
    shape = (len(bins), length)
    tokens, group_id = np.full(shape, pad, np.int64), np.full(shape, -1, np.int64)
    position, segment = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    own = [None] * len(prompts)  # for each group, one range of flat indices per response
    ends = [0] * len(prompts)  # flat index of each prompt's last token
    for b, members in enumerate(bins):
        t = 0
        for g in members:
            n, own[g] = len(prompts[g]), []
            tokens[b, t : t + n], position[b, t : t + n] = prompts[g], range(n)
            group_id[b, t : t + sizes[g]] = g
            t += n
            ends[g] = b * length + t - 1
            for k, response in enumerate(responses[g], 1):
                m = len(response)
                tokens[b, t : t + m], position[b, t : t + m] = response, range(n, n + m)
                segment[b, t : t + m] = k
                own[g].append(range(b * length + t, b * length + t + m))
                t += m

    flat = np.concatenate([r for group in own for r in group])
    cu_seqlens = np.cumsum([0] + [len(r) for group in own for r in group])
    rows = flat - 1
    rows[cu_seqlens[:-1]] = np.repeat(ends, [len(group) for group in own])  # the first token: by the prompt's last
    target = tokens.reshape(-1)[flat]
    causal = all(len(members) == 1 and len(responses[members[0]]) == 1 for members in bins)
    arrays = (tokens, position, group_id, segment, rows, flat, target)
    return Batch(*map(torch.from_numpy, arrays), torch.from_numpy(cu_seqlens.astype(np.int32)), causal).to(device)


def first_fit(sizes, row_length):
    """First-fit decreasing: lists of group indices whose sizes add up to at most row_length."""
    bins, room = [], []
    for g in sorted(range(len(sizes)), key=lambda g: -sizes[g]):
        if sizes[g] > row_length:
            raise ValueError(f"group {g} has {sizes[g]} tokens, more than row_length {row_length}")
        b = next((b for b, left in enumerate(room) if left >= sizes[g]), len(bins))
        if b == len(bins):
            bins.append([])
            room.append(row_length)
        bins[b].append(g)
        room[b] -= sizes[g]
    return bins
