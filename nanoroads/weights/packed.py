"""Faster decoding: a twin of a model, its matrices in the layout and dtype that its products want.

A reader of the sampler can skip this file: `decoding_twin(model, ...)` computes what `model` does.
"""

import copy
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from nanoroads.attention import causal
from nanoroads.model import GPT, norm_heads, rotary_table
from nanoroads.weights.lora import LoRALinear, low_rank
from nanoroads.weights.sharded import whole_model

MIN_PARAMETERS = 2**20  # with fewer, packing takes longer than it saves


class PackedLinear(nn.Module):
    """nn.Linear with its weight packed for oneDNN.

    For the few rows of a decoding step it takes a third (fp32) or half (bf16) of the time of
    nn.Linear, which works through a plain weight at a fraction of memory's speed."""

    def __init__(self, linear, dtype, rows, product_dtype):
        """dtype: of the factors. product_dtype: of the product, dtype itself or fp32. rows: how many the
        layout is to be best for."""
        super().__init__()
        self.dtype = dtype
        self.product_dtype = product_dtype
        self.bias = None if linear.bias is None else linear.bias.to(product_dtype)
        weight = linear.weight.detach()
        self.adapter = None
        if isinstance(linear, LoRALinear):
            if product_dtype == torch.float32:
                weight = linear.merged()  # nothing of the sum is lost
            else:  # bf16 would round a small B A away
                self.adapter = linear
        weight = weight.to(dtype).to(product_dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
        self.linear = torch.ops.mkldnn._linear_pointwise.default
        self.linear_and = torch.ops.mkldnn._linear_pointwise.binary

    def forward(self, x):
        """x (..., in) of any dtype -> (..., out)."""
        return self.product(x.to(self.dtype).to(self.product_dtype))

    def product(self, x, activation="none", algorithm=""):
        """activation: "none" or what else oneDNN applies to the sums, before it rounds them."""
        y = self.linear(x, self.packed, self.bias, activation, [], algorithm)
        if self.adapter is not None:  # in bf16, where PackedBlock asks for no activation
            y = y + self.adapter.change(x)
        return y

    def plus(self, x, other):
        """The product plus other (..., out)."""
        if self.dtype != torch.float32:
            return other + self.product(x)
        return self.linear_and(x, other, self.packed, self.bias, "add")

    def times(self, x, other):
        """The product times other (..., out), in fp32."""
        return self.linear_and(x, other, self.packed, self.bias, "mul")


def packed_norm(norm, dtype):
    """-> a function of x (..., D): its norm, rounded to `dtype`."""
    if isinstance(norm, nn.LayerNorm) or dtype != torch.float32:
        return functools.partial(own_norm, norm=norm, dtype=dtype)
    size = norm.weight.numel()
    weight = norm.weight.detach() * math.sqrt(size)
    least = torch.tensor(math.sqrt(size * norm.eps))
    return functools.partial(rms_norm, weight=weight, least=least)


def own_norm(x, norm, dtype):
    return norm(x).to(dtype)


def packed_norm_after(norm, dtype):
    """-> a function of x (..., D): its norm, in the dtype of the residual stream that it is added to."""
    if dtype == torch.float32:
        return packed_norm(norm, dtype)
    return functools.partial(wide_norm, norm=norm)


def wide_norm(x, norm):
    return norm(x.to(norm.weight.dtype))


def packed_head_norm(norm, dtype):
    """-> a function of x (N, H, C): what model.norm_heads makes of it."""
    if dtype != torch.float32:
        return functools.partial(norm_heads, norm)
    return functools.partial(fast_norm_heads, norm=packed_norm(norm, dtype), size=norm.weight.numel())


def fast_norm_heads(x, norm, size):
    parts = x.reshape(*x.shape[:-2], -1, size)  # (N, H, C), or (N, 1, H C)
    return norm(parts).view(x.shape)


def rms_norm(x, weight, least):
    """In four operations, where PyTorch's takes ten on a CPU:
    x / sqrt(|x|^2 / D + eps) = sqrt(D) x / hypot(|x|, sqrt(D eps)). weight: with the sqrt(D)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.hypot(length, least) * weight


class PackedBlock:
    """What model.Block computes, in a third of the operations, and without the calls of nn.Module.

    Between two products there are a few kilobytes to work on. What costs time there is each operation
    as such, whose code and objects the weights have pushed out of the processor's cache. In bf16 all is
    rounded where model.Block rounds it, though that takes more operations: a rounding more or less moves
    SmolLM2's log-probs by 0.03 nats a token, and the policy that samples is the one that is trained."""

    def __init__(self, block, config, dtype, rows):
        self.config = config
        norm_kind = packed_norm_after if config.norm_place == "after" else packed_norm
        self.norm1 = norm_kind(block.norm1, dtype)
        self.norm2 = norm_kind(block.norm2, dtype)
        if config.qk_norm != "none":
            self.q_norm = packed_head_norm(block.attention.q_norm, dtype)
            self.k_norm = packed_head_norm(block.attention.k_norm, dtype)
        self.qkv = PackedLinear(block.attention.qkv, dtype, rows, dtype)
        self.out = PackedLinear(block.attention.out, dtype, rows, dtype)
        self.up = PackedLinear(block.mlp.up, dtype, rows, dtype)
        self.down = PackedLinear(block.mlp.down, dtype, rows, dtype)
        self.matrices = [self.qkv, self.out, self.up, self.down]
        if config.mlp == "swiglu":
            self.gate = PackedLinear(block.mlp.gate, dtype, rows, dtype)
            self.matrices.append(self.gate)

    def forward(self, x, layer_index, rotary, attend):
        """As model.Block.forward. rotary: what `rotation` returns, or None."""
        c = self.config
        if c.norm_place == "after":
            attended = self.attended(x.to(self.qkv.dtype), layer_index, rotary, attend)
            x = x + self.norm1(self.out.product(attended))
            return x + self.norm2(self.down.product(self.inner(x.to(self.up.dtype))))
        attended = self.attended(self.norm1(x), layer_index, rotary, attend)
        x_and_attended = self.out.plus(attended, x)
        if c.parallel_residual:
            return self.down.plus(self.inner(self.norm2(x)), x_and_attended)
        return self.down.plus(self.inner(self.norm2(x_and_attended)), x_and_attended)

    def attended(self, h, layer_index, rotary, attend):
        """What lies between the matrices of attention, h (N, D) -> (N, H C), and the first of them."""
        c = self.config
        qkv = self.qkv.product(h)
        qkv = qkv.view(*h.shape[:-1], c.n_head + 2 * c.n_kv_head, c.head_size)
        qk, v = qkv.split_with_sizes((c.n_head + c.n_kv_head, c.n_kv_head), -2)
        if c.qk_norm != "none":
            q, k = qk.split_with_sizes((c.n_head, c.n_kv_head), -2)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), -2)
        if rotary is not None:
            qk = rotate(qk, *rotary)
        q, k = qk.split_with_sizes((c.n_head, c.n_kv_head), -2)
        return attend(layer_index, q, k, v).flatten(-2)  # (N, H C)

    def inner(self, h):
        """What lies between the matrices of the MLP."""
        gelu = "tanh" if self.config.mlp == "gelu_tanh" else "none"
        if self.up.dtype != torch.float32:
            up = self.up.product(h)
            if self.config.mlp == "swiglu":
                return F.silu(self.gate.product(h)) * up
            return F.gelu(up, approximate=gelu)
        if self.config.mlp == "swiglu":
            return self.up.times(h, self.gate.product(h, "swish"))
        return self.up.product(h, "gelu", gelu)


