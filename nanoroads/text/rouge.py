"""ROUGE-L (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004), as Google's rouge-score computes it."""

import re


def words(text):
    """Lower-case runs of a-z and 0-9, no stemming; every other character separates."""
    return re.findall(r"[a-z0-9]+", text.lower())


def lcs(a, b):
    """Length of the longest common subsequence of two lists."""
    row = [0] * (len(b) + 1)  # row[j]: of the a seen so far and b[:j]
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(reference, text):
    """F-measure in [0, 1] of the longest common subsequence of words: 2 PR / (P + R), P = lcs/|text|, R = lcs/|reference|.

    0 where either has no words."""
    reference, text = words(reference), words(text)
    common = lcs(reference, text)
    return 2 * common / (len(reference) + len(text)) if common else 0.0  # the same as 2 PR / (P + R)
