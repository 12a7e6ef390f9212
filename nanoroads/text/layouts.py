"""One row of a user's file -> Texts: one function for each layout that people have.

For SFT, `sft_texts` chooses among

    prompt_and_response      {"prompt", "response"} or {"prompt", "completion"}
    one_message_list         {"messages"} or {"conversations"}: the last turn is the response
    templated                any fields, through --prompt-template

For preferences, `preference_texts` chooses among

    text_pair                {"prompt", "chosen", "rejected"} as TRL has them, all of them text
    message_pair             the same as message lists; the prompt a field or their shared beginning
    hh_rlhf                  {"chosen", "rejected"}: two dialogues as text, as in HH-RLHF
    summarize_from_feedback  {"info", "summaries", "choice"}: the comparisons of OpenAI's data set

`prompt_texts` takes any of the above but the templated ones, and leaves the answers out.

Rows are what `rows.parse` gives: what is absent is no key. messages.py says which forms of message
lists are read, dialogues.py where the prompt ends. A column of another name, such as `system`, is not
read, as in TRL; data.load says so. Every function raises InputError for a row that it
cannot read; data.load adds the file and the row.
"""

from string import Formatter
from typing import NamedTuple

from nanoroads.errors import InputError
from nanoroads.text.dialogues import check_answer, same_turns, split_pair, split_response, turns_of_text
from nanoroads.text.messages import list_of_objects, message_list, text_or_messages

TextOrMessages = str | list[dict]

SAME_ANSWERS = "the chosen and the rejected answer are the same"
MESSAGES = ("messages", "conversations")
RESPONSE = ("response", "completion")
# The same and what other data sets call it, for --prompt-template.
TEMPLATED_RESPONSE = RESPONSE + ("summary", "output")
# What other data sets call our fields, for the hint in an error.
OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "input", "post", "document"),
    "response": ("output", "answer", "summary", "text", "chosen"),
    "chosen": ("preferred_output", "accepted", "response_chosen", "completion", "response"),
    "rejected": ("non_preferred_output", "response_rejected"),
}
# What "label" holds beside a single answer, in KTO's rows.
GOOD_LABELS = (True, 1, "true", "True", "1")
BAD_LABELS = (False, 0, "false", "False", "0")


class Texts(NamedTuple):
    """What a row says: all text, or all message lists."""

    prompt: TextOrMessages
    answers: list[TextOrMessages]
    tools: list[dict] | None = None  # JSON schemas for the chat template; None: no tools
    fields: tuple[str, ...] = ()  # names of the row's fields that were read


# ---------------------------------------------------------------- SFT


def sft_texts(row: dict, template: str | None = None) -> Texts:
    """The prompt and [response]. template: a format string over the row's fields, for the prompt."""
    if template:
        return templated(row, template)
    if is_one_message_list(row):
        return one_message_list(row)
    return prompt_and_response(row)


def templated(row, template):
    """Any fields make the prompt; the response may also be the field `summary` or `output`."""
    prompt, names = filled(template, row)
    response = field(row, *TEMPLATED_RESPONSE)
    response_name = name_with_value(row, *TEMPLATED_RESPONSE)
    if isinstance(response, list):
        prompt, answer = split_response(prompt, response, response_name)
        return from_messages(row, prompt, [answer], names + [response_name])
    return Texts(prompt, [response], None, tuple(names) + (response_name,))


def filled(template, row):
    """(a --prompt-template with a row's values, names of the fields that it reads). Raises InputError.

    A value may lie deeper, as in {info[title]}. Python would write anything out; only text and numbers
    are meant."""
    formatter = Formatter()
    names = []
    try:
        for _, place, _, _ in formatter.parse(template):
            if place is None:  # text without a value behind it
                continue
            value, name = formatter.get_field(place, (), row)
            if value == "":
                raise InputError(f"field {place!r} is empty")
            if not isinstance(value, (str, int, float)):
                raise InputError(f"field {place!r} is {type(value).__name__}, not text")
            if isinstance(value, str) and isinstance(text_or_messages(value, place), list):
                raise InputError(f"field {place!r} is a message list, not text")
            names.append(name)
        return template.format(**row), names
    except InputError:
        raise
    except KeyError as error:
        raise InputError(
            f"--prompt-template {template!r} does not fit the row (no value for {error})"
        ) from None
    except (IndexError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"--prompt-template {template!r} does not fit the row ({error!r})") from None


def is_one_message_list(row):
    """Whether to read "messages", even beside "prompt": UltraChat also has the prompt as text."""
    return has_value(row, *MESSAGES) and not has_value(row, *RESPONSE)


def one_message_list(row):
    """All turns but the last are the prompt; only the last one is learned."""
    name = name_with_value(row, *MESSAGES)
    messages = messages_in(row, name)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise InputError(f"{name!r} must end in an assistant message, and hold more than that")
    check_answer(messages[-1:], name)
    return from_messages(row, messages[:-1], [messages[-1:]], [name])


