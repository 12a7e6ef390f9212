"""Text <-> token ids, always through tiktoken.

The encodings: the map's own `roadmap`, `gpt2`, or the tokenizer.json of a Hugging Face folder.
"""

import functools
import os
import re
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from nanoroads.errors import InputError
from nanoroads.text import chat_template
from nanoroads.text.bounds import bounded
from nanoroads.text.tokenizer_json import FolderEncoding, pattern_of_any, split_at_matches
from nanoroads.weights.files import read_config
from nanoroads.weights.identity import find, of_bytes
from nanoroads.world import roadmap

# Whitespace in a row: at some 500,000 the regex engine of tiktoken runs out of stack, and panics.
MOST_WHITESPACE = 100_000
EOS_TEXTS = (roadmap.EOS, "<|endoftext|>")  # of the map; of GPT-2 and Pythia


@functools.cache
def get(name: str) -> tiktoken.Encoding:
    """The encoding "roadmap", "gpt2", or of a Hugging Face folder. Raises InputError."""
    if name == "roadmap":
        return roadmap.encoding()
    if name == "gpt2":
        try:
            return tiktoken.get_encoding(name)
        except OSError as error:
            raise InputError(f"tokenizer gpt2: its files are not in TIKTOKEN_CACHE_DIR ({error})") from None
    if os.path.isdir(name):  # Path.is_dir raises OSError for a very long name
        try:
            with bounded(seconds=60, more_bytes=2**33):
                return FolderEncoding(Path(name))
        except InputError:
            raise
        except BaseException as error:
            # A value is missing or of another type, a pattern is invalid: the file's fault. tiktoken's
            # PanicException is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{name}/tokenizer.json: not a tokenizer that can be read ({error!r})") from None
    raise InputError(f"tokenizer {str(name)!r} is neither roadmap nor gpt2 nor a folder")


def of(folder: str | Path, model) -> tuple[str, tiktoken.Encoding]:
    """The tokenizer of a run or Hugging Face folder: (the name for `get`, the encoding).

    Raises InputError if it has more tokens than the model. Fewer are usual, since models are padded
    to round sizes."""
    config = read_config(folder)
    name = config.get("tokenizer", str(folder))
    path = find(folder, config, "tokenizer")
    if not name.startswith("hf:"):  # which finds it again on any machine
        name = path
    encoding = get(path)
    model_size = model.config.vocab_size
    if encoding.n_vocab > model_size:
        raise InputError(f"{folder}: its tokenizer has {encoding.n_vocab} tokens, its model {model_size}")
    return name, encoding


@functools.cache
def fingerprint(encoding: tiktoken.Encoding) -> str:
    """A hash of what every id means: its bytes, whether it is special, and where a text is cut."""
    pieces = [piece(encoding, token) for token in range(encoding.n_vocab)]
    special = sorted(encoding.special_tokens_set)
    patterns = [stage.pattern for stage in getattr(encoding, "stages", ())] + [encoding._pat_str]
    return of_bytes(repr((pieces, special, patterns)).encode())


def check_same(folder: str | Path, encoding: tiktoken.Encoding, policy: str | Path):
    """Raises InputError unless the model of `folder` reads tokens as `policy` does, a folder with `encoding`.

    Vocabularies of equal size may give the ids other meanings."""
    name = find(folder, read_config(folder), "tokenizer")
    if fingerprint(get(name)) != fingerprint(encoding):
        difference = f"gives the ids other meanings than that of {policy}"
        raise InputError(f"{folder}: its tokenizer, {name}, {difference}")


# ---------------------------------------------------------------- special tokens


def special_texts(encoding: tiktoken.Encoding) -> set[str]:
    """The texts that spell a special token."""
    if isinstance(encoding, FolderEncoding):
        return encoding.special_texts  # its special_tokens_set also holds added tokens that are not special
    return encoding.special_tokens_set


@functools.cache
def special_pattern(encoding: tiktoken.Encoding) -> re.Pattern | None:
    """A pattern of the texts that spell a special token; None if the encoding has none."""
    if isinstance(encoding, FolderEncoding):
        return encoding.special
    return pattern_of_any(encoding.special_tokens_set)


def special_id(encoding, text):
    """The id of the special token that a text spells."""
    if isinstance(encoding, FolderEncoding):
        return encoding.ids[text]  # tiktoken would prefer a token of plain text with the same characters
    return encoding.encode_single_token(text)


def eos_id(encoding: tiktoken.Encoding) -> int:
    """The id that is put behind a response without one. Raises InputError if the encoding has none."""
    return stop_ids(encoding)[0]


