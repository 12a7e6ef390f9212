"""What is absent is no key, and the same rows give the same tokens in JSONL and in parquet."""

import datetime
import decimal
import functools
import json
import os

import numpy
import pytest
from helpers.rows import ASKED, BYE, HELLO, USER, chat_folder, load
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoroads.errors import InputError
from nanoroads.text import data, layouts
from nanoroads.text.data import Limits
from nanoroads.text.rows import parse, write_rows
from nanoroads.text.values import plain

# How many rows to make at random; more than these are other rows each time.
EXAMPLES = int(os.environ.get("NANOROADS_EXAMPLES", 150))
DIALOGUES = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: bye"}
ABSENT = [None, "", [], {}, float("nan")]


@pytest.mark.parametrize("absent", ABSENT, ids=repr)
def test_a_field_that_is_absent_is_no_field(absent, encoding, rows):
    """As in concatenated data sets, in which every row has every column."""
    for row in (
        DIALOGUES | {"prompt": absent},
        {"prompt": absent, "chosen": [USER, HELLO], "rejected": [USER, BYE]},
        {"prompt": [USER], "chosen": [HELLO], "rejected": [BYE], "summaries": absent, "choice": absent},
        {"prompt": "hi", "messages": absent, "chosen": [HELLO], "rejected": [BYE], "tools": absent},
    ):
        found = [(ASKED, [" hello", " bye"])]
        assert load(rows(row), layouts.preference_texts, encoding)[0] == found
        assert load(rows(row), layouts.prompt_texts, encoding)[1] == [ASKED]
    for row in (
        {"messages": [USER, HELLO], "prompt": absent, "response": absent, "completion": absent},
        {"messages": absent, "prompt": [USER], "response": absent, "completion": [HELLO]},
        {"messages": absent, "conversations": [USER, HELLO], "response": absent},
    ):
        assert load(rows(row), layouts.sft_texts, encoding)[0] == [(ASKED, [" hello"])]
        assert load(rows(row), layouts.prompt_texts, encoding)[1] == [ASKED]


@pytest.mark.parametrize("absent", ABSENT, ids=repr)
def test_nothing_takes_the_place_of_what_is_absent(absent, encoding, rows):
    for row in (
        {"prompt": absent, "response": "A"},
        {"prompt": "Q", "response": absent},
        {"messages": absent},
        {"prompt": [USER], "completion": [HELLO | {"content": None}]},
        {"prompt": [USER], "completion": [None]},
        {"prompt": [USER], "completion": [HELLO | {"role": None}]},
    ):
        with pytest.raises(InputError, match="rows.jsonl:1: (has no field|field) '"):
            load(rows(row), layouts.sft_texts, encoding)
    info = {"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": absent}
    with pytest.raises(InputError, match="'choice' must be 0 or 1"):
        load(rows(info), layouts.preference_texts, encoding)


def test_plain_values():
    class Timestamp(datetime.datetime):
        """pandas has one that is not there, and not equal to itself."""

        def __ne__(self, other):
            return True

    day = datetime.date(2026, 1, 2)
    given_and_plain = [
        ({"a": None, "b": {"c": None, "d": 1}}, {"b": {"d": 1}}),
        ({"a": {"b": None}}, {"a": {}}),  # the object is there, with nothing in it
        ([None, {"a": None}], [None, {}]),  # a place in a list stays
        ((1, "x"), [1, "x"]),
        (numpy.array(["x", "y"]), ["x", "y"]),
        (numpy.array([[1.5, float("nan")]]), [[1.5, None]]),
        (numpy.int64(3), 3),
        (numpy.float32("nan"), None),
        (numpy.array([{"role": "user", "content": None}], dtype=object), [{"role": "user"}]),
        ({1: 2}, {"1": 2}),
        (decimal.Decimal("3"), 3),
        (decimal.Decimal("3.5"), 3.5),
        (decimal.Decimal("NaN"), None),
        (decimal.Decimal("-Infinity"), float("-inf")),
        (decimal.Decimal("1e300"), 1e300),
        (day, "2026-01-02"),
        (Timestamp(2026, 1, 2), None),
        (b"\xc3\xa9", "é"),
        (b"\xff", b"\xff"),
        ({"a": float("nan"), "b": False, "c": 0, "d": ""}, {"b": False, "c": 0, "d": ""}),
    ]
    for value, expected in given_and_plain:
        assert plain(value) == expected, repr(value)
    with pytest.raises(InputError, match="field 'prompt' is bytes, not text"):
        layouts.sft_texts(parse({"prompt": b"\xff", "response": "A"}))


# ---- parquet

