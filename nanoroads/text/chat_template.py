"""Message lists -> text, by the chat template of a Hugging Face folder.

Templates are jinja2 programs, and are rendered as transformers renders them. What a template writes in
front of a conversation and behind an answer is found by rendering a short one.
"""

import datetime
import functools
import json
from typing import NamedTuple

import jinja2
import tiktoken
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoroads.errors import InputError
from nanoroads.text.bounds import OutOfBounds, bounded
from nanoroads.text.tokenizer_json import FolderEncoding
from nanoroads.weights.folder import TEMPLATES, own_file, read_bytes

# What a template may take to be compiled, or to write one conversation: real ones take milliseconds.
MOST_SECONDS = 3
MOST_BYTES = 2**29  # of memory
MOST_CHARACTERS = 2**24  # of its text, and of what it writes

# The names under which people's files keep what was thought before an answer; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")

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
def template(encoding: tiktoken.Encoding, name: str = "default") -> jinja2.Template | None:
    """The compiled template of the encoding's folder, or None if it has none. Raises InputError.

    It is in chat_template.jinja, with others by name in a folder beside it, or else in
    tokenizer_config.json, which may hold several."""
    folder = getattr(encoding, "folder", None)
    if folder is None:
        return None
    if encoding.template_stopped:  # with --skip-bad-rows every row would take as long
        raise InputError(encoding.template_stopped)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    try:
        source = template_source(folder, encoding.config, name)
        with bounded(MOST_SECONDS, MOST_BYTES):  # jinja2 computes what is constant while it compiles
            return None if source is None else environment.from_string(source)
    except InputError:
        raise
    except OutOfBounds as error:
        encoding.template_stopped = f"{folder}: its chat template cannot be read ({error})"
        raise InputError(encoding.template_stopped) from None
    except Exception as error:
        # A ValueError may be bytes that are not UTF-8, a TypeError a template that is not text, a
        # RecursionError or a SyntaxError what is nested too deep.
        raise InputError(f"{folder}: its chat template cannot be read ({error})") from None


def template_source(folder, config, name):
    """The template's text, or None.

    A folder may hold several. If it holds none called name, "default" is taken."""
    for file_name in (f"{TEMPLATES}/{name}.jinja", "chat_template.jinja"):
        path = own_file(folder, file_name)
        if path is not None:
            return read_bytes(path, MOST_CHARACTERS).decode("utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):
        by_name = {named["name"]: named["template"] for named in source}
        source = by_name.get(name, by_name.get("default"))
    if source is not None and len(source) > MOST_CHARACTERS:
        raise ValueError(f"more than {MOST_CHARACTERS:,} characters")
    return source


def render(
    encoding: FolderEncoding,
    messages: list[dict],
    add_generation_prompt: bool = False,
    tools: list[dict] | None = None,
) -> str:
    """Messages -> the text that transformers' apply_chat_template gives. Raises InputError.

    add_generation_prompt: end the text where the assistant's answer begins. tools: what the
    assistant may call, as JSON schemas."""
    tools = tools or None  # some templates would announce an empty list
    program = template(encoding, "tool_use" if tools else "default")
    if encoding.template_stopped:  # `template` has one that it compiled before
        raise InputError(encoding.template_stopped)
    try:
        with bounded(MOST_SECONDS, MOST_BYTES):
            text = program.render(
                messages=[with_reasoning(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **encoding.names,
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


def with_reasoning(message):
    """The message with its reasoning under the names that templates read."""
    for name in REASONING:
        if message.get(name) is not None:
            return {"thinking": message[name], **message, "reasoning_content": message[name]}
    return message


# ---------------------------------------------------------------- what a template adds


@functools.cache
def written_bos(encoding: tiktoken.Encoding) -> list[int]:
    """The BOS that the template writes in front of a conversation: one id, or none.

    Not SmolLM2's <|im_start|>: its files call it bos_token, but it opens every turn."""
    bos = encoding.names.get("bos_token") if isinstance(encoding, FolderEncoding) else None
    if bos is None:
        return []
    text = short_conversation(encoding, [{"role": "user", "content": "Hello"}])
    return [encoding.ids[bos]] if text.startswith(bos) and text.count(bos) == 1 else []


class AnswerEnd(NamedTuple):
    """What the template writes behind the last answer of a conversation."""

    text: str = ""  # the special token that ends the answer; "": there is none
    rest: str = ""  # what stands behind it: ChatML's newline, a second EOS, a next turn's beginning


@functools.cache
def answer_end(encoding: tiktoken.Encoding) -> AnswerEnd:
    """How the template ends an answer, which the folder's files need not name.

    ChatML on a base model is such a case: eos_token is <|endoftext|>, but an answer ends in <|im_end|>."""
    answer = "Good morning"
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
    before, _, behind = short_conversation(encoding, messages).rpartition(answer)
    if not before:
        return AnswerEnd()
    match = encoding.special.search(behind)
    if match is None:
        return AnswerEnd()
    special_before = encoding.special.findall(before)
    opens_a_turn = special_before and special_before[-1] == match[0]
    if opens_a_turn and encoding.ids[match[0]] not in encoding.stops:
        return AnswerEnd()  # the template goes on with a turn of its own, without an end between
    return AnswerEnd(match[0], behind[match.end() :])


def short_conversation(encoding, messages):
    """The messages as the template writes them; "" without a template, or if it refuses them.

    It may want a system message, for instance."""
    try:
        if template(encoding) is None:
            return ""
        return render(encoding, messages, add_generation_prompt=messages[-1]["role"] == "user")
    except InputError:
        return ""
