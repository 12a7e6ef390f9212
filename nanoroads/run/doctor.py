"""What is wrong with a file of rows, counted over the whole of it, and what to do about it.

Rows are read as for training, but none of them stops the count."""

import json
import math
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field

from nanoroads.text.columns import Columns
from nanoroads.text.data import SAME_TOKENS
from nanoroads.text.encode import left_out_line
from nanoroads.text.layouts import SAME_ANSWERS
from nanoroads.text.split import held_out_rows, prompt_keys
from nanoroads.text.tokenizer import special_pattern, stop_ids

MOST_KINDS = 6  # of errors that are shown
RESPONSE_NAMES = {0: [], 1: ["response"], 2: ["chosen", "rejected"]}  # by the number of responses in a row


@dataclass
class Findings:
    """Counts over the rows of one file."""

    rows: int = 0
    responses: int = 0  # in each row: 0, 1 or 2
    keys: list = field(default_factory=list)  # the prompt of each good row
    errors: Counter = field(default_factory=Counter)  # kind -> bad rows
    first_error: dict = field(default_factory=dict)  # kind -> (line, message)
    counts: Counter = field(default_factory=Counter)  # what `look` names -> rows or responses
    lengths: dict = field(default_factory=dict)  # prompt, chosen, ... -> array of tokens before cutting
    seen: set = field(default_factory=set)  # hashes of whole rows
    chosen: set = field(default_factory=set)  # hashes of a prompt and its chosen answer
    rejected: set = field(default_factory=set)
    columns: Columns = field(default_factory=Columns)
    left_out: str = ""  # of the generation prompt, in the first row where the template drops some of it


def examine(readings, encoding):
    """Data Readings of a file -> Findings. Of a row it keeps little more than the prompt, as tokens."""
    findings = Findings()
    special = special_pattern(encoding)
    stops = set(stop_ids(encoding))
    for reading in readings:
        look(findings, reading, special, stops)
    return findings


def look(findings, reading, special, stops):
    """Count one row. special: a pattern or None. stops: the ids that end a response."""
    findings.rows += 1
    if reading.error:
        note_error(findings, reading)
    if reading.texts:
        findings.responses = len(reading.texts.answers)
        findings.columns.add(reading.row, reading.texts)
        for answer in reading.texts.answers:
            if special and special.search(said(answer)):
                findings.counts["special"] += 1
    if reading.whole:
        findings.left_out = findings.left_out or reading.whole.left_out
        names = ["prompt", *RESPONSE_NAMES[findings.responses]]
        for name, tokens in zip(names, [reading.whole.prompt, *reading.whole.responses], strict=True):
            findings.lengths.setdefault(name, array("i")).append(len(tokens))
    if reading.encoded:
        look_at_tokens(findings, reading, stops)


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


def said(answer):
    """All that an answer says: its text, or its messages with their tool calls and thoughts."""
    if isinstance(answer, str):
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
    row = hash((key, str(encoded.responses)))
    if row in findings.seen:
        counts["duplicates"] += 1
    findings.seen.add(row)
    if len(encoded.responses) == 2:
        chosen, rejected = encoded.responses
        findings.chosen.add(hash((key, str(chosen))))
        findings.rejected.add(hash((key, str(rejected))))
        if len(chosen) > len(rejected):
            counts["chosen longer"] += 1
        if len(chosen) < len(rejected):
            counts["rejected longer"] += 1


# ---------------------------------------------------------------- what to say


