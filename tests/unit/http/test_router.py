"""The daemon's routes under clients that mean it no good, and websockets and replies that pass through it."""

import asyncio
import contextlib
import io
import json
import os
import resource
import signal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import pytest

from tests.unit.daemons import TIMEOUT, Server, server

pytestmark = [pytest.mark.program, pytest.mark.timeout(400)]

JSON = {"Content-Type": "application/json"}


async def raw(one: Server, data: bytes) -> bytes:
    """The beginning of what is answered to these bytes."""
    reader, writer = await asyncio.open_unix_connection(str(one.folder / "api"))
    try:
        writer.write(data)
        async with asyncio.timeout(TIMEOUT):
            return await reader.read(4096)
    finally:
        writer.close()


async def test_bodies_that_are_refused(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        good = json.dumps(one.body("web"))
        for body, headers, status, words in (
            (b"[" * 10_000 + b"]" * 10_000, JSON, 400, "the body"),
            (b'{"x":' * 10_000 + b"1" + b"}" * 10_000, JSON, 400, ""),
            (good.replace('"name": "web"', '"name": "web", "name": "web"'), JSON, 400, "given twice"),
            (good.replace('"cpus": 1', '"cpus": NaN'), JSON, 400, "no JSON"),
            (good.replace('"cpus": 1', '"cpus": 1e999'), JSON, 400, ""),
            (good.replace('"cpus": 1', f'"cpus": {"9" * 5000}'), JSON, 400, ""),
            (good.replace('"cpus": 1', '"cpus": -1'), JSON, 400, "/init/value/spec/board/cpus"),
            (good.replace('"cpus": 1', '"cpus": 1, "cups": 2'), JSON, 400, "/init/value/spec/board/cups"),
            (good.replace('"web"', '"other"'), JSON, 400, "/properties/name"),
            (good.encode("utf-16"), JSON, 400, "no JSON"),
            (good.encode().replace(b"web", b"w\xffb"), JSON, 400, ""),
            (good, {"Content-Type": "text/plain"}, 400, "expected application/json"),
            (good, {**JSON, "Content-Encoding": "gzip"}, 400, ""),
            (b"", JSON, 400, "no body"),
            (io.BytesIO(b" " * (2 << 20)), JSON, 413, "larger than"),
            (b"[main]\nname = 3", {"Content-Type": "application/toml"}, 400, "the body:2:8"),
            (b"\xff", {"Content-Type": "application/toml"}, 400, "not UTF-8"),
            (
                b'[cloudinit]\nuser-data-path = "/etc/passwd"',
                {"Content-Type": "application/toml"},
                400,
                "the body:2:18: user-data-path: expected the text itself",
            ),
        ):
            reply = await one.ask("PUT", "/instances/web", data=body, headers=headers)
            assert (reply.status, words in json.dumps(reply.body)) == (status, True), reply
        head = b"PUT /instances/web HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        assert b" 413 " in await raw(one, head + b"Content-Length: 1073741824\r\n\r\n{")
        assert (await one.ask("GET", "/instances")).body == {"instances": []}
        assert " error " not in one.log


async def test_names_that_are_refused(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        await one.create("web")
        for name in ("..", ".hidden", "-x", "a b", "a/b", "../../etc", "ü", "\u202eabc", "x" * 65, "a\nb", "a\0b", "%"):
            key = quote(name, safe="")
            body = one.body("web")
            body["properties"]["name"] = name
            reply = await one.ask("PUT", f"/instances/{key}", json=body)
            assert reply.status in (400, 404, 405), (name, reply)
            for path in ("", "/spec", "/serial/history?from_start=0", "/nmi"):
                assert (await one.ask("GET", f"/instances/{key}{path}")).status in (404, 405)
        for path in ("/instances/web/../../etc/passwd", "/instances/web/%2e%2e/x", "/instances//spec", "/nothing"):
            assert (await one.ask("GET", path)).status == 404
        body = one.body("11111111-2222-4333-8444-555555555555")
        assert (await one.ask("PUT", f"/instances/{body['properties']['name']}", json=body)).status == 400
        assert [entry.name for entry in os.scandir(tmp_path / "run/vms")] == ["web"]
        assert all(line.isprintable() for line in one.log.splitlines())


async def test_queries_and_bodies_of_other_routes(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        await one.create("web")
        for method, path, more, status in (
            ("GET", "/instances?limit=0", {}, 400),
            ("GET", "/instances?limit=1&limit=2", {}, 400),
            ("GET", "/instances?x=1", {}, 400),
            ("PUT", "/instances/web?restart=sometimes", {"json": one.body("web")}, 400),
            ("PATCH", "/instances/web", {"json": {"restart": None, "x": 1}}, 400),
            ("DELETE", "/instances/web?force=maybe", {}, 400),
            ("PUT", "/instances/web/state", {"json": "Explode"}, 400),
            ("PUT", "/instances/web/state", {"json": ["Run"]}, 400),
            ("PUT", "/instances/web/shutdown", {"json": {"deadline_seconds": -1}}, 400),
            ("GET", "/instances/web/state-monitor", {}, 400),
            ("GET", "/instances/web/state-monitor?gen=-1", {}, 400),
            ("GET", "/instances/web/serial/history", {}, 400),
            ("GET", "/events?after=x", {}, 400),
            ("GET", "/events", {"headers": {"Last-Event-ID": "٣"}}, 400),
            ("GET", "/version", {"headers": {"api-version": "4.0.0"}}, 400),
            ("POST", "/instances/web/disk/x/snapshot/11111111-2222-4333-8444-555555555555", {}, 404),
            ("GET", "/instances/web/migrate/11111111-2222-4333-8444-555555555555/start", {}, 403),
            ("DELETE", "/instances", {}, 405),
            ("GET", "/instances/none/spec", {}, 404),
        ):
            reply = await one.ask(method, path, **more)
            assert reply.status == status, (method, path, reply)
            assert set(reply.body) >= {"request_id", "error_code", "message"}
            assert reply.headers["x-request-id"] == reply.body["request_id"]


async def test_what_a_worker_says_passes_through(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        await one.create("web")
        number = "11111111-2222-4333-8444-555555555555"
        reply = await one.ask("PUT", "/instances/web/pause", headers={"x-request-id": number})
        assert (reply.status, reply.body["state"], reply.body["request_id"]) == (409, "Creating", number)
        await one.run()
        assert (await one.ask("PUT", "/instances/web/pause")).status == 204
        found = (await one.ask("GET", "/instances/web")).body["instance"]
        assert (found["state"], found["paused"]) == ("Running", True)
        assert (await one.ask("PUT", "/instances/web/resume")).status == 204
        assert (await one.ask("POST", "/instances/web/nmi")).status == 200
        assert (await one.ask("GET", "/instances/web/migration-status")).body == {}
        async with one.session.get("http://daemon/instances/web/events?after=0") as stream:
            async with asyncio.timeout(TIMEOUT):
                kinds = [line.decode().strip() async for line in take(stream, 12) if line.startswith(b"event: ")]
        assert kinds[0] == "event: state"


async def take(stream: aiohttp.ClientResponse, count: int) -> Any:
    for _ in range(count):
        yield await stream.content.readline()


async def test_a_console_passes_through(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        await one.create("web")
        await one.run()
        url = "http://daemon/instances/web/serial"
        async with one.session.ws_connect(url) as console:
            assert console._response.headers["propolis-console-offset"] == "0"
            await console.ping(b"x")
            for size in (0, 1, 125, 126, 65535):
                await console.send_bytes(b"y" * size)
            await console.send_str("ü" * 10)
            metrics = await consoles(one, lambda com: com["waiting_input"] + com["clients"] > 60000)
            assert metrics["clients"] == 1
        await consoles(one, lambda com: com["clients"] == 0)
        async with one.session.ws_connect(url) as console:
            await one.ask("PUT", "/instances/web/stop")
            message = await console.receive(TIMEOUT)
            assert (message.type, message.data, message.extra) == (aiohttp.WSMsgType.CLOSE, 1001, "VM stopped")
        with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
            await one.session.ws_connect("http://daemon/instances/none/serial")
        assert caught.value.status == 404


async def heard(one: Server, query: str) -> tuple[int, bytes, Any]:
    """Where a console begins, what is on it to its end, and the end."""
    async with one.session.ws_connect(f"http://daemon/instances/web/serial{query}") as console:
        data = b""
        while (message := await console.receive(TIMEOUT)).type is aiohttp.WSMsgType.BINARY:
            data += message.data
        start = int(console._response.headers["propolis-console-offset"])
        return start, data, (message.type, message.data, message.extra)


async def test_the_last_words_of_a_dead_vm(tmp_path: Path) -> None:
    """They are on its console, which then ends as that of any VM that has stopped, for readers too."""
    end = (aiohttp.WSMsgType.CLOSE, 1001, "VM stopped")
    async with server(tmp_path) as one:
        await one.create("web")
        await one.run()
        os.kill(one.worker("web"), signal.SIGKILL)
        await one.until("web", "Failed")
        assert await heard(one, "?from_start=0") == (0, b"", end)
        with one.directory("web") as directory, contextlib.closing(directory.map_history()) as history:
            history.append(b"Kernel panic")  # as the worker does
        assert await heard(one, "?from_start=7") == (7, b"panic", end)
        assert await heard(one, "?most_recent=5") == (7, b"panic", end)
        assert await heard(one, "") == (12, b"", end)
        for query, status in (("?com=2", 404), ("?from_start=x", 400)):
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await heard(one, query)
            assert caught.value.status == status
        assert (await one.ask("GET", "/instances/web/serial")).status == 400  # no websocket


async def consoles(one: Server, is_wanted: Any) -> dict[str, int]:
    """COM1's numbers, once they are as wanted."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            found: dict[str, int] = (await one.ask("GET", "/instances/web/metrics")).body["consoles"]["com1"]
            if is_wanted(found):
                return found


async def test_a_reader_types_nothing(tmp_path: Path) -> None:
    (tmp_path / "readers").write_text("reader-" + "x" * 20)
    (tmp_path / "readers").chmod(0o600)
    config = "[tokens]\nread_only = ['readers']\n"
    async with server(tmp_path, "127.0.0.1:0", f"unix:{tmp_path}/api", config=config) as one:
        await one.create("web")
        await one.run()
        port = one.log.partition("127.0.0.1:")[2].split()[0].rstrip('"')
        url, headers = f"http://127.0.0.1:{port}", {"Authorization": "Bearer reader-" + "x" * 20}
        async with aiohttp.ClientSession(url, headers=headers) as reader:
            async with reader.put("/instances/web/stop") as reply:
                assert reply.status == 403
            async with reader.ws_connect("/instances/web/serial") as console:
                await console.send_bytes(b"rm -rf /\r" * 10_000)
                await console.ping(b"are you there")
                await consoles(one, lambda com: com["clients"] == 1)
                await console.close()
                assert console.close_code == 1000  # so control frames do pass
            with pytest.raises(aiohttp.WSServerHandshakeError) as caught:
                await reader.ws_connect("/instances/web/migrate/11111111-2222-4333-8444-555555555555/start")
            assert caught.value.status == 403
            async with reader.get("/events", headers={"Authorization": "Bearer " + "z" * 30}) as reply:
                assert reply.status == 401
        assert (await consoles(one, lambda com: True))["waiting_input"] == 0
        assert "reader-" not in one.log


async def test_more_clients_than_descriptors(tmp_path: Path) -> None:
    """The daemon has none left for a while, and goes on afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with server(tmp_path, is_started=False) as one:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        await one.start()
        await one.create("web")
        resource.prlimit(one.pid, resource.RLIMIT_NOFILE, (64, hard))
        held = []
        for _ in range(100):
            _, writer = await asyncio.open_unix_connection(str(tmp_path / "api"))
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            held.append(writer)
        for writer in held:
            writer.close()
        status = None
        async with asyncio.timeout(TIMEOUT):
            while status is None:
                try:
                    status = (await one.ask("GET", "/instances/web")).status
                except aiohttp.ClientError:  # taken and let go: the others are not gone yet
                    await asyncio.sleep(0.02)
        assert status == 200
        await one.run()
        assert await one.stop() == 0


async def test_a_hung_worker_can_be_stopped_and_deleted(tmp_path: Path) -> None:
    async with server(tmp_path) as one:
        await one.create("web")
        await one.run()
        os.kill(one.worker("web"), signal.SIGSTOP)
        assert (await one.ask("GET", "/instances/web")).body["instance"]["state"] == "Running"
        assert (await one.ask("DELETE", "/instances/web?force=true")).status == 204
        assert (await one.ask("GET", "/instances")).body == {"instances": []}
