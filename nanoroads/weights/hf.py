"""Hugging Face folders in and out: GPT-2, GPT-NeoX (Pythia), Llama (and SmolLM), Mistral, Qwen2.

Two tables, our name and theirs, serve both directions. What a config asks for and GPT cannot do is refused by name,
never approximated. Only safetensors files are read; nothing is unpickled.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path

import torch

from nanoroads.errors import InputError
from nanoroads.model import GPT, GPTConfig
from nanoroads.weights.files import cpu_weights, read_safetensors, write_json, write_safetensors

# Mistral and Qwen2 share the column of Llama. key=value: what transformers takes where config.json has no such key.
MODULES = """
ours                    gpt2              gpt_neox                            llama
prefix                  transformer.      gpt_neox.                           model.
embedding               wte               embed_in                            embed_tokens
position_embedding      wpe               -                                   -
blocks.#.norm1          h.#.ln_1          layers.#.input_layernorm            layers.#.input_layernorm
blocks.#.attention.qkv  h.#.attn.c_attn   layers.#.attention.query_key_value  layers.#.self_attn.[qkv]_proj
blocks.#.attention.out  h.#.attn.c_proj   layers.#.attention.dense            layers.#.self_attn.o_proj
blocks.#.norm2          h.#.ln_2          layers.#.post_attention_layernorm   layers.#.post_attention_layernorm
blocks.#.mlp.gate       -                 -                                   layers.#.mlp.gate_proj
blocks.#.mlp.up         h.#.mlp.c_fc      layers.#.mlp.dense_h_to_4h          layers.#.mlp.up_proj
blocks.#.mlp.down       h.#.mlp.c_proj    layers.#.mlp.dense_4h_to_h          layers.#.mlp.down_proj
norm                    ln_f              final_layer_norm                    norm
lm_head                 lm_head           embed_out                           lm_head
"""
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
LLAMA = {
    "position": "rotary",
    "norm": "rmsnorm",
    "qkv_bias": False,
    "bias": False,
}  # what a family always is:
FIXED = {
    "gpt2": {},
    "gpt_neox": {"position": "rotary"},
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA | {"qkv_bias": True},
}
GELU = {"gelu_new": "gelu_tanh", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
SILU = {"silu": "swiglu"}
# Other keys that change the logits, and the one value that GPT can represent.
ONLY = {
    "mlp_bias": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
ONLY |= {
    "use_sliding_window": False,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
LENGTH = "original_max_position_embeddings"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", LENGTH)
TOKENIZER_FILES = (
    "tokenizer",
    "special_tokens",
    "chat_template",
    "vocab",
    "merges",
    "generation_config",
)  # files of a folder
BUFFERS = re.compile(
    r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$"
)  # constants that older files carry


def column(table, kind):
    """{our name: theirs} for one model_type, and {their name: default}."""
    header, *rows = (line.split() for line in table.strip().splitlines())
    i = header.index(kind if kind in header else "llama")
    cells = {row[0]: row[i].partition("=") for row in rows if row[i] != "-"}
    return {k: c[0] for k, c in cells.items()}, {c[0]: json.loads(c[2]) for c in cells.values() if c[2]}


def to_gpt_config(theirs, path):
    """A Hugging Face config.json -> GPTConfig. Raises InputError naming the option that GPT can't represent."""

    def refuse(key, value):
        raise InputError(f"{path}: {kind} with {key} {value!r} is not supported")

    def check(key, value, kind):
        number = type(value) in (int, float) and 0 < value < 2**31  # to isinstance a bool would be a number
        fits = {
            int: number and type(value) is int,
            float: number,
            bool: type(value) is bool,
            str: type(value) is str,
        }
        if not fits[kind]:
            wanted = {
                int: "a positive integer",
                float: "a positive number",
                bool: "true or false",
                str: "text",
            }
            raise InputError(f"{path}: {key} is {value!r}, not {wanted[kind]}")

    kind = theirs["model_type"]
    if str(kind) not in FIXED:
        raise InputError(f"{path}: model_type {kind!r} is not one of {', '.join(FIXED)}")
    keys, silent = column(FIELDS, kind)
    family = {
        "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
        "qwen2": {"num_key_value_heads": 32},
    }
    theirs = silent | family.get(kind, {}) | theirs

    # Newer configs keep all settings of the rotary embedding in rope_parameters; older ones have rope_scaling.
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(
        isinstance(value, dict) for value in rope.values()
    ):  # one for each type of layer
        refuse("rope_scaling or rope_parameters", rope)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    share = keys.get("rotary_pct", "partial_rotary_factor")
    moved = {"rope_theta": keys.get("rope_theta"), "partial_rotary_factor": share}
    theirs |= {key: rope[new] for new, key in moved.items() if new in rope} | {"rope_scaling": None}
    if rope_type == "llama3":
        length = (
            theirs.get(LENGTH) or rope.get(LENGTH) or theirs.get("max_position_embeddings")
        )  # as transformers looks
        rope = rope | {LENGTH: length}
        theirs["rope_scaling"] = {key: rope.get(key) for key in LLAMA3}
        if missing := [key for key in LLAMA3 if rope.get(key) is None]:
            raise InputError(f"{path}: its llama3 rope_scaling has no {missing[0]}")
        for key in LLAMA3:
            check(key, rope[key], float)
    elif rope_type != "default":
        refuse("rope type", rope_type)

    ours = {field: theirs.get(key) for field, key in keys.items()}
    for field, key in keys.items():
        if field != "rope_scaling" and not (
            ours[field] is None and silent.get(key, 0) is None
        ):  # null is the default
            annotation = GPTConfig.__annotations__[field]
            check(key, ours[field], next(t for t in (int, float, bool, str) if annotation in (t, t | None)))
    for key, value in {**ONLY, "attention_bias": kind == "gpt_neox"}.items():
        if theirs.get(key, value) not in (value, None):
            refuse(key, theirs[key])
    if kind == "mistral" and (window := theirs["sliding_window"]) is not None:
        check("sliding_window", window, int)
        if window < ours["block_size"]:
            refuse("sliding_window", window)
    if theirs.get("layer_types") not in (None, ["full_attention"] * ours["n_layer"]):
        refuse("layer_types", theirs["layer_types"])
    if ours["mlp"] not in (GELU if kind in ("gpt2", "gpt_neox") else SILU):
        refuse(keys["mlp"], ours["mlp"])
    ours["mlp"] = (GELU | SILU)[ours["mlp"]]
    try:
        return GPTConfig(**ours | FIXED[kind])
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def their_names(ours, kind):
    """Our tensor name -> the list of theirs that make it up."""
    _, layer, module, end = re.fullmatch(r"(blocks\.(\d+)\.)?(.+)\.(weight|bias)", ours).groups()
    table, _ = column(MODULES, kind)
    name = table[f"blocks.#.{module}" if layer else module].replace("#", str(layer))
    prefix = "" if module == "lm_head" else table["prefix"]
    return [f"{prefix}{name.replace('[qkv]', x)}.{end}" for x in ("qkv" if "[qkv]" in name else "-")]


