"""The tokenizer.json of a Hugging Face folder -> a tiktoken Encoding with the ids that the `tokenizers` library gives.

Byte-level BPEs: GPT-2, GPT-NeoX (Pythia), Llama 3, Qwen2, SmolLM2 and their like. What tiktoken cannot represent
(SentencePiece, WordPiece, other normalizers, ...) is refused by name, never approximated.
"""

import functools
import json
import re
import unicodedata

import regex
import tiktoken

from nanoroads.errors import InputError

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel splits at
# ByteLevel writes a byte that is no visible Latin-1 character as one from U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in VISIBLE} | {
    chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in VISIBLE)
}
# Settings of a tokenizer.json that change ids, and the values that tiktoken can represent.
ONLY = {
    "model": {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "byte_fallback": False,
    },
    "normalizer": {"type": "NFC"},
    "added token": {"single_word": False, "lstrip": False, "rstrip": False},
    "pre-tokenizer Split": {"behavior": "Isolated", "invert": False},
    "pre-tokenizer ByteLevel": {"add_prefix_space": False},
}


class FolderEncoding(tiktoken.Encoding):
    """tokenizer.json as a tiktoken Encoding, whose encode_ordinary first does what the file asks for before the merges.

    added: patterns of the added tokens that plain text may hold (NeoX: runs of spaces), before and after NFC; special: a
    pattern of the others; bos: ids that start a text; eos: the id that ends a response, or None. Special tokens in plain text
    stay text."""

    def __init__(self, folder):
        self.folder, path = folder, folder / "tokenizer.json"
        try:
            theirs = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise InputError(
                f"{path}: no such file; of Hugging Face tokenizers only this form can be read"
            ) from None
        model, added = theirs["model"], theirs.get("added_tokens") or []
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges", ())]
        vocab = dict(model["vocab"])
        only(path, "model", model)
        normalizers = flat(theirs.get("normalizer"), "normalizers")
        for normalizer in normalizers:
            only(path, "normalizer", normalizer)
        self.normalize = functools.partial(unicodedata.normalize, "NFC") if normalizers else str
        for token in added:
            only(path, "added token", token)
        *first, last = patterns(path, theirs.get("pre_tokenizer"))
        self.stages = [regex.compile(p) for p in first]

        # tiktoken's rank is both a merge's priority and its id, so the ids must be in the order of the merges.
        results = list(dict.fromkeys(left + right for left, right in merges))
        ids = [vocab.get(token, -1) for token in results]
        if any(a >= b for a, b in zip([-1, *ids], ids, strict=False)):
            raise InputError(f"{path}: its ids are not in the order of its merges, which tiktoken needs")
        self.ids = names = {t["content"]: t["id"] for t in added}
        try:
            spelled = {token: bytes(BYTE_OF[c] for c in token) for token in vocab if token not in names}
        except KeyError as error:
            raise InputError(f"{path}: a token holds {error}, which ByteLevel never writes") from None
        whole = set(results) | set(spelled if model.get("ignore_merges") else ())
        ranks = {b: vocab[token] for token, b in spelled.items() if len(b) == 1 or token in whole}
        # The rest no text can reach, but a model may sample it. Named so that it does not clash with a true added token.
        rest = {f"{token}\0": vocab[token] for token, b in spelled.items() if b not in ranks}
        self.unreached = {vocab[token]: b for token, b in spelled.items() if b not in ranks}
        self.known = max([*vocab.values(), *names.values()]) + 1
        for byte in range(
            256
        ):  # a byte without a token would crash tiktoken: it gets an id that encode_ordinary takes out
            ranks.setdefault(bytes([byte]), self.known + byte)
        # The last alternative: what the pattern leaves between its matches is a piece of its own; tiktoken would drop it.
        split = f"(?:{last})|(?:(?!{last})(?s:.))+"
        super().__init__(str(folder), pat_str=split, mergeable_ranks=ranks, special_tokens=names | rest)
        self.max_token_value = self.known - 1

        self.special = any_of(t["content"] for t in added if t.get("special")) or re.compile("(?!)")
        plain = [t for t in added if not t.get("special")]
        self.added = {
            late: any_of(t["content"] for t in plain if t["normalized"] == late) for late in (False, True)
        }
        self.bos = start_of_text(theirs.get("post_processor"), names)
        self.config = read_json(folder / "special_tokens_map.json") | read_json(
            folder / "tokenizer_config.json"
        )
        self.eos = names.get(content(self.config.get("eos_token")))
        for file in ("generation_config.json", "config.json"):  # a list there: the first is the one
            if self.eos is None:
                eos = read_json(folder / file).get("eos_token_id")
                eos = eos[0] if isinstance(eos, list) and eos else eos
                self.eos = eos if type(eos) is int and 0 <= eos < self.known else None

    def decode_single_token_bytes(self, token):
        """The bytes of one token. Raises KeyError for an id that is none."""
        if token >= self.known:
            raise KeyError(token)
        return self.unreached[token] if token in self.unreached else super().decode_single_token_bytes(token)

    def encode_ordinary(self, text):
        """Text -> list of ids. A byte that has no token is left out, as the `tokenizers` library does; `encode` below raises."""
        ids = []
        for piece, is_added in cut(text, self.added[False]):
            for part, is_token in (
                [(piece, True)] if is_added else cut(self.normalize(piece), self.added[True])
            ):
                parts = [] if is_token else [part]
                for stage in self.stages:
                    parts = [x for whole in parts for x, _ in cut(whole, stage)]
                ids += [self.ids[part]] if is_token else []
                ids += [
                    i for x in parts for i in super(FolderEncoding, self).encode_ordinary(x) if i < self.known
                ]
        return ids