def report(findings, path, limits, held_out=None, held_out_path=None):
    """Findings -> lines. limits: data Limits. held_out: Findings of --eval-data, if there is one."""
    lines = [f"whole file: {path}"]
    lines += count_lines(findings)
    lines += split_lines(findings, held_out, held_out_path)
    lines += length_lines(findings)
    lines += [f"  {line}" for line in findings.columns.lines()]
    if findings.left_out:
        lines.append(f"  {left_out_line(findings.left_out)}")
    lines += error_lines(findings)
    if held_out and held_out.errors:
        lines += [f"held-out file: {held_out_path}", *error_lines(held_out)]
    todo = error_advice(findings, "", limits.skip_bad_rows)
    if held_out:
        todo += error_advice(held_out, f" of {held_out_path}", limits.skip_bad_rows)
    todo += [*cut_advice(findings, limits.context), *advice(findings), *split_advice(findings, held_out)]
    return [*lines, "what to do", *(f"  {line}" for line in todo or ["nothing: every row can be trained"])]


def count_lines(findings):
    """A line for each count that suits the kind of rows."""
    counts = findings.counts
    good = len(findings.keys)
    prompts = len(set(findings.keys))
    lines = [count_line("rows", findings.rows), count_line("that can be used", good)]
    lines.append(count_line("different prompts", prompts))
    if findings.responses == 2:
        lines.append(count_line("identical pairs", counts["identical"] + counts["identical tokens"]))
        lines.append(count_line("identical once cut", counts["identical when cut"]))
    lines.append(count_line("prompts that are cut", counts["cut prompts"]))
    if findings.responses:
        of_responses = f"of {counts['responses']:,}"
        lines.append(count_line("responses that are cut", counts["cut responses"], of_responses))
        lines.append(count_line("responses without EOS", counts["without EOS"], of_responses))
        lines.append(count_line("that spell a special token", counts["special"]))
    lines.append(count_line("duplicates of other rows", counts["duplicates"]))
    if findings.responses == 2:
        both = len(findings.chosen & findings.rejected)
        lines.append(count_line("chosen here, rejected there", both, "answers to the same prompt"))
        for name in ("chosen longer", "rejected longer"):
            share = 100 * counts[name] / max(1, good)
            lines.append(count_line(name, counts[name], f"{share:.0f} % of pairs"))
    return lines


def count_line(name, count, note=""):
    """Aligned: the name, the number, and what it is a part of."""
    return f"  {name:<28} {count:>9,}  {note}".rstrip()


def split_lines(findings, held_out, held_out_path):
    """How many rows are held out, and how many of their prompts are trained as well."""
    if not findings.responses or len(findings.keys) < 2:
        return []
    if held_out is None:
        rows = held_out_rows(findings.keys)
        note = f"different prompts: {len({findings.keys[i] for i in rows}):,}"
    else:
        rows = held_out.keys
        note = f"of {held_out_path}"
    both = count_line("prompts on both sides", in_both(findings, held_out))
    return [count_line("rows that are held out", len(rows), note), both]


def in_both(findings, held_out):
    """How many prompts are on both sides."""
    if held_out is None:
        return int(len(set(findings.keys)) == 1 and len(findings.keys) > 1)  # see split.held_out_rows
    return len(set(findings.keys) & set(held_out.keys))


def length_lines(findings):
    """Tokens before anything is cut: median, 95 %, longest."""
    lines = []
    if findings.lengths:
        lines.append(f"  {'tokens before cutting':<28} {'median':>9} {'95 %':>9} {'longest':>9}")
    for name, lengths in findings.lengths.items():
        ordered = sorted(lengths)
        median = ordered[math.ceil(0.5 * len(ordered)) - 1]
        nearly_all = ordered[math.ceil(0.95 * len(ordered)) - 1]  # 95 % are not longer
        lines.append(f"    {name:<26} {median:>9,} {nearly_all:>9,} {ordered[-1]:>9,}")
    return lines


def error_lines(findings):
    """Why rows are bad: each kind once, with the first line that has it."""
    if not findings.errors:
        return []
    lines = [count_line("rows that cannot be used", findings.errors.total(), "of which")]
    for kind, count in findings.errors.most_common(MOST_KINDS):
        number, message = findings.first_error[kind]
        in_one_line = " ".join(message.split())  # a template's error may have several
        lines.append(f"    {count:>7,}  line {number:,}: {in_one_line[:160]}")
    if len(findings.errors) > MOST_KINDS:
        lines.append(f"             and {len(findings.errors) - MOST_KINDS:,} other kinds")
    return lines


