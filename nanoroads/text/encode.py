"""One row -> tokens: a prompt and its answers, as texts or as message lists.

Prompt and response are tokenised apart, so no merge crosses the boundary. EOS ends every response
that was not cut. Message lists go through the chat template of the tokenizer's folder; without one
they become HH-RLHF's "Human: ... Assistant:".
"""

from collections.abc import Sequence
from typing import NamedTuple

import tiktoken

from nanoroads.text import chat, tokenizer
from nanoroads.text.layouts import TextOrMessages, chat_text


class EncodedRow(NamedTuple):
    """One row as tokens."""

    prompt: list[int]
    responses: list[list[int]]  # with EOS
    text: str  # the prompt as text


def encode_row(
    encoding: tiktoken.Encoding,
    prompt: TextOrMessages,
    answers: Sequence[TextOrMessages] = (),
    tools: list[dict] | None = None,
) -> EncodedRow:
    """A prompt and its answers, all text or all message lists -> tokens. Raises InputError."""
    eos = tokenizer.eos_id(encoding)
    if isinstance(prompt, list) and chat.template(encoding):
        return encode_by_template(encoding, prompt, answers, eos)
    if isinstance(prompt, list):
        prompt = chat_text(prompt)
        # HH-RLHF puts a space after "Assistant:"; several messages become one text.
        answers = [" " + " ".join(message["content"] for message in answer) for answer in answers]
    prompt_ids = bos_of(encoding) + tokenizer.encode(encoding, prompt)
    responses = [tokenizer.encode(encoding, answer) + [eos] for answer in answers]
    return EncodedRow(prompt_ids, responses, prompt)


def encode_by_template(encoding, prompt, answers, eos):
    """Message lists -> EncodedRow, by the chat template. It writes BOS itself, and usually EOS."""
    responses = []
    for answer in answers:
        prompt_ids, response = chat.encode_conversation(encoding, prompt, answer)
        if not response or response[-1] != eos:
            response = response + [eos]
        responses.append(response)
    if not answers:
        prompt_ids, _ = chat.encode_conversation(encoding, prompt)
    return EncodedRow(prompt_ids, responses, chat.render(encoding, prompt, add_generation_prompt=True))


def bos_of(encoding):
    """The ids that start a text: a list, empty for most."""
    return getattr(encoding, "bos", [])


def cut_prompt(encoding: tiktoken.Encoding, prompt: list[int], most: int) -> list[int]:
    """The last `most` tokens; if the prompt starts with BOS, then BOS and the last `most - 1`."""
    if len(prompt) <= most:
        return prompt
    bos = bos_of(encoding)
    if prompt[: len(bos)] != bos:
        bos = []
    return bos + prompt[len(prompt) - most + len(bos) :]
