"""The serial console by HTTP: history, and a websocket that loses, doubles and stalls nothing."""

import asyncio
import base64
import os
import random
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import WSMsgType

from propolis.console.history import ConsoleHistory
from propolis.http import serial
from propolis.http.slot import SLOT
from propolis.lifecycle import Request, State
from tests.unit.http.serving import TIMEOUT, URL, Served, empty, ensure_body, one_vm, until

TALK = bytes(range(256)) * 4


async def connect(served: Served, query: str = "", path: str = "/instance/serial") -> aiohttp.ClientWebSocketResponse:
    async with asyncio.timeout(TIMEOUT):
        return await served.client.ws_connect(URL + path + query, max_msg_size=0)


def offset(socket: aiohttp.ClientWebSocketResponse) -> int:
    return int(socket._response.headers[serial.OFFSET])


async def read(socket: aiohttp.ClientWebSocketResponse, size: int) -> bytes:
    """The next bytes of output."""
    data = bytearray()
    async with asyncio.timeout(TIMEOUT):
        while len(data) < size:
            message = await socket.receive()
            assert message.type is WSMsgType.BINARY, (message, len(data))
            data += message.data
    return bytes(data)


async def closed(socket: aiohttp.ClientWebSocketResponse) -> tuple[int | None, str | None]:
    """Reads to the end; the code and reason of the close."""
    async with asyncio.timeout(TIMEOUT):
        while True:
            message = await socket.receive()
            if message.type is WSMsgType.CLOSE:
                return message.data, message.extra
            if message.type in (WSMsgType.CLOSED, WSMsgType.ERROR):
                return None, None


class Port:
    """Takes the place of the guest's end of COM1."""

    def __init__(self, served: Served, room: int = 1 << 30) -> None:
        self.taken = bytearray()
        self.room = room
        self._hub = served.vm.hub()
        self._hub._on_input = self
        self.arrived = asyncio.Event()

    def __call__(self, data: bytes) -> int:
        size = min(self.room, len(data))
        self.taken += data[:size]
        self.room -= size
        self.arrived.set()
        return size

    async def has(self, size: int) -> bytes:
        async with asyncio.timeout(TIMEOUT):
            while len(self.taken) < size:
                self.arrived.clear()
                await self.arrived.wait()
        return bytes(self.taken)


# -- history -----------------------------------------------------------------------------------------------------------


async def test_history(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        served.vm.hub().feed(b"hello")
        for query, data, end in [
            ("from_start=0", b"hello", 5),
            ("from_start=1&max_bytes=2", b"el", 3),
            ("from_start=99", b"", 5),
            ("most_recent=2", b"lo", 5),
            ("most_recent=99", b"hello", 5),
            ("most_recent=18446744073709551616", b"hello", 5),
            ("from_start=0&max_bytes=0", b"", 0),
        ]:
            answer = await served.get(f"/instance/serial/history?{query}")
            assert (answer.status, answer.body) == (200, {"data": list(data), "last_byte_offset": end}), query
        served.vm.hub(2).feed(b"second")
        answer = await served.get("/instance/serial/history?from_start=0&com=2")
        assert bytes(answer.body["data"]) == b"second"


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?from_start=0&most_recent=0",
        "?from_start=-1",
        "?from_start=x",
        "?from_start=0&max_bytes=-1",
        "?from_start=0&com=5",
        "?from_start=0&com=0",
        "?from_start=0&more=1",
    ],
)
async def test_history_of_nothing(tmp_path: Path, query: str) -> None:
    async with one_vm(tmp_path) as served:
        answer = await served.get(f"/instance/serial/history{query}")
        assert (answer.status, answer.body["error_code"]) == (400, "field")


