"""Clients see every byte once, whatever they do, and never hold up the guest."""

import asyncio
import random

import pytest

from propolis.console.history import ConsoleHistory
from propolis.console.hub import INPUT_BYTES, Client, ConsoleHub
from propolis.errors import StateError

TIMEOUT = 10


class Watcher:
    """A client in this process; it has enough after `patience` bytes, until told to read on."""

    def __init__(self, patience: int | None = None) -> None:
        self.got = bytearray()
        self.peer: Client | None = None
        self.patience = patience
        self.input_is_paused = False
        self.is_closed = False
        self.biggest_write = 0
        self._grew = asyncio.Event()

    def join(self, hub: ConsoleHub, start: int | None = 0) -> "Watcher":
        self.peer = hub.attach(self, start)
        return self

    def write(self, data: bytes) -> None:
        assert data
        self.got += data
        self.biggest_write = max(self.biggest_write, len(data))
        self._grew.set()
        if self.patience is not None and len(self.got) >= self.patience:
            assert self.peer is not None
            self.peer.pause()

    def read_on(self, more: int | None = None) -> None:
        assert self.peer is not None
        self.patience = None if more is None else len(self.got) + more
        self.peer.resume()

    def pause_input(self) -> None:
        self.input_is_paused = True

    def resume_input(self) -> None:
        self.input_is_paused = False

    def close(self) -> None:
        self.is_closed = True

    async def sees(self, size: int) -> bytes:
        async with asyncio.timeout(TIMEOUT):
            while len(self.got) < size:
                self._grew.clear()
                await self._grew.wait()
        return bytes(self.got)


