"""The GPT, in one file: GPT-2, GPT-NeoX (Pythia) and the Llama family (Mistral, Qwen2, Qwen3, OLMo 2,
SmolLM) are one config each.

Read it as nanoGPT with six switches: positions (a learned table, or rotary), norm (LayerNorm or RMSNorm)
and its place (before or after attention and MLP), a norm of queries and keys (none, of each head, or of
all heads), MLP (GELU or SwiGLU) and residual (sequential or parallel), plus grouped-query attention and,
for reward models, a scalar head. Who sees whom is no concern of its own: the trunk is handed a function
`attend` (attention.py), and works on each token alone in all else.

Shapes: N tokens, which may as well be (B, T) rows of tokens or any other shape; D = n_embd, H heads,
C = head size, V = vocab_size; R response tokens, S responses."""

import contextlib
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kernels
from nanoroads.attention import causal


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
    norm_place: str = "before"  # before attention and MLP | after: x + norm(attention(x)), as OLMo 2
    qk_norm: str = "none"  # RMSNorm of queries and keys: none | head (each head: Qwen3) | all (OLMo 2)
    mlp: str = "gelu_tanh"  # gelu_tanh (GPT-2) | gelu (exact: GPT-NeoX) | swiglu
    parallel_residual: bool = False  # x + attention(x) + mlp(x), as GPT-NeoX
    qkv_bias: bool = True
    bias: bool = True  # of the attention's output and of the MLP
    tied: bool = True  # the vocabulary projection is the embedding
    head: str = "lm"  # lm: a policy | scalar: a reward model
    readout: str = "last"  # scalar head: read at each response's last token, or the sum over its tokens

    def __post_init__(self):
        """Fill in what is None. Raises ValueError naming the field."""
        if not self.head_size and self.n_embd % self.n_head:
            raise ValueError(f"config: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.d_ff = self.d_ff or 4 * self.n_embd
        choices = {
            "position": ("learned", "rotary"),
            "norm": ("layernorm", "rmsnorm"),
            "norm_place": ("before", "after"),
            "qk_norm": ("none", "head", "all"),
            "mlp": ("gelu_tanh", "gelu", "swiglu"),
            "head": ("lm", "scalar"),
            "readout": ("last", "sum"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"config: {name} is {getattr(self, name)!r}, not one of {', '.join(allowed)}"
                )
        if self.parallel_residual and self.norm_place == "after":
            raise ValueError("config: parallel_residual true does not go with norm_place 'after'")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"config: n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")


class LogProbs(NamedTuple):
    """What a policy says of a batch's responses, in nats."""

    sequence: torch.Tensor  # (S,) log pi(y|x) of each response, EOS included
    token: torch.Tensor  # (R,) log pi(y_t|x, y_<t) of each response token


def rotary_table(config, position):
    """position (N,) -> cos, sin (N, 1, dim/2) of the rotation angles (Su et al., 2104.09864), in fp32 as
    in training."""
    dim = int(config.head_size * config.rotary_pct)  # channels of a head that are rotated
    exponent = torch.arange(0, dim, 2, device=position.device, dtype=torch.float32) / dim
    inv_freq = 1.0 / config.rope_theta**exponent  # (dim/2,)
    scaling = config.rope_scaling
    if scaling:  # Llama 3: low frequencies are stretched by `factor`, high ones kept
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        # Turns of each pair within the original context; where ramp is 0 it is stretched, where 1 kept.
        turns = scaling["original_max_position_embeddings"] / (2 * math.pi / inv_freq)
        ramp = (turns - low) / (high - low)
        ramp = ramp.clamp(0, 1)
        inv_freq = (1 - ramp) * inv_freq / scaling["factor"] + ramp * inv_freq
    angle = position[..., None, None].float() * inv_freq
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotate the first channels of x (N, H, C) in pairs (i, i + dim/2), as NeoX and Llama do."""
    half = cos.shape[-1]
    cos = cos.to(x.dtype)
    sin = sin.to(x.dtype)
    a = x[..., :half]
    b = x[..., half : 2 * half]
    not_rotated = x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, not_rotated), dim=-1)


def norm_heads(norm, x):
    """RMSNorm of queries or keys x (N, H, C): of each head, or of all heads together where `norm` is of
    that size. Computed in the dtype of its weights, fp32 in training; the result has that of x."""
    wide = x.to(norm.weight.dtype)
    if norm.weight.numel() > x.shape[-1]:
        wide = wide.flatten(-2)  # (N, H C)
    return norm(wide).view(x.shape).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        heads = config.n_head + 2 * config.n_kv_head  # of queries, keys and values, in this order
        self.qkv = nn.Linear(config.n_embd, heads * config.head_size, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.bias)
        if config.qk_norm != "none":
            of_each_head = config.qk_norm == "head"
            q_size = config.head_size if of_each_head else config.n_head * config.head_size
            k_size = config.head_size if of_each_head else config.n_kv_head * config.head_size
            self.q_norm = nn.RMSNorm(q_size, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(k_size, eps=config.norm_eps)

    def forward(self, x, layer_index, rotary, attend):
        c = self.config
        qkv = self.qkv(x).unflatten(-1, (-1, c.head_size))  # (N, n_head + 2 n_kv_head, C)
        qk, v = qkv.split((c.n_head + c.n_kv_head, c.n_kv_head), dim=-2)
        if c.qk_norm != "none":
            q, k = qk.split((c.n_head, c.n_kv_head), dim=-2)
            qk = torch.cat((norm_heads(self.q_norm, q), norm_heads(self.k_norm, k)), dim=-2)
        # q and k rotate alike, so they are rotated together.
        if rotary is not None:
            cos, sin = rotary
            qk = rotate(qk, cos, sin)
        q, k = qk.split((c.n_head, c.n_kv_head), dim=-2)  # (N, H, C), (N, n_kv_head, C)
        y = attend(layer_index, q, k, v)  # (N, H, C)
        return self.out(y.flatten(-2))


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
        if self.kind == "gelu_tanh":
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        return self.down(F.gelu(self.up(x)))


def make_norm(config):
    kind = nn.LayerNorm if config.norm == "layernorm" else nn.RMSNorm
    return kind(config.n_embd, eps=config.norm_eps)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.parallel = config.parallel_residual
        self.norms_after = config.norm_place == "after"
        self.norm1 = make_norm(config)
        self.attention = Attention(config)
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, layer_index, rotary, attend):
        if self.norms_after:  # OLMo 2: 2501.00656, equations 1 and 2; the casts are for autocast
            x = x + self.norm1(self.attention(x, layer_index, rotary, attend).to(x.dtype))
            return x + self.norm2(self.mlp(x).to(x.dtype))
        attended = self.attention(self.norm1(x), layer_index, rotary, attend)
        if self.parallel:
            return x + attended + self.mlp(self.norm2(x))
        x = x + attended
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A policy or, with a scalar head, a reward model.

    compute_dtype: matrix products run in it (torch.autocast) while weights, log-probs and rewards
    keep theirs. None: no autocast of the model's own.
    checkpoint_activations: set it, and training keeps the input of each block alone; the backward pass
    computes what is within the block again."""

    def __init__(self, config, compute_dtype=None):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.trunk_is_compiled = False
        self.checkpoint_activations = False
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.position == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
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
        """Initialise as in Stiennon et al., 2009.01325."""
        nn.init.normal_(self.scalar_head.weight, std=1 / math.sqrt(self.config.n_embd + 1))

    def set_scalar_head(self, readout):
        """Make a policy a reward model: a new scalar head in place of the vocabulary's."""
        del self.lm_head
        self.config.head, self.config.readout = "scalar", readout
        self.scalar_head = nn.Linear(self.config.n_embd, 1, bias=False)
        self.init_scalar_head()
        self.scalar_head.to(self.norm.weight.device, self.residual_dtype)

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device="cpu", compute_dtype=None):
        """One of our checkpoints, or a Hugging Face folder. Raises InputError."""
        from nanoroads.weights.checkpoint import load_model

        return load_model(folder, dtype=dtype, device=device, compute_dtype=compute_dtype)

    def save_pretrained(self, folder, eos=None):
        """Write a Hugging Face folder that transformers loads with the same logits.

        eos: the id of the token that ends a response. Raises InputError."""
        from nanoroads.weights.hf import save_hf

        save_hf(folder, self, eos)

    def compile_trunk(self):
        """torch.compile the trunk, once for all shapes, since they change from batch to batch."""
        self.trunk = torch.compile(self.trunk, dynamic=True)
        self.trunk_is_compiled = True

    @property
    def residual_dtype(self):
        """Of what flows from block to block, and of the norms' weights. The matrices may be held in
        less, see load_model."""
        return self.norm.weight.dtype

    def hold_matrices(self, dtype):
        """Hold embeddings and matrices in `dtype` (None: as they are), and vectors as they are."""
        for parameter in self.parameters():
            if dtype and parameter.ndim > 1:
                parameter.data = parameter.data.to(dtype)

    def autocast(self):
        """The context of every forward pass. Around a loop of passes it casts each weight once, so no
        optimizer may step inside."""
        if self.compute_dtype is None or self.compute_dtype == self.residual_dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.embedding.weight.device.type, self.compute_dtype)

    def trunk(self, tokens, position, attend=causal):
        """tokens, position (N,) -> hidden (N, D), after the last norm. attend: who sees whom, see
        attention.py; causal takes rows of tokens, (B, T)."""
        x = self.embedding(tokens).to(self.residual_dtype)  # (N, D)
        rotary = None
        if self.config.position == "learned":
            x = x + self.position_embedding(position)
        else:
            rotary = rotary_table(self.config, position)
        for layer_index, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                # Nothing in a block is random, so no state of random numbers need be kept.
                options = {"use_reentrant": False, "preserve_rng_state": False}
                x = checkpoint(block, x, layer_index, rotary, attend, **options)
            else:
                x = block(x, layer_index, rotary, attend)
        return self.norm(x)

    def forward(self, batch, temperature=1.0):
        """batch: a Batch of S responses with R tokens in all, see batch.py.

        A policy returns LogProbs(sequence (S,), token (R,)) at this temperature; a reward model reward
        (S,). fp32, whatever the compute dtype (fp64 for fp64 weights)."""
        with self.autocast():
            hidden = self.trunk(batch.tokens, batch.position, batch.attend)  # (N, D)
            if self.config.head == "scalar":
                return self.reward(batch, hidden)
            # Prompts never reach the vocabulary projection. F.embedding, not hidden[rows]: all responses
            # read their prompt's last hidden state, and on a CPU the backward of indexing sums their
            # gradients in the order of threads, which differs from run to run.
            predictors = F.embedding(batch.rows, hidden)  # (R, D)
            sequence, token = kernels.sequence_logp(
                predictors, self.lm_head.weight, batch.target, batch.cu_seqlens, temperature=temperature
            )
            return LogProbs(sequence, token)

    def reward(self, batch, hidden):
        """hidden (N, D) -> the scalar head's reward (S,), at the last token or summed over all
        tokens."""
        # An fp32 product and sum: a matmul would be rounded to bf16 under autocast.
        weight = self.scalar_head.weight.to(torch.promote_types(hidden.dtype, torch.float32))  # (1, D)
        # Each place is read once, so plain indexing is deterministic.
        if self.config.readout == "last":
            return (hidden[batch.last] * weight).sum(-1)
        token = (hidden[batch.response_index] * weight).sum(-1)  # (R,)
        return kernels.segment_sum(token, batch.cu_seqlens)

    def sampling_head(self):
        """A function of hidden (N, D) -> logits (N, V) to sample from.

        Factors of the product may be bf16, its sums are fp32: logits rounded to bf16 would be those of
        another policy than the one whose log-probs are trained."""
        low = self.compute_dtype or self.embedding.weight.dtype
        if low not in (torch.bfloat16, torch.float16) or not isinstance(self.lm_head, nn.Linear):
            return self.lm_head  # also a decoding twin's, whose product is in fp32
        device = self.embedding.weight.device.type
        weight = self.lm_head.weight.to(low).T  # cast once, not for every token
        if device != "cuda":
            weight = weight.float()  # only CUDA multiplies bf16 into fp32

        def project(hidden):
            hidden = hidden.to(low)
            with torch.autocast(device, enabled=False):
                if device == "cuda":
                    return torch.mm(hidden, weight, out_dtype=torch.float32)
                return torch.mm(hidden.float(), weight)

        return project

    def logits(self, tokens):
        """tokens (B, T) -> (B, T, V): the plain causal forward, for reading and for parity tests."""
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        with self.autocast():
            return self.lm_head(self.trunk(tokens, position, causal))


def init_weights(module):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
