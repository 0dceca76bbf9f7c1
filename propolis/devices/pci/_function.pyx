"""A PCI function: its configuration space, and what follows when the guest writes there.

A function is a 256-byte image with a mask of the bits that the guest may write. BARs move on the vCPU thread that wrote
them; an address that cannot be decoded (beyond its space, or taken by an older region) is simply not answered.
"""

cimport cython
from libc.string cimport memcpy

from propolis._atomic cimport ld8_rlx, st8_rlx
from propolis._lock cimport Lock

cdef enum:
    # PCI 3.0 §6.1, figure 6-1.
    VENDOR = 0x00
    COMMAND = 0x04
    STATUS = 0x06
    REVISION = 0x08
    CACHE_LINE = 0x0C
    LATENCY = 0x0D
    HEADER_TYPE = 0x0E
    BAR0 = 0x10
    BAR_END = 0x28
    SUBSYSTEM = 0x2C
    CAPABILITIES = 0x34
    INTERRUPT_LINE = 0x3C
    INTERRUPT_PIN = 0x3D
    FIRST_CAPABILITY = 0x40
    MULTIFUNCTION = 0x80

    COMMAND_IO = 0x001
    COMMAND_MEMORY = 0x002
    COMMAND_MASTER = 0x004
    COMMAND_PARITY = 0x040
    COMMAND_SERR = 0x100
    COMMAND_INTX_DISABLE = 0x400
    STATUS_INTX = 0x08
    STATUS_CAPABILITIES = 0x10

    CAPABILITY_MSIX = 0x11

BAR_KINDS = {"io": BAR_IO, "mmio32": BAR_MMIO32, "mmio64": BAR_MMIO64}
BAR_NAMES = {kind: name for name, kind in BAR_KINDS.items()}


cdef class Bar:
    cdef void decode(self, bint on, uint64_t base) noexcept nogil:
        """Under the function's lock: answers at `base`, or nowhere."""
        if on == self.decoded and base == self.base:
            return
        if on:
            self.bus.place(self.region, base, self.size)
        elif self.decoded:
            self.bus.remove(self.region)
        self.decoded = on
        self.base = base


