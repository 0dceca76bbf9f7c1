"""virtio-vsock (virtio 1.2 §5.10): streams between programs of the guest and unix sockets of the host.

A client of the listening socket sends "CONNECT port\n", and reads "OK port\n" once the guest's listener has accepted.
Who listens on the host at the same path with "_port" after it gets the connections that the guest makes to that port.
"""

from __future__ import annotations

import collections
import errno
import logging
from typing import TYPE_CHECKING, Protocol

from propolis.devices.virtio.device import VirtioDevice
from propolis.devices.virtio.vsock_connection import BUFFER, Connection, State
from propolis.devices.virtio.vsock_packet import HEADER_BYTES, HOST_CID, STREAM, Header, Op

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Callable

    from propolis._vmm import Vm
    from propolis.devices.virtio._queue import Buffers

log = logging.getLogger(__name__)

TYPE_SOCKET = 19
CLASS_COMMUNICATION = 0x078000
SUBSYSTEM = 0x0040 + TYPE_SOCKET
RX, TX, EVENT = 0, 1, 2
QUEUE_SIZE = 256
TRANSPORT_RESET = bytes(4)  # §5.10.6.7: the id of the event
MAX_CONNECTIONS = 512  # a worker has about twice as many descriptors
MAX_FAREWELLS = 256  # resets that wait for a buffer of the guest; more, and nothing is taken from it
BUDGET = 64  # packets each way, and then everybody else on the loop has a turn
ACCEPTS = 16
FIRST_PORT = 1 << 30  # of those that stand for clients on the host
_NO_DESCRIPTORS = 1.0  # seconds until clients are accepted again


