"""Hugging Face folders in and out: GPT-2, GPT-NeoX (Pythia), Llama (and SmolLM), Mistral, Qwen2, Qwen3,
OLMo 2.

One table, our name beside each family's, serves both directions; hf_config.py has a similar table
for the config. Only safetensors files are read; nothing is unpickled. `kind` is a config.json's
model_type: gpt2, gpt_neox, llama, mistral, qwen2, qwen3 or olmo2.
"""

import copy
import functools
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from nanoroads.errors import InputError, printable
from nanoroads.model import GPT
from nanoroads.weights.files import (
    check_weight,
    cpu_weights,
    read_safetensors,
    write_atomic,
    write_json,
    write_safetensors,
)
from nanoroads.weights.folder import TEMPLATES, is_name_inside, own_file, read_json_object
from nanoroads.weights.hf_config import column, nearest_family, to_gpt_config, to_hf_config
from nanoroads.weights.lora import adapters, merge

# Names of modules, after the prefix that all but lm_head carry; # is the layer's number. Mistral,
# Qwen2, Qwen3 and OLMo 2 share the column of Llama.
MODULES = """
ours                    gpt2             gpt_neox                            llama
prefix                  transformer.     gpt_neox.                           model.
embedding               wte              embed_in                            embed_tokens
position_embedding      wpe              -                                   -
blocks.#.norm1          h.#.ln_1         layers.#.input_layernorm            layers.#.input_layernorm
blocks.#.attention.qkv  h.#.attn.c_attn  layers.#.attention.query_key_value  layers.#.self_attn.[qkv]_proj
blocks.#.attention.out  h.#.attn.c_proj  layers.#.attention.dense            layers.#.self_attn.o_proj
blocks.#.attention.q_norm  -             -                                   layers.#.self_attn.q_norm
blocks.#.attention.k_norm  -             -                                   layers.#.self_attn.k_norm
blocks.#.norm2          h.#.ln_2         layers.#.post_attention_layernorm   layers.#.post_attention_layernorm
blocks.#.mlp.gate       -                -                                   layers.#.mlp.gate_proj
blocks.#.mlp.up         h.#.mlp.c_fc     layers.#.mlp.dense_h_to_4h          layers.#.mlp.up_proj
blocks.#.mlp.down       h.#.mlp.c_proj   layers.#.mlp.dense_4h_to_h          layers.#.mlp.down_proj
norm                    ln_f             final_layer_norm                    norm
lm_head                 lm_head          embed_out                           lm_head
"""
# What a family calls otherwise than the column that it shares. OLMo 2 norms after attention and MLP.
RENAMED = {
    "olmo2": {
        "blocks.#.norm1": "layers.#.post_attention_layernorm",
        "blocks.#.norm2": "layers.#.post_feedforward_layernorm",
    }
}

# Beginnings of the names of files that an export copies from the folder the run started from.
TOKENIZER_FILES = ("tokenizer", "special_tokens", "chat_template", "vocab", "merges", "generation_config")
MOST_LAYERS = 1000  # the largest public models have some 130
# Constants that older files carry among the weights: causal masks and rotary frequencies.
BUFFERS = re.compile(r"\.(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$")

# ---------------------------------------------------------------- one tensor


def their_names(name, kind):
    """The names that a family has for one of our tensors: three where it keeps q, k and v apart."""
    modules = {**column(MODULES, kind), **RENAMED.get(kind, {})}
    module, _, weight_or_bias = name.rpartition(".")
    if module.startswith("blocks."):
        _, layer, inner = module.split(".", maxsplit=2)
        module_name = modules[f"blocks.#.{inner}"].replace("#", layer)
    else:
        module_name = modules[module]
    if module != "lm_head":
        module_name = modules["prefix"] + module_name
    if "[qkv]" in module_name:
        return [f"{module_name.replace('[qkv]', letter)}.{weight_or_bias}" for letter in ("q", "k", "v")]
    return [f"{module_name}.{weight_or_bias}"]


