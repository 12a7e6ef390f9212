"""One row of a user's file -> (prompt, answers): one function for each layout that people have.

SFT          {"prompt", "response"}, {"prompt", "completion"}, {"messages"}, or any fields through --prompt-template
preferences  {"prompt", "chosen", "rejected"} as TRL has them, text or message lists, the prompt apart or as their shared
             beginning; HH-RLHF's rows (two dialogues); the comparisons of OpenAI's summarize-from-feedback
prompts      any of the above
"""

from string import Formatter

from nanoroads.errors import InputError


def field(row, *names):
    """The first of `names` that the row has: text, or a message list. Raises InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{row!r:.40}: an object with the field {' or '.join(map(repr, names))} is wanted")
    for name in sorted(
        names, key=lambda name: row.get(name) is None
    ):  # a column of parquet that has no value is null
        if name in row:
            value = row[name]
            if isinstance(value, list):
                return checked(value, name)
            if not isinstance(value, str):
                raise InputError(f"field {name!r} is {type(value).__name__}, not text")
            if not value:
                raise InputError(f"field {name!r} is empty")
            return value
    raise InputError(
        f"has no field {' or '.join(map(repr, names))}, only {', '.join(map(repr, row)) or 'nothing'}"
    )


def checked(messages, name="prompt"):
    """The messages without what is null in them. Raises InputError unless they are a list of {"role", "content"} with text
    in both. name: of their field."""
    good = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    if not good or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise InputError(
            f"field {name!r}: a message list must hold objects with text in 'role' and 'content', and at least one"
        )
    return [
        {key: value for key, value in m.items() if value is not None} for m in messages
    ]  # parquet has all keys in all


def chat_text(messages):
    """A list of {"role", "content"} as HH-RLHF writes dialogues; a list that ends in the user's turn asks for the assistant's."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    text = "".join(f"\n\n{names.get(m['role'], m['role'])}: {m['content']}" for m in checked(messages))
    return text + ("\n\nAssistant:" if messages[-1]["role"] != "assistant" else "")


def dialogue(prompt, answers):
    """(prompt, answers) as they are if all are text, else all as message lists."""
    turn = lambda role, x: checked([{"role": role, "content": x}] if isinstance(x, str) else x)  # noqa: E731
    if not isinstance(prompt, str) or not all(isinstance(a, str) for a in answers):
        prompt, answers = turn("user", prompt), [turn("assistant", a) for a in answers]
    if not all(a if isinstance(a, str) else any(m["content"] for m in a) for a in answers):
        raise InputError("an answer is empty")
    return prompt, answers


def in_messages(row):
    """Whether a row is one message list; UltraChat and UltraFeedback have their prompt as text beside it."""
    return "messages" in row and "response" not in row and "completion" not in row


def sft_texts(row, template=None):
    """(prompt, [response]), each text or a message list. template: a format string over the row's fields, for the prompt;
    the response may then be `summary`."""
    if template:
        try:
            prompt, names = template.format(**row), [name for _, name, _, _ in Formatter().parse(template)]
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise InputError(f"--prompt-template {template!r} does not fit the row ({error!r})") from None
        for name in names:  # a number can be written out, null and lists would be noise
            if name in row and not isinstance(row[name], (int, float)) and isinstance(field(row, name), list):
                raise InputError(f"field {name!r} is list, not text")
        return dialogue(prompt, [field(row, "response", "completion", "summary")])
    if in_messages(row):  # the last turn is the one that is learned
        messages = checked(row["messages"], "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InputError("'messages' must end in an answer of the assistant's")
        return dialogue(messages[:-1], [messages[-1:]])
    return dialogue(field(row, "prompt"), [field(row, "response", "completion")])


def preference_texts(row):
    """(prompt, [chosen, rejected]) of one row in any of the layouts, each text or a message list."""
    if "summaries" in row and "choice" in row:  # summarize-from-feedback
        info, summaries, choice = row.get("info") or {}, row["summaries"], row["choice"]
        if (
            choice not in (0, 1)
            or isinstance(choice, float)
            or not isinstance(summaries, list)
            or len(summaries) != 2
        ):
            raise InputError("'choice' must be 0 or 1 and 'summaries' two")
        post = field(info, "post", "article")
        head = f"SUBREDDIT: r/{info.get('subreddit') or ''}\n\nTITLE: {info.get('title') or ''}\n\n"
        prompt = f"{head}POST: {post}\n\nTL;DR:"
        return dialogue(prompt, [field(summaries[choice], "text"), field(summaries[1 - choice], "text")])
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if chosen == rejected:
        raise InputError("'chosen' and 'rejected' are the same")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise InputError("of 'chosen' and 'rejected' one is text, the other a message list")
    if isinstance(chosen, list):
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        apart = field(row, "prompt") if row.get("prompt") else []
        if isinstance(apart, str):  # UltraFeedback has the prompt twice
            apart = [] if shared else [{"role": "user", "content": apart}]
        return dialogue(apart + chosen[:shared], [chosen[shared:], rejected[shared:]])
    if "prompt" in row:
        return dialogue(field(row, "prompt"), [chosen, rejected])
    marker = "\n\nAssistant:"  # HH-RLHF: the dialogues differ in the assistant's last turn
    end = chosen.rfind(marker) + len(marker)
    if end < len(marker) or chosen[:end] != rejected[:end]:
        raise InputError(
            "has no 'prompt', and 'chosen' and 'rejected' do not share a dialogue up to the last turn"
        )
    return dialogue(chosen[:end], [chosen[end:], rejected[end:]])


def prompt_texts(row):
    """(prompt, [])."""
    if isinstance(row.get("chosen"), list) or (
        "prompt" not in row and ("chosen" in row or "summaries" in row)
    ):
        return preference_texts(row)[0], []
    return (sft_texts(row)[0] if in_messages(row) else field(row, "prompt")), []
