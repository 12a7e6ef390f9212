"""The config.json of a Hugging Face folder, into a GPTConfig and out of a model.

One table, our field beside each family's key, serves both directions. What a config asks for and
GPT cannot do is refused by name, never approximated. `kind` is a config.json's model_type: gpt2,
gpt_neox, llama, mistral, qwen2, qwen3 or olmo2.
"""

import json
import typing

from nanoroads.errors import InputError
from nanoroads.model import GPTConfig

# Mistral, Qwen2, Qwen3 and OLMo 2 share the column of Llama. key=value: what transformers takes for a
# missing key.
FIELDS = """
ours               gpt2                            gpt_neox                    llama
vocab_size         vocab_size                      vocab_size                  vocab_size
block_size         n_positions                     max_position_embeddings     max_position_embeddings
n_layer            n_layer                         num_hidden_layers           num_hidden_layers
n_head             n_head                          num_attention_heads         num_attention_heads
n_kv_head          -                               -                           num_key_value_heads=null
head_size          -                               -                           head_dim=null
n_embd             n_embd                          hidden_size                 hidden_size
d_ff               n_inner=null                    intermediate_size           intermediate_size
mlp                activation_function="gelu_new"  hidden_act="gelu"           hidden_act="silu"
norm_eps           layer_norm_epsilon=1e-5         layer_norm_eps=1e-5         rms_norm_eps=1e-6
parallel_residual  -                               use_parallel_residual=true  -
rotary_pct         -                               rotary_pct=0.25             -
rope_theta         -                               rotary_emb_base=1e4         rope_theta=1e4
rope_scaling       -                               rope_scaling=null           rope_scaling=null
tied               tie_word_embeddings=true        tie_word_embeddings=false   tie_word_embeddings=false
"""

# What a family always is, whatever its config.json says.
LLAMA_FIXED = {"position": "rotary", "norm": "rmsnorm", "qkv_bias": False, "bias": False}
FIXED = {
    "gpt2": {},
    "gpt_neox": {"position": "rotary"},
    "llama": LLAMA_FIXED,
    "mistral": LLAMA_FIXED,
    "qwen2": {**LLAMA_FIXED, "qkv_bias": True},
    "qwen3": {**LLAMA_FIXED, "qk_norm": "head"},
    "olmo2": {**LLAMA_FIXED, "qk_norm": "all", "norm_place": "after"},
}
# What a missing key means in a family that differs from the column that it shares.
FAMILY_DEFAULTS = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "olmo2": {"rms_norm_eps": 1e-5},
}
# Relatives of these families that GPT cannot represent, and one reason each.
RELATIVES = {
    "gemma3_text": "some of its layers have a sliding window",
    "gpt_oss": "it is a mixture of experts",
    "llama4_text": "it is a mixture of experts",
    "mixtral": "it is a mixture of experts",
    "olmo": "its norms have no weights",
    "olmo3": "most of its layers have a sliding window",
    "olmoe": "it is a mixture of experts",
    "qwen3_5_text": "most of its layers have linear attention",
    "qwen3_moe": "it is a mixture of experts",
    "qwen3_next": "most of its layers have linear attention",
    "smollm3": "every fourth of its layers has no rotary embedding",
}
GELU = {"gelu_new": "gelu_tanh", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
SILU = {"silu": "swiglu"}
ACTIVATIONS = {
    "gpt2": GELU,
    "gpt_neox": GELU,
    "llama": SILU,
    "mistral": SILU,
    "qwen2": SILU,
    "qwen3": SILU,
    "olmo2": SILU,
}
SAVED_ACTIVATION = {"gelu_tanh": "gelu_new", "gelu": "gelu", "swiglu": "silu"}
# Other keys that change the logits, and the one value that GPT can represent.
ONLY_VALUE = {
    "mlp_bias": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "use_sliding_window": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "clip_qkv": None,
}
ORIGINAL_LENGTH = "original_max_position_embeddings"
# The settings of Llama 3's scaling.
LLAMA3_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL_LENGTH)
# Token ids and positions are int32, so sizes must fit it; of other numbers this refuses infinity.
TOO_LARGE = 2**31
ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}

# ---------------------------------------------------------------- the table


def column(table, kind):
    """{our name: the family's cell} of a table like FIELDS, without the rows where it has "-"."""
    lines = table.strip().splitlines()
    families = lines[0].split()
    place = families.index(kind if kind in families else "llama")
    cells = {}
    for line in lines[1:]:
        row = line.split()
        if row[place] != "-":
            cells[row[0]] = row[place]
    return cells


def config_keys(kind):
    """{our field: the family's key}, and {its key: what a config.json without it means}."""
    keys = {}
    defaults = {}
    for field, cell in column(FIELDS, kind).items():
        key, equals, default = cell.partition("=")
        keys[field] = key
        if equals:
            defaults[key] = json.loads(default)
    return keys, defaults


# ---------------------------------------------------------------- into a GPTConfig