def relayout(x, name, kind, split):
    """A tensor from a family's layout to ours, or back.

    name: ours. split: how the rows of a fused qkv are divided, (n_head, 3) from theirs, (3, n_head)
    from ours. Only GPT-2 and GPT-NeoX lay their matrices out differently."""
    if kind == "gpt2" and x.ndim == 2 and name.startswith("blocks."):
        return x.T  # its Conv1D keeps (in, out)
    if kind == "gpt_neox" and ".qkv." in name:
        # Its rows are q, k, v of head 0, then of head 1, ...; ours all of q, then of k, then of v.
        return x.unflatten(0, (*split, -1)).transpose(0, 1).flatten(0, 2)
    return x


# ---------------------------------------------------------------- reading a folder


def load_hf(folder, hf_config):
    """A Hugging Face folder, its config.json as a dict -> (GPTConfig, {our name: tensor}, path).

    path: of the weights, for error messages. Raises InputError naming the file, and the option or
    the tensor."""
    folder = Path(folder)
    kind = hf_config["model_type"]
    config = to_gpt_config(hf_config, folder / "config.json")
    found, path = read_folder(folder)
    found = with_prefix(found, column(MODULES, kind)["prefix"])
    tensors = {}
    for name in plan(config, found, path).state_dict():
        if name == "lm_head.weight" and config.tied and their_names(name, kind)[0] not in found:
            continue
        tensors[name] = take_tensor(found, name, kind, config, path)

    if config.tied and "lm_head.weight" in tensors:  # some files hold the shared matrix twice
        head = tensors.pop("lm_head.weight")
        if not torch.equal(head, tensors["embedding.weight"]):
            raise InputError(f"{path}: the config ties the head to the embedding, but here they differ")
    for name in found:
        if not BUFFERS.search(name):
            raise InputError(f"{path}: holds a tensor {name} that the config has no place for")
    return config, tensors, path


def read_folder(folder):
    """{their name: tensor} of model.safetensors or of the shards in its index, and the file's path.

    Raises InputError, also where there are only pickles."""
    path = own_file(folder, "model.safetensors")
    if path is not None:
        tensors, _ = read_safetensors(path)
        return tensors, path
    index = own_file(folder, "model.safetensors.index.json")
    if index is not None:
        return read_shards(folder, index), index
    pickles = [*folder.glob("*.bin"), *folder.glob("*.pt*")]
    if pickles:
        raise InputError(f"{pickles[0]}: a pickle is never read; convert it to model.safetensors")
    raise InputError(f"{folder}/model.safetensors: no such file")