class Port:
    """The guest's side: takes so many bytes and no more."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.taken = bytearray()

    def __call__(self, data: bytes) -> int:
        size = min(self.room, len(data))
        self.room -= size
        self.taken += data[:size]
        return size


def make(kept: int = 1 << 20, port: Port | None = None) -> ConsoleHub:
    return ConsoleHub(ConsoleHistory(kept), port or Port())


async def test_history_first_then_live() -> None:
    hub = make()
    hub.feed(b"before ")
    watcher = Watcher().join(hub)
    hub.feed(b"between ")
    assert await watcher.sees(15) == b"before between "
    hub.feed(b"after")
    assert await watcher.sees(20) == b"before between after"


async def test_from_an_offset_or_only_live() -> None:
    hub = make()
    hub.feed(b"0123456789")
    middle, live, ahead = Watcher().join(hub, 4), Watcher().join(hub, None), Watcher().join(hub, 99)
    hub.feed(b"abc")
    assert await middle.sees(9) == b"456789abc"
    assert await live.sees(3) == b"abc"
    assert await ahead.sees(3) == b"abc"


async def test_a_client_that_stops_reading_catches_up_without_loss() -> None:
    hub = make()
    slow, quick = Watcher(patience=1).join(hub), Watcher().join(hub)
    expected = bytearray()
    for number in range(1000):
        hub.feed(data := b"line %d\r\n" % number)
        expected += data
    assert await quick.sees(len(expected)) == expected
    assert len(slow.got) < 20000
    slow.read_on()
    assert await slow.sees(len(expected)) == expected
    hub.feed(b"end")
    assert await slow.sees(len(expected) + 3) == expected + b"end"


async def test_a_client_whose_place_is_gone_is_told_how_much() -> None:
    hub = make(kept=100)
    slow = Watcher(patience=1).join(hub)
    hub.feed(b"x")
    await slow.sees(1)
    hub.feed(b"a" * 99 + b"b" * 500 + b"c" * 100)
    slow.read_on()
    notice = b"\r\n[500 bytes of console output are no longer kept]\r\n"
    expected = b"x" + b"a" * 99 + notice + b"c" * 100
    assert await slow.sees(len(expected)) == expected
    assert slow.peer is not None
    assert slow.peer.offset == hub.history.total_bytes


async def test_a_client_that_never_reads_costs_nothing() -> None:
    hub = make(kept=1000)
    Watcher(patience=1).join(hub)
    for _ in range(100):
        hub.feed(bytes(65536))
    assert hub.history.total_bytes == 100 * 65536


async def test_large_output_is_sent_in_pieces_and_in_turns() -> None:
    hub = make()
    data = random.Random(1).randbytes(1_000_000)
    first, second = Watcher().join(hub), Watcher().join(hub)
    hub.feed(data)
    assert len(first.got) <= 65536
    assert len(second.got) <= 65536
    assert await first.sees(len(data)) == data
    assert await second.sees(len(data)) == data
    assert first.biggest_write <= 16384


@pytest.mark.parametrize("seed", range(20))
async def test_any_order_of_events(seed: int) -> None:
    """Nobody misses a byte or sees one twice: what each got is the output from where it came in."""
    rng = random.Random(seed)
    hub = make()
    whole = b""
    watchers: list[tuple[Watcher, int]] = []
    for _ in range(300):
        match rng.randrange(6):
            case 0:
                start = rng.choice([0, len(whole) // 2, len(whole)])
                watchers.append((Watcher(rng.choice([None, 1, 5000])).join(hub, start), start))
            case 1 if watchers:
                watchers[rng.randrange(len(watchers))][0].read_on(rng.choice([None, 1, 20000]))
            case 2:
                await asyncio.sleep(0)
            case _:
                data = rng.randbytes(rng.choice([1, 100, 16384, 16385]))
                hub.feed(data)
                whole += data
    for watcher, start in watchers:
        watcher.read_on()
        assert await watcher.sees(len(whole) - start) == whole[start:]
        assert watcher.peer is not None
        watcher.peer.detach()
        watcher.peer.detach()
    assert hub.clients == 0


async def test_a_client_that_leaves_in_the_middle_of_the_history() -> None:
    hub = make()
    hub.feed(bytes(500_000))
    watcher = Watcher().join(hub)
    await watcher.sees(1)
    assert watcher.peer is not None
    watcher.peer.detach()
    size = len(watcher.got)
    hub.feed(b"more")
    watcher.peer.resume()
    watcher.peer.input(b"typed")
    await asyncio.sleep(0)
    assert len(watcher.got) == size
    assert hub.waiting_input == 0


async def test_a_client_that_leaves_while_others_are_served() -> None:
    hub = make()

    class Leaver(Watcher):
        def write(self, data: bytes) -> None:
            super().write(data)
            assert other.peer is not None
            other.peer.detach()

    leaver = Leaver().join(hub)
    other = Watcher().join(hub)
    await asyncio.sleep(0)
    hub.feed(b"x")
    assert bytes(leaver.got) == b"x"
    assert not other.got


async def test_output_that_a_client_causes_while_it_is_written_to() -> None:
    hub = make()

    class Echo(Watcher):
        def write(self, data: bytes) -> None:
            super().write(data)
            if data == b"ping":
                hub.feed(b"pong")

    first = Watcher().join(hub)
    echo = Echo().join(hub)
    last = Watcher().join(hub)
    await asyncio.sleep(0)
    hub.feed(b"ping")
    for watcher in (first, echo, last):
        assert await watcher.sees(8) == b"pingpong"


async def test_input_reaches_the_guest_as_it_takes_it() -> None:
    port = Port(room=16)
    hub = make(port=port)
    watcher = Watcher().join(hub)
    typed = bytes(range(256)) * 4
    assert watcher.peer is not None
    watcher.peer.input(typed)
    assert port.taken == typed[:16]
    while hub.waiting_input:
        port.room = 16
        hub.input_ready()
    assert port.taken == typed


async def test_input_of_all_clients_is_bounded_together() -> None:
    port = Port(room=0)
    hub = make(port=port)
    watchers = [Watcher().join(hub), Watcher().join(hub)]
    peer = watchers[0].peer
    assert peer is not None

    def paused() -> list[bool]:
        return [watcher.input_is_paused for watcher in watchers]

    peer.input(bytes(INPUT_BYTES - 1))
    assert paused() == [False, False]
    peer.input(b"x")
    assert paused() == [True, True]
    watchers.append(Watcher().join(hub))
    assert paused() == [True, True, True]
    port.room = INPUT_BYTES // 2 - 1
    hub.input_ready()
    assert paused() == [True, True, True]
    port.room = 1
    hub.input_ready()
    assert paused() == [False, False, False]
    peer.input(bytes(INPUT_BYTES))
    assert paused() == [True, True, True]
    hub.discard_input()
    assert paused() == [False, False, False]
    assert hub.waiting_input == 0


async def test_closing_waits_for_those_who_read() -> None:
    hub = make()
    hub.feed(bytes(300_000))
    reader, stuck = Watcher().join(hub), Watcher(patience=1).join(hub)
    await hub.close(grace=0.05)
    assert reader.is_closed
    assert stuck.is_closed
    assert len(reader.got) == 300_000
    assert len(stuck.got) < 300_000
    assert hub.clients == 0
    with pytest.raises(StateError):
        Watcher().join(hub)


async def test_closing_does_not_wait_once_all_have_all() -> None:
    hub = make()
    hub.feed(bytes(300_000))
    watchers = [Watcher().join(hub) for _ in range(3)]
    async with asyncio.timeout(TIMEOUT):
        await hub.close(grace=TIMEOUT * 2)
    assert [len(watcher.got) for watcher in watchers] == [300_000] * 3


async def test_closing_ends_when_the_last_who_is_behind_leaves() -> None:
    hub = make()
    hub.feed(bytes(300_000))
    stuck = Watcher(patience=1).join(hub)
    await stuck.sees(1)
    assert stuck.peer is not None
    asyncio.get_running_loop().call_soon(stuck.peer.detach)
    async with asyncio.timeout(TIMEOUT):
        await hub.close(grace=TIMEOUT * 2)
    assert not stuck.is_closed
