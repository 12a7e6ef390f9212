"""Documents with one-line summaries, and rewards of a summary that are known exactly.

Rewards of a summary y of the document x, for experiments/summarize.py:
    one-line    r(x, y) = 10 c min(1, m/n). c: the share of the document's K = 5 salient words that
                y names. n: the words of y. m: those of a median summary of all short documents.
                Salient are, of the document's words of four letters or more, the five of largest
                (count in x) log(documents / documents with the word). A count and two look-ups
                verify it; a summary has to find what the document is about, and say it in a line.
    two-word    the same with K = m = 2.
    hidden      r(x, y) = 10 ROUGE-L(y, the document's own summary). Neither x nor a reward model
                shows that summary, so verifying is no easier than writing.
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

SALIENT = {"one-line": 5, "two-word": 2}  # K, the number of salient words
SCALE = 10.0  # the largest reward, in nats of Bradley-Terry


class Documents(NamedTuple):
    """Lists of rows {"document", "summary"}."""

    sft: list
    pairs: list
    test: list
    all: list  # of which those three are parts


def read_documents(path, size, seed):
    """The rows of a file that are short enough and whose summary has two words at least, shuffled.

    Returns Documents. Raises InputError: a row without texts, too few short documents."""
    short = []
    for number, line in tracked(raw_rows(path), f"reading {path}", "row"):
        try:
            row = parse(line)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        if not isinstance(row.get("document"), str) or not isinstance(row.get("summary"), str):
            raise InputError(f"{path}:{number}: not a row with the texts document and summary")
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


def salient_words(document, frequency, n_documents, k):
    """The k words of largest (count here) log(documents / documents with the word), of those of
    four letters or more. frequency: {word: documents with it}. Ties go by the alphabet."""
    counts = Counter(word for word in words(document) if len(word) > 3)
    weight = {word: count * math.log(n_documents / frequency[word]) for word, count in counts.items()}
    return sorted(weight, key=lambda word: (-weight[word], word))[:k]


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
        salient = salient_words(row["document"], frequency, len(rows), SALIENT[setting])
        found = [word for word in salient if word in named]
        share = len(found) / max(1, len(salient))
        return SCALE * share * min(1.0, length / max(1, len(named)))

    return coverage
