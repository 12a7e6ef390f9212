"""One row -> tokens: what is special, where the prompt ends, what ends a response, what is refused.

The right values are those of transformers and of TRL's way to tokenise pairs, written out here."""

import json

import pytest
import test_chat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_chat import BOT, CHATML, LLAMA3, MISTRAL, QWEN, SPECIAL, USER

from nanoroads.errors import InputError
from nanoroads.text import data, layouts, tokenizer
from nanoroads.text.encode import encode_row

# R1's distilled models: the generation prompt opens <think>, earlier thoughts are dropped.
THINK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<U>' + m.content }}"
    "{% else %}{{ '<A>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ 'tools ' + tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ 'call ' + call.function | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen": QWEN,
    "mistral": MISTRAL,
    "think": THINK,
    "tools": TOOLS,
}
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo<|im_end|>"}}}


def make(folder, template=None, **config):
    folder.mkdir(exist_ok=True)
    return test_chat.make(folder, template, **config)


def from_transformers(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def common_beginning(one, other):
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


def as_trl(hf, prompt, answers, tools=None):
    """TRL 1.16's DPOTrainer: the prompt ends where the first answer's conversation parts from it."""
    options = {"tools": tools, "return_dict": False}
    prompt_ids = hf.apply_chat_template(prompt, add_generation_prompt=True, **options)
    wholes = [hf.apply_chat_template([*prompt, answer], **options) for answer in answers]
    ends = min(common_beginning(prompt_ids, whole) for whole in wholes)
    return prompt_ids[:ends], [whole[ends:] for whole in wholes]


def texts(encoding, row):
    """(prompt, [response]) of an EncodedRow as text."""
    return encoding.decode(row.prompt), [encoding.decode(response) for response in row.responses]


# ---------------------------------------------------------------- what is special


@pytest.mark.parametrize(
    "answer, trained",
    [
        ("The Loire.<|im_end|>", "The Loire.<|im_end|>"),
        ("The Loire.", "The Loire.<|im_end|>"),
        ("The Loire.<|im_end|>\n", "The Loire.<|im_end|>"),
        ("The Loire.<|im_end|> \n<|im_end|>", "The Loire.<|im_end|>"),
        ("The <|im_end|>Loire. ", "The <|im_end|>Loire. <|im_end|>"),
        ("<s>The Loire.", "<s>The Loire.<|im_end|>"),
    ],
)
@pytest.mark.parametrize("template", [None, CHATML])
def test_text_rows_that_a_recipe_has_rendered(tmp_path, template, answer, trained):
    encoding = make(tmp_path, template)
    prompt = "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n"
    row = encode_row(encoding, prompt, [answer])
    hf = from_transformers(tmp_path)
    assert row.prompt == hf(prompt).input_ids and row.text == prompt
    assert row.responses == [hf(trained).input_ids]
    # What a user typed spells no special token.
    assert encode_row(encoding, prompt, typed=True).prompt == tokenizer.encode(encoding, prompt)
    assert not set(encode_row(encoding, prompt, typed=True).prompt) & {encoding.ids[text] for text in SPECIAL}


@pytest.mark.parametrize("name, eos", [("gpt2", "<|endoftext|>"), ("roadmap", "<|end|>")])
def test_the_special_tokens_of_other_encodings(name, eos):
    encoding = tokenizer.get(name)
    eos_id = tokenizer.eos_id(encoding)
    row = encode_row(encoding, f"WA>FL:{eos}", [f">OR{eos}", ">OR"])
    assert row.prompt.count(eos_id) == 1 and row.responses[0] == row.responses[1]
    assert row.responses[0].count(eos_id) == 1 and row.responses[0][-1] == eos_id
    messages = [{"role": "user", "content": f"WA{eos}"}, {"role": "assistant", "content": f"OR{eos}"}]
    if name == "gpt2":
        row = encode_row(encoding, messages, [[BOT]])
        assert row.prompt.count(eos_id) == 1 and row.text == encoding.decode(row.prompt)
        with pytest.raises(InputError, match="has no tokens"):
            encode_row(tokenizer.get("roadmap"), f"WA>FL:{eos}", typed=True)


def test_special_tokens_without_a_template(tmp_path):
    """Dialogues as HH-RLHF writes them: the same rule."""
    encoding = make(tmp_path)
    bot = BOT | {"content": "a<s>b"}
    row = encode_row(
        encoding, [USER | {"content": "<s>"}, bot, USER], [[bot], [BOT | {"content": "x<|im_end|>"}]]
    )
    assert row.prompt.count(encoding.ids["<s>"]) == 1 and row.text == encoding.decode(row.prompt)
    assert texts(encoding, row)[1] == [" a<s>b<|im_end|>", " x<|im_end|>"]
    assert row.responses[0][-1] == row.responses[1][-1] == encoding.eos
    assert [response.count(encoding.ids["<s>"]) for response in row.responses] == [1, 0]


def test_a_special_token_takes_the_whitespace_around_it(tmp_path):
    """lstrip and rstrip, as Phi's tokens have them."""
    encoding = make(tmp_path, CHATML)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["lstrip"] = token["content"] in ("<s>", "<|im_end|>")
        token["rstrip"] = token["content"] in ("<s>", "<|im_start|>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer.get.cache_clear()
    encoding = tokenizer.get(str(tmp_path))
    hf = from_transformers(tmp_path)
    for text in ("a <s> \n b", " <s>", "a <|im_end|> b <|im_start|> c", "<s> <s> <|im_end|>\n<|im_start|>\n"):
        assert tokenizer.encode_with_special(encoding, text) == hf(text).input_ids, text
    assert encode_row(encoding, [USER, BOT]).prompt == hf.apply_chat_template(
        [USER, BOT], add_generation_prompt=True, return_dict=False
    )


# ---------------------------------------------------------------- where the prompt ends


def test_a_generation_prompt_that_opens_think(tmp_path):
    encoding = make(tmp_path, THINK)
    answers = [BOT | {"content": f"<think>\nhm\n</think>\n\n{number}"} for number in (4, 5)]
    row = encode_row(encoding, [USER], [[answer] for answer in answers])
    assert (row.prompt, row.responses) == as_trl(from_transformers(tmp_path), [USER], answers)
    assert texts(encoding, row) == (row.text, ["\n\n4<|im_end|>", "\n\n5<|im_end|>"])
    assert row.text.endswith("<A>") and row.left_out == "<think>\n"
    # Alone, the prompt keeps what the template writes for sampling.
    alone = encode_row(encoding, [USER])
    assert encoding.decode(alone.prompt) == alone.text == row.text + "<think>\n" and alone.left_out == ""


def test_what_the_template_drops_is_told_once_per_file(tmp_path, capsys):
    make(tmp_path, THINK)
    row = {"prompt": [USER], "chosen": [BOT | {"content": "4"}], "rejected": [BOT | {"content": "5"}]}
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(row)}\n" * 3)
    encoding = tokenizer.get(str(tmp_path))
    data.load(path, layouts.preference_texts, encoding, data.Limits(200))
    out = capsys.readouterr().out
    assert out.count("drops the end of its generation prompt, '<think>\\n'") == 1 and out.count("\n") == 1
    data.load(path, layouts.prompt_texts, encoding, data.Limits(200))
    assert capsys.readouterr().out == ""


def test_a_response_is_trained_behind_the_prompt_that_it_is_sampled_behind(tmp_path):
    """GPT-2's pattern cuts "\\n\\nTo" into three, so TRL would train two line breaks before each answer."""
    make(tmp_path, LLAMA3)  # its generation prompt ends in two line breaks
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["model"]["vocab"]["ĊĊ"] = 256
    for token in spec["added_tokens"]:
        token["id"] += 1
    spec["model"]["merges"] = [["Ċ", "Ċ"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer.get.cache_clear()
    encoding = tokenizer.get(str(tmp_path))
    hf = from_transformers(tmp_path)
    row = encode_row(encoding, [USER], [[BOT], [BOT | {"content": "x"}]])
    sampled = hf.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert row.prompt == sampled == encode_row(encoding, [USER]).prompt and sampled[-1] == 256
    assert texts(encoding, row)[1] == ["To 'FL' & \"back\"<|im_end|>", "x<|im_end|>"] and row.left_out == ""
    assert as_trl(hf, [USER], [BOT])[0] == sampled[:-1]


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    """Else the user's words would be trained."""
    shout = (
        "{% for m in messages %}{{ m.content | upper if messages | length > 1 else m.content }}{% endfor %}"
    )
    encoding = make(tmp_path, shout)
    with pytest.raises(InputError, match="writes the prompt differently once an answer follows"):
        encode_row(encoding, [{"role": "user", "content": "Ab"}], [[BOT]])


def test_an_answer_that_the_template_drops_is_refused(tmp_path):
    encoding = make(
        tmp_path, "{% for m in messages %}{{ m.content if m.role == 'user' }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(InputError, match="leaves it out"):
        encode_row(encoding, [USER], [[BOT]])
    with pytest.raises(InputError, match="leaves it out"):
        encode_row(make(tmp_path, THINK), [USER], [[BOT | {"content": "<think>only a thought</think>"}]])


@pytest.mark.parametrize("template", [None, CHATML, TOOLS])
@pytest.mark.parametrize("between", [USER, {"role": "tool", "content": "rain"}, BOT])
def test_an_answer_of_several_turns_is_refused(tmp_path, template, between):
    encoding = make(tmp_path, template)
    with pytest.raises(InputError, match=f"several turns .assistant, {between['role']}, assistant"):
        encode_row(encoding, [USER], [[BOT], [BOT, between, BOT]])


WORDS = [
    "hi",
    "\n",
    " ",
    "  x",
    "é",
    "木",
    "\ue000",
    "<",
    "im_end|>",
    "12",
    "\u0301",
    "👩‍👧",
    "{{ x }}",
    "</think>",
]
PLAIN = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join)
ANSWERS = st.lists(st.sampled_from(WORDS + SPECIAL), min_size=1, max_size=5).map("".join)
OTHERS = st.builds(dict, role=st.sampled_from(["user", "system", "tool"]), content=PLAIN)
BOTS = st.builds(dict, role=st.just("assistant"), content=ANSWERS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_conversations_as_trl(tmp_path_factory, name):
    """Special tokens in the assistant's words only: the very ids of transformers and TRL."""
    folder = tmp_path_factory.mktemp(name)
    encoding = make(folder, TEMPLATES[name])
    hf = from_transformers(folder)
    compared = []

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(OTHERS | BOTS, min_size=1, max_size=4), BOTS, BOTS)
    def compare(prompt, chosen, rejected):
        if any(special in message["content"] for message in prompt for special in SPECIAL):
            prompt = [message for message in prompt if message["role"] == "assistant"] or [USER]
        try:
            expected = as_trl(hf, prompt, [chosen, rejected])
        except Exception:  # the template refuses the order of the roles
            with pytest.raises(InputError):
                encode_row(encoding, prompt, [[chosen], [rejected]])
            return
        try:
            row = encode_row(encoding, prompt, [[chosen], [rejected]])
        except InputError as error:
            assert "leaves it out" in str(error)  # of blanks and ends alone
            return
        assert row.prompt == expected[0]
        for ours, theirs in zip(row.responses, expected[1], strict=True):
            # Ours ends with the token that ends it; theirs goes on with blanks and more of it.
            assert ours[-1] == encoding.eos and ours[:-1] == theirs[: len(ours) - 1]
            assert not hf.decode(theirs[len(ours) - 1 :], skip_special_tokens=True).strip()
        compared.append(row)

    compare()
    assert len(compared) >= (1 if name == "mistral" else 15)


# ---------------------------------------------------------------- what ends a response


def test_a_response_ends_with_the_token_that_the_template_writes(tmp_path):
    """Two tokens end a response, as in Llama-3-8B-Instruct; the tokenizer names the other one."""
    encoding = make(tmp_path, CHATML, eos_token="<s>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, 258]}))
    tokenizer.get.cache_clear()
    encoding = tokenizer.get(str(tmp_path))
    assert tokenizer.stop_ids(encoding) == (256, 258) and tokenizer.eos_id(encoding) == 256
    assert texts(encoding, encode_row(encoding, [USER], [[BOT]]))[1] == [BOT["content"] + "<|im_end|>"]
    assert texts(encoding, encode_row(encoding, "Hi", ["x"]))[1] == ["x<s>"]  # text rows: the tokenizer's
    # Phi-3's template writes both; sampling stops at the first.
    both = CHATML + "{% if not add_generation_prompt %}<s>{% endif %}"
    encoding = make(tmp_path, both, eos_token="<s>")
    assert texts(encoding, encode_row(encoding, [USER], [[BOT]]))[1] == [BOT["content"] + "<|im_end|>"]
    # A sampled response may end with either, and loses it only at its end.
    [a] = tokenizer.encode(encoding, "a")
    sampled = [[a, 258], [a, 256], [256, a], [258, 256], []]
    assert tokenizer.decode_all(encoding, sampled) == ["a", "a", "<s>a", "<|im_end|>", ""]


@pytest.mark.parametrize("behind", ["", "\n---\n", "<|im_start|>assistant\n", "<s>\n"])
def test_what_the_template_writes_behind_an_answer_ends_it(tmp_path, behind):
    """ChatML on a base model: no file names <|im_end|>. The right tokens are TRL's up to it."""
    encoding = make(tmp_path, CHATML + behind, eos_token="<s>")
    assert tokenizer.stop_ids(encoding) == (256, 258) and tokenizer.eos_id(encoding) == 256
    answers = [BOT, BOT | {"content": "a<|im_end|>\nb"}, BOT | {"content": "---"}]
    expected = as_trl(from_transformers(tmp_path), [USER], answers)[1]
    row = encode_row(encoding, [USER], [[answer] for answer in answers])
    for answer, ours, theirs in zip(answers, row.responses, expected, strict=True):
        count = 1 + answer["content"].count("<|im_end|>")
        places = [place for place, token in enumerate(theirs) if token == 258]
        assert ours == theirs[: places[count - 1] + 1]
    assert tokenizer.decode_all(encoding, row.responses[:1]) == [BOT["content"]]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}",
        "{% for m in messages %}{{ '<|im_start|>' + m.content }}{% endfor %}",
        "{{ raise_exception('no') }}",
        "{{ messages[1:] | length }}",
        "{% for %}",
    ],
)
def test_a_token_that_opens_a_turn_ends_none(tmp_path, template):
    encoding = make(tmp_path, template, eos_token="<s>")
    assert tokenizer.stop_ids(encoding) == (256,)
    assert texts(encoding, encode_row(encoding, "Hi", ["x"]))[1] == ["x<s>"]
