"""The GPT, in one file: GPT-2, GPT-NeoX (Pythia) and the Llama family (Mistral, Qwen2, SmolLM) are one config each.

Read it as nanoGPT with four switches: positions (a learned table, or rotary), norm (LayerNorm or RMSNorm), MLP (GELU or
SwiGLU) and residual (sequential or parallel), plus grouped-query attention, a KV cache and, for reward models, a scalar
head. Shapes: B rows, T positions, D = n_embd, H heads, C = head size, V = vocab_size; R response tokens, S responses.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

import kernels


@dataclass
class GPTConfig:
    vocab_size: int = 98  # the map's
    block_size: int = 64  # longest sequence, in tokens
    n_layer: int = 2
    n_head: int = 2
    n_kv_head: int | None = None  # grouped-query attention: heads of keys and values; None: as many as n_head
    n_embd: int = 64
    head_size: int | None = None  # None: n_embd / n_head
    d_ff: int | None = None  # width of the MLP; None: 4 n_embd
    position: str = "learned"  # learned | rotary
    rotary_pct: float = 1.0  # share of each head that is rotated
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, with the names that `rotary_table` reads
    norm: str = "layernorm"  # layernorm | rmsnorm
    norm_eps: float = 1e-5
    mlp: str = "gelu_tanh"  # gelu_tanh (GPT-2) | gelu (exact: GPT-NeoX) | swiglu
    parallel_residual: bool = False  # x + attention(x) + mlp(x), as GPT-NeoX
    qkv_bias: bool = True
    bias: bool = True  # of the attention's output and of the MLP
    tied: bool = True  # the vocabulary projection is the embedding
    head: str = "lm"  # lm: a policy | scalar: a reward model
    readout: str = "last"  # scalar head: read at each response's last token, or the sum over its tokens

    def __post_init__(self):
        if not self.head_size and self.n_embd % self.n_head:
            raise ValueError(f"config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.d_ff = self.d_ff or 4 * self.n_embd
        choices = {
            "position": ("learned", "rotary"),
            "norm": ("layernorm", "rmsnorm"),
            "mlp": ("gelu_tanh", "gelu", "swiglu"),
            "head": ("lm", "scalar"),
            "readout": ("last", "sum"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"config: {name} is {getattr(self, name)!r}, not one of {', '.join(allowed)}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"config: n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")


class KVCache:
    """Preallocated keys and values of all layers, (B, n_kv_head, length, C) each; the first `used` are set."""

    def __init__(self, config, rows, length, device=None, dtype=None):
        shape = (config.n_layer, rows, config.n_kv_head, length, config.head_size)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.used = 0

    def append(self, layer, k, v):
        """Write k, v (B, n_kv_head, T, C) behind what is there and return all so far. The trunk moves `used` on."""
        end = self.used + k.shape[2]
        self.k[layer, :, :, self.used : end] = k
        self.v[layer, :, :, self.used : end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]

    def repeat(self, times):
        """Each row `times` times, so that one prefilled prompt serves all of its samples."""
        self.k, self.v = self.k.repeat_interleave(times, dim=1), self.v.repeat_interleave(times, dim=1)

    def keep(self, rows):
        """Only these rows (N,) int64."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


