"""Who wrote a special token: what spells one is one if the template or the assistant wrote it.

Everybody else's words stay text. A user, and whoever speaks through a tool or is quoted in a system
prompt, cannot end a turn or open another.
"""

import json

from nanoroads.errors import InputError
from nanoroads.text import tokenizer
from nanoroads.text.tokenizer_json import split_at_matches

# Unicode gives these code points no meaning, so hardly any text holds them.
PRIVATE_USE = range(0xE000, 0xF900)


class TrustedText:
    """Tells the special tokens of template and assistant from the same characters of others.

    The template's output is one text in which both look alike. So before rendering, whatever spells a
    special token in the others' words gets another first character: a private-use one that stands for
    "<" and that no message holds. What still spells a special token after rendering is one; in all
    other text the stand-ins become what they stand for.
    """

    def __init__(self, encoding, value):
        """value: all that is going to be rendered, as lists and dicts. Raises InputError."""
        self.encoding = encoding
        self.pattern = tokenizer.special_pattern(encoding)
        firsts = sorted({text[0] for text in tokenizer.special_texts(encoding)})
        self.stand_in = dict(zip(firsts, unused_characters(encoding, value, len(firsts)), strict=True))
        self.used = set()  # the first characters that were replaced somewhere

    def message(self, message):
        """A message before rendering. An assistant's may hold special tokens."""
        return message if message.get("role") == "assistant" else self.untrusted(message)

    def untrusted(self, value):
        """Another's text, or a list or dict of texts, before rendering: it holds no special token."""
        if isinstance(value, str) and self.pattern:
            while self.pattern.search(value):  # again, since two special tokens may overlap
                value = self.pattern.sub(self.disguised, value)
            return value
        if isinstance(value, list):
            return [self.untrusted(item) for item in value]
        if isinstance(value, dict):
            return {self.untrusted(key): self.untrusted(item) for key, item in value.items()}
        return value

    def disguised(self, match):
        """What spells a special token, with another first character."""
        token = match[0]
        self.used.add(token[0])
        return self.stand_in[token[0]] + token[1:]

    def original(self, text):
        """A rendered text as it was meant."""
        for first in self.used:
            character = self.stand_in[first]
            text = text.replace(character, first)
            # A template's tojson(ensure_ascii=True) writes it as \uXXXX.
            text = text.replace(json.dumps(character)[1:-1], json.dumps(first)[1:-1])
        return text

    def ids(self, text):
        """A rendered text -> ids."""
        pieces = []
        for piece, is_special in split_at_matches(text, self.pattern):
            pieces.append((piece if is_special else self.original(piece), is_special))
        return tokenizer.encode_pieces(self.encoding, pieces)


def unused_characters(encoding, value, count):
    """`count` private-use characters that neither `value` nor a token holds. Raises InputError."""
    text = json.dumps(value, ensure_ascii=False, default=str)  # str: a row may hold a date
    text += "".join(tokenizer.special_texts(encoding))
    unused = []
    for code in PRIVATE_USE:
        if len(unused) == count:
            break
        escaped = json.dumps(chr(code))[1:-1]
        if chr(code) not in text and escaped not in text:
            unused.append(chr(code))
    if len(unused) < count:
        raise InputError(
            "the messages hold every private-use character, so none is left to mark special tokens"
        )
    return unused
