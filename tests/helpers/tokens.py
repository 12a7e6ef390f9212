"""Tokenizers of Hugging Face folders, written by hand."""

from nanoroads.text.tokenizer_json import BYTE_OF
from nanoroads.weights.files import write_json


def byte_tokenizer(folder, swapped=False):
    """A folder whose tokenizer has a token for each byte and <|endoftext|>; two of them may be swapped."""
    vocab = {character: i for i, character in enumerate(BYTE_OF)}
    if swapped:
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    end = {"id": 256, "content": "<|endoftext|>", "special": True, "normalized": False}
    specification = {
        "added_tokens": [end],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    folder.mkdir()
    write_json(folder / "tokenizer.json", specification)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    return folder
