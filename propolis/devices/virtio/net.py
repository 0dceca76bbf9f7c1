"""virtio-net (virtio 1.2 §5.1): a network card with one or more pairs of queues, before one backend."""

from __future__ import annotations

import errno
import logging
import struct
import uuid
from typing import TYPE_CHECKING

from propolis.backends.net import NO_OFFLOAD, NetBackend, Offload
from propolis.devices.virtio._net import NetPair
from propolis.devices.virtio._net_filter import ReceiveFilter
from propolis.devices.virtio.device import VirtioDevice
from propolis.devices.virtio.net_control import Control
from propolis.errors import PropolisError

if TYPE_CHECKING:
    import asyncio

    from propolis._vmm import Vm

log = logging.getLogger(__name__)

TYPE_NETWORK = 1
CLASS_ETHERNET = 0x020000
SUBSYSTEM = 0xFFFB

# §5.1.3
F_CSUM = 1 << 0
F_GUEST_CSUM = 1 << 1
F_CTRL_GUEST_OFFLOADS = 1 << 2
F_MTU = 1 << 3
F_MAC = 1 << 5
F_GUEST_TSO4 = 1 << 7
F_GUEST_TSO6 = 1 << 8
F_GUEST_ECN = 1 << 9
F_HOST_TSO4 = 1 << 11
F_HOST_TSO6 = 1 << 12
F_HOST_ECN = 1 << 13
F_MRG_RXBUF = 1 << 15
F_STATUS = 1 << 16
F_CTRL_VQ = 1 << 17
F_CTRL_RX = 1 << 18
F_CTRL_VLAN = 1 << 19
F_CTRL_RX_EXTRA = 1 << 20
F_GUEST_ANNOUNCE = 1 << 21
F_MQ = 1 << 22
F_CTRL_MAC_ADDR = 1 << 23
CONTROL = F_CTRL_VQ | F_CTRL_RX | F_CTRL_VLAN | F_CTRL_RX_EXTRA | F_GUEST_ANNOUNCE

HOST_FEATURES = {  # what the device takes
    Offload.CHECKSUM: F_CSUM,
    Offload.TCP4: F_HOST_TSO4,
    Offload.TCP6: F_HOST_TSO6,
    Offload.ECN: F_HOST_ECN,
}
GUEST_FEATURES = {
    Offload.CHECKSUM: F_GUEST_CSUM,
    Offload.TCP4: F_GUEST_TSO4,
    Offload.TCP6: F_GUEST_TSO6,
    Offload.ECN: F_GUEST_ECN,
}
# §5.1.3.1: what a feature is worth nothing without.
NEEDS = {Offload.TCP4: Offload.CHECKSUM, Offload.TCP6: Offload.CHECKSUM}

STATUS_LINK_UP = 1  # §5.1.4
STATUS_ANNOUNCE = 2
STATUS_AT = 6

MAX_PAIRS = 8
CONTROL_SIZE = 64
BUDGET = 64  # frames of one queue before everybody else on the loop has a turn
RECONNECT = 1.0  # seconds

# NetResult of _net.pxd.
IDLE, AGAIN, BROKEN, STARVED, BEHIND, GONE = range(6)


def _offloads(features: int, bits: dict[Offload, int]) -> Offload:
    """What of the offloads was negotiated, with all that each needs."""
    found = NO_OFFLOAD
    for offload, bit in bits.items():
        if features & bit and (offload not in NEEDS or NEEDS[offload] in found):
            found |= offload
    if not found & (Offload.TCP4 | Offload.TCP6):
        found &= ~Offload.ECN
    return found


def own_mac(identity: uuid.UUID, name: str) -> bytes:
    """The address of a card of that name, the same each time: one of those that are local (IEEE 802, §8.4)."""
    made = uuid.uuid5(identity, f"network card {name}").bytes
    return bytes([made[0] & 0xFC | 2, *made[1:6]])


def _flags(offloads: Offload) -> tuple[bool, bool, bool, bool]:
    return (
        Offload.CHECKSUM in offloads,
        Offload.TCP4 in offloads,
        Offload.TCP6 in offloads,
        Offload.ECN in offloads,
    )


