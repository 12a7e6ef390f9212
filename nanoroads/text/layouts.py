"""One row of a user's file -> (prompt, answers): one function for each layout that people have.

For SFT, `sft_texts` chooses among

    prompt_and_response      {"prompt", "response"} or {"prompt", "completion"}
    one_message_list         {"messages"}: the last turn is the response
    templated                any fields, through --prompt-template

For preferences, `preference_texts` chooses among

    text_pair                {"prompt", "chosen", "rejected"} as TRL has them, all of them text
    message_pair             the same as message lists; the prompt a field or their shared beginning
    hh_rlhf                  {"chosen", "rejected"}: two dialogues as text, as in HH-RLHF
    summarize_from_feedback  {"info", "summaries", "choice"}: the comparisons of OpenAI's data set

`prompt_texts` takes any of the above but the templated ones, and leaves the answers out.

A prompt and an answer are text or a message list: [{"role": "user", "content": "Hello"}, ...].
Every function raises InputError for a row that it cannot read; data.load adds the file and the row.
"""

from string import Formatter

from nanoroads.errors import InputError

TextOrMessages = str | list[dict]

# ---------------------------------------------------------------- SFT


def sft_texts(row: dict, template: str | None = None) -> tuple[TextOrMessages, list[TextOrMessages]]:
    """(prompt, [response]). template: a format string over the row's fields, for the prompt."""
    if template:
        return templated(row, template)
    if is_one_message_list(row):
        return one_message_list(row)
    return prompt_and_response(row)


def templated(row, template):
    """Any fields make the prompt; the response may also be the field `summary`."""
    try:
        prompt = template.format(**row)
        names = [name for _, name, _, _ in Formatter().parse(template)]  # None after the last field
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"--prompt-template {template!r} does not fit the row ({error!r})") from None
    for name in names:
        if name not in row or isinstance(row[name], (int, float)):  # a number can be written out
            continue
        if isinstance(row[name], list):
            raise InputError(f"field {name!r} is a list, not text")
        field(row, name)
    return dialogue(prompt, [field(row, "response", "completion", "summary")])


def is_one_message_list(row):
    """Whether to read "messages", even beside "prompt": UltraChat also has the prompt as text."""
    return "messages" in row and "response" not in row and "completion" not in row


def one_message_list(row):
    """All turns but the last are the prompt; only the last one is learned."""
    messages = checked_messages(row["messages"], "messages")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise InputError("'messages' must end in an assistant message")
    return dialogue(messages[:-1], [messages[-1:]])


def prompt_and_response(row):
    """Both may be text or message lists."""
    return dialogue(field(row, "prompt"), [field(row, "response", "completion")])


# ---------------------------------------------------------------- preferences


def preference_texts(row: dict) -> tuple[TextOrMessages, list[TextOrMessages]]:
    """(prompt, [chosen, rejected])."""
    if "summaries" in row and "choice" in row:
        return summarize_from_feedback(row)
    chosen, rejected = chosen_and_rejected(row)
    if isinstance(chosen, list):
        return message_pair(row, chosen, rejected)
    if "prompt" in row:
        return text_pair(row, chosen, rejected)
    return hh_rlhf(chosen, rejected)


def chosen_and_rejected(row):
    """Two texts or two message lists, which differ."""
    chosen = field(row, "chosen")
    rejected = field(row, "rejected")
    if chosen == rejected:
        raise InputError("'chosen' and 'rejected' are the same")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise InputError("of 'chosen' and 'rejected' one is text, the other a message list")
    return chosen, rejected


def text_pair(row, chosen, rejected):
    """Two texts; the prompt may also be a message list."""
    return dialogue(field(row, "prompt"), [chosen, rejected])


def message_pair(row, chosen, rejected):
    """Two message lists. The prompt is the field "prompt", if any, and their shared beginning."""
    shared = shared_beginning(chosen, rejected)
    prompt = []
    if row.get("prompt"):
        prompt = field(row, "prompt")
    if isinstance(prompt, str):
        # UltraFeedback has the prompt twice: as text, and as the first message of both lists.
        prompt = [] if shared else [{"role": "user", "content": prompt}]
    if not prompt and not shared:
        raise InputError("has no 'prompt', and 'chosen' and 'rejected' share no beginning before an answer")
    return dialogue(prompt + chosen[:shared], [chosen[shared:], rejected[shared:]])


def shared_beginning(chosen, rejected):
    """How many messages stand before the first that differs.

    0 if none differs, but one list ends before the other: its answer would be empty."""
    for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)):
        if one != other:
            return place
    return 0


