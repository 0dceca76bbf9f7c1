"""A guest with a virtio socket, and the host's programs around it."""

import asyncio
import contextlib
import socket
from pathlib import Path

from propolis.devices.virtio.vsock import RX, TX, Connector, VirtioVsock
from propolis.devices.virtio.vsock_packet import HEADER_BYTES, HOST_CID, STREAM, Header, Op
from propolis.host_sockets import DirectConnector, HostListener
from tests.driver import until
from tests.unit.devices.virtio.rig import MakeRig, Rig

CID = 3
PORT = 1234  # where the guest's program is
BUFFER_SIZE = 4096


class Guest:
    """A driver that keeps buffers in the receive queue and says what came."""

    def __init__(self, rig: Rig, path: Path) -> None:
        self.rig = rig
        self.path = path
        self.places: dict[int, int] = {}
        self.received: list[tuple[Header, bytes]] = []
        self.alloc = 1 << 18  # of every stream, as its packets tell
        self.forwarded = 0

    def begin(self, buffers: int = 32, size: int = BUFFER_SIZE) -> None:
        self.rig.driver.begin()
        self.give(buffers, size)

    def give(self, count: int, size: int = BUFFER_SIZE) -> None:
        """More receive buffers."""
        queue = self.rig.driver.queues[RX]
        for _ in range(count):
            at = self.rig.ram.take(size)
            self.places[queue.add([], [(at, size)])] = at
        queue.kick()

    def look(self) -> None:
        """Takes what came, and puts the buffers back."""
        queue = self.rig.driver.queues[RX]
        for head, written in queue.used():
            at = self.places.pop(head)
            data = self.rig.vm.memory.read(at, written)
            header = Header.parse(data)
            assert header is not None, data
            assert header.length == len(data) - HEADER_BYTES
            assert (header.src_cid, header.dst_cid) == (HOST_CID, CID)
            self.received.append((header, data[HEADER_BYTES:]))
            self.places[queue.add([], [(at, BUFFER_SIZE)])] = at
            queue.kick()

    async def next(self, op: Op) -> tuple[Header, bytes]:
        """The next packet, which has to be one of these."""

        def there() -> bool:
            self.look()
            return bool(self.received)

        await until(there, f"a packet {op.name}")
        header, data = self.received.pop(0)
        assert header.op == op, header
        return header, data

    async def nothing(self) -> None:
        """Nothing comes although the device had its turn."""
        for _ in range(20):
            await asyncio.sleep(0)
        self.look()
        assert self.received == []

    def header(self, op: int, host_port: int, **changes: int) -> Header:
        header = Header(CID, HOST_CID, PORT, host_port, 0, STREAM, op, 0, self.alloc, self.forwarded)
        return header._replace(**changes)

    def send(self, op: int, host_port: int, data: bytes = b"", **changes: int) -> None:
        """A packet of the guest's, whose fields may be anything."""
        self.send_raw(self.header(op, host_port, **({"length": len(data)} | changes)).pack(), data)

    def send_raw(self, *parts: bytes) -> None:
        queue = self.rig.driver.queues[TX]
        queue.used()
        mark = self.rig.ram.next
        queue.add([self.rig.ram.put(part) for part in parts if part])
        queue.kick()
        if mark > 8 << 20:  # what the device has had by then is gone
            self.rig.ram.next = mark // 2

    @property
    def stats(self) -> dict[str, int]:
        return dict(self.rig.device.stats())

    async def until_sent(self) -> None:
        """The device took all packets."""
        queue = self.rig.driver.queues[TX]
        await until(lambda: queue.used() is not None and not queue.chains, "the last packet being taken")

    async def call(self, host_port: int = 52) -> None:
        """A connection to a program on the host that is there."""
        self.send(Op.REQUEST, host_port)
        header, _ = await self.next(Op.RESPONSE)
        assert (header.src_port, header.dst_port) == (host_port, PORT)

    def client(self) -> socket.socket:
        """A program of the host that connects to the listening socket."""
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(str(self.path))
        client.setblocking(False)
        return client

    async def answer_client(self, client: socket.socket, rest: bytes = b"") -> int:
        """The client's connection to the guest, up to the line that it reads; the port that stands for it."""
        await asyncio.get_running_loop().sock_sendall(client, b"CONNECT %d\n" % PORT + rest)
        header, _ = await self.next(Op.REQUEST)
        assert header.dst_port == PORT
        self.send(Op.RESPONSE, header.src_port)
        assert await read(client, len(b"OK 1073741824\n")) == b"OK %d\n" % header.src_port
        return header.src_port


async def read(client: socket.socket, count: int) -> bytes:
    """Exactly so many bytes, or fewer at the end, which is a reset where the other end had not read all."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        async with asyncio.timeout(10):
            while len(data) < count and (more := await asyncio.get_running_loop().sock_recv(client, count - len(data))):
                data += more
    return data


def server(path: Path, port: int = 52) -> socket.socket:
    """A program of the host that listens for the guest."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{path}_{port}")
    listener.listen(1024)
    listener.setblocking(False)
    return listener


async def accept(listener: socket.socket) -> socket.socket:
    async with asyncio.timeout(10):
        peer, _ = await asyncio.get_running_loop().sock_accept(listener)
        return peer


async def make_guest(
    make_rig: MakeRig, listener: HostListener, path: Path, connector: Connector | None = None
) -> Guest:
    """A guest whose device listens there."""
    chosen = connector or DirectConnector(str(path))
    rig = await make_rig(lambda vm: VirtioVsock(vm, "vsock", guest_cid=CID, listener=listener.socket, connector=chosen))
    return Guest(rig, path)
