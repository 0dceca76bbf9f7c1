"""A console on a real unix socket: live ones are refused, stale ones replaced, clients come, read, type and vanish."""

import asyncio
import contextlib
import os
import random
import socket
import stat
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from propolis.console.history import ConsoleHistory
from propolis.console.hub import ConsoleHub
from propolis.console.socket import ConsoleSocket
from propolis.errors import BackendError, BusyError

TIMEOUT = 20


class Console:
    """A hub with its socket, and what the guest was typed."""

    def __init__(self, path: Path, **settings: float) -> None:
        self.typed = bytearray()
        self.room = 1 << 30
        self.hub = ConsoleHub(ConsoleHistory(), self._take)
        self.socket = ConsoleSocket(str(path), self.hub, **settings)  # type: ignore[arg-type]  # an int is a float

    def _take(self, data: bytes) -> int:
        size = min(self.room, len(data))
        self.room -= size
        self.typed += data[:size]
        return size

    async def close(self, grace: float = 1.0) -> None:
        await self.hub.close(grace)
        await self.socket.close()


@pytest.fixture
async def console(tmp_path: Path) -> AsyncIterator[Console]:
    console = Console(tmp_path / "ttya", grace=0.2)
    await console.socket.open()
    descriptors = len(os.listdir("/proc/self/fd"))
    yield console
    async with asyncio.timeout(TIMEOUT):
        await console.close(0.05)
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert os.listdir(tmp_path) == []


Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def join(console: Console) -> Client:
    return await asyncio.open_unix_connection(console.socket.path)


async def leave(client: Client) -> None:
    client[1].close()
    with contextlib.suppress(OSError):
        await client[1].wait_closed()


async def until(condition: Callable[[], bool], what: str) -> None:
    try:
        async with asyncio.timeout(TIMEOUT):
            while not condition():  # noqa: ASYNC110 -- what is waited for is seen from outside only
                await asyncio.sleep(0.001)
    except TimeoutError:
        pytest.fail(f"waited in vain: {what}")


async def read(client: Client, size: int) -> bytes:
    async with asyncio.timeout(TIMEOUT):
        return await client[0].readexactly(size)


async def test_history_then_live_and_typing(console: Console) -> None:
    console.hub.feed(b"history ")
    client = await join(console)
    assert await read(client, 8) == b"history "
    console.hub.feed(b"live")
    assert await read(client, 4) == b"live"
    client[1].write(bytes(range(256)))
    await until(lambda: len(console.typed) == 256, "the typed bytes")
    assert console.typed == bytes(range(256))
    await leave(client)
    await until(lambda: console.hub.clients == 0, "the client to be gone")


async def test_only_the_owner_may_connect(console: Console) -> None:
    assert stat.S_IMODE(os.stat(console.socket.path).st_mode) == 0o600


async def test_many_clients_at_once_and_no_more(console: Console) -> None:
    output = random.Random(7).randbytes(400_000)
    console.hub.feed(output[:300_000])
    clients = [await join(console) for _ in range(64)]
    await until(lambda: console.hub.clients == 64, "64 clients")
    over = await join(console)
    async with asyncio.timeout(TIMEOUT):
        assert await over[0].read() == b"this console has as many clients as it can have\r\n"
    console.hub.feed(output[300_000:])
    for got in await asyncio.gather(*(read(client, len(output)) for client in clients)):
        assert got == output
    for client in [over, *clients]:
        await leave(client)


async def test_a_client_that_never_reads_holds_up_nobody(console: Console) -> None:
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(console.socket.path)
        reader = await join(console)
        await until(lambda: console.hub.clients == 2, "both clients")
        piece, expected = random.Random(3).randbytes(10_000), 0
        for _ in range(400):
            console.hub.feed(piece)
            expected += len(piece)
            assert await read(reader, len(piece)) == piece
        (stuck,) = [c for c in console.socket._connections if c._transport.get_write_buffer_size()]  # type: ignore[union-attr]
        assert stuck._transport is not None
        assert stuck._transport.get_write_buffer_size() <= 65536 + 16384
        # It reads at last: the beginning, a notice, and the end.
        idle.settimeout(TIMEOUT)
        got = bytearray()
        while not got.endswith(b"!the end!"):
            if len(got) == 0:
                console.hub.feed(b"!the end!")
            got += await asyncio.get_running_loop().run_in_executor(None, idle.recv, 1 << 20)
        whole = piece * 400 + b"!the end!"
        before, lost, after = got.partition(b"\r\n[")
        count, _, rest = after.partition(b" bytes of console output are no longer kept]\r\n")
        assert whole.startswith(before)
        assert whole.endswith(rest)
        assert lost
        assert len(before) + int(count) + len(rest) == len(whole)
        await leave(reader)


async def test_clients_that_vanish_in_the_middle_of_the_history(console: Console) -> None:
    console.hub.feed(bytes(2_000_000))
    for size in (0, 1, 100_000):
        client = await join(console)
        await read(client, size)
        client[1].transport.abort()
    await until(lambda: not console.socket._connections, "the clients to be gone")
    console.hub.feed(b"x")
    assert console.hub.clients == 0


async def test_a_client_with_nothing_more_to_type_still_reads(console: Console) -> None:
    client = await join(console)
    client[1].write(b"last words\n")
    client[1].write_eof()
    await until(lambda: bytes(console.typed) == b"last words\n", "the typed bytes")
    console.hub.feed(b"answer")
    assert await read(client, 6) == b"answer"
    await leave(client)


