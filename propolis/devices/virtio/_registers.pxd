"""The structures of virtio-pci that the guest reads and writes on vCPU threads (virtio 1.2 §4.1.4.3 to §4.1.4.6).

Locks, in the order they are taken: that of the common configuration, that of the ISR status, those of the PCI function.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from propolis._bus cimport Region
from propolis._lock cimport Lock
from propolis._vmm cimport Vm
from propolis.devices.pci._function cimport PciFunction

cdef enum:
    # Eight pairs and a control queue. Doorbells share their window with three other parts: _bus.MAX_PARTS.
    MAX_QUEUES = 17
    CONFIG_SPACE = 256
    COMMON_LENGTH = 56

    ISR_QUEUE = 1            # §4.1.4.5
    ISR_CONFIG = 2

    STATUS_DRIVER_OK = 4     # §2.1

cdef enum TransportEvent:
    EVENT_ACTIVATE = 1       # DRIVER_OK was set
    EVENT_RESET = 2          # status 0 was written; the guest waits until the device has finished the reset
    EVENT_BROKEN = 4         # a queue was enabled with impossible registers
    EVENT_WAKE = 8           # bus mastering is allowed now: kicks may have been passed over
    EVENT_CONFIG = 16        # the guest wrote device configuration

cdef struct QueueRegisters:
    uint16_t size
    uint16_t vector          # under: lock; read relaxed
    uint16_t enabled
    uint64_t address[3]      # descriptor, driver and device area

cdef class IsrStatus(Region):
    cdef PciFunction function
    cdef Lock lock
    cdef uint32_t bits                   # under: lock

    # Any thread. Sets bits and raises the interrupt pin.
    cdef void put(self, uint32_t bits) noexcept nogil
    cdef uint32_t take(self) noexcept nogil

cdef class CommonConfig(Region):
    cdef Vm vm
    cdef uint32_t slot                   # in the mailbox
    cdef list queues
    cdef void *queue_at[MAX_QUEUES]      # borrowed Queue; `queues` keeps it alive
    cdef uint32_t queue_count
    cdef IsrStatus isr
    cdef uint64_t offered
    cdef Lock lock
    # under: lock, all that follow
    cdef uint32_t status                 # read relaxed by others
    cdef bint live                       # DRIVER_OK was announced to the loop, which owns the queues from then on
    cdef bint resetting                  # the guest waits for the loop
    cdef uint32_t device_select
    cdef uint32_t driver_select
    cdef uint64_t accepted
    cdef uint16_t config_vector          # read relaxed
    cdef uint16_t queue_select
    cdef QueueRegisters registers[MAX_QUEUES]
    cdef bint config_changed             # since the driver last read any of the device configuration
    cdef uint8_t generation
    cdef uint64_t ignored                # accesses that were not allowed
    cdef uint32_t bad_queue              # RingError of the last refused queue_enable; read relaxed

    # Sets DEVICE_NEEDS_RESET. True: the driver is to be told.
    cdef bint need_reset(self) noexcept nogil
    cdef bint _write_queue(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil
    cdef void _enable_queue(self) noexcept nogil
    cdef void _write_status(self, uint32_t value) noexcept nogil
    cdef void _clear(self) noexcept nogil
    cdef uint16_t _checked_vector(self, uint64_t value) noexcept nogil

cdef class DeviceConfig(Region):
    cdef CommonConfig common             # whose lock guards what follows
    cdef uint8_t data[CONFIG_SPACE]
    cdef uint8_t mask[CONFIG_SPACE]      # bits that the guest may write
    cdef uint32_t length
