"""Events as they happen, by both ways, and their resumption."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import WSMsgType

from propolis.event_log import Event
from propolis.http import events
from propolis.http.slot import SLOT
from propolis.lifecycle import GuestEvent, Request
from tests.unit.http.serving import TIMEOUT, URL, UUID, Served, one_vm

Fields = dict[str, Any]


class Stream:
    """Server-sent events, read as a browser does."""

    def __init__(self, reply: aiohttp.ClientResponse) -> None:
        self.reply = reply
        self.comments = 0

    async def next(self) -> Fields | None:
        """The next event; None at the end."""
        fields: dict[str, str] = {}
        async with asyncio.timeout(TIMEOUT):
            while line := (await self.reply.content.readline()).decode():
                if line == "\n" and fields:
                    data: Fields = msgspec.json.decode(fields["data"])
                    assert (fields["id"], fields["event"]) == (str(data["id"]), data["kind"])
                    return data
                if line.startswith(":"):
                    self.comments += 1
                elif line != "\n":
                    name, _, value = line.rstrip("\n").partition(": ")
                    fields[name] = value
        return None

    async def kinds(self, count: int) -> list[str]:
        """What the next ones are of, and for states which."""
        found: list[str] = []
        for _ in range(count):
            event = await self.next()
            assert event is not None, found
            found.append(event["state"] if event["kind"] == "state" else event["kind"])
        return found


async def watch(served: Served, query: str = "", **headers: str) -> Stream:
    return Stream(await served.client.get(f"{URL}/instance/events{query}", headers=headers))


async def test_events_of_a_life(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        stream = await watch(served, "?after=0")
        assert stream.reply.content_type == "text/event-stream"
        first = await stream.next()
        assert first is not None
        assert first.pop("time") > 1e9
        assert first == {"id": 1, "name": "web", "uuid": UUID, "kind": "state", "generation": 0, "state": "Creating"}
        await served.running()
        await served.ask("POST", "/instance/nmi")
        served.vm._on_guest_event(GuestEvent.PANIC)
        await served.put("/instance/shutdown", {"deadline_seconds": 0})
        expected = ["Starting", "Running", "nmi", "guest-panic", "power-button", "shutdown-deadline"]
        assert await stream.kinds(6) == expected
        assert await stream.kinds(2) == ["Stopping", "Stopped"]
        assert await stream.next() is None


async def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        await served.running()
        for after, header in (("?after=1", {}), ("", {"Last-Event-ID": "1"})):
            stream = await watch(served, after, **header)
            assert await stream.kinds(2) == ["Starting", "Running"]
            stream.reply.close()
        stream = await watch(served)  # only what comes
        await served.put("/instance/pause")
        assert await stream.kinds(1) == ["Paused"]
        stream.reply.close()


async def test_events_that_are_lost_are_told(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        for _ in range(2000):
            served.vm.events.add("x", 0)
        stream = await watch(served, "?after=1")
        assert await stream.kinds(3) == ["gap", "x", "x"]
        stream.reply.close()
        async with served.client.ws_connect(URL + "/instance/events?after=1") as socket:
            gap, first = [msgspec.json.decode(await socket.receive_str(), type=Event) for _ in range(2)]
        assert (gap.kind, gap.id, gap.name) == ("gap", first.id - 1, "web")


@pytest.mark.parametrize("query", ["?after=x", "?after=-1", "?since=1", "?after=1&after=2"])
async def test_events_after_nothing(tmp_path: Path, query: str) -> None:
    async with one_vm(tmp_path) as served:
        assert (await served.get(f"/instance/events{query}")).status == 400


async def test_a_header_that_is_no_number(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        for text in ("x", "-1", "1" * 30, "٣"):
            answer = await served.ask("GET", "/instance/events", headers={"Last-Event-ID": text})
            assert answer.status == 400


async def test_events_by_websocket(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, served.client.ws_connect(f"{URL}/instance/events?after=0") as socket:
        await socket.send_str("ignored")
        assert (await socket.receive_json(timeout=TIMEOUT))["state"] == "Creating"
        served.vm.lifecycle.request(Request.STOP)
        states = [(await socket.receive_json(timeout=TIMEOUT))["state"] for _ in range(2)]
        assert states == ["Stopping", "Stopped"]
        message = await socket.receive(timeout=TIMEOUT)
        assert (message.type, message.data, message.extra) == (WSMsgType.CLOSE, 1001, "VM stopped")


async def test_a_quiet_stream_shows_that_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "KEEP_ALIVE", 0.01)
    async with one_vm(tmp_path) as served:
        stream = await watch(served)
        async with asyncio.timeout(TIMEOUT):
            for _ in range(4):
                assert await stream.reply.content.readline() == b":\n"
                assert await stream.reply.content.readline() == b"\n"
        stream.reply.close()


async def test_streams_end_with_the_server(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        stream = await watch(served)
        async with served.client.ws_connect(f"{URL}/instance/events") as socket:
            served.app[SLOT].end_streams()
            assert await stream.next() is None
            message = await socket.receive(timeout=TIMEOUT)
            assert (message.type, message.data) == (WSMsgType.CLOSE, 1012)


async def test_watchers_that_leave_are_forgotten(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        streams = [await watch(served) for _ in range(10)]
        for stream in streams:
            stream.reply.close()
        async with asyncio.timeout(TIMEOUT):
            while served.vm.events._waiters:  # noqa: ASYNC110 -- nobody sets an event for it
                await asyncio.sleep(0.001)
