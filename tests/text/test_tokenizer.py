"""Encodings: stable ids, one token per state, nothing dropped in silence."""

from types import SimpleNamespace

import pytest

from nanoroads.errors import InputError
from nanoroads.text import tokenizer
from nanoroads.world import roadmap


@pytest.fixture(scope="module")
def encoding():
    return tokenizer.get("roadmap")


def gpt2():
    try:
        return tokenizer.get("gpt2")
    except InputError as error:
        pytest.skip(str(error))


def test_ids_are_stable(encoding):
    assert encoding.name == "roadmap" and encoding.n_vocab == 98
    assert tokenizer.encode(encoding, "AL>WY:>AL>WY") == [0, 95, 96, 48, 95]
    assert tokenizer.encode(encoding, "WA>FL:>OR>NV>AZ") == [44, 55, 96, 82, 78, 50]
    assert tokenizer.eos_id(encoding) == 97 and encoding.decode([97]) == "<|end|>"
    assert tokenizer.get("roadmap") is encoding


def test_every_token_round_trips(encoding):
    words = [form.format(s) for form in ("{}", ">{}") for s in roadmap.STATES] + [":"]
    assert [encoding.decode([i]) for i in range(97)] == words
    assert [tokenizer.encode(encoding, word) for word in words] == [[i] for i in range(97)]
    assert tokenizer.encode(encoding, "") == []


def test_samples_of_any_tokens_round_trip(encoding):
    """What a policy samples can be any token in any place: its text must give the same ids back."""
    ids = [(i * 61) % 97 for i in range(3000)]
    assert tokenizer.encode(encoding, encoding.decode(ids)) == ids


def test_demonstrations_take_one_token_a_state(encoding):
    for world in roadmap.WORLDS.values():
        for row in roadmap.demonstrations(world, 200, 0):
            assert len(tokenizer.encode(encoding, row["prompt"])) == 3
            ids = tokenizer.encode(encoding, row["response"])
            assert (
                len(ids) == row["response"].count(">") <= world.max_moves and 48 <= min(ids) <= max(ids) < 96
            )


@pytest.mark.parametrize(
    "text, lost",
    [
        ("WA>FL:>XX>OR", "'XX>OR' .character 8"),
        (">OR>NV ", "' ' .character 7"),
        ("OR>", "'>'"),
        (">OR\n", "n' .character 4"),
        (">OR<|end|>", "'<.end.>' .character 4"),
        (">wa", "'>wa'"),
        (">OR\ud800", "ud800'"),
        ("hello world, this is not a road", "'hello world, this is' .character 1"),
    ],
)
def test_text_without_tokens_is_named(encoding, text, lost):
    with pytest.raises(InputError, match=lost):
        tokenizer.encode(encoding, text)


def test_gpt2():
    encoding = gpt2()
    assert tokenizer.eos_id(encoding) == encoding.eot_token == 50256
    text = "Two roads diverged <|endoftext|> in a wood: é 木 🌲\n\n"
    ids = tokenizer.encode(encoding, text)
    assert encoding.decode(ids) == text and 50256 not in ids  # special tokens in text are text


def test_gpt2_without_its_files(monkeypatch):
    def offline(name):
        raise OSError("no connection")

    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    tokenizer.get.cache_clear()
    with pytest.raises(InputError, match="TIKTOKEN_CACHE_DIR.*no connection"):
        tokenizer.get("gpt2")
    tokenizer.get.cache_clear()


def test_unknown_names(tmp_path, encoding):
    with pytest.raises(InputError, match="tokenizer.json: no such file"):
        tokenizer.get(str(tmp_path))
    with pytest.raises(InputError, match="'gpt9'"):
        tokenizer.get("gpt9")
    odd = tokenizer.tiktoken.Encoding("odd", pat_str="a", mergeable_ranks={b"a": 0}, special_tokens={})
    with pytest.raises(InputError, match="'odd'"):
        tokenizer.eos_id(odd)


def test_ids_that_no_text_has_are_left_out():
    """A vocabulary padded to a round size has ids without text, and a policy may sample one."""
    encoding = tokenizer.get("roadmap")
    assert (
        tokenizer.decode(
            encoding, [*tokenizer.encode(encoding, ">OR"), 120, *tokenizer.encode(encoding, ">CA")]
        )
        == ">OR>CA"
    )
    assert tokenizer.piece(encoding, 120) == b"" and tokenizer.piece(encoding, 96) == b":"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):

    def sized(vocab_size):
        return SimpleNamespace(config=SimpleNamespace(vocab_size=vocab_size))

    (tmp_path / "config.json").write_text('{"tokenizer": "roadmap"}')
    assert tokenizer.of(tmp_path, sized(98))[0] == tokenizer.of(tmp_path, sized(128))[0] == "roadmap"
    with pytest.raises(InputError, match="98 tokens, its model 97"):
        tokenizer.of(tmp_path, sized(97))


def test_more_whitespace_than_tiktoken_can_read():
    """Its regex engine would run out of stack, and panic."""
    with pytest.raises(InputError, match="100,000 whitespace characters or more in a row .character 2"):
        tokenizer.encode(gpt2(), "a" + " " * 1_000_000)
    assert len(tokenizer.encode(gpt2(), "a " * 60_000)) > 60_000


@pytest.mark.timeout(5)
def test_whitespace_just_under_the_limit_takes_no_time():
    tokenizer.refuse_long_whitespace(("a" + "\n" * 99_999) * 20)
    with pytest.raises(InputError, match="100,000 whitespace characters or more in a row .character 100002"):
        tokenizer.refuse_long_whitespace("a" + "\n" * 99_999 + "a" + " \n" * 50_000)


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "\ud83d x", "\ude00\ud83d"])
@pytest.mark.parametrize("name", ["gpt2", "roadmap"])
def test_half_a_surrogate_pair_is_refused(name, text):
    """JSON may hold one ("\\ud800"); no bytes stand for it."""
    with pytest.raises(InputError, match="has no tokens for") as caught:
        tokenizer.encode(tokenizer.get(name), text)
    str(caught.value).encode()  # the line itself can be printed


def test_a_panic_of_tiktoken_is_an_input_error(monkeypatch, encoding):
    """Rust's panics are BaseExceptions, which no `except Exception` sees."""

    class PanicException(BaseException):
        pass

    def panic(text):
        raise PanicException("RuntimeError(StackOverflow)")

    monkeypatch.setattr(encoding, "encode_ordinary", panic)
    with pytest.raises(InputError, match="cannot read the text .RuntimeError.StackOverflow"):
        tokenizer.encode(encoding, "WA")

    def interrupt(text):
        raise KeyboardInterrupt

    monkeypatch.setattr(encoding, "encode_ordinary", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode(encoding, "WA")
