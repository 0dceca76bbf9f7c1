"""A worker's log, kept beside its console's history: the first and the last of it, a line for each record."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from propolis.logs import JsonFormatter, TextFormatter

if TYPE_CHECKING:
    from propolis.console.history import ConsoleHistory

MAX_LINE = 4000  # characters; a traceback is one line too
BURST = 500  # lines at once, of what is not an error,
RATE = 20  # and a second from then on: much of it happens because a guest or a client wants it
_CONTROLS = (
    {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}
    | {code: f"\\u{code:04x}" for code in (0x2028, 0x2029)}  # which some take for the end of a line
    | {ord("\n"): "\\n", ord("\t"): " "}
)
_LEFT_OUT = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": "%d lines are left out"}


class LogTail(logging.Handler):
    """Appends each record to a history."""

    def __init__(self, history: ConsoleHistory, form: str = "text") -> None:
        """As "text" or "json". The history stays the caller's."""
        super().__init__()
        self._history = history
        self._room = float(BURST)
        self._looked = time.monotonic()
        self._left_out = 0
        self.setFormatter(JsonFormatter() if form == "json" else TextFormatter())

    def install(self, level: str) -> None:
        """Alone gets what this process logs, of this level and up: "debug", "info", "warning" or "error"."""
        logging.basicConfig(level=level.upper(), handlers=[self], force=True)
        for name in ("asyncio", "aiohttp"):  # which tell of each connection
            logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))

    def remove(self) -> None:
        """Gets nothing any more."""
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Never raises: there is nobody to tell."""
        if record.levelno < logging.ERROR and not self._has_room():
            self._left_out += 1
            return
        if self._left_out:
            self._append(logging.makeLogRecord(_LEFT_OUT | {"args": (self._left_out,)}))
            self._left_out = 0
        self._append(record)

    def _append(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001 -- a bad record of whoever
            line = f"a record of {record.name} that cannot be told: {error!r}"
        # What a guest or a client can have in it must not pass for a line, or do something to a terminal.
        self._history.append(line[:MAX_LINE].translate(_CONTROLS).encode(errors="backslashreplace") + b"\n")

    def _has_room(self) -> bool:
        now = time.monotonic()
        self._room = min(BURST, self._room + (now - self._looked) * RATE)
        self._looked = now
        if self._room < 1:
            return False
        self._room -= 1
        return True
