"""Documents with one-line summaries, and rewards of a summary that are known exactly.

Rewards of a summary y of the document x, for experiments/summarize.py:
    one-line    A word w of x of four letters or more weighs its tf-idf,
                    weight(w) = (count of w in x) log(documents / documents with w).
                y is worth the share of weight that it names, less what is too long:
                    c = min(1, sum of weight(w) over the words of y / sum of the K = 5 largest weights)
                    r(x, y) = 10 c min(1, m / words of y), m the median length of all summaries.
                Counts and look-ups verify it; a summary has to find what the document is about.
    two-word    the same with K = m = 2.
    hidden      r(x, y) = 10 ROUGE-L(y, the document's own summary). The reward model is never shown
                that summary, so verifying is no easier than writing.
r is in nats of Bradley-Terry: P(a beats b) = sigmoid(r(a) - r(b)).
"""

import math
import statistics
from collections import Counter
from typing import NamedTuple

from nanoroads import randomness
from nanoroads.errors import InputError
from nanoroads.progress import tracked
from nanoroads.text.rouge import rouge_l, words
from nanoroads.text.rows import parse, raw_rows

SALIENT = {"one-line": 5, "two-word": 2}  # K, the number of words that a perfect summary names
SCALE = 10.0  # the largest reward, in nats of Bradley-Terry


class Documents(NamedTuple):
    """Lists of rows {"document", "summary"}."""

    sft: list
    pairs: list
    test: list
    all: list  # of which those three are parts


def read_documents(path, size, seed):
    """The rows of a file that are short enough and whose summary has two words at least, shuffled.

    Of several rows with the same document the first one counts. Returns Documents. Raises InputError:
    a row without texts, too few short documents."""
    short = []
    seen = set()  # documents
    for number, line in tracked(raw_rows(path), f"reading {path}", "row"):
        try:
            row = parse(line)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if not isinstance(row.get("document"), str) or not isinstance(row.get("summary"), str):
            raise InputError(f"{path}:{number}: not a row with the texts document and summary")
        if row["document"] in seen:
            continue
        seen.add(row["document"])
        if len(words(row["document"])) <= size.words and len(words(row["summary"])) >= 2:
            short.append({"document": row["document"], "summary": row["summary"]})
    needed = size.sft + size.pairs + size.test
    if len(short) < needed:
        raise InputError(f"{path}: {len(short)} short documents, {needed} are needed")

    order = randomness.generator("documents", seed).permutation(len(short))
    shuffled = [short[i] for i in order]
    return Documents(
        sft=shuffled[: size.sft],
        pairs=shuffled[size.sft : size.sft + size.pairs],
        test=shuffled[size.sft + size.pairs : needed],
        all=short,
    )


# ---------------------------------------------------------------- rewards


def word_weights(document, frequency, n_documents):
    """{word of four letters or more: its tf-idf, (count here) log(documents / documents with the word)}.

    frequency: {word: documents with it}."""
    counts = Counter(word for word in words(document) if len(word) > 3)
    return {word: count * math.log(n_documents / frequency[word]) for word, count in counts.items()}


def reward_function(setting, rows):
    """The reward of a setting, a function r(row, summary) -> float. rows: all short documents."""
    if setting == "hidden":

        def agreement(row, summary):
            return SCALE * rouge_l(row["summary"], summary)

        return agreement

    length = 2  # m, the words that a summary may have at no cost
    if setting == "one-line":
        length = statistics.median(len(words(row["summary"])) for row in rows)
    frequency = Counter()  # in how many documents a word is
    for row in rows:
        frequency.update(set(words(row["document"])))

    def coverage(row, summary):
        named = words(summary)
        weights = word_weights(row["document"], frequency, len(rows))
        perfect = sum(sorted(weights.values(), reverse=True)[: SALIENT[setting]])
        found = sum(weights.get(word, 0.0) for word in dict.fromkeys(named))
        share = min(1.0, found / perfect) if perfect else 0.0
        return SCALE * share * min(1.0, length / max(1, len(named)))

    return coverage
