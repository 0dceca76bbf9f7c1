"""Single-register devices of a PC: reset control, fast A20, POST code, debug console and pvpanic."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from propolis._atomic cimport add64_rlx, ld8_rlx, ld64_rlx, st8_rlx
from propolis._lock cimport Lock
from propolis._bus cimport Region
from propolis._vmm cimport Vm
from propolis.devices._power cimport POWER_CRASH_LOADED, POWER_PANICKED, POWER_RESET
from propolis.devices._ring cimport ByteRing

cdef enum:
    RESET_PULSE = 0x04       # 0xCF9: resets the processors
    RESET_KEPT = 0x0A        # hard reset, full reset: remembered
    A20_INIT = 0x01          # port 0x92
    A20_ON = 0x02

    DEBUG_PRESENT = 0xE9
    DEBUG_RING = 65536
    DEBUG_OUTPUT = 1

    PANIC_PANICKED = 0x01
    PANIC_CRASH_LOADED = 0x02

OUTPUT = DEBUG_OUTPUT


cdef class ResetControl(Region):
    """0xCF9 of the PIIX3. It lies inside the PCI configuration ports, which pass byte accesses on."""

    cdef Vm vm
    cdef uint32_t slot               # of the machine's power events
    cdef uint8_t value               # relaxed

    def __init__(self, Vm vm, slot: int) -> None:
        self.name = "reset control"
        self.width = 1
        self.vm = vm
        self.slot = slot

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return ld8_rlx(&self.value)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        st8_rlx(&self.value, <uint8_t>(value & RESET_KEPT))
        if value & RESET_PULSE:
            self.vm.mailbox.post(self.slot, POWER_RESET)

    def reset(self) -> None:
        self.value = 0


cdef class FastA20(Region):
    """Port 0x92. The A20 gate is open for good: the bit is only remembered."""

    cdef Vm vm
    cdef uint32_t slot
    cdef uint8_t value               # relaxed

    def __init__(self, Vm vm, slot: int) -> None:
        self.name = "fast a20"
        self.width = 1
        self.vm = vm
        self.slot = slot
        self.value = A20_ON

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return ld8_rlx(&self.value)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        st8_rlx(&self.value, <uint8_t>(value & A20_ON))
        if value & A20_INIT:
            self.vm.mailbox.post(self.slot, POWER_RESET)

    def reset(self) -> None:
        self.value = A20_ON


cdef class PostPort(Region):
    """Port 0x80: the last POST code. Kernels write here to pass a microsecond."""

    cdef uint8_t value               # relaxed

    def __cinit__(self) -> None:
        self.name = "post code"
        self.width = 1

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return ld8_rlx(&self.value)

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        st8_rlx(&self.value, <uint8_t>(value & 0xFF))

    def reset(self) -> None:
        self.value = 0


cdef class DebugPort(Region):
    """Port 0x402: each byte written is text for whoever debugs the firmware."""

    cdef Vm vm
    cdef uint32_t slot               # in the mailbox
    cdef Lock lock                   # one vCPU at a time writes into the ring
    cdef ByteRing ring
    cdef uint64_t dropped            # under: lock

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.lock = Lock()

    def __init__(self, Vm vm, slot: int) -> None:
        self.name = "debug port"
        self.width = 1
        self.vm = vm
        self.slot = slot
        self.ring = ByteRing(DEBUG_RING)

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return DEBUG_PRESENT

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef bint is_first = False
        self.lock.acquire()
        if self.ring.used() == DEBUG_RING:
            self.dropped += 1
        else:
            is_first = self.ring.put(<uint8_t>(value & 0xFF))
        self.lock.release()
        if is_first:
            self.vm.mailbox.post(self.slot, DEBUG_OUTPUT)

    def take(self, limit: int) -> bytes:
        """What the guest wrote, at most `limit` bytes. OUTPUT announces more, or the rest."""
        data, more = self.ring.take(limit)
        if more:
            self.vm.mailbox.post(self.slot, DEBUG_OUTPUT)
        return data

    def stats(self) -> dict:
        cdef uint64_t dropped
        self.lock.acquire()
        dropped = self.dropped
        self.lock.release()
        return {"dropped": dropped}


cdef class PvpanicPort(Region):
    """Port 0x505: reads say which events are understood, a write is one."""

    cdef Vm vm
    cdef uint32_t slot               # of the machine's power events
    cdef uint64_t panics, crash_loads   # relaxed

    def __init__(self, Vm vm, slot: int) -> None:
        self.name = "pvpanic"
        self.width = 1
        self.vm = vm
        self.slot = slot

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return PANIC_PANICKED | PANIC_CRASH_LOADED

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t events = 0
        if value & PANIC_PANICKED:
            add64_rlx(&self.panics, 1)
            events |= POWER_PANICKED
        if value & PANIC_CRASH_LOADED:
            add64_rlx(&self.crash_loads, 1)
            events |= POWER_CRASH_LOADED
        if events:
            self.vm.mailbox.post(self.slot, events)

    def stats(self) -> dict:
        """How often each was reported since the machine was built."""
        return {"panicked": ld64_rlx(&self.panics), "crash_loaded": ld64_rlx(&self.crash_loads)}