def relayout(x, ours, kind, shape):
    """The two families that lay a matrix out differently; shape: (H, 3) on the way in, (3, H) on the way out."""
    if kind == "gpt2" and x.ndim == 2 and ours.startswith("blocks."):
        return x.T  # Conv1D keeps (in, out)
    if (
        kind == "gpt_neox" and ".qkv." in ours
    ):  # theirs: q, k, v of head 0, of head 1, ...; ours: all q, all k, all v
        return x.unflatten(0, (*shape, -1)).transpose(0, 1).flatten(0, 2)
    return x


def read_folder(folder):
    """All tensors of model.safetensors, or of the shards in its index, and the path to name in errors."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        if not path.exists() and (pickles := [*folder.glob("*.bin"), *folder.glob("*.pt*")]):
            raise InputError(f"{pickles[0]}: a pickle is never read; convert it to {path.name}")
        return read_safetensors(path)[0], path
    try:
        shards = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index}: not an index of safetensors files") from None
    return {k: x for shard in shards for k, x in read_safetensors(shard)[0].items()}, index


def load_hf(folder, theirs):
    """A Hugging Face folder, its config.json as a dict -> (GPTConfig, tensors by our names, path for error messages).

    Raises InputError naming the file and the option or tensor."""
    folder, kind = Path(folder), theirs["model_type"]
    config = to_gpt_config(theirs, folder / "config.json")
    found, path = read_folder(folder)
    prefix = column(MODULES, kind)[0]["prefix"]
    if not any(
        name.startswith(prefix) for name in found
    ):  # saved without its head, as openai-community/gpt2 is
        found = {
            prefix * (not name.startswith(("lm_head", "embed_out"))) + name: x for name, x in found.items()
        }
    tensors = {}
    with torch.device("meta"):
        wanted = GPT(config).state_dict()
    for ours in wanted:
        names = their_names(ours, kind)
        if config.tied and ours == "lm_head.weight" and names[0] not in found:
            continue
        for name in names:
            if name not in found or not found[name].is_floating_point():
                raise InputError(f"{path}: holds no floating-point tensor {name}")
        parts = [found.pop(name) for name in names]
        try:
            tensors[ours] = relayout(
                torch.cat(parts) if len(parts) > 1 else parts[0], ours, kind, (config.n_head, 3)
            )
        except RuntimeError:
            raise InputError(
                f"{path}: {names[0]} is {tuple(parts[0].shape)}, which the config contradicts"
            ) from None
    head = tensors.pop("lm_head.weight", None) if config.tied else None  # some files hold it twice
    if head is not None and not torch.equal(head, tensors["embedding.weight"]):
        raise InputError(f"{path}: the config ties the head to the embedding, but here they differ")
    if unknown := [name for name in found if not BUFFERS.search(name)]:
        raise InputError(f"{path}: holds a tensor {unknown[0]} that the config has no place for")
    return config, tensors, path


def save_hf(folder, model, eos=None):
    """Write config.json and model.safetensors, which transformers loads with the same logits. eos: its token id.

    Raises InputError naming the field that no family has, e.g. a scalar head."""
    folder, config = Path(folder), model.config
    llama = "qwen2" if config.qkv_bias else "llama"
    kind = "gpt2" if config.position == "learned" else "gpt_neox" if config.norm == "layernorm" else llama
    keys, _ = column(FIELDS, kind)
    theirs = {key: getattr(config, field) for field, key in keys.items()}
    theirs[keys["mlp"]] = {"gelu_tanh": "gelu_new", "gelu": "gelu", "swiglu": "silu"}[config.mlp]
    if config.rope_scaling:
        theirs["rope_scaling"] = {"rope_type": "llama3", **config.rope_scaling}
    classes = {"gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM"}
    theirs |= {"model_type": kind, "architectures": [classes.get(kind, "Qwen2ForCausalLM")]}
    theirs |= {
        "torch_dtype": str(model.embedding.weight.dtype)[6:],
        "bos_token_id": None,
        "eos_token_id": eos,
    }
    back = to_gpt_config(theirs, folder / "config.json")
    for field, value in asdict(config).items():
        if getattr(back, field) != value and field != "readout":
            raise InputError(f"{folder}: {kind}, the nearest Hugging Face family, has no {field} {value!r}")

    tensors = {}
    for ours, x in cpu_weights(model).items():
        x, names = relayout(x, ours, kind, (3, config.n_head)), their_names(ours, kind)
        heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        parts = x.split([n * config.head_size for n in heads] if len(names) > 1 else len(x))
        tensors |= {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})
    write_json(folder / "config.json", theirs)
