"""The ways in which people write messages: ShareGPT's names, JSON text, parts, tool calls."""

import json

import pytest
from helpers.rows import BYE, HELLO, USER, chat_folder

from nanoroads.errors import InputError
from nanoroads.text import data, layouts
from nanoroads.text.data import Limits
from nanoroads.text.messages import list_of_objects, text_or_messages
from nanoroads.text.rows import write_rows


@pytest.mark.parametrize(
    "value",
    [
        [USER, HELLO],
        json.dumps([USER, HELLO]),
        json.dumps([USER, HELLO], indent=1),
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
        json.dumps([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]),
        [USER | {"role": "Human"}, HELLO | {"role": "model"}],
        [USER | {"role": "USER "}, HELLO | {"tool_calls": []}],
        [USER | {"content": [{"type": "text", "text": "h", "image": None}, {"text": "i"}]}, HELLO],
        [USER, HELLO | {"tool_calls": None, "name": float("nan")}],
    ],
)
def test_messages_in_other_words(value, tmp_path):
    path = tmp_path / "rows.jsonl"
    for row in ({"messages": value}, {"conversations": value}, {"prompt": [USER], "completion": value}):
        write_rows(path, [row])
        loaded = data.load(path, layouts.sft_texts, chat_folder(tmp_path), Limits(99))
        assert loaded.texts == ["<s>user:hi<e>assistant:"]
        assert chat_folder(tmp_path).decode(loaded.responses[0][0]) == "hello<e>"


def test_one_message_is_a_list_of_one():
    """As LLaMA-Factory writes pairs: the prompt in "conversations", each answer a message."""
    row = {"conversations": [{"from": "human", "value": "hi"}], "chosen": HELLO, "rejected": BYE}
    assert layouts.preference_texts(row)[:2] == ([USER], [[HELLO], [BYE]])


@pytest.mark.parametrize(
    "text",
    [
        "[hello]",
        "[{",
        '{"name": "sky", "arguments": {}}',
        '[{"name": "sky"}]',
        '{"role": "user", "content": ',  # a broken object may be a model's answer
        '[{"role": "user"}]',
        '[{"from": "Oslo", "to": "Rome"}]',
        'He said: [{"role": "user", "content": "x"}]',
    ],
)
def test_text_that_only_looks_like_messages_stays_text(text):
    assert text_or_messages(text, "chosen") == text


@pytest.mark.parametrize(
    "value, says",
    [
        ("[{'role': 'user', 'content': 'hi'}]", "begins like a message list, but is not JSON"),
        ('[{"role": "user", "content": "hi"}', "begins like a message list, but is not JSON"),
        ([USER | {"content": [{"type": "image", "url": "x"}]}], "message 1 holds a part of type 'image'"),
        ([USER, HELLO | {"content": [{"type": "text"}]}], "message 2 holds a text part without 'text'"),
        ([USER | {"content": 3}], "message 1 has int in 'content'"),
        ([USER | {"content": None}], "message 1 has no 'content'"),
        ([{"content": "hi"}], "message 1 has no 'role'"),
        ([USER, "hello"], "message 2 is str"),
        (["hello"], "a list of texts, not of messages; .* write a row for each pair"),
        (["hello", "there"], "a list of texts, not of messages"),
        ([HELLO | {"tool_calls": ["x"]}], "field 'tool_calls' must hold a list of objects"),
    ],
)
def test_messages_that_cannot_be_read_are_named(value, says):
    for name in ("prompt", "chosen"):
        with pytest.raises(InputError, match=says):
            text_or_messages(value, name)


def test_tool_calls_are_an_answer_and_tools_a_list():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "sky"}}]}
    for content in ({}, {"content": None}, {"content": ""}):
        texts = layouts.preference_texts({"prompt": [USER], "chosen": [call | content], "rejected": [BYE]})
        assert texts.answers == [[call | {"content": ""}], [BYE]]
        texts = layouts.sft_texts({"messages": [USER, call | content]})
        assert texts.answers == [[call | {"content": ""}]]
    tool = {"type": "function", "function": {"name": "sky"}}
    for tools in ([tool], json.dumps([tool]), tool, json.dumps(tool)):
        for row in ({"messages": [USER, HELLO]}, {"prompt": [USER], "completion": "hello"}):
            assert layouts.sft_texts(row | {"tools": tools}).tools == [tool]
        row = {"prompt": [USER], "chosen": [HELLO], "rejected": [BYE], "tools": tools}
        assert layouts.preference_texts(row).tools == layouts.prompt_texts(row).tools == [tool]
    for tools in ([], "[]", "", " ", None):
        assert list_of_objects(tools, "tools") == []
    for tools in ("sky", ["sky"], 3, '["sky"]', "[" * 9999):
        with pytest.raises(InputError, match="field 'tools'"):
            layouts.sft_texts({"messages": [USER, HELLO], "tools": tools})


def test_nulls_that_json_text_holds_are_meant():
    """As TRL reads a column of text; in a table's own columns they are gaps."""
    tool = {"type": "function", "function": {"name": "sky", "parameters": {"default": None}}}
    texts = layouts.sft_texts({"messages": [USER, HELLO], "tools": json.dumps([tool])})
    assert texts.tools == [tool]


def test_tool_calls_as_messages_of_their_own():
    """LLaMA-Factory's way to write them, also as the answer."""
    call = {"name": "sky", "arguments": {"city": "Oslo"}}
    usual = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    asked = {"from": "human", "value": "hi"}
    for value in (json.dumps(call), json.dumps([call])):
        called = {"from": "function_call", "value": value}
        turns = [asked, called, {"from": "observation", "value": "rain"}, {"from": "gpt", "value": "hello"}]
        texts = layouts.sft_texts({"conversations": turns})
        assert texts.prompt == [USER, usual, {"role": "tool", "content": "rain"}]
        assert layouts.sft_texts({"conversations": [asked, called]}).answers == [[usual]]
    for value in ("sky()", "[1]", "", None):
        with pytest.raises(InputError, match="field 'function_call'|has no call in 'function_call'"):
            layouts.sft_texts({"conversations": [asked, {"from": "function_call", "value": value}]})
