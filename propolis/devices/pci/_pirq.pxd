"""The PIRQ router of the ISA bridge."""

from libc.stdint cimport uint8_t, uint32_t

from propolis._lock cimport Lock
from propolis.devices.pci._function cimport PciFunction

cdef enum:
    LINKS = 4
    MAX_WIRES = 64           # 32 devices of 8 functions on four links

cdef class PirqRouter:
    """Four links, each to one interrupt input or none, and the pins wired to them."""
    cdef void *wires[LINKS][MAX_WIRES]   # borrowed IrqLine; under: lock
    cdef uint32_t counts[LINKS]          # under: lock
    cdef int pins[LINKS]                 # under: lock
    cdef Lock lock                       # taken after a function's lock, before irq_lock
    cdef list owned

    cdef void follow(self, const uint8_t *registers) noexcept nogil

cdef class IsaBridge(PciFunction):
    cdef PirqRouter router

    cdef void _route(self) noexcept nogil
