"""The registers of an NVMe controller (NVMe 1.4 §3.1) and its PCI function."""

from libc.stdint cimport uint32_t, uint64_t

from propolis._bus cimport Region, Window
from propolis._lock cimport Lock
from propolis._vmm cimport Vm
from propolis.devices.nvme._doorbells cimport Doorbells
from propolis.devices.pci._function cimport PciFunction

cdef class Registers(Region):
    cdef Vm vm
    cdef uint32_t slot                   # of the mailbox
    cdef Doorbells doorbells
    cdef Lock lock
    cdef uint64_t cap                    # never changes
    cdef uint32_t cc                     # under: lock
    cdef uint32_t csts                   # under: lock
    cdef uint32_t aqa                    # under: lock
    cdef uint64_t asq                    # under: lock
    cdef uint64_t acq                    # under: lock
    cdef uint64_t ignored                # writes that mean nothing; relaxed

    cdef uint32_t _configure(self, uint32_t value) noexcept nogil

cdef class NvmeFunction(PciFunction):
    cdef readonly Registers registers
    cdef readonly Doorbells doorbells
    cdef Window window
    cdef Window msix_window
