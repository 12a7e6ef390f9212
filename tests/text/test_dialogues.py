"""Where the prompt ends, by comparing: the prompt stands once, whatever repeats it."""

import random

import pytest
from helpers.rows import BYE, HELLO, USER, chat_folder

from nanoroads.errors import InputError
from nanoroads.text import data, layouts
from nanoroads.text.data import Limits

SYSTEM = {"role": "system", "content": "Be brief."}
HMM = {"role": "assistant", "content": "hmm"}
MORE = {"role": "user", "content": "go on"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "sky"}}]}
RESULT = {"role": "tool", "content": "rain"}


def preferences(prompt, chosen, rejected):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return layouts.preference_texts({key: value for key, value in row.items() if value is not None})


@pytest.mark.parametrize(
    "prompt, beginning, expected",
    [
        (None, [USER], [USER]),
        (None, [SYSTEM, USER], [SYSTEM, USER]),
        ([USER], [], [USER]),
        ([USER], [USER], [USER]),
        ([USER | {"content": "hi \n"}], [USER], [USER]),  # one of them was stripped
        ([SYSTEM, USER], [SYSTEM, USER], [SYSTEM, USER]),
        ([SYSTEM, USER], [USER], [SYSTEM, USER]),  # the dialogues without the system message
        ([USER], [SYSTEM, USER], [SYSTEM, USER]),  # the prompt without it
        ([SYSTEM], [USER], [SYSTEM, USER]),
        ([USER], [HMM, MORE], [USER, HMM, MORE]),
        ([USER], [USER, HMM, MORE], [USER, HMM, MORE]),
        ([MORE], [USER, HMM, MORE], [USER, HMM, MORE]),  # the prompt is the last question
        ([USER, HMM, MORE], [MORE], [USER, HMM, MORE]),
        ([USER, BYE, MORE, HELLO], [], [USER, BYE, MORE, HELLO]),  # an answer repeats nothing
        (" \n", [USER], [USER]),
        ("hi", [], [USER]),
        ("hi", [USER], [USER]),
        (" hi\n", [USER], [USER]),
        ("hi", [SYSTEM, USER], [SYSTEM, USER]),
        ("hi", [SYSTEM], [SYSTEM, USER]),
        ("hi", [HMM, MORE], [USER, HMM, MORE]),
        ("hi", [USER, HMM, MORE], [USER, HMM, MORE]),
        ("go on", [USER, HMM, MORE], [USER, HMM, MORE]),
        ("Be brief.", [USER], [SYSTEM, USER]),
        ("Be brief.", [SYSTEM, USER], [SYSTEM, USER]),
        ("\n\nHuman: hi\n\nAssistant:", [USER], [USER]),
        ("\n\nHuman: hi\n\nAssistant:", [], [USER]),
        ("\n\nHuman: hi\n\nAssistant: hmm\n\nHuman: go on\n\nAssistant:", [MORE], [USER, HMM, MORE]),
    ],
)
def test_the_prompt_stands_once(prompt, beginning, expected):
    texts = preferences(prompt, [*beginning, HELLO], [*beginning, BYE])
    assert texts.prompt == expected and texts.answers == [[HELLO], [BYE]]
    if prompt is not None and HMM not in beginning:
        # SFT's rows are read by the same rule, and so is a pair of which one side repeats the prompt.
        texts = layouts.sft_texts({"prompt": prompt, "completion": [*beginning, HELLO]})
        assert texts.prompt == expected and texts.answers == [[HELLO]]
    if prompt in ("hi", [USER]) and expected == [USER]:
        texts = preferences(prompt, [*beginning, HELLO], [BYE])
        assert texts.prompt == expected and texts.answers == [[HELLO], [BYE]]


def test_what_is_no_part_of_a_turn_is_not_compared():
    """An id or a score may differ; nulls, ShareGPT's names and text parts are other ways to say it."""
    other = {"from": "human", "value": [{"type": "text", "text": "hi"}], "score": 3}
    texts = preferences(None, [USER | {"id": 1, "name": None}, HELLO], [other, BYE])
    assert texts.prompt == [USER | {"id": 1}] and texts.answers == [[HELLO], [BYE]]
    called = CALL | {"tool_calls": [{"function": {"name": "sea"}}]}
    assert preferences(None, [USER, CALL], [USER, called]).answers == [[CALL], [called]]