def cut(text, pattern):
    """Yields (piece, whether it is a match) so that the pieces make up the text. pattern: compiled, or None."""
    at = 0
    for match in pattern.finditer(text) if pattern else ():
        if match.start() > at:
            yield text[at : match.start()], False
        yield match.group(), True
        at = match.end()
    if at < len(text):
        yield text[at:], False


def any_of(tokens):
    """A pattern of any of the tokens, the longest first, or None."""
    return (
        re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        if (tokens := list(tokens))
        else None
    )


def flat(node, key):
    """A component of tokenizer.json, or a Sequence of them -> list."""
    parts = node.get(key, []) if node and node.get("type") == "Sequence" else [node] if node else []
    return [x for part in parts for x in (flat(part, key) if part.get("type") == "Sequence" else [part])]


def only(path, what, node):
    for key, value in ONLY[what].items():
        if node.get(key) not in (value, None):
            raise InputError(f"{path}: {what} with {key} {node[key]!r} is not supported, only {value!r}")


def patterns(path, node):
    """The pre-tokenizer as a list of patterns: each cuts the pieces that the one before it left."""
    found, parts = [], flat(node, "pretokenizers")
    for part in parts:
        kind = part["type"]
        if kind == "Digits":
            found.append(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif kind == "Split":
            only(path, "pre-tokenizer Split", part)
            pattern = part["pattern"]
            found.append(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))
        elif kind == "ByteLevel":
            only(path, "pre-tokenizer ByteLevel", part)
            found += [GPT2] if part.get("use_regex", True) else []
        else:
            raise InputError(f"{path}: pre-tokenizer {kind} is not supported")
    if [p["type"] for p in parts].count("ByteLevel") != 1 or parts[-1]["type"] != "ByteLevel":
        raise InputError(
            f"{path}: its pre-tokenizer does not end in ByteLevel, so it is not a byte-level BPE"
        )
    return found or ["(?s:.+)"]


def start_of_text(node, names):
    """The ids that the post-processor puts before a text: BOS where the family has one, as Llama 3."""
    for part in flat(node, "processors"):
        if part.get("type") == "TemplateProcessing":
            start = part["single"][: next(i for i, p in enumerate(part["single"]) if "Sequence" in p)]
            return [
                names[token]
                for p in start
                for token in part["special_tokens"][p["SpecialToken"]["id"]]["tokens"]
            ]
    return []


def read_json(path):
    """The object in a file that need not be there. Raises InputError."""
    try:
        return dict(json.loads(path.read_bytes())) if path.is_file() else {}
    except (ValueError, TypeError):
        raise InputError(f"{path}: not a JSON object") from None


def content(token):
    """Special tokens are named by their text, or by an object that holds it."""
    return token.get("content") if isinstance(token, dict) else token
