"""Files of rows -> tokens. `.jsonl`, `.jsonl.gz`, `.parquet`, or `hf:org/name[:split]`; every error names the file and the row.

SFT          {"prompt", "response"}, {"prompt", "completion"}, {"messages"}, or any fields through --prompt-template
preferences  {"prompt", "chosen", "rejected"} as TRL has them, text or message lists, the prompt apart or as their shared
             beginning; HH-RLHF's rows (two dialogues); the comparisons of OpenAI's summarize-from-feedback
prompts      any of the above

Prompt and response are tokenised apart, so no merge crosses the boundary. EOS ends every response that was not cut.
Message lists go through the chat template of the tokenizer's folder; without one they become HH-RLHF's "Human: ... Assistant:".
"""

import gzip
import json
import zlib
from array import array
from pathlib import Path
from string import Formatter

from tqdm import tqdm

from nanoroads import chat, tokenizer
from nanoroads.batch import pack
from nanoroads.common import InputError


def write_rows(path, rows):
    from nanoroads.checkpoint import write_atomic

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda p: p.write_text("".join(json.dumps(row) + "\n" for row in rows)))


def raw_rows(path):
    """Yields (row number, a line as bytes or a row as a dict). Raises InputError: no file, no rows, a library is missing."""
    name, number = str(path), 0
    if name.startswith("hf:"):
        rows = hub_rows(name)
    elif not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    elif name.endswith(".parquet"):
        rows = parquet_rows(path)
    else:
        rows = gzip.open(path) if name.endswith(".gz") else open(path, "rb")
    try:
        for number, row in enumerate(rows, 1):
            yield number, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path}:{number + 1}: not a whole gzip file ({error})") from None
    finally:
        rows.close()
    if number == 0:
        raise InputError(f"{path}: holds no rows")


def parquet_rows(path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: to read it, pip install 'nanoroads[parquet]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1000):
                yield from batch.to_pylist()
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a whole parquet file ({error})") from None


def hub_rows(path):
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path}: to read it, pip install 'nanoroads[hf]'") from None
    name, _, split = path.removeprefix("hf:").partition(":")
    try:
        yield from datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # its own, of the network, of the file system: whatever it is, the name was wrong or unreachable
        raise InputError(f"{path}: {error}") from None


def parse(row):
    """A line or a row -> dict. Raises InputError: not JSON, not UTF-8, not an object."""
    try:
        row = json.loads(row) if isinstance(row, bytes) else row
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a JSON object ({error})") from None
    if not isinstance(row, dict):
        raise InputError(f"not a JSON object, but {type(row).__name__}")
    return row


def field(row, *names):
    """The first of `names` that the row has: text, or a message list. Raises InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{row!r:.40}: an object with the field {' or '.join(map(repr, names))} is wanted")
    for name in sorted(names, key=lambda name: row.get(name) is None):  # a column of parquet that has no value is null
        if name in row:
            value = row[name]
            if isinstance(value, list):
                return checked(value, name)
            if not isinstance(value, str):
                raise InputError(f"field {name!r} is {type(value).__name__}, not text")
            if not value:
                raise InputError(f"field {name!r} is empty")
            return value
    raise InputError(f"has no field {' or '.join(map(repr, names))}, only {', '.join(map(repr, row)) or 'nothing'}")


def checked(messages, name="prompt"):
    """The messages without what is null in them. Raises InputError unless they are a list of {"role", "content"} with text
    in both. name: of their field."""
    good = isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)
    if not good or not all(isinstance(m.get(key), str) for m in messages for key in ("role", "content")):
        raise InputError(f"field {name!r}: a message list must hold objects with text in 'role' and 'content', and at least one")
    return [{key: value for key, value in m.items() if value is not None} for m in messages]  # parquet has all keys in all


def chat_text(messages):
    """A list of {"role", "content"} as HH-RLHF writes dialogues; a list that ends in the user's turn asks for the assistant's."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    text = "".join(f"\n\n{names.get(m['role'], m['role'])}: {m['content']}" for m in checked(messages))
    return text + ("\n\nAssistant:" if messages[-1]["role"] != "assistant" else "")