async def test_a_port_that_the_vm_does_not_have(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        for path in ("/instance/serial/history?from_start=0&com=3", "/instance/serial?com=4"):
            assert (await served.get(path)).status == 404


async def test_a_range_that_is_no_longer_kept(tmp_path: Path) -> None:
    async with one_vm(tmp_path, history=ConsoleHistory(10)) as served:
        served.vm.hub().feed(b"0123456789abcdefghijKLMNOPQRST")
        answer = await served.get("/instance/serial/history?from_start=12")
        assert (answer.status, answer.body["error_code"]) == (400, "expired_range")
        assert "goes on at 20" in answer.body["message"]
        assert (await served.get("/instance/serial?from_start=12")).status == 400
        assert bytes((await served.get("/instance/serial/history?from_start=5")).body["data"]) == b"56789"


# -- the websocket -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "start"),
    [
        ("", 5),
        ("?from_start=0", 0),
        ("?from_start=2", 2),
        ("?from_start=99", 5),
        ("?most_recent=3", 2),
        ("?most_recent=99", 0),
        ("?most_recent=0", 5),
        ("?from_start=1&most_recent=1", 5),
    ],
)
async def test_where_output_begins(tmp_path: Path, query: str, start: int) -> None:
    """The reply says it; what is printed later follows without a seam."""
    async with one_vm(tmp_path) as served:
        hub = served.vm.hub()
        hub.feed(b"hello")
        async with await connect(served, query) as socket:
            assert offset(socket) == start
            hub.feed(b", world")
            assert await read(socket, 12 - start) == b"hello, world"[start:]


