"""Text <-> token ids, always through tiktoken: the map's own `roadmap`, `gpt2`, or the tokenizer.json of a Hugging Face folder."""

import functools
import re
from pathlib import Path

import tiktoken

from nanoroads.errors import InputError
from nanoroads.text.tokenizer_json import FolderEncoding
from nanoroads.weights.files import local_folder, read_config
from nanoroads.world import roadmap

LONGEST = (
    100_000  # blanks in a row: at some 500,000 the regex engine of tiktoken runs out of stack, and panics
)
EOS = (roadmap.EOS, "<|endoftext|>")  # of the map; of GPT-2 and Pythia


@functools.cache
def get(name):
    """A tiktoken Encoding: "roadmap", "gpt2", or of a Hugging Face folder. Raises InputError."""
    if name == "roadmap":
        return roadmap.encoding()
    if name == "gpt2":
        try:
            return tiktoken.get_encoding(name)
        except OSError as error:
            raise InputError(f"tokenizer gpt2: its files are not in TIKTOKEN_CACHE_DIR ({error})") from None
    if Path(name).is_dir():
        try:
            return FolderEncoding(Path(name))
        except InputError:
            raise
        except (
            Exception
        ) as error:  # a value is missing or of another type, a pattern is none: it is the file's fault
            raise InputError(f"{name}/tokenizer.json: not a tokenizer that can be read ({error!r})") from None
    raise InputError(f"tokenizer {str(name)!r} is neither roadmap nor gpt2 nor a folder")


def of(folder, model):
    """The tokenizer of a run or Hugging Face folder: (the name for `get`, the Encoding). Raises InputError if it has more
    tokens than the model; fewer are usual, since models are padded to round sizes."""
    name = read_config(folder).get("tokenizer", str(local_folder(folder)))
    encoding, size = get(name), model.config.vocab_size
    if encoding.n_vocab > size:
        raise InputError(f"{folder}: its tokenizer has {encoding.n_vocab} tokens, its model {size}")
    return name, encoding


def eos_id(encoding):
    """The id of the token that ends a response. Raises InputError if the encoding has none that is known here."""
    if getattr(encoding, "eos", None) is not None:
        return encoding.eos
    for token in EOS:
        if token in encoding.special_tokens_set:
            return encoding.encode_single_token(token)
    raise InputError(f"tokenizer {encoding.name!r} has no token {' or '.join(EOS)}")


def encode(encoding, text):
    """Text -> list of ids, special tokens read as plain text. tiktoken silently drops what its pattern does not match,
    so the way back is checked: raises InputError with the text that was lost."""
    if len(text) > LONGEST and (run := re.search(rf"\s{{{LONGEST}}}", text)):
        raise InputError(f"{LONGEST:,} blanks or more in a row (character {run.start() + 1})")
    ids = encoding.encode_ordinary(text)
    back = encoding.decode(ids)
    if isinstance(encoding, FolderEncoding):
        text, back = encoding.normalize(text), encoding.normalize(back)
    if back != text:
        at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
        raise InputError(
            f"tokenizer {encoding.name!r} has no tokens for {text[at : at + 20]!r} (character {at + 1})"
        )
    return ids


def piece(encoding, token):
    """The bytes of one token; none for an id that no text has, as in a vocabulary that is padded to a round size."""
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return b""


def decode(encoding, ids):
    """Ids -> text. Bytes that are not UTF-8 become U+FFFD."""
    return b"".join(piece(encoding, i) for i in ids).decode("utf-8", errors="replace")


def decode_all(encoding, responses):
    """Responses as token lists -> strings, without EOS."""
    eos = eos_id(encoding)
    return [decode(encoding, [token for token in response if token != eos]) for response in responses]
