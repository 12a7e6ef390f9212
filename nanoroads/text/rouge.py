"""ROUGE-L as Google's rouge-score computes it.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
"""

import re

WORD = re.compile(r"[a-z0-9]+")  # of a text in lower case


def words(text: str) -> list[str]:
    """Lower-case runs of a-z and 0-9, no stemming; every other character separates."""
    return WORD.findall(text.lower())


def lcs(a: list, b: list) -> int:
    """Length of the longest common subsequence of two lists, in O(len(a) len(b))."""
    # row[j]: the length for b[:j] and the words of a so far.
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0  # row[j - 1] before this word of a
        for j, word_of_b in enumerate(b, 1):
            above = row[j]
            if word == word_of_b:
                row[j] = diagonal + 1
            else:
                row[j] = max(above, row[j - 1])
            diagonal = above
    return row[-1]


def rouge_l(reference: str, text: str) -> float:
    """F-measure in [0, 1] of the longest common subsequence of words; 0 where either has no words.

    2 PR / (P + R), where precision P = lcs / |text| and recall R = lcs / |reference|."""
    reference_words = words(reference)
    text_words = words(text)
    common = lcs(reference_words, text_words)
    if common == 0:
        return 0.0
    return 2 * common / (len(reference_words) + len(text_words))
