"""--inspect: what the loss sees of the first rows, and what is wrong with all of them."""

from array import array

import pytest
from helpers.rows import HELLO, USER, byte_encoding, chat_folder
from helpers.runs import run, write_jsonl

import train_dpo
import train_rlhf
import train_sft
from nanoroads.run.doctor import examine
from nanoroads.run.inspect import inspect, show_examples
from nanoroads.text import data, layouts, tokenizer
from nanoroads.text.data import Limits, readings


def reported(capsys, *arguments):
    """The lines of the report, without the examples."""
    capsys.readouterr()
    inspect(*arguments)
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("whole file: "))
    assert len(lines) - begin <= 45
    return [" ".join(line.split()) for line in lines[begin:]]


# ---------------------------------------------------------------- examples


def test_inspect_shows_what_is_trained(tmp_path, capsys):
    encoding = tokenizer.get("roadmap")
    row = {"prompt": "WA>FL:", "chosen": ">ID>MT", "rejected": ">OR"}
    path = write_jsonl(tmp_path / "rows.jsonl", [row] * 5)
    inspect(path, None, layouts.preference_texts, encoding, Limits(50), examples=2)
    out = capsys.readouterr().out
    one = "  prompt      WA|>FL|:|\n  chosen      [>ID][>MT][<|end|>]\n  rejected    [>OR][<|end|>]\n"
    heads = [f"example {i} (line {i}): 5 of 8 tokens are trained, those in [brackets]\n" for i in (1, 2)]
    assert out.startswith(heads[0] + one + heads[1] + one + f"whole file: {path}\n")
    inspect(path, None, layouts.prompt_texts, encoding, Limits(50), examples=1)
    head = "example 1 (line 1): 0 of 3 tokens are trained, those in [brackets]\n"
    assert capsys.readouterr().out.startswith(head + "  prompt      WA|>FL|:|\nwhole file: ")


def test_ids_without_text_are_shown_empty(capsys):
    """A vocabulary that is padded to a round size has ids that no text has."""
    show_examples(data.Rows([array("i", [44, 120])], [[]], ["WA"]), [1], tokenizer.get("roadmap"))
    assert capsys.readouterr().out.endswith("\n  prompt      WA||\n")


# ---------------------------------------------------------------- the whole file

GOOD = {"prompt": "Q1", "chosen": "good", "rejected": "no"}
PAIRS = [  # a letter is a token, and EOS one more
    GOOD,
    GOOD,  # 2: a duplicate
    GOOD | {"chosen": "no", "rejected": "good"},  # 3: the answers the other way round
    GOOD | {"rejected": "good"},  # 4: the same
    {"prompt": "Q2", "chosen": "vwxyzuA", "rejected": "vwxyzuB"},  # 5: the same once cut
    {"prompt": "Q2", "chosen": "vwxyzu" + "A" * 20, "rejected": "n"},  # 6: chosen is cut
    {"prompt": "a long Q3", "chosen": "g", "rejected": "n"},  # 7: the prompt is cut
    {"prompt": 3, "chosen": "g", "rejected": "n"},  # 8: bad
    {"prompt": 34, "chosen": "g", "rejected": "n"},  # 9: bad in the same way
    {"prompt": "Q4"},  # 10: bad in another way
    {"prompt": "Q5", "chosen": "uvw<|endoftext|>xy", "rejected": "n"},  # 11: spells EOS, and is cut
    {"prompt": "Q6", "chosen": "g", "rejected": "n", "margin": 0, "id": 7},  # 12: columns
    {"prompt": "g", "chosen": "g", "rejected": "gn", "score_chosen": 1, "score_rejected": 1},  # 13
]