WORDS = st.sampled_from(["hi", "é木", "a b"])
ARGUMENTS = st.fixed_dictionaries({"city": WORDS}, optional={"unit": WORDS, "days": st.integers(1, 3)})
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": WORDS, "arguments": ARGUMENTS})}),
    min_size=1,
    max_size=2,
)
ANSWERS = st.one_of(
    st.fixed_dictionaries({"role": st.just("assistant"), "content": WORDS}, optional={"tool_calls": CALLS}),
    st.fixed_dictionaries({"role": st.just("assistant"), "tool_calls": CALLS}),
)
PROPERTIES = st.fixed_dictionaries({"city": ARGUMENTS}, optional={"unit": ARGUMENTS})
TOOLS = st.lists(
    st.fixed_dictionaries({"name": WORDS}, optional={"parameters": PROPERTIES}), min_size=1, max_size=2
)
ROWS = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"prompt": st.just([USER]), "chosen": ANSWERS.map(lambda m: [m]), "rejected": st.just([BYE])},
            optional={"tools": TOOLS, "score": st.floats(0, 9)},
        ),
        st.fixed_dictionaries({"chosen": st.just([USER, HELLO]), "rejected": st.just([USER, BYE])}),
    ),
    min_size=1,
    max_size=5,
)
TEMPLATE = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<e>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_parquet_gives_the_tokens_of_jsonl(tmp_path_factory):
    """It gives every object every key; the order of the keys is the first row's."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder = tmp_path_factory.mktemp("rows")
    tokenizer = chat_folder(folder, TEMPLATE)

    @settings(max_examples=EXAMPLES // 4, deadline=None, derandomize=EXAMPLES == 150)
    @given(ROWS)
    def check(rows):
        names = dict.fromkeys(name for row in rows for name in row)
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
        parquet.write_table(table, folder / "rows.parquet")
        # A JSONL file whose keys have parquet's order, without its nulls.
        write_rows(folder / "rows.jsonl", [plain(row) for row in table.to_pylist()])
        write_rows(folder / "as_given.jsonl", rows)
        texts = {}
        for name in ("rows.parquet", "rows.jsonl", "as_given.jsonl"):
            loaded = data.load(folder / name, layouts.preference_texts, tokenizer, Limits(9999))
            texts[name] = [loaded.prompts, loaded.responses, loaded.texts]
        assert texts["rows.parquet"] == texts["rows.jsonl"]
        for given_text, text in zip(texts["as_given.jsonl"][2], texts["rows.parquet"][2], strict=True):
            assert sorted(given_text) == sorted(text) and "null" not in text and "None" not in text

    check()


def test_parquet_maps_are_objects(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    kinds = pyarrow.struct(
        [
            ("role", pyarrow.string()),
            ("content", pyarrow.string()),
            ("tool_calls", pyarrow.list_(pyarrow.map_(pyarrow.string(), pyarrow.string()))),
        ]
    )
    call = {"role": "assistant", "content": None, "tool_calls": [[("name", "sky")]]}
    messages = pyarrow.array([[USER | {"tool_calls": None}, call]], pyarrow.list_(kinds))
    parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "rows.parquet")
    template = TEMPLATE.replace("c.function", "c")
    loaded = data.load(
        tmp_path / "rows.parquet", layouts.sft_texts, chat_folder(tmp_path, template), Limits(99)
    )
    assert chat_folder(tmp_path).decode(loaded.responses[0][0]) == '{"name": "sky"}<e>'


# ---- rows made at random

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(0, 2), st.floats(), WORDS, st.just(""))
PARTS = st.one_of(SCALARS, st.fixed_dictionaries({}, optional={"type": SCALARS, "text": SCALARS}))
MESSAGES = st.one_of(
    SCALARS,
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "gpt", None, 3])},
        optional={"content": st.one_of(SCALARS, st.lists(PARTS, max_size=2)), "tool_calls": SCALARS},
    ),
)
WRITTEN = st.lists(MESSAGES, max_size=2).map(json.dumps)
DIALOGUE = st.sampled_from([*DIALOGUES.values(), "\n\nHuman: hi", "Assistant: x", ASKED])
FIELDS = st.one_of(SCALARS, MESSAGES, st.lists(MESSAGES, max_size=3), WRITTEN, DIALOGUE)
NAMES = ["prompt", "chosen", "rejected", "messages", "conversations", "response", "completion", "tools"]
NAMES += ["summaries", "choice", "info", "label", "margin", "score_chosen", "score_rejected", "system"]
STARTS = [{}, {"prompt": "Q", "chosen": "a", "rejected": "b"}, DIALOGUES, {"messages": [USER, HELLO]}]


@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 150)
@given(st.sampled_from(STARTS), st.dictionaries(st.sampled_from(NAMES), FIELDS, max_size=5))
def test_no_row_gives_a_traceback(start, changes):
    row = parse(json.dumps(start | changes).encode())
    all_layouts = [layouts.sft_texts, layouts.preference_texts, layouts.prompt_texts]
    for layout in (*all_layouts, functools.partial(layouts.sft_texts, template="{system}: {margin}")):
        try:
            texts = layout(row)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        for text in [texts.prompt, *texts.answers]:
            assert text and isinstance(text, (str, list)) and isinstance(texts.prompt, type(text))
        for answer in texts.answers:
            assert isinstance(answer, str) or [message["role"] for message in answer] == ["assistant"]
