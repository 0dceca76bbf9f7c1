"""A virtio driver in plain Python: it knows PCI configuration space, registers and guest RAM, not the device.

It can be an honest driver (`add`, `kick`, `used`) or write whatever it likes into ring and registers.
"""

import asyncio
import struct
from collections.abc import Callable, Sequence
from typing import Any

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128  # virtio 1.2 §2.1
F_INDIRECT_DESC, F_EVENT_IDX, F_VERSION_1 = 28, 29, 32
NEXT, WRITE, INDIRECT = 1, 2, 4  # descriptor flags, §2.7.5
NO_VECTOR = 0xFFFF
MSI_ADDRESS = 0xFEE0_0000
MSI_DATA = 0x40

COMMON, NOTIFY, ISR, DEVICE, PCI = 1, 2, 3, 4, 5  # structures, §4.1.4

# Common configuration, §4.1.4.3: offset and width.
FIELDS = {
    "device_feature_select": (0, 4),
    "device_feature": (4, 4),
    "driver_feature_select": (8, 4),
    "driver_feature": (12, 4),
    "config_msix_vector": (16, 2),
    "num_queues": (18, 2),
    "device_status": (20, 1),
    "config_generation": (21, 1),
    "queue_select": (22, 2),
    "queue_size": (24, 2),
    "queue_msix_vector": (26, 2),
    "queue_enable": (28, 2),
    "queue_notify_off": (30, 2),
    "queue_desc": (32, 8),
    "queue_driver": (40, 8),
    "queue_device": (48, 8),
}

Buffer = tuple[int, int]  # guest address, length


async def until(condition: Callable[[], object], what: str, timeout: float = 10.0) -> None:
    """Lets the loop run until the condition holds."""
    try:
        async with asyncio.timeout(timeout):
            while not condition():  # noqa: ASYNC110 -- what it looks at is guest memory and registers
                await asyncio.sleep(0.0002)
    except TimeoutError:
        raise TimeoutError(f"no sign of {what} after {timeout} s") from None


class Ram:
    """Hands out pieces of guest RAM."""

    def __init__(self, vm: Any, base: int, size: int) -> None:
        self.memory = vm.memory
        self.base = base
        self.next = base
        self.end = base + size

    def take(self, size: int, align: int = 16) -> int:
        start = (self.next + align - 1) & ~(align - 1)
        assert start + size <= self.end, "the test's guest RAM is used up"
        self.next = start + size
        return start

    def put(self, data: bytes, align: int = 16) -> Buffer:
        """A buffer with these bytes."""
        address = self.take(len(data), align)
        self.memory.write(address, data)
        return address, len(data)


class PciDevice:
    """One function, reached through configuration mechanism 1; places its BARs itself."""

    def __init__(self, vm: Any, slot: int, bar_base: int) -> None:
        self.vm = vm
        self.slot = slot
        self.bars: dict[int, int] = {}
        self._bar_base = bar_base

    def config_read(self, offset: int, size: int) -> int:
        self.vm.pio.write(0xCF8, 4, 0x8000_0000 | self.slot << 11 | offset & 0xFC)
        return int(self.vm.pio.read(0xCFC + (offset & 3), size))

    def config_write(self, offset: int, size: int, value: int) -> None:
        self.vm.pio.write(0xCF8, 4, 0x8000_0000 | self.slot << 11 | offset & 0xFC)
        self.vm.pio.write(0xCFC + (offset & 3), size, value)

    def place_bars(self) -> None:
        """Sizes each memory BAR, gives it an address and lets the function decode and master."""
        base = self._bar_base
        index = 0
        while index < 6:
            register = 0x10 + 4 * index
            self.config_write(register, 4, 0xFFFF_FFFF)
            mask = self.config_read(register, 4)
            if mask in (0, 0xFFFF_FFFF) or mask & 1:
                index += 1
                continue
            size = (~(mask & ~0xF) & 0xFFFF_FFFF) + 1
            base = (base + size - 1) & ~(size - 1)
            self.config_write(register, 4, base)
            self.bars[index] = base
            if mask & 4:
                self.config_write(register + 4, 4, 0)
                index += 1
            base += size
            index += 1
        self.config_write(4, 2, 0x6)

    def capabilities(self) -> list[tuple[int, int]]:
        """(id, offset) in the order of the list."""
        found: list[tuple[int, int]] = []
        offset = self.config_read(0x34, 1)
        while offset and len(found) < 48:
            found.append((self.config_read(offset, 1), offset))
            offset = self.config_read(offset + 1, 1)
        return found


