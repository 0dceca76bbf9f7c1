"""MSI-X of one PCI function (PCI 3.0 §6.8.2): table, pending bits and masking.

Guest accesses come from vCPU threads, `fire` from any thread; one mutex orders them, so that an interrupt that meets a
mask being lifted is delivered exactly once.
"""

from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from propolis._atomic cimport ld32_rlx, st32_rlx
from propolis._lock cimport Lock
from propolis._vmm cimport Vm

cdef enum:
    ENTRY_SIZE = 16
    ENTRY_MASKED = 1
    CONTROL_ENABLE = 0x8000
    CONTROL_FUNCTION_MASK = 0x4000


cdef class MsixTable(Region):
    def __init__(self, Msix msix) -> None:
        self.name = "msix table"
        self.width = 8
        self.msix = msix

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint8_t raw[ENTRY_SIZE * 2]
        cdef uint64_t value = 0
        cdef uint64_t index = offset // ENTRY_SIZE
        cdef uint32_t i
        for i in range(2):  # an unaligned access may reach into the next entry
            if index + i < self.msix.count:
                self.msix.lock.acquire()
                memcpy(raw + ENTRY_SIZE * i, &self.msix.entries[index + i].address, 8)
                memcpy(raw + ENTRY_SIZE * i + 8, &self.msix.entries[index + i].data, 4)
                memcpy(raw + ENTRY_SIZE * i + 12, &self.msix.entries[index + i].control, 4)
                self.msix.lock.release()
            else:
                memset(raw + ENTRY_SIZE * i, 0xFF, ENTRY_SIZE)
        memcpy(&value, raw + offset % ENTRY_SIZE, size if size <= 8 else 8)
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint64_t index = offset // ENTRY_SIZE
        cdef uint32_t field = <uint32_t>(offset % ENTRY_SIZE)
        cdef Entry *entry
        # Anything but an aligned word of four or eight bytes is undefined by §6.8.2: dropped.
        if (size != 4 and size != 8) or offset % size != 0 or index >= self.msix.count:
            return
        self.msix.lock.acquire()
        entry = &self.msix.entries[index]
        if field == 0:
            if size == 8:
                entry.address = value
            else:
                entry.address = entry.address >> 32 << 32 | <uint32_t>value
        elif field == 4:
            entry.address = <uint32_t>entry.address | value << 32
        elif field == 8:
            entry.data = <uint32_t>value
            if size == 8:
                entry.control = <uint32_t>(value >> 32) & ENTRY_MASKED
        else:
            entry.control = <uint32_t>value & ENTRY_MASKED
        self.msix._settle(entry)
        self.msix.lock.release()


cdef class MsixPba(Region):
    def __init__(self, Msix msix) -> None:
        self.name = "msix pending bits"
        self.width = 8
        self.msix = msix

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint64_t value = 0
        cdef uint64_t first = offset * 8
        cdef uint32_t i
        self.msix.lock.acquire()
        for i in range(size * 8 if size <= 8 else 64):
            if first + i < self.msix.count and self.msix.entries[first + i].pending:
                value |= <uint64_t>1 << i
        self.msix.lock.release()
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        pass  # read-only


cdef class Msix:
    def __cinit__(self, Vm vm, count: int) -> None:
        cdef uint32_t i
        if not 1 <= count <= MAX_VECTORS:
            raise ValueError(f"MSI-X has 1 to {MAX_VECTORS} vectors, not {count}")
        self.count = count
        self.entries = <Entry *>calloc(self.count, sizeof(Entry))
        if self.entries == NULL:
            raise MemoryError
        self.lock = Lock()
        self.vectors = [MsiVector(vm) for _ in range(count)]
        for i in range(self.count):
            self.entries[i].vector = <void *>self.vectors[i]
            self.entries[i].control = ENTRY_MASKED
            self.entries[i].silent = True
        self.table = MsixTable(self)
        self.pba = MsixPba(self)

    def __dealloc__(self) -> None:
        if self.entries != NULL:
            free(self.entries)

    cdef bint enabled(self) noexcept nogil:
        return ld32_rlx(&self.is_enabled) != 0

    cdef void fire(self, uint32_t vector) noexcept nogil:
        if vector >= self.count:
            return
        self.lock.acquire()
        if self.is_enabled:
            if self.entries[vector].silent:
                self.entries[vector].pending = True
            else:
                self._send(&self.entries[vector])
        self.lock.release()

    cdef void set_control(self, uint32_t control) noexcept nogil:
        cdef uint32_t i
        cdef bint enable = control & CONTROL_ENABLE != 0
        cdef bint mask = control & CONTROL_FUNCTION_MASK != 0
        self.lock.acquire()
        if enable != (self.is_enabled != 0) or mask != self.function_masked:
            st32_rlx(&self.is_enabled, enable)
            self.function_masked = mask
            for i in range(self.count):
                self._settle(&self.entries[i])
        self.lock.release()

    cdef void _settle(self, Entry *entry) noexcept nogil:
        """Under the lock: the vector follows its entry after either changed."""
        cdef bint silent = self.is_enabled == 0 or self.function_masked or entry.control & ENTRY_MASKED != 0
        if not self.is_enabled:
            entry.pending = False  # what a disabled function had to say goes by INTx
        if not silent:
            # Only now: a lent vector's route costs the kernel a grace period, and drivers write under the mask.
            (<MsiVector>entry.vector).set_message(entry.address, entry.data)
        if silent != entry.silent:
            entry.silent = silent
            (<MsiVector>entry.vector).set_masked(silent)
        if not silent and entry.pending:
            entry.pending = False
            self._send(entry)

    cdef void _send(self, Entry *entry) noexcept nogil:
        # Elsewhere than at the local APICs it would be a plain memory write, which no sane driver asks for.
        if entry.address >> 20 == 0xFEE:
            (<MsiVector>entry.vector).fire()
        else:
            self.dropped += 1

    def lend(self, vector: int) -> int:
        """An eventfd that fires this vector without us, obeying the guest's masks. Raises HypervisorError."""
        cdef MsiVector lent = self.vectors[vector]
        # The lock: a guest that writes the entry meanwhile would leave the route with what was there before.
        self.lock.acquire()
        try:
            fd = lent.lend()
            lent.set_masked(self.entries[<uint32_t>vector].silent)
        finally:
            self.lock.release()
        return fd

    def trigger(self, vector: int) -> None:
        """fire() for devices written in Python."""
        if vector >= 0:
            self.fire(vector)

    def control(self, value: int) -> None:
        """The Message Control word, as configuration space passes it on; for tests of the table alone."""
        self.set_control(value)

    def reset(self) -> None:
        """All vectors masked, none pending, MSI-X disabled; the vCPUs are held."""
        cdef uint32_t i
        self.set_control(0)
        self.lock.acquire()
        for i in range(self.count):
            self.entries[i].address = 0
            self.entries[i].data = 0
            self.entries[i].control = ENTRY_MASKED
            self._settle(&self.entries[i])
        self.lock.release()

    def stats(self) -> dict:
        cdef uint64_t dropped
        self.lock.acquire()
        dropped = self.dropped
        self.lock.release()
        return {"dropped": dropped}
