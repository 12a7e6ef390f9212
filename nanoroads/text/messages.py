"""Message lists as people's files hold them -> [{"role": text, "content": text, ...}, ...].

Read besides the usual form: ShareGPT's {"from", "value"}; one message without a list around it; a list
written as JSON text, as CSV files hold it; content as a list of text parts; tool calls without content,
or as a message of their own.
"""

import json
import re

from nanoroads.errors import InputError
from nanoroads.text.values import plain, present

# Names of roles in ShareGPT and other data sets, which no chat model was trained with.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
}
# LLaMA-Factory's role of an assistant's tool calls, which its content holds as JSON.
CALLER = "function_call"
USUAL_ROLES = ("user", "assistant", "system", "tool")
# How messages begin when they are written as text, and the keys that they hold then, by JSON or Python.
OBJECT_BEGINS = re.compile(r"""\s*(\[\s*)?\{\s*["']""")
ROLE_KEY = re.compile(r"""["'](role|from)["']\s*:""")
CONTENT_KEY = re.compile(r"""["'](content|value|tool_calls)["']\s*:""")


def text_or_messages(value, name: str) -> str | list[dict]:
    """A field's value: text, not empty, or a message list. Raises InputError, with the field's name.

    Text is a message list if it is the JSON of one, or of one message. A list that has the keys of
    messages and is no JSON is error_for, since nobody means to train on it. Other text is text."""
    if isinstance(value, str) and OBJECT_BEGINS.match(value):
        value = messages_from_json(value, name)
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if isinstance(value, list):
        return message_list(value, name)
    if not isinstance(value, str):
        raise InputError(f"field {name!r} is {type(value).__name__}, not text")
    if not value:
        raise InputError(f"field {name!r} is empty")
    return value


def messages_from_json(text, name):
    """The JSON of messages -> the messages; any other text -> the text. Raises InputError."""
    if not ROLE_KEY.search(text) or not CONTENT_KEY.search(text):
        return text
    try:
        parsed = plain(json.loads(text))
    except (ValueError, RecursionError):  # an InputError is a ValueError
        if text.lstrip().startswith("{"):  # a broken object may well be a model's answer
            return text
        raise InputError(
            f"field {name!r} begins like a message list, but is not JSON (written by Python's str? "
            "write it with json.dumps, or the rows as JSONL)"
        ) from None
    messages = parsed if isinstance(parsed, list) else [parsed]
    for message in messages:
        if not isinstance(message, dict) or not ({"role", "from"} & message.keys()):
            return text
    return messages


def message_list(messages, name: str = "prompt") -> list[dict]:
    """A list of messages, checked, with the usual keys and roles. Raises InputError."""
    if not isinstance(messages, list) or not messages:
        raise InputError(f"field {name!r}: a message list must hold one or more messages")
    if all(isinstance(text, str) for text in messages):
        advice = "a row holds one of each, so write a row for each pair (RewardBench 2 has several a row)"
        raise InputError(f"field {name!r}: a list of texts, not of messages; {advice}")
    return [one_message(message, place, name) for place, message in enumerate(messages, 1)]


def one_message(message, place, name):
    """One message; place: its number in the field `name`, for errors."""

    def error_for(why):
        wanted = "a message list must hold objects with text in 'role' and 'content'"
        return InputError(f"field {name!r}: {wanted}; message {place} {why}")

    if not isinstance(message, dict):
        raise error_for(f"is {type(message).__name__}")
    message = present(message)
    for usual_key, sharegpt_key in (("role", "from"), ("content", "value")):
        if usual_key not in message and sharegpt_key in message:
            message[usual_key] = message.pop(sharegpt_key)

    if not isinstance(message.get("role"), str) or not message["role"]:
        raise error_for("has no 'role'")
    if message["role"] == CALLER:
        calls = list_of_objects(message.pop("content", None), CALLER)
        if not calls:
            raise error_for(f"has no call in {CALLER!r}")
        message["role"] = "assistant"
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    message["role"] = usual_role(message["role"])
    if "tool_calls" in message:
        message["tool_calls"] = list_of_objects(message["tool_calls"], "tool_calls")
        if not message["tool_calls"]:
            del message["tool_calls"]  # templates ask whether there are any by asking for the key
    content = message.get("content")
    if content is None and "tool_calls" in message:
        content = ""  # tool calls alone are an answer
    if isinstance(content, list):
        content = text_of_parts(content, error_for)
    if not isinstance(content, str):
        if content is None:
            raise error_for("has no 'content'")
        raise error_for(f"has {type(content).__name__} in 'content'")
    message["content"] = content
    return message


def usual_role(role):
    """The usual name of a role: "user" for "human". An unknown one stays, for the chat template to judge."""
    name = role.strip().lower()
    name = ROLES.get(name, name)
    return name if name in USUAL_ROLES else role


def text_of_parts(parts, error_for):
    """[{"type": "text", "text": ...}, ...] -> the texts, joined.

    error_for: why -> the error. Images and the like cannot be trained on."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise error_for(f"holds a part of type {kind!r} in 'content', and only text can be read")
        if not isinstance(part.get("text"), str):
            raise error_for("holds a text part without 'text'")
        texts.append(part["text"])
    return "".join(texts)


def list_of_objects(value, name):
    """`tools` or `tool_calls`: a list of objects, or one, or the JSON of either -> a list.

    A null in JSON text stays, as in TRL: somebody wrote it, it is no gap in a table. Raises InputError."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
            plain(value)  # refuses what is nested too deep
        except (ValueError, RecursionError):
            raise InputError(f"field {name!r} is text, but not the JSON of a list of objects") from None
    if isinstance(value, dict):
        value = [value]
    if value is None:
        value = []
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f"field {name!r} must hold a list of objects")
    return value
