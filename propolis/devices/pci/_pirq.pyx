"""PIRQ routing by the PIIX3 ISA bridge: configuration registers 0x60 to 0x63, one for each of the links A to D.

Bit 7 set: the link is not routed; otherwise bits 3:0 name the interrupt, of which 0, 1, 2, 8 and 13 do not exist here
(82371SB datasheet, PIRQRC). Moving a link moves an asserted level with it.
"""

from libc.string cimport memcpy

from propolis._lock cimport Lock
from propolis._interrupts cimport IrqLine
from propolis._vmm cimport Vm

cdef enum:
    PIRQ_REGISTERS = 0x60
    PIRQ_DISABLED = 0x80
    VALID_IRQS = 0xDEF8  # 3 to 7, 9 to 12, 14, 15


cdef class PirqRouter:
    def __cinit__(self) -> None:
        cdef int i
        self.owned = []
        for i in range(LINKS):
            self.pins[i] = -1
        self.lock = Lock()

    def connect(self, IrqLine wire, link: int) -> None:
        """Wires an interrupt pin to link 0 (A) to 3 (D)."""
        cdef uint32_t index = link
        if index >= LINKS or self.counts[index] == MAX_WIRES:
            raise ValueError(f"no room on PIRQ link {link}")
        self.owned.append(wire)
        self.lock.acquire()
        self.wires[index][self.counts[index]] = <void *>wire
        self.counts[index] += 1
        wire.route(self.pins[index])
        self.lock.release()

    def disconnect(self, IrqLine wire) -> None:
        """Takes a pin off its link; it is not routed any more."""
        cdef int i
        cdef uint32_t j
        self.lock.acquire()
        for i in range(LINKS):
            for j in range(self.counts[i]):
                if self.wires[i][j] == <void *>wire:
                    self.counts[i] -= 1
                    self.wires[i][j] = self.wires[i][self.counts[i]]
                    break
        wire.route(-1)
        self.lock.release()
        if wire in self.owned:
            self.owned.remove(wire)

    cdef void follow(self, const uint8_t *registers) noexcept nogil:
        """The four registers may have changed. Their function's lock is held: the last writer wins on both sides."""
        cdef int i
        cdef uint32_t j
        cdef int pin
        self.lock.acquire()
        for i in range(LINKS):
            pin = registers[i] & 0x0F
            if registers[i] & PIRQ_DISABLED or not VALID_IRQS >> pin & 1:
                pin = -1
            if pin != self.pins[i]:
                self.pins[i] = pin
                for j in range(self.counts[i]):
                    (<IrqLine>self.wires[i][j]).route(pin)
        self.lock.release()

    def routes(self) -> list:
        """The interrupt of each link, -1 for none."""
        cdef int pins[LINKS]
        self.lock.acquire()
        memcpy(pins, self.pins, sizeof(pins))
        self.lock.release()
        return [pins[0], pins[1], pins[2], pins[3]]

cdef class IsaBridge(PciFunction):
    def __init__(self, Vm vm, PirqRouter router, name: str, **identity: int) -> None:
        PciFunction.__init__(self, vm, name, **identity)
        self.router = router
        self.define(PIRQ_REGISTERS, bytes([PIRQ_DISABLED] * LINKS), bytes([0x8F] * LINKS))

    cdef void write_config(self, uint32_t offset, uint32_t size, uint32_t value) noexcept nogil:
        PciFunction.write_config(self, offset, size, value)
        if offset < PIRQ_REGISTERS + LINKS and offset + size > PIRQ_REGISTERS:
            self._route()

    cdef void _route(self) noexcept nogil:
        self.lock.acquire()
        self.router.follow(&self.config[PIRQ_REGISTERS])
        self.lock.release()

    def reset(self) -> None:
        PciFunction.reset(self)
        self._route()
