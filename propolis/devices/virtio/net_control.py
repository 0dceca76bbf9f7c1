"""The control queue of a network card (virtio 1.2 §5.1.6.5): commands, each answered by one byte."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Protocol

from propolis.backends.net import Offload

if TYPE_CHECKING:
    from propolis.devices.virtio._net_filter import ReceiveFilter
    from propolis.devices.virtio._queue import Queue

OK, ERR = 0, 1
RX, MAC, VLAN, ANNOUNCE, MQ, GUEST_OFFLOADS = range(6)  # classes
MAC_TABLE_SET, MAC_ADDR_SET = 0, 1
VLAN_ADD, VLAN_DEL = 0, 1

_RX_BASIC = 2  # commands of F_CTRL_RX; those above it are of F_CTRL_RX_EXTRA
_F_CTRL_GUEST_OFFLOADS = 1 << 2
_F_CTRL_RX = 1 << 18
_F_CTRL_VLAN = 1 << 19
_F_CTRL_RX_EXTRA = 1 << 20
_F_GUEST_ANNOUNCE = 1 << 21
_F_MQ = 1 << 22
_F_CTRL_MAC_ADDR = 1 << 23
_OFFLOADS = {1 << 1: Offload.CHECKSUM, 1 << 7: Offload.TCP4, 1 << 8: Offload.TCP6, 1 << 9: Offload.ECN}

MAX_COMMAND = 1 << 16  # bytes; tables of MAC addresses, which the driver may make long
BUDGET = 16  # commands
_ADDRESS = 6


class Card(Protocol):
    """What commands are about: VirtioNet."""

    filter: ReceiveFilter
    own_address_only: bool

    @property
    def features(self) -> int: ...
    def announced(self) -> None: ...
    def use_pairs(self, count: int) -> bool: ...
    def set_mac(self, mac: bytes) -> None: ...
    def set_guest_offloads(self, wanted: Offload) -> None: ...


class Control:
    """Does what a driver commands."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._classes = {
            RX: self._rx,
            MAC: self._mac,
            VLAN: self._vlan,
            ANNOUNCE: self._announce,
            MQ: self._mq,
            GUEST_OFFLOADS: self._guest_offloads,
        }

    def serve(self, queue: Queue) -> bool:
        """Answers what is there. True: there may be more, for later."""
        left = BUDGET
        while True:
            queue.hush()
            while left and (buffers := queue.take()) is not None:
                left -= 1
                if not buffers.writable:
                    buffers.finish()
                    queue.give_up(_RING_REQUEST)  # no room for an answer: the driver would wait for ever
                    break
                command = buffers.read(MAX_COMMAND) if buffers.readable <= MAX_COMMAND else b""
                buffers.write(bytes([OK if self._do(command) else ERR]))
                buffers.finish()
            if queue.failure is not None or not left or not queue.watch():
                break
        queue.interrupt()
        return not left and queue.failure is None

    def _do(self, command: bytes) -> bool:
        if len(command) < 2:
            return False
        act = self._classes.get(command[0])
        return act is not None and act(command[1], command[2:])

    def _has(self, feature: int) -> bool:
        return bool(self._card.features & feature)

    def _rx(self, command: int, data: bytes) -> bool:
        needed = _F_CTRL_RX if command < _RX_BASIC else _F_CTRL_RX_EXTRA
        return len(data) == 1 and self._has(needed) and self._card.filter.set_mode(command, data[0] != 0)

    def _mac(self, command: int, data: bytes) -> bool:
        if command == MAC_ADDR_SET and len(data) == _ADDRESS and self._has(_F_CTRL_MAC_ADDR) and not data[0] & 1:
            self._card.set_mac(data)
            return True
        if command != MAC_TABLE_SET or not self._has(_F_CTRL_RX):
            return False
        tables = []
        for _ in range(2):  # unicast, multicast
            if len(data) < 4:
                return False
            (count,) = struct.unpack_from("<I", data)
            end = 4 + count * _ADDRESS
            if end > len(data):
                return False
            tables.append(data[4:end])
            data = data[end:]
        if data:
            return False
        self._card.filter.set_tables(*tables)
        return True

    def _vlan(self, command: int, data: bytes) -> bool:
        if command not in (VLAN_ADD, VLAN_DEL) or len(data) != 2 or not self._has(_F_CTRL_VLAN):
            return False
        vlan = int.from_bytes(data, "little")
        if vlan >= 4096:
            return False
        self._card.filter.set_vlan(vlan, command == VLAN_ADD)
        return True

    def _announce(self, command: int, data: bytes) -> bool:
        if command != 0 or data or not self._has(_F_GUEST_ANNOUNCE):
            return False
        self._card.announced()
        return True

    def _mq(self, command: int, data: bytes) -> bool:
        if command != 0 or len(data) != 2 or not self._has(_F_MQ):
            return False
        return self._card.use_pairs(int.from_bytes(data, "little"))

    def _guest_offloads(self, command: int, data: bytes) -> bool:
        """§5.1.6.5.6.2: a subset of what was negotiated."""
        wanted = int.from_bytes(data, "little")
        if command != 0 or len(data) != 8 or not self._has(_F_CTRL_GUEST_OFFLOADS):
            return False
        if wanted & ~(sum(_OFFLOADS) & self._card.features):
            return False
        found = Offload(0)
        for bit, offload in _OFFLOADS.items():
            if wanted & bit:
                found |= offload
        self._card.set_guest_offloads(found)
        return True


_RING_REQUEST = 14  # of _queue.pxd
