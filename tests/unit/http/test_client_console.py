"""The client's console: history first, every byte once, also where the connection is lost on the way."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from propolis.console.history import ConsoleHistory
from propolis.errors import PropolisError
from propolis.http.client import Client
from propolis.http.client_console import Console
from propolis.http.client_replies import UnreachableError
from tests.unit.http.fronts import Front, Relay
from tests.unit.http.serving import TIMEOUT, one_vm

SEED = random.randrange(1 << 32)


@contextlib.asynccontextmanager
async def client_of(where: Path | str) -> AsyncIterator[Client]:
    async with asyncio.timeout(TIMEOUT), Client(f"unix:{where}") as client:
        yield client


async def until(console: Console, end: bytes) -> bytes:
    """What is read up to `end`."""
    seen = b""
    while not seen.endswith(end):
        data = await console.read()
        assert data, f"the console ended after {seen!r}"
        seen += data
    return seen


async def test_history_first_then_what_follows(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, client_of(served.path) as client:
        hub = served.vm.hub()
        hub.feed(b"0123456789")
        async with client.serial("web", from_start=4) as console:
            assert console.offset == 4
            assert await until(console, b"9") == b"456789"
            hub.feed(b"a")
            assert await until(console, b"a") == b"a"
            assert console.offset == 11
        async with client.serial("web", most_recent=3) as console:
            assert console.offset == 8
            assert await until(console, b"a") == b"89a"
        async with client.serial("web") as console:
            assert console.offset == 11
            hub.feed(b"b")
            assert await until(console, b"b") == b"b"
        assert await client.history("web", from_start=2, max_bytes=3) == (b"234", 5)
        assert await client.history("web", most_recent=3) == (b"9ab", 12)


async def test_typing(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, client_of(served.path) as client, client.serial("web", com=2) as console:
        await console.send(b"x" * 1000)
        hub = served.vm.hub(2)
        while not hub.waiting_input:  # noqa: ASYNC110 -- the guest's port takes the first of it
            await asyncio.sleep(0.001)
        assert 900 < hub.waiting_input <= 1000


async def test_the_end_of_a_vm_is_the_end_of_its_console(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, client_of(served.path) as client:
        await served.running()
        async with client.serial("web", from_start=0, patience=TIMEOUT) as console:
            served.vm.hub().feed(b"bye")
            await client.stop("web")
            assert b"".join([data async for data in console]) == b"bye"
            assert console.is_over
            assert await console.read() == b""
            await console.send(b"to nobody")


async def test_a_lost_connection_is_an_error_to_the_impatient(tmp_path: Path) -> None:
    async with (
        one_vm(tmp_path) as served,
        Front(served, tmp_path / "front") as front,
        client_of(front.path) as client,
        client.serial("web") as console,
    ):
        reading = asyncio.create_task(console.read())
        await front.stop()
        with pytest.raises(UnreachableError, match="closed with code 1012: the server shuts down"):
            await reading


async def test_the_patient_give_up_at_last(tmp_path: Path) -> None:
    async with (
        one_vm(tmp_path) as served,
        Front(served, tmp_path / "front") as front,
        client_of(front.path) as client,
        client.serial("web", patience=0.1) as console,
    ):
        reading = asyncio.create_task(console.read())
        await front.stop()
        with pytest.raises(UnreachableError, match="No such file"):
            await reading


async def test_every_byte_once_across_restarts_of_the_server(tmp_path: Path) -> None:
    heard: list[str] = []
    chance = random.Random(SEED)
    output = chance.randbytes(300_000)
    async with one_vm(tmp_path) as served, Front(served, tmp_path / "front") as front, client_of(front.path) as client:
        hub = served.vm.hub()
        async with client.serial(
            "web",
            from_start=0,
            patience=TIMEOUT,
            on_lost=lambda error: heard.append(str(error)),
            on_back=lambda: heard.append("back"),
        ) as console:

            async def read() -> bytes:
                seen = b""
                while len(seen) < len(output):
                    seen += await console.read()
                return seen

            reading = asyncio.create_task(read())
            for at in range(0, len(output), 10_000):
                hub.feed(output[at : at + 10_000])
                await asyncio.sleep(0)
                if at % 50_000 == 0:
                    await front.stop()
                    await front.start(is_silent=chance.random() < 0.5)
            assert await reading == output, f"seed {SEED}"
            assert console.offset == len(output)
            await console.send(b"y" * 100)
    assert heard[0] == "the console's connection was closed with code 1012: the server shuts down"
    assert heard[1] == "back"


async def test_every_byte_once_across_killed_connections(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    output = chance.randbytes(500_000)
    async with (
        one_vm(tmp_path) as served,
        Relay(tmp_path / "relay", served.path) as relay,
        client_of(relay.path) as client,
    ):
        hub = served.vm.hub()
        hub.feed(output[:200_000])
        async with client.serial("web", from_start=0, patience=TIMEOUT) as console:
            seen = b""
            rest = output[200_000:]
            while len(seen) < len(output):
                if relay.connections == 1 or (chance.random() < 0.1 and relay.connections < 20):
                    relay.cut()
                size = chance.randrange(20_000)
                hub.feed(rest[:size])
                rest = rest[size:]
                seen += await console.read()
            assert seen == output, f"seed {SEED}"
    assert relay.connections > 1


async def test_what_is_typed_while_the_server_is_away_arrives_later(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, Front(served, tmp_path / "front") as front, client_of(front.path) as client:
        lost = asyncio.Event()
        async with client.serial("web", patience=TIMEOUT, on_lost=lambda error: lost.set()) as console:
            reading = asyncio.create_task(console.read())
            await front.stop()
            await lost.wait()
            sending = asyncio.create_task(console.send(b"x" * 1000))
            await front.start()
            await sending
            while not served.vm.hub().waiting_input:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            served.vm.hub().feed(b"answer")
            assert await reading == b"answer"


@pytest.mark.parametrize("read_before", [100, 1500])
async def test_what_is_no_longer_kept_is_told_and_not_counted(tmp_path: Path, read_before: int) -> None:
    history = ConsoleHistory(1000)
    async with (
        one_vm(tmp_path, history=history) as served,
        Relay(tmp_path / "relay", served.path) as relay,
        client_of(relay.path) as client,
    ):
        hub = served.vm.hub()
        hub.feed(b"a" * read_before)
        async with client.serial("web", from_start=0, patience=TIMEOUT) as console:
            assert await until(console, b"a" * read_before) == b"a" * read_before
            hub.feed(b"b" * (10_000 - read_before))  # the first and the last thousand of ten are kept
            relay.cut()
            seen = await until(console, b"b" * 1000)
            assert console.offset == 10_000
    lost = 9000 - max(read_before, 1000)
    told = f"\r\n[{lost} bytes of console output are no longer kept]\r\n".encode()
    assert seen == b"b" * (9000 - read_before - lost) + told + b"b" * 1000


async def test_a_gap_on_the_way(tmp_path: Path) -> None:
    history = ConsoleHistory(1000)
    async with one_vm(tmp_path, history=history) as served, client_of(served.path) as client:
        served.vm.hub().feed(b"a" * 1000 + b"b" * 5000 + b"c" * 1000)
        async with client.serial("web", from_start=10) as console:
            seen = await until(console, b"c" * 1000)
            assert console.offset == 7000
    assert seen == b"a" * 990 + b"\r\n[5000 bytes of console output are no longer kept]\r\n" + b"c" * 1000


@pytest.mark.parametrize("most_recent", [None, 0, 3, 99])
async def test_a_server_that_does_not_say_where_it_begins(tmp_path: Path, most_recent: int | None) -> None:
    async with one_vm(tmp_path) as served, Front(served, tmp_path / "front") as front:
        await front.stop()
        await front.start(is_silent=True)
        served.vm.hub().feed(b"0123456789")
        async with client_of(front.path) as client, client.serial("web", most_recent=most_recent) as console:
            first = console.offset
            assert first == 10 - min(most_recent or 0, 10)
            served.vm.hub().feed(b"x")
            assert await until(console, b"x") == b"0123456789x"[first:]


async def test_leaving_while_the_server_is_away(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served, Front(served, tmp_path / "front") as front, client_of(front.path) as client:
        lost = asyncio.Event()
        errors: list[PropolisError] = []

        def note(error: PropolisError) -> None:
            errors.append(error)
            lost.set()

        async with client.serial("web", patience=TIMEOUT, on_lost=note) as console:
            reading = asyncio.create_task(console.read())
            await front.stop()
            await lost.wait()
            await console.close()
            await front.start()
            assert await reading == b""
    assert len(errors) == 1
