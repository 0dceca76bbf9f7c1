"""virtio-console (virtio 1.2 §5.3) with several ports, each a unix socket of the host.

A port has one client at a time; another is sent away. What the guest writes to a port without a client is dropped; a
client that does not read holds the guest's port up, and no other.
"""

from __future__ import annotations

import collections
import enum
import logging
import struct
from typing import TYPE_CHECKING, NamedTuple

from propolis.devices.virtio.console_port import Port
from propolis.devices.virtio.device import VirtioDevice

if TYPE_CHECKING:
    import asyncio
    import socket

    from propolis._vmm import Vm
    from propolis.devices.virtio._queue import Buffers

log = logging.getLogger(__name__)

TYPE_CONSOLE = 3
CLASS_COMMUNICATION = 0x078000
SUBSYSTEM = 0x0040 + TYPE_CONSOLE
F_MULTIPORT = 1 << 1  # §5.3.3
QUEUE_SIZE = 128
CONTROL_RX, CONTROL_TX = 2, 3  # §5.3.2
MAX_PORTS = 7  # of as many queues as a device may have
BUDGET = 64  # buffers of one queue, and then everybody else on the loop has a turn
_CONTROL = struct.Struct("<IHH")


class Event(enum.IntEnum):
    """VIRTIO_CONSOLE_* of §5.3.6.2."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    PORT_READY = 3
    CONSOLE_PORT = 4
    PORT_OPEN = 6
    PORT_NAME = 7


class PortSetting(NamedTuple):
    """What a port is called in the guest, whether it is a console there, and who listens for its clients."""

    name: str
    is_console: bool
    listener: socket.socket


def receive_queue(port: int) -> int:
    """§5.3.2: the first port's queues come before those of control, all others after."""
    return 0 if port == 0 else 2 * port + 2


class VirtioConsole(VirtioDevice):
    """Owns the listening sockets."""

    def __init__(self, vm: Vm, name: str, ports: list[PortSetting]) -> None:
        if not 1 <= len(ports) <= MAX_PORTS:
            raise ValueError(f"{name}: {len(ports)} ports, expected 1 to {MAX_PORTS}")
        super().__init__(
            vm,
            name,
            type_id=TYPE_CONSOLE,
            class_code=CLASS_COMMUNICATION,
            subsystem=SUBSYSTEM,
            features=F_MULTIPORT,
            config=struct.pack("<HHII", 0, 0, len(ports), 0),
            queue_sizes=[QUEUE_SIZE] * (2 * len(ports) + 2),
        )
        self._settings = ports
        self._ports: list[Port] = []
        self._by_queue: dict[int, Port] = {}
        # By port and event, so that a driver which asks for the same again and again fills nothing.
        self._control: collections.OrderedDict[tuple[int, Event], bytes] = collections.OrderedDict()
        self._has_control = False
        self._bad = 0

    # -- Device --------------------------------------------------------------------------------------------------------

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        super().start(loop)
        for index, setting in enumerate(self._settings):
            port = Port(loop, setting.listener, receive_queue(index), self.again, self._on_client)
            self._ports.append(port)
            self._by_queue[port.queue] = self._by_queue[port.queue + 1] = port
            port.listen()

    def activate(self, features: int) -> None:
        self._has_control = bool(features & F_MULTIPORT)
        if not self._has_control:  # there is the first port alone, and nothing to say about it
            self._ports[0].open()

    def deactivate(self) -> None:
        self._control.clear()
        for port in self._ports:
            port.shut()

    async def halt(self) -> None:
        await super().halt()
        for port in self._ports:
            port.close()
        for setting in self._settings:
            setting.listener.close()

    def stats(self) -> dict[str, int]:
        """What went through all ports since the device was built."""
        return {
            "bytes_in": sum(port.bytes_in for port in self._ports),
            "bytes_out": sum(port.bytes_out for port in self._ports),
            "dropped_bytes": sum(port.dropped for port in self._ports),
            "clients": sum(port.has_client for port in self._ports),
            "bad_messages": self._bad,
        }

    # -- work ----------------------------------------------------------------------------------------------------------

    def kick(self, index: int) -> None:
        if index == CONTROL_RX:
            self._send_control()
        elif index == CONTROL_TX:
            self.answer_all(index, self._on_control, BUDGET)
        else:
            port = self._by_queue[index]
            if index == port.queue:
                self._fill(port)
            elif port.is_writable:
                self.answer_all(index, port.take, BUDGET)

    def _fill(self, port: Port) -> None:
        """What the client has sent, into the guest's buffers."""
        queue = self.queues[port.queue]
        for _ in range(BUDGET):
            if not port.is_readable or not queue.watch():
                break
            if (data := port.receive()) is None:
                break
            buffers = queue.take()
            if buffers is None:
                self.broken(port.queue, queue.failure or "no buffer")
                break
            port.put_back(data[buffers.write(data) :])
            buffers.finish()
        else:
            self.again(port.queue)
        queue.interrupt()

    # -- control -------------------------------------------------------------------------------------------------------

    def _on_control(self, buffers: Buffers) -> bool:
        message = buffers.read(_CONTROL.size)
        buffers.finish()
        if len(message) < _CONTROL.size or not self._has_control:
            self._bad += 1
            return True
        number, event, value = _CONTROL.unpack(message)
        if event == Event.DEVICE_READY:
            for index in range(len(self._ports) if value == 1 else 0):
                self._say(index, Event.DEVICE_ADD, 1)
        elif number >= len(self._ports):
            self._bad += 1
        elif event == Event.PORT_READY:
            if value == 1:
                self._introduce(number)
        elif event == Event.PORT_OPEN:
            port = self._ports[number]
            if value:
                port.open()
                self.again(port.queue)
            else:
                port.shut()
        else:
            self._bad += 1
        return True

    def _introduce(self, number: int) -> None:
        setting = self._settings[number]
        if setting.is_console:
            self._say(number, Event.CONSOLE_PORT, 1)
        self._say(number, Event.PORT_NAME, 1, setting.name.encode())
        if self._ports[number].has_client:
            self._say(number, Event.PORT_OPEN, 1)

    def _on_client(self, port: Port) -> None:
        """One came or went."""
        if self._is_active and self._has_control:
            self._say(self._ports.index(port), Event.PORT_OPEN, int(port.has_client))

    def _say(self, number: int, event: Event, value: int, rest: bytes = b"") -> None:
        self._control[number, event] = _CONTROL.pack(number, event, value) + rest
        self.again(CONTROL_RX)

    def _send_control(self) -> None:
        queue = self.queues[CONTROL_RX]
        while self._control and (buffers := queue.take()) is not None:
            _, message = self._control.popitem(last=False)
            buffers.write(message)
            buffers.finish()
        if queue.failure is not None:
            self.broken(CONTROL_RX, queue.failure)
        elif self._control and queue.watch():
            self.again(CONTROL_RX)
        queue.interrupt()