def dialogue(prompt, answers):
    """(prompt, answers) as they are if all are text, else all as message lists."""
    turn = lambda role, x: checked([{"role": role, "content": x}] if isinstance(x, str) else x)  # noqa: E731
    if not isinstance(prompt, str) or not all(isinstance(a, str) for a in answers):
        prompt, answers = turn("user", prompt), [turn("assistant", a) for a in answers]
    if not all(a if isinstance(a, str) else any(m["content"] for m in a) for a in answers):
        raise InputError("an answer is empty")
    return prompt, answers


def in_messages(row):
    """Whether a row is one message list; UltraChat and UltraFeedback have their prompt as text beside it."""
    return "messages" in row and "response" not in row and "completion" not in row


def sft_texts(row, template=None):
    """(prompt, [response]), each text or a message list. template: a format string over the row's fields, for the prompt;
    the response may then be `summary`."""
    if template:
        try:
            prompt, names = template.format(**row), [name for _, name, _, _ in Formatter().parse(template)]
        except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
            raise InputError(f"--prompt-template {template!r} does not fit the row ({error!r})") from None
        for name in names:  # a number can be written out, null and lists would be noise
            if name in row and not isinstance(row[name], (int, float)) and isinstance(field(row, name), list):
                raise InputError(f"field {name!r} is list, not text")
        return dialogue(prompt, [field(row, "response", "completion", "summary")])
    if in_messages(row):  # the last turn is the one that is learned
        messages = checked(row["messages"], "messages")
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise InputError("'messages' must end in an answer of the assistant's")
        return dialogue(messages[:-1], [messages[-1:]])
    return dialogue(field(row, "prompt"), [field(row, "response", "completion")])


def preference_texts(row):
    """(prompt, [chosen, rejected]) of one row in any of the layouts, each text or a message list."""
    if "summaries" in row and "choice" in row:  # summarize-from-feedback
        info, summaries, choice = row.get("info") or {}, row["summaries"], row["choice"]
        if choice not in (0, 1) or isinstance(choice, float) or not isinstance(summaries, list) or len(summaries) != 2:
            raise InputError("'choice' must be 0 or 1 and 'summaries' two")
        post = field(info, "post", "article")
        head = f"SUBREDDIT: r/{info.get('subreddit') or ''}\n\nTITLE: {info.get('title') or ''}\n\n"
        prompt = f"{head}POST: {post}\n\nTL;DR:"
        return dialogue(prompt, [field(summaries[choice], "text"), field(summaries[1 - choice], "text")])
    chosen, rejected = field(row, "chosen"), field(row, "rejected")
    if chosen == rejected:
        raise InputError("'chosen' and 'rejected' are the same")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise InputError("of 'chosen' and 'rejected' one is text, the other a message list")
    if isinstance(chosen, list):
        shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), 0)
        apart = field(row, "prompt") if row.get("prompt") else []
        if isinstance(apart, str):  # UltraFeedback has the prompt twice
            apart = [] if shared else [{"role": "user", "content": apart}]
        return dialogue(apart + chosen[:shared], [chosen[shared:], rejected[shared:]])
    if "prompt" in row:
        return dialogue(field(row, "prompt"), [chosen, rejected])
    marker = "\n\nAssistant:"  # HH-RLHF: the dialogues differ in the assistant's last turn
    end = chosen.rfind(marker) + len(marker)
    if end < len(marker) or chosen[:end] != rejected[:end]:
        raise InputError("has no 'prompt', and 'chosen' and 'rejected' do not share a dialogue up to the last turn")
    return dialogue(chosen[:end], [chosen[end:], rejected[end:]])


def prompt_texts(row):
    """(prompt, [])."""
    if isinstance(row.get("chosen"), list) or ("prompt" not in row and ("chosen" in row or "summaries" in row)):
        return preference_texts(row)[0], []
    return (sft_texts(row)[0] if in_messages(row) else field(row, "prompt")), []


