"""ACPI fixed hardware of the PIIX4: PM1 and the power management timer, GPE0, and the PCI hotplug ports.

PM1 and GPE0 each have a wire to the SCI, interrupt 9, that is up while a status bit and its enable bit are both set
(ACPI 6.5 §4.8). Guest accesses come from vCPU threads, buttons and events from the loop.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from propolis._lock cimport Lock
from propolis._bus cimport Region
from propolis._interrupts cimport IrqLine
from propolis._vmm cimport Vm
from propolis.devices._power cimport POWER_OFF
from propolis.devices._timer cimport Timer, monotonic_ns

cdef enum:
    SCI = 9
    PM1_STATUS = 0
    PM1_ENABLE = 2
    PM1_CONTROL = 4
    PM_TIMER = 8
    PM_REGISTERS = 12

    TIMER_BIT = 0x0001
    BUTTON_BIT = 0x0100
    STATUS_BITS = 0x8531     # timer, bus master, global, power button, RTC, wake
    ENABLE_BITS = 0x0521     # timer, global, power button, RTC
    CONTROL_SCI_EN = 0x0001  # ACPI mode is the only one
    CONTROL_BITS = 0x1C02    # sleep type, bus master reload
    CONTROL_SLEEP_TYPE = 0x1C
    CONTROL_SLEEP = 0x20     # these two in the upper byte

    FREQUENCY = 3579545      # Hz
    HALF_PERIOD_SHIFT = 31   # the status bit follows each change of the counter's top bit
    SECOND = 1000000000

    GPE_BYTES = 2
    HOTPLUG_UP = 0
    HOTPLUG_DOWN = 4
    HOTPLUG_EJECT = 8

cdef enum HotplugEvent:
    HOTPLUG_EJECTED = 1      # take_ejected() has something

EJECTED = HOTPLUG_EJECTED


cdef class PmBlock(Region):
    """PM1a event and control registers and the timer; 64 bytes of which the rest read 0."""

    cdef readonly Timer timer
    cdef Vm vm
    cdef IrqLine line
    cdef uint32_t slot              # of the machine's power events
    cdef Lock lock                  # taken before irq_lock; guards all below
    cdef uint16_t status, enable, control
    cdef uint64_t start             # when the counter was 0
    cdef uint64_t halves            # half periods of the counter that the status bit has told of

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.lock = Lock()

    def __init__(self, Vm vm, slot: int) -> None:
        self.name = "pm1"
        self.width = 4
        self.vm = vm
        self.slot = slot
        self.line = IrqLine(vm, SCI)
        self.timer = Timer()
        self.reset()

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint8_t registers[PM_REGISTERS + 8]
        cdef uint32_t count
        cdef uint64_t value = 0
        if offset >= PM_REGISTERS or size > 8:
            return 0
        self.lock.acquire()
        self._catch_up()
        memcpy(registers, &self.status, 2)
        memcpy(registers + PM1_ENABLE, &self.enable, 2)
        memcpy(registers + PM1_CONTROL, &self.control, 2)
        self.lock.release()
        registers[6] = registers[7] = 0
        count = <uint32_t>self._count()
        memcpy(registers + PM_TIMER, &count, 4)
        memcpy(registers + PM_REGISTERS, &value, 8)
        memcpy(&value, registers + offset, size)
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t i
        cdef bint is_off = False
        self.lock.acquire()
        self._catch_up()
        for i in range(size):
            if self._write_byte(offset + i, <uint8_t>(value >> 8 * i & 0xFF)):
                is_off = True
        self._settle()
        self.lock.release()
        if is_off:
            self.vm.mailbox.post(self.slot, POWER_OFF)

    cdef bint _write_byte(self, uint64_t offset, uint8_t byte) noexcept nogil:
        """Under the lock. True when it turned the machine off."""
        cdef uint16_t mask = 0x00FF
        cdef uint16_t value = byte
        if offset & 1:
            mask = 0xFF00
            value = <uint16_t>(value << 8)
        if offset < PM1_ENABLE:
            self.status &= <uint16_t>~value  # write one to clear
        elif offset < PM1_CONTROL:
            self.enable = (self.enable & ~mask) | (value & ENABLE_BITS)
        elif offset < PM1_CONTROL + 2:
            self.control = (self.control & ~mask) | (value & CONTROL_BITS) | CONTROL_SCI_EN
            # Sleep type 0 is S5; the tables offer no other.
            return offset & 1 != 0 and byte & (CONTROL_SLEEP | CONTROL_SLEEP_TYPE) == CONTROL_SLEEP
        return False

    cdef uint64_t _count(self) noexcept nogil:
        """The counter as if it had 64 bits."""
        cdef uint64_t passed = monotonic_ns() - self.start
        return passed // SECOND * FREQUENCY + passed % SECOND * FREQUENCY // SECOND

    cdef void _catch_up(self) noexcept nogil:
        """Under the lock: the timer's status bit is worked out when somebody looks."""
        cdef uint64_t halves = self._count() >> HALF_PERIOD_SHIFT
        if halves != self.halves:
            self.halves = halves
            self.status |= TIMER_BIT

    cdef void _settle(self) noexcept nogil:
        cdef uint64_t left
        self.line.set(self.status & self.enable & ENABLE_BITS != 0)
        if self.enable & ~self.status & TIMER_BIT:
            left = ((self.halves + 1) << HALF_PERIOD_SHIFT) - self._count()
            if left > <uint64_t>1 << HALF_PERIOD_SHIFT:
                left = 0  # it has just passed
            self.timer.arm(left * SECOND // FREQUENCY + 1)
        else:
            self.timer.disarm()

    def tick(self) -> None:
        """The timer expired: the counter's top bit has changed."""
        self.timer.drain()
        self.lock.acquire()
        self._catch_up()
        self._settle()
        self.lock.release()

    def press_button(self) -> None:
        self.lock.acquire()
        self.status |= BUTTON_BIT
        self._settle()
        self.lock.release()

    def advance(self, seconds: int) -> None:
        """Moves the counter on, as if that time had passed: for tests, since half a period takes ten minutes."""
        self.start -= <uint64_t>seconds * SECOND

    def reset(self) -> None:
        self.lock.acquire()
        self.status = self.enable = 0
        self.control = CONTROL_SCI_EN
        self.start = monotonic_ns()
        self.halves = 0
        self._settle()
        self.lock.release()


cdef class GpeBlock(Region):
    """General-purpose events: two status bytes, then two enable bytes."""

    cdef IrqLine line
    cdef Lock lock                      # taken before irq_lock
    cdef uint8_t registers[GPE_BYTES * 2]   # under: lock

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.lock = Lock()

    def __init__(self, Vm vm) -> None:
        self.name = "gpe0"
        self.width = 1
        self.line = IrqLine(vm, SCI)

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint8_t value
        self.lock.acquire()
        value = self.registers[offset & 3]
        self.lock.release()
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        self.lock.acquire()
        if offset < GPE_BYTES:
            self.registers[offset] &= <uint8_t>~(value & 0xFF)
        else:
            self.registers[offset & 3] = <uint8_t>(value & 0xFF)
        self._settle()
        self.lock.release()

    cdef void _settle(self) noexcept nogil:
        self.line.set((self.registers[0] & self.registers[2] | self.registers[1] & self.registers[3]) != 0)

    def raise_event(self, bit: int) -> None:
        """Sets status bit 0 to 15."""
        cdef uint32_t number = bit
        if number >= 8 * GPE_BYTES:
            raise ValueError(f"no general-purpose event {bit}")
        self.lock.acquire()
        self.registers[number >> 3] |= <uint8_t>(1 << (number & 7))
        self._settle()
        self.lock.release()

    def reset(self) -> None:
        cdef int i
        self.lock.acquire()
        for i in range(GPE_BYTES * 2):
            self.registers[i] = 0
        self._settle()
        self.lock.release()


cdef class HotplugPorts(Region):
    """Slots of bus 0 with a new device, slots whose device shall go, and the register that ejects one.

    A new device is told of once: reading its bit clears it, as QEMU's hw/acpi/pcihp.c has it, though its
    docs/specs/acpi_pci_hotplug.rst does not say so. A device that shall go stays marked until it is ejected.
    """

    cdef Vm vm
    cdef uint32_t slot                  # in the mailbox
    cdef Lock lock
    cdef uint32_t up, down, ejected     # one bit for each slot; under: lock

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.lock = Lock()

    def __init__(self, Vm vm, slot: int) -> None:
        self.name = "pci hotplug"
        self.width = 4
        self.vm = vm
        self.slot = slot

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint64_t value = 0
        cdef uint32_t words[4]
        if offset >= HOTPLUG_EJECT or size > 8:
            return 0
        self.lock.acquire()
        words[0] = self.up
        words[1] = self.down
        if offset < HOTPLUG_DOWN:
            self.up &= ~<uint32_t>((<uint64_t>1 << 8 * size) - 1 << 8 * offset)
        self.lock.release()
        words[2] = words[3] = 0
        memcpy(&value, <uint8_t *>words + offset, size)
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        cdef uint32_t gone
        if offset != HOTPLUG_EJECT or size != 4:
            return
        self.lock.acquire()
        gone = <uint32_t>value & self.down  # what nobody asked back stays
        self.down &= ~gone
        self.up &= ~gone
        self.ejected |= gone
        self.lock.release()
        if gone:
            self.vm.mailbox.post(self.slot, HOTPLUG_EJECTED)

    def announce(self, up: int, down: int) -> None:
        """Adds slots, as bits, to those that have a new device and those whose device shall go."""
        self.lock.acquire()
        self.up |= up
        self.down |= down
        self.lock.release()

    def take_ejected(self) -> int:
        """Slots whose device the guest has let go since the last call, as bits."""
        cdef uint32_t gone
        self.lock.acquire()
        gone = self.ejected
        self.ejected = 0
        self.lock.release()
        return gone

    def reset(self) -> None:
        self.lock.acquire()
        self.up = self.down = 0
        self.lock.release()
