"""--inspect: what the loss sees of the first rows."""

from array import array

from nanoroads.run.inspect import inspect
from nanoroads.text import data, layouts, tokenizer
from nanoroads.text.rows import write_rows


def test_inspect_shows_what_is_trained(tmp_path, capsys):
    encoding = tokenizer.get("roadmap")
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"prompt": "WA>FL:", "chosen": ">ID>MT", "rejected": ">OR"}] * 5)
    inspect(data.load(path, layouts.preference_texts, encoding, data.Limits(50)), encoding, examples=2)
    out = capsys.readouterr().out
    one = "  prompt      WA|>FL|:|\n  response 1  [>ID][>MT][<|end|>]\n  response 2  [>OR][<|end|>]\n"
    heads = [f"example {i}: 5 of 8 tokens are trained, those in [brackets]\n" for i in (1, 2)]
    assert out == heads[0] + one + heads[1] + one
    inspect(data.load(path, layouts.prompt_texts, encoding, data.Limits(50)), encoding, examples=1)
    head = "example 1: 0 of 3 tokens are trained, those in [brackets]\n"
    assert capsys.readouterr().out == head + "  prompt      WA|>FL|:|\n"


def test_ids_without_text_are_shown_empty(capsys):
    """A vocabulary that is padded to a round size has ids that no text has."""
    rows = data.Rows([array("i", [44, 120])], [[]], ["WA"])
    inspect(rows, tokenizer.get("roadmap"))
    assert capsys.readouterr().out.endswith("\n  prompt      WA||\n")