def to_gpt_config(hf_config, path):
    """A Hugging Face config.json, as a dict -> GPTConfig.

    path: the file, for error messages. Raises InputError naming the key whose value is invalid, or
    asks for what GPT cannot do."""
    kind = hf_config["model_type"]
    if not isinstance(kind, str) or kind not in FIXED:
        why = ""
        if isinstance(kind, str) and kind in RELATIVES:
            why = f" ({RELATIVES[kind]})"
        raise InputError(f"{path}: model_type {kind!r}{why} is not one of {', '.join(FIXED)}")
    keys, defaults = config_keys(kind)
    hf_config = {**defaults, **FAMILY_DEFAULTS.get(kind, {}), **hf_config}
    hf_config = gather_rope(hf_config, keys, path)

    fields = {}
    for field, key in keys.items():
        fields[field] = hf_config.get(key)
        if field == "rope_scaling":
            continue  # gather_rope has checked it
        if fields[field] is None and key in defaults and defaults[key] is None:
            continue  # GPTConfig fills it in
        check_type(key, fields[field], field_type(field), path)
    check_options(hf_config, fields, keys, path)
    fields["mlp"] = ACTIVATIONS[kind][fields["mlp"]]
    fields.update(FIXED[kind])
    try:
        return GPTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def gather_rope(hf_config, keys, path):
    """A copy of the config with all that it says of rotary embeddings under the keys of FIELDS.

    Newer configs keep it in rope_parameters; older ones have rope_scaling. Afterwards rope_scaling
    is None or what `rotary_table` reads, Llama 3's. Raises InputError for every other kind."""
    kind = hf_config["model_type"]
    hf_config = dict(hf_config)
    rope = hf_config.get("rope_scaling") or hf_config.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        # A dict inside: the settings differ from one type of layer to the next.
        raise not_supported(kind, "rope_scaling or rope_parameters", rope, path)
    if "rope_theta" in rope and "rope_theta" in keys:
        hf_config[keys["rope_theta"]] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        hf_config[keys.get("rotary_pct", "partial_rotary_factor")] = rope["partial_rotary_factor"]

    hf_config["rope_scaling"] = None
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "llama3":
        # transformers looks for the length in these three places, in this order.
        length = (
            hf_config.get(ORIGINAL_LENGTH)
            or rope.get(ORIGINAL_LENGTH)
            or hf_config.get("max_position_embeddings")
        )
        hf_config["rope_scaling"] = llama3_scaling({**rope, ORIGINAL_LENGTH: length}, path)
    elif rope_type != "default":
        raise not_supported(kind, "rope type", rope_type, path)
    return hf_config


def llama3_scaling(rope, path):
    """The four settings of Llama 3's scaling. Raises InputError: one is missing or not a number."""
    scaling = {}
    for key in LLAMA3_ROPE_KEYS:
        if rope.get(key) is None:
            raise InputError(f"{path}: its llama3 rope_scaling has no {key}")
        scaling[key] = rope[key]
    for key, value in scaling.items():
        check_type(key, value, float, path)
    return scaling


def field_type(field):
    """int, float, bool or str: what a field of GPTConfig holds where it is not None."""
    annotation = GPTConfig.__annotations__[field]
    if typing.get_args(annotation):  # (int, NoneType) for int | None
        return typing.get_args(annotation)[0]
    return annotation


def check_type(key, value, wanted, path):
    """Raises InputError unless the value is a positive int, a positive float, a bool or a str.

    By type(), since to isinstance a bool would be a number."""
    if wanted is int:
        fits = type(value) is int and 0 < value < TOO_LARGE
        description = "a positive integer"
    elif wanted is float:
        fits = type(value) in (int, float) and 0 < value < TOO_LARGE
        description = "a positive number"
    elif wanted is bool:
        fits = type(value) is bool
        description = "true or false"
    else:
        fits = type(value) is str
        description = "text"
    if not fits:
        raise InputError(f"{path}: {key} is {value!r}, not {description}")


def check_options(hf_config, fields, keys, path):
    """Raises InputError for the first option that changes the logits in a way that GPT cannot."""
    kind = hf_config["model_type"]
    only = {**ONLY_VALUE, "attention_bias": kind == "gpt_neox"}
    for key, value in only.items():
        if hf_config.get(key) is not None and hf_config[key] != value:
            raise not_supported(kind, key, hf_config[key], path)
    if kind == "mistral" and hf_config["sliding_window"] is not None:
        # A window that no sequence fills changes nothing.
        check_type("sliding_window", hf_config["sliding_window"], int, path)
        if hf_config["sliding_window"] < fields["block_size"]:
            raise not_supported(kind, "sliding_window", hf_config["sliding_window"], path)
    layer_types = hf_config.get("layer_types")
    if layer_types is not None:
        is_list = isinstance(layer_types, list) and len(layer_types) == fields["n_layer"]
        if not is_list or any(layer_type != "full_attention" for layer_type in layer_types):
            raise not_supported(kind, "layer_types", layer_types, path)
    if fields["mlp"] not in ACTIVATIONS[kind]:
        raise not_supported(kind, keys["mlp"], fields["mlp"], path)


def not_supported(kind, key, value, path):
    """The error for an option that GPT cannot represent."""
    return InputError(f"{path}: {kind} with {key} {value!r} is not supported")


# ---------------------------------------------------------------- out of a model


def nearest_family(config):
    """The model_type to write: the family that can be what the config says, if any can."""
    if config.qk_norm == "head":
        return "qwen3"
    if config.qk_norm == "all":
        return "olmo2"
    if config.position == "learned":
        return "gpt2"
    if config.norm == "layernorm":
        return "gpt_neox"
    return "qwen2" if config.qkv_bias else "llama"


def to_hf_config(model, kind, eos):
    """config.json of one family for a model, as a dict."""
    config = model.config
    keys, _ = config_keys(kind)
    hf_config = {key: getattr(config, field) for field, key in keys.items()}
    hf_config[keys["mlp"]] = SAVED_ACTIVATION[config.mlp]
    if config.rope_scaling:
        hf_config["rope_scaling"] = {"rope_type": "llama3", **config.rope_scaling}
    hf_config["model_type"] = kind
    hf_config["architectures"] = [ARCHITECTURES[kind]]
    hf_config["torch_dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    hf_config["bos_token_id"] = None
    if isinstance(eos, tuple):  # transformers writes one as itself, and several as a list
        eos = eos[0] if len(eos) == 1 else list(eos)
    hf_config["eos_token_id"] = eos
    return hf_config
