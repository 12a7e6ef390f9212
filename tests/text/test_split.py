"""Which rows are held out: by prompt, and where no prompt comes twice the last ones."""

from array import array

import pytest

from nanoroads.errors import InputError
from nanoroads.text import data, layouts
from nanoroads.text.data import Limits
from nanoroads.text.split import held_out_rows


def rows_of(prompts):
    """data Rows with one-token prompts, told apart by their responses and texts."""
    numbers = range(len(prompts))
    arrays = [array("i", [prompt]) for prompt in prompts]
    return data.Rows(arrays, [[array("i", [i])] for i in numbers], [str(i) for i in numbers])


@pytest.mark.parametrize("n, held", [(2, 1), (19, 1), (100, 5), (10_000, 256)])
def test_the_last_rows_where_no_prompt_comes_twice(n, held):
    train, test = data.hold_out(rows_of(range(n)))
    assert train.texts == [str(i) for i in range(n - held)]
    assert test.texts == [str(i) for i in range(n - held, n)]
    assert [prompt[0] for prompt in test.prompts] == list(range(n - held, n))
    assert [group[0][0] for group in test.responses] == list(range(n - held, n))


@pytest.mark.parametrize(
    "prompts, held_out",
    [
        ([i // 4 for i in range(100)], [96, 97, 98, 99]),  # 25 prompts, 4 pairs each
        ([i // 2 for i in range(100)], [96, 97, 98, 99]),  # each row doubled
        ([*range(50), *range(50)], [48, 49, 98, 99]),  # a file catenated with itself
        ([0, *range(1, 50), *[0] * 50], [45, 46, 47, 48, 49]),  # a prompt with too many rows, at the end
        ([0, 0, 0, 1, 1, 0], [3, 4]),  # every prompt has more than 5 %: the one with the fewest rows
    ],
)
def test_no_prompt_is_on_both_sides(prompts, held_out, capsys):
    train, test = data.hold_out(rows_of(prompts), "rows.jsonl")
    assert test.texts == [str(i) for i in held_out]
    assert sorted(map(int, train.texts + test.texts)) == list(range(len(prompts)))
    assert not {p.tobytes() for p in train.prompts} & {p.tobytes() for p in test.prompts}
    kinds = len(set(prompts)), len({prompts[i] for i in held_out})
    says = f"held out {len(held_out)} of {len(prompts)} rows, those of {kinds[1]} of {kinds[0]} prompts\n"
    assert capsys.readouterr().out == f"rows.jsonl: {says}"


def test_every_split_leaves_something_on_both_sides():
    """All files of up to 7 rows with up to 3 prompts."""
    for n in range(2, 8):
        for code in range(3**n):
            prompts = [code // 3**i % 3 for i in range(n)]
            held_out = held_out_rows([bytes([prompt]) for prompt in prompts], share=0.3, most=3)
            rest = [i for i in range(n) if i not in held_out]
            assert held_out and rest and held_out == sorted(held_out)
            if len(set(prompts)) > 1:
                assert not {prompts[i] for i in held_out} & {prompts[i] for i in rest}


def test_a_single_prompt_is_said(capsys):
    train, test = data.hold_out(rows_of([7] * 40), "rows.jsonl")
    assert (len(train), len(test)) == (38, 2)
    says = "all 40 rows have one prompt, so the 2 held-out rows share it"
    assert capsys.readouterr().out == f"rows.jsonl: {says}\n"
    with pytest.raises(InputError, match="rows.jsonl: holds one row"):
        data.hold_out(rows_of([7]), "rows.jsonl")


def test_prompts_are_compared_as_the_model_reads_them(encoding, rows):
    """Cut to the same tokens, two texts are one prompt; RL samples it once, and keeps the first text."""
    path = rows(*({"prompt": f"{i}same", "chosen": f"a{i}", "rejected": "b"} for i in range(40)))
    loaded = data.load(path, layouts.preference_texts, encoding, Limits(50, max_prompt=4))
    assert len(loaded.unique_prompts()) == 1 and loaded.unique_prompts().texts == ["0same"]
    train, test = data.hold_out(loaded)
    assert {bytes(p) for p in train.prompts} == {bytes(p) for p in test.prompts}
    whole = data.load(path, layouts.preference_texts, encoding, Limits(50))
    assert len(whole.unique_prompts()) == 40


def test_held_out_files_that_share_prompts(encoding, rows, capsys):
    path = rows(*({"prompt": f"Q{i}", "chosen": "a", "rejected": "b"} for i in range(9)))
    other = rows(
        *({"prompt": f"Q{i}", "chosen": "c", "rejected": "d"} for i in (8, 8, 9, 10)), name="test.jsonl"
    )
    train, test = data.load_split(path, other, layouts.preference_texts, encoding, Limits(50))
    assert (len(train), len(test)) == (9, 4)
    assert capsys.readouterr().out == f"{other}: 1 of its 3 prompts are also in {path}\n"
