"""virtio-pci, modern interface (virtio 1.2 §4.1): the registers that the guest reads and writes on vCPU threads.

Locks, in the order they are taken: register_lock, isr_lock, then those of the PCI function.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from propolis._lock cimport Lock
from propolis._bus cimport Region, Window
from propolis.devices.pci._function cimport PciFunction
from propolis.devices.virtio._queue cimport Notifier

cdef enum:
    MAX_QUEUES = 16          # doorbells share their window with three other parts: _bus.MAX_PARTS
    CONFIG_SPACE = 256

cdef enum TransportEvent:
    EVENT_ACTIVATE = 1       # DRIVER_OK was set
    EVENT_RESET = 2          # status 0 was written; the guest waits until finish_reset
    EVENT_BROKEN = 4         # a queue was enabled with impossible registers
    EVENT_WAKE = 8           # bus mastering is allowed now: kicks may have been passed over
    EVENT_CONFIG = 16        # the guest wrote device configuration

cdef struct QueueRegisters:
    uint16_t size
    uint16_t vector          # under: register_lock; read relaxed
    uint16_t enabled
    uint64_t address[3]      # descriptor, driver and device area

cdef class CommonConfig(Region):
    cdef VirtioPci owner

cdef class IsrStatus(Region):
    cdef VirtioPci owner

cdef class DeviceConfig(Region):
    cdef VirtioPci owner

cdef class PciNotifier(Notifier):
    cdef VirtioPci owner

cdef class VirtioPci(PciFunction):
    cdef readonly list queues
    cdef readonly list doorbells
    cdef void *queue_at[MAX_QUEUES]      # borrowed Queue; `queues` keeps it alive
    cdef uint32_t queue_count
    cdef Window window
    cdef Window msix_window
    cdef uint32_t access_capability      # offset of the PCI configuration access capability
    cdef uint32_t slot_in_mailbox
    cdef Lock register_lock
    # under: register_lock, all that follow
    cdef uint32_t status                 # read relaxed by others
    cdef bint live                       # DRIVER_OK was announced to the loop, which owns the queues from then on
    cdef bint resetting                  # the guest waits for the loop
    cdef uint32_t device_select
    cdef uint32_t driver_select
    cdef uint64_t offered
    cdef uint64_t accepted
    cdef uint16_t config_vector          # read relaxed
    cdef uint16_t queue_select
    cdef QueueRegisters registers[MAX_QUEUES]
    cdef uint8_t device_config[CONFIG_SPACE]
    cdef uint8_t config_mask[CONFIG_SPACE]
    cdef uint32_t config_length
    cdef uint8_t generation
    cdef bint config_changed             # since the driver last read any of it
    cdef uint64_t ignored                # accesses that were not allowed
    cdef uint32_t bad_queue              # RingError of the last refused queue_enable; read relaxed
    cdef Lock isr_lock
    cdef uint32_t isr                    # under: isr_lock

    cdef uint64_t common_read(self, uint64_t offset, uint32_t size) noexcept nogil
    cdef void common_write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil
    cdef uint64_t isr_read(self) noexcept nogil
    cdef uint64_t device_read(self, uint64_t offset, uint32_t size) noexcept nogil
    cdef void device_write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil
    # Any thread. `vector` may be NO_VECTOR.
    cdef void interrupt(self, uint32_t isr_bit, uint16_t vector) noexcept nogil
    cdef bint _write_queue(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil
    cdef void _enable_queue(self) noexcept nogil
    cdef void _write_status(self, uint32_t value) noexcept nogil
    cdef void _clear(self) noexcept nogil
    cdef uint16_t _checked_vector(self, uint64_t value) noexcept nogil
    cdef bint _touches_data(self, uint32_t offset, uint32_t size) noexcept nogil
    cdef bint _access(self, bint is_write) noexcept nogil
