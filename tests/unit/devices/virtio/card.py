"""A network card under test: a rig with a VirtioNet, and the test at the other end of its links."""

from __future__ import annotations

import itertools
import socket
import struct
from typing import TYPE_CHECKING, Any

from propolis.backends.net import ALL_OFFLOADS, NO_OFFLOAD, NetBackend, Offload, PacketLink, StreamLink
from propolis.devices.virtio.net import VirtioNet

if TYPE_CHECKING:
    from propolis.hypervisor._replay import ReplayVm
    from tests.driver import DriverQueue, VirtioDriver
    from tests.unit.devices.virtio.rig import MakeRig, Rig

MAC = bytes.fromhex("020000000001")
OTHER = bytes.fromhex("020000000002")
BROADCAST = b"\xff" * 6
HEADER = 12
NEEDS_CSUM, DATA_VALID = 1, 2
TCP4, UDP, TCP6, ECN = 1, 3, 4, 0x80


def header(
    flags: int = 0, gso: int = 0, hdr_len: int = 0, gso_size: int = 0, start: int = 0, offset: int = 0, buffers: int = 0
) -> bytes:
    """struct virtio_net_hdr_v1, §5.1.6."""
    return struct.pack("<BBHHHHH", flags, gso, hdr_len, gso_size, start, offset, buffers)


def frame(size: int = 60, *, to: bytes = MAC, source: bytes = OTHER, kind: int = 0x0800, fill: int = 0x55) -> bytes:
    """An Ethernet frame of that many bytes."""
    return (to + source + struct.pack(">H", kind)).ljust(14, b"\0") + bytes([fill]) * (size - 14)


class Sockets(NetBackend):
    """Pairs of sockets, the other ends of which the test has."""

    def __init__(self, kind: int, pairs: int, *, has_header: bool, offloads: Offload) -> None:
        self.takes = self.gives = offloads
        self.links = []
        self.ends: list[socket.socket] = []
        self.negotiated: list[Offload] = []
        self.used: list[int] = []
        self.refuses = False
        self._kind = kind
        self._has_header = has_header
        for _ in range(pairs):
            self._add()

    def _add(self) -> None:
        mine, end = socket.socketpair(socket.AF_UNIX, self._kind)
        mine.setblocking(False)
        end.settimeout(10)
        link = StreamLink if self._kind == socket.SOCK_STREAM else PacketLink
        self.links.append(link(mine.detach(), self._has_header))
        self.ends.append(end)

    def negotiate(self, guest: Offload) -> None:
        self.negotiated.append(guest)

    def use_pairs(self, count: int) -> None:
        self.used.append(count)

    def reopen(self) -> bool:
        if self.refuses:
            return False
        self.links.pop().close()
        self.ends.pop().close()
        self._add()
        return True

    def close(self) -> None:
        super().close()
        for end in self.ends:
            end.close()


class Card:
    """The rig, its driver and the other ends."""

    def __init__(self, rig: Rig, backend: Sockets) -> None:
        self.rig = rig
        self.backend = backend

    @property
    def driver(self) -> VirtioDriver:
        return self.rig.driver

    @property
    def device(self) -> VirtioNet:
        device = self.rig.device
        assert isinstance(device, VirtioNet)
        return device

    @property
    def end(self) -> socket.socket:
        return self.backend.ends[0]

    @property
    def rx(self) -> DriverQueue:
        return self.driver.queues[0]

    @property
    def tx(self) -> DriverQueue:
        return self.driver.queues[1]

    @property
    def control(self) -> DriverQueue:
        return self.driver.queues[max(self.driver.queues)]

    def stats(self, *keys: str) -> tuple[int, ...]:
        stats = self.device.stats()
        return tuple(stats[key] for key in keys)

    def put(self, data: bytes, head: bytes = header(), *, queue: int = 1, cut: tuple[int, ...] = ()) -> int:
        """Offers a frame to be sent, its bytes cut at these places, and kicks."""
        ring = self.driver.queues[queue]
        message = head + data
        places = [0, *cut, len(message)]
        ring_head = ring.add([self.rig.ram.put(message[a:b]) for a, b in itertools.pairwise(places) if b > a])
        ring.kick()
        return ring_head

    async def send(self, data: bytes, head: bytes = header(), **how: Any) -> None:
        """One frame from the guest, until its buffer is back."""
        mark = self.rig.ram.next
        self.put(data, head, **how)
        await self.driver.queues[how.get("queue", 1)].wait()
        self.rig.ram.next = mark

    def room(self, *sizes: int, queue: int = 0, kick: bool = True) -> list[tuple[int, int]]:
        """Offers a buffer for frames, of pieces of these sizes."""
        ring = self.driver.queues[queue]
        pieces = [(self.rig.ram.take(size), size) for size in sizes]
        for address, size in pieces:
            self.rig.vm.memory.write(address, b"\xee" * size)
        ring.add((), pieces)
        if kick:
            ring.kick()
        return pieces

    def read(self, pieces: list[tuple[int, int]], length: int) -> bytes:
        return b"".join(self.rig.vm.memory.read(*piece) for piece in pieces)[:length]

    async def get(self, *sizes: int) -> tuple[bytes, bytes]:
        """Offers a buffer of such pieces and returns header and frame of what arrives in it."""
        pieces = self.room(*sizes or (2048,))
        [(_, written)] = await self.rx.wait()
        data = self.read(pieces, written)
        return data[:HEADER], data[HEADER:]

    def arrive(self, data: bytes, head: bytes = header()) -> None:
        """A frame from the host."""
        if self.backend._kind == socket.SOCK_STREAM:
            self.end.sendall(struct.pack(">I", len(data)) + data)
        else:
            self.end.send((head if self.backend._has_header else b"") + data)

    async def command(self, kind: int, command: int, data: bytes = b"") -> int:
        """One command of the control queue; its answer."""
        ram = self.rig.ram
        mark = ram.next
        answer = ram.put(b"\xee")
        parts = [ram.put(bytes([kind, command]))] + ([ram.put(data)] if data else [])
        self.control.add(parts, [answer])
        self.control.kick()
        await self.control.wait()
        ram.next = mark
        return int(self.rig.vm.memory.read(answer[0], 1)[0])


async def make_card(
    make_rig: MakeRig,
    *,
    kind: int = socket.SOCK_SEQPACKET,
    pairs: int = 1,
    has_header: bool = True,
    offloads: Offload = ALL_OFFLOADS,
    begin: bool = True,
    wanted: int | None = None,
    size: int | None = 64,
    **options: Any,
) -> Card:
    """A card whose driver is ready unless told otherwise."""
    has_header = has_header and kind != socket.SOCK_STREAM
    backend = Sockets(kind, pairs, has_header=has_header, offloads=offloads if has_header else NO_OFFLOAD)

    def device_of(vm: ReplayVm) -> VirtioNet:
        return VirtioNet(vm, "net0", backend, mac=MAC, **options)

    card = Card(await make_rig(device_of), backend)
    if begin:
        card.driver.begin(wanted, size=size)
    return card
