"""The split virtqueue (virtio 1.2 §2.7) as the device sees it.

A queue is set up on a vCPU thread, under the transport's lock, and from its activation until its reset used by one
thread only. Everything the guest wrote is loaded once, checked, and used from the copy.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec

from propolis._memory cimport GuestMemory

cdef enum:
    MAX_QUEUE_SIZE = 1024
    HEAD_WORDS = 16          # a bit for each head
    MAX_CHAIN_BYTES = 0xFFFFFFFF  # §2.7.5.2: a longer chain is not allowed, and `written` has 32 bits

cdef enum RingError:
    RING_FINE = 0
    RING_SIZE = 1            # not a power of two, or larger than the device's
    RING_ADDRESS = 2         # a part of the ring is misaligned, not in RAM or overlaps another part
    RING_JUMP = 3            # more heads than the ring holds
    RING_HEAD = 4            # a head that is not in the table
    RING_TWICE = 5           # a head that the device already has
    RING_INDEX = 6           # `next` is not in the table
    RING_LOOP = 7            # more descriptors than the table holds
    RING_LONG = 8            # more buffers than the device takes
    RING_ORDER = 9           # a readable buffer after a writable one
    RING_EMPTY = 10          # a buffer of no bytes
    RING_BUFFER = 11         # a buffer that is not wholly in RAM of the needed access
    RING_BYTES = 12          # more than 4 GiB in one chain
    RING_INDIRECT = 13       # not negotiated, nested, with NEXT, of a bad length or not in RAM
    RING_REQUEST = 14        # a chain that the device has no way to answer
    RING_ERRORS = 15

cdef struct Chain:
    iovec *iov               # first the readable buffers, then the writable ones; in guest RAM, checked by pop
    uint64_t *gpa            # where the guest sees each
    uint32_t capacity        # of the two arrays; written by: their owner
    uint32_t readable
    uint32_t writable
    uint64_t readable_bytes
    uint64_t writable_bytes
    uint16_t head

cdef class Notifier:
    """Who tells the guest that buffers were used: the transport."""
    cdef void used(self, uint32_t queue) noexcept nogil

cdef class Queue:
    cdef GuestMemory memory
    cdef readonly Notifier notifier
    cdef readonly uint32_t index
    cdef readonly uint32_t max_size
    cdef uint32_t size
    # Checked by set_up and valid until tear_down: regions of guest memory are not unmapped while the machine exists.
    cdef uint8_t *desc
    cdef uint8_t *avail
    cdef uint8_t *used
    cdef uint64_t used_gpa
    cdef bint event_idx
    cdef bint indirect
    cdef bint suppressed                 # we asked for no notifications by the flag
    cdef uint16_t next_avail
    cdef uint16_t next_used
    cdef uint16_t signalled              # next_used when we last decided about an interrupt
    cdef uint32_t in_flight
    cdef int error                       # RingError; nothing is popped any more
    cdef uint64_t busy[HEAD_WORDS]           # heads that the device has
    cdef uint64_t popped
    cdef uint64_t interrupts

    # RING_FINE, RING_SIZE or RING_ADDRESS; addresses are those of the descriptor, driver and device areas.
    cdef int set_up(self, uint32_t size, uint64_t desc, uint64_t driver, uint64_t device) noexcept nogil
    cdef void negotiate(self, uint64_t features) noexcept nogil
    cdef void tear_down(self) noexcept nogil
    # 1 and a chain; 0 when there is none; -1 after a ring error. Each chain is pushed exactly once.
    cdef int pop(self, Chain *chain) noexcept nogil
    cdef void push(self, uint16_t head, uint32_t written) noexcept nogil
    # A device that looks for a buffer before it has anything to put into it takes its last pop back.
    cdef void unpop(self, uint16_t head) noexcept nogil
    # push in two steps, for chains that the driver has to see together: put each, then publish.
    cdef void put(self, uint16_t head, uint32_t written) noexcept nogil
    cdef void publish(self) noexcept nogil
    cdef void fail(self, int error) noexcept nogil
    # suppress -> pop until empty or the budget is spent -> listen -> look again where that is True.
    cdef void suppress(self) noexcept nogil
    cdef bint listen(self) noexcept nogil
    cdef bint offered(self) noexcept nogil  # whether pop would find anything; a hint for who does not listen yet
    # After a batch of pushes: one interrupt unless the guest does not want it now.
    cdef void signal(self) noexcept nogil
    cdef bint _wants_interrupt(self) noexcept nogil
    cdef int _walk(self, uint32_t head, Chain *chain) noexcept nogil
    cdef int _add(self, Chain *chain, uint64_t address, uint32_t length, bint writable) noexcept nogil

# Copies `length` bytes of the readable part from `offset` on; False when it is shorter.
cdef bint gather(const Chain *chain, uint64_t offset, void *destination, uint64_t length) noexcept nogil
# Copies into the writable part and marks it dirty; returns how much fitted.
cdef uint64_t scatter(GuestMemory memory, const Chain *chain, uint64_t offset, const void *source,
                      uint64_t length) noexcept nogil
