"""Message lists -> text and tokens, by the chat template of a Hugging Face folder (jinja2, as transformers renders it).

Special tokens that the template writes become special tokens; what looks like one in a message ("<|im_end|>") stays text,
so a user cannot end their own turn.
"""

import datetime
import functools
import json

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoroads.errors import InputError
from nanoroads.text import tokenizer
from nanoroads.text.tokenizer_json import content, cut


def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what an assistant said; to the text it adds nothing."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(
            parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line
        )


@functools.cache
def template(encoding):
    """The compiled template of the encoding's folder (chat_template.jinja, else tokenizer_config.json), or None."""
    if (folder := getattr(encoding, "folder", None)) is None:
        return None
    path, source = folder / "chat_template.jinja", encoding.config.get("chat_template")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        if path.is_file():
            source = path.read_text(encoding="utf-8")
        if isinstance(source, list):  # several by name
            source = {named["name"]: named["template"] for named in source}.get("default")
        return None if source is None else environment.from_string(source)
    except (jinja2.TemplateError, ValueError, KeyError, TypeError) as error:  # also: not UTF-8, no text
        raise InputError(f"{folder}: its chat template cannot be read ({error})") from None


def render(encoding, messages, add_generation_prompt=False):
    """A list of {"role", "content"} -> the text that transformers' apply_chat_template gives. Raises InputError."""
    names = {
        key: content(value) for key, value in encoding.config.items() if key.endswith("_token") and value
    }
    try:
        return template(encoding).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **names,
        )
    except Exception as error:  # a template is a program: whatever it raises, it could not read them
        raise InputError(f"the chat template refuses the messages ({error})") from None


def encode(encoding, messages, answer=()):
    """(ids of the messages up to where the answer begins, ids of the answer, up to its EOS where the template writes one).

    answer: the messages to be learned; what the template adds to them belongs to the response. Raises InputError."""
    said = json.dumps([*messages, *answer], ensure_ascii=False)
    mark = next(
        chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in said
    )  # parts what looks like a special token

    def quote(message):
        part = lambda text: encoding.special.sub(lambda m: m[0][0] + mark + m[0][1:], text)  # noqa: E731
        return {key: part(value) if isinstance(value, str) else value for key, value in message.items()}

    def ids(text):
        pieces = cut(text, encoding.special)
        return [
            i
            for x, special in pieces
            for i in ([encoding.ids[x]] if special else tokenizer.encode(encoding, x.replace(mark, "")))
        ]

    messages, answer = list(map(quote, messages)), list(map(quote, answer))
    prompt = render(encoding, messages, add_generation_prompt=True)
    if not answer:
        return ids(prompt), []
    whole = render(encoding, messages + answer)
    if not whole.startswith(prompt):
        raise InputError("the chat template writes the prompt differently once an answer follows it")
    response = ids(whole[len(prompt) :])
    eos = tokenizer.eos_id(encoding)
    if eos in response:  # ChatML writes a newline after it
        response = response[: len(response) - response[::-1].index(eos)]
    return ids(prompt), response
