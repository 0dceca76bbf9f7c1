"""The daemon under what clients and hosts do to it: requests hidden in others, names in plenty, full disks."""

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.daemons import TIMEOUT, Server, server

pytestmark = [pytest.mark.program, pytest.mark.timeout(300)]

NASTY = "%0a%1b[31m2026-01-01T00:00:00Z%20error%20fake"
STOP = b"PUT /instance/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"  # as a worker takes it, not the daemon
SIZE = b"Content-Length: %d\r\n" % len(STOP)
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(STOP), STOP)
UPGRADE = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"


def request(head: bytes, rest: bytes = b"", path: bytes = b"/instances/web", method: bytes = b"GET") -> bytes:
    return b"%s %s HTTP/1.1\r\nHost: x\r\n%s\r\n%s" % (method, path, head, rest)


HIDDEN = {
    "body": request(SIZE, STOP),
    "chunks": request(b"Transfer-Encoding: chunked\r\n", CHUNKS),
    "body of a put": request(SIZE + b"Content-Type: text/plain\r\n", STOP, b"/instances/web/reset", b"PUT"),
    "both lengths": request(SIZE + b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n" + STOP),
    "unknown coding": request(SIZE + b"Transfer-Encoding: xchunked\r\n", STOP),
    "coding before chunked": request(SIZE + b"Transfer-Encoding: identity, chunked\r\n", STOP),
    "two lengths in one": request(b"Content-Length: 0, %d\r\n" % len(STOP), STOP),
    "length with a sign": request(b"Content-Length: +%d\r\n" % len(STOP), STOP),
    "folded header": request(b"X: y\r\n Content-Length: %d\r\n" % len(STOP), STOP),
    "bare line feeds": request(b"X: y\nContent-Length: %d\n\n" % len(STOP), STOP),
    "line end in a path": request(b"", path=b"/instances/web%0d%0a%0d%0aPUT%20/instance/stop%20HTTP/1.1%0d%0a%0d%0a"),
    "line end in a query": request(b"", path=b"/instances/web?x=%0d%0a%0d%0aPUT%20/instance/stop%20HTTP/1.1%0d%0a"),
    "line end in a route": request(b"", path=b"/instances/web/log?x=%20HTTP/1.1%0d%0a%0d%0a"),
    "line end in a number": request(b"X-Request-Id: a\rPUT /instance/stop\r\n"),
    "after a refused upgrade": request(UPGRADE, STOP, b"/instances/web/serial?from_start=-1"),
    "after an upgrade without a key": request(UPGRADE, STOP, b"/instances/web/serial"),
    "in an upgrade's body": request(UPGRADE + SIZE, STOP, b"/instances/web/serial?com=9"),
    "two hosts": request(b"Host: worker\r\nConnection: close, Content-Length\r\n" + SIZE, STOP),
}


async def say(one: Server, data: bytes) -> bytes:
    """All that is answered to this, and to a last request after it."""
    reader, writer = await asyncio.open_unix_connection(str(one.folder / "api"))
    try:
        writer.write(data + b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        async with asyncio.timeout(TIMEOUT):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def test_no_request_hides_in_another(tmp_path: Path) -> None:
    """What the daemon takes for a body, a path or a header is none to a worker either."""
    async with server(tmp_path) as one:
        await one.create()
        await one.run()
        generation = (await one.ask("GET", "/instances/web")).body["generation"]
        for what, data in HIDDEN.items():
            answer = await say(one, data)
            assert answer == b"" or answer.startswith(b"HTTP/1."), (what, answer)
            assert b" 500 " not in answer, (what, answer)
            assert b" 204 " not in answer or what == "body of a put", (what, answer)
            found = (await one.ask("GET", "/instances/web")).body
            assert found["instance"]["state"] == "Running", (what, answer)
            assert found["generation"] == generation or what == "body of a put", (what, answer)
            generation = found["generation"]

        # Nor is it a line of the log, or a name in the metrics, and there is an end of those.
        for number in range(60):
            await say(one, request(b"", path=b"/%d/%s" % (number, NASTY.encode()), method=b"X%d" % number))
            await one.ask("PUT", f"/instances/{NASTY}{number}", json={})
            await one.ask("GET", f"/instances/web/{NASTY}{number}")
        assert "\x1b" not in one.log
        assert not [line for line in one.log.splitlines() if line.startswith("2026-01-01")]
        assert " error " not in one.log
        metrics = (await one.ask("GET", "/metrics")).body
        series = [line for line in metrics.splitlines() if line.startswith("propolis_http_request_seconds_count{")]
        assert len(series) < 30
        assert "fake" not in metrics


# -- disks without room ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    folder = tmp_path / "state"
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "propolis-test", folder], check=True, capture_output=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


async def test_no_room_for_definitions(tmp_path: Path, small_disk: Path) -> None:
    """What cannot be kept is not made; what is there stays, runs, and is found again."""
    async with server(tmp_path) as one:
        await one.create("web")
        await one.run()
        filler = small_disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        reply = await one.create("other")
        assert (reply.status, reply.body["error_code"]) == (500, "backend")
        assert "No space left on device" in reply.body["message"]
        assert (await one.ask("GET", "/instances/other")).status == 404
        assert os.listdir(tmp_path / "run/vms") == ["web"]
        assert (await one.ask("PATCH", "/instances/web", json={"restart": "always"})).status == 500
        assert (await one.ask("GET", "/instances/web")).body["restart"] == "never"
        await one.kill()
        await one.start()
        found = (await one.ask("GET", "/instances/web")).body
        assert (found["instance"]["state"], found["restart"]) == ("Running", "never")
        filler.unlink()
        assert (await one.create("other")).status == 201
        assert (await one.ask("DELETE", "/instances/web?force=true")).status == 204


async def test_no_room_for_the_log(tmp_path: Path) -> None:
    """Every line that the daemon writes fails, and nothing else does."""
    (tmp_path / "stderr").symlink_to("/dev/full")
    async with server(tmp_path, "--log-level", "debug") as one:
        await one.create()
        await one.run()
        await one.ask("PUT", "/instances/web/stop")
        await one.until("web", "Stopped")
        assert "state Running" in (await one.ask("GET", "/instances/web/log")).body["text"]
        assert (await one.ask("DELETE", "/instances/web")).status == 204
        assert await one.stop() == 0
