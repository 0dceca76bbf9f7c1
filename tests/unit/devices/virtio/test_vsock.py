"""virtio-vsock from both sides: the guest's driver, and programs of the host on unix sockets."""

import asyncio
import os
import random
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from propolis.devices.virtio import vsock
from propolis.devices.virtio.vsock import EVENT, MAX_CONNECTIONS, MAX_FAREWELLS, RX, TX
from propolis.devices.virtio.vsock_connection import BUFFER
from propolis.devices.virtio.vsock_packet import HEADER_BYTES, SHUT_BOTH, SHUT_RECEIVE, SHUT_SEND, Header, Op
from propolis.host_sockets import HostListener
from tests.driver import NEEDS_RESET, until
from tests.unit.devices.virtio.hammer import hammer
from tests.unit.devices.virtio.rig import MakeRig
from tests.unit.devices.virtio.vsock_guest import CID, PORT, Guest, accept, make_guest, read, server


@pytest_asyncio.fixture
async def guest(make_rig: MakeRig, tmp_path: Path) -> AsyncIterator[Guest]:
    """A guest whose driver has not begun."""
    listener = HostListener(str(tmp_path / "v.sock"))
    try:
        yield await make_guest(make_rig, listener, tmp_path / "v.sock")
    finally:
        listener._name.release_now()


# -- streams -----------------------------------------------------------------------------------------------------------


async def test_the_guest_calls(guest: Guest) -> None:
    guest.begin()
    assert guest.rig.driver.device_config(0, 4) == CID
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            guest.send(Op.RW, 52, b"hello")
            assert await read(peer, 5) == b"hello"
            peer.send(b"and you")
            header, data = await guest.next(Op.RW)
            assert data == b"and you"
            assert header.fwd_cnt == 5
            assert header.buf_alloc == BUFFER


async def test_the_host_calls(guest: Guest) -> None:
    """What a client sends along with its first line is the guest's."""
    guest.begin()
    with guest.client() as client:
        port = await guest.answer_client(client, b"early")
        assert (await guest.next(Op.RW))[1] == b"early"
        guest.send(Op.RW, port, b"late")
        assert await read(client, 4) == b"late"


@pytest.mark.parametrize(
    "line",
    [b"CONNECT\n", b"CONNECT x\n", b"connect 5\n", b"CONNECT 4294967296\n", b"CONNECT 5 6\n", b"\n", b"x" * 64, b""],
)
async def test_a_client_that_says_something_else(guest: Guest, line: bytes) -> None:
    guest.begin()
    with guest.client() as client:
        client.send(line)
        client.shutdown(socket.SHUT_WR)
        assert await read(client, 1) == b""
        await guest.nothing()


