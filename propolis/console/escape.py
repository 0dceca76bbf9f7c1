"""How the user of a raw terminal leaves: by one key, or by ~. at the beginning of a line, as with ssh."""

from __future__ import annotations

from propolis.errors import ConfigError

DEFAULT_ESCAPE = 0x1D  # Ctrl-]
_TILDE, _DOT = ord("~"), ord(".")
_ENDS_OF_LINE = b"\r\n"


def parse_escape(text: str) -> int | None:
    """The byte that leaves: "^]", "ctrl-]" or a single character; None for "none"."""
    if text.lower() == "none":
        return None
    key = text.removeprefix("^") if len(text) == 2 else text
    is_control = key != text
    if text.lower().startswith("ctrl-"):
        key, is_control = text[5:], True
    if len(key) != 1 or not key.isascii():
        raise ConfigError(f"escape key {text!r}: expected '^]', 'ctrl-]', one character, or 'none'")
    code = ord(key.upper()) if is_control else ord(key)
    if not is_control:
        return code
    if key == "?":
        return 0x7F
    if not 0x40 <= code <= 0x5F:
        raise ConfigError(f"escape key {text!r}: there is no such control key")
    return code & 0x1F


def escape_name(code: int) -> str:
    """What to press for a byte."""
    if code == 0x7F:
        return "Ctrl-?"
    return f"Ctrl-{chr(code | 0x40)}" if code < 0x20 else repr(chr(code))


class Escapes:
    """Tells the guest's keys from the user's wish to leave. A tilde that may begin one waits for the next key."""

    def __init__(self, key: int | None = DEFAULT_ESCAPE) -> None:
        """Without a `key` everything is the guest's."""
        self._key = key
        self._is_at_line_start = True
        self._has_tilde = False

    @property
    def hint(self) -> str:
        """What to press, for people."""
        return "" if self._key is None else f"{escape_name(self._key)} or ~. leaves"

    def take(self, data: bytes) -> tuple[bytes, bool]:
        """What of the typed `data` is the guest's, and whether the user leaves after that."""
        key = self._key
        if key is None:
            return data, False
        if not self._has_tilde and key not in data and b"~" not in data:
            if data:
                self._is_at_line_start = data[-1] in _ENDS_OF_LINE
            return data, False
        passed = bytearray()
        for byte in data:
            if byte == key:
                return bytes(passed), True
            if self._has_tilde:
                if byte == _DOT:
                    return bytes(passed), True
                self._has_tilde = False
                passed.append(_TILDE)
                if byte == _TILDE:  # typed twice, it is meant once
                    continue
            elif byte == _TILDE and self._is_at_line_start:
                self._has_tilde = True
                self._is_at_line_start = False
                continue
            passed.append(byte)
            self._is_at_line_start = byte in _ENDS_OF_LINE
        return bytes(passed), False