@functools.cache
def stop_ids(encoding: tiktoken.Encoding) -> tuple[int, ...]:
    """The ids that end a sampled response, eos_id first. Raises what `eos_id` raises.

    Those that the folder's files name, and the one that its chat template writes behind an answer."""
    stops = list(getattr(encoding, "stops", ()))
    if not stops:
        known = [text for text in EOS_TEXTS if text in encoding.special_tokens_set]
        stops += [encoding.encode_single_token(text) for text in known[:1]]
    if isinstance(encoding, FolderEncoding):
        written = chat_template.answer_end(encoding).text
        stops += [encoding.ids[written]] if written else []
    if not stops:
        raise InputError(f"tokenizer {encoding.name!r} has no token {' or '.join(EOS_TEXTS)}")
    return tuple(dict.fromkeys(stops))  # each once


# ---------------------------------------------------------------- text -> ids


def encode(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Text -> ids, special tokens read as plain text.

    tiktoken silently drops what its pattern does not match, so the ids are decoded again and
    compared: raises InputError with the text that was lost."""
    refuse_long_whitespace(text)
    ids = encode_ordinary(encoding, text)
    decoded = encoding.decode(ids)
    if isinstance(encoding, FolderEncoding):
        # It normalizes each piece between added tokens; NFC of the whole text may change more.
        text = encoding.normalize(text)
        decoded = encoding.normalize(decoded)
    if decoded != text:
        lost = first_difference(text, decoded)
        raise InputError(
            f"tokenizer {encoding.name!r} has no tokens for {text[lost : lost + 20]!r} (character {lost + 1})"
        )
    return ids


def encode_with_special(encoding: tiktoken.Encoding, text: str) -> list[int]:
    """Text -> ids, with one id for whatever spells a special token, as transformers reads text.

    For the text of training files and for what a model said; a user's text goes through `encode`.
    Raises InputError."""
    return encode_pieces(encoding, list(split_at_matches(text, special_pattern(encoding))))


def encode_pieces(encoding, pieces):
    """Pieces of a text, [(text, whether it is a special token), ...] -> ids."""
    ids = []
    swallow = False  # whether the whitespace that begins the next piece belongs to a token before it
    for place, (text, is_special) in enumerate(pieces):
        if is_special:
            ids.append(special_id(encoding, text))
            swallow = text in getattr(encoding, "rstrip", ())
            continue
        if swallow:
            text = text.lstrip()
        following = pieces[place + 1][0] if place + 1 < len(pieces) else ""
        if following in getattr(encoding, "lstrip", ()):
            text = text.rstrip()
        ids += encode(encoding, text)
    return ids


def encode_ordinary(encoding, text):
    """tiktoken's encode_ordinary. Raises InputError where its regex engine gives up."""
    try:
        return encoding.encode_ordinary(text)
    except BaseException as error:
        # A panic of tiktoken's Rust is a BaseException, of a class that cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise InputError(f"tokenizer {encoding.name!r} cannot read the text ({error})") from None


def refuse_long_whitespace(text):
    """Raises InputError for more whitespace in a row than tiktoken can read."""
    if len(text) <= MOST_WHITESPACE:
        return
    # A match begins only where a run begins; tried at every character, this would be quadratic.
    run = re.search(rf"(?<!\s)\s{{{MOST_WHITESPACE}}}", text)
    if run:
        place = f"(character {run.start() + 1})"
        raise InputError(f"{MOST_WHITESPACE:,} whitespace characters or more in a row {place}")


def first_difference(text, decoded):
    """The place of the first character of `text` that `decoded` does not have there."""
    for place, (character, decoded_one) in enumerate(zip(text, decoded, strict=False)):
        if character != decoded_one:
            return place
    return len(decoded)


# ---------------------------------------------------------------- ids -> text


def piece(encoding: tiktoken.Encoding, token: int) -> bytes:
    """The bytes of one token; empty for an id that only pads the vocabulary to a round size."""
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return b""


def decode(encoding: tiktoken.Encoding, ids: Iterable[int]) -> str:
    """Ids -> text. Bytes that are not UTF-8 become U+FFFD."""
    return b"".join(piece(encoding, i) for i in ids).decode("utf-8", errors="replace")


def decode_all(encoding: tiktoken.Encoding, responses: Iterable[Iterable[int]]) -> list[str]:
    """Responses as token lists -> strings, without the token that ended them.

    Special tokens before it are written out: a rule may ask for <think>."""
    stops = stop_ids(encoding)
    texts = []
    for response in responses:
        ids = list(response)
        if ids and ids[-1] in stops:
            ids.pop()
        texts.append(decode(encoding, ids))
    return texts
