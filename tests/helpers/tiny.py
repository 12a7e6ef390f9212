"""Tiny GPTs in fp64."""

import torch

from nanoroads.model import GPT, GPTConfig

LLAMA = {"position": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "qkv_bias": False, "bias": False}
SHAPES = {
    "learned": {},
    "neox": {
        "position": "rotary",
        "rotary_pct": 0.5,
        "mlp": "gelu",
        "parallel_residual": True,
        "tied": False,
    },
    "gqa": LLAMA | {"n_kv_head": 2, "head_size": 12},
    "qwen3": LLAMA | {"n_kv_head": 2, "head_size": 12, "qk_norm": "head"},
    "olmo2": LLAMA | {"n_kv_head": 2, "qk_norm": "all", "norm_place": "after"},
}


def tiny(kind="learned", seed=0, **options):
    """A GPT whose weights are far from their initial zeros and ones."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(**{"vocab_size": 23, "block_size": 48, "n_embd": 32, "n_head": 4} | SHAPES[kind] | options)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.uniform_(0.5, 1.5) if "norm" in name and "weight" in name else p.normal_(std=0.3)
    return model.double()
