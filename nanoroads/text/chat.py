"""Messages and their answers -> tokens, by the chat template of a Hugging Face folder.

chat_template.py renders them; trusted.py says whose special tokens are special.
"""

from collections.abc import Sequence
from typing import NamedTuple

from nanoroads.errors import InputError
from nanoroads.text import tokenizer
from nanoroads.text.chat_template import answer_end, render
from nanoroads.text.tokenizer_json import FolderEncoding
from nanoroads.text.trusted import TrustedText


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
    tools = trusted.untrusted(tools)

    prompt = render(encoding, messages, add_generation_prompt=True, tools=tools)
    if tools and prompt == render(encoding, messages, add_generation_prompt=True):
        raise InputError("the chat template takes no tools, so the field 'tools' would be left out")
    prompt_ids = trusted.ids(prompt)
    if not answers:
        check_tool_calls(encoding, messages, tools, prompt, add_generation_prompt=True)
        return Conversation(prompt_ids, [], trusted.original(prompt), "")

    wholes = []  # the conversation with each answer, as text
    for answer in answers:
        whole = render(encoding, [*messages, answer], tools=tools)
        check_tool_calls(encoding, [*messages, answer], tools, whole)
        wholes.append(up_to_its_end(whole, answer_end(encoding)))
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


def up_to_its_end(whole, end):
    """A conversation up to the token that ends its last answer: what follows is never sampled.

    end: an AnswerEnd. An answer that the template does not end so stays as it is."""
    if end.rest and whole.endswith(end.text + end.rest):
        return whole.removesuffix(end.rest)
    return whole


def check_tool_calls(encoding, messages, tools, rendered, add_generation_prompt=False):
    """Raises InputError if the template writes none of the messages' tool calls."""
    if not any(message.get("tool_calls") for message in messages):
        return
    without = []
    for message in messages:
        message = dict(message)
        message.pop("tool_calls", None)
        without.append(message)
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
    conversation_end = common_beginning(prompt, without_generation)  # there the generation prompt begins
    # At least 1: a template that shares nothing with the prompt is refused as well.
    must_stay = max(conversation_end, 1)
    for whole in wholes:
        if common_beginning(prompt, whole) < must_stay:
            raise InputError("the chat template writes the prompt differently once an answer follows it")


def common_beginning(sequence, counterpart):
    """How many tokens, or characters, two sequences begin with in common."""
    for place, (item, item_there) in enumerate(zip(sequence, counterpart, strict=False)):
        if item != item_there:
            return place
    return min(len(sequence), len(counterpart))