def rotary_table(config, position):
    """cos, sin (B, 1, T, rotary/2) of the rotation angles (Su et al., 2104.09864), in fp32 as in training."""
    dim = int(config.head_size * config.rotary_pct)
    exponent = torch.arange(0, dim, 2, device=position.device, dtype=torch.float32) / dim
    inv_freq = 1.0 / config.rope_theta**exponent  # (rotary/2,)
    if s := config.rope_scaling:  # Llama 3: slow waves are stretched by `factor`, fast ones kept, a ramp in between
        turns = s["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
        ramp = (turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
        ramp = ramp.clamp(0, 1)
        inv_freq = (1 - ramp) * inv_freq / s["factor"] + ramp * inv_freq
    angle = position[:, None, :, None].float() * inv_freq
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the first 2*cos.shape[-1] channels of x (B, H, T, C) in pairs (i, i + rotary/2), as NeoX and Llama do."""
    half = cos.shape[-1]
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config, self.layer = config, layer
        self.sizes = [n * config.head_size for n in (config.n_head, config.n_kv_head, config.n_kv_head)]
        self.qkv = nn.Linear(config.n_embd, sum(self.sizes), bias=config.qkv_bias)
        self.out = nn.Linear(self.sizes[0], config.n_embd, bias=config.bias)

    def forward(self, x, mask, rotary, cache):
        c = self.config
        heads = self.qkv(x).unflatten(-1, (-1, c.head_size)).transpose(1, 2)  # (B, n_head + 2 n_kv_head, T, C)
        turned, v = heads.split((c.n_head + c.n_kv_head, c.n_kv_head), dim=1)
        if rotary is not None:
            turned = rotate(turned, *rotary)
        q, k = turned.split((c.n_head, c.n_kv_head), dim=1)  # (B, H, T, C), (B, n_kv_head, T, C)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = attend(q, k, v, mask)  # (B, H, T, C)
        return self.out(y.transpose(1, 2).flatten(2))


def attend(q, k, v, mask):
    """q (B, H, T, C) looks at k, v (B, n_kv_head, L, C). mask: (B, 1, T, L) bool; None: causal, with T = L or T = 1."""
    grouped = q.shape[1] != k.shape[1]
    if q.shape[2] == 1:  # a single query is the newest token, it sees all there is; heads that share keys are one head's queries
        y = F.scaled_dot_product_attention(q.view(*k.shape[:2], -1, q.shape[3]), k, v, attn_mask=mask)
        return y.reshape(q.shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        if self.kind == "swiglu":
            self.gate = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.up = nn.Linear(config.n_embd, config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.n_embd, bias=config.bias)

    def forward(self, x):
        if self.kind == "swiglu":
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.kind == "gelu_tanh" else "none"))


def make_norm(config):
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.n_embd, eps=config.norm_eps)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm1, self.attention = make_norm(config), Attention(config, layer)
        self.norm2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x, mask, rotary, cache):
        attended = self.attention(self.norm1(x), mask, rotary, cache)
        if self.parallel:
            return x + attended + self.mlp(self.norm2(x))
        x = x + attended
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config)
        self.apply(init_weights)
        for block in self.blocks:  # GPT-2: the 2 n_layer additions to the residual stream keep its variance
            for linear in (block.attention.out, block.mlp.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * config.n_layer))
        if config.head == "scalar":
            self.scalar_head = nn.Linear(config.n_embd, 1, bias=False)
            self.init_scalar_head()
        else:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
            if config.tied:
                self.lm_head.weight = self.embedding.weight
            else:
                nn.init.normal_(self.lm_head.weight, std=0.02)

    def init_scalar_head(self):
        nn.init.normal_(self.scalar_head.weight, std=1 / math.sqrt(self.config.n_embd + 1))  # as Stiennon et al., 2009.01325

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu"):
        """One of our checkpoints, or a Hugging Face folder (config.json and *.safetensors). Raises InputError."""
        from nanoroads.checkpoint import load_model

        return load_model(folder, dtype=dtype, device=device)

    def save_pretrained(self, folder, eos=None):
        """Write a Hugging Face folder that transformers loads with the same logits. eos: a token's id. Raises InputError."""
        from nanoroads.hf import save_hf

        save_hf(folder, self, eos)

    def trunk(self, tokens, position, mask=None, cache=None):
        """tokens, position (B, T) -> hidden (B, T, D), after the last norm. mask: what `attend` takes."""
        x = self.embedding(tokens)  # (B, T, D)
        rotary = None
        if self.config.position == "learned":
            x = x + self.position_embedding(position)
        else:
            rotary = rotary_table(self.config, position)
        for block in self.blocks:
            x = block(x, mask, rotary, cache)
        if cache is not None:
            cache.used += tokens.shape[1]
        return self.norm(x)

    def forward(self, batch, temperature=1.0, return_entropy=False):
        """A policy: sequence_logp (S,), token_logp (R,) and, if asked, entropy (R,). A reward model: reward (S,)"""
        hidden = self.trunk(batch.tokens, batch.position, batch.mask()).flatten(0, 1)  # (B*T, D)
        if self.config.head == "scalar":  # an fp32 product and sum: a matmul would be rounded to bf16 under autocast
            weight = self.scalar_head.weight.to(torch.promote_types(hidden.dtype, torch.float32))  # (1, D)
            if self.config.readout == "last":
                return (hidden[batch.last] * weight).sum(-1)
            return kernels.segment_sum((hidden[batch.own] * weight).sum(-1), batch.cu_seqlens)
        # (R, D): prompt and padding never reach the vocabulary projection. Not hidden[rows], whose backward on several CPU
        # threads adds what the k samples send to the prompt's last token in whatever order they come.
        return kernels.sequence_logp(
            F.embedding(batch.rows, hidden),
            self.lm_head.weight,
            batch.target,
            batch.cu_seqlens,
            temperature=temperature,
            return_entropy=return_entropy,
        )

    def sampling_head(self):
        """A function of hidden (N, D) -> logits (N, V) to sample from. On CUDA fp32 from the accumulator on: logits rounded to
        bf16 would be those of another policy than the one whose log-probs are trained."""
        low = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else self.embedding.weight.dtype
        if not self.embedding.weight.is_cuda or low not in (torch.bfloat16, torch.float16):
            return self.lm_head
        weight = self.lm_head.weight.to(low).T  # cast once, not for every token

        def project(hidden):
            with torch.autocast("cuda", enabled=False):
                return torch.mm(hidden.to(low), weight, out_dtype=torch.float32)

        return project

    def logits(self, tokens):
        """tokens (B, T) -> (B, T, V): the plain causal forward, for reading and for parity tests."""
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.lm_head(self.trunk(tokens, position))


def init_weights(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
