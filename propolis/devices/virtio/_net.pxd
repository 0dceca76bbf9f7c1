"""The packet loop of one pair of queues (virtio 1.2 §5.1.6)."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec

from propolis._memory cimport GuestMemory
from propolis.backends.net._link cimport Link
from propolis.devices.virtio._net_filter cimport ReceiveFilter
from propolis.devices.virtio._queue cimport Chain, Queue

cdef enum NetResult:
    NET_IDLE = 0             # receive: the link has nothing more; transmit: the guest has nothing more
    NET_AGAIN = 1            # the budget is spent: call again
    NET_BROKEN = 2           # a ring error: nothing more is moved before a reset
    NET_STARVED = 3          # receive: the guest has no buffer; call again after a kick
    NET_BEHIND = 4           # transmit: call again once the link is writable
    NET_GONE = 5             # the link's other side is gone

cdef enum:
    MAX_PARTS = 256          # chains that one frame is spread over

cdef packed struct NetHeader:    # §5.1.6
    uint8_t flags
    uint8_t gso_type
    uint16_t hdr_len
    uint16_t gso_size
    uint16_t csum_start
    uint16_t csum_offset
    uint16_t num_buffers

cdef struct Offloads:
    bint checksum            # the frame may lack its checksum
    bint tcp4                # it may be larger than the MTU, with TCP over IPv4
    bint tcp6
    bint ecn                 # and with CWR in the first segment alone

cdef class NetPair:
    cdef Queue rx
    cdef Queue tx
    cdef GuestMemory memory
    cdef ReceiveFilter filter
    cdef Link link                       # written by: loop; None while there is none
    cdef Chain chain                     # of the frame in hand
    cdef Chain more                      # of the rest of a frame, when it is spread
    cdef iovec *vectors                  # for both chains, and for the link
    cdef iovec *parts                    # what the link is given: after one vector that is the link's
    cdef uint64_t *addresses
    cdef uint8_t *frame                  # the header and the start of the frame in hand, and what had no room elsewhere
    cdef uint16_t heads[MAX_PARTS]
    cdef uint32_t lengths[MAX_PARTS]
    # Negotiated; written by: loop, before the first frame.
    cdef bint mergeable
    cdef Offloads guest                  # what the driver takes
    cdef Offloads host                   # what the driver gives
    cdef bint only_own                   # frames from other source addresses are dropped; written by: loop
    cdef uint64_t rx_packets, rx_bytes, rx_dropped, rx_filtered, rx_errors
    cdef uint64_t tx_packets, tx_bytes, tx_dropped, tx_errors
    cdef int last_errno                  # why the link is gone

    cdef uint32_t receive(self, uint32_t budget) noexcept nogil
    cdef int64_t _take(self) noexcept nogil
    cdef uint32_t _direct(self, iovec *at) noexcept nogil
    cdef bint _deliver(self, uint64_t length, bint direct) noexcept nogil
    cdef bint _spread(self, uint64_t length, const uint8_t *rest, uint64_t begin) noexcept nogil
    cdef void _checksum(self, NetHeader *header, uint64_t length) noexcept nogil
    cdef uint32_t transmit(self, uint32_t budget) noexcept nogil
    cdef int64_t _give(self) noexcept nogil
    cdef bint _sound(self, const NetHeader *header, const Offloads *allowed, uint64_t length) noexcept nogil