def prompt_and_response(row):
    """Both may be text or message lists; the response may repeat the prompt."""
    prompt = field(row, "prompt")
    response = field(row, *RESPONSE)
    name = name_with_value(row, *RESPONSE)
    if isinstance(prompt, str) and isinstance(response, str):
        if turns_of_text(prompt) and response.startswith(prompt):  # a whole dialogue, as HH-RLHF writes it
            response = response.removeprefix(prompt)
            if not response.strip():
                raise InputError(f"an answer is empty, in {name!r}")
        return Texts(prompt, [response], None, ("prompt", name))
    prompt, answer = split_response(prompt, as_messages(response, "assistant"), name)
    return from_messages(row, prompt, [answer], ["prompt", name])


# ---------------------------------------------------------------- preferences


def preference_texts(row: dict) -> Texts:
    """The prompt and [chosen, rejected]."""
    if has_value(row, "summaries") and not has_value(row, "chosen"):
        return summarize_from_feedback(row)
    chosen, rejected = chosen_and_rejected(row)
    prompt_name = name_of_prompt(row)
    prompt = ""
    if has_value(row, prompt_name):
        prompt = field(row, prompt_name)
    if isinstance(chosen, list) or isinstance(prompt, list):
        return message_pair(row, prompt_name, prompt, chosen, rejected)
    if are_whole_dialogues(chosen, rejected, has_prompt=prompt != ""):
        return hh_rlhf(prompt, chosen, rejected)
    return text_pair(row, chosen, rejected)


def chat_texts(row: dict) -> Texts:
    """preference_texts, where a prompt of text is a user's message and its answers the assistant's.

    So a chat template is written around rows such as RewardBench's."""
    texts = preference_texts(row)
    if not isinstance(texts.prompt, str):
        return texts
    if turns_of_text(texts.prompt):
        raise InputError("--chat goes with prompts and answers, this is a dialogue written as one text")
    answers = [as_messages(answer, "assistant") for answer in texts.answers]
    return texts._replace(prompt=as_messages(texts.prompt, "user"), answers=answers)


def chosen_and_rejected(row):
    """Two texts or two message lists, which differ."""
    chosen = field(row, "chosen")
    rejected = field(row, "rejected")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise InputError("of 'chosen' and 'rejected' one is text, the other a message list")
    chosen_messages = as_messages(chosen, "assistant")
    if same_turns(chosen_messages, as_messages(rejected, "assistant")):
        raise InputError(SAME_ANSWERS)
    return chosen, rejected


def name_of_prompt(row):
    """The field of the prompt: "prompt", or a message list that does not end in an answer."""
    if not has_value(row, "prompt"):
        for name in MESSAGES:
            if has_value(row, name) and messages_in(row, name)[-1]["role"] != "assistant":
                return name
    return "prompt"


def text_pair(row, chosen, rejected):
    """Three texts."""
    if "prompt" not in row:
        hint = renaming_hint(row, "prompt")
        raise InputError(f"has no 'prompt', and 'chosen' and 'rejected' do not share a dialogue{hint}")
    return Texts(field(row, "prompt"), [chosen, rejected], None, ("prompt", "chosen", "rejected"))


def message_pair(row, prompt_name, prompt, chosen, rejected):
    """Message lists, or answers of text to a message list. The prompt may be their shared beginning."""
    chosen = as_messages(chosen, "assistant")
    rejected = as_messages(rejected, "assistant")
    prompt, answers = split_pair(prompt, chosen, rejected)
    return from_messages(row, prompt, answers, [prompt_name, "chosen", "rejected"])


def are_whole_dialogues(chosen, rejected, has_prompt):
    """Whether two texts are dialogues as HH-RLHF writes them, not answers alone.

    Beside a prompt they begin alike: two answers may be scripts of dialogues, which are only text."""
    chosen_turns = turns_of_text(chosen)
    rejected_turns = turns_of_text(rejected)
    if not chosen_turns or not rejected_turns or chosen_turns[0]["role"] == "assistant":
        return False
    return not has_prompt or same_turns(chosen_turns[:1], rejected_turns[:1])


def hh_rlhf(prompt, chosen, rejected):
    """Two dialogues as text, which differ in the assistant's last turn only. They stay as they are written.

    prompt: a text, perhaps a part of both, or "". TRL cuts such texts at the first character that differs,
    which may be within a word; here turns are compared, and an answer begins behind its "Assistant:"."""
    chosen_turns = turns_of_text(chosen)
    rejected_turns = turns_of_text(rejected)
    shared, _ = split_pair("", chosen_turns, rejected_turns)
    chosen_begins = chosen_turns[len(shared)]["begins"]
    rejected_begins = rejected_turns[len(shared)]["begins"]
    beginning = chosen[:chosen_begins]
    said = [turn["content"].strip() for turn in shared]
    if prompt.strip() not in said and not beginning.strip().startswith(prompt.strip()):
        beginning = prompt + beginning
    answers = [chosen[chosen_begins:], rejected[rejected_begins:]]
    return Texts(beginning, answers, None, ("prompt", "chosen", "rejected"))


