"""Faster decoding on an x86 CPU: a twin of a model whose matrices are in the layout that oneDNN multiplies with.

A reader of the sampler can skip this file: `decoding_twin(model, ...)` computes what `model` computes.
"""

import copy

import torch
from torch import nn

WORTH_PACKING = 1 << 20  # parameters; with fewer, packing takes longer than it saves


class PackedLinear(nn.Module):
    """nn.Linear with its weight packed for oneDNN. For the few rows of a decoding step it takes a third (fp32) or half
    (bf16) of the time of nn.Linear, which works through a plain weight at a fraction of memory's speed."""

    def __init__(self, linear, dtype, rows):
        super().__init__()
        self.dtype = dtype
        self.bias = None if linear.bias is None else linear.bias.to(dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), rows)

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.packed, self.bias, "none", [], "")


def can_pack(dtype):
    """Whether oneDNN multiplies packed matrices of this dtype on this machine. Measured on x86 alone."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.cpu.get_cpu_capability().startswith(
        "AVX"
    ):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def decoding_twin(model, dtype, rows):
    """The model to decode `rows` rows with in `dtype`: on an x86 CPU a twin with PackedLinear modules, elsewhere itself.

    The twin shares all parameters but the matrices, of which it holds a copy; the model stays as it is."""
    if model.embedding.weight.device.type != "cpu" or model.trunk_is_compiled or not can_pack(dtype):
        return model
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    if sum(matrix.numel() for matrix in matrices) < WORTH_PACKING:
        return model
    shared = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, shared)  # deepcopy's memo: what is in it is not copied
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child, dtype, rows))
    return twin
