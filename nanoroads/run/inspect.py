"""--inspect: the first rows of a file as tokens, as the loss sees them."""

from nanoroads.batch import pack
from nanoroads.text.tokenizer import piece


def inspect(rows, encoding, examples=3):
    """Print the first groups of data Rows as tokens; what stands in [brackets] is trained."""
    for i in range(min(examples, len(rows))):
        prompts, responses = rows.take([i])
        trained = set()  # places in the batch
        if responses[0]:
            trained = set(pack(prompts, responses).response_index.tolist())
        size = len(prompts[0]) + rows.response_tokens([i])
        print(f"example {i + 1}: {len(trained)} of {size} tokens are trained, those in [brackets]")

        place = 0  # `pack` lays a prompt and its responses out one after the other
        for k, tokens in enumerate([prompts[0], *responses[0]]):
            text = ""
            for token in tokens:
                text += mark(printable(encoding, token), place in trained)
                place += 1
            label = f"response {k}" if k else "prompt"
            print(f"  {label:<10}  {text}")


def mark(token, is_trained):
    """A token's text in brackets if it is trained, else with a bar behind it."""
    if is_trained:
        return f"[{token}]"
    return f"{token}|"


def printable(encoding, token):
    """One token's text, with backslashes for what has no place in a line."""
    return repr(piece(encoding, token).decode(errors="backslashreplace"))[1:-1]
