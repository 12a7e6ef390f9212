"""ROUGE-L: fixed numbers, and Google's rouge-score on real texts."""

import gzip
import itertools
import json
import os
import random
from pathlib import Path

import pytest

from nanoroads.text.rouge import lcs, rouge_l, words

FOX = "the quick brown fox jumps over the lazy dog", "the brown fox jumped over a lazy dog"


def test_fixed_numbers():
    assert rouge_l(*FOX) == pytest.approx(0.705882, abs=5e-7)  # 6 of 9 and 8 words
    assert rouge_l(*reversed(FOX)) == rouge_l(*FOX)
    assert rouge_l(FOX[0], FOX[0]) == 1.0
    assert rouge_l("a b c d", "d c b a") == pytest.approx(0.25)
    assert rouge_l("a", "b") == rouge_l("", "a") == rouge_l("a", "!?") == rouge_l("", "") == 0.0


def test_words_are_lower_case_letters_and_digits():
    assert words("It's C++11, naïve_MIX: 3.5!") == ["it", "s", "c", "11", "na", "ve", "mix", "3", "5"]
    assert rouge_l("An X-Ray", "an x ray!") == 1.0


def test_lcs_by_brute_force():
    generator = random.Random(0)
    for _ in range(200):
        a, b = ([generator.choice("abc") for _ in range(generator.randrange(7))] for _ in range(2))
        subsequences = [{c for n in range(len(x) + 1) for c in itertools.combinations(x, n)} for x in (a, b)]
        assert lcs(a, b) == max(map(len, subsequences[0] & subsequences[1]))


def summaries():
    shared = os.environ.get("NANOROADS_SHARED")
    path = Path(shared or ".") / "data" / "debian_summaries.jsonl.gz"
    if shared and path.exists():
        with gzip.open(path, "rt") as f:
            return [(row["summary"], row["document"]) for row in map(json.loads, itertools.islice(f, 4000))]
    # The project's own docstrings and comments are real texts too.
    root = Path(__file__).resolve().parents[2]
    lines = []
    for folder in ("experiments", "kernels", "nanoroads", "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            lines += [line.strip() for line in path.read_text().splitlines() if len(line) > 60]
    return list(itertools.pairwise(lines))[:4000]


def test_equals_rouge_score_on_a_thousand_pairs():
    reason = "rouge-score is missing: pip install -e '.[parity]'"
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason=reason).RougeScorer(["rougeL"])
    texts = summaries()
    pairs = texts[::4][:500]  # a summary and its document, and two summaries side by side
    pairs += [(a[0], b[0]) for a, b in itertools.pairwise(texts[1::4][:501])]
    assert len(pairs) == 1000
    found = [rouge_l(a, b) for a, b in pairs]
    wanted = [scorer.score(a, b)["rougeL"].fmeasure for a, b in pairs]
    assert found == pytest.approx(wanted, abs=1e-12)
    assert len(set(found)) > 100
