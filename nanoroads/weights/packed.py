"""Faster decoding on an x86 CPU: a twin of a model, its matrices in the layout that oneDNN likes.

A reader of the sampler can skip this file: `decoding_twin(model, ...)` computes what `model` does.
"""

import copy

import torch
from torch import nn

MIN_PARAMETERS = 2**20  # with fewer, packing takes longer than it saves


class PackedLinear(nn.Module):
    """nn.Linear with its weight packed for oneDNN.

    For the few rows of a decoding step it takes a third (fp32) or half (bf16) of the time of
    nn.Linear, which works through a plain weight at a fraction of memory's speed."""

    def __init__(self, linear, dtype, rows, product_dtype):
        """dtype: of the factors. product_dtype: of the product, dtype itself or fp32."""
        super().__init__()
        self.dtype = dtype
        self.product_dtype = product_dtype
        self.bias = None if linear.bias is None else linear.bias.to(product_dtype)
        weight = linear.weight.detach().to(dtype).to(product_dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(self, x):
        x = x.to(self.dtype).to(self.product_dtype)
        # "none", [], "": no activation behind the product.
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(dtype):
    """Whether oneDNN multiplies packed matrices of this dtype on this machine."""
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")  # elsewhere not measured
    if not is_x86 or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()  # false with AVX2 alone
    return dtype == torch.float32


def decoding_twin(model, dtype, rows):
    """The model that decodes `rows` rows in `dtype`: a PackedLinear twin if that is faster.

    Else it is the model itself. The twin shares all parameters but the matrices, of which it
    holds a copy; the model stays as it is."""
    on_cpu = model.embedding.weight.device.type == "cpu"
    if not on_cpu or model.trunk_is_compiled or not can_pack(dtype):
        return model
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    if sum(matrix.numel() for matrix in matrices) < MIN_PARAMETERS:
        return model
    shared = {id(parameter): parameter for parameter in model.parameters()}
    twin = copy.deepcopy(model, memo=shared)  # what is in the memo is not copied
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                # Logits are not rounded, see GPT.sampling_head.
                product_dtype = torch.float32 if name == "lm_head" else dtype
                setattr(module, name, PackedLinear(child, dtype, rows, product_dtype))
    return twin
