"""Logs: a line for each record, of the daemon as text for people or JSON for programs, with the fields it was given.

Nothing that a client or a guest chose can end a line or reach the terminal that shows it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def configure(level: str, form: str, stream: TextIO | None = None) -> None:
    """From now on everything goes to `stream`, standard error by default, as "text" or "json"."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # These tell of each connection, and of slow callbacks with all their arguments.
    for name in ("asyncio", "aiohttp"):
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


class TextFormatter(logging.Formatter):
    """`2026-11-25T20:00:00.123Z info supervisor: created vm=web uuid=…`."""

    def format(self, record: logging.LogRecord) -> str:
        words = [_time(record), record.levelname.lower(), f"{_logger(record)}:", _plain(record.getMessage())]
        words += [f"{name}={_quoted(value)}" for name, value in _fields(record)]
        lines = [" ".join(words)]
        if record.exc_info and record.exc_info[0] is not None:
            lines += [f"  {_plain(line)}" for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(lines)


class JsonFormatter(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": _logger(record),
            "message": record.getMessage(),
        }
        entry.update((name, value) for name, value in _fields(record) if name not in entry)
        if record.exc_info and record.exc_info[0] is not None:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class LineFormatter(logging.Formatter):
    """As the given format says, for programs that serve one VM."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- logging's name
        return _plain(super().formatMessage(record))


def _time(record: logging.LogRecord) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{moment}.{int(record.msecs):03d}Z"


def _logger(record: logging.LogRecord) -> str:
    return record.name.removeprefix("propolis.")


def _fields(record: logging.LogRecord) -> list[tuple[str, object]]:
    return [(name, value) for name, value in vars(record).items() if name not in _STANDARD]


def _plain(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _quoted(value: object) -> str:
    text = str(value)
    is_word = text.isprintable() and text and not any(character in text for character in ' "=')
    return text if is_word else json.dumps(text)
