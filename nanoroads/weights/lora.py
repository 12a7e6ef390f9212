"""Low-rank adapters (LoRA; Hu et al., 2106.09685): a frozen matrix W acts as W + (alpha / rank) B A.

A (rank, in) begins as PEFT begins it, B (out, rank) at zero, so that a new adapter changes nothing.
These two are trained, in fp32. All other weights a model with adapters shares with the model that it
was made of: a policy has its reference in the same memory.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F

from nanoroads.weights.hf_config import nearest_family

# It stays when the rank changes, and so does, nearly, the best learning rate, which is about ten times that
# of full fine-tuning (Schulman et al., "LoRA Without Regret", 2025). TRL has 32, too.
ALPHA = 32
FUSED = ("gpt2", "gpt_neox")  # families with one matrix, and so one A, for q, k and v


def low_rank(x, a, b, sizes, scale):
    """x (N, in) -> scale B A x (N, out). b (out, rank): of its rows the first sizes[0] use the first
    matrix A in a (len(sizes) * rank, in), the next sizes[1] the second, and so on."""
    inner = scale * F.linear(x, a)  # (N, len(sizes) * rank)
    outs = [F.linear(h, part) for h, part in zip(inner.chunk(len(sizes), -1), b.split(sizes), strict=True)]
    return torch.cat(outs, -1)


class LoRALinear(nn.Module):
    """An nn.Linear with an adapter. sizes: [out], or those of q, k and v, see `low_rank`."""

    def __init__(self, linear, rank, sizes, alpha):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # (out, in), (out,) or None
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        self.sizes = sizes
        a = torch.empty(len(sizes) * rank, self.weight.shape[1])
        a = nn.init.kaiming_uniform_(a, a=math.sqrt(5)).to(self.weight.device)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(a.to(dtype))
        self.lora_B = nn.Parameter(torch.zeros(len(self.weight), rank, dtype=dtype, device=a.device))

    def change(self, x):
        return low_rank(x, self.lora_A, self.lora_B, self.sizes, self.scale)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + self.change(x)

    @torch.no_grad()
    def merged(self):
        """W + (alpha / rank) B A, (out, in), in the adapter's dtype."""
        a = self.lora_A.chunk(len(self.sizes))
        b = self.lora_B.split(self.sizes)
        return self.weight + self.scale * torch.cat([b[i] @ a[i] for i in range(len(a))])


def add_adapters(model, rank, alpha=ALPHA):
    """A GPT that has new adapters on all matrices of its blocks, and otherwise shares the model's
    weights, which are frozen. A is drawn from torch's global generator."""
    model.requires_grad_(False)
    shared = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, memo=shared)  # new modules, the same parameters: what the memo has is kept
    for name, linear in list(twin.blocks.named_modules()):
        if isinstance(linear, nn.Linear):
            sizes = [linear.weight.shape[0]]
            if name.endswith(".qkv") and nearest_family(model.config) not in FUSED:
                c = model.config
                sizes = [c.n_head * c.head_size, c.n_kv_head * c.head_size, c.n_kv_head * c.head_size]
            twin.blocks.set_submodule(name, LoRALinear(linear, rank, sizes, alpha))
    return twin


def adapters(model):
    """{name: LoRALinear} of a model; {} of one without."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def merge(model):
    """Put W + (alpha / rank) B A in the place of each W with an adapter. Returns the model.

    Whoever shares its W keeps it as it was."""
    for name, adapted in adapters(model).items():
        linear = nn.Linear(1, 1)
        linear.out_features, linear.in_features = adapted.weight.shape
        linear.weight, linear.bias = nn.Parameter(adapted.merged()), adapted.bias
        model.set_submodule(name, linear)
    return model
