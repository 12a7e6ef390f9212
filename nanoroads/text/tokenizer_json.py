"""The tokenizer.json of a Hugging Face folder -> a tiktoken Encoding.

It gives the ids that the `tokenizers` library gives, for byte-level BPEs: GPT-2, GPT-NeoX (Pythia),
Llama 3, Qwen2, SmolLM2 and their like. What tiktoken cannot represent (SentencePiece, WordPiece,
other normalizers, ...) is refused by name, never approximated.
"""

import functools
import re
import unicodedata
from pathlib import Path

import regex
import tiktoken

from nanoroads.errors import InputError
from nanoroads.text import named_tokens
from nanoroads.text.bounds import check_pattern_lengths, check_token_lengths
from nanoroads.weights.folder import own_file, parse_json, read_bytes

MOST_SECONDS = 5  # of a pattern on one text
WHOLE_PIECE = "(?s:.+)"  # a pattern that cuts nothing
BACK_REFERENCE = re.compile(r"\\[1-9k]|\(\?P=")
PROBE = " ".join(map(chr, range(256))) + "".join(map(chr, range(256)))  # to see what a pattern matches in
# Part of every refusal, since a folder with another tokenizer is no fault of its owner.
READABLE = (
    "only a byte-level BPE in tokenizer.json can be read (GPT-2, Pythia, Llama 3, Qwen2, SmolLM2), "
    "no SentencePiece (Llama 2, Mistral v0.1)"
)
# What ByteLevel splits at.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Characters that are left to tiktoken to cut.
MOST_AT_ONCE = 100_000
# How ByteLevel writes bytes: a visible Latin-1 character as itself, the others as the characters
# from U+0100 on.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
INVISIBLE = [byte for byte in range(256) if byte not in VISIBLE]
BYTE_OF = {chr(byte): byte for byte in VISIBLE}
BYTE_OF.update({chr(256 + place): byte for place, byte in enumerate(INVISIBLE)})
# Settings of a tokenizer.json that change ids, and the values that tiktoken can represent.
SUPPORTED = {
    "model": {
        "type": "BPE",
        "dropout": None,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "",
        "byte_fallback": False,
    },
    "normalizer": {"type": "NFC"},
    "special token": {"single_word": False},
    "added token": {"single_word": False, "lstrip": False, "rstrip": False},
    "pre-tokenizer Split": {"behavior": "Isolated", "invert": False},
    "pre-tokenizer ByteLevel": {"add_prefix_space": False},
}