class VirtioDriver(PciDevice):
    """Drives the virtio function in a slot."""

    def __init__(self, vm: Any, slot: int, ram: Ram, bar_base: int = 0xD000_0000) -> None:
        super().__init__(vm, slot, bar_base)
        self.ram = ram
        self.queues: dict[int, DriverQueue] = {}
        self.structures: dict[int, tuple[int, int, int]] = {}  # type -> address, length, offset of the capability
        self.notify_multiplier = 0
        self.msix = 0
        self.features = 0

    # -- discovery -----------------------------------------------------------------------------------------------------

    def probe(self) -> None:
        self.place_bars()
        for identity, offset in self.capabilities():
            if identity == 0x11:
                self.msix = offset
            if identity != 9:
                continue
            kind = self.config_read(offset + 3, 1)
            bar = self.config_read(offset + 4, 1)
            start = self.config_read(offset + 8, 4)
            length = self.config_read(offset + 12, 4)
            if kind == PCI:
                self.structures.setdefault(kind, (0, 4, offset))
                continue
            self.structures.setdefault(kind, (self.bars[bar] + start, length, offset))
            if kind == NOTIFY:
                self.notify_multiplier = self.config_read(offset + 16, 4)

    def read(self, field: str) -> int:
        offset, size = FIELDS[field]
        base = self.structures[COMMON][0] + offset
        if size == 8:
            return int(self.vm.mmio.read(base, 4)) | int(self.vm.mmio.read(base + 4, 4)) << 32
        return int(self.vm.mmio.read(base, size))

    def write(self, field: str, value: int) -> None:
        offset, size = FIELDS[field]
        base = self.structures[COMMON][0] + offset
        if size == 8:
            self.vm.mmio.write(base, 4, value & 0xFFFF_FFFF)
            self.vm.mmio.write(base + 4, 4, value >> 32)
        else:
            self.vm.mmio.write(base, size, value)

    @property
    def status(self) -> int:
        return self.read("device_status")

    def add_status(self, bits: int) -> int:
        self.write("device_status", self.status | bits)
        return self.status

    def device_config(self, offset: int, size: int) -> int:
        return int(self.vm.mmio.read(self.structures[DEVICE][0] + offset, size))

    def isr(self) -> int:
        return int(self.vm.mmio.read(self.structures[ISR][0], 1))

    # -- initialisation, §3.1.1 ----------------------------------------------------------------------------------------

    def offered(self) -> int:
        value = 0
        for word in range(2):
            self.write("device_feature_select", word)
            value |= self.read("device_feature") << 32 * word
        return value

    def accept(self, features: int) -> None:
        for word in range(2):
            self.write("driver_feature_select", word)
            self.write("driver_feature", features >> 32 * word & 0xFFFF_FFFF)
        self.features = features

    def negotiate(self, wanted: int | None = None) -> int:
        """Accepts what is offered, or the part of it that is wanted (VERSION_1 always). Returns the status."""
        offered = self.offered()
        self.add_status(ACKNOWLEDGE)
        self.add_status(DRIVER)
        self.accept(offered if wanted is None else (offered & wanted) | 1 << F_VERSION_1)
        return self.add_status(FEATURES_OK)

    def enable_msix(self) -> None:
        """One message for each vector: queue i has MSI_DATA + i, configuration the last."""
        control = self.config_read(self.msix + 2, 2)
        table = self.config_read(self.msix + 4, 4)
        base = self.bars[table & 7] + (table & ~7)
        for vector in range((control & 0x7FF) + 1):
            for i, word in enumerate((MSI_ADDRESS, 0, MSI_DATA + vector, 0)):
                self.vm.mmio.write(base + 16 * vector + 4 * i, 4, word)
        self.config_write(self.msix + 2, 2, control | 0x8000)

    def set_up(self, index: int, size: int | None = None, *, vector: int | None = None) -> "DriverQueue":
        """Gives a queue its memory and enables it."""
        self.write("queue_select", index)
        size = size or self.read("queue_size")
        self.write("queue_size", size)
        queue = DriverQueue(self, index, size)
        self.write("queue_msix_vector", index if vector is None else vector)
        self.write("queue_desc", queue.desc)
        self.write("queue_driver", queue.avail)
        self.write("queue_device", queue.used_ring)
        self.write("queue_enable", 1)
        self.queues[index] = queue
        return queue

    def begin(self, wanted: int | None = None, *, size: int | None = None, msix: bool = True) -> None:
        """Everything up to DRIVER_OK."""
        self.probe()
        self.restart(wanted, size=size, msix=msix)

    def restart(self, wanted: int | None = None, *, size: int | None = None, msix: bool = True) -> None:
        """Initialisation again, after a reset."""
        assert self.negotiate(wanted) & FEATURES_OK
        count = self.read("num_queues")
        if msix:
            self.enable_msix()
            self.write("config_msix_vector", count)
        for index in range(count):
            self.set_up(index, size, vector=index if msix else NO_VECTOR)
        self.add_status(DRIVER_OK)

    async def reset(self) -> None:
        self.write("device_status", 0)
        await until(lambda: self.status == 0, "status 0 after a reset")

    def messages(self) -> list[int]:
        """Vectors that fired, in order, since the last look."""
        return [data - MSI_DATA for kind, _, data in self.vm.take_interrupts() if kind == "msi"]


