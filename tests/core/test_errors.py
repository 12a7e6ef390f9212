"""Text that came from a file never rewrites the terminal."""

import unicodedata

from nanoroads.errors import printable


def test_every_control_character_is_escaped_and_all_else_is_kept():
    """By Unicode's own tables: category Cc is control, Cs are halves of pairs, and bidirectional
    overrides, embeddings and isolates have classes of their own."""
    reorders = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for code in range(0x110000):
        character = chr(code)
        is_control = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
        if is_control or unicodedata.bidirectional(character) in reorders:
            expected = f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
            assert printable(character) == expected
        else:
            assert printable(character) == character


def test_what_is_around_them_stays():
    assert printable("a\x1b[31mb\r\n\tc\u202edé\udc80🌲") == "a\\x1b[31mb\\x0d\n\tc\\u202edé\\udc80🌲"