class FolderEncoding(tiktoken.Encoding):
    """A tiktoken Encoding that does what the file asks for before the merges.

    folder      the Hugging Face folder
    config      its special_tokens_map.json and tokenizer_config.json, as one dict
    names       {name: text} of the special tokens that it names, such as bos_token
    normalize   text -> text: NFC, or nothing
    ids         {text: id} of the added tokens, special or not
    special_texts, special
                the texts of the special ones, and a pattern of them; they stay text in plain text
    lstrip, rstrip
                the texts of the special ones that take the whitespace before, or after, with them
    added_before_nfc, added_after_nfc
                patterns of the other added tokens, which plain text may hold (NeoX: runs of
                spaces): looked for before the text is normalized, and after; None without any
    stages      the patterns that cut a text before tiktoken's own does
    last_pattern
                tiktoken's own
    unreached   {id: bytes} of tokens that no text encodes to
    n_ids       one more than the largest id; ids from here on are stand-ins that encode_ordinary
                takes out
    template_stopped
                why its chat template is not compiled or run any more, or None
    bos         the ids that start a text
    stops       the ids that end a response; empty if none is named
    eos         the first of them, which is the one that is trained, or None
    """

    def __init__(self, folder: Path):
        # A missing key or a wrong type raises KeyError, TypeError, ...: tokenizer.get makes it an
        # InputError.
        path = folder / "tokenizer.json"
        specification = read_specification(path)
        check_supported(path, "model", specification["model"])
        self.config = named_tokens.read_names(folder)
        added_tokens = named_tokens.all_added_tokens(folder, specification, self.config)
        check_settings(path, specification, added_tokens)
        model = specification["model"]
        merges = read_merges(model)
        vocab = dict(model["vocab"])

        # Where a text is cut: the last pattern is tiktoken's, those before it are ours.
        *early_patterns, self.last_pattern = split_patterns(path, specification.get("pre_tokenizer"))
        has_normalizer = bool(components(specification.get("normalizer"), "normalizers"))
        # str leaves a text as it is.
        self.normalize = functools.partial(unicodedata.normalize, "NFC") if has_normalizer else str
        self.stages = [regex.compile(pattern) for pattern in early_patterns]

        # The tokens: added ones, those that text encodes to, those that only a model can sample.
        self.ids = {token["content"]: token["id"] for token in added_tokens}
        check_ids(path, {**vocab, **self.ids})
        merged = merged_tokens(path, merges, vocab)
        spelled = spell_tokens(path, vocab, self.ids)
        reachable = set(spelled) if model.get("ignore_merges") else merged
        ranks, unreached = ranks_and_unreached(vocab, spelled, reachable)
        self.unreached = {vocab[token]: spelled[token] for token in unreached}
        self.n_ids = max([*vocab.values(), *self.ids.values()]) + 1
        give_each_byte_a_rank(ranks, self.n_ids)

        # tiktoken needs a name for every id; one with \0 does not clash with an added token's.
        special_tokens = dict(self.ids)
        for token in unreached:
            special_tokens[f"{token}\0"] = vocab[token]
        super().__init__(
            str(folder),
            pat_str=pattern_without_gaps(self.last_pattern),
            mergeable_ranks=ranks,
            special_tokens=special_tokens,
        )
        self.max_token_value = self.n_ids - 1

        # What stands around and inside a text.
        self.folder = folder
        self.template_stopped = None
        self.names = named_tokens.named_texts(self.config)
        self.set_added_patterns(added_tokens)
        post_processor = components(specification.get("post_processor"), "processors")
        self.bos = named_tokens.start_of_text(post_processor, self.ids)
        self.stops = named_tokens.find_stops(folder, self.config, self.ids, self.n_ids)
        self.eos = self.stops[0] if self.stops else None

    def set_added_patterns(self, added_tokens):
        """Sort the added tokens: the special ones, and patterns of those that plain text may hold."""
        special = [token for token in added_tokens if token.get("special")]
        self.special_texts = {token["content"] for token in special}
        self.special = pattern_of_any(self.special_texts) or re.compile("(?!)")  # (?!) matches nothing
        self.lstrip = {token["content"] for token in special if token.get("lstrip")}
        self.rstrip = {token["content"] for token in special if token.get("rstrip")}
        self.added_before_nfc = pattern_of_any(plain_texts(added_tokens, normalized=False))
        self.added_after_nfc = pattern_of_any(plain_texts(added_tokens, normalized=True))

    def decode_single_token_bytes(self, token: int) -> bytes:
        """The bytes of one token. Raises KeyError for an invalid id."""
        if token >= self.n_ids:
            raise KeyError(token)
        if token in self.unreached:
            return self.unreached[token]
        return super().decode_single_token_bytes(token)

    def encode_ordinary(self, text: str) -> list[int]:
        """Text -> list of ids, special tokens read as text.

        A byte that has no token is left out, as the `tokenizers` library does; tokenizer.encode
        raises InputError instead."""
        ids = []
        for piece, is_added in split_at_matches(text, self.added_before_nfc):
            if is_added:
                ids.append(self.ids[piece])
            else:
                ids += self.encode_normalized(self.normalize(piece))
        return ids

    def encode_normalized(self, text):
        """Text after normalization -> list of ids."""
        ids = []
        for piece, is_added in split_at_matches(text, self.added_after_nfc):
            if is_added:
                ids.append(self.ids[piece])
            else:
                ids += self.encode_between_added(piece)
        return ids

    def encode_between_added(self, text):
        """Text without added tokens -> list of ids. tiktoken makes the last cut, and merges."""
        pieces = [text]
        try:
            for pattern in self.stages:
                pieces = cut(pieces, pattern)
        except TimeoutError:
            slow = f"its pattern takes more than {MOST_SECONDS} s to cut a text"
            raise InputError(f"{self.folder}/tokenizer.json: {slow}") from None
        ids = []
        for piece in pieces:
            if len(piece) <= MOST_AT_ONCE:
                ids += super().encode_ordinary(piece)
                continue
            # Its regex engine would run out of stack where the pattern leaves a long run over.
            for part, _ in split_at_matches(piece, regex.compile(self.last_pattern)):
                ids += self._encode_single_piece(part)
        return [i for i in ids if i < self.n_ids]