async def test_bytes_go_both_ways_as_they_are(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        port = Port(served)
        async with await connect(served) as socket:
            served.vm.hub().feed(TALK)
            assert await read(socket, len(TALK)) == TALK
            await socket.send_bytes(TALK)
            assert await port.has(len(TALK)) == TALK
            await socket.send_str("häß\r")  # as its UTF-8 bytes
            assert await port.has(len(TALK) + 6) == TALK + "häß\r".encode()


async def test_another_port(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, await connect(served, "?com=2") as socket:
        served.vm.hub(1).feed(b"first")
        served.vm.hub(2).feed(b"second")
        assert await read(socket, 6) == b"second"


async def test_input_waits_for_a_guest_that_does_not_take_it(tmp_path: Path) -> None:
    """It is bounded here, and the client is not read from meanwhile; nothing is lost."""
    async with one_vm(tmp_path) as served:
        port = Port(served, room=0)
        typed = os.urandom(1 << 20)
        async with await connect(served) as socket:
            typing = asyncio.create_task(_type(socket, typed))
            hub = served.vm.hub()
            await until(lambda: hub._input_is_paused, "a console that is full")
            assert hub.waiting_input < 1 << 18
            while len(port.taken) < len(typed):
                port.room = 4096
                hub.input_ready()
                await asyncio.sleep(0)
            await typing
            assert bytes(port.taken) == typed


async def _type(socket: aiohttp.ClientWebSocketResponse, data: bytes) -> None:
    for at in range(0, len(data), 8192):
        await socket.send_bytes(data[at : at + 8192])


class Watcher:
    """A client that compares all that it is sent with what was printed."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, text: bytes) -> None:
        self.read = 0
        self._socket = socket
        self._text = memoryview(text)
        self._grew = asyncio.Event()

    async def watch(self) -> None:
        while self.read < len(self._text):
            message = await self._socket.receive(TIMEOUT)
            assert message.type is WSMsgType.BINARY, (message, self.read)
            is_next = message.data == self._text[self.read : self.read + len(message.data)]
            assert is_next, self.read  # without what pytest would say of so many bytes
            self.read += len(message.data)
            self._grew.set()
        await self._socket.close()

    async def has(self, size: int) -> None:
        async with asyncio.timeout(TIMEOUT):
            while self.read < size:
                self._grew.clear()
                await self._grew.wait()


@pytest.mark.timeout(300)
async def test_a_hundred_watchers(tmp_path: Path, rounds: int) -> None:
    """Of a guest that prints by its UART: each has every byte in order, but for two that do not read and are dropped.

    Half of them come while it prints the first half MB. It prints no faster than they read, as the history keeps the
    first and the last MiB; with more than two rounds it prints 10 MB.
    """
    size = 10_000_000 if rounds > 2 else 600_000  # more than buffers take of one who does not read
    text = random.Random(rounds).randbytes(size)
    async with one_vm(tmp_path, console_patience=3.0) as served:
        await served.running()
        hub, port = served.vm.hub(), served.vm._machine.vm.pio
        stalled = [await _raw(served, "?from_start=0") for _ in range(2)]

        async def arrived(end: int) -> None:
            await until(lambda: hub.history.total_bytes == end, "what was printed")

        async with asyncio.TaskGroup() as tasks:
            watchers: list[Watcher] = []

            async def join(count: int) -> None:
                for _ in range(count):
                    watchers.append(Watcher(await connect(served, "?from_start=0"), text))
                    tasks.create_task(watchers[-1].watch())

            await join(50)
            late = tasks.create_task(join(50))
            for at in range(0, size, 32768):
                if at > 500_000:
                    await late
                for byte in text[at : at + 32768]:
                    port.write(0x3F8, 1, byte)
                for watcher in tuple(watchers):
                    if watcher.read < at - 400_000:
                        await watcher.has(at - 400_000)
                await arrived(min(at + 32768, size))
        assert [watcher.read for watcher in watchers] == [size] * 100
        assert hub.history.total_bytes == size
        await until(lambda: not hub.clients, "the end of all")
        for _, writer in stalled:
            writer.transport.abort()


async def test_replay_meets_live_output_at_any_moment(tmp_path: Path) -> None:
    """The guest prints all the time; no byte is lost or doubled where history ends."""
    async with one_vm(tmp_path) as served:
        hub = served.vm.hub()
        text = os.urandom(400_000)
        hub.feed(text[:200_000])
        at = 200_000

        async def chatter() -> None:
            nonlocal at
            while at < len(text):
                hub.feed(text[at : at + 777])
                at += 777
                await asyncio.sleep(0)

        printing = asyncio.create_task(chatter())
        starts = [0, 16384, 199_999, 200_000]
        sockets = [await connect(served, f"?from_start={start}") for start in starts]
        for socket, start in zip(sockets, starts, strict=True):
            assert offset(socket) == start
            assert await read(socket, len(text) - start) == text[start:]
            await socket.close()
        await printing


async def _raw(served: Served, query: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client that never reads, once it is connected."""
    reader, writer = await asyncio.open_unix_connection(served.path, limit=1024)
    key = base64.b64encode(os.urandom(16)).decode()
    writer.write(
        f"GET /instance/serial{query} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
    )
    assert b" 101 " in await reader.readline()
    while await reader.readline() != b"\r\n":
        pass
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    return reader, writer


async def test_a_client_that_does_not_read_is_dropped_and_delays_nobody(tmp_path: Path) -> None:
    async with one_vm(tmp_path, console_patience=0.3) as served:
        hub = served.vm.hub()
        _, writer = await _raw(served)
        async with await connect(served) as healthy:
            text = os.urandom(1 << 20)
            for at in range(0, len(text), 65536):
                hub.feed(text[at : at + 65536])
                assert await read(healthy, len(text[at : at + 65536])) == text[at : at + 65536]
            await until(lambda: hub.clients == 1, "the end of the client that does not read")
            hub.feed(b"still here")
            assert await read(healthy, 10) == b"still here"
        writer.transport.abort()


async def test_what_waits_for_a_client_is_bounded(tmp_path: Path) -> None:
    """However much the guest prints: the rest stays in the history."""
    async with one_vm(tmp_path, console_patience=TIMEOUT) as served:
        hub = served.vm.hub()
        _, writer = await _raw(served)
        sink: Any = next(iter(hub._clients)).sink
        for _ in range(100):
            hub.feed(bytes(65536))
            await asyncio.sleep(0)
        assert sink._waiting_bytes <= serial.SEND_BYTES + 65536
        writer.transport.abort()
        await until(lambda: not hub.clients, "the end of the client")


@pytest.mark.parametrize("control", [True, False])
async def test_a_gap_is_told(tmp_path: Path, control: bool) -> None:
    """By a text frame where those are asked for, so that the bytes can be counted; else among the bytes."""
    async with one_vm(tmp_path, history=ConsoleHistory(10)) as served:
        hub = served.vm.hub()
        hub.feed(b"0123456789")
        async with await connect(served, "?from_start=0" + ("&control=true" if control else "")) as socket:
            assert await read(socket, 10) == b"0123456789"
            hub.feed(bytes(20000) + b"abcdefghij")  # more at once than is passed on as it is
            async with asyncio.timeout(TIMEOUT):
                message = await socket.receive()
            if control:
                assert message.type is WSMsgType.TEXT
                assert message.json() == {"Gap": {"resumes_at": 20010}}
            else:
                assert b"[20000 bytes of console output are no longer kept]" in message.data
            if control or not message.data.endswith(b"abcdefghij"):
                assert await read(socket, 10) == b"abcdefghij"


async def test_the_most_recent_are_as_many_as_are_kept(tmp_path: Path) -> None:
    async with one_vm(tmp_path, history=ConsoleHistory(10)) as served:
        served.vm.hub().feed(bytes(100) + b"abcdefghij")
        async with await connect(served, "?most_recent=50") as socket:
            assert offset(socket) == 100
            assert await read(socket, 10) == b"abcdefghij"


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_vm_that_stops_sends_its_last_words_and_1001(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        await served.running()
        sockets = [await connect(served, "?from_start=0") for _ in range(3)]
        served.vm.hub().feed(b"goodbye")
        served.vm.lifecycle.request(Request.STOP)
        for socket in sockets:
            assert await read(socket, 7) == b"goodbye"
            assert await closed(socket) == (1001, "VM stopped")
        await served.reaches(State.STOPPED)
        async with await connect(served, "?from_start=2") as socket:  # afterwards too
            assert await read(socket, 5) == b"odbye"
            assert await closed(socket) == (1001, "VM stopped")
        answer = await served.get("/instance/serial/history?from_start=0")
        assert bytes(answer.body["data"]) == b"goodbye"


async def test_last_words_survive_the_end_of_the_server(tmp_path: Path) -> None:
    """A worker ends with its VM; who reads gets everything first."""
    text = os.urandom(400_000)
    async with one_vm(tmp_path) as served:
        await served.running()
        async with await connect(served) as socket:
            served.vm.hub().feed(text)
            served.vm.lifecycle.request(Request.STOP)
            await asyncio.gather(*served.tasks)
            served.app[SLOT].end_streams()
            assert await read(socket, len(text)) == text
            assert await closed(socket) == (1001, "VM stopped")


async def test_a_server_that_ends_before_its_vm(tmp_path: Path) -> None:
    """Says so: the client comes back."""
    async with one_vm(tmp_path) as served, await connect(served) as socket:
        served.app[SLOT].end_streams()
        assert await closed(socket) == (1012, "the server shuts down")


async def test_a_reset_keeps_the_console(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        await served.running()
        async with await connect(served) as socket:
            served.vm.hub().feed(b"before ")
            assert (await served.put("/instance/reset")).status == 204
            served.vm.hub().feed(b"after")
            assert await read(socket, 12) == b"before after"


async def test_a_destroyed_vm_has_no_console(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        await served.put("/instance", ensure_body(tmp_path))
        await served.put("/instance/stop")
        await served.reaches(State.DESTROYED)
        assert (await served.get("/instance/serial?from_start=0")).status == 424


# -- clients that are not friendly -------------------------------------------------------------------------------------


async def test_no_websocket(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        answer = await served.get("/instance/serial")
        assert answer.status == 400
        assert answer.body["message"]


async def test_too_large_a_message(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, await connect(served) as socket:
        await socket.send_bytes(bytes(serial.MAX_MESSAGE + 1))
        assert (await closed(socket))[0] == 1009
        await until(lambda: not served.vm.hub().clients, "the end of the client")


async def test_broken_frames(tmp_path: Path) -> None:
    """And connections cut off at any moment: no client is left behind, and no error is logged."""
    async with one_vm(tmp_path) as served:
        hub = served.vm.hub()
        for frame in (b"\xff\xff\xff\xff", b"\x81\x85", b"\x82\xff" + b"\xff" * 8, b"\x88\x02\x03", b"\x01\x80", b""):
            _, writer = await _raw(served)
            writer.write(frame)
            await writer.drain()
            writer.transport.abort()
        await until(lambda: not hub.clients, "the end of all")
