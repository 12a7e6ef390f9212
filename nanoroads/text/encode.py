"""One row -> tokens: a prompt and its answers, as texts or as message lists.

What spells a special token of the tokenizer is that token where a training file's text or an
assistant's message holds it, and stays text where a user typed it. A response that was not cut ends
with one token of those that end a response. Text prompts and responses are tokenised apart, so no
merge crosses the boundary. Message lists go through the chat template of the tokenizer's folder;
without one they become HH-RLHF's "Human: ... Assistant:".
"""

from collections.abc import Sequence
from typing import NamedTuple

import tiktoken

from nanoroads.errors import InputError
from nanoroads.text import chat, chat_template, tokenizer
from nanoroads.text.layouts import TextOrMessages, chat_text
from nanoroads.text.trusted import TrustedText

NO_ANSWER = "the answer is blank, or the chat template leaves it out"


class EncodedRow(NamedTuple):
    """One row as tokens."""

    prompt: list[int]
    responses: list[list[int]]  # each ends with one of tokenizer.stop_ids, unless cut
    text: str  # the prompt as text
    left_out: str = ""  # what the chat template drops of its generation prompt once an answer follows


def encode_row(
    encoding: tiktoken.Encoding,
    prompt: TextOrMessages,
    answers: Sequence[TextOrMessages] = (),
    tools: list[dict] | None = None,
    typed: bool = False,
) -> EncodedRow:
    """A prompt and its answers, all text or all message lists -> tokens. Raises InputError.

    tools: what the assistant may call, as JSON schemas. typed: the prompt was typed by a user, so a
    prompt of text holds no special token."""
    if isinstance(prompt, str):
        if tools:
            raise InputError("the field 'tools' goes with messages only; write them into the prompt's text")
        return encode_text(encoding, prompt, answers, typed)
    answers = [only_message(answer) for answer in answers]
    if chat_template.template(encoding) is None:
        return encode_without_template(encoding, prompt, answers, tools)

    conversation = chat.encode_conversation(encoding, prompt, answers, tools)
    responses = []
    for response in conversation.responses:
        if says_nothing(encoding, response):
            raise InputError(NO_ANSWER)
        responses.append(ended(encoding, response))
    return EncodedRow(conversation.prompt, responses, conversation.text, conversation.left_out)


def encode_text(encoding, prompt, answers, typed):
    """Texts -> EncodedRow."""
    if typed:
        prompt_ids = tokenizer.encode(encoding, prompt)
    else:
        prompt_ids = tokenizer.encode_with_special(encoding, prompt)
    responses = []
    for answer in answers:
        responses.append(ended(encoding, tokenizer.encode_with_special(encoding, answer)))
    return EncodedRow(with_bos(encoding, prompt_ids), responses, prompt)


def left_out_line(left_out: str) -> str:
    """What to tell, once per file, about rows with an EncodedRow.left_out."""
    return (
        f"once an answer follows, the chat template drops the end of its generation prompt, {left_out!r}: "
        "training begins the answer in its place, sampling after it"
    )


def only_message(answer):
    """The one message of an answer. Raises InputError for several.

    A response is trained as a whole, so it would train the words of a user or tool as well."""
    if len(answer) == 1:
        return answer[0]
    roles = ", ".join(message["role"] for message in answer)
    raise InputError(
        f"an answer of several turns ({roles}) would train more than one assistant's turn: "
        "keep the first turns in the prompt, or leave such rows out"
    )


def encode_without_template(encoding, messages, answers, tools):
    """Message lists -> EncodedRow, written as HH-RLHF writes dialogues."""
    if tools or any(message.get("tool_calls") for message in messages + answers):
        what = "tools" if tools else "tool_calls"
        raise InputError(f"the tokenizer's folder has no chat template, so {what!r} cannot be written")
    trusted = TrustedText(encoding, messages)
    text = chat_text([trusted.message(message) for message in messages])
    prompt_ids = with_bos(encoding, trusted.ids(text))
    responses = []
    for answer in answers:
        # HH-RLHF puts a space after "Assistant:".
        response = tokenizer.encode_with_special(encoding, " " + answer["content"])
        responses.append(ended(encoding, response))
    return EncodedRow(prompt_ids, responses, trusted.original(text))


# ---------------------------------------------------------------- where a response ends


def ended(encoding, response):
    """The response with one token at its end that ends it, and nothing behind that.

    Where a template or recipe wrote one, that is kept; what follows (ChatML's newline, a second EOS) is
    never sampled. Else EOS is appended."""
    stops = tokenizer.stop_ids(encoding)
    end = None
    for place in reversed(range(len(response))):
        if response[place] in stops:
            end = place
        elif not is_blank(encoding, response[place]):
            break
    if end is None:
        return response + [tokenizer.eos_id(encoding)]
    return response[: end + 1]


def says_nothing(encoding, response):
    """Whether a response holds blanks and tokens that end it, and nothing else."""
    stops = tokenizer.stop_ids(encoding)
    return all(token in stops or is_blank(encoding, token) for token in response)


def is_blank(encoding, token):
    """Whether a token is whitespace."""
    return tokenizer.piece(encoding, token).isspace()


# ---------------------------------------------------------------- where a prompt begins


def with_bos(encoding, ids):
    """A text's ids behind the BOS of its family, which stands there once."""
    bos = encoding_bos(encoding)
    if ids[: len(bos)] == bos:
        return ids
    return bos + ids


def encoding_bos(encoding):
    """The ids that the tokenizer puts before a text: a list, empty for most."""
    return getattr(encoding, "bos", [])


def cut_prompt(encoding: tiktoken.Encoding, prompt: list[int], most: int) -> list[int]:
    """The last `most` tokens; if the prompt starts with BOS, then BOS and the last `most - 1`.

    BOS: what the tokenizer or the chat template puts in front."""
    if len(prompt) <= most:
        return prompt
    for bos in (encoding_bos(encoding), chat_template.written_bos(encoding)):
        if bos and prompt[: len(bos)] == bos:
            return bos + prompt[len(prompt) - most + len(bos) :]
    return prompt[-most:]
