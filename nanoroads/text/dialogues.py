"""Where the prompt of a dialogue ends and its answers begin: compared, never guessed.

A row may have its prompt apart, as the beginning that its dialogues share, or both. So each dialogue is
first completed with the prompt, unless it holds it already; then the prompt is what all have in common.

TRL compares only where there is no field "prompt". Otherwise it puts the prompt before the dialogues
even if they hold it, or, a prompt of text before message lists, leaves it out; here it stands once.
"""

import re

from nanoroads.errors import InputError

# Two messages are the same turn if these keys are equal; the rest is bookkeeping: an id, a score.
READ_KEYS = ("role", "content", "tool_calls", "name", "reasoning_content", "thinking", "reasoning")
# Whose turns may stand between a prompt and the answer. Not a tool's: it speaks after the assistant has
# called it, so its turn is one of an answer with several, which `check_answer` refuses.
BEFORE_AN_ANSWER = ("user", "system", "developer")
# A turn of a dialogue as HH-RLHF writes it: after a blank line, or at the beginning, where the system may
# speak. Others write a line for each turn.
HH_TURN = re.compile(r"(?:\A\s*|\n[ \t\r]*\n\s*(?!System))(System|Human|Assistant):")
LINE_TURN = re.compile(r"(?:\A\s*|\n(?!System))(System|Human|Assistant):")
HH_ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}

# ---------------------------------------------------------------- comparing


def same_turn(message: dict, counterpart: dict) -> bool:
    """Whether two messages say the same. Blanks around it count in an answer only.

    A data set that has its prompt apart has often stripped it."""
    for key in READ_KEYS:
        said = message.get(key)
        said_there = counterpart.get(key)
        if key == "content" and message["role"] != "assistant":
            said = said.strip()
            said_there = said_there.strip()
        if said != said_there:
            return False
    return True


def same_turns(messages: list[dict], counterparts: list[dict]) -> bool:
    """Whether two message lists say the same."""
    return len(messages) == len(counterparts) and all(map(same_turn, messages, counterparts))


def shared_beginning(dialogue: list[dict], counterpart: list[dict]) -> int:
    """How many messages stand before the first that differs, or before the end of the shorter list."""
    for place, (message, message_there) in enumerate(zip(dialogue, counterpart, strict=False)):
        if not same_turn(message, message_there):
            return place
    return min(len(dialogue), len(counterpart))


def overlap(before: list[dict], after: list[dict]) -> int:
    """How many messages at the end of `before` stand again at the beginning of `after`: the most.

    An answer repeats nothing, even if it says what the assistant has said before."""
    if after[0]["role"] == "assistant":
        return 0
    for length in range(min(len(before), len(after)), 0, -1):
        if same_turns(before[-length:], after[:length]):
            return length
    return 0


def place_of(part: list[dict], messages: list[dict]) -> int | None:
    """Where in `messages` those of `part` stand, one after another; None: nowhere."""
    for place in range(len(messages) - len(part) + 1):
        if same_turns(messages[place : place + len(part)], part):
            return place
    return None


# ---------------------------------------------------------------- the prompt


def split_pair(prompt, chosen, rejected):
    """(messages of the prompt, [chosen answer, rejected answer]), all message lists.

    prompt: text or messages, "" if there is none beside the dialogues. Raises InputError."""
    chosen, _ = completed(prompt, chosen)
    rejected, _ = completed(prompt, rejected)
    end = shared_beginning(chosen, rejected)
    for shorter, longer, messages in (("chosen", "rejected", chosen), ("rejected", "chosen", rejected)):
        if end and end == len(messages):
            raise InputError(f"{shorter!r} is the beginning of {longer!r}, so it holds no answer of its own")
    if end == 0:
        raise InputError("has no 'prompt', and 'chosen' and 'rejected' share no beginning before an answer")
    answers = [chosen[end:], rejected[end:]]
    check_answer(answers[0], "chosen")
    check_answer(answers[1], "rejected")
    return chosen[:end], answers


