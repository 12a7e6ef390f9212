"""--inspect: the first rows of a file as tokens, as the loss sees them."""

from nanoroads.batch import pack
from nanoroads.text.tokenizer import piece


def inspect(rows, encoding, examples=3):
    """Print the first groups of data Rows as tokens: what stands in [brackets] is trained, the rest is not."""
    for i in range(min(examples, len(rows))):
        prompt, responses = rows.prompts[i], rows.responses[i]
        size = len(prompt) + sum(len(response) for response in responses)
        if not responses:  # a file of prompts
            print(f"example {i + 1}: 0 of {size} tokens are trained, those in [brackets]")
            print(f"  {'prompt':<10}  {''.join(f'{printable(encoding, token)}|' for token in prompt)}")
            continue
        batch = pack([prompt], [responses])
        trained = set(batch.response_index.tolist())
        print(f"example {i + 1}: {len(trained)} of {size} tokens are trained, those in [brackets]")
        for segment in range(len(responses) + 1):
            label = f"response {segment}" if segment else "prompt"
            text = ""
            for place in (batch.segment[0] == segment).nonzero().flatten().tolist():
                token = printable(encoding, batch.tokens[0, place].item())
                text += f"[{token}]" if place in trained else f"{token}|"
            print(f"  {label:<10}  {text}")


def printable(encoding, token):
    """One token's text, with backslashes for what has no place in a line."""
    return repr(piece(encoding, token).decode(errors="backslashreplace"))[1:-1]