class PackedGPT(GPT):
    """GPT with packed matrices; embeddings and norms are the model's own."""

    residual_dtype = None  # set below: a packed norm has no dtype to ask for

    def __init__(self, model, dtype, rows):
        """dtype: of the factors of all products. rows: how many are decoded at a time."""
        nn.Module.__init__(self)  # and not GPT's, which would make weights of its own
        self.config = model.config
        self.compute_dtype = model.compute_dtype
        self.trunk_is_compiled = False
        self.residual_dtype = model.residual_dtype
        self.dtype = dtype
        self.embedding = model.embedding
        if model.config.position == "learned":
            self.position_embedding = model.position_embedding
        self.blocks = [PackedBlock(block, model.config, dtype, rows) for block in model.blocks]
        self.matrices = nn.ModuleList(matrix for block in self.blocks for matrix in block.matrices)
        self.norm = packed_norm(model.norm, dtype)
        self.lm_head = PackedLinear(model.lm_head, dtype, rows, torch.float32)  # see GPT.sampling_head

    def trunk(self, tokens, position, attend=causal):
        """GPT.trunk, with a rotary table that serves all layers as it is."""
        x = self.embedding(tokens).to(self.residual_dtype)  # (N, D)
        rotary = None
        if self.config.position == "learned":
            x = x + self.position_embedding(position)
        else:
            cos, sin = rotary_table(self.config, position)
            rotary = rotation(cos, sin, self.config.head_size, self.dtype)
        for layer_index, block in enumerate(self.blocks):
            x = block.forward(x, layer_index, rotary, attend)
        return self.norm(x)


