"""The log that a worker leaves: a line for each record, whatever is in it."""

import json
import logging
import re
from collections.abc import Iterator

import pytest

from propolis.console.history import ConsoleHistory
from propolis.log_tail import BURST, MAX_LINE, LogTail

log = logging.getLogger("test.tail")


@pytest.fixture
def history() -> Iterator[ConsoleHistory]:
    history = ConsoleHistory(8192)
    tail = LogTail(history)
    log.addHandler(tail)
    log.setLevel(logging.DEBUG)
    yield history
    log.removeHandler(tail)


def lines(history: ConsoleHistory) -> list[str]:
    return history.read(from_start=0)[0].decode().splitlines()


def test_a_record_is_a_line(history: ConsoleHistory) -> None:
    log.info("state %s", "Running", extra={"vm": "web"})
    (line,) = lines(history)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info test\.tail: state Running vm=web", line)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines", "two\\nlines"),
        ("\x1b[2J\r\x07\x7f\x9b", "\\x1b[2J\\r\\x07\\x7f\\x9b"),
        ("a\tb", "a\\tb"),
        ("\u2713 \udcff", "\u2713 \\udcff"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
    ],
)
def test_nothing_passes_for_a_line_or_moves_a_cursor(history: ConsoleHistory, text: str, shown: str) -> None:
    log.warning("guest says: %s", text)
    (line,) = lines(history)
    assert line.endswith(f"guest says: {shown}")


def test_a_traceback_is_one_line(history: ConsoleHistory) -> None:
    try:
        raise ValueError("x" * 10_000)
    except ValueError:
        log.exception("a bug")
    (line,) = lines(history)
    assert "a bug\\n  Traceback" in line
    assert len(line) <= 2 * MAX_LINE


def test_a_bad_record_raises_nothing() -> None:
    history = ConsoleHistory(8192)
    LogTail(history).handle(logging.LogRecord("test.tail", logging.INFO, "", 0, "%d", ("not a number",), None))
    (line,) = lines(history)
    assert line.startswith("a record of test.tail that cannot be told: TypeError")


def test_a_flood_is_left_out() -> None:
    """And how much of it; errors are not."""
    history = ConsoleHistory(1 << 20)
    tail = LogTail(history)

    def say(level: int, text: str) -> None:
        tail.handle(logging.LogRecord("test.tail", level, "", 0, text, None, None))

    for _ in range(BURST + 1000):
        say(logging.WARNING, "once more")
    say(logging.ERROR, "an error")
    text = history.read(from_start=0, max_bytes=1 << 20)[0].decode()
    found = [line.partition(": ")[2] for line in text.splitlines()]
    assert found[-1] == "an error"
    assert "lines are left out" in found[-2]
    left_out = sum(int(line.split()[0]) for line in found if line.endswith("left out"))
    assert left_out + found.count("once more") == BURST + 1000
    assert left_out > 500


def test_as_json() -> None:
    history = ConsoleHistory(8192)
    tail = LogTail(history, "json")
    tail.handle(logging.LogRecord("test.tail", logging.INFO, "", 0, "two\nlines", None, None))
    (line,) = lines(history)
    assert json.loads(line)["message"] == "two\nlines"
