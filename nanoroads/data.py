"""Files of rows -> token lists. One JSON object a line; every error names the file and the line.

SFT          {"prompt", "response"}, or {"prompt", "completion"}, or any fields through --prompt-template
preferences  {"prompt", "chosen", "rejected"} as TRL has them, text or message lists; HH-RLHF's rows (two whole dialogues);
             the comparisons of OpenAI's summarize-from-feedback ({"info", "summaries", "choice"})
prompts      {"prompt"} (any of the above will do)

Prompt and response are tokenised apart, so no merge crosses the boundary. EOS ends every response that was not cut.
"""

import json
from pathlib import Path

from nanoroads import tokenizer
from nanoroads.common import InputError


def write_rows(path, rows):
    from nanoroads.checkpoint import write_atomic

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def read_rows(path):
    """Yields (line number, dict). Raises InputError: no file, no rows, not JSON, not UTF-8."""
    path, number = Path(path), 0
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not a JSON object ({error})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: not a JSON object, but {type(row).__name__}")
            yield number, row
    if number == 0:
        raise InputError(f"{path}: holds no rows")


def field(row, *names):
    """The first of `names` that the row has, as text. Raises InputError."""
    for name in names:
        if name in row:
            value = chat_text(row[name]) if isinstance(row[name], list) else row[name]
            if not isinstance(value, str):
                raise InputError(f"field {name!r} is {type(value).__name__}, not text")
            if not value:
                raise InputError(f"field {name!r} is empty")
            return value
    raise InputError(f"has no field {' or '.join(map(repr, names))}, only {', '.join(map(repr, row)) or 'nothing'}")


def chat_text(messages):
    """A list of {"role", "content"} as HH-RLHF writes dialogues; a list that ends in the user's turn asks for the assistant's."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    text = "".join(f"\n\n{names.get(m['role'], m['role'])}: {m['content']}" for m in checked(messages))
    return text + ("\n\nAssistant:" if messages[-1]["role"] != "assistant" else "")


def checked(messages):
    """The messages themselves. Raises InputError unless they are a list of {"role", "content"} with text in both."""
    good = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    if not good or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise InputError("a message list must hold objects with 'role' and 'content', and at least one")
    return messages


def answer(messages):
    return " " + " ".join(m["content"] for m in checked(messages))


def sft_texts(row, template=None):
    """(prompt, [response]). template: a format string over the row's fields, for the prompt; the response is then `summary`."""
    if template:
        try:
            prompt = template.format(**row)
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(f"--prompt-template {template!r} does not fit the row ({error!r})") from None
        return prompt, [field(row, "response", "completion", "summary")]
    if isinstance(row.get("completion"), list):
        return field(row, "prompt"), [answer(row["completion"])]
    return field(row, "prompt"), [field(row, "response", "completion")]


def preference_texts(row):
    """(prompt, [chosen, rejected]) of one row in any of the three layouts."""
    if "summaries" in row and "choice" in row:  # summarize-from-feedback
        info, summaries, choice = row.get("info") or {}, row["summaries"], row["choice"]
        if choice not in (0, 1) or len(summaries) != 2:
            raise InputError("'choice' must be 0 or 1 and 'summaries' two")
        head = f"SUBREDDIT: r/{info.get('subreddit', '')}\n\nTITLE: {info.get('title', '')}\n\n"
        prompt = f"{head}POST: {field(info, 'post', 'article')}\n\nTL;DR:"
        return prompt, [field(summaries[choice], "text"), field(summaries[1 - choice], "text")]
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) or isinstance(rejected, list):  # messages: with the prompt apart, or as a shared beginning
        if checked(chosen) == checked(rejected):
            raise InputError("'chosen' and 'rejected' are the same")
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        prompt = row.get("prompt") or []
        if isinstance(prompt, str):  # UltraFeedback says it twice
            prompt = [] if shared else [{"role": "user", "content": prompt}]
        return chat_text(prompt + chosen[:shared]), [answer(side[shared:]) for side in (chosen, rejected)]
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if "prompt" in row:
        return field(row, "prompt"), [chosen, rejected]
    marker = "\n\nAssistant:"  # HH-RLHF: the dialogues differ in the assistant's last turn
    end = chosen.rfind(marker) + len(marker)
    if end < len(marker) or chosen[:end] != rejected[:end]:
        raise InputError("has no 'prompt', and 'chosen' and 'rejected' do not share a dialogue up to the last turn")
    return chosen[:end], [chosen[end:], rejected[end:]]


def prompt_texts(row):
    return field(row, "prompt"), []


def load(path, texts, encoding, context, max_prompt=None, max_response=None):
    """Read a whole file through one of the *_texts functions above.

    Returns (prompts, responses, prompt texts): token lists, and for each prompt the list of its responses' token lists.
    context: the model's block_size. Raises InputError with file:line for a row that does not fit."""
    eos = tokenizer.eos_id(encoding)
    prompts, responses, sources = [], [], []
    for number, row in read_rows(path):
        try:
            prompt_text, response_texts = texts(row)
            prompt = tokenizer.encode(encoding, prompt_text)
            if max_prompt and len(prompt) > max_prompt:
                prompt = prompt[-max_prompt:]
            group = [tokenizer.encode(encoding, text) + [eos] for text in response_texts]
            if max_response:
                group = [r[:max_response] for r in group]  # a response that is cut has no EOS, and must not learn one
            if not prompt:
                raise InputError("the prompt is empty")
            if len(group) == 2 and group[0] == group[1]:
                raise InputError("'chosen' and 'rejected' are the same")
            longest = len(prompt) + max(map(len, group), default=1)
            if longest > context:
                raise InputError(
                    f"prompt and response take {longest} tokens, the model's context is {context} "
                    "(--max-prompt-tokens and --max-response-tokens cut)"
                )
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        prompts.append(prompt)
        responses.append(group)
        sources.append(prompt_text)
    return prompts, responses, sources


def hold_out(prompts, responses, share=0.05, most=256):
    """Split off the last rows for evaluation: ((prompts, responses), (prompts, responses))."""
    n = min(most, int(len(prompts) * share)) or min(1, len(prompts) - 1)
    cut = len(prompts) - n
    return (prompts[:cut], responses[:cut]), (prompts[cut:], responses[cut:])