def summarize_from_feedback(row):
    """A Reddit post or news article and two summaries; `choice` is the index of the better one."""
    info = row.get("info") or {}
    summaries = row["summaries"]
    choice = row.get("choice")
    is_index = choice in (0, 1) and isinstance(choice, int) and not isinstance(choice, bool)
    if not is_index or not isinstance(summaries, list) or len(summaries) != 2:
        raise InputError("'choice' must be 0 or 1 and 'summaries' a list of two")
    post = field(info, "post", "article")
    subreddit = info.get("subreddit") or ""
    title = info.get("title") or ""
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    chosen = field(summaries[choice], "text")
    rejected = field(summaries[1 - choice], "text")
    if chosen == rejected:
        raise InputError(SAME_ANSWERS)
    return Texts(prompt, [chosen, rejected], None, ("info", "summaries", "choice"))


# ---------------------------------------------------------------- prompts

# What a row of prompts may also hold: answers, which nobody misses.
KNOWN_FIELDS = MESSAGES + RESPONSE + ("prompt", "chosen", "rejected", "info", "summaries", "choice")


def prompt_texts(row: dict) -> Texts:
    """The prompt, and no answers."""
    if is_read_from_its_answers(row):
        texts = preference_texts(row)
    elif is_one_message_list(row):
        texts = unanswered(row)
    elif has_value(row, *RESPONSE) and isinstance(field(row, *RESPONSE), list):
        texts = prompt_and_response(row)
    elif isinstance(field(row, "prompt"), list):
        texts = from_messages(row, field(row, "prompt"), [], [])
    else:
        texts = Texts(field(row, "prompt"), [])
    return Texts(texts.prompt, [], texts.tools, texts.fields + KNOWN_FIELDS)


def is_read_from_its_answers(row):
    """Whether a row has a pair, of which more than the field "prompt" may be the prompt."""
    if not has_value(row, "prompt"):
        return has_value(row, "chosen", "summaries")
    if not has_value(row, "chosen") or not has_value(row, "rejected"):
        return False
    chosen = field(row, "chosen")
    rejected = field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return are_whole_dialogues(chosen, rejected, has_prompt=True)
    return True


def unanswered(row):
    """A message list up to the last answer, or all of it where it ends in the user's turn."""
    name = name_with_value(row, *MESSAGES)
    messages = messages_in(row, name)
    if messages[-1]["role"] == "assistant":
        return one_message_list(row)
    return from_messages(row, messages, [], [name])


# ---------------------------------------------------------------- what the layouts share


def from_messages(row, prompt, answers, fields):
    """Texts of message lists, with the row's tools. fields: names of those read so far."""
    tools = None
    if has_value(row, "tools"):
        tools = list_of_objects(row["tools"], "tools") or None
    return Texts(prompt, answers, tools, tuple(fields) + ("tools",))


def has_value(row, *names):
    """Whether one of these fields holds anything: not an empty text, list or object."""
    return any(row.get(name) not in (None, "", [], {}) for name in names)


def name_with_value(row, *names):
    """The first of `names` that has a value, or else that the row has, or else the first."""
    present = [name for name in names if name in row]
    for name in present:
        if has_value(row, name):
            return name
    return (present or names)[0]


def field(row, *names):
    """The value of the first of `names` that has one: text, not empty, or a message list."""
    if not isinstance(row, dict):
        raise InputError(f"{row!r:.40}: an object with the field {either(names)} is wanted")
    name = name_with_value(row, *names)
    if name not in row:
        having = ", ".join(repr(name) for name in row) or "nothing"
        raise InputError(f"has no field {either(names)}, only {having:.300}{renaming_hint(row, names[0])}")
    return text_or_messages(row[name], name)


def messages_in(row, name):
    """The message list in a field. Raises InputError if it is text."""
    messages = text_or_messages(row[name], name)
    if isinstance(messages, str):
        raise InputError(f"field {name!r} is text, not a message list")
    return messages


def either(names):
    """Names of fields, for an error: 'response' or 'completion'."""
    return " or ".join(repr(name) for name in names)


def renaming_hint(row, name):
    """For an error: what the row has that may be the field `name`."""
    if name in ("chosen", "rejected") and row.get("label") in GOOD_LABELS + BAD_LABELS:
        return "; its 'label' marks a single answer as good or bad (as KTO has it), and pairs are wanted"
    for likely_name in OTHER_NAMES.get(name, ()):
        if has_value(row, likely_name):
            return f"; if {likely_name!r} is the {name}, rename it"
    return ""


def as_messages(value, role):
    """Text as the one message of `role`; a message list as it is."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value


def chat_text(messages):
    """Messages as HH-RLHF writes dialogues.

    If they end in the user's turn, the text asks for the assistant's."""
    speakers = {"user": "Human", "assistant": "Assistant", "system": "System"}
    text = ""
    for message in message_list(messages):
        speaker = speakers.get(message["role"], message["role"])
        text += f"\n\n{speaker}: {message['content']}"
    if messages[-1]["role"] != "assistant":
        text += "\n\nAssistant:"
    return text
