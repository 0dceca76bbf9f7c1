"""How to leave a raw terminal: the key, and ~. at the beginning of a line."""

import random

import pytest

from propolis.console.escape import Escapes, escape_name, parse_escape
from propolis.errors import ConfigError


@pytest.mark.parametrize(
    ("typed", "passed", "leaves"),
    [
        (b"", b"", False),
        (b"ls\r", b"ls\r", False),
        (b"before\x1dafter", b"before", True),
        (b"~.", b"", True),
        (b"ls\r~.rest", b"ls\r", True),
        (b"ls\n~.", b"ls\n", True),
        (b"cd ~.\r", b"cd ~.\r", False),
        (b"~/bin\r", b"~/bin\r", False),
        (b"~~.\r", b"~.\r", False),
        (b"~~~.", b"~~.", False),
        (b"\r~\r~.", b"\r~\r", True),
        (b"~\x1d", b"", True),
        (b"~", b"", False),
        (b"~x~.", b"~x~.", False),
        (b"\x00\xff~.", b"\x00\xff~.", False),
    ],
)
def test_what_is_the_guest_s_and_what_leaves(typed: bytes, passed: bytes, leaves: bool) -> None:
    assert Escapes().take(typed) == (passed, leaves)


def test_any_pieces_are_taken_as_the_whole() -> None:
    chance = random.Random(7)
    for _ in range(2000):
        typed = bytes(chance.choices(b"~.\r\nab", k=chance.randrange(12)))
        whole = Escapes().take(typed)
        escapes, passed, leaves, at = Escapes(), b"", False, 0
        while at < len(typed) and not leaves:
            size = chance.randrange(1, 4)
            piece, leaves = escapes.take(typed[at : at + size])
            passed += piece
            at += size
        assert (passed, leaves) == whole, typed


def test_another_key() -> None:
    escapes = Escapes(0x01)
    assert escapes.hint == "Ctrl-A or ~. leaves"
    assert escapes.take(b"\x1d\x01") == (b"\x1d", True)


def test_nothing_leaves() -> None:
    escapes = Escapes(None)
    assert escapes.hint == ""
    assert escapes.take(b"~.\x1d") == (b"~.\x1d", False)


@pytest.mark.parametrize(
    ("text", "code", "name"),
    [
        ("^]", 0x1D, "Ctrl-]"),
        ("ctrl-]", 0x1D, "Ctrl-]"),
        ("^a", 0x01, "Ctrl-A"),
        ("Ctrl-A", 0x01, "Ctrl-A"),
        ("^@", 0x00, "Ctrl-@"),
        ("^?", 0x7F, "Ctrl-?"),
        ("^^", 0x1E, "Ctrl-^"),
        ("~", 0x7E, "'~'"),
        ("^", 0x5E, "'^'"),
        ("\x1d", 0x1D, "Ctrl-]"),
    ],
)
def test_escape_keys(text: str, code: int, name: str) -> None:
    assert parse_escape(text) == code
    assert escape_name(code) == name


def test_no_escape_key() -> None:
    assert parse_escape("none") is None


@pytest.mark.parametrize("text", ["", "ab", "^1", "^é", "é", "ctrl-", "ctrl-ab", "^]]"])
def test_what_is_no_escape_key(text: str) -> None:
    with pytest.raises(ConfigError, match="escape key"):
        parse_escape(text)
