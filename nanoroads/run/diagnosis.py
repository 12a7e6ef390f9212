"""What doctor.py has found in a file of rows, in lines for its user, and what to do about it."""

import math

from nanoroads.run.doctor import RESPONSE_NAMES
from nanoroads.text.encode import left_out_line
from nanoroads.text.split import held_out_rows

MOST_KINDS = 6  # of errors that are shown


def report(findings, path, limits, held_out=None, held_out_path=None):
    """Findings -> lines, with "!" before what there is something to do about.

    limits: data Limits. held_out: Findings of --eval-data, if there is one."""
    lines = [f"whole file: {path}"]
    lines += count_lines(findings)
    lines += split_lines(findings, held_out, held_out_path)
    lines += length_lines(findings, limits.context)
    lines += [marked(line, False) for line in findings.columns.unread_lines()]
    lines += [marked(line, True) for line in findings.columns.finding_lines()]
    if findings.left_out:
        lines.append(marked(left_out_line(findings.left_out), True))
    lines += error_lines(findings)
    if held_out and held_out.errors:
        lines += [f"held-out file: {held_out_path}", *error_lines(held_out)]
    todo = error_advice(findings, "", limits.skip_bad_rows)
    if held_out:
        todo += error_advice(held_out, f" of {held_out_path}", limits.skip_bad_rows)
    todo += [*cut_advice(findings, limits.context), *advice(findings), *split_advice(findings, held_out)]
    return [*lines, "what to do", *(f"  {line}" for line in todo or ["nothing: every row can be trained"])]


def count_lines(findings):
    """A line for each count that suits the kind of rows. What matters is what `advice` speaks of."""
    counts = findings.counts
    prompts = len(set(findings.keys))
    lines = [count_line("rows", findings.rows), count_line("that can be used", len(findings.keys))]
    lines.append(count_line("different prompts", prompts))
    if findings.responses_per_row == 2:
        same = counts["identical"] + counts["identical tokens"]
        same_when_cut = counts["identical when cut"]
        lines.append(count_line("chosen same as rejected", same, matters=same > 0))
        lines.append(count_line("the same once cut", same_when_cut, matters=same_when_cut > 0))
    lines.append(count_line("prompts that are cut", counts["cut prompts"], matters=counts["cut prompts"] > 0))
    if findings.responses_per_row:
        lines += response_lines(counts)
    twice = counts["duplicates"]
    where = ""
    if findings.first_twice:
        number, number_before = findings.first_twice
        where = f"first: line {number:,} = line {number_before:,}"
    weighs_double = twice > 0 and findings.responses_per_row > 0
    lines.append(count_line("rows that stand there twice", twice, where, weighs_double))
    if findings.responses_per_row == 2:
        lines += preference_lines(findings)
    return lines


def response_lines(counts):
    """The counts that are of responses, not of rows."""
    trained = f"of {counts['responses']:,}"
    cut = counts["cut responses"]
    special = counts["special"]
    without_eos = counts["without EOS"]
    return [
        count_line("responses that are cut", cut, trained, matters=cut > 0),
        count_line("responses without EOS", without_eos, trained, matters=most_lack_eos(counts)),
        count_line("responses with special token text", special, f"of {counts['read']:,}", special > 0),
    ]


def preference_lines(findings):
    """Answers that are preferred and not, and how often the longer one is preferred."""
    counts = findings.counts
    both = len(findings.chosen & findings.rejected)
    lines = [count_line("answers chosen in one row, rejected in another", both, matters=both > 0)]
    for name in ("chosen longer", "rejected longer"):
        share = 100 * counts[name] / max(1, len(findings.keys))
        note = f"{share:.0f} % of pairs (in tokens, after cutting)"
        lines.append(count_line(name, counts[name], note, length_tells(findings, name)))
    return lines


def count_line(name, count, note="", matters=False):
    """Aligned: the name, the number, and what it is a part of."""
    return marked(f"{name:<46} {count:>9,}  {note}".rstrip(), matters)


def marked(line, matters):
    """The line behind "!" if it matters, else behind as many blanks."""
    if matters:
        return f"! {line}"
    return f"  {line}"


def most_lack_eos(counts):
    """Whether more than half of the responses that are trained do not end."""
    return 2 * counts["without EOS"] > counts["responses"]


def length_tells(findings, name):
    """Whether "chosen longer", or "rejected longer", holds for two thirds of the pairs, of which many are."""
    pairs = len(findings.keys)
    return pairs > 50 and 3 * findings.counts[name] > 2 * pairs


def split_lines(findings, held_out, held_out_path):
    """How many rows are trained and held out, and how many of their prompts are on both sides."""
    if not findings.responses_per_row or len(findings.keys) < 2:
        return []
    if held_out is None:
        rows = held_out_rows(findings.keys)
        trained = len(findings.keys) - len(rows)
        prompts = len({findings.keys[i] for i in rows})
        note = "of 1 prompt" if prompts == 1 else f"of {prompts:,} prompts"
    else:
        rows = held_out.keys
        trained = len(findings.keys)
        note = f"of {held_out_path}"
    both = in_both(findings, held_out)
    return [
        count_line("rows that are trained", trained),
        count_line("rows that are held out", len(rows), note, many_held_out(findings, held_out) > 0),
        count_line("prompts on both sides", both, matters=both > 0),
    ]


