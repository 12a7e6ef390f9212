"""Message lists -> text and tokens, by the chat template of a Hugging Face folder.

Templates are jinja2 programs, and are rendered as transformers renders them. trusted.py says whose
special tokens are special.
"""

import datetime
import functools
import json
from collections.abc import Sequence
from typing import NamedTuple

import jinja2
import tiktoken
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanoroads.errors import InputError
from nanoroads.text import tokenizer
from nanoroads.text.bounds import OutOfBounds, bounded
from nanoroads.text.tokenizer_json import FolderEncoding
from nanoroads.text.trusted import TrustedText
from nanoroads.weights.folder import own_file, read_bytes

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

    It is in chat_template.jinja, else in tokenizer_config.json, which may hold several by name."""
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
        source = template_source(folder, encoding.config, name)
        with bounded(MOST_SECONDS, MOST_BYTES):  # jinja2 computes what is constant while it compiles
            return None if source is None else environment.from_string(source)
    except InputError:
        raise
    except Exception as error:
        # A ValueError may be bytes that are not UTF-8, a TypeError a template that is not text, a
        # RecursionError or a SyntaxError what is nested too deep.
        raise InputError(f"{folder}: its chat template cannot be read ({error})") from None


def template_source(folder, config, name):
    """The template's text, or None. A folder may hold several; without `name`, "default" is the one."""
    path = own_file(folder, "chat_template.jinja")
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
    if encoding.template_stopped:  # with --skip-bad-rows every row would take as long
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


@functools.cache
def written_bos(encoding: tiktoken.Encoding) -> list[int]:
    """The BOS that the template writes in front of a conversation: one id, or none.

    Not SmolLM2's <|im_start|>: its files call it bos_token, but it opens every turn."""
    bos = encoding.names.get("bos_token") if isinstance(encoding, FolderEncoding) else None
    if bos is None or template(encoding) is None:
        return []
    try:
        text = render(encoding, [{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except InputError:  # a template that wants a system message, for instance
        return []
    return [encoding.ids[bos]] if text.startswith(bos) and text.count(bos) == 1 else []


# ---------------------------------------------------------------- tokens


class Conversation(NamedTuple):
    """A prompt of messages and its answers as tokens."""

    prompt: list[int]
    responses: list[list[int]]  # as the template goes on after the prompt
    text: str  # the prompt as text
    left_out: str  # the end of the generation prompt, where the template drops it before an answer


def encode_conversation(
    encoding: FolderEncoding,
    messages: list[dict],
    answers: Sequence[dict] = (),
    tools: list[dict] | None = None,
) -> Conversation:
    """Messages, and one more for each answer to be learned, -> Conversation. Raises InputError.

    A response is what the template writes behind the prompt; its tokens begin there, so the model is
    trained behind the very tokens that it is sampled behind. A template may drop the end of its
    generation prompt once an answer follows (R1's opens <think>). Then a response begins where the
    tokens of the whole conversation part from those of the prompt, as in TRL."""
    trusted = TrustedText(encoding, [messages, list(answers), tools])
    messages = [trusted.message(message) for message in messages]
    answers = [trusted.message(answer) for answer in answers]
    tools = trusted.text(tools)

    prompt = render(encoding, messages, add_generation_prompt=True, tools=tools)
    if tools and prompt == render(encoding, messages, add_generation_prompt=True):
        raise InputError("the chat template takes no tools, so the field 'tools' would be left out")
    prompt_ids = trusted.ids(prompt)
    if not answers:
        check_tool_calls(encoding, messages, tools, prompt, add_generation_prompt=True)
        return Conversation(prompt_ids, [], trusted.original(prompt), "")

    wholes = [render(encoding, [*messages, answer], tools=tools) for answer in answers]
    for answer, whole in zip(answers, wholes, strict=True):
        check_tool_calls(encoding, [*messages, answer], tools, whole)
    if all(whole.startswith(prompt) for whole in wholes):
        responses = [trusted.ids(whole[len(prompt) :]) for whole in wholes]
        return Conversation(prompt_ids, responses, trusted.original(prompt), "")

    check_conversation_stays(encoding, messages, tools, prompt, wholes)
    whole_ids = [trusted.ids(whole) for whole in wholes]
    # K answers have one prompt: it ends where the first of them parts from it.
    ends = min(common_beginning(prompt_ids, ids) for ids in whole_ids)
    responses = [ids[ends:] for ids in whole_ids]
    text = tokenizer.decode(encoding, prompt_ids[:ends])
    left_out = tokenizer.decode(encoding, prompt_ids[ends:])
    return Conversation(prompt_ids[:ends], responses, text, left_out)


def check_tool_calls(encoding, messages, tools, rendered, add_generation_prompt=False):
    """Raises InputError if the template writes none of the messages' tool calls."""
    if not any(message.get("tool_calls") for message in messages):
        return
    without = []
    for message in messages:
        without.append({key: value for key, value in message.items() if key != "tool_calls"})
    try:
        rendered_without = render(encoding, without, add_generation_prompt, tools)
    except InputError:  # a template that needs the calls reads them
        return
    if rendered_without == rendered:
        raise InputError("the chat template takes no tool calls, so 'tool_calls' would be left out")


def check_conversation_stays(encoding, messages, tools, prompt, wholes):
    """Raises InputError if an answer changes more of the rendered prompt than its generation prompt.

    Else words of the prompt would be trained as if the assistant had said them."""
    without_generation = render(encoding, messages, tools=tools)
    own = common_beginning(prompt, without_generation)  # where the generation prompt begins
    for whole in wholes:
        if common_beginning(prompt, whole) < max(own, 1):
            raise InputError("the chat template writes the prompt differently once an answer follows it")


def common_beginning(one, other):
    """How many tokens, or characters, two sequences begin with in common."""
    for place, (item, counterpart) in enumerate(zip(one, other, strict=False)):
        if item != counterpart:
            return place
    return min(len(one), len(other))
