"""A virtio device as a PCI function (virtio 1.2 §4.1)."""

from libc.stdint cimport uint16_t, uint32_t

from propolis._bus cimport Window
from propolis.devices.pci._function cimport PciFunction
from propolis.devices.virtio._queue cimport Notifier
from propolis.devices.virtio._registers cimport CommonConfig, DeviceConfig, IsrStatus

cdef class PciNotifier(Notifier):
    cdef VirtioPci owner

cdef class VirtioPci(PciFunction):
    cdef readonly list queues
    cdef readonly list doorbells
    cdef readonly CommonConfig common
    cdef IsrStatus isr
    cdef DeviceConfig device_config
    cdef Window window
    cdef Window msix_window
    cdef uint32_t access_capability      # offset of the PCI configuration access capability

    # Any thread. `vector` may be NO_VECTOR.
    cdef void interrupt(self, uint32_t isr_bit, uint16_t vector) noexcept nogil
    cdef bint _touches_data(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef bint _access(self, bint is_write) noexcept nogil
