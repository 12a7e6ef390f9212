"""One row -> tokens: tools, reasoning and BOS, as a chat template takes them."""

import pytest
from test_chat import BOT, CHATML, LLAMA3, MISTRAL, SYSTEM, USER
from test_encode import CALL, TOOL, TOOLS, as_trl, from_transformers, make

from nanoroads.errors import InputError
from nanoroads.text import tokenizer
from nanoroads.text.encode import cut_prompt, encode_row

# ---------------------------------------------------------------- tools


def test_tools_go_to_the_template(tmp_path):
    encoding = make(tmp_path, TOOLS)
    hf = from_transformers(tmp_path)
    row = encode_row(encoding, [USER], [[BOT]], tools=[TOOL])
    prompt, [whole] = as_trl(hf, [USER], [BOT], [TOOL])
    assert row.prompt == prompt and whole == row.responses[0] + tokenizer.encode(encoding, "\n")
    assert encode_row(encoding, [USER], tools=[TOOL]).prompt == prompt
    assert encode_row(encoding, [USER], tools=[]) == encode_row(encoding, [USER])

    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    encoding = make(tmp_path, several)
    assert encode_row(encoding, [USER], tools=[TOOL]).prompt == prompt
    assert encode_row(encoding, [USER]) == encode_row(make(tmp_path, CHATML), [USER])


def test_templates_by_name_lie_in_a_folder(tmp_path):
    """As transformers has written them since 4.51."""
    encoding = make(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text(TOOLS)
    hf = from_transformers(tmp_path)
    for tools in (None, [TOOL]):
        assert encode_row(encoding, [USER], tools=tools).prompt == as_trl(hf, [USER], [BOT], tools)[0]


def test_tool_calls_are_an_answer(tmp_path):
    encoding = make(tmp_path, TOOLS)
    hf = from_transformers(tmp_path)
    for content in ({}, {"content": ""}, {"content": "Let me look."}):
        call = {"role": "assistant", "tool_calls": [CALL], **content}
        row = encode_row(encoding, [USER], [[call], [BOT]])
        prompt, wholes = as_trl(hf, [USER], [call, BOT])
        newline = tokenizer.encode(encoding, "\n")
        assert row.prompt == prompt and [response + newline for response in row.responses] == wholes
        later = [USER, call, {"role": "tool", "content": "rain"}]
        assert encode_row(encoding, later).prompt == as_trl(hf, later, [BOT])[0]


@pytest.mark.parametrize("template", [None, CHATML])
def test_tools_that_nobody_reads_are_refused(tmp_path, template):
    encoding = make(tmp_path, template)
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    for prompt, answers, tools, says in (
        ([USER], [[BOT]], [TOOL], "tools"),
        ([USER], [[call]], None, "tool_?.?calls"),
        ([USER, call, USER], [[BOT]], None, "tool_?.?calls"),
        ([USER, call, USER], [], None, "tool_?.?calls"),
        ("Hi", ["Hello"], [TOOL], "'tools' goes with messages only"),
    ):
        with pytest.raises(InputError, match=says):
            encode_row(encoding, prompt, answers, tools)


def test_reasoning_under_any_of_its_names(tmp_path):
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.content }}{% endfor %}"
    encoding = make(tmp_path, template)
    hf = from_transformers(tmp_path)
    for name in ("reasoning_content", "thinking", "reasoning"):
        messages = [BOT | {name: "hm"}]
        assert encode_row(encoding, messages).prompt == hf.apply_chat_template(messages, return_dict=False)


# ---------------------------------------------------------------- BOS


@pytest.mark.parametrize("template", [LLAMA3, MISTRAL, "<s>" + CHATML])
def test_a_prompt_that_is_cut_keeps_the_bos_of_its_template(tmp_path, template):
    encoding = make(tmp_path, template)
    prompt = encode_row(encoding, [USER]).prompt
    bos = encoding.ids["<s>"]
    assert encoding.bos == [] and prompt.count(bos) == 1
    assert cut_prompt(encoding, prompt, 6) == [bos, *prompt[-5:]]
    assert cut_prompt(encoding, prompt, len(prompt)) == prompt
    assert cut_prompt(encoding, prompt[1:], 6) == prompt[-6:]


def test_what_opens_every_turn_is_no_bos(tmp_path):
    """SmolLM2's files call <|im_start|> their bos_token."""
    encoding = make(tmp_path, CHATML, bos_token="<|im_start|>")
    prompt = encode_row(encoding, [SYSTEM, USER]).prompt
    assert prompt[0] == encoding.ids["<|im_start|>"] and cut_prompt(encoding, prompt, 6) == prompt[-6:]


def test_bos_of_template_and_tokenizer_stands_once(tmp_path):
    encoding = make(tmp_path, LLAMA3)
    encoding.bos = [encoding.ids["<s>"]]
    for prompt in ([USER], "Hi", "<s>Hi"):
        assert encode_row(encoding, prompt, typed=prompt == "Hi").prompt.count(encoding.bos[0]) == 1
