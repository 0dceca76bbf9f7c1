"""What the commands print: data on standard output, words about it on standard error.

Tables and colours are for people at a terminal; a script asks for JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

PATIENCE = 1.0  # seconds after which a person is told what is waited for
_FRAMES = "|/-\\"
_BOLD, _DIM, _GREEN, _YELLOW, _RED = "1", "2", "32", "33", "31"
_COLOURS = {
    "Running": _GREEN,
    "Paused": _YELLOW,
    "Failed": _RED,
    "Stopped": _DIM,
    "Destroyed": _DIM,
    "ok": _GREEN,
    "warning": _YELLOW,
    "error": _RED,
}


def printable(text: str) -> str:
    """Text that came from elsewhere, without what a terminal would obey."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class Output:
    """Standard output and standard error, for a person or for a script."""

    def __init__(self, *, is_json: bool = False, is_quiet: bool = False) -> None:
        self.is_json = is_json
        self.is_quiet = is_quiet
        self._has_colour = _has_colour(sys.stdout)

    def line(self, text: str) -> None:
        """A line of data; it is printed at once, also into a pipe."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def text(self, text: str) -> None:
        """Data that has its own ends of lines."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def json(self, value: object, *, is_one_line: bool = False) -> None:
        """Data for a script; a stream of them has one on each line."""
        import msgspec

        data = msgspec.json.encode(value)
        self.line((data if is_one_line else msgspec.json.format(data, indent=2)).decode())

    def table(self, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Columns beside each other; states are in colour."""
        shown = [[printable(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(heads, *shown, strict=True)]
        self.line(self._row(heads, widths, lambda cell: _BOLD))
        for row in shown:
            self.line(self._row(row, widths, _COLOURS.get))

    def fields(self, pairs: Sequence[tuple[str, str]]) -> None:
        """A name and a value on each line."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            shown = printable(value)
            self.line(f"{name:{width}}  {self._paint(shown, _COLOURS.get(shown))}")

    def mark(self, word: str) -> str:
        """A state or verdict, in its colour."""
        return self._paint(word, _COLOURS.get(word))

    def say(self, text: str) -> None:
        """A word to the person, who may have asked for silence."""
        if not self.is_quiet:
            _complain(text)

    @contextlib.asynccontextmanager
    async def progress(self, what: str) -> AsyncIterator[None]:
        """Tells a person at a terminal what is waited for, once that takes long."""
        if self.is_quiet or not sys.stderr.isatty():
            yield
            return
        task = asyncio.create_task(_spin(printable(what)), name="progress")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    def _row(self, cells: Sequence[str], widths: Sequence[int], colour: Callable[[str], str | None]) -> str:
        padded = [
            self._paint(cell, colour(cell)) + " " * (width - len(cell))
            for cell, width in zip(cells, widths, strict=True)
        ]
        return "  ".join(padded).rstrip()

    def _paint(self, text: str, colour: str | None) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if colour is not None and self._has_colour else text


def fail(text: str) -> None:
    """Why the command failed: a line for each thing that is wrong."""
    _complain("\n".join(f"propolis-cli: {printable(line)}" for line in text.splitlines() or [""]))


def _complain(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody is there to be told
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _has_colour(stream: TextIO) -> bool:
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


async def _spin(what: str) -> None:
    begun = time.monotonic()
    await asyncio.sleep(PATIENCE)
    if os.environ.get("TERM") == "dumb":
        _complain(f"[{what} ...]")
        return
    try:
        frame = 0
        while True:
            sys.stderr.write(f"\r{_FRAMES[frame % len(_FRAMES)]} {what} ({time.monotonic() - begun:.0f} s)\x1b[K")
            sys.stderr.flush()
            frame += 1
            await asyncio.sleep(0.1)
    finally:
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
