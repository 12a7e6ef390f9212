"""Tiny Hugging Face models with random weights, in fp64."""

import copy

import torch
import transformers

ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE["original_max_position_embeddings"] = 32
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SIZES |= {"max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": None}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"bos_token_id": None, "eos_token_id": None}

# name: (config class, options)
MODELS = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-exact-gelu": (
        "GPT2Config",
        GPT2 | {"activation_function": "gelu", "n_inner": 40, "layer_norm_epsilon": 1e-3},
    ),
    "gpt2-untied": ("GPT2Config", GPT2 | {"tie_word_embeddings": False}),
    "neox": ("GPTNeoXConfig", SIZES),
    "neox-sequential": ("GPTNeoXConfig", SIZES | {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "neox-tanh": (
        "GPTNeoXConfig",
        SIZES | {"hidden_act": "gelu_fast", "rotary_pct": 1.0, "rotary_emb_base": 500},
    ),
    "neox-tied": ("GPTNeoXConfig", SIZES | {"tie_word_embeddings": True}),
    "llama": ("LlamaConfig", SIZES),
    "llama-gqa": ("LlamaConfig", SIZES | {"num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
    "llama-tied": ("LlamaConfig", SIZES | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama3": (
        "LlamaConfig",
        SIZES | {"num_key_value_heads": 2, "rope_scaling": ROPE, "rope_theta": 5e4, "head_dim": 16},
    ),
    "mistral": ("MistralConfig", SIZES | {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral-window": ("MistralConfig", SIZES | {"num_key_value_heads": 2, "sliding_window": 64}),
    "qwen2": ("Qwen2Config", SIZES | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2Config", SIZES | {"num_key_value_heads": 4}),
    "qwen3": (
        "Qwen3Config",
        SIZES | {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1e6},
    ),
    "qwen3-untied": ("Qwen3Config", SIZES | {"num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-3}),
    "olmo2": ("Olmo2Config", SIZES | {"rope_theta": 5e5}),
    "olmo2-gqa": ("Olmo2Config", SIZES | {"num_key_value_heads": 2, "rms_norm_eps": 1e-3}),
}


def rms_norm(self, x):
    """transformers' RMSNorm rounds to fp32 whatever the dtype; this one does not."""
    return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


def exact(model):
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = rms_norm.__get__(module)
    return model.double().eval()


def make(name, seed=0, **options):
    kind, settings = MODELS[name]
    config = getattr(transformers, kind)(**copy.deepcopy(settings | options))  # it writes into nested dicts
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros and ones: a bias or norm in the wrong place must show
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
    return exact(model)
