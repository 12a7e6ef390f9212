"""A small Hugging Face folder with all of its files, without any library but this one."""

import json

from helpers.tiny import tiny
from nanoroads.text.tokenizer_json import BYTE_OF
from nanoroads.weights.hf import save_hf

END = "<|end|>"
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)


def small_folder(folder, template=TEMPLATE, pattern=None):
    """Write a tiny Llama with a tokenizer of bytes and a chat template; returns the folder.

    pattern: what the tokenizer cuts a text at (None: what GPT-2's does)."""
    vocab = {character: byte for character, byte in BYTE_OF.items()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = pattern is None
    cuts = [byte_level]
    if pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        cuts = [split, byte_level]
    specification = {
        "version": "1.0",
        "added_tokens": [{"id": 256, "content": END, "special": True, **flags}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": cuts},
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    save_hf(folder, tiny("gqa", vocab_size=257, block_size=256), eos=256)
    write = {
        "tokenizer.json": specification,
        "tokenizer_config.json": {"eos_token": END},
        "generation_config.json": {"eos_token_id": 256},
    }
    for name, value in write.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def edit_json(path, **changes):
    """Write other entries into a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
