"""The host's side of a network card: one frame at a time, in or out, by a descriptor that never blocks.

A link belongs to one pair of queues and is used by the thread that serves them.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from posix.uio cimport iovec

cdef enum:
    MAX_FRAME = 65535 + 18       # the largest IP packet behind an Ethernet header with a VLAN tag
    NET_HEADER = 12              # struct virtio_net_hdr_v1, virtio 1.2 §5.1.6
    MAX_MESSAGE = NET_HEADER + MAX_FRAME
    STREAM_BUFFER = 1 << 18

cdef class Link:
    cdef int fd                          # owned; -1 once closed
    cdef readonly bint has_header        # each frame comes and goes behind a virtio_net_hdr
    # The length of a frame, its header included, that was read into the vectors; -errno: -EAGAIN when there is none.
    # After any other error the link is of no use any more.
    cdef int64_t receive(self, iovec *iov, uint32_t count) noexcept nogil
    # Takes `length` bytes or none: 0, or -errno. -EAGAIN: again once the descriptor is writable. The vector before
    # `iov` is the link's to use.
    cdef int64_t send(self, iovec *iov, uint32_t count, uint64_t length) noexcept nogil
    # Whether something taken earlier waits for the descriptor to be writable; tries to write it first.
    cdef bint is_behind(self) noexcept nogil

cdef class PacketLink(Link):
    """A tap, or a socket that keeps messages apart."""

cdef class StreamLink(Link):
    """A stream socket; before each frame its length, four bytes with the highest first."""
    cdef uint8_t *input
    cdef uint32_t start          # of what is not yet taken from `input`
    cdef uint32_t end
    cdef uint8_t *rest           # of a frame that the socket took in part
    cdef uint32_t rest_start
    cdef uint32_t rest_end
    cdef uint8_t prefix[4]

    cdef int64_t _next(self) noexcept nogil
    cdef int _fill(self) noexcept nogil
    cdef void _keep(self, iovec *iov, uint32_t count, uint64_t skip) noexcept nogil
