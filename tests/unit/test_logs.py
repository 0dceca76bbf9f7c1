"""A line of the log is a line, whatever a client or a guest put into it."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from propolis import logs, standalone

NASTY = "a\nb\x1b[31m\u202e\r\0"


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in ("asyncio", "aiohttp"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def written(form: str, level: str = "info") -> str:
    stream = io.StringIO()
    logs.configure(level, form, stream)
    log = logging.getLogger("propolis.some.module")
    log.info("created %s", NASTY, extra={"vm": "web", "reason": NASTY, "count": 3, "empty": "", "message_": 'a "b"'})
    log.debug("hidden")
    try:
        raise ValueError(NASTY)
    except ValueError:
        log.exception("bug")
    return stream.getvalue()


def test_text() -> None:
    lines = written("text").splitlines()
    assert lines[0].endswith(
        r'Z info some.module: created a\nb\x1b[31m\u202e\r\x00 vm=web reason="a\nb\u001b[31m\u202e\r\u0000" count=3'
        r' empty="" message_="a \"b\""'
    )
    assert lines[1].endswith("error some.module: bug")
    assert all(line.startswith("  ") for line in lines[2:])
    assert all(line.isprintable() for line in lines)


def test_json() -> None:
    first, second = (json.loads(line) for line in written("json").splitlines())
    assert (first["level"], first["logger"], first["vm"], first["count"]) == ("info", "some.module", "web", 3)
    assert (first["message"], first["reason"]) == (f"created {NASTY}", NASTY)
    assert "ValueError" in second["exception"]


def test_a_standalone_vm_s_terminal_is_not_its_guest_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the guest writes to its debug port is in the log, and does nothing to the terminal that shows it."""
    logging.getLogger().handlers.clear()
    (tmp_path / "kernel").touch()
    (tmp_path / "vm.toml").write_text('[main]\nname = "vm"\ncpus = 1\nmemory = 64\nkernel = "kernel"\n')
    assert standalone.main([str(tmp_path / "vm.toml"), "--check", "--log-level", "debug"]) == 0
    standalone._log_debug_port(NASTY.encode("latin-1", "replace") + b"\x9b31m end")
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].endswith(r" DEBUG debug port: a\nb\x1b[31m?\r\x00\x9b31m end")
    assert all(line.isprintable() for line in shown)


def test_levels() -> None:
    assert "hidden" in written("text", "debug")
    assert "created" not in written("text", "error")