# ---------------------------------------------------------------- reading and checking the file


def read_specification(path):
    """What tokenizer.json holds. Raises InputError if there is no such file, or a much too large one."""
    if own_file(path.parent, path.name) is None:
        raise InputError(f"{path}: no such file; {READABLE}")
    specification = parse_json(read_bytes(path))
    check_token_lengths(path, specification)
    return specification


def read_merges(model):
    """The pairs of tokens that are merged, in order.

    Older files write a pair as one text with a space in it."""
    merges = []
    for pair in model.get("merges", ()):
        merges.append(pair.split(" ") if isinstance(pair, str) else pair)
    return merges


def check_settings(path, specification, added_tokens):
    """Raises InputError if tiktoken cannot represent normalizer or added tokens."""
    for normalizer in components(specification.get("normalizer"), "normalizers"):
        check_supported(path, "normalizer", normalizer)
    for token in added_tokens:
        check_supported(path, "special token" if token.get("special") else "added token", token)


def check_supported(path, what, node):
    """Raises InputError if the node differs from SUPPORTED[what]; absent and null are fine."""
    for key, value in SUPPORTED[what].items():
        if node.get(key) not in (value, None):
            wrong = f"{what} with {key} {node[key]!r} is not supported, only {value!r}"
            raise InputError(f"{path}: {wrong}; {READABLE}")


def components(node, key):
    """A component of tokenizer.json, or a Sequence of them, perhaps nested -> list.

    key: where a Sequence keeps its parts."""
    if not node:
        return []
    if node.get("type") != "Sequence":
        return [node]
    flattened = []
    for part in node.get(key, []):
        if part.get("type") == "Sequence":
            flattened += components(part, key)
        else:
            flattened.append(part)
    return flattened


# ---------------------------------------------------------------- where a text is cut


def split_patterns(path, node):
    """The pre-tokenizer as a list of patterns. Raises InputError.

    Each cuts the pieces that the one before it left."""
    parts = components(node, "pretokenizers")
    patterns = []
    for part in parts:
        kind = part["type"]
        if kind == "Digits":
            patterns.append(r"\p{N}" if part.get("individual_digits") else r"\p{N}+")
        elif kind == "Split":
            check_supported(path, "pre-tokenizer Split", part)
            pattern = part["pattern"]
            patterns.append(pattern["Regex"] if "Regex" in pattern else re.escape(pattern["String"]))
        elif kind == "ByteLevel":
            check_supported(path, "pre-tokenizer ByteLevel", part)
            if part.get("use_regex", True):
                patterns.append(GPT2_PATTERN)
        else:
            raise InputError(f"{path}: pre-tokenizer {kind} is not supported; {READABLE}")
    kinds = [part["type"] for part in parts]
    if kinds.count("ByteLevel") != 1 or kinds[-1] != "ByteLevel":
        raise InputError(f"{path}: its pre-tokenizer does not end in ByteLevel; {READABLE}")
    check_pattern_lengths(path, patterns)
    # The last one is tiktoken's, which panics at a match without a character, and stands twice in what
    # tiktoken gets (pattern_without_gaps), so that the numbers of groups would change.
    if not patterns or has_empty_match(patterns[-1]) or BACK_REFERENCE.search(patterns[-1]):
        patterns.append(WHOLE_PIECE)
    return patterns