async def test_a_client_that_says_nothing(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("propolis.devices.virtio.vsock_connection.PATIENCE", 0.05)
    guest.begin()
    with guest.client() as client:
        client.send(b"CONN")
        assert await read(client, 1) == b""


async def test_a_guest_that_does_not_answer(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client is sent away, and what it says later has no connection any more."""
    monkeypatch.setattr("propolis.devices.virtio.vsock_connection.PATIENCE", 0.05)
    guest.begin()
    with guest.client() as client:
        client.send(b"CONNECT 7\n")
        header, _ = await guest.next(Op.REQUEST)
        assert await read(client, 1) == b""
        await guest.next(Op.RST)
        guest.send(Op.RESPONSE, header.src_port, src_port=7)
        await guest.next(Op.RST)


async def test_a_guest_that_refuses(guest: Guest) -> None:
    guest.begin()
    with guest.client() as client:
        client.send(b"CONNECT 7\n")
        header, _ = await guest.next(Op.REQUEST)
        guest.send(Op.RST, header.src_port, src_port=7)
        assert await read(client, 1) == b""
        await guest.nothing()


async def test_a_client_while_no_driver_is_there(guest: Guest) -> None:
    with guest.client() as client:
        assert await read(client, 1) == b""


async def test_much_both_ways(guest: Guest) -> None:
    """More than all buffers hold, through a peer that reads when it likes."""
    guest.begin()
    content = random.Random(1).randbytes(1 << 19)
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            loop = asyncio.get_running_loop()
            sending = asyncio.ensure_future(loop.sock_sendall(peer, content))
            got = b""
            while len(got) < len(content):
                await asyncio.sleep(0)
                guest.look()
                got += b"".join(data for _, data in guest.received)
                guest.forwarded = len(got)
                if Op.CREDIT_REQUEST in {header.op for header, _ in guest.received}:
                    guest.send(Op.CREDIT_UPDATE, 52)
                guest.received.clear()
            assert got == content
            await sending
            sent = room = 0
            room = BUFFER
            back = bytearray()
            while len(back) < len(content):
                while sent < len(content) and sent < room:
                    part = content[sent : min(sent + 16384, room)]
                    guest.send(Op.RW, 52, part)
                    sent += len(part)
                    await guest.until_sent()
                back += await read(peer, sent - len(back))
                await asyncio.sleep(0)
                guest.look()
                for header, _ in guest.received:
                    room = header.fwd_cnt + header.buf_alloc
                guest.received.clear()
            assert back == content


# -- item 61 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [6, 4096, 1 << 16, (1 << 32) - 1])
async def test_a_length_beyond_the_buffers(guest: Guest, length: int) -> None:
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            guest.send(Op.RW, 52, b"short", length=length)
            await guest.next(Op.RST)
            assert await read(peer, 1) == b""


async def test_packets_that_are_none(guest: Guest) -> None:
    """Shorter than a header, of an operation that is none, of another kind of socket, to another host."""
    guest.begin()
    guest.send_raw(b"x" * (HEADER_BYTES - 1))
    guest.send(99, 52)
    await guest.next(Op.RST)
    guest.send(Op.REQUEST, 52, kind=2)
    header, _ = await guest.next(Op.RST)
    assert header.kind == 2
    guest.send(0, 52)
    await guest.next(Op.RST)
    assert guest.stats["bad_packets"] == 1
    guest.send(Op.RST, 52)
    await guest.nothing()


async def test_receive_buffers_of_all_sizes(guest: Guest) -> None:
    """What does not fit into one goes on in the next; one without room for a header needs a reset."""
    guest.begin(4)
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            for size in (HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 3):
                guest.give(1, size)
            peer.send(b"0123456789" * 1000)
            got = b""
            while len(got) < 10000:
                guest.look()
                got += b"".join(data for _, data in guest.received)
                guest.received.clear()
                await asyncio.sleep(0)
            assert got == b"0123456789" * 1000
    await guest.rig.driver.reset()
    guest.rig.driver.restart()
    guest.places.clear()
    guest.give(1, HEADER_BYTES - 1)
    guest.send(Op.REQUEST, 53)
    await until(lambda: guest.rig.driver.status & NEEDS_RESET, "a device that needs a reset")


# -- item 62: credit ---------------------------------------------------------------------------------------------------


async def test_more_than_the_guest_was_granted(guest: Guest) -> None:
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            for _ in range(64):  # what nobody reads fills the kernel's buffer, and then ours
                guest.send(Op.RW, 52, bytes(16384))
                await guest.until_sent()
                if Op.RST in {header.op for header, _ in guest.received}:
                    break
                guest.look()
            guest.received = [entry for entry in guest.received if entry[0].op == Op.RST]
            await guest.next(Op.RST)
            assert guest.stats["connections"] == 0


async def test_a_guest_without_room_gets_nothing(guest: Guest) -> None:
    """No more than its credit, and a question when that is used up."""
    guest.begin()
    guest.alloc = 10
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            peer.send(b"x" * 100)
            assert (await guest.next(Op.RW))[1] == b"x" * 10
            await guest.next(Op.CREDIT_REQUEST)
            await guest.nothing()
            guest.forwarded = 4
            guest.send(Op.CREDIT_UPDATE, 52)
            assert (await guest.next(Op.RW))[1] == b"x" * 4


@pytest.mark.parametrize(
    ("alloc", "forwarded"),
    [((1 << 32) - 1, 0), ((1 << 32) - 1, (1 << 32) - 1), (0, 0), (0, 1 << 31), (1 << 31, 5), (10, (1 << 32) - 1)],
)
async def test_credit_that_makes_no_sense(guest: Guest, alloc: int, forwarded: int) -> None:
    """Counters that run backwards or far ahead: what comes fits the buffers, and the device goes on."""
    guest.begin()
    guest.alloc, guest.forwarded = alloc, forwarded
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            peer.send(b"x" * 9000)
            for _ in range(20):
                await asyncio.sleep(0)
            guest.look()
            assert sum(len(data) for _, data in guest.received) <= 9000
            guest.received.clear()
            guest.send(Op.RST, 52)
            assert await read(peer, 1) == b""
    await until(lambda: guest.stats["connections"] == 0, "the end of the connection")


async def test_a_question_for_credit_is_answered(guest: Guest) -> None:
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener):
            guest.send(Op.RW, 52, b"12345")
            guest.send(Op.CREDIT_REQUEST, 52)
            header, _ = await guest.next(Op.CREDIT_UPDATE)
            assert (header.buf_alloc, header.fwd_cnt) == (BUFFER, 5)


# -- items 63 to 65: the end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [Op.RW, Op.SHUTDOWN, Op.RESPONSE, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST])
async def test_a_packet_after_the_end(guest: Guest, op: Op) -> None:
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            guest.send(Op.RST, 52)
            assert await read(peer, 1) == b""
            guest.send(op, 52)
            await guest.next(Op.RST)
            await guest.nothing()


async def test_nobody_is_there(guest: Guest) -> None:
    guest.begin()
    guest.send(Op.REQUEST, 52)
    await guest.next(Op.RST)


async def test_the_same_ports_again(guest: Guest) -> None:
    """A request on a connection that is there ends it; the ports can be used anew after that."""
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            guest.send(Op.REQUEST, 52)
            await guest.next(Op.RST)
            assert await read(peer, 1) == b""
        await guest.call()
        (await accept(listener)).close()


@pytest.mark.parametrize("op", [Op.RESPONSE, 77])
async def test_what_nobody_asked_for(guest: Guest, op: int) -> None:
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            guest.send(op, 52)
            await guest.next(Op.RST)
            assert await read(peer, 1) == b""


async def test_the_guest_has_sent_all(guest: Guest) -> None:
    """Its peer reads the end, and may go on sending; the end of that is the end of the connection."""
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            guest.send(Op.RW, 52, b"last")
            guest.send(Op.SHUTDOWN, 52, flags=SHUT_SEND)
            assert await read(peer, 100) == b"last"
            peer.send(b"answer")
            assert (await guest.next(Op.RW))[1] == b"answer"
            guest.send(Op.RW, 52, b"too late")
            await guest.next(Op.RST)


async def test_the_peer_has_sent_all(guest: Guest) -> None:
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            peer.send(b"last")
            peer.shutdown(socket.SHUT_WR)
            assert (await guest.next(Op.RW))[1] == b"last"
            assert (await guest.next(Op.SHUTDOWN))[0].flags == SHUT_SEND
            guest.send(Op.RW, 52, b"answer")
            assert await read(peer, 6) == b"answer"
            guest.send(Op.SHUTDOWN, 52, flags=SHUT_BOTH)
            await guest.next(Op.RST)
            assert await read(peer, 1) == b""


async def test_the_peer_is_gone(guest: Guest) -> None:
    """The guest is told by a shutdown both ways, after all that was sent."""
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            peer.send(b"last")
        assert (await guest.next(Op.RW))[1] == b"last"
        assert (await guest.next(Op.SHUTDOWN))[0].flags == SHUT_BOTH
        assert guest.stats["connections"] == 0
        guest.send(Op.SHUTDOWN, 52, flags=SHUT_BOTH)
        await guest.next(Op.RST)


async def test_the_guest_reads_no_more(guest: Guest) -> None:
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            guest.send(Op.SHUTDOWN, 52, flags=SHUT_RECEIVE)
            await guest.until_sent()
            peer.send(b"nobody reads this")
            await guest.nothing()
            guest.send(Op.SHUTDOWN, 52, flags=SHUT_SEND)
            await guest.next(Op.RST)


async def test_all_that_was_sent_arrives_before_the_end(guest: Guest) -> None:
    """Through a peer that is slow, after the guest has closed."""
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            for _ in range(3):
                guest.send(Op.RW, 52, bytes(16384))
            guest.send(Op.SHUTDOWN, 52, flags=SHUT_BOTH)
            await guest.until_sent()
            assert len(await read(peer, 1 << 20)) == 3 * 16384
    await until(lambda: guest.stats["connections"] == 0, "the end of the connection")


# -- item 64: many ----------------------------------------------------------------------------------------------------


async def test_as_many_as_there_can_be(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is refused to the guest; a client waits until another has gone."""
    monkeypatch.setattr(vsock, "MAX_CONNECTIONS", 5)
    guest.begin()
    with server(guest.path):
        for port in range(5):
            guest.send(Op.REQUEST, 52, src_port=port)
            await guest.next(Op.RESPONSE)
        guest.send(Op.REQUEST, 52, src_port=5)
        await guest.next(Op.RST)
        with guest.client() as client:
            client.send(b"CONNECT 9\n")
            await guest.nothing()
            guest.send(Op.RST, 52, src_port=0)
            assert (await guest.next(Op.REQUEST))[0].dst_port == 9
    assert MAX_CONNECTIONS == 512


async def test_connections_without_end(guest: Guest, rounds: int) -> None:
    """One after the other, both ways: nothing is left of any."""
    guest.begin()
    fds = len(os.listdir("/proc/self/fd"))
    with server(guest.path) as listener:
        for port in range(20 * rounds):
            guest.send(Op.REQUEST, 52, src_port=port)
            await guest.next(Op.RESPONSE)
            guest.send(Op.RST, 52, src_port=port)
            (await accept(listener)).close()
            with guest.client() as client:
                client.send(b"CONNECT 9\n")
                header, _ = await guest.next(Op.REQUEST)
                guest.send(Op.RST, header.src_port, src_port=9)
                assert await read(client, 1) == b""
    assert guest.stats["connections"] == 0
    assert guest.stats["accepted"] == guest.stats["requested"] == 20 * rounds
    await until(lambda: len(os.listdir("/proc/self/fd")) == fds, "the last socket closed")


async def test_a_guest_that_reads_no_answers(guest: Guest) -> None:
    """Without receive buffers so many resets wait, and no more: then nothing is taken from it, until it reads."""
    guest.begin(0)
    queue = guest.rig.driver.queues[TX]
    for _ in range(3):
        while queue.free:
            header = guest.header(Op.RW, 52)
            queue.add([guest.rig.ram.put(header.pack())])
        queue.kick()
        for _ in range(20):
            await asyncio.sleep(0)
        queue.used()
    assert len(guest.rig.device._farewells) == MAX_FAREWELLS
    assert len(queue.chains) > 0
    guest.give(64)
    while queue.chains:
        guest.look()
        queue.used()
        await asyncio.sleep(0)


# -- item 67 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cid", [0, 1, 2, 4, CID | 1 << 32, (1 << 64) - 1])
async def test_a_guest_that_is_another(guest: Guest, cid: int) -> None:
    guest.begin()
    with server(guest.path) as listener:
        guest.send(Op.REQUEST, 52, src_cid=cid)
        await guest.nothing()
        assert guest.stats["bad_packets"] == 1
        await guest.call()
        (await accept(listener)).close()


async def test_a_host_that_is_another(guest: Guest) -> None:
    """Answered as from there, so that the guest knows what is meant."""
    guest.begin()
    guest.send(Op.REQUEST, 52, dst_cid=CID + 1)
    await until(guest.rig.driver.queues[RX].used, "an answer")
    places = sorted(guest.places.values())
    found = [Header.parse(guest.rig.vm.memory.read(at, HEADER_BYTES)) for at in places]
    assert [h for h in found if h and h.op == Op.RST] == [
        Header(CID + 1, CID, 52, PORT, 0, 1, Op.RST, 0, 0, 0),
    ]


# -- item 68: names on the host ----------------------------------------------------------------------------------------


async def test_what_is_no_socket_there(guest: Guest, tmp_path: Path) -> None:
    """A link, also to a live socket, a file, a folder: the guest reaches none of them."""
    guest.begin()
    with server(tmp_path / "elsewhere") as listener:
        (tmp_path / "v.sock_52").symlink_to(tmp_path / "elsewhere_52")
        (tmp_path / "v.sock_53").write_text("")
        (tmp_path / "v.sock_54").mkdir()
        for port in (52, 53, 54):
            guest.send(Op.REQUEST, port)
            assert (await guest.next(Op.RST))[0].src_port == port
        with pytest.raises(BlockingIOError):
            listener.accept()


# -- life cycle --------------------------------------------------------------------------------------------------------


async def test_a_reset_ends_all_connections(guest: Guest) -> None:
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer, guest.client() as client:
            await guest.answer_client(client)
            await guest.rig.driver.reset()
            assert await read(peer, 1) == b""
            assert await read(client, 1) == b""
            guest.places.clear()
            guest.rig.driver.restart()
            guest.give(8)
            await guest.call()
            (await accept(listener)).close()


async def test_a_pause_keeps_them(guest: Guest) -> None:
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            guest.rig.device.pause()
            await guest.rig.device.drained()
            peer.send(b"meanwhile")
            guest.send(Op.RW, 52, b"from the guest")
            await guest.nothing()
            guest.rig.device.resume()
            assert (await guest.next(Op.RW))[1] == b"meanwhile"
            assert await read(peer, 14) == b"from the guest"


async def test_the_transport_is_reset(guest: Guest) -> None:
    """The driver is told in its event queue, as soon as that has a buffer."""
    guest.begin()
    with server(guest.path) as listener:
        await guest.call()
        with await accept(listener) as peer:
            guest.rig.device.reset_transport()
            assert await read(peer, 1) == b""
    queue = guest.rig.driver.queues[EVENT]
    head = queue.add([], [(at := guest.rig.ram.take(8), 8)])
    queue.kick()
    assert await queue.wait() == [(head, 4)]
    assert guest.rig.vm.memory.read(at, 4) == bytes(4)


async def test_broken_rings(guest: Guest) -> None:
    for index in (RX, TX):
        guest.rig.driver.queues.clear()
        if index == RX:
            guest.begin(0)
        else:
            await guest.rig.driver.reset()
            guest.rig.driver.restart()
        queue = guest.rig.driver.queues[index]
        queue.set_desc(0, 1 << 50, 64, 2 if index == RX else 0)
        queue.offer(0)
        queue.kick()
        if index == RX:  # looked at once there is something to be received
            guest.send(Op.REQUEST, 52)
        await until(lambda: guest.rig.driver.status & NEEDS_RESET, "a device that needs a reset")


def _packet(chance: random.Random) -> bytes:
    """Nearly right: the fields that matter are often what they should be."""
    host_port, op = chance.choice((52, 53, 1 << 30, chance.getrandbits(32))), chance.choice((1, 2, 3, 4, 5, 6, 7, 8))
    data = chance.randbytes(chance.choice((0, 1, 100, 4000)))
    header = Header(
        src_cid=CID if chance.random() < 0.95 else chance.getrandbits(64),
        dst_cid=2 if chance.random() < 0.95 else chance.getrandbits(64),
        src_port=chance.choice((1, 2, 9)),
        dst_port=host_port,
        length=len(data) if chance.random() < 0.9 else chance.getrandbits(32),
        kind=1 if chance.random() < 0.95 else chance.getrandbits(16),
        op=op if chance.random() < 0.95 else chance.getrandbits(16),
        flags=chance.randrange(4),
        buf_alloc=chance.choice((0, 10, 1 << 16, (1 << 32) - 1)),
        fwd_cnt=chance.choice((0, 10, chance.getrandbits(32))),
    )
    return header.pack() + data


async def test_random_drivers(guest: Guest, rounds: int) -> None:
    """Beside a server that echoes, and clients that come and go."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(4096):
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()

    async with await asyncio.start_unix_server(echo, f"{guest.path}_52") as serving:
        clients = [guest.client() for _ in range(8)]
        for client in clients:
            client.send(b"CONNECT 9\nhello")
        for seed in [7, *(random.randrange(1 << 32) for _ in range(rounds - 1))]:
            guest.rig.driver.queues.clear()
            await hammer(guest.rig, seed, {TX: _packet})
            await guest.rig.driver.reset()
            guest.rig.ram.next = guest.rig.ram.base
        for client in clients:
            client.close()
        assert guest.stats["connections"] == 0
        serving.close()
        await until(lambda: not [task for task in asyncio.all_tasks() if "echo" in repr(task)], "the last echo")