class VirtioNet(VirtioDevice):
    """A network card. It owns the backend from the moment it is built, and closes it in halt.

    With `own_address_only` frames from another address than `mac` are dropped, and the guest cannot change its own.
    """

    def __init__(
        self,
        vm: Vm,
        name: str,
        backend: NetBackend,
        *,
        mac: bytes,
        queue_size: int = 256,
        mtu: int | None = None,
        own_address_only: bool = False,
    ) -> None:
        pairs = len(backend.links)
        if not 1 <= pairs <= MAX_PAIRS:
            raise ValueError(f"{name}: {pairs} pairs of queues, expected 1 to {MAX_PAIRS}")
        self.mac = mac
        self.own_address_only = own_address_only
        self._mtu = mtu
        features = F_MAC | F_STATUS | F_MRG_RXBUF | CONTROL
        features |= F_MQ if pairs > 1 else 0
        features |= F_MTU if mtu is not None else 0
        features |= 0 if own_address_only else F_CTRL_MAC_ADDR
        features |= sum(bit for offload, bit in HOST_FEATURES.items() if offload in backend.takes)
        features |= sum(bit for offload, bit in GUEST_FEATURES.items() if offload in backend.gives)
        features |= F_CTRL_GUEST_OFFLOADS if backend.gives else 0
        super().__init__(
            vm,
            name,
            type_id=TYPE_NETWORK,
            class_code=CLASS_ETHERNET,
            subsystem=SUBSYSTEM,
            features=features,
            # struct virtio_net_config of §5.1.4, up to the MTU.
            config=struct.pack("<6sHHH", mac, STATUS_LINK_UP, pairs, mtu or 0),
            queue_sizes=[queue_size] * (2 * pairs) + [CONTROL_SIZE],
        )
        self.backend = backend
        self.filter = ReceiveFilter(mac)
        self._pairs = [NetPair(self.queues[2 * i], self.queues[2 * i + 1], self.filter) for i in range(pairs)]
        for pair, link in zip(self._pairs, backend.links, strict=True):
            pair.attach(link)
            pair.check_source(own_address_only)
        self._control = Control(self)
        self._features = 0
        self._used_pairs = 1
        self._control_index = 2 * pairs
        self._is_linked = True  # there is another side
        self._is_plugged = True  # and whoever runs the VM has not pulled the cable
        self._is_announcing = False
        self._reading: set[int] = set()
        self._writing: set[int] = set()
        self._reconnect: asyncio.TimerHandle | None = None
        self._breaks = 0
        backend.use_pairs(1)

    # -- VirtioDevice --------------------------------------------------------------------------------------------------

    def activate(self, features: int) -> None:
        self._features = features
        # §5.1.2: without MQ there is one pair, and the control queue is the one behind it.
        self._control_index = len(self.queues) - 1 if features & F_MQ else 2
        self.filter.reset(self.mac, bool(features & F_CTRL_VLAN))
        self.set_guest_offloads(_offloads(features, GUEST_FEATURES))

    def deactivate(self) -> None:
        self._features = 0
        self._is_announcing = False
        self.filter.reset(self.mac)
        self.function.set_config(0, struct.pack("<6sH", self.mac, self._status()))
        self.use_pairs(1)

    def begin_work(self) -> None:
        for index in range(self._used_pairs):
            self._read(index)

    def end_work(self) -> None:
        for index in tuple(self._reading):
            self._do_not_read(index)
        for index in tuple(self._writing):
            self._do_not_write(index)

    def kick(self, index: int) -> None:
        if index == self._control_index:
            if self._control.serve(self.queues[index]):
                self.again(index)
            elif self.queues[index].failure is not None:
                self.broken(index, self.queues[index].failure or "")
        elif index // 2 >= self._used_pairs:
            return  # §5.1.6.5.5: not in use, until the driver says so
        elif index & 1:
            self._transmit(index // 2)
        else:
            self._receive(index // 2)

    def resume(self) -> None:
        super().resume()
        if not self._is_linked:
            self._reconnect_later()

    async def halt(self) -> None:
        await super().halt()
        if self._reconnect is not None:
            self._reconnect.cancel()
            self._reconnect = None
        for pair in self._pairs:
            pair.attach(None)
        self.backend.close()

    def stats(self) -> dict[str, int]:
        """Counters over all queues since the device was built."""
        total: dict[str, int] = {"link_up": int(self.is_up), "link_breaks": self._breaks}
        for part in (*(pair.stats() for pair in self._pairs), *(queue.stats() for queue in self.queues)):
            for key, value in part.items():
                total[key] = total.get(key, 0) + value
        return total

    # -- frames --------------------------------------------------------------------------------------------------------

    def _receive(self, index: int) -> None:
        if not self.is_up:
            return
        result = self._pairs[index].run_receive(BUDGET)
        if result == IDLE:
            self._read(index)
            return
        self._do_not_read(index)  # and so a guest that is slow, or off, costs nothing
        if result == AGAIN:
            self.again(2 * index)
        elif result == BROKEN:
            self.broken(2 * index, self.queues[2 * index].failure or "")
        elif result == GONE:
            self._lost(index)

    def _transmit(self, index: int) -> None:
        result = self._pairs[index].run_transmit(BUDGET)
        if result == BEHIND:
            self._write(index)
            return
        self._do_not_write(index)
        if result == AGAIN:
            self.again(2 * index + 1)
        elif result == BROKEN:
            self.broken(2 * index + 1, self.queues[2 * index + 1].failure or "")
        elif result == GONE:
            self._lost(index)
            self.again(2 * index + 1)

    def _on_readable(self, index: int) -> None:
        if self.function.is_bus_master:
            self._receive(index)
        else:
            self._do_not_read(index)  # as with a kick, WAKE comes when it may

    def _on_writable(self, index: int) -> None:
        if self.function.is_bus_master:
            self._transmit(index)
        else:
            self._do_not_write(index)

    def _read(self, index: int) -> None:
        fd = self.backend.links[index].fileno()
        if index not in self._reading and fd >= 0 and self.is_up and self.is_listening(2 * index):
            assert self._loop is not None
            self._loop.add_reader(fd, self._on_readable, index)
            self._reading.add(index)

    def _do_not_read(self, index: int) -> None:
        if index in self._reading and self._loop is not None:
            self._loop.remove_reader(self.backend.links[index].fileno())
            self._reading.discard(index)

    def _write(self, index: int) -> None:
        if index not in self._writing and self._loop is not None:
            self._loop.add_writer(self.backend.links[index].fileno(), self._on_writable, index)
            self._writing.add(index)

    def _do_not_write(self, index: int) -> None:
        if index in self._writing and self._loop is not None:
            self._loop.remove_writer(self.backend.links[index].fileno())
            self._writing.discard(index)

    # -- the link ------------------------------------------------------------------------------------------------------

    @property
    def is_up(self) -> bool:
        """Whether frames go both ways."""
        return self._is_linked and self._is_plugged

    def set_link(self, up: bool) -> None:
        """Plugs the cable in, or pulls it."""
        if up != self._is_plugged:
            self._is_plugged = up
            self._link_changed()

    def _status(self) -> int:
        return STATUS_LINK_UP * self.is_up | STATUS_ANNOUNCE * self._is_announcing

    def _link_changed(self) -> None:
        # §5.1.6.5.4: neighbours may have to learn where the guest is.
        self._is_announcing = self.is_up and bool(self._features & F_GUEST_ANNOUNCE)
        for index, pair in enumerate(self._pairs):
            pair.attach(self.backend.links[index] if self.is_up else None)
            if self.is_up and index < self._used_pairs:
                self._read(index)
            else:
                self._do_not_read(index)
                self._do_not_write(index)
        self.function.set_config(STATUS_AT, struct.pack("<H", self._status()))

    def announced(self) -> None:
        """The driver did so."""
        self._is_announcing = False
        self.function.set_config(STATUS_AT, struct.pack("<H", self._status()))

    def _lost(self, index: int) -> None:
        if not self._is_linked:
            return
        code = self._pairs[index].link_error
        log.warning("network link is gone: device=%s reason=%s", self.name, errno.errorcode.get(code, code))
        self._breaks += 1
        self._is_linked = False
        self._link_changed()
        self._reconnect_later()

    def _reconnect_later(self) -> None:
        if self._loop is not None and self._reconnect is None:
            self._reconnect = self._loop.call_later(RECONNECT, self._try_again)

    def _try_again(self) -> None:
        self._reconnect = None
        if self._is_paused:
            return  # resume() comes
        try:
            self._is_linked = self.backend.reopen()
        except (PropolisError, OSError) as error:
            log.warning("network link: device=%s reason=%s", self.name, str(error))
            self._reconnect_later()
            return
        if self._is_linked:
            log.info("network link is back: device=%s", self.name)
            self._link_changed()

    # -- what the control queue asks for -------------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """What the driver accepted."""
        return self._features

    def set_guest_offloads(self, wanted: Offload) -> None:
        """Frames for the guest may lack this, and no more, from now on."""
        host = _offloads(self._features, HOST_FEATURES)
        try:
            self.backend.negotiate(wanted)
        except PropolisError as error:
            log.warning("network offloads: device=%s reason=%s", self.name, str(error))
        for pair in self._pairs:
            pair.negotiate(bool(self._features & F_MRG_RXBUF), _flags(wanted), _flags(host))

    def use_pairs(self, count: int) -> bool:
        """False where there are not so many."""
        if not 1 <= count <= (len(self._pairs) if self._features & F_MQ else 1):
            return False
        try:
            self.backend.use_pairs(count)
        except PropolisError as error:
            log.warning("network queues: device=%s reason=%s", self.name, str(error))
            return False
        for index in range(count, len(self._pairs)):
            self._do_not_read(index)
            self._do_not_write(index)
        self._used_pairs = count
        for index in range(count):
            self._read(index)
            self.again(2 * index + 1)
        return True

    def set_mac(self, mac: bytes) -> None:
        """What the guest wants to be reached by."""
        self.filter.set_mac(mac)
        self.function.set_config(0, mac)
