"""A user's file of rows -> tokens.

Prompt and response are tokenised apart, so no merge crosses the boundary. EOS ends every response that was not cut.
Message lists go through the chat template of the tokenizer's folder; without one they become HH-RLHF's "Human: ... Assistant:".
"""

from array import array
from dataclasses import dataclass
from typing import NamedTuple

from tqdm import tqdm

from nanoroads.errors import InputError
from nanoroads.text import chat, tokenizer
from nanoroads.text.layouts import chat_text
from nanoroads.text.rows import parse, raw_rows


class Limits(NamedTuple):
    """How long the rows of a file may be, in tokens, and what becomes of those that do not fit."""

    context: int  # the model's block_size
    max_prompt: int | None = None  # keep the last tokens of longer prompts; None: refuse them
    max_response: int | None = None  # cut longer responses, without EOS; None: refuse them
    skip_bad_rows: bool = False  # leave out rows that do not fit, and say how many


@dataclass
class Rows:
    """A file as tokens: N prompts with K responses each, as token arrays, and the prompts as text."""

    prompts: list  # N arrays of tokens
    responses: list  # N lists of K arrays of tokens; K = 0 for a file of prompts
    texts: list  # N prompts as text

    def __len__(self):
        return len(self.prompts)

    def take(self, indices):
        """(prompts, responses) of the rows with these indices, as `pack` takes them."""
        return [self.prompts[i] for i in indices], [self.responses[i] for i in indices]

    def select(self, indices):
        """The rows with these indices, as Rows."""
        prompts, responses = self.take(indices)
        return Rows(prompts, responses, [self.texts[i] for i in indices])

    def part(self, begin, end):
        """Rows begin to end - 1."""
        return Rows(self.prompts[begin:end], self.responses[begin:end], self.texts[begin:end])

    def response_tokens(self, indices):
        """The number of response tokens in the rows with these indices."""
        return sum(len(response) for i in indices for response in self.responses[i])

    def lengths(self):
        """The lengths of the responses, N lists of K."""
        return [[len(response) for response in group] for group in self.responses]

    def without_duplicates(self):
        """Each prompt once, where it stands first, without responses: what RL samples from."""
        first = {}
        for i, text in enumerate(self.texts):
            first.setdefault(text, i)
        return Rows([self.prompts[i] for i in first.values()], [[] for _ in first], list(first))


def encode(encoding, prompt, answers=()):
    """A prompt and its answers, each text or a message list -> (prompt ids, [answer ids with EOS], the prompt as text)."""
    eos = tokenizer.eos_id(encoding)
    if isinstance(prompt, list) and chat.template(encoding):
        ids = [chat.encode(encoding, prompt, answer) for answer in answers] or [chat.encode(encoding, prompt)]
        group = [r if r and r[-1] == eos else r + [eos] for _, r in ids[: len(answers)]]
        return ids[0][0], group, chat.render(encoding, prompt, add_generation_prompt=True)
    if isinstance(prompt, list):
        prompt, answers = (
            chat_text(prompt),
            [" " + " ".join(m["content"] for m in answer) for answer in answers],
        )
    ids = getattr(encoding, "bos", []) + tokenizer.encode(encoding, prompt)
    return ids, [tokenizer.encode(encoding, answer) + [eos] for answer in answers], prompt


def cut_prompt(encoding, prompt, most):
    """The last `most` tokens, after the BOS if there is one."""
    bos = getattr(encoding, "bos", [])
    head = bos if prompt[: len(bos)] == bos else []
    return prompt if len(prompt) <= most else head + prompt[len(prompt) - most + len(head) :]


def load(path, layout, encoding, limits):
    """Read a whole file. layout: a function of layouts.py, row -> (prompt, answers). Returns Rows.

    Raises InputError with file:row for a row that does not fit, or with limits.skip_bad_rows leaves it out."""
    prompts, responses, texts = [], [], []
    bad, number = [], 0
    for number, row in tqdm(raw_rows(path), desc=f"reading {path}", unit="row", disable=None):
        try:
            prompt_and_answers = layout(parse(row))
            prompt, group, text = encode(encoding, *prompt_and_answers)
            prompt, group = fit(encoding, prompt, group, limits)
        except InputError as error:
            bad.append(f"{path}:{number}: {error}")
            if not limits.skip_bad_rows:
                raise InputError(bad[0]) from None
            continue
        prompts.append(array("i", prompt))  # 4 bytes per token, where a list takes about 36
        responses.append([array("i", response) for response in group])
        texts.append(text)
    if not prompts:
        raise InputError(f"{path}: no row is good; the first: {bad[0]}")
    if bad:
        print(f"{path}: skipped {len(bad):,} bad rows of {number:,}; the first: {bad[0]}")
    return Rows(prompts, responses, texts)


def fit(encoding, prompt, group, limits):
    """Cut a prompt and its responses to the limits. Raises InputError where they still do not fit."""
    if limits.max_prompt:
        prompt = cut_prompt(encoding, prompt, limits.max_prompt)
    if limits.max_response:  # a response that is cut has no EOS, and must not learn one
        group = [response[: limits.max_response] for response in group]
    if not prompt:
        raise InputError("the prompt is empty")
    if len(group) == 2 and group[0] == group[1]:
        raise InputError("'chosen' and 'rejected' are the same")
    longest = len(prompt) + max(map(len, group), default=1)
    if longest > limits.context:
        raise InputError(
            f"prompt and response take {longest} tokens, the model's context is {limits.context} "
            "(--max-prompt-tokens and --max-response-tokens cut)"
        )
    return prompt, group


def load_split(path, held_out_path, layout, encoding, limits):
    """(training Rows, held-out Rows). held_out_path None: the last 5 % of the file, at most 256 rows. Raises InputError."""
    rows = load(path, layout, encoding, limits)
    if held_out_path is not None:
        return rows, load(held_out_path, layout, encoding, limits)
    return hold_out(rows, path)


def hold_out(rows, path="the data", share=0.05, most=256):
    """Split off the last rows for evaluation: (Rows, Rows). Raises InputError for one row."""
    if len(rows) < 2:
        raise InputError(f"{path}: holds one row; at least two are needed, one of them to be held out")
    held_out = min(most, int(len(rows) * share)) or 1
    cut = len(rows) - held_out
    return rows.part(0, cut), rows.part(cut, len(rows))