def rotation(cos, sin, head_size, dtype):
    """cos, sin (N, 1, dim / 2) -> for `rotate`: [cos, cos, 1], [-sin, sin, 0] (N, 1, C), and dim / 2. The
    1 and 0 are for channels that are not rotated."""
    half = cos.shape[-1]
    not_rotated = (*cos.shape[:-1], head_size - 2 * half)
    cos = torch.cat((cos, cos, cos.new_ones(not_rotated)), -1)
    sin = torch.cat((-sin, sin, sin.new_zeros(not_rotated)), -1)
    return cos.to(dtype), sin.to(dtype), half


def rotate(x, cos, sin, half):
    """As model.rotate: x (N, H, C) in pairs of channels (i, i + half)."""
    partner = torch.cat((x[..., half : 2 * half], x[..., :half], x[..., 2 * half :]), -1)
    return x * cos + partner * sin


class CastLinear(nn.Module):
    """nn.Linear under autocast, its weight cast once: a CUDA graph must not depend on autocast's cache."""

    def __init__(self, linear, dtype):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().to(dtype), requires_grad=False)
        self.adapter = None
        if isinstance(linear, LoRALinear):
            a, b = linear.lora_A.detach().to(dtype), linear.lora_B.detach().to(dtype)
            self.adapter = (a, b, linear.sizes, linear.scale)

    def forward(self, x):
        x = x.to(self.weight.dtype)
        y = F.linear(x, self.weight, self.bias)
        if self.adapter is not None:
            y = y + low_rank(x, *self.adapter)
        return y


def can_pack(dtype):
    """Whether oneDNN multiplies packed matrices of this dtype on this machine."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere not measured
    if not is_x86 or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # false with AVX2 alone
    return dtype == torch.float32


def decoding_twin(model, dtype, rows):
    """The model that decodes `rows` rows in `dtype`: a twin if that is faster, else the model itself.

    A twin shares all parameters but the matrices, of which it holds a copy; the model stays as it is."""
    model = whole_model(model)
    if model.trunk_is_compiled:
        return model
    device = model.embedding.weight.device.type
    if device == "cuda" and dtype != model.residual_dtype:
        return cast_twin(model, dtype)
    linears = (nn.Linear, LoRALinear)
    matrices = [module.weight for module in model.modules() if isinstance(module, linears)]
    is_large = sum(matrix.numel() for matrix in matrices) >= MIN_PARAMETERS
    if device == "cpu" and is_large and can_pack(dtype):
        return PackedGPT(model, dtype, rows)
    return model


def cast_twin(model, dtype):
    """A twin whose blocks multiply in `dtype` without autocast's casts; it holds a copy of their matrices."""
    shared = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, memo=shared)  # new modules, the same parameters: what the memo has is kept
    for module in list(twin.blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.Linear, LoRALinear)):
                setattr(module, name, CastLinear(child, dtype))
    return twin
