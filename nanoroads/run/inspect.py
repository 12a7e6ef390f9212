"""--inspect: the first rows of a file as tokens, as the loss sees them."""

import tiktoken

from nanoroads.batch import pack
from nanoroads.text.data import Rows
from nanoroads.text.tokenizer import piece


def inspect(rows: Rows, encoding: tiktoken.Encoding, examples: int = 3) -> None:
    """Print the first groups of rows as tokens; what stands in [brackets] is trained, no other."""
    for i in range(min(examples, len(rows))):
        prompt, responses = rows.prompts[i], rows.responses[i]
        if responses:
            inspect_group(i + 1, prompt, responses, encoding)
        else:  # a file of prompts
            print_head(i + 1, 0, len(prompt))
            print_tokens("prompt", [f"{printable(encoding, token)}|" for token in prompt])


def inspect_group(number, prompt, responses, encoding):
    """Print one prompt and its responses from a packed batch, the same that the losses read."""
    batch = pack([prompt], [responses])
    trained = set(batch.response_index.tolist())
    size = len(prompt) + sum(len(response) for response in responses)
    print_head(number, len(trained), size)
    for segment in range(len(responses) + 1):  # 0 is the prompt
        tokens = []
        for place in (batch.segment[0] == segment).nonzero().flatten().tolist():
            token = printable(encoding, batch.tokens[0, place].item())
            tokens.append(f"[{token}]" if place in trained else f"{token}|")
        print_tokens(f"response {segment}" if segment else "prompt", tokens)


def print_head(number, trained, size):
    print(f"example {number}: {trained} of {size} tokens are trained, those in [brackets]")


def print_tokens(label, tokens):
    print(f"  {label:<10}  {''.join(tokens)}")


def printable(encoding, token):
    """One token's text, with backslashes for what has no place in a line."""
    return repr(piece(encoding, token).decode(errors="backslashreplace"))[1:-1]
