"""The doorbells of a controller (NVMe 1.4 §3.1.17, §3.1.18), and their shadows in guest memory (§7.13)."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from propolis._bus cimport Bus, Region
from propolis._lock cimport Lock
from propolis._memory cimport GuestMemory
from propolis._vmm cimport Vm
from propolis.devices.pci._function cimport PciFunction

cdef enum:
    MAX_QUEUES = 17          # of each direction, the admin queue included

cdef enum Event:             # bits of the controller's mailbox slot
    EVENT_ENABLE = 1         # CC.EN was set
    EVENT_DISABLE = 2        # CC.EN was cleared
    EVENT_SHUTDOWN = 4       # CC.SHN asks for it
    EVENT_ROOM = 8           # the host took entries from a completion queue that was full
    EVENT_WAKE = 16          # the function may reach memory again
    EVENT_BAD_DOORBELL = 32  # of a queue that does not exist
    EVENT_BAD_VALUE = 64     # not an index of the queue

cdef struct CompletionView:  # what the interrupt pin depends on, of one completion queue
    uint32_t tail            # written by: the queue's thread
    uint32_t vector          # written by: loop, before the queue is opened
    bint interrupts

cdef class Doorbells(Region):
    cdef Vm vm
    cdef GuestMemory memory
    cdef PciFunction function            # set once, before the guest runs
    cdef uint32_t slot                   # of the mailbox
    cdef uint32_t tails[MAX_QUEUES]          # of submission queues; written by: vCPU
    cdef uint32_t heads[MAX_QUEUES]          # of completion queues; written by: vCPU
    cdef uint32_t sq_sizes[MAX_QUEUES]       # entries, 0: there is no such queue; written by: loop
    cdef uint32_t cq_sizes[MAX_QUEUES]
    cdef uint32_t blocked[MAX_QUEUES]        # somebody waits for room; any thread
    cdef CompletionView completions[MAX_QUEUES]
    cdef int fds[MAX_QUEUES]                 # eventfds, readable after a submission doorbell
    cdef uint32_t mask                   # INTMS; written by: vCPU
    cdef uint64_t ignored                # accesses that mean nothing; relaxed
    cdef uint64_t rung                   # doorbells that came through the vCPU loop; relaxed
    cdef Lock pin_lock                   # taken before the function's
    cdef uint8_t *shadow                 # a page in guest RAM, or NULL; written by: loop, under: pin_lock
    cdef uint8_t *events                 # with it, for event indexes
    cdef uint64_t shadow_gpa
    cdef uint64_t events_gpa
    cdef Lock place_lock                 # taken after the function's and the bus's
    cdef bint is_placed                  # under: place_lock, as all below
    cdef uint64_t base
    cdef bint lent[MAX_QUEUES]               # the kernel rings the eventfd itself

    # On the queue's thread: what the guest last said. It may be no index of the queue.
    cdef uint32_t tail(self, uint32_t queue) noexcept nogil
    cdef uint32_t head(self, uint32_t queue) noexcept nogil
    # Asks for a doorbell when the guest submits beyond `head`; with a full fence, so that the caller looks again.
    cdef void listen(self, uint32_t queue, uint32_t head) noexcept nogil
    # Asks for EVENT_ROOM when the guest moves the head; with a full fence.
    cdef void block(self, uint32_t queue) noexcept nogil
    cdef void open_submission(self, uint32_t queue, uint32_t size) noexcept nogil
    cdef void open_completion(self, uint32_t queue, uint32_t size, uint32_t vector, bint interrupts) noexcept nogil
    cdef void close_submission(self, uint32_t queue) noexcept nogil
    cdef void close_completion(self, uint32_t queue) noexcept nogil
    # The pin follows the completion queues, unless messages are used. Any thread.
    cdef void update_pin(self) noexcept nogil
    cdef void set_mask(self, uint32_t set, uint32_t clear) noexcept nogil
    cdef void _follow(self, uint32_t queue, bint is_head) noexcept nogil
    cdef void _copy(self, uint32_t queue, bint is_head) noexcept nogil
    cdef void _store(self, uint8_t *page, uint64_t gpa, uint32_t index, uint32_t value) noexcept nogil
    cdef void _settle(self, uint32_t queue) noexcept nogil
