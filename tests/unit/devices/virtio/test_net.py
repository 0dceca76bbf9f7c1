"""virtio-net from both its sides: what a driver and a host can ask of a card, rightly and wrongly."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

from propolis.backends.net import ALL_OFFLOADS, NO_OFFLOAD, Offload
from propolis.devices.virtio import net
from tests.driver import NEEDS_RESET, until
from tests.unit.devices.virtio.card import (
    BROADCAST,
    DATA_VALID,
    ECN,
    HEADER,
    MAC,
    NEEDS_CSUM,
    OTHER,
    TCP4,
    TCP6,
    UDP,
    Card,
    frame,
    header,
    make_card,
)

if TYPE_CHECKING:
    from tests.unit.devices.virtio.rig import MakeRig

STREAM, PACKETS = socket.SOCK_STREAM, socket.SOCK_SEQPACKET
KINDS = pytest.mark.parametrize("kind", [PACKETS, STREAM], ids=["packets", "stream"])
LARGEST = 65535 + 18
SIZES = (14, 17, 18, 19, 60, 1514, 9014, LARGEST)
WITHOUT_MERGING = ~net.F_MRG_RXBUF


@pytest.fixture
async def card(make_rig: MakeRig) -> Card:
    return await make_card(make_rig)


# -- facts -------------------------------------------------------------------------------------------------------------


async def test_configuration(make_rig: MakeRig) -> None:
    card = await make_card(make_rig, pairs=3, mtu=9000)
    read = card.driver.device_config
    assert card.driver.config_read(0, 4) == 0x1041_1AF4
    assert card.driver.config_read(8, 4) == 0x0200_0001
    assert bytes(read(at, 1) for at in range(6)) == MAC
    assert [read(at, 2) for at in (6, 8, 10)] == [1, 3, 9000]
    assert card.driver.read("num_queues") == 7
    assert not ~card.driver.offered() & (net.F_MQ | net.F_MTU | net.F_MRG_RXBUF | net.F_STATUS | net.CONTROL)


@pytest.mark.parametrize("offloads", [ALL_OFFLOADS, Offload.CHECKSUM, NO_OFFLOAD], ids=str)
async def test_offered_are_the_offloads_of_the_backend(make_rig: MakeRig, offloads: Offload) -> None:
    card = await make_card(make_rig, offloads=offloads)
    offered = card.driver.offered()
    for table in (net.HOST_FEATURES, net.GUEST_FEATURES):
        assert all(bool(offered & bit) == (offload in offloads) for offload, bit in table.items())
    assert not offered & (net.F_MQ | net.F_MTU)
    await until(lambda: card.backend.negotiated == [offloads], "what was negotiated")


async def test_an_offload_without_what_it_needs_is_none(make_rig: MakeRig) -> None:
    card = await make_card(make_rig, wanted=net.F_GUEST_TSO4 | net.F_GUEST_ECN | net.F_HOST_TSO4)
    await until(lambda: card.backend.negotiated == [NO_OFFLOAD], "what was negotiated")
    await card.send(frame(3000), header(NEEDS_CSUM, TCP4, 54, 1448, 34, 16))
    assert card.stats("tx_packets", "tx_errors") == (0, 1)


# -- frames ------------------------------------------------------------------------------------------------------------


@KINDS
async def test_frames_go_out(make_rig: MakeRig, kind: int) -> None:
    card = await make_card(make_rig, kind=kind)
    for size in SIZES:
        data = frame(14) + random.Random(size).randbytes(size - 14)
        await card.send(data, cut=(7, 20, 33) if size > 30 else ())
        got = card.end.recv(1 << 17)
        assert got == (header() if kind == PACKETS else struct.pack(">I", size)) + data
    assert card.stats("tx_packets", "tx_bytes", "tx_errors", "tx_dropped") == (len(SIZES), sum(SIZES), 0, 0)


@KINDS
@pytest.mark.parametrize("wanted", [None, WITHOUT_MERGING], ids=["merging", "single"])
async def test_frames_come_in(make_rig: MakeRig, kind: int, wanted: int | None) -> None:
    card = await make_card(make_rig, kind=kind, wanted=wanted)
    for size in SIZES:
        data = frame(14) + random.Random(size).randbytes(size - 14)
        card.arrive(data)
        head, got = await card.get(13, 20, 40000, 30000)
        assert got == data
        assert head == header(buffers=1)
    assert card.stats("rx_packets", "rx_bytes", "rx_errors", "rx_dropped") == (len(SIZES), sum(SIZES), 0, 0)


@KINDS
async def test_order_is_kept_both_ways(make_rig: MakeRig, kind: int) -> None:
    card = await make_card(make_rig, kind=kind, size=256)
    for number in range(200):
        card.room(200, kick=number == 199)
    for number in range(200):
        card.arrive(frame(60 + number % 50, fill=number))
        await asyncio.sleep(0)
    done = await card.rx.wait(200)
    assert [written for _, written in done] == [HEADER + 60 + number % 50 for number in range(200)]
    for number in range(200):
        card.put(frame(60, fill=number))
    await card.tx.wait(200)
    size = (HEADER if kind == PACKETS else 4) + 60
    got = b""
    while len(got) < 200 * size:
        got += card.end.recv(1 << 16)
    assert [got[size * (number + 1) - 1] for number in range(200)] == list(range(200))


async def test_one_interrupt_for_a_batch(make_rig: MakeRig) -> None:
    card = await make_card(make_rig, wanted=net.CONTROL)
    for number in range(20):
        card.room(2048, kick=number == 19)
    await until(lambda: card.rig.device._reading, "a card that waits for frames")
    card.driver.messages()
    for _ in range(20):
        card.arrive(frame())
    await card.rx.wait(20)
    assert len(card.driver.messages()) < 20


@pytest.mark.parametrize("features", [None, net.CONTROL], ids=["event-index", "flags"])
async def test_an_idle_card_wakes_nobody(make_rig: MakeRig, features: int | None) -> None:
    """With frames waiting and no buffer, or buffers waiting and no frame, nothing runs."""
    card = await make_card(make_rig, wanted=features)
    turns = 0
    receive, transmit = card.device._receive, card.device._transmit

    def count(call: Any) -> Any:
        def counted(index: int) -> None:
            nonlocal turns
            turns += 1
            call(index)

        return counted

    card.device._receive, card.device._transmit = count(receive), count(transmit)  # type: ignore[method-assign]
    for _ in range(3):
        card.arrive(frame())
    await asyncio.sleep(0.02)
    before = turns
    await asyncio.sleep(0.02)
    assert turns == before
    for _ in range(3):
        await card.get()
    for _ in range(8):
        card.room(2048)
    await asyncio.sleep(0.02)
    before = turns
    await asyncio.sleep(0.02)
    assert turns == before


# -- mergeable buffers -------------------------------------------------------------------------------------------------


@KINDS
async def test_a_frame_is_spread_over_buffers(make_rig: MakeRig, kind: int) -> None:
    card = await make_card(make_rig, kind=kind, size=256)
    room = 1500 + HEADER
    buffers = [card.room(700, room - 700, kick=False) for _ in range(70)]
    card.rx.kick()
    for size in (1499, 1500, 1501, 3000, 9014, LARGEST):
        data = frame(14) + random.Random(size).randbytes(size - 14)
        card.arrive(data)
        count = -(-(size + HEADER) // room)
        done = await card.rx.wait(count)
        assert [written for _, written in done] == [room] * (count - 1) + [size + HEADER - room * (count - 1)]
        got = b"".join(card.read(buffers.pop(0), written) for _, written in done)
        assert got == header(buffers=count) + data
        assert card.rig.device.in_flight() == 0


async def test_53_too_few_buffers_for_a_frame(card: Card) -> None:
    """It is dropped, and the buffers stay for the next one."""
    buffers = [card.room(1000, kick=False) for _ in range(3)]
    card.rx.kick()
    card.arrive(frame(5000))
    card.arrive(frame(100, fill=7))
    [(_, written)] = await card.rx.wait()
    assert card.read(buffers[0], written) == header(buffers=1) + frame(100, fill=7)
    assert card.stats("rx_dropped", "rx_packets", "in_flight") == (1, 1, 0)
    assert not card.driver.status & NEEDS_RESET


async def test_without_merging_a_frame_too_long_is_dropped(make_rig: MakeRig) -> None:
    card = await make_card(make_rig, wanted=WITHOUT_MERGING)
    card.room(1000)
    card.arrive(frame(5000))
    card.arrive(frame(100))
    [(_, written)] = await card.rx.wait()
    assert written == HEADER + 100
    assert card.stats("rx_dropped") == (1,)


# -- NET 52, 54, 55: what a guest can send wrongly ---------------------------------------------------------------------


async def test_52_a_header_cut_short(card: Card) -> None:
    card.put(b"", header()[:11])
    await until(lambda: card.driver.status & NEEDS_RESET, "NEEDS_RESET")
    assert card.tx.used()
    await card.driver.reset()
    card.driver.restart(size=64)
    await card.send(frame())
    assert card.end.recv(2048) == header() + frame()


async def test_52_a_frame_without_an_ethernet_header(card: Card) -> None:
    for size in (0, 1, 13):
        await card.send(bytes(size))
    assert card.stats("tx_errors", "tx_packets") == (3, 0)


async def test_a_buffer_for_answers_in_the_transmit_queue(card: Card) -> None:
    card.tx.add([card.rig.ram.put(header() + frame())], [(card.rig.ram.take(64), 64)])
    card.tx.kick()
    await until(lambda: card.driver.status & NEEDS_RESET, "NEEDS_RESET")


@pytest.mark.parametrize("sizes", [(29,), (12, 17)])
async def test_a_receive_buffer_too_small_for_anything(card: Card, sizes: tuple[int, ...]) -> None:
    card.room(*sizes)
    await until(lambda: card.driver.status & NEEDS_RESET, "NEEDS_RESET")
    assert card.rig.device.in_flight() == 0


async def test_a_readable_buffer_in_the_receive_queue(card: Card) -> None:
    card.rx.add([card.rig.ram.put(bytes(64))], [(card.rig.ram.take(2048), 2048)])
    card.rx.kick()
    await until(lambda: card.driver.status & NEEDS_RESET, "NEEDS_RESET")


GOOD = header(NEEDS_CSUM, TCP4, 54, 1448, 34, 16)


WRONG_HEADERS = (
    header(NEEDS_CSUM, TCP4, 54, 0, 34, 16),
    header(0, TCP4, 54, 1448),
    header(NEEDS_CSUM, TCP4, 3001, 1448, 34, 16),
    header(NEEDS_CSUM, TCP4, 54, 1448, 2990, 9),
    header(NEEDS_CSUM, TCP4, 54, 1448, 0xFFFF, 0xFFFF),
    header(NEEDS_CSUM, 0, 0, 0, 2999, 0),
    header(NEEDS_CSUM, 0, 0, 0, 0, 2999),
    header(NEEDS_CSUM, UDP, 42, 1448, 34, 6),
    header(NEEDS_CSUM, 2, 54, 1448, 34, 16),
    header(NEEDS_CSUM, 5, 54, 1448, 34, 16),
    header(NEEDS_CSUM, ECN, 54, 1448, 34, 16),
)


async def test_54_headers_that_are_not_their_frames(card: Card) -> None:
    for head in WRONG_HEADERS:
        await card.send(frame(3000), head)
    assert card.stats("tx_errors", "tx_packets") == (len(WRONG_HEADERS), 0)
    await card.send(frame(3000), GOOD)
    assert card.end.recv(4096) == GOOD + frame(3000)


async def test_54_a_frame_longer_than_64_kib(card: Card) -> None:
    card.end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
    await card.send(bytes(LARGEST + 1))
    assert card.stats("tx_errors") == (1,)
    await card.send(frame(LARGEST))
    assert len(await asyncio.to_thread(card.end.recv, 1 << 17)) == HEADER + LARGEST


@pytest.mark.parametrize("gso", [TCP4, TCP6, TCP4 | ECN])
async def test_54_offloads_that_were_not_negotiated(make_rig: MakeRig, gso: int) -> None:
    """Each with all others."""
    missing = {TCP4: net.F_HOST_TSO4, TCP6: net.F_HOST_TSO6, TCP4 | ECN: net.F_HOST_ECN}[gso]
    card = await make_card(make_rig, wanted=~missing)
    await card.send(frame(3000), header(NEEDS_CSUM, gso, 54, 1448, 34, 16))
    assert card.stats("tx_errors", "tx_packets") == (1, 0)


async def test_what_means_nothing_from_a_guest_is_not_passed_on(card: Card) -> None:
    await card.send(frame(), header(flags=0xFF & ~NEEDS_CSUM, buffers=77))
    assert card.end.recv(2048) == header() + frame()


async def test_55_without_buffers_the_host_waits(card: Card) -> None:
    """What the host keeps is bounded by its socket; what it gave is not lost."""
    card.end.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 10000:
            card.arrive(frame(1000, fill=sent % 256))
            sent += 1
            await asyncio.sleep(0)
    assert 3 < sent < 10000
    for number in range(sent):
        _, got = await card.get()
        assert got == frame(1000, fill=number % 256)


async def test_59_a_socket_that_takes_parts_of_frames(make_rig: MakeRig) -> None:
    """Short writes to a stream: every frame arrives whole and in order, and a full socket holds the guest back."""
    card = await make_card(make_rig, kind=STREAM, size=256)
    for number in range(100):
        card.put(frame(20000, fill=number))
    await asyncio.sleep(0.02)
    assert len(card.tx.used()) < 100
    got = b""
    card.end.setblocking(False)
    async with asyncio.timeout(10):
        while len(got) < 100 * 20004:
            try:
                got += card.end.recv(30011)
            except BlockingIOError:
                await asyncio.sleep(0.0005)
    assert got == b"".join(struct.pack(">I", 20000) + frame(20000, fill=number) for number in range(100))
    assert card.stats("tx_packets", "tx_errors", "tx_dropped") == (100, 0, 0)


async def test_59_a_frame_that_the_host_refuses(make_rig: MakeRig) -> None:
    """EMSGSIZE: the frame is lost, the card works on."""
    card = await make_card(make_rig)
    with socket.socket(fileno=os.dup(card.backend.links[0].fileno())) as mine:
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    await card.send(frame(60000))
    assert card.stats("tx_errors", "tx_packets") == (1, 0)
    await card.send(frame())
    assert card.end.recv(2048) == header() + frame()


# -- a host that is not to be trusted ----------------------------------------------------------------------------------


WRONG_MESSAGES = (
    b"x",
    header(),
    header() + bytes(13),
    header(NEEDS_CSUM, 0, 0, 0, 59, 0) + frame(60),
    header(NEEDS_CSUM, TCP4, 54, 0, 34, 16) + frame(3000),
    header(0, 99, 54, 10, 34, 16) + frame(3000),
)


async def test_wrong_frames_from_the_host_do_not_reach_the_guest(card: Card) -> None:
    for message in WRONG_MESSAGES:
        card.end.send(message)
        card.arrive(frame(70))
        assert (await card.get())[1] == frame(70)
    assert card.stats("rx_errors") == (len(WRONG_MESSAGES),)


@pytest.mark.parametrize("length", [0, LARGEST + HEADER + 1, 0xFFFF_FFFF])
async def test_a_stream_that_makes_no_sense_is_cut(make_rig: MakeRig, length: int) -> None:
    card = await make_card(make_rig, kind=STREAM)
    card.backend.refuses = True
    card.room(2048)
    card.end.sendall(struct.pack(">I", length) + bytes(100))
    await until(lambda: not card.device.is_up, "a link that is down")
    assert card.driver.device_config(6, 2) & 1 == 0
    await card.send(frame())
    assert card.stats("tx_dropped", "link_breaks", "link_up") == (1, 1, 0)


async def test_a_stream_in_single_bytes(make_rig: MakeRig) -> None:
    card = await make_card(make_rig, kind=STREAM)
    card.room(2048)
    for byte in struct.pack(">I", 60) + frame(60):
        card.end.send(bytes([byte]))
        await asyncio.sleep(0)
    [(_, written)] = await card.rx.wait()
    assert written == HEADER + 60


@pytest.mark.parametrize("gso", [0, TCP4])
async def test_a_guest_without_offloads_gets_whole_frames(make_rig: MakeRig, gso: int) -> None:
    """A checksum is completed; what would have to be cut into segments is dropped."""
    card = await make_card(make_rig, wanted=net.F_MRG_RXBUF)
    data = frame(14) + random.Random(1).randbytes(87)
    head = header(NEEDS_CSUM, gso, 54 if gso else 0, 20 if gso else 0, 34, 16)
    card.arrive(data, head)
    card.arrive(frame(61), header(DATA_VALID))
    got_head, got = await card.get()
    if gso:
        assert (got_head, got) == (header(buffers=1), frame(61))
        assert card.stats("rx_dropped") == (1,)
        return
    assert got_head == header(buffers=1)
    assert got[:50] + got[52:] == data[:50] + data[52:]
    # The sum of the unfinished frame, RFC 1071, stands in place of the checksum field's own content.
    words = struct.unpack(f">{(len(data) - 34 + 1) // 2}H", data[34:] + b"\0" * (len(data) % 2))
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert int.from_bytes(got[50:52], "big") == ~total & 0xFFFF


# -- the link ----------------------------------------------------------------------------------------------------------


@KINDS
async def test_a_link_breaks_and_comes_back(make_rig: MakeRig, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "RECONNECT", 0.02)
    card = await make_card(make_rig, kind=kind)
    card.room(2048)
    card.driver.messages()
    card.end.close()
    await until(lambda: card.driver.device_config(6, 2) == 0, "a link that is down")
    config_vector = card.driver.read("config_msix_vector")
    assert config_vector in card.driver.messages()
    await until(lambda: card.driver.device_config(6, 2) & 1, "a link that is up")
    card.arrive(frame())
    [(_, written)] = await card.rx.wait()
    assert written == HEADER + 60
    await card.send(frame(90))
    assert card.end.recv(2048)[-90:] == frame(90)
    assert card.stats("link_breaks") == (1,)
    # The guest is asked to tell its neighbours, and says that it did.
    assert card.driver.device_config(6, 2) == 3
    assert await card.command(3, 0) == 0
    assert card.driver.device_config(6, 2) == 1


async def test_the_cable_is_pulled_and_plugged_in(card: Card) -> None:
    card.room(2048)
    card.device.set_link(False)
    assert card.driver.device_config(6, 2) == 0
    await card.send(frame())
    card.arrive(frame())
    await asyncio.sleep(0.01)
    assert card.stats("tx_dropped", "rx_packets", "link_breaks") == (1, 0, 0)
    card.device.set_link(True)
    await card.rx.wait()
    await card.send(frame())
    assert card.end.recv(2048) == header() + frame()


# -- life cycle --------------------------------------------------------------------------------------------------------


async def test_paused_nothing_moves(card: Card) -> None:
    card.room(2048)
    await until(lambda: card.rig.device._reading, "a card that waits for frames")
    card.device.pause()
    await card.device.drained()
    card.arrive(frame())
    card.put(frame())
    await asyncio.sleep(0.01)
    assert (card.rx.used(), card.tx.used()) == ([], [])
    card.device.resume()
    await card.rx.wait()
    await card.tx.wait()
    assert card.end.recv(2048) == header() + frame()


async def test_reset_forgets_what_the_driver_set(card: Card) -> None:
    card.room(2048)
    assert await card.command(1, 1, OTHER) == 0
    assert await card.command(0, 0, b"\0") == 0
    await card.driver.reset()
    assert card.rig.device.in_flight() == 0
    assert bytes(card.driver.device_config(at, 1) for at in range(6)) == MAC
    card.driver.restart(size=64)
    card.arrive(frame(to=bytes.fromhex("020000000009")))
    assert (await card.get())[1][:6] == bytes.fromhex("020000000009")


async def test_without_bus_mastering_memory_is_left_alone(card: Card) -> None:
    card.room(2048)
    await until(lambda: card.rig.device._reading, "a card that waits for frames")
    card.driver.config_write(4, 2, 0x2)
    card.arrive(frame())
    await asyncio.sleep(0.01)
    assert card.rx.used() == []
    card.driver.config_write(4, 2, 0x6)
    await card.rx.wait()


# -- NET 56 to 58: the control queue -----------------------------------------------------------------------------------

TABLE_SET, ADDR_SET = 0, 1


def table(*addresses: bytes, count: int | None = None) -> bytes:
    return struct.pack("<I", len(addresses) if count is None else count) + b"".join(addresses)


MULTICAST = bytes.fromhex("01005e000001")


async def takes(card: Card, to: bytes, kind: int = 0x0800, rest: bytes = b"") -> bool:
    """Whether the card hands this on; a broadcast after it always arrives."""
    data = to + OTHER + struct.pack(">H", kind) + rest.ljust(50, b"\0")
    card.arrive(data)
    card.arrive(frame(to=BROADCAST))
    _, got = await card.get()
    if got == data:
        await card.get()
        return True
    assert got == frame(to=BROADCAST)
    return False


async def test_receive_filter(card: Card) -> None:
    assert await takes(card, OTHER)  # before any command all are taken
    assert await card.command(0, 0, b"\0") == 0
    assert await takes(card, MAC)
    assert not await takes(card, OTHER)
    assert not await takes(card, MULTICAST)
    assert await card.command(1, TABLE_SET, table(OTHER) + table(MULTICAST)) == 0
    assert await takes(card, OTHER)
    assert await takes(card, MULTICAST)
    assert not await takes(card, MULTICAST[:5] + b"\x02")
    assert await card.command(1, TABLE_SET, table() + table()) == 0
    assert not await takes(card, OTHER)
    for command, address in ((1, MULTICAST), (2, OTHER)):
        assert await card.command(0, command, b"\1") == 0
        assert await takes(card, address)
        assert await card.command(0, command, b"\0") == 0
        assert not await takes(card, address)
    assert await card.command(0, 4, b"\1") == 0
    assert not await takes(card, MAC)
    assert await card.command(0, 4, b"\0") == 0
    assert await card.command(0, 5, b"\1") == 0
    card.arrive(frame(to=BROADCAST))
    card.arrive(frame(61))
    assert (await card.get())[1] == frame(61)
    assert await card.command(0, 5, b"\0") == 0
    assert await card.command(0, 0, b"\1") == 0
    assert await takes(card, OTHER)
    assert card.stats("rx_filtered")[0] > 5


async def test_more_addresses_than_the_table_holds(card: Card) -> None:
    assert await card.command(0, 0, b"\0") == 0
    many = [bytes([2, 1, 0, 0, 0, i]) for i in range(65)]
    assert await card.command(1, TABLE_SET, table(*many) + table()) == 0
    assert await takes(card, OTHER)
    assert not await takes(card, MULTICAST)
    assert await card.command(1, TABLE_SET, table(*many[:64]) + table()) == 0
    assert not await takes(card, OTHER)
    assert await takes(card, many[63])


async def test_vlans(card: Card) -> None:
    assert await card.command(0, 0, b"\0") == 0
    assert not await takes(card, MAC, 0x8100, b"\0\x05")
    assert await card.command(2, 0, struct.pack("<H", 5)) == 0
    assert await takes(card, MAC, 0x8100, b"\xe0\x05")
    assert not await takes(card, MAC, 0x8100, b"\0\x06")
    assert await card.command(2, 1, struct.pack("<H", 5)) == 0
    assert not await takes(card, MAC, 0x8100, b"\0\x05")


async def test_the_guest_changes_its_address(card: Card) -> None:
    assert await card.command(0, 0, b"\0") == 0
    assert await card.command(1, ADDR_SET, OTHER) == 0
    assert bytes(card.driver.device_config(at, 1) for at in range(6)) == OTHER
    assert await takes(card, OTHER)
    assert not await takes(card, MAC)


NO_COMMANDS = (
    b"", b"\0", b"\6\0\1", b"\xff\xff", b"\0\6\1", b"\0\0", b"\0\0\1\1",
    b"\1\1" + bytes(5), b"\1\1" + bytes(7), b"\1\1" + MULTICAST, b"\1\2" + bytes(6),
    b"\1\0" + table(count=0xFFFF_FFFF) + table(), b"\1\0" + table(MAC, count=2) + table(), b"\1\0" + table(),
    b"\1\0" + table() + table(count=1), b"\1\0" + table() + table() + b"x",
    b"\2\0\0\x10", b"\2\2\1\0", b"\2\0\1", b"\3\1", b"\3\0x", b"\4\0\1\0", b"\4\0\0\0", b"\4\0\xff\xff",
    b"\5\0" + bytes(7), b"\5\0" + struct.pack("<Q", 1 << 10), b"\5\0" + struct.pack("<Q", 1 << 63),
)  # fmt: skip


async def test_56_commands_that_are_none(card: Card) -> None:
    for command in NO_COMMANDS:
        answer = card.rig.ram.put(b"\xee")
        card.control.add([card.rig.ram.put(command)] if command else [], [answer])
        card.control.kick()
        assert [written for _, written in await card.control.wait()] == [1]
        assert card.rig.vm.memory.read(answer[0], 1) == b"\1"
    assert await card.command(0, 0, b"\1") == 0


async def test_56_a_command_longer_than_any(card: Card) -> None:
    answer = card.rig.ram.put(b"\xee")
    card.control.add([card.rig.ram.put(b"\1\0"), (card.rig.ram.take(1 << 20), 1 << 20)], [answer])
    card.control.kick()
    await card.control.wait()
    assert card.rig.vm.memory.read(answer[0], 1) == b"\1"


async def test_56_a_command_without_room_for_its_answer(card: Card) -> None:
    card.control.add([card.rig.ram.put(b"\0\0\1")])
    card.control.kick()
    await until(lambda: card.driver.status & NEEDS_RESET, "NEEDS_RESET")


async def test_56_commands_of_features_that_were_not_accepted(make_rig: MakeRig) -> None:
    card = await make_card(make_rig, wanted=net.F_CTRL_VQ)
    for kind, command, data in ((0, 0, b"\1"), (0, 2, b"\1"), (1, 0, table() + table()), (1, 1, OTHER), (2, 0, b"\1\0"),
                                (3, 0, b""), (4, 0, b"\1\0"), (5, 0, bytes(8))):  # fmt: skip
        assert await card.command(kind, command, data) == 1


async def test_guest_offloads_are_changed(card: Card) -> None:
    assert await card.command(5, 0, struct.pack("<Q", net.F_GUEST_CSUM)) == 0
    assert await card.command(5, 0, bytes(8)) == 0
    assert card.backend.negotiated == [ALL_OFFLOADS, Offload.CHECKSUM, NO_OFFLOAD]


async def test_57_an_address_of_ones_own_only(make_rig: MakeRig) -> None:
    card = await make_card(make_rig, own_address_only=True)
    assert not card.driver.offered() & net.F_CTRL_MAC_ADDR
    assert await card.command(1, ADDR_SET, OTHER) == 1
    await card.send(frame(source=OTHER))
    await card.send(frame(source=MAC))
    assert card.end.recv(2048) == header() + frame(source=MAC)
    assert card.stats("tx_dropped", "tx_packets") == (1, 1)


async def test_58_frames_beyond_the_mtu_pass(make_rig: MakeRig) -> None:
    """The MTU is advice for the driver (§5.1.4.1); longer frames are for who is behind the card."""
    card = await make_card(make_rig, mtu=1500)
    await card.send(frame(4000))
    assert len(card.end.recv(8192)) == HEADER + 4000
    card.arrive(frame(4000))
    assert len((await card.get(5000))[1]) == 4000


# -- several pairs -----------------------------------------------------------------------------------------------------


async def test_pairs_are_used_once_the_driver_says_so(make_rig: MakeRig) -> None:
    card = await make_card(make_rig, pairs=3)
    assert card.backend.used[-1] == 1
    card.room(2048, queue=2)
    card.put(frame(70), queue=3)
    await asyncio.sleep(0.01)
    assert card.driver.queues[3].used() == []
    assert await card.command(4, 0, struct.pack("<H", 4)) == 1
    assert await card.command(4, 0, struct.pack("<H", 0)) == 1
    assert await card.command(4, 0, struct.pack("<H", 2)) == 0
    assert card.backend.used[-1] == 2
    await card.driver.queues[3].wait()
    assert card.backend.ends[1].recv(2048) == header() + frame(70)
    card.backend.ends[1].send(header() + frame(80))
    await card.driver.queues[2].wait()
    await card.driver.reset()
    assert card.backend.used[-1] == 1


async def test_without_mq_the_third_queue_is_for_control(make_rig: MakeRig) -> None:
    card = await make_card(make_rig, pairs=2, wanted=~net.F_MQ)
    answer = card.rig.ram.put(b"\xee")
    ring = card.driver.queues[2]
    ring.add([card.rig.ram.put(b"\0\0\1")], [answer])
    ring.kick()
    await ring.wait()
    assert card.rig.vm.memory.read(answer[0], 1) == b"\0"


# -- NET 60, 28 and chance ---------------------------------------------------------------------------------------------


@KINDS
async def test_60_a_flood_leaves_others_their_turn(make_rig: MakeRig, kind: int) -> None:
    """Between two turns of anything else no more than a few batches are moved."""
    card = await make_card(make_rig, kind=kind, size=256)
    stop = False

    async def flood() -> None:
        while not stop:
            for _ in range(len(card.tx.free)):
                card.put(frame(64))
            card.tx.used()
            card.rig.ram.next = mark
            await asyncio.sleep(0)

    mark = card.rig.ram.next
    card.end.setblocking(False)

    def drain() -> None:
        card.end.recv(1 << 18)

    loop = asyncio.get_running_loop()
    loop.add_reader(card.end.fileno(), drain)
    task = loop.create_task(flood())
    try:
        most = 0
        for _ in range(200):
            before = card.stats("tx_packets")[0]
            await asyncio.sleep(0)
            most = max(most, card.stats("tx_packets")[0] - before)
    finally:
        stop = True
        await task
        loop.remove_reader(card.end.fileno())
    assert card.stats("tx_packets")[0] > 300
    assert most <= 4 * net.BUDGET


def empty(end: socket.socket) -> None:
    """Takes all that is there; the socket is non-blocking."""
    with contextlib.suppress(BlockingIOError):
        while True:
            end.recv(1 << 17)


async def test_chance(make_rig: MakeRig) -> None:
    """Frames and headers of any kind, rings of any shape: nothing is in flight afterwards, and a reset mends all."""
    seed = int(os.environ.get("SEED") or random.randrange(1 << 32))
    print("seed", seed)
    dice = random.Random(seed)
    card = await make_card(make_rig, pairs=2)
    start = card.rig.ram.next
    for _ in range(60):
        for _ in range(dice.randrange(1, 12)):
            queue = card.driver.queues[dice.randrange(len(card.driver.queues))]
            parts = []
            for _ in range(dice.randrange(1, 4)):
                begin = dice.choice((header(), GOOD, frame(), b"", dice.randbytes(4)))
                parts.append(card.rig.ram.put(begin + dice.randbytes(1 + dice.randrange(200))))
            split = dice.choice((0, len(parts), dice.randrange(len(parts) + 1)))
            if len(queue.free) >= len(parts):
                queue.add(parts[:split], parts[split:])
            if dice.random() < 0.1:
                address = queue.desc + 16 * dice.randrange(queue.size)
                card.rig.vm.memory.write(address + dice.randrange(16), dice.randbytes(1))
            queue.kick()
        for end in card.backend.ends:
            end.setblocking(False)
            for _ in range(dice.randrange(4)):
                begin = dice.choice((header(), GOOD, dice.randbytes(12)))
                with contextlib.suppress(BlockingIOError):
                    end.send(begin + dice.randbytes(dice.randrange(1, 3000)))
            empty(end)
        await asyncio.sleep(0)
        assert card.rig.device.in_flight() == 0
        if card.driver.status & NEEDS_RESET or dice.random() < 0.2:
            await card.driver.reset()
            card.rig.ram.next = start
            card.driver.restart(dice.choice((None, dice.getrandbits(32))), size=64)
    await card.driver.reset()
    card.rig.ram.next = start
    card.driver.restart(size=64)
    for end in card.backend.ends:
        empty(end)
    await card.send(frame())
    assert card.end.recv(2048) == header() + frame()