async def test_clients_that_came_and_went_leave_room_for_others(tmp_path: Path) -> None:
    console = Console(tmp_path / "ttya", max_clients=2)
    await console.socket.open()
    for _ in range(10):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(console.socket.path)
            caller.shutdown(socket.SHUT_WR)
    client = await join(console)
    await until(lambda: console.hub.clients == 1, "room for a client")
    console.hub.feed(b"x")
    assert await read(client, 1) == b"x"
    await leave(client)
    await console.close()


async def test_a_guest_that_reads_nothing_bounds_what_clients_type(console: Console) -> None:
    console.room = 0
    clients = [await join(console) for _ in range(8)]
    await until(lambda: console.hub.clients == 8, "the clients")
    for client in clients:
        client[1].write(b"y" * 1_000_000)
    await until(lambda: console.hub.waiting_input >= 65536, "the input to fill up")
    for _ in range(100):
        await asyncio.sleep(0)
    assert console.hub.waiting_input <= 65536 + 8 * 4096
    console.room = 1 << 30
    console.hub.input_ready()
    await until(lambda: len(console.typed) == 8_000_000, "all that was typed")
    for client in clients:
        await leave(client)


async def test_the_end_reaches_those_who_read(tmp_path: Path) -> None:
    console = Console(tmp_path / "ttya")
    await console.socket.open()
    reader = await join(console)
    await until(lambda: console.hub.clients == 1, "the client")
    console.hub.feed(bytes(1_000_000) + b"power off")
    got = asyncio.ensure_future(reader[0].read())
    await console.close(TIMEOUT)
    assert (await got).endswith(b"power off")
    await leave(reader)


async def test_the_end_does_not_wait_for_those_who_do_not(tmp_path: Path) -> None:
    console = Console(tmp_path / "ttya", grace=0.05)
    await console.socket.open()
    with socket.socket(socket.AF_UNIX) as idle:
        idle.connect(console.socket.path)
        await until(lambda: console.hub.clients == 1, "the client")
        console.hub.feed(bytes(1_900_000))
        async with asyncio.timeout(TIMEOUT):
            await console.close(0.05)
    assert not console.socket._connections


@pytest.mark.parametrize("turns", range(7))
async def test_the_end_reaches_those_who_have_just_connected(tmp_path: Path, turns: int) -> None:
    """Whether the loop has come to accept them or not: a VM may end within milliseconds."""
    console = Console(tmp_path / "ttya")
    await console.socket.open()
    console.hub.feed(b"power off")
    clients = [socket.socket(socket.AF_UNIX) for _ in range(3)]
    for client in clients:
        client.connect(console.socket.path)
    for _ in range(turns):
        await asyncio.sleep(0)
    await console.socket.stop_listening()
    assert os.listdir(tmp_path) == []
    await console.close()
    for client in clients:
        with client:
            client.settimeout(TIMEOUT)
            assert (client.recv(100), client.recv(100)) == (b"power off", b"")


async def test_a_live_socket_is_refused(console: Console) -> None:
    other = Console(Path(console.socket.path))
    with pytest.raises(BusyError, match="another program listens there") as caught:
        await other.socket.open()
    assert console.socket.path in str(caught.value)
    await other.close()
    client = await join(console)
    console.hub.feed(b"still here")
    assert await read(client, 10) == b"still here"
    await leave(client)


async def test_a_live_socket_whose_queue_is_full_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ttya"
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as waiting:
        listener.bind(str(path))
        listener.listen(1)
        for _ in range(3):
            caller = waiting.enter_context(socket.socket(socket.AF_UNIX))
            caller.setblocking(False)
            caller.connect_ex(str(path))
        with pytest.raises(BusyError):
            await Console(path).socket.open()


async def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "ttya"
    code = "import os, socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1]); os.kill(os.getpid(), 9)"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, path)
    assert await process.wait() == -9
    (tmp_path / ".ttya.new").touch()
    assert path.is_socket()
    console = Console(path)
    await console.socket.open()
    await leave(await join(console))
    await console.close()
    assert os.listdir(tmp_path) == []


async def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ttya"
    path.write_text("precious")
    with pytest.raises(BusyError, match="not a socket"):
        await Console(path).socket.open()
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BusyError, match="not a socket"):
        await Console(path).socket.open()
    assert os.listdir(tmp_path) == ["ttya"]


async def test_of_many_at_once_one_wins(tmp_path: Path) -> None:
    path = tmp_path / "ttya"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    consoles = [Console(path) for _ in range(10)]
    results = await asyncio.gather(*(console.socket.open() for console in consoles), return_exceptions=True)
    winners = [console for console, result in zip(consoles, results, strict=True) if result is None]
    assert len(winners) == 1
    assert all(isinstance(result, BusyError) for result in results if result is not None)
    for console in consoles:
        await console.close()


async def test_a_name_that_is_another_socket_by_now_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "ttya"
    first, second = Console(path), Console(path)
    await first.socket.open()
    path.unlink()
    await second.socket.open()
    await first.close()
    assert path.is_socket()
    await second.close()
    assert not path.exists()


async def test_a_long_folder_and_one_that_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 120)
    with pytest.raises(BackendError, match="No such file"):
        await Console(folder / "ttya").socket.open()
    folder.mkdir()
    console = Console(folder / "ttya")
    await console.socket.open()
    assert (folder / "ttya").is_socket()
    await console.close()
    await console.close()
    assert os.listdir(folder) == []