def encode(encoding, prompt, answers=()):
    """A prompt and its answers, each text or a message list -> (prompt ids, [answer ids with EOS], the prompt as text)."""
    eos = tokenizer.eos_id(encoding)
    if isinstance(prompt, list) and chat.template(encoding):
        ids = [chat.encode(encoding, prompt, answer) for answer in answers] or [chat.encode(encoding, prompt)]
        group = [r if r and r[-1] == eos else r + [eos] for _, r in ids[: len(answers)]]
        return ids[0][0], group, chat.render(encoding, prompt, add_generation_prompt=True)
    if isinstance(prompt, list):
        prompt, answers = chat_text(prompt), [" " + " ".join(m["content"] for m in answer) for answer in answers]
    ids = getattr(encoding, "bos", []) + tokenizer.encode(encoding, prompt)
    return ids, [tokenizer.encode(encoding, answer) + [eos] for answer in answers], prompt


def cut_prompt(encoding, prompt, most):
    """The last `most` tokens, after the BOS if there is one."""
    bos = getattr(encoding, "bos", [])
    head = bos if prompt[: len(bos)] == bos else []
    return prompt if len(prompt) <= most else head + prompt[len(prompt) - most + len(head) :]


def load(path, texts, encoding, context, max_prompt=None, max_response=None, skip_bad_rows=False):
    """Read a whole file through one of the *_texts functions above.

    Returns (prompts, responses, prompt texts): array("i") of tokens, and for each prompt the list of its responses' arrays.
    context: the model's block_size. Raises InputError with file:row for a row that does not fit, or with skip_bad_rows
    leaves it out and prints how many were."""
    prompts, responses, sources, bad, number = [], [], [], [], 0
    for number, row in tqdm(raw_rows(path), desc=f"reading {path}", unit="row", disable=None):
        try:
            prompt, group, source = encode(encoding, *texts(parse(row)))
            if max_prompt:
                prompt = cut_prompt(encoding, prompt, max_prompt)
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
            bad.append(f"{path}:{number}: {error}")
            if not skip_bad_rows:
                raise InputError(bad[0]) from None
            continue
        prompts.append(array("i", prompt))  # 4 bytes a token, where a list takes about 36
        responses.append([array("i", r) for r in group])
        sources.append(source)
    if not prompts:
        raise InputError(f"{path}: no row is good; the first: {bad[0]}")
    if bad:
        print(f"{path}: skipped {len(bad):,} bad rows of {number:,}; the first: {bad[0]}")
    return prompts, responses, sources


def inspect(prompts, responses, encoding, n=3):
    """Print the first n groups as tokens, as the loss sees them: what stands in [brackets] is trained, the rest is not."""
    for i in range(min(n, len(prompts))):
        batch = pack(prompts[i : i + 1], [responses[i] or [[0]]])  # of rows that are prompts alone, 0 is not shown
        trained = set(batch.own.tolist()) if responses[i] else ()
        size = len(prompts[i]) + sum(map(len, responses[i]))
        print(f"example {i + 1}: {len(trained)} of {size} tokens are trained, those in [brackets]")
        for segment in range(len(responses[i]) + 1):
            shown = []
            for at in (batch.segment[0] == segment).nonzero().flatten().tolist():
                token = encoding.decode_single_token_bytes(batch.tokens[0, at].item()).decode(errors="backslashreplace")
                shown.append(("[{}]" if at in trained else "{}|").format(repr(token)[1:-1]))
            print(f"  {f'response {segment}' if segment else 'prompt':<10}  {''.join(shown)}")


def hold_out(prompts, responses, path="the data", share=0.05, most=256):
    """Split off the last rows for evaluation: ((prompts, responses), (prompts, responses)). Raises InputError for one row."""
    if len(prompts) < 2:
        raise InputError(f"{path}: holds one row; at least two are needed, one of them to be held out")
    n = min(most, int(len(prompts) * share)) or 1
    cut = len(prompts) - n
    return (prompts[:cut], responses[:cut]), (prompts[cut:], responses[cut:])