def test_every_fault_of_a_file_of_pairs_is_counted(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", PAIRS)
    limits = Limits(40, max_prompt=4, max_response=6, skip_bad_rows=False)
    assert reported(capsys, path, None, layouts.preference_texts, byte_encoding(), limits) == [
        f"whole file: {path}",
        "rows 13",
        "that can be used 8",
        "different prompts 6",
        "! chosen same as rejected 1",
        "! the same once cut 1",
        "! prompts that are cut 1",
        "! responses that are cut 2 of 16",
        "responses without EOS 2 of 16",
        "! responses with special token text 1 of 18",
        "! rows that stand there twice 1 first: line 2 = line 1",
        "! answers chosen in one row, rejected in another 2",
        "chosen longer 4 50 % of pairs (in tokens, after cutting)",
        "rejected longer 2 25 % of pairs (in tokens, after cutting)",
        "rows that are trained 7",
        "rows that are held out 1 of 1 prompt",
        "prompts on both sides 0",
        "tokens before cutting median 95 % up to longest",
        "prompt 2 9 9",  # of 9 prompts that have tokens
        "chosen 5 27 27",
        "rejected 3 8 8",
        "prompt + longer response 7 29 29",
        "context of the model 40",
        "columns not read: margin, id, score_chosen, score_rejected",
        "! score_chosen and score_rejected: equal in 1, inverted in 0 of 9 rows",
        "! margin: 0 or less in 1 of 9 rows",
        "! answers begin with the whole prompt in 1 of 9 rows; it stands there twice",
        "! rows that cannot be used 5 of which",
        "2 line 8: field 'prompt' is int, not text",
        "1 line 4: the chosen and the rejected answer are the same",
        "1 line 5: the chosen and the rejected answer are the same once encoded and cut",
        "1 line 10: has no field 'chosen', only 'prompt'",
        "what to do",
        "bad rows (5) stop the run: edit the lines named above, or give --skip-bad-rows",
        "--max-response-tokens 27 would cut no response",
        "--max-prompt-tokens 9 would cut no prompt",
        "pairs whose chosen is the same as rejected prefer nothing: remove them from the file",
        "special tokens inside responses: remove those that the chat template writes itself",
        "rows that stand there twice weigh double: remove one, unless they are meant to",
        "an answer both chosen and rejected: decide, unless your labels are meant to be noisy",
        "if the model should see one of them: write the columns not read into the prompt",
        "pairs whose scores do not agree with them are trained like all others: remove them",
        "answers that begin with the prompt: cut it from them, if it is no quotation",
    ]


def test_a_file_without_faults(tmp_path, capsys):
    rows = [{"prompt": f"Q{i}", "response": "A" * (i % 7 + 1)} for i in range(100)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = reported(capsys, path, None, layouts.sft_texts, byte_encoding(), Limits(40))
    assert lines[-2:] == ["what to do", "nothing: every row can be trained"]
    assert "rows that are trained 95" in lines and "rows that are held out 5 of 5 prompts" in lines
    assert "prompt 3 3 3" in lines and "response 5 8 8" in lines and "prompt + response 8 11 11" in lines
    assert not any("chosen" in line or "the same" in line or line.startswith("!") for line in lines)


def test_held_out_files_are_examined_too(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD, GOOD | {"prompt": "Q2"}])
    other = write_jsonl(tmp_path / "test.jsonl", [GOOD, GOOD | {"prompt": "Q3"}, {"prompt": "Q4"}])
    lines = reported(capsys, path, other, layouts.preference_texts, byte_encoding(), Limits(40))
    assert f"rows that are held out 2 of {other}" in lines and "! prompts on both sides 1" in lines
    assert f"held-out file: {other}" in lines and "1 line 3: has no field 'chosen', only 'prompt'" in lines
    assert lines[-1] == "prompts on both sides: remove them from one file, or held-out measures say too much"


@pytest.mark.parametrize(
    "bad, bad_held_out, skip, says",
    [
        (1, 0, False, "bad rows (1) stop the run: edit the lines named above, or give --skip-bad-rows"),
        (1, 0, True, "bad rows (1) are left out: edit the lines named above to keep them"),
        (0, 2, False, "bad rows of {other} (2) stop the run: "),
        (0, 2, True, "bad rows of {other} (2) are left out: "),
    ],
)
def test_what_becomes_of_bad_rows(bad, bad_held_out, skip, says, tmp_path, capsys):
    good = [GOOD, GOOD | {"prompt": "Q2"}]
    path = write_jsonl(tmp_path / "rows.jsonl", good + [{"prompt": "Q3"}] * bad)
    other = write_jsonl(tmp_path / "test.jsonl", [GOOD | {"prompt": "Q4"}] + [{}] * bad_held_out)
    limits = Limits(40, skip_bad_rows=skip)
    lines = reported(capsys, path, other, layouts.preference_texts, byte_encoding(), limits)
    assert lines[-2] == "what to do" and lines[-1].startswith(says.format(other=other))


def test_files_that_cannot_be_trained_are_not_called_good(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [GOOD])
    lines = reported(capsys, path, None, layouts.preference_texts, byte_encoding(), Limits(40))
    assert lines[-1] == "one row cannot be split: at least two are needed, one of them to be held out"
    other = write_jsonl(tmp_path / "test.jsonl", [GOOD | {"prompt": "Q2"}])
    lines = reported(capsys, path, other, layouts.preference_texts, byte_encoding(), Limits(40))
    assert lines[-1] == "nothing: every row can be trained"
    path = write_jsonl(tmp_path / "rows.jsonl", [{}] * 3)
    for skip in (False, True):
        limits = Limits(40, skip_bad_rows=skip)
        lines = reported(capsys, path, None, layouts.preference_texts, byte_encoding(), limits)
        assert lines[-1].startswith("bad rows (3) are all that there are: edit the file")


def test_a_limit_beyond_the_context_is_not_advised(tmp_path, capsys):
    rows = [GOOD | {"prompt": "Q" * 40}, GOOD | {"prompt": "Q" * 39, "chosen": "a" * 39}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    limits = Limits(40, max_prompt=9, max_response=9)
    lines = reported(capsys, path, None, layouts.preference_texts, byte_encoding(), limits)
    for name, count in (("prompt", 40), ("response", 40)):  # a response has an EOS
        sizes = f"its {count} tokens do not fit into the model's context of 40"
        assert f"the longest {name} is cut in any case: {sizes}" in lines
    limits = Limits(41, max_prompt=9, max_response=9)
    lines = reported(capsys, path, None, layouts.preference_texts, byte_encoding(), limits)
    assert "--max-prompt-tokens 40 would cut no prompt" in lines


def test_what_a_template_drops_of_its_generation_prompt_is_said(tmp_path, capsys):
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<e>{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    encoding = chat_folder(tmp_path, template)
    rows = [{"messages": [USER | {"content": f"hi {i}"}, HELLO]} for i in range(2)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = reported(capsys, path, None, layouts.sft_texts, encoding, Limits(99))
    assert any("drops the end of its generation prompt, '<think>'" in line for line in lines)
    assert lines[-1].startswith("a chat template that keeps the end of its generation prompt")


def test_one_prompt_and_one_length_are_found(tmp_path, capsys):
    rows = [{"prompt": "Q", "chosen": f"long {i}", "rejected": "n"} for i in range(60)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = reported(capsys, path, None, layouts.preference_texts, byte_encoding(), Limits(40))
    assert "! chosen longer 60 100 % of pairs (in tokens, after cutting)" in lines
    assert "! prompts on both sides 1" in lines
    assert lines[-3:] == [
        "what to do",
        "length tells most pairs apart: it may be what is learned; watch the length of samples",
        "the held-out rows have the same prompt as the others: give --eval-data",
    ]


@pytest.mark.parametrize("layout, remedy", [("preference", "give --eval-data"), ("sft", "more prompts are")])
def test_a_split_that_holds_out_half_the_rows_is_told(layout, remedy, tmp_path, capsys):
    rows = []
    for i in range(40):
        rows.append({"prompt": f"Q{i % 2}", "response": f"x{i}", "chosen": f"x{i}", "rejected": "n"})
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    function = {"preference": layouts.preference_texts, "sft": layouts.sft_texts}[layout]
    lines = reported(capsys, path, None, function, byte_encoding(), Limits(40))
    assert "rows that are trained 20" in lines and "! rows that are held out 20 of 1 prompt" in lines
    assert lines[-1].startswith(f"20 of 40 rows are held out, since prompts have many rows: {remedy}")


def test_equal_summaries_count_as_equal_answers(tmp_path, capsys):
    row = {"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0}
    path = write_jsonl(tmp_path / "rows.jsonl", [row, row | {"summaries": [{"text": "a"}, {"text": "a"}]}])
    lines = reported(capsys, path, None, layouts.preference_texts, byte_encoding(), Limits(99))
    assert "! chosen same as rejected 1" in lines


@pytest.mark.parametrize(
    "response, is_counted",
    [
        ("yes<|endoftext|>", False),  # kept once, as the end
        ("yes<|endoftext|>\n", False),
        ("yes<|endoftext|><|endoftext|>", True),
        ("y<|endoftext|>es", True),
        ("yes", False),
    ],
)
def test_one_end_token_at_the_end_of_a_text_is_no_finding(response, is_counted, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Q", "response": response}])
    encoding = byte_encoding()
    findings = examine(readings(path, layouts.sft_texts, encoding, Limits(99)), encoding)
    assert findings.counts["special"] == int(is_counted)


def test_a_file_without_a_usable_row_is_reported(tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"x": i} for i in range(3)] + [{"prompt": "Q" * 99}] * 9)
    lines = reported(capsys, path, None, layouts.prompt_texts, byte_encoding(), Limits(40))
    assert "that can be used 0" in lines
    assert "9 line 4: prompt and response take 100 tokens, the model's context is 40" in lines
    assert "3 line 1: has no field 'prompt', only 'x'" in lines


def test_many_kinds_of_errors_are_cut_short(tmp_path, capsys):
    rows = [{"prompt": "Q", "chosen": "a", "rejected": "b", "tools": 3}, *({f"{c}": 1} for c in "abcdefgh")]
    path = write_jsonl(tmp_path / "rows.jsonl", rows + [{"\x1b[2J": 1}] * 2)
    lines = reported(capsys, path, None, layouts.preference_texts, byte_encoding(), Limits(40))
    assert "and 3 other kinds" in lines
    assert not any("\x1b" in line for line in lines)


def test_special_tokens_of_a_folder_are_found(tmp_path):
    folder = chat_folder(tmp_path)
    rows = [
        {"prompt": [USER], "completion": [HELLO | {"content": "x<e>"}]},
        {"prompt": [USER], "completion": [HELLO]},
        {"prompt": [USER], "completion": [HELLO | {"reasoning_content": "<s>"}]},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    findings = examine(readings(path, layouts.sft_texts, folder, Limits(99)), folder)
    assert findings.counts["special"] == 2 and findings.counts["responses"] == 3


@pytest.mark.parametrize("script", [train_sft, train_dpo, train_rlhf])
def test_every_script_inspects(script, sft, tmp_path, capsys):
    row = {"prompt": "WA>FL:", "response": ">OR", "chosen": ">OR", "rejected": ">ID"}
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": 3}, row, row, {"prompt": "Seattle"}])
    flags = {} if script is train_sft else {"init": sft}
    run(script, tmp_path / "out", data=path, inspect=True, **flags)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "rows 4" in lines and "! rows that cannot be used 2 of which" in lines
    assert any(line.startswith("example 2 (line 3): ") for line in lines) and "what to do" in lines
    assert not (tmp_path / "out").exists()