def error_advice(findings, of_file, skip_bad_rows):
    """What to do about rows that cannot be used. of_file: which file they are in, if it must be said."""
    if not findings.errors:
        return []
    bad = f"bad rows{of_file} ({findings.errors.total():,})"
    if not findings.keys:
        return [f"{bad} are all that there are: edit the file, since nothing can be read of it"]
    if skip_bad_rows:
        return [f"{bad} are left out: edit the lines named above to keep them"]
    return [f"{bad} stop the run: edit the lines named above, or give --skip-bad-rows"]


def cut_advice(findings, context):
    """Which limits would cut nothing, as far as the model's context allows."""
    counts = findings.counts
    longest = {name: max(lengths) for name, lengths in findings.lengths.items()}
    longest_response = max((longest[name] for name in longest if name != "prompt"), default=0)
    lines = []
    if counts["identical when cut"] or counts["cut responses"]:
        lines.append(limit_line("response", longest_response, context))
    if counts["cut prompts"]:
        lines.append(limit_line("prompt", longest["prompt"], context))
    return lines


def limit_line(name, longest, context):
    """The limit that the longest prompt, or response, needs. Of the context the other needs a token."""
    if longest >= context:
        sizes = f"its {longest:,} tokens do not fit into the model's context of {context:,}"
        return f"the longest {name} is cut in any case: {sizes}"
    return f"--max-{name}-tokens {longest} would cut no {name}"


def advice(findings):
    """What to do about each other finding, as lines."""
    counts = findings.counts
    lines = []
    if counts["identical"] + counts["identical tokens"]:
        lines.append("identical pairs prefer nothing: remove them from the file")
    if 2 * counts["without EOS"] > counts["responses"]:
        lines.append("most responses have no EOS: a model trained on them may not learn to stop")
    if counts["special"]:
        lines.append("special tokens in responses: see the examples; what the chat template writes, remove")
    if counts["duplicates"] and findings.responses:  # RL samples from a prompt that comes twice once
        lines.append("duplicates weigh double: remove them, unless they are meant to")
    if findings.chosen & findings.rejected:
        lines.append("an answer both chosen and rejected: decide, unless your labels are meant to be noisy")
    if 3 * max(counts["chosen longer"], counts["rejected longer"]) > 2 * len(findings.keys) > 100:
        lines.append("length tells most pairs apart: it may be what is learned; watch the length of samples")
    lines += column_advice(findings.columns)
    if findings.left_out:
        lines.append("a chat template that keeps the end of its generation prompt would be trained behind it")
    return lines


def column_advice(columns):
    """What to do about columns, and about texts that columns.py counts."""
    lines = []
    if columns.unread:
        lines.append("columns not read: put what the model should see into the prompt or a system message")
    if columns.equal or columns.inverted or columns.small_margins:
        lines.append("pairs whose scores do not agree with them are trained like all others: remove them")
    if columns.bad_labels:
        lines.append("rows with label false: remove them, or make pairs of good and bad answers")
    if columns.repeated_prompts:
        lines.append("answers that begin with the prompt: cut it from them, if it is no quotation")
    return lines


def split_advice(findings, held_out):
    """What to do about prompts on both sides, or where nothing can be held out."""
    if held_out is None and findings.responses and len(findings.keys) == 1:
        return ["one row cannot be split: at least two are needed, one of them to be held out"]
    if not findings.responses or not in_both(findings, held_out):
        return []
    if held_out is None:
        return ["the held-out rows have the same prompt as the others: more prompts, or --eval-data"]
    return ["prompts on both sides: remove them from one file, or held-out measures say too much"]
