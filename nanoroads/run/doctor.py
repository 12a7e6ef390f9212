"""What is wrong with a file of rows, counted over the whole of it; diagnosis.py says what to do about it.

Rows are read as for training, but none of them stops the count."""

import json
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field

from nanoroads.text.columns import Columns
from nanoroads.text.data import SAME_TOKENS
from nanoroads.text.layouts import SAME_ANSWERS
from nanoroads.text.split import prompt_keys
from nanoroads.text.tokenizer import special_id, special_pattern, special_texts, stop_ids

RESPONSE_NAMES = {0: [], 1: ["response"], 2: ["chosen", "rejected"]}  # by the number of responses in a row


@dataclass
class Findings:
    """Counts over the rows of one file."""

    rows: int = 0
    responses_per_row: int = 0  # 0, 1 or 2
    keys: list = field(default_factory=list)  # the prompt of each good row
    errors: Counter = field(default_factory=Counter)  # kind -> bad rows
    first_error: dict = field(default_factory=dict)  # kind -> (line, message)
    counts: Counter = field(default_factory=Counter)  # what `look` names -> rows or responses
    lengths: dict = field(default_factory=dict)  # prompt, chosen, ... -> array of tokens before cutting
    seen: dict = field(default_factory=dict)  # hash of a whole row -> its first line
    first_twice: tuple | None = None  # (line, line before that says the same)
    chosen: set = field(default_factory=set)  # hashes of a prompt and its chosen answer
    rejected: set = field(default_factory=set)
    columns: Columns = field(default_factory=Columns)
    left_out: str = ""  # what the template drops of the generation prompt, from the first such row


def examine(readings, encoding):
    """Data Readings of a file -> Findings. Of a row it keeps little more than the prompt, as tokens."""
    findings = Findings()
    special = special_pattern(encoding)
    stops = set(stop_ids(encoding))
    ends = [text for text in special_texts(encoding) if special_id(encoding, text) in stops]
    ends.sort(key=len, reverse=True)  # one may be the end of another
    for reading in readings:
        look(findings, reading, special, stops, ends)
    return findings


def look(findings, reading, special, stops, ends):
    """Count one row.

    special: a pattern or None. stops: the ids that end a response; ends: their texts."""
    findings.rows += 1
    if reading.error:
        note_error(findings, reading)
    if reading.texts:
        findings.responses_per_row = len(reading.texts.answers)
        findings.columns.add(reading.row, reading.texts)
        for answer in reading.texts.answers:
            findings.counts["read"] += 1
            if special and special.search(said(answer, ends)):
                findings.counts["special"] += 1
    if reading.whole:
        findings.left_out = findings.left_out or reading.whole.left_out
        note_lengths(findings.lengths, reading.whole)
    if reading.encoded:
        look_at_tokens(findings, reading, stops)


def note_lengths(lengths, whole):
    """Add the lengths of an EncodedRow that nothing has cut."""
    names = RESPONSE_NAMES[len(whole.responses)]
    sizes = {"prompt": len(whole.prompt)}
    for name, response in zip(names, whole.responses, strict=True):
        sizes[name] = len(response)
    if names:
        together = "prompt + longer response" if len(names) == 2 else "prompt + response"
        sizes[together] = sizes["prompt"] + max(map(len, whole.responses))
    for name, size in sizes.items():
        lengths.setdefault(name, array("i")).append(size)


def note_error(findings, reading):
    """Errors that differ in numbers only are of one kind."""
    message = str(reading.error)
    kind = re.sub(r"\d[\d,]*", "N", message)
    findings.errors[kind] += 1
    findings.first_error.setdefault(kind, (reading.number, message))
    if message == SAME_ANSWERS:
        findings.counts["identical"] += 1
    if message == SAME_TOKENS:
        if reading.whole.responses[0] == reading.whole.responses[1]:
            findings.counts["identical tokens"] += 1
        else:
            findings.counts["identical when cut"] += 1


def said(answer, ends):
    """All that an answer says: its text, or its messages with their tool calls and thoughts.

    Without one end token at the very end of a text: it is kept, once, as the end of the response."""
    if isinstance(answer, str):
        for end in ends:
            if answer.rstrip().endswith(end):
                return answer.rstrip().removesuffix(end)
        return answer
    return json.dumps(answer, ensure_ascii=False, default=str)


def look_at_tokens(findings, reading, stops):
    """What is trained of a good row."""
    counts = findings.counts
    encoded = reading.encoded
    if len(encoded.prompt) < len(reading.whole.prompt):
        counts["cut prompts"] += 1
    for response, whole_response in zip(encoded.responses, reading.whole.responses, strict=True):
        counts["responses"] += 1
        if len(response) < len(whole_response):
            counts["cut responses"] += 1
        if response[-1] not in stops:
            counts["without EOS"] += 1

    [key] = prompt_keys([array("i", encoded.prompt)])
    findings.keys.append(key)
    row_hash = hash((key, str(encoded.responses)))
    line_before = findings.seen.setdefault(row_hash, reading.number)
    if line_before != reading.number:
        counts["duplicates"] += 1
        findings.first_twice = findings.first_twice or (reading.number, line_before)
    if len(encoded.responses) == 2:
        chosen, rejected = encoded.responses
        findings.chosen.add(hash((key, str(chosen))))
        findings.rejected.add(hash((key, str(rejected))))
        if len(chosen) > len(rejected):
            counts["chosen longer"] += 1
        if len(chosen) < len(rejected):
            counts["rejected longer"] += 1
