"""Message lists -> text and tokens, by the chat template of a Hugging Face folder.

Templates are jinja2 programs, and are rendered as transformers renders them. Special tokens that
the template writes become special tokens; what looks like one in a message ("<|im_end|>") stays
text, so a user cannot end their own turn.
"""

import datetime
import functools
import json
from collections.abc import Sequence

import jinja2
import tiktoken
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoroads.errors import InputError
from nanoroads.text import tokenizer
from nanoroads.text.bounds import OutOfBounds, bounded
from nanoroads.text.tokenizer_json import FolderEncoding, split_at_matches, text_of_token
from nanoroads.weights.folder import own_file, read_bytes

# What a template may take to be compiled, or to write one conversation: real ones take milliseconds.
MOST_SECONDS = 3
MOST_BYTES = 2**29  # of memory
MOST_CHARACTERS = 2**24  # of its text, and of what it writes

# Unicode gives these code points no meaning, so hardly any text holds them.
PRIVATE_USE = range(0xE000, 0xF900)

# ---------------------------------------------------------------- the template


def raise_exception(message):
    """What templates call to refuse messages, for instance a role that the model never saw."""
    raise jinja2.TemplateError(message)


def strftime_now(format):
    """Today's date for templates that write it, as Llama 3's does."""
    return datetime.datetime.now().strftime(format)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """Jinja's own filter would escape HTML; models are trained on plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what an assistant said.

    It adds nothing to the text."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.cache
def template(encoding: tiktoken.Encoding) -> jinja2.Template | None:
    """The compiled template of the encoding's folder, or None if it has none. Raises InputError.

    It is in chat_template.jinja, else in tokenizer_config.json."""
    folder = getattr(encoding, "folder", None)
    if folder is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        source = template_source(folder, encoding.config)
        with bounded(MOST_SECONDS, MOST_BYTES):  # jinja2 computes what is constant while it compiles
            return None if source is None else environment.from_string(source)
    except InputError:
        raise
    except Exception as error:
        # A ValueError may be bytes that are not UTF-8, a TypeError a template that is not text, a
        # RecursionError or a SyntaxError what is nested too deep.
        raise InputError(f"{folder}: its chat template cannot be read ({error})") from None


def template_source(folder, config):
    """The template's text, or None. A folder may name several; then "default" is the one."""
    path = own_file(folder, "chat_template.jinja")
    if path is not None:
        return read_bytes(path, MOST_CHARACTERS).decode("utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        by_name = {named["name"]: named["template"] for named in source}
        source = by_name.get("default")
    if source is not None and len(source) > MOST_CHARACTERS:
        raise ValueError(f"more than {MOST_CHARACTERS:,} characters")
    return source


def render(encoding: FolderEncoding, messages: list[dict], add_generation_prompt: bool = False) -> str:
    """Messages -> the text that transformers' apply_chat_template gives. Raises InputError.

    add_generation_prompt: end the text where the assistant's answer begins."""
    special_names = {}  # bos_token, eos_token, ... which templates write by these names
    for key, value in encoding.config.items():
        if key.endswith("_token") and value:
            special_names[key] = text_of_token(value)
    program = template(encoding)
    if encoding.template_stopped:  # with --skip-bad-rows every row would take as long
        raise InputError(encoding.template_stopped)
    try:
        with bounded(MOST_SECONDS, MOST_BYTES):
            text = program.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **special_names,
            )
    except OutOfBounds as error:
        encoding.template_stopped = f"{encoding.folder}: its chat template was stopped ({error})"
        raise InputError(encoding.template_stopped) from None
    except Exception as error:
        # A template is a program: whatever it raises, it could not read the messages.
        raise InputError(f"{encoding.folder}: the chat template refuses the messages ({error})") from None
    if not text:
        raise InputError(f"{encoding.folder}: its chat template writes nothing for the messages")
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{encoding.folder}: its chat template writes {len(text):,} characters")
    return text


# ---------------------------------------------------------------- tokens


def encode_conversation(
    encoding: FolderEncoding, messages: list[dict], answer: Sequence[dict] = ()
) -> tuple[list[int], list[int]]:
    """(ids of the messages up to where the answer begins, ids of the answer). Raises InputError.

    answer: the messages to be learned; what the template adds to them belongs to the response. The
    response ends with its EOS if the template writes one.
    """
    # The template's output is one text, in which a special token that the template wrote and the
    # same characters in a user's message look alike. So those in messages are split before
    # rendering: a mark goes in after their first character, "<" + mark + "|im_end|>". The mark is a
    # private-use character that no message holds. What still looks like a special token after
    # rendering was written by the template; from all other text the mark is taken out again.
    mark = unused_character([*messages, *answer])
    messages = [split_special_tokens(encoding, message, mark) for message in messages]
    answer = [split_special_tokens(encoding, message, mark) for message in answer]

    prompt = render(encoding, messages, add_generation_prompt=True)
    if not answer:
        return encode_rendered(encoding, prompt, mark), []
    whole = render(encoding, messages + answer)
    if not whole.startswith(prompt):
        raise InputError("the chat template writes the prompt differently once an answer follows it")
    response = encode_rendered(encoding, whole[len(prompt) :], mark)
    response = without_what_follows_eos(encoding, response)
    return encode_rendered(encoding, prompt, mark), response


def unused_character(messages):
    """A private-use character that no message holds. Raises InputError if they hold all of them."""
    text = json.dumps(messages, ensure_ascii=False, default=str)  # str: a row may hold a date
    for code in PRIVATE_USE:
        if chr(code) not in text:
            return chr(code)
    raise InputError("the messages hold every private-use character, so none is left to mark special tokens")


def split_special_tokens(encoding, message, mark):
    """The message with `mark` after the first character of whatever looks like a special token."""

    def marked(match):
        token = match[0]
        return token[0] + mark + token[1:]

    split = {}
    for key, value in message.items():
        split[key] = encoding.special.sub(marked, value) if isinstance(value, str) else value
    return split


def encode_rendered(encoding, text, mark):
    """A template's text -> ids.

    What looks like a special token is one; the rest is text, from which the marks are taken."""
    ids = []
    for piece, is_special in split_at_matches(text, encoding.special):
        if is_special:
            ids.append(encoding.ids[piece])
        else:
            ids += tokenizer.encode(encoding, piece.replace(mark, ""))
    return ids


def without_what_follows_eos(encoding, response):
    """The response up to its last EOS: ChatML writes a newline after it, which is never sampled."""
    eos = tokenizer.eos_id(encoding)
    if eos not in response:
        return response
    tokens_after = response[::-1].index(eos)
    return response[: len(response) - tokens_after]
