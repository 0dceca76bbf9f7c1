"""Where each key of a TOML document stands, as a line and a column.

The parser that reads the values gives no places. This walks the text a second time, only once something in it has to be
reported, and only text which that parser accepted: it need not tell right from wrong, just keys from values.
"""

from __future__ import annotations

from typing import NamedTuple

Path = tuple[str | int, ...]

# Past the depth of any grammar of ours, values are skipped as a whole and longer paths are not told apart: this bounds
# recursion and memory, whatever the document looks like.
_MAX_DEPTH = 8
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "e": "\x1b", '"': '"', "\\": "\\"}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


class Place(NamedTuple):
    """Line and column, both from 1; the column counts characters."""

    line: int
    column: int


class Places:
    """The places of a document's keys and values, by path: table names, keys, and indexes of array elements."""

    def __init__(self, text: str) -> None:
        # As the parser does, so that both count the same lines.
        self._text = text.replace("\r\n", "\n")
        self._keys: dict[Path, int] = {}
        self._values: dict[Path, int] = {}
        _Scanner(self._text, self._keys, self._values).document()

    def key(self, path: Path) -> Place:
        """Where the key at `path` is written; of one that is not there, its closest table that is."""
        return self._closest(self._keys, path)

    def value(self, path: Path) -> Place:
        """Where the value at `path` begins; of a table with a header, the header."""
        if (offset := self._values.get(path)) is not None:
            return self._place(offset)
        return self._closest(self._keys, path)

    def _closest(self, offsets: dict[Path, int], path: Path) -> Place:
        while path and path not in offsets:
            path = path[:-1]
        return self._place(offsets.get(path, 0))

    def _place(self, offset: int) -> Place:
        return Place(self._text.count("\n", 0, offset) + 1, offset - self._text.rfind("\n", 0, offset))


class _Scanner:
    """One pass over the text; a table is noted where it is first named, a key where it is written."""

    def __init__(self, text: str, keys: dict[Path, int], values: dict[Path, int]) -> None:
        self._text = text
        self._at = 0
        self._keys = keys
        self._values = values
        self._array_sizes: dict[Path, int] = {}

    def document(self) -> None:
        table: Path = ()
        while self._skip_blank():
            if self._text.startswith("[[", self._at):
                table = self._header(2)
            elif self._text[self._at] == "[":
                table = self._header(1)
            else:
                self._pair(table, 0)

    def _header(self, brackets: int) -> Path:
        """`[a.b]` or `[[a.b]]`: a name that is an array so far means its last element."""
        start = self._at
        self._at += brackets
        parts = self._dotted_key()
        self._skip_blank()
        self._at += brackets
        path: Path = ()
        for index, (name, _) in enumerate(parts):
            path = _join(path, name)
            last = index == len(parts) - 1
            if last and brackets == 2:
                self._array_sizes[path] = self._array_sizes.get(path, 0) + 1
            self._note(path, start, replace=last and brackets == 1)
            if path in self._array_sizes:
                path = _join(path, self._array_sizes[path] - 1)
                self._note(path, start)
        return path

    def _note(self, path: Path, offset: int, *, replace: bool = False) -> None:
        if replace:
            self._keys[path] = offset
        else:
            self._keys.setdefault(path, offset)

    def _pair(self, table: Path, depth: int) -> None:
        path = table
        for name, offset in self._dotted_key():
            path = _join(path, name)
            self._note(path, offset)
        self._skip_blank()
        self._at += 1  # the equals sign
        self._skip_blank()
        self._value(path, depth)

    def _value(self, path: Path, depth: int) -> None:
        self._values.setdefault(path, self._at)
        opening = self._text[self._at]
        if opening in "\"'":
            self._string()
        elif opening not in "[{":
            # Numbers, dates and booleans: a date may hold a space, but no separator.
            while self._at < len(self._text) and self._text[self._at] not in ",]}#\n":
                self._at += 1
        elif depth == _MAX_DEPTH:
            self._skip_nested()
        elif opening == "[":
            self._array(path, depth + 1)
        else:
            self._inline_table(path, depth + 1)

    def _array(self, path: Path, depth: int) -> None:
        self._at += 1
        index = 0
        while self._skip_blank(","):
            if self._text[self._at] == "]":
                break
            element = _join(path, index)
            self._note(element, self._at)
            self._value(element, depth)
            index += 1
        self._at += 1

    def _inline_table(self, path: Path, depth: int) -> None:
        self._at += 1
        while self._skip_blank(","):
            if self._text[self._at] == "}":
                break
            self._pair(path, depth)
        self._at += 1

    def _skip_nested(self) -> None:
        """Past an array or inline table as a whole: brackets count, except in strings and comments."""
        open_brackets = 0
        while self._skip_blank(","):
            character = self._text[self._at]
            if character in "\"'":
                self._string()
                continue
            self._at += 1
            if character in "[{":
                open_brackets += 1
            elif character in "]}":
                open_brackets -= 1
                if open_brackets == 0:
                    return

    def _skip_blank(self, also: str = "") -> bool:
        """Past spaces, newlines and comments; False at the end of the text."""
        text, end = self._text, len(self._text)
        blank = " \t\n" + also
        while self._at < end:
            if text[self._at] == "#":
                newline = text.find("\n", self._at)
                self._at = end if newline < 0 else newline
            elif text[self._at] in blank:
                self._at += 1
            else:
                return True
        return False

    def _dotted_key(self) -> list[tuple[str, int]]:
        """Each part of a key with its offset."""
        parts = []
        while True:
            self._skip_blank()
            start = self._at
            if self._text[start] in "\"'":
                parts.append((self._string(), start))
            else:
                while self._text[self._at] not in " \t.=]":
                    self._at += 1
                parts.append((self._text[start : self._at], start))
            self._skip_blank()
            if self._text[self._at] != ".":
                return parts
            self._at += 1

    def _string(self) -> str:
        """Past a string of any of the four kinds; what it says matters only where it is a key."""
        text = self._text
        quote = text[self._at]
        if text.startswith(quote * 3, self._at):
            self._at += 3
            while not text.startswith(quote * 3, self._at):
                self._at += 2 if quote == '"' and text[self._at] == "\\" else 1
            # One or two quotes may stand directly before the closing three.
            self._at += 3
            for _ in range(2):
                if text.startswith(quote, self._at):
                    self._at += 1
            return ""
        start = self._at + 1
        self._at = start
        while text[self._at] != quote:
            self._at += 2 if quote == '"' and text[self._at] == "\\" else 1
        content = text[start : self._at]
        self._at += 1
        return _unescaped(content) if quote == '"' else content


def _join(path: Path, part: str | int) -> Path:
    return (*path, part) if len(path) < _MAX_DEPTH else path


def _unescaped(content: str) -> str:
    if "\\" not in content:
        return content
    pieces = []
    at = 0
    while at < len(content):
        if content[at] != "\\":
            pieces.append(content[at])
            at += 1
            continue
        kind = content[at + 1]
        at += 2
        if digits := _HEX_ESCAPES.get(kind):
            pieces.append(chr(int(content[at : at + digits], 16)))
            at += digits
        else:
            pieces.append(_ESCAPES[kind])
    return "".join(pieces)
