"""What a file holds beside what is read is said, once for each file."""

import json

import pytest
from helpers.rows import HELLO, USER

from nanoroads.errors import InputError
from nanoroads.text import data, layouts
from nanoroads.text.data import Limits

PAIR = {"prompt": "Q", "chosen": "a", "rejected": "b"}
SUMMARIES = {"info": {"post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}


def said(path, layout, encoding, capsys):
    """The lines that loading a file prints, without the file's name."""
    capsys.readouterr()
    data.load(path, layout, encoding, Limits(999))
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


def test_columns_that_nobody_reads_are_named(encoding, rows, capsys):
    path = rows(PAIR | {"system": "Be brief.", "margin": None}, PAIR | {"margin": 3, "id": ""}, PAIR)
    assert said(path, layouts.preference_texts, encoding, capsys) == ["columns not read: system, margin, id"]
    assert said(path, layouts.prompt_texts, encoding, capsys) == ["columns not read: system, margin, id"]
    assert said(rows(PAIR, PAIR), layouts.preference_texts, encoding, capsys) == []
    both = PAIR | {"response": "A"}
    assert said(rows(both), layouts.sft_texts, encoding, capsys) == ["columns not read: chosen, rejected"]
    many = PAIR | {f"x{i}": i for i in range(30)}
    names = ", ".join(f"x{i}" for i in range(12))
    says = [f"columns not read: {names}, and 18 more"]
    assert said(rows(many), layouts.preference_texts, encoding, capsys) == says


@pytest.mark.parametrize(
    "row, layout, unread",
    [
        ({"messages": [USER, HELLO], "prompt": "hi"}, layouts.sft_texts, "prompt"),  # UltraChat
        ({"prompt": [USER], "completion": [HELLO], "tools": [{"name": "x"}]}, layouts.sft_texts, ""),
        ({"prompt": "Q", "completion": "A", "tools": [{"name": "x"}]}, layouts.sft_texts, "tools"),
        ({"prompt": "Q", "response": "A", "completion": "B"}, layouts.sft_texts, "completion"),
        ({"document": "d", "id": 3, "summary": "s", "prompt": "p"}, "{document} {id}", "prompt"),
        ({"prompt": "Q", "messages": [USER]}, layouts.prompt_texts, ""),
        (SUMMARIES | {"worker": 7}, layouts.preference_texts, "worker"),
    ],
)
def test_what_counts_as_read(row, layout, unread):
    texts = layouts.sft_texts(row, layout) if isinstance(layout, str) else layout(row)
    assert ", ".join(name for name in row if name not in texts.fields) == unread


def test_names_cannot_write_to_the_terminal(encoding, rows, capsys):
    [line] = said(rows(PAIR | {"\x1b[31mred": 1}), layouts.preference_texts, encoding, capsys)
    assert line == r"columns not read: \x1b[31mred"


@pytest.mark.parametrize("chosen", ["score_chosen", "chosen_score", "chosen-rating", "reward_chosen"])
def test_scores_that_do_not_agree_with_the_pair_are_counted(chosen, encoding, rows, capsys):
    rejected = chosen.replace("chosen", "rejected")
    path = rows(*(PAIR | {chosen: a, rejected: b} for a, b in ((7, 7.0), (3, 8), (9, 1), (2, 5), (None, 5))))
    assert said(path, layouts.preference_texts, encoding, capsys) == [
        f"columns not read: {chosen}, {rejected}",
        f"{chosen} and {rejected}: equal in 1, inverted in 2 of 5 rows",
    ]
    path = rows(PAIR | {chosen: 1, rejected: True}, PAIR | {chosen: "7", rejected: "7"}, PAIR | {chosen: 1})
    assert len(said(path, layouts.preference_texts, encoding, capsys)) == 1  # nothing to compare


def test_margins_of_nothing_are_counted(encoding, rows, capsys):
    for name in ("margin", "reward_margin"):
        path = rows(*(PAIR | {name: margin} for margin in (5.0, 0.0, -1, 0)))
        says = [f"columns not read: {name}", f"{name}: 0 or less in 3 of 4 rows"]
        assert said(path, layouts.preference_texts, encoding, capsys) == says


@pytest.mark.parametrize("good, bad", [(True, False), (1, 0), (1.0, 0.0), ("True", "False"), ("1", "0")])
def test_single_answers_with_a_label_are_named(good, bad, encoding, rows, capsys):
    """KTO's rows: SFT imitates good and bad alike, and says so; they are no pairs."""
    path = rows(*({"prompt": "Q", "completion": "A", "label": label} for label in (good, bad, bad)))
    assert said(path, layouts.sft_texts, encoding, capsys) == [
        "columns not read: label",
        "label: answers marked as bad (false) in 2 of 3 rows; such rows (KTO) are trained as good answers",
    ]
    with pytest.raises(InputError, match="has no field 'chosen'.*'label' marks a single answer"):
        data.load(path, layouts.preference_texts, encoding, Limits(99))
    path = rows(*({"prompt": "Q", "completion": "A", "label": label} for label in (good, bad, 2)))
    assert said(path, layouts.sft_texts, encoding, capsys) == ["columns not read: label"]  # classes


@pytest.mark.parametrize(
    "row, says",
    [
        ({"question": "Q", "chosen": "a", "rejected": "b"}, "if 'question' is the prompt, rename it"),
        ({"instruction": "Q", "chosen": [HELLO], "rejected": "b"}, "one is text, the other a message list"),
        ({"prompt": "Q", "chosen": "a", "non_preferred_output": "b"}, "'non_preferred_output' is the rej"),
    ],
)
def test_other_names_are_hinted_at(row, says):
    with pytest.raises(InputError, match=says):
        layouts.preference_texts(row)
    with pytest.raises(InputError, match="if 'instruction' is the prompt, rename it"):
        layouts.sft_texts(json.loads('{"instruction": "Q", "input": "", "output": "A"}'))