class Connector(Protocol):
    """Who connects to the sockets of the host, as a worker in its jail cannot."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def connect(self, port: int, done: Callable[[socket.socket | None], None]) -> None: ...
    def close(self) -> None: ...


class VirtioVsock(VirtioDevice):
    """Owns the listening socket and the connector, where it has them; without, there is nobody on the host."""

    def __init__(
        self,
        vm: Vm,
        name: str,
        *,
        guest_cid: int,
        listener: socket.socket | None = None,
        connector: Connector | None = None,
    ) -> None:
        super().__init__(
            vm,
            name,
            type_id=TYPE_SOCKET,
            class_code=CLASS_COMMUNICATION,
            subsystem=SUBSYSTEM,
            features=0,  # streams are what there is without
            config=guest_cid.to_bytes(8, "little"),
            queue_sizes=[QUEUE_SIZE] * 3,
        )
        self._guest_cid = guest_cid
        self._listener = listener
        self._connector = connector
        self._all: set[Connection] = set()
        self._by_ports: dict[tuple[int, int], Connection] = {}
        self._ready: collections.deque[Connection] = collections.deque()
        self._farewells: collections.deque[Header] = collections.deque()
        self._next_port = FIRST_PORT
        self._room = 4096 - HEADER_BYTES  # of the guest's buffers, as the last one was
        self._is_accepting = False
        self._retry: asyncio.TimerHandle | None = None
        self._owes_event = False
        self._counts = dict.fromkeys(("accepted", "requested", "refused", "bytes_in", "bytes_out", "bad_packets"), 0)

    # -- Device --------------------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        super().start(loop)
        if self._connector is not None:
            self._connector.start(loop)
        self._accept_on()

    def activate(self, features: int) -> None:
        self._room = 4096 - HEADER_BYTES
        self._accept_on()

    def deactivate(self) -> None:
        self._drop_all()
        self._owes_event = False

    async def halt(self) -> None:
        await super().halt()
        self._drop_all()
        self._accept_no_more()
        if self._connector is not None:
            self._connector.close()
        if self._listener is not None:
            self._listener.close()

    def stats(self) -> dict[str, int]:
        """Connections now, and what was counted since the device was built."""
        return {"connections": len(self._by_ports), **self._counts}

    def reset_transport(self) -> None:
        """Every connection is gone, as after a restored snapshot: the driver is told (§5.10.6.7)."""
        self._drop_all()
        self._owes_event = True
        self.again(EVENT)

    def _drop_all(self) -> None:
        for connection in tuple(self._all):
            connection.end()
        self._ready.clear()
        self._farewells.clear()

    # -- clients on the host -------------------------------------------------------------------------------------------

    def _accept_on(self) -> None:
        self._retry = None
        if self._loop is not None and self._listener is not None and not self._is_accepting:
            self._is_accepting = True
            self._loop.add_reader(self._listener.fileno(), self._on_client)

    def _accept_no_more(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._loop is not None and self._listener is not None and self._is_accepting:
            self._is_accepting = False
            self._loop.remove_reader(self._listener.fileno())

    def _on_client(self) -> None:
        assert self._listener is not None
        for _ in range(ACCEPTS):
            if len(self._all) >= MAX_CONNECTIONS:
                self._accept_no_more()  # they wait until one ends
                return
            try:
                client, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    log.warning("no client is accepted: device=%s reason=%r", self.name, error.strerror)
                    self._accept_no_more()
                    assert self._loop is not None
                    self._retry = self._loop.call_later(_NO_DESCRIPTORS, self._accept_on)
                return
            if self._is_active:
                self._counts["accepted"] += 1
                self._new(State.GREETING).attach(client)
            else:
                client.close()  # nobody is there yet

    def _new(self, state: State) -> Connection:
        assert self._loop is not None
        connection = Connection(
            self._loop, state=state, on_ready=self._on_ready, on_port=self._on_port, on_end=self._on_end
        )
        self._all.add(connection)
        return connection

    def _on_port(self, connection: Connection, port: int) -> bool:
        while (self._next_port, port) in self._by_ports:
            self._next_port = FIRST_PORT | self._next_port + 1 & FIRST_PORT - 1
        connection.host_port, connection.guest_port = self._next_port, port
        self._by_ports[self._next_port, port] = connection
        self._next_port = FIRST_PORT | self._next_port + 1 & FIRST_PORT - 1
        return True

    def _on_ready(self, connection: Connection) -> None:
        if not connection.is_queued:
            connection.is_queued = True
            self._ready.append(connection)
            self.again(RX)

    def _on_end(self, connection: Connection, reset: bool) -> None:
        self._all.discard(connection)
        ports = connection.host_port, connection.guest_port
        if self._by_ports.get(ports) is connection:
            del self._by_ports[ports]
            if reset:
                self._say_farewell(self._header(connection, Op.RST))
        if self._retry is None and self._is_active:
            self._accept_on()

    # -- from the guest ------------------------------------------------------------------------------------------------

    def kick(self, index: int) -> None:
        if index == RX:
            self._serve_guest()
        elif index == EVENT:
            self._send_event()
        elif len(self._farewells) < MAX_FAREWELLS:
            self.answer_all(TX, self._on_packet, BUDGET)

    def _on_packet(self, buffers: Buffers) -> bool:
        header = Header.parse(buffers.read(HEADER_BYTES))
        data: bytes | None = b""
        if header is not None and header.op == Op.RW:
            there = buffers.readable - HEADER_BYTES
            data = None
            if header.length <= min(there, BUFFER):
                data = buffers.read(HEADER_BYTES + header.length)[HEADER_BYTES:]
        buffers.finish()
        if header is None or header.src_cid != self._guest_cid:
            self._counts["bad_packets"] += 1
        elif header.dst_cid != HOST_CID or header.kind != STREAM:
            self._refuse(header)
        elif header.op == Op.REQUEST:
            self._request(header)
        elif (connection := self._by_ports.get((header.dst_port, header.src_port))) is None:
            self._refuse(header)
        else:
            self._for_connection(connection, header, data)
        return len(self._farewells) < MAX_FAREWELLS

    def _refuse(self, header: Header) -> None:
        if header.op != Op.RST:
            self._counts["refused"] += 1
            self._say_farewell(header.reset())

    def _request(self, header: Header) -> None:
        ports = header.dst_port, header.src_port
        if (there := self._by_ports.get(ports)) is not None:
            there.end(True)
        elif self._connector is None or len(self._all) >= MAX_CONNECTIONS:
            self._refuse(header)
        else:
            self._counts["requested"] += 1
            connection = self._new(State.CONNECTING)
            connection.host_port, connection.guest_port = ports
            self._by_ports[ports] = connection
            connection.grant(header.buf_alloc, header.fwd_cnt)
            self._connector.connect(header.dst_port, connection.attach)

    def _for_connection(self, connection: Connection, header: Header, data: bytes | None) -> None:
        connection.grant(header.buf_alloc, header.fwd_cnt)
        if header.op == Op.RST:
            connection.end()
            return
        if header.op == Op.RW:
            is_right = data is not None and connection.take(data)
            self._counts["bytes_out"] += len(data or b"")
        elif header.op == Op.RESPONSE:
            is_right = connection.accept()
        elif header.op == Op.SHUTDOWN:
            is_right = connection.shut(header.flags)
        elif header.op == Op.CREDIT_REQUEST:
            connection.request_credit()
            is_right = True
        else:
            is_right = header.op == Op.CREDIT_UPDATE
        if not is_right:
            self._counts["bad_packets"] += 1
            connection.end(True)

    # -- to the guest --------------------------------------------------------------------------------------------------

    def _header(self, connection: Connection, op: Op, flags: int = 0, length: int = 0) -> Header:
        return Header(
            src_cid=HOST_CID,
            dst_cid=self._guest_cid,
            src_port=connection.host_port,
            dst_port=connection.guest_port,
            length=length,
            kind=STREAM,
            op=op,
            flags=flags,
            buf_alloc=BUFFER,
            fwd_cnt=connection.forwarded,
        )

    def _say_farewell(self, header: Header) -> None:
        """A packet of no connection; nothing is taken from the guest while too many wait."""
        self._farewells.append(header)
        self.again(RX)

    def _serve_guest(self) -> None:
        queue = self.queues[RX]
        was_full = len(self._farewells) >= MAX_FAREWELLS
        for _ in range(BUDGET):
            if not self._farewells and not self._ready:
                break
            if not queue.watch():  # a kick comes with the next buffer
                break
            if not self._serve_one():
                self.broken(RX, queue.failure or "a receive buffer that is shorter than a header")
                break
        else:
            self.again(RX)
        queue.interrupt()
        if was_full and len(self._farewells) < MAX_FAREWELLS:
            self.again(TX)

    def _serve_one(self) -> bool:
        """One packet at most; False where the ring cannot be used."""
        queue = self.queues[RX]
        connection = None
        if self._farewells:
            header, data = self._farewells.popleft(), b""
        else:
            connection = self._ready.popleft()
            connection.is_queued = False
            packet = connection.next(self._room)
            if packet is None:
                return True
            op, flags, data = packet
            header = self._header(connection, op, flags, len(data))
        buffers = queue.take()
        if buffers is None or buffers.writable < HEADER_BYTES:
            if buffers is not None:
                buffers.finish()
            return False
        self._room = buffers.writable - HEADER_BYTES
        if connection is not None and len(data) > self._room:
            connection.unread(data[self._room :])
            data = data[: self._room]
            op = Op.RW if data else Op.CREDIT_UPDATE
            header = self._header(connection, op, 0, len(data))
        buffers.write(header.pack() + data)
        buffers.finish()
        self._counts["bytes_in"] += len(data)
        if connection is not None:
            connection.told()
            if connection.is_final:
                connection.end()
            elif connection.state is not State.GONE:
                self._on_ready(connection)  # at the end of the line
        return True

    def _send_event(self) -> None:
        if self._owes_event and (buffers := self.queues[EVENT].take()) is not None:
            self._owes_event = False
            buffers.write(TRANSPORT_RESET)
            buffers.finish()
            self.queues[EVENT].interrupt()
        if (failure := self.queues[EVENT].failure) is not None:
            self.broken(EVENT, failure)