def split_response(prompt, response, name):
    """(messages of the prompt, messages of the answer). prompt: text or messages. Raises InputError.

    The answer is the first of the assistant's after the prompt. name: the response's field."""
    messages, end = completed(prompt, response)
    while end < len(messages) and messages[end]["role"] in BEFORE_AN_ANSWER:
        end += 1
    check_answer(messages[end:], name)
    return messages[:end], messages[end:]


def completed(prompt, messages):
    """(a dialogue that holds the prompt once, where in it the prompt ends). Raises InputError."""
    if isinstance(prompt, str):
        turns = turns_of_text(prompt)
        if not asks_for_an_answer(turns):
            return completed_by_text(prompt, messages)
        prompt = [{"role": turn["role"], "content": turn["content"].strip()} for turn in turns[:-1]]
    is_whole_dialogue = messages[0]["role"] != "assistant"
    place = place_of(prompt, messages)
    if is_whole_dialogue and place is not None:
        return messages, place + len(prompt)
    repeated = overlap(prompt, messages)
    return prompt + messages[repeated:], len(prompt)


def completed_by_text(text, messages):
    """The same for a prompt that is text. The dialogue tells which turn it is.

    UltraFeedback has the user's first message a second time. Other data sets have the system's, or
    leave the text out of the messages. Blanks are no turn."""
    if not text.strip():
        return messages, 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant" and message["content"].strip() == text.strip():
            return messages, place + 1
    first = 0  # the first message that is not a system message
    while first < len(messages) - 1 and messages[first]["role"] in ("system", "developer"):
        first += 1
    if messages[first]["role"] != "user":
        turn = {"role": "user", "content": text}
        return [*messages[:first], turn, *messages[first:]], first + 1
    if first > 0:
        raise InputError(
            "'prompt' is text that is no turn of the message list, which has a system and a user message "
            "already; which turn it is cannot be told"
        )
    return [{"role": "system", "content": text}, *messages], 1


def check_answer(messages, name):
    """Raises InputError unless this is one message, of the assistant. name: of the field it is from.

    A response is trained as a whole. Of several turns the user's words, or a tool's, would be trained too:
    TRL does that."""
    if not any(message["content"] or "tool_calls" in message for message in messages):
        raise InputError(f"an answer is empty, in {name!r}")
    roles = [message["role"] for message in messages]
    if roles[-1] != "assistant":
        raise InputError(f"{name!r} must end in an assistant message, and ends in one of {roles[-1]!r}")
    if roles[0] != "assistant":
        raise InputError(f"after the prompt {name!r} must begin with an assistant message, not {roles[0]!r}")
    if len(roles) > 1:
        raise InputError(
            f"the answer in {name!r} has several turns ({', '.join(roles)}), and only one of the assistant's "
            "can be trained: make a row of each, with the turns before it in the prompt"
        )


# ---------------------------------------------------------------- dialogues as text


def turns_of_text(text):
    """A dialogue as HH-RLHF writes it -> messages; [] if the text does not begin as one.

    "content" is exactly what stands between two markers, with the spaces; "begins" is the place in the text
    where it starts."""
    if not HH_TURN.match(text):  # nearly all texts
        return []
    matches = list(HH_TURN.finditer(text))
    if not any(match[1] == "Assistant" for match in matches):
        matches = list(LINE_TURN.finditer(text))
    ends = [match.start() for match in matches[1:]] + [len(text)]
    messages = []
    for match, end in zip(matches, ends, strict=True):
        content = text[match.end() : end]
        messages.append({"role": HH_ROLES[match[1]], "content": content, "begins": match.end()})
    return messages


def asks_for_an_answer(turns):
    """Whether the turns of a text end where the assistant's answer is wanted: "Assistant:"."""
    return bool(turns) and turns[-1]["role"] == "assistant" and not turns[-1]["content"].strip()