class DriverQueue:
    """The driver's side of a split ring."""

    def __init__(self, driver: VirtioDriver, index: int, size: int) -> None:
        self.driver = driver
        self.index = index
        self.size = size
        self.memory = driver.vm.memory
        self.desc = driver.ram.take(16 * size)
        self.avail = driver.ram.take(6 + 2 * size, 2)
        self.used_ring = driver.ram.take(6 + 8 * size, 4)
        for base, length in ((self.desc, 16 * size), (self.avail, 6 + 2 * size), (self.used_ring, 6 + 8 * size)):
            self.memory.write(base, bytes(length))
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        self.next_avail = 0
        self.next_used = 0

    # -- raw -----------------------------------------------------------------------------------------------------------

    def set_desc(self, i: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.memory.write(self.desc + 16 * i, struct.pack("<QIHH", address, length, flags, following))

    def word(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 2), "little")

    def set_word(self, address: int, value: int) -> None:
        self.memory.write(address, (value & 0xFFFF).to_bytes(2, "little"))

    def offer(self, head: int) -> None:
        """Puts a head into the available ring and moves the index."""
        self.set_word(self.avail + 4 + 2 * (self.next_avail % self.size), head)
        self.next_avail = self.next_avail + 1 & 0xFFFF
        self.set_word(self.avail + 2, self.next_avail)

    def set_flags(self, value: int) -> None:
        self.set_word(self.avail, value)

    def set_used_event(self, value: int) -> None:
        self.set_word(self.avail + 4 + 2 * self.size, value)

    @property
    def avail_event(self) -> int:
        return self.word(self.used_ring + 4 + 8 * self.size)

    @property
    def used_flags(self) -> int:
        return self.word(self.used_ring)

    @property
    def used_index(self) -> int:
        return self.word(self.used_ring + 2)

    def notify_address(self) -> int:
        self.driver.write("queue_select", self.index)
        offset = self.driver.read("queue_notify_off") * self.driver.notify_multiplier
        return self.driver.structures[NOTIFY][0] + offset

    def kick(self) -> None:
        self.driver.vm.mmio.write(self.notify_address(), 2, self.index)

    # -- honest --------------------------------------------------------------------------------------------------------

    def add(self, readable: Sequence[Buffer] = (), writable: Sequence[Buffer] = (), *, indirect: bool = False) -> int:
        """Offers a chain; returns its head."""
        parts = [(address, length, 0) for address, length in readable]
        parts += [(address, length, WRITE) for address, length in writable]
        if indirect:
            table = b"".join(
                struct.pack("<QIHH", address, length, flags | (NEXT if i + 1 < len(parts) else 0), i + 1)
                for i, (address, length, flags) in enumerate(parts)
            )
            address, length = self.driver.ram.put(table)
            head = self.free.pop(0)
            self.set_desc(head, address, length, INDIRECT)
            self.chains[head] = [head]
        else:
            assert len(parts) <= len(self.free), "no free descriptors"
            slots = [self.free.pop(0) for _ in parts]
            for i, (address, length, flags) in enumerate(parts):
                more = i + 1 < len(parts)
                self.set_desc(slots[i], address, length, flags | (NEXT if more else 0), slots[i + 1] if more else 0)
            head = slots[0]
            self.chains[head] = slots
        self.offer(head)
        return head

    def used(self) -> list[tuple[int, int]]:
        """(head, written) of what came back since the last look; frees the descriptors."""
        found = []
        while self.next_used != self.used_index:
            at = self.used_ring + 4 + 8 * (self.next_used % self.size)
            head, written = struct.unpack("<II", self.memory.read(at, 8))
            assert head in self.chains, f"head {head} came back, but it was not out"
            self.free.extend(self.chains.pop(head))
            self.next_used = self.next_used + 1 & 0xFFFF
            found.append((head, written))
        return found

    async def wait(self, count: int = 1) -> list[tuple[int, int]]:
        """The next `count` completions."""
        found: list[tuple[int, int]] = []
        async with asyncio.timeout(10):
            while len(found) < count:
                found += self.used()
                await asyncio.sleep(0 if found else 0.0002)
        return found