def hh_rlhf(chosen, rejected):
    """Two dialogues as text, which differ in the assistant's last turn only."""
    marker = "\n\nAssistant:"
    marker_begins = chosen.rfind(marker)
    prompt_ends = marker_begins + len(marker)
    if marker_begins < 0 or chosen[:prompt_ends] != rejected[:prompt_ends]:
        raise InputError(
            "has no 'prompt', and 'chosen' and 'rejected' do not share a dialogue up to the last turn"
        )
    return dialogue(chosen[:prompt_ends], [chosen[prompt_ends:], rejected[prompt_ends:]])


def summarize_from_feedback(row):
    """A Reddit post or news article and two summaries; `choice` is the index of the better one."""
    info = row.get("info") or {}
    summaries = row["summaries"]
    choice = row["choice"]
    is_index = choice in (0, 1) and not isinstance(choice, float)  # 1.0 equals 1, but is no index
    if not is_index or not isinstance(summaries, list) or len(summaries) != 2:
        raise InputError("'choice' must be 0 or 1 and 'summaries' a list of two")
    post = field(info, "post", "article")
    subreddit = info.get("subreddit") or ""
    title = info.get("title") or ""
    prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    return dialogue(prompt, [field(summaries[choice], "text"), field(summaries[1 - choice], "text")])


# ---------------------------------------------------------------- prompts


def prompt_texts(row: dict) -> tuple[TextOrMessages, list]:
    """(prompt, [])."""
    # Lists may share messages beyond "prompt", which belong to the prompt.
    only_in_a_pair = "prompt" not in row and ("chosen" in row or "summaries" in row)
    if only_in_a_pair or isinstance(row.get("chosen"), list):
        prompt, _ = preference_texts(row)
    elif is_one_message_list(row):
        prompt, _ = sft_texts(row)
    else:
        prompt = field(row, "prompt")
    return prompt, []


# ---------------------------------------------------------------- what the layouts share


def field(row, *names):
    """The value of the first of `names` that the row has: text, not empty, or a message list."""
    if not isinstance(row, dict):
        raise InputError(f"{row!r:.40}: an object with the field {either(names)} is wanted")
    present = [name for name in names if name in row]
    if not present:
        having = ", ".join(repr(name) for name in row) or "nothing"
        raise InputError(f"has no field {either(names)}, only {having}")
    # Prefer one that has a value: parquet gives every row every column, null where absent.
    with_value = [name for name in present if row[name] is not None]
    name = with_value[0] if with_value else present[0]
    value = row[name]
    if isinstance(value, list):
        return checked_messages(value, name)
    if not isinstance(value, str):
        raise InputError(f"field {name!r} is {type(value).__name__}, not text")
    if not value:
        raise InputError(f"field {name!r} is empty")
    return value


def either(names):
    """Names of fields, for an error: 'response' or 'completion'."""
    return " or ".join(repr(name) for name in names)


def checked_messages(messages, name="prompt"):
    """The messages without null values: parquet gives every message every key, null where absent.

    Raises InputError, with the name of their field, unless they are a list of objects with text in
    both "role" and "content"."""
    if not isinstance(messages, list) or not messages or not all(is_message(each) for each in messages):
        wanted = "one or more objects with text in 'role' and 'content'"
        raise InputError(f"field {name!r}: a message list must hold {wanted}")
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def is_message(value):
    """Whether a value is {"role": text, "content": text}, perhaps with more."""
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def dialogue(prompt, answers):
    """(prompt, answers) as they are if all are text, else all as message lists.

    Raises InputError for an empty answer."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        if not all(answers):
            raise InputError("an answer is empty")
        return prompt, answers
    prompt = as_messages(prompt, "user")
    answers = [as_messages(answer, "assistant") for answer in answers]
    for messages in answers:
        if not any(message["content"] for message in messages):
            raise InputError("an answer is empty")
    return prompt, answers


def as_messages(value, role):
    """Text as the one message of `role`; a message list as it is."""
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    return checked_messages(value)


def chat_text(messages):
    """Messages as HH-RLHF writes dialogues.

    If they end in the user's turn, the text asks for the assistant's."""
    speakers = {"user": "Human", "assistant": "Assistant", "system": "System"}
    text = ""
    for message in checked_messages(messages):
        speaker = speakers.get(message["role"], message["role"])
        text += f"\n\n{speaker}: {message['content']}"
    if messages[-1]["role"] != "assistant":
        text += "\n\nAssistant:"
    return text