@pytest.mark.parametrize(
    "prompt, chosen, rejected, says",
    [
        (None, [USER, HELLO], [USER, HELLO, MORE, BYE], "'chosen' is the beginning of 'rejected'"),
        ("hi", [USER, HELLO, MORE, BYE], [USER, HELLO], "'rejected' is the beginning of 'chosen'"),
        ([USER], [HELLO], [HELLO, BYE], "'chosen' is the beginning of 'rejected'"),
        (None, [USER, HELLO, MORE, BYE], [USER, HMM, MORE, BYE], "the answer in 'chosen' has several turns"),
        (None, [USER, HELLO], [USER, HMM, MORE, BYE], "the answer in 'rejected' has several turns"),
        (
            [USER],
            [CALL, RESULT, HELLO],
            [BYE],
            r"in 'chosen' has several turns \(assistant, tool, assistant\)",
        ),
        ([USER], [BYE], [HELLO, HMM], r"in 'rejected' has several turns \(assistant, assistant\)"),
        (None, [USER, HELLO, MORE], [USER, BYE, MORE], "'chosen' must end in an assistant message"),
        (None, [USER, HELLO], [USER, BYE, MORE], "'rejected' must end in an assistant message"),
        (
            [USER],
            [CALL, RESULT],
            [BYE],
            "'chosen' must end in an assistant message, and ends in one of 'tool'",
        ),
        (None, [SYSTEM, USER, HELLO], [SYSTEM, MORE, BYE], "'chosen' must begin with an assistant message"),
        (None, [USER, HELLO], [MORE, BYE], "share no beginning before an answer"),
        ("odd", [SYSTEM, USER, HELLO], [SYSTEM, USER, BYE], "which turn it is cannot be told"),
    ],
)
def test_answers_that_are_not_the_assistants(prompt, chosen, rejected, says):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    row = {key: value for key, value in row.items() if value is not None}
    with pytest.raises(InputError, match=says):
        layouts.preference_texts(row)
    with pytest.raises(InputError, match=says):  # RL's prompts are found by the same rule
        layouts.prompt_texts(row)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"messages": [USER, HELLO, MORE]}, "'messages' must end in an assistant message"),
        ({"prompt": [USER], "completion": [HELLO, MORE]}, "'completion' must end in an assistant message"),
        (
            {"prompt": [USER], "completion": [HELLO, MORE, BYE]},
            "the answer in 'completion' has several turns",
        ),
        ({"prompt": [USER], "completion": [USER]}, "an answer is empty"),
    ],
)
def test_responses_that_are_not_the_assistants(row, says):
    with pytest.raises(InputError, match=says):
        layouts.sft_texts(row)


def test_calls_that_both_answers_begin_with_belong_to_the_prompt():
    texts = preferences([USER], [CALL, RESULT, HELLO], [CALL, RESULT, BYE])
    assert texts.prompt == [USER, CALL, RESULT] and texts.answers == [[HELLO], [BYE]]


# ---- dialogues as text