@cython.no_gc_clear
cdef class PciFunction:
    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.slot = -1
        self.capability_end = FIRST_CAPABILITY
        self.owned = []
        self.lock = Lock()

    def __init__(
        self,
        Vm vm,
        name: str,
        *,
        vendor: int,
        device: int,
        subsystem_vendor: int = 0,
        subsystem: int = 0,
        class_code: int = 0,
        revision: int = 0,
    ) -> None:
        self.vm = vm
        self.name = name
        self.intx = IrqLine(vm)
        self._define(VENDOR, vendor.to_bytes(2, "little") + device.to_bytes(2, "little"), None)
        self._define(REVISION, bytes([revision]) + class_code.to_bytes(3, "little"), None)
        self._define(SUBSYSTEM, subsystem_vendor.to_bytes(2, "little") + subsystem.to_bytes(2, "little"), None)
        command = COMMAND_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE
        self._define(COMMAND, bytes(2), command.to_bytes(2, "little"))
        self._define(CACHE_LINE, bytes(2), b"\xff\xff")
        self._define(INTERRUPT_LINE, bytes(1), b"\xff")

    # -- set-up, before the function is attached -----------------------------------------------------------------------

    cdef int _define(self, uint32_t offset, bytes value, bytes writable) except -1:
        cdef uint32_t i
        if offset + len(value) > 256 or (writable is not None and len(writable) != len(value)):
            raise ValueError(f"{self.name}: configuration bytes {offset:#x}, {len(value)} long")
        if self.slot >= 0:
            raise ValueError(f"{self.name}: already on the bus")
        for i in range(<uint32_t>len(value)):
            self.config[offset + i] = self.power_on[offset + i] = <uint8_t>value[i]
            if writable is not None:
                self.writable[offset + i] = <uint8_t>writable[i]
        return 0

    def define(self, offset: int, value: bytes, writable: bytes | None = None) -> None:
        """Sets registers to their power-on value; `writable` has the bits that the guest may change."""
        self._define(offset, value, writable)

    def add_bar(self, index: int, kind: str, size: int, Region region) -> None:
        """Base address register `index`: "io", "mmio32" or "mmio64" (that takes two), a power of two in size."""
        cdef Bar bar = Bar()
        wide = kind == "mmio64"
        minimum = 4 if kind == "io" else 16
        if kind not in BAR_KINDS or size < minimum or size & (size - 1) or size > (1 << 63 if wide else 1 << 31):
            raise ValueError(f"{self.name}: BAR {index}: {kind} of {size:#x} bytes")
        if not 0 <= index < (5 if wide else 6) or self.bars[index] != NULL or (wide and self.bars[index + 1] != NULL):
            raise ValueError(f"{self.name}: BAR {index} does not exist or is taken")
        bar.kind = BAR_KINDS[kind]
        bar.size = size
        bar.region = region
        bar.bus = self.vm.pio if kind == "io" else self.vm.mmio
        mask = ((1 << 64 if wide else 1 << 32) - size).to_bytes(8 if wide else 4, "little")
        flags = {"io": 1, "mmio32": 0, "mmio64": 4}[kind]
        self._define(BAR0 + 4 * index, flags.to_bytes(len(mask), "little"), mask)
        decode = (self.writable[COMMAND] | (COMMAND_IO if kind == "io" else COMMAND_MEMORY)).to_bytes(1, "little")
        self._define(COMMAND, bytes(1), decode)
        bar.bus.own_region(region)
        self.bars[index] = <void *>bar
        self.owned.append(bar)
        if wide:
            upper = Bar()
            (<Bar>upper).kind = BAR_UPPER
            self.bars[index + 1] = <void *>upper
            self.owned.append(upper)

    def add_capability(self, capability: int, body: bytes, writable: bytes | None = None) -> int:
        """Appends a capability; `body` follows its two header bytes. Returns its offset."""
        cdef uint32_t offset = self.capability_end
        self._define(offset, bytes([capability, 0]) + body, b"\0\0" + (writable or bytes(len(body))))
        link = self.last_capability + 1 if self.last_capability else CAPABILITIES
        self._define(<uint32_t>link, bytes([offset]), None)
        self._define(STATUS, bytes([self.power_on[STATUS] | STATUS_CAPABILITIES]), None)
        self.last_capability = offset
        self.capability_end = <uint32_t>((offset + 2 + len(body) + 3) & ~3)
        return offset

    def add_msix(self, vectors: int, bar: int, table_offset: int, pba_offset: int) -> Msix:
        """The MSI-X capability. The caller puts its `table` and `pba` regions into the BAR's window there."""
        if self.msix is not None:
            raise ValueError(f"{self.name}: has MSI-X already")
        if table_offset & 7 or pba_offset & 7 or not 0 <= bar < 6:
            raise ValueError(f"{self.name}: MSI-X at BAR {bar}, {table_offset:#x} and {pba_offset:#x}")
        self.msix = Msix(self.vm, vectors)
        body = (vectors - 1).to_bytes(2, "little")
        body += (table_offset | bar).to_bytes(4, "little") + (pba_offset | bar).to_bytes(4, "little")
        self.msix_offset = self.add_capability(CAPABILITY_MSIX, body, b"\x00\xc0" + bytes(8))
        return self.msix

    def attach(self, slot: int, number: int, pin: int) -> IrqLine:
        """Called by the bus: takes its place, with interrupt pin 1 to 4, or 0 for none. Returns the pin's wire."""
        self._define(INTERRUPT_PIN, bytes([pin]), None)
        self.slot = slot
        self.number = number
        return self.intx

    def wire(self) -> IrqLine:
        """The interrupt pin's wire."""
        return self.intx

    def detach(self) -> None:
        """Called by the bus: answers nowhere any more; the vCPUs are held."""
        self.reset()
        for bar in self.owned:
            if (<Bar>bar).region is not None:
                (<Bar>bar).bus.discard((<Bar>bar).region)
        self.slot = -1

    def set_multifunction(self) -> None:
        """Called by the bus: functions beside this one exist."""
        self.config[HEADER_TYPE] |= MULTIFUNCTION
        self.power_on[HEADER_TYPE] |= MULTIFUNCTION

    # -- work ----------------------------------------------------------------------------------------------------------

    cdef uint32_t read_config(self, uint32_t offset, uint32_t size) noexcept nogil:
        cdef uint32_t value = 0xFFFFFFFF
        if offset >= 256 or size > 4:
            return value
        self.lock.acquire()
        memcpy(&value, &self.config[offset], size if size <= 256 - offset else 256 - offset)
        self.lock.release()
        return value

    cdef void write_config(self, uint32_t offset, uint32_t size, uint32_t value) noexcept nogil:
        cdef uint32_t end = offset + size
        cdef uint32_t i
        cdef uint8_t mask
        if offset >= 256 or size > 4:
            return
        self.lock.acquire()
        for i in range(offset, end if end <= 256 else 256):
            mask = self.writable[i]
            # Relaxed: bus_master reads without the lock.
            st8_rlx(&self.config[i], (self.config[i] & ~mask) | (<uint8_t>(value >> 8 * (i - offset)) & mask))
        if offset < COMMAND + 2 and end > COMMAND or offset < BAR_END and end > BAR0:
            self._decode()
        if self.msix_offset and offset < self.msix_offset + 4 and end > self.msix_offset + 2:
            self.msix.set_control(self._dword(self.msix_offset) >> 16)
        self._drive()
        self.lock.release()

    cdef uint32_t _dword(self, uint32_t offset) noexcept nogil:
        cdef uint32_t value = 0
        memcpy(&value, &self.config[offset], 4)
        return value

    cdef void _decode(self) noexcept nogil:
        """Under the lock: each BAR answers where its register and the command register say."""
        cdef uint32_t i
        cdef uint64_t base, limit
        cdef uint8_t command = self.config[COMMAND]
        cdef bint on
        for i in range(6):
            if self.bars[i] == NULL or (<Bar>self.bars[i]).kind == BAR_UPPER:
                continue
            base = self._dword(BAR0 + 4 * i)
            if (<Bar>self.bars[i]).kind == BAR_MMIO64:
                base |= <uint64_t>self._dword(BAR0 + 4 * i + 4) << 32
            base &= ~((<Bar>self.bars[i]).size - 1)
            on = command & (COMMAND_IO if (<Bar>self.bars[i]).kind == BAR_IO else COMMAND_MEMORY) != 0
            limit = ~<uint64_t>0
            if (<Bar>self.bars[i]).kind == BAR_IO:
                limit = 0xFFFF
            elif (<Bar>self.bars[i]).kind == BAR_MMIO32:
                limit = 0xFFFFFFFF
            # 0 is the power-on value: not an address. Being aligned to its size, the range cannot wrap.
            if base == 0 or base > limit or (<Bar>self.bars[i]).size - 1 > limit - base:
                on = False
            (<Bar>self.bars[i]).decode(on, base)

    cdef bint bus_master(self) noexcept nogil:
        return ld8_rlx(&self.config[COMMAND]) & COMMAND_MASTER != 0

    cdef void set_intx(self, bint level) noexcept nogil:
        self.lock.acquire()
        self.intx_wanted = level
        self._drive()
        self.lock.release()

    cdef void _drive(self) noexcept nogil:
        """Under the lock: the wire and the status bit follow what the device wants and the guest allows."""
        cdef bint level = self.intx_wanted and not (self.msix_offset and self.msix.enabled())
        if level:
            self.config[STATUS] |= STATUS_INTX  # set whether or not the pin is disabled: §6.2.3
        else:
            self.config[STATUS] &= <uint8_t>(0xFF ^ STATUS_INTX)
        self.intx.set(level and self.config[COMMAND + 1] & (COMMAND_INTX_DISABLE >> 8) == 0)

    def reset(self) -> None:
        """To the state at power-on: nothing decoded, interrupts low; the vCPUs are held."""
        self.lock.acquire()
        memcpy(self.config, self.power_on, 256)
        self.intx_wanted = False
        self._decode()
        self._drive()
        self.lock.release()
        if self.msix is not None:
            self.msix.reset()

    # -- for the bus, devices written in Python and tests --------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """A configuration read as the guest does it."""
        return self.read_config(offset, size) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        """A configuration write as the guest does it."""
        self.write_config(offset, size, value)

    def drive_intx(self, level: bool) -> None:
        self.set_intx(level)

    @property
    def is_bus_master(self) -> bool:
        return self.bus_master()

    def bar_list(self) -> list:
        """(index, kind, size, base, decoded) of each BAR."""
        cdef uint64_t base
        cdef bint decoded
        found = []
        for i in range(6):
            if self.bars[i] != NULL and (<Bar>self.bars[i]).kind != BAR_UPPER:
                self.lock.acquire()
                base = (<Bar>self.bars[i]).base
                decoded = (<Bar>self.bars[i]).decoded
                self.lock.release()
                found.append((i, BAR_NAMES[(<Bar>self.bars[i]).kind], (<Bar>self.bars[i]).size, base, bool(decoded)))
        return found