def read_shards(folder, index):
    """{their name: tensor} of the files that an index names. Raises InputError."""
    try:
        weight_map = read_json_object(index)["weight_map"]  # {tensor's name: file's name}
        shards = list(dict.fromkeys(weight_map.values()))  # each once
    except (InputError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: not an index of safetensors files ({error})") from None
    tensors = {}
    shard_of = {}
    for name in shards:
        if not is_name_inside(name):
            raise InputError(f"{index}: not an index of safetensors files of this folder, but of {name!r}")
        shard = own_file(folder, name)
        if shard is None:
            raise InputError(f"{folder}/{name}: no such file, though {index.name} names it")
        part, _ = read_safetensors(shard)
        for tensor_name in part:
            if tensor_name in tensors:
                raise InputError(f"{shard}: holds {tensor_name}, which is in {shard_of[tensor_name]} too")
            shard_of[tensor_name] = name
        tensors.update(part)
    return tensors


def plan(config, found, path):
    """The GPT of a config without its memory, on the meta device: it has names and shapes.

    found: the tensors of the file `path`, which bound the layers that are built. Raises InputError
    for a config that no GPT can have."""
    config_path = path.parent / "config.json"
    if config.n_layer > min(len(found), MOST_LAYERS):
        raise InputError(
            f"{config_path}: asks for {config.n_layer:,} layers, {path} holds {len(found):,} tensors"
        )
    rotated = int(config.head_size * config.rotary_pct)  # channels of a head
    if config.position == "rotary" and (rotated < 2 or rotated % 2 or rotated > config.head_size):
        raise InputError(f"{config_path}: rotates {rotated} of the {config.head_size} channels of a head")
    try:
        with torch.device("meta"):
            return GPT(config)
    except (TypeError, RuntimeError) as error:  # an invalid size
        raise InputError(f"{config_path}: {error}") from None


def with_prefix(found, prefix):
    """The tensors with the family's prefix, which a trunk that was saved without its head lacks.

    openai-community/gpt2 is such a file."""
    if any(name.startswith(prefix) for name in found):
        return found
    prefixed = {}
    for name, tensor in found.items():
        if name.startswith(("lm_head", "embed_out")):
            prefixed[name] = tensor
        else:
            prefixed[prefix + name] = tensor
    return prefixed


def take_tensor(found, name, kind, config, path):
    """Take out of `found` what makes up our tensor `name`, and return that, in our layout.

    Raises InputError: one is missing, is no weight, or cannot be rearranged into our layout;
    `fitting` checks the shapes."""
    names = their_names(name, kind)
    for their_name in names:
        if their_name not in found:
            raise InputError(f"{path}: holds no floating-point tensor {their_name}")
        check_weight(found[their_name], their_name, path)
    parts = [found.pop(their_name) for their_name in names]
    try:
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        return relayout(whole, name, kind, (config.n_head, 3))
    except RuntimeError:
        shape = tuple(parts[0].shape)
        raise InputError(f"{path}: {names[0]} is {shape}, which the config contradicts") from None


# ---------------------------------------------------------------- writing a folder


def copy_tokenizer_files(source, folder):
    """Copy the files that TOKENIZER_FILES names, and TEMPLATES, from one model's folder into another.

    What is no file of the source's own, a link to elsewhere or a folder, is left out, with a word."""
    names = [path.name for path in Path(source).iterdir() if path.name.startswith(TOKENIZER_FILES)]
    names += [f"{TEMPLATES}/{path.name}" for path in Path(source, TEMPLATES).glob("*.jinja")]
    for name in sorted(names):
        try:
            path = own_file(source, name)
        except InputError as error:
            print(printable(f"not copied into {folder}: {error}"))
            continue
        copy = Path(folder) / name
        copy.parent.mkdir(exist_ok=True)
        # Renamed into its place: a link that has this name there is replaced, and not written through.
        write_atomic(copy, functools.partial(shutil.copyfile, path))


def save_hf(folder, model, eos=None):
    """Write config.json and model.safetensors, which transformers loads with the same logits. Adapters are
    merged.

    eos: the id that ends a response, or a tuple of several, or None. A generation_config.json that was
    copied before gets it, too: transformers and vLLM stop at what that file names. Raises InputError
    naming the field that no family has, e.g. a scalar head."""
    folder = Path(folder)
    if adapters(model):
        model = merge(copy.deepcopy(model))
    config = model.config
    kind = nearest_family(config)
    hf_config = to_hf_config(model, kind, eos)
    read_again = to_gpt_config(hf_config, folder / "config.json")
    for field, value in asdict(config).items():
        if getattr(read_again, field) != value and field != "readout":
            raise InputError(f"{folder}: {kind}, the nearest Hugging Face family, has no {field} {value!r}")

    q_rows = config.n_head * config.head_size
    kv_rows = config.n_kv_head * config.head_size
    tensors = {}
    for name, x in cpu_weights(model).items():
        x = relayout(x, name, kind, (3, config.n_head))
        names = their_names(name, kind)
        parts = x.split([q_rows, kv_rows, kv_rows]) if len(names) > 1 else [x]
        for their_name, part in zip(names, parts, strict=True):
            tensors[their_name] = part.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, hashed=False)
    generation_config = folder / "generation_config.json"
    if eos is not None and generation_config.exists():
        settings = read_json_object(generation_config)
        write_json(generation_config, {**settings, "eos_token_id": hf_config["eos_token_id"]})
    write_json(folder / "config.json", hf_config)
