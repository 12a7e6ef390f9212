"""The tokens that a folder's files name: added ones, BOS, EOS and whatever else ends a response.

Beside tokenizer.json, five files may name some. As in transformers, tokenizer_config.json takes
precedence if it holds "added_tokens_decoder"; otherwise special_tokens_map.json does, and
added_tokens.json is read.
What is named and cannot be found is refused, never replaced by what another file names.
"""

from nanoroads.errors import InputError
from nanoroads.weights.folder import read_optional_json

# Names of tokens that every text or response needs; a folder that names one must have it.
NEEDED = ("bos_token", "eos_token")


def read_names(folder):
    """special_tokens_map.json and tokenizer_config.json of a folder, as one dict. Raises InputError."""
    config = read_optional_json(folder / "tokenizer_config.json")
    by_name = read_optional_json(folder / "special_tokens_map.json")
    if "added_tokens_decoder" in config:
        return {**by_name, **config}
    return {**config, **by_name}


def text_of_token(token):
    """A special token's text; the file gives it directly or in an object."""
    return token.get("content") if isinstance(token, dict) else token


def named_texts(config):
    """{name: text} of the special tokens with a name: bos_token, eos_token, ...

    Templates write them by these names."""
    texts = {}
    for name, token in config.items():
        text = text_of_token(token)
        if name.endswith("_token") and isinstance(text, str) and text:  # not add_bos_token, a bool
            texts[name] = text
    extra = extra_tokens(config)
    if isinstance(extra, dict):
        texts.update({name: text_of_token(token) for name, token in extra.items()})
    return texts


def extra_tokens(config):
    """The special tokens without a name of their own: a list, or a dict of newer folders."""
    return config.get("extra_special_tokens") or config.get("additional_special_tokens") or []


# ---------------------------------------------------------------- added tokens


def all_added_tokens(folder, specification, config):
    """The added tokens of tokenizer.json and of the other files, as a list of dicts.

    New ones get the ids that transformers gives them. Raises InputError."""
    vocab = specification["model"]["vocab"]
    tokens = {token["content"]: token for token in specification.get("added_tokens") or []}
    by_id = added_by_other_files(folder, config)
    for config_id in sorted(by_id):
        token = by_id[config_id]
        text = token["content"]
        if not text:  # the library takes no notice of it either
            continue
        known = tokens.get(text, {})
        special = bool(token.get("special") or known.get("special"))
        token_id = known.get("id", vocab.get(text))
        if token_id is None:
            token_id = next_id(vocab, tokens)
            if config_id != token_id:
                where = "tokenizer_config.json or added_tokens.json"
                free = f"{token_id} is the first that tokenizer.json leaves free"
                raise InputError(f"{folder}: {where} gives {text!r} the id {config_id}, but {free}")
        tokens[text] = {**token, "id": token_id, "special": special}
    add_named_tokens(tokens, vocab, config)
    check_needed(folder, config, tokens)
    return list(tokens.values())


def added_by_other_files(folder, config):
    """{id: token as a dict} of the files beside tokenizer.json."""
    if "added_tokens_decoder" in config:
        return {int(number): token for number, token in config["added_tokens_decoder"].items()}
    tokens = {}
    for text, number in read_optional_json(folder / "added_tokens.json").items():
        tokens[number] = {"content": text, "normalized": True}
    return tokens


def add_named_tokens(tokens, vocab, config):
    """Add what the config names as special to `tokens`, {text: token as a dict}."""
    extra = extra_tokens(config)
    extra = extra.values() if isinstance(extra, dict) else extra
    extra_texts = [text_of_token(token) for token in extra if text_of_token(token)]
    for text in [*named_texts(config).values(), *extra_texts]:
        if text in tokens:
            tokens[text] = {**tokens[text], "special": True}
        elif text in vocab:
            tokens[text] = new_special(text, vocab[text])
        elif text in extra_texts:
            tokens[text] = new_special(text, next_id(vocab, tokens))
        # Others, such as a pad_token that is no token, are never read or written here.


def next_id(vocab, tokens):
    """The id that the `tokenizers` library gives to a new token."""
    ids = [token["id"] for token in tokens.values()]
    return max(len(vocab), max(ids, default=-1) + 1)


def new_special(text, token_id):
    """A special token that only a name tells of."""
    return {"id": token_id, "content": text, "special": True, "normalized": False}


def check_needed(folder, config, tokens):
    """Raises InputError if the folder names a BOS or EOS that is no token."""
    for name in NEEDED:
        text = text_of_token(config.get(name))
        if text and text not in tokens:  # null and "" say that there is none
            raise InputError(f"{folder}: its {name} is {text!r}, which is no token of its tokenizer.json")


# ---------------------------------------------------------------- what stands around a text


def start_of_text(post_processor, ids):
    """The ids that the post-processor puts before a text: BOS if the family has one, as Llama 3.

    post_processor: its parts, as a list; ids: {text: id} of the added tokens."""
    for part in post_processor:
        if part.get("type") == "TemplateProcessing":
            return ids_before_the_text(part, ids)
    return []


def ids_before_the_text(template, ids):
    """The ids of what stands before the text in a TemplateProcessing. Raises ValueError."""
    before = []
    for piece in template["single"]:
        if "Sequence" in piece:  # here stands the text
            return before
        special = template["special_tokens"][piece["SpecialToken"]["id"]]
        before += [ids[token] for token in special["tokens"]]
    raise ValueError("the post-processor has no place for the text")


def find_stops(folder, config, ids, n_ids):
    """The ids that end a response, first the one that is trained; empty if no file names any.

    The tokenizer's eos_token, and what transformers stops at: the ids in generation_config.json, or in
    config.json if that names none. Llama-3-8B-Instruct has two. Raises InputError."""
    stops = []
    eos_text = text_of_token(config.get("eos_token"))
    if eos_text:
        stops.append(ids[eos_text])
    for name in ("generation_config.json", "config.json"):
        eos_ids = read_optional_json(folder / name).get("eos_token_id")
        if eos_ids is None or eos_ids == []:
            continue
        eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
        if not all(type(stop) is int and stop >= 0 for stop in eos_ids):  # a bool is an int, too
            raise InputError(f"{folder / name}: eos_token_id {eos_ids} must be an id, or a list of ids")
        stops += eos_ids
        break
    # The first alone is trained; the others are only compared with what is sampled.
    if stops and stops[0] >= n_ids:
        raise InputError(f"{folder}: eos_token_id {stops[0]} is no token of its tokenizer.json")
    return tuple(dict.fromkeys(stops))  # each once