def has_empty_match(pattern):
    """Whether a pattern is seen to match between two characters, as "", "a*" and "(?=a)" do."""
    matches = regex.compile(pattern).finditer(PROBE, timeout=MOST_SECONDS)
    return any(match.end() == match.start() for match in matches)


def pattern_without_gaps(pattern):
    """A pattern that also matches what `pattern` leaves over, which tiktoken would drop."""
    return f"(?:{pattern})|(?:(?!{pattern})(?s:.))+"


def pattern_of_any(tokens):
    """A compiled pattern of any of the tokens, the longest first; None without tokens."""
    if not tokens:
        return None
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(re.escape(token) for token in longest_first))


def split_at_matches(text, pattern, **options):
    """Yields (piece, whether it is a match); the pieces make up the text.

    pattern: compiled, or None, which matches nothing. options: of its finditer."""
    begin = 0
    matches = pattern.finditer(text, **options) if pattern else ()
    for match in matches:
        if match.start() > begin:
            yield text[begin : match.start()], False
        yield match.group(), True
        begin = match.end()
    if begin < len(text):
        yield text[begin:], False


def cut(pieces, pattern):
    """The pieces of a text, each cut at every match. Raises TimeoutError for a very slow pattern."""
    parts = []
    for piece in pieces:
        for part, _ in split_at_matches(piece, pattern, timeout=MOST_SECONDS):
            parts.append(part)
    return parts


def plain_texts(added_tokens, normalized):
    """The texts of the added tokens that plain text may hold, with this value of "normalized"."""
    plain = [token for token in added_tokens if not token.get("special")]
    # Absent where only added_tokens_decoder names the token; transformers takes it as true then.
    return [token["content"] for token in plain if token.get("normalized", True) == normalized]


# ---------------------------------------------------------------- tokens and their ranks


def merged_tokens(path, merges, vocab):
    """The set of tokens that merges make. Raises InputError unless their ids are in that order.

    tiktoken has one number, the rank, for both a merge's priority and its token's id."""
    merged = list(dict.fromkeys(left + right for left, right in merges))
    previous = -1
    for token in merged:
        token_id = vocab.get(token, -1)
        if previous >= token_id:
            raise InputError(f"{path}: its ids are not in the order of its merges, which tiktoken needs")
        previous = token_id
    return set(merged)


def check_ids(path, ids):
    """Raises InputError if two tokens of {token: id} have the same id: tiktoken would panic."""
    token_of = {}
    for token, token_id in ids.items():
        if token_id in token_of:
            raise InputError(f"{path}: {token_of[token_id]!r} and {token!r} have the same id {token_id}")
        token_of[token_id] = token


def spell_tokens(path, vocab, added_ids):
    """{token as the file writes it: its bytes} of all but the added tokens. Raises InputError."""
    spelled = {}
    try:
        for token in vocab:
            if token not in added_ids:
                spelled[token] = bytes(BYTE_OF[character] for character in token)
    except KeyError as error:
        raise InputError(f"{path}: a token holds {error}, which ByteLevel never writes") from None
    return spelled


def ranks_and_unreached(vocab, spelled, reachable):
    """({bytes: id} of the tokens that text can encode to, list of the others' names in the file).

    Text reaches single bytes, and the tokens of the set `reachable`. No text encodes to the others;
    a model can still sample them."""
    ranks = {}
    unreached = []
    for token, token_bytes in spelled.items():
        if len(token_bytes) == 1 or token in reachable:
            ranks[token_bytes] = vocab[token]
        else:
            unreached.append(token)
    return ranks, unreached


def give_each_byte_a_rank(ranks, first_free):
    """Add stand-ins from id `first_free` on: tiktoken would crash at a byte that has no token."""
    for value in range(256):
        ranks.setdefault(bytes([value]), first_free + value)