def many_held_out(findings, held_out):
    """How many rows the split holds out, if that is far more than its 5 %, else 0.

    It is where every prompt has many rows, since a prompt's rows stay together."""
    if held_out is not None or len(set(findings.keys)) < 2:
        return 0
    rows = len(held_out_rows(findings.keys))
    if rows > 1 and 10 * rows > len(findings.keys):
        return rows
    return 0


def in_both(findings, held_out):
    """How many prompts are on both sides."""
    if held_out is None:
        return int(len(set(findings.keys)) == 1 and len(findings.keys) > 1)  # see split.held_out_rows
    return len(set(findings.keys) & set(held_out.keys))


def length_lines(findings, context):
    """Tokens before anything is cut: median, 95 % up to, longest. Below them the model's context."""
    if not findings.lengths:
        return []
    lines = [f"  {'tokens before cutting':<46} {'median':>9} {'95 % up to':>11} {'longest':>9}"]
    for name, lengths in findings.lengths.items():
        ordered = sorted(lengths)
        median = ordered[math.ceil(0.5 * len(ordered)) - 1]
        nearly_all = ordered[math.ceil(0.95 * len(ordered)) - 1]  # 95 % are not longer
        lines.append(f"    {name:<44} {median:>9,} {nearly_all:>11,} {ordered[-1]:>9,}")
    lines.append(f"    {'context of the model':<44} {context:>31,}")
    return lines


def error_lines(findings):
    """Why rows are bad: each kind once, with the first line that has it."""
    if not findings.errors:
        return []
    lines = [count_line("rows that cannot be used", findings.errors.total(), "of which", matters=True)]
    for kind, count in findings.errors.most_common(MOST_KINDS):
        number, message = findings.first_error[kind]
        in_one_line = " ".join(message.split())  # a template's error may have several
        lines.append(f"    {count:>7,}  line {number:,}: {in_one_line[:160]}")
    if len(findings.errors) > MOST_KINDS:
        lines.append(f"             and {len(findings.errors) - MOST_KINDS:,} other kinds")
    return lines


# ---------------------------------------------------------------- what to do


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
    names = RESPONSE_NAMES[findings.responses_per_row]
    longest_response = max((longest.get(name, 0) for name in names), default=0)
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
        lines.append("pairs whose chosen is the same as rejected prefer nothing: remove them from the file")
    if most_lack_eos(counts):
        lines.append("most responses have no EOS: a model trained on them may not learn to stop")
    if counts["special"]:
        lines.append("special tokens inside responses: remove those that the chat template writes itself")
    if counts["duplicates"] and findings.responses_per_row:  # RL samples once from a prompt that comes twice
        lines.append("rows that stand there twice weigh double: remove one, unless they are meant to")
    if findings.chosen & findings.rejected:
        lines.append("an answer both chosen and rejected: decide, unless your labels are meant to be noisy")
    if length_tells(findings, "chosen longer") or length_tells(findings, "rejected longer"):
        lines.append("length tells most pairs apart: it may be what is learned; watch the length of samples")
    lines += column_advice(findings.columns)
    if findings.left_out:
        lines.append("a chat template that keeps the end of its generation prompt would be trained behind it")
    return lines


def column_advice(columns):
    """What to do about columns, and about texts that columns.py counts."""
    lines = []
    if columns.unread:
        lines.append("if the model should see one of them: write the columns not read into the prompt")
    if columns.equal or columns.inverted or columns.small_margins:
        lines.append("pairs whose scores do not agree with them are trained like all others: remove them")
    if columns.bad_labels:
        lines.append("rows with label false: remove them, or make pairs of good and bad answers")
    if columns.repeated_prompts:
        lines.append("answers that begin with the prompt: cut it from them, if it is no quotation")
    return lines


def split_advice(findings, held_out):
    """What to do about prompts on both sides, or where nothing can be held out, or too much."""
    responses_per_row = findings.responses_per_row
    if held_out is None and responses_per_row and len(findings.keys) == 1:
        return ["one row cannot be split: at least two are needed, one of them to be held out"]
    if not responses_per_row:
        return []
    remedy = "more prompts are needed"
    if responses_per_row == 2:  # for single responses no script takes another file
        remedy = "give --eval-data"
    many = many_held_out(findings, held_out)
    if many:
        share = f"{many:,} of {len(findings.keys):,} rows"
        return [f"{share} are held out, since prompts have many rows: {remedy}"]
    if not in_both(findings, held_out):
        return []
    if held_out is None:
        return [f"the held-out rows have the same prompt as the others: {remedy}"]
    return ["prompts on both sides: remove them from one file, or held-out measures say too much"]
