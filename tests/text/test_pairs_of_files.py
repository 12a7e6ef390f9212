"""A file of pairs for several models: layouts, RewardBench's among them, and rows that one cannot read."""

import json

import pytest

from nanoroads.errors import InputError
from nanoroads.text import data, tokenizer
from nanoroads.text.layouts import chat_texts, preference_texts
from nanoroads.text.pairs import encode_pairs, read_pairs, rows_of, subsets_of, without_errors

# As allenai/reward-bench has them.
REWARDBENCH = {
    "prompt": "What is 2 + 2?",
    "chosen": "4",
    "chosen_model": "a",
    "rejected": "5",
    "rejected_model": "b",
    "subset": "math-prm",
    "id": 7,
}
# As allenai/preference-test-sets has them: the prompt as messages, or within both dialogues.
USER = {"role": "user", "content": "What is 2 + 2?"}
AS_MESSAGES = {"prompt": [USER], "chosen": "4", "rejected": "5", "subset": "shp"}
AS_DIALOGUES = {
    "chosen": [USER, {"role": "assistant", "content": "4"}],
    "rejected": [USER, {"role": "assistant", "content": "5"}],
}


@pytest.fixture
def file_of(tmp_path):
    def write(*rows):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return write


def test_layouts(file_of):
    path = file_of(REWARDBENCH, AS_MESSAGES, AS_DIALOGUES)
    pairs, errors = read_pairs(path, preference_texts)
    assert not errors and [pair.number for pair in pairs] == [1, 2, 3]
    assert [pair.answers for pair in pairs] == [["4", "5"]] * 3
    prompts = [pair.prompt for pair in pairs]
    assert prompts == ["What is 2 + 2?"] + ["\n\nHuman: What is 2 + 2?\n\nAssistant:"] * 2
    assert pairs[0].texts.prompt == "What is 2 + 2?"
    # With --chat all three are the same messages.
    pairs, errors = read_pairs(path, chat_texts)
    assert not errors
    for pair in pairs:
        assert pair.texts.prompt == [USER]
        assert pair.texts.answers[1] == [{"role": "assistant", "content": "5"}]


def test_a_dialogue_as_text_is_no_prompt_for_a_chat(file_of):
    dialogue = "\n\nHuman: 2 + 2?\n\nAssistant: "
    path = file_of({"chosen": f"{dialogue}4", "rejected": f"{dialogue}5"})
    _, errors = read_pairs(path, chat_texts)
    assert "dialogue" in errors[1]
    assert not read_pairs(path, preference_texts)[1]


def test_bad_rows_are_refused_or_left_out(file_of, capsys):
    path = file_of(REWARDBENCH, "", {"prompt": "x", "chosen": "y"}, "not JSON", AS_MESSAGES)
    pairs, errors = read_pairs(path, preference_texts)
    assert errors.keys() == {3, 4} and [pair.number for pair in pairs] == [1, 5]
    with pytest.raises(InputError, match=r"pairs.jsonl:3: .*rejected.*--skip-bad-rows"):
        without_errors(path, pairs, errors, skip_bad_rows=False)
    assert without_errors(path, pairs, errors, skip_bad_rows=True) == pairs
    assert "skipped 2 bad rows of 4" in capsys.readouterr().out
    errors[1] = "too long for one of the models"
    assert without_errors(path, pairs, errors, skip_bad_rows=True) == pairs[1:]
    errors[5] = "too"
    with pytest.raises(InputError, match="no usable row"):
        without_errors(path, pairs, errors, skip_bad_rows=True)


def test_tokens_are_those_of_training(file_of):
    """Rows that do not fit are errors; the others are what data.load makes of them."""
    encoding = tokenizer.get("roadmap")
    row = {"prompt": "WA>FL:", "chosen": ">OR>CA", "rejected": ">ID"}
    path = file_of(row, {**row, "prompt": "WA>" * 20 + "FL:"}, {**row, "rejected": ">OR>CA>NV"})
    limits = data.Limits(context=16, max_response=2)
    pairs, _ = read_pairs(path, preference_texts)
    encoded, errors = encode_pairs(pairs, encoding, limits)
    assert "context is 16" in errors[2] and "the same once encoded and cut" in errors[3]
    kept = without_errors(path, pairs, errors, skip_bad_rows=True)
    wanted = data.load(path, preference_texts, encoding, limits._replace(skip_bad_rows=True))
    assert rows_of(kept, encoded) == wanted and len(wanted) == 1


def test_subsets(file_of):
    pairs, _ = read_pairs(file_of(REWARDBENCH, {**AS_DIALOGUES, "level": 3}), preference_texts)
    assert subsets_of(pairs, None) == ["math-prm", "(none)"]
    assert subsets_of(pairs, "level") == ["(none)", "3"]
    assert subsets_of(pairs[1:], None) is None
    with pytest.raises(InputError, match="--by kind: no row has this column"):
        subsets_of(pairs, "kind")
