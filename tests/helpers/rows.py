"""Rows of tests: a tokenizer of bytes, a folder with a chat template, and files as text."""

import json

import tiktoken

from nanoroads.text import data
from nanoroads.text.data import Limits
from nanoroads.text.tokenizer_json import BYTE_OF, FolderEncoding

EOS = 300
# Enough to see a merge that crosses a boundary.
MERGES = [b"ab", b"\n\n", b" a", b"Human", b"Assistant"]

USER = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
BYE = {"role": "assistant", "content": "bye"}
ASKED = "\n\nHuman: hi\n\nAssistant:"


def byte_encoding():
    """Bytes, and a few merges: what a byte-level BPE does, small enough to count by hand."""
    ranks = {bytes([i]): i for i in range(256)}
    for token in MERGES:  # every prefix of a merge is a token too, so the merges can be reached
        for end in range(2, len(token) + 1):
            ranks.setdefault(token[:end], len(ranks))
    return tiktoken.Encoding(
        "tiny", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": EOS}
    )


def text(encoding, ids):
    return encoding.decode([t for t in ids if t != EOS])


def load(path, layout, encoding, context=10_000, **limits):
    """([(prompt, responses)], prompts), all as text."""
    rows = data.load(path, layout, encoding, Limits(context, **limits))
    found = []
    for prompt, group in zip(rows.prompts, rows.responses, strict=True):
        found.append((text(encoding, prompt), [text(encoding, response) for response in group]))
    return found, rows.texts


CHAT = (
    "<s>{% for m in messages %}{{ m.role }}:{{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chat_folder(tmp_path, template=CHAT):
    """A tokenizer of bytes with a chat template."""
    vocab = {c: i for i, c in enumerate(BYTE_OF)}
    added = [
        {"id": 256 + i, "content": c, "special": True, "normalized": False}
        for i, c in enumerate(("<s>", "<e>"))
    ]
    spec = {"added_tokens": added, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(spec | {"model": {"type": "BPE", "vocab": vocab, "merges": []}})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<e>", "chat_template": template})
    )
    return FolderEncoding(tmp_path)
