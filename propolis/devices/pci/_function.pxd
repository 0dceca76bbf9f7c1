"""A PCI function: configuration space, BARs, capabilities, interrupt pin."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from propolis._lock cimport Lock
from propolis._bus cimport Bus, Region
from propolis._interrupts cimport IrqLine
from propolis._vmm cimport Vm
from propolis.devices.pci._msix cimport Msix

cdef enum BarKind:
    BAR_NONE = 0
    BAR_IO = 1
    BAR_MMIO32 = 2
    BAR_MMIO64 = 3
    BAR_UPPER = 4            # the upper half of a 64-bit BAR: its register only

cdef class Bar:
    """One base address register's range and the region behind it."""
    cdef int kind
    cdef uint64_t size
    cdef uint64_t base       # where it is decoded; under: the function's lock
    cdef bint decoded        # under: the function's lock
    cdef Bus bus
    cdef Region region

    cdef void decode(self, bint on, uint64_t base) noexcept nogil

cdef class PciFunction:
    """One PCI function. Set up on the loop, then attached to a bus; the guest's accesses come from vCPU threads.

    Subclasses override `read_config` and `write_config` (and call these) for registers that do something.
    """
    cdef readonly str name
    cdef readonly int slot               # device number, or -1; written by: loop
    cdef readonly int number             # function number
    cdef Vm vm
    cdef uint8_t config[256]             # under: lock; `bus_master` reads it relaxed
    cdef uint8_t power_on[256]           # written by: loop, before attach
    cdef uint8_t writable[256]           # bits that the guest may write; written by: loop, before attach
    cdef void *bars[6]                   # borrowed Bar or NULL; written by: loop, before attach
    cdef list owned
    cdef IrqLine intx                    # its wire to the interrupt controllers, routed by the PIRQ router
    cdef readonly Msix msix              # or None
    cdef uint32_t msix_offset            # of the capability, 0 without
    cdef bint intx_wanted                # what the device last said; under: lock
    cdef Lock lock                       # taken before the bus lock, the MSI-X lock and irq_lock
    cdef uint32_t last_capability
    cdef uint32_t capability_end

    cdef uint32_t read_config(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef void write_config(self, uint32_t offset, uint32_t size, uint32_t value) noexcept nogil
    # Whether the guest lets this function reach memory and send messages. Any thread.
    cdef bint bus_master(self) noexcept nogil
    # Raises or lowers the interrupt pin; the guest's Interrupt Disable bit and MSI-X come first. Any thread.
    cdef void set_intx(self, bint level) noexcept nogil
    cdef void _decode(self) noexcept nogil
    cdef void _drive(self) noexcept nogil
    cdef uint32_t _dword(self, uint32_t offset) noexcept nogil
    cdef int _define(self, uint32_t offset, bytes value, bytes writable) except -1
