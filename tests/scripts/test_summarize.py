"""The summaries' rewards by hand, and what their file must hold. The run itself is experiments/summarize/log.txt."""

import collections
import json
from argparse import Namespace

import pytest

from experiments import summarize
from nanoroads.errors import InputError

ROWS = [
    {"document": "Pango lays out text; pango draws text on Cairo.", "summary": "text layout with Pango"},
    {"document": "Cairo draws vector graphics on many surfaces.", "summary": "vector graphics"},
    {"document": "A library which draws text quickly.", "summary": "quick text"},
]


def test_salient_words_are_frequent_here_and_rare_elsewhere():
    frequency = collections.Counter(w for row in ROWS for w in set(summarize.words(row["document"])))
    # pango: 2 ln 3; lays: ln 3 (text: 2 ln 1.5 = .81); cairo: ln 1.5; draws: 0; "out" and "on" are short
    assert summarize.salient_words(ROWS[0]["document"], frequency, 3, 3) == ["pango", "lays", "text"]


def test_one_line_counts_salient_words_and_charges_for_length():
    reward = summarize.rewards(
        "one-line", ROWS
    )  # median length 2; five words: pango, lays, text, cairo, draws
    assert reward(ROWS[0], "Pango text") == pytest.approx(10 * 2 / 5)
    assert reward(ROWS[0], "pango text on a screen") == pytest.approx(10 * 2 / 5 * 2 / 5)
    assert reward(ROWS[0], "nothing") == reward(ROWS[0], "") == 0


def test_two_words_and_the_hidden_summary():
    reward = summarize.rewards("two-word", ROWS)  # pango, lays
    assert (
        reward(ROWS[0], "pango lays"),
        reward(ROWS[0], "pango"),
        reward(ROWS[0], "pango lays out text"),
    ) == (10, 5, 5)
    hidden = summarize.rewards("hidden", ROWS)
    assert hidden(ROWS[1], "vector graphics") == 10 and hidden(ROWS[1], "vector") == pytest.approx(10 * 2 / 3)


def read(path, **size):
    sizes = {"words": 99, "sft": 1, "pairs": 1, "test": 1} | size
    return summarize.read_documents(Namespace(data=path, size=Namespace(**sizes), seed=0))


def test_documents(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    parts, short = read(path)
    assert sorted(parts[n][0]["summary"] for n in ("sft", "pairs", "test")) == sorted(
        row["summary"] for row in ROWS
    )
    assert len(read(path, words=7, sft=0)[1]) == 2  # the first document has nine words
    with pytest.raises(InputError, match="3 short documents, 9 are needed"):
        read(path, sft=7)
    path.write_text('{"document": "a b"}\n')
    with pytest.raises(InputError, match="document and summary"):
        read(path)