@pytest.mark.parametrize("gap", ["\n\n", "\n\n\n", "\n \n", "\n", "\r\n\r\n"])
def test_dialogues_as_text_stay_as_they_are_written(gap):
    beginning = f"{gap}Human:  hi{gap}Assistant: hm {gap}Human: go on{gap}Assistant:"
    texts = preferences(None, f"{beginning} a", f"{beginning}b\n\nc: d")
    assert texts.prompt == beginning and texts.answers == [" a", "b\n\nc: d"]
    texts = preferences(None, f"{beginning[len(gap) :]} a", f"{beginning[len(gap) :]} b")
    assert texts.prompt == beginning[len(gap) :] and texts.answers == [" a", " b"]
    for prompt in ("hi", beginning, beginning[:-11]):  # a part of both dialogues
        row = {"prompt": prompt, "chosen": f"{beginning} a", "rejected": f"{beginning} b"}
        assert layouts.preference_texts(row)[:2] == (beginning, [" a", " b"])
        assert layouts.prompt_texts(row).prompt == beginning
    system = f"{gap}System: s{beginning}"
    texts = preferences(None, f"{system} a", f"{system} b\n\nSystem: none")
    assert texts.prompt == system and texts.answers == [" a", " b\n\nSystem: none"]
    texts = preferences("You are a pirate.", f"{beginning} a", f"{beginning} b")
    assert texts.prompt == "You are a pirate." + beginning
    scripts = f"Human: x{gap}Assistant: y", f"Human: z{gap}Assistant: y"  # answers that are dialogues
    texts = preferences("Write.", *scripts)
    assert texts.prompt == "Write." and texts.answers == list(scripts)
    texts = preferences(beginning, " a", " b")  # as TRL has them
    assert texts.prompt == beginning and texts.answers == [" a", " b"]


@pytest.mark.parametrize(
    "chosen, rejected, says",
    [
        ("H: a A: b H: c A: d", "H: a A: b", "'rejected' is the beginning of 'chosen'"),
        ("H: a A: b H: thanks", "H: a A: no H: why", "'chosen' must end in an assistant message"),
        ("H: a A: b H: c A: d", "H: a A: x H: c A: d", "the answer in 'chosen' has several turns"),
        ("H: a A: b", "H: z A: c", "share no beginning"),
        ("H: a A:", "H: a A: c", "an answer is empty, in 'chosen'"),
    ],
)
def test_dialogues_as_text_are_checked_like_messages(chosen, rejected, says):
    written = []
    for short in (chosen, rejected):
        written.append(
            short.replace("H:", "\n\nHuman:").replace(" A:", "\n\nAssistant:").replace(" \n", "\n")
        )
    with pytest.raises(InputError, match=says):
        preferences(None, *written)


def test_answers_that_quote_the_prompt_keep_it(encoding, rows, capsys):
    """A prompt and two answers of text are what they say; that the prompt stands twice is said."""
    path = rows(
        {"prompt": "Once", "chosen": "Once upon", "rejected": "Once more"},
        {"prompt": "Once", "chosen": "Once upon", "rejected": "Twice"},
    )
    loaded = data.load(path, layouts.preference_texts, encoding, Limits(50))
    assert encoding.decode(loaded.responses[0][0][:-1]) == "Once upon"
    says = "answers begin with the whole prompt in 1 of 2 rows; it stands there twice"
    assert capsys.readouterr().out == f"{path}: {says}\n"


# ---- against TRL


def random_dialogue(generator, turns):
    roles = ["system"] if generator.random() < 0.3 else []
    roles += ["user", "assistant"] * turns
    return [{"role": role, "content": generator.choice(["a", "b", "c d"])} for role in roles[: 2 * turns - 1]]


def test_the_prompt_ends_where_it_ends_for_trl(tmp_path):
    """Where TRL compares too: dialogues with a shared beginning, or with a prompt beside the answers."""
    trl_data = pytest.importorskip("trl.data_utils")
    generator = random.Random(0)
    folder = chat_folder(tmp_path)
    for _ in range(300):
        beginning = random_dialogue(generator, generator.randint(1, 3))
        if beginning[-1]["role"] != "user":
            continue
        dialogues = {"chosen": [*beginning, HELLO], "rejected": [*beginning, BYE]}
        expected = trl_data.extract_prompt(dialogues)
        texts = layouts.preference_texts(dialogues)
        assert texts.prompt == expected["prompt"]
        assert texts.answers == [expected["chosen"], expected["rejected"]]
        assert layouts.preference_texts(expected)[:2] == texts[:2]  # explicit, as TRL writes it

        encoded = data.encode_row(folder, texts.prompt, texts.answers)
        rendered = "<s>" + "".join(f"{turn['role']}:{turn['content']}<e>" for turn in beginning)
        assert folder.decode(encoded.prompt) == rendered + "assistant:"
