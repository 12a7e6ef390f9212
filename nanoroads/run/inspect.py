"""--inspect: the first rows of a file as tokens, as the loss sees them, and counts over the whole file."""

from nanoroads.batch import pack
from nanoroads.errors import printable
from nanoroads.run.diagnosis import report
from nanoroads.run.doctor import RESPONSE_NAMES, examine
from nanoroads.text.data import Rows, append, readings
from nanoroads.text.tokenizer import piece


def inspect(path, held_out_path, layout, encoding, limits, examples=3):
    """Print the first good rows of a file as tokens, then what doctor.py finds in all of them.

    held_out_path: --eval-data, or None. The rest as for data.load. No bad row stops it."""
    first = Rows([], [], [])
    line_numbers = []  # of those rows

    def keep_first(all_readings):
        for reading in all_readings:
            if reading.encoded and len(first) < examples:
                append(first, reading.encoded)
                line_numbers.append(reading.number)
            yield reading

    findings = examine(keep_first(readings(path, layout, encoding, limits)), encoding)
    held_out = None
    if held_out_path:
        held_out = examine(readings(held_out_path, layout, encoding, limits), encoding)
    show_examples(first, line_numbers, encoding)
    for line in report(findings, path, limits, held_out, held_out_path):
        print(printable(line))


def show_examples(rows, line_numbers, encoding):
    """Print the groups of data Rows as tokens; what stands in [brackets] is trained."""
    for i, line_number in enumerate(line_numbers):
        prompts, responses = rows.take([i])
        trained = set()  # places in the batch
        if responses[0]:
            trained = set(pack(prompts, responses).response_index.tolist())
        size = len(prompts[0]) + rows.response_tokens([i])
        name = f"example {i + 1} (line {line_number:,})"
        print(f"{name}: {len(trained)} of {size} tokens are trained, those in [brackets]")

        place = 0  # `pack` lays a prompt and its responses out one after the other
        labels = ["prompt", *RESPONSE_NAMES[len(responses[0])]]
        for label, tokens in zip(labels, [prompts[0], *responses[0]], strict=True):
            text = ""
            for token in tokens:
                text += mark(token_text(encoding, token), place in trained)
                place += 1
            print(f"  {label:<10}  {text}")


def mark(token, is_trained):
    """A token's text in brackets if it is trained, else with a bar behind it."""
    if is_trained:
        return f"[{token}]"
    return f"{token}|"


def token_text(encoding, token):
    """One token's text, with backslashes for what has no place in a line."""
    return repr(piece(encoding, token).decode(errors="backslashreplace"))[1:-1]
