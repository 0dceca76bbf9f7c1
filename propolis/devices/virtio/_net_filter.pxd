"""Which frames a network card hands to its driver (virtio 1.2 §5.1.6.5)."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    MAC = 6
    MAX_TABLE = 64               # addresses of a kind; with more, all of that kind are taken

cdef class ReceiveFilter:
    cdef uint8_t mac[MAC]
    cdef bint promiscuous, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast
    cdef bint has_vlans          # negotiated: tagged frames are looked at
    cdef bint many_unicast, many_multicast   # more than the tables hold
    cdef uint32_t unicast_count
    cdef uint32_t multicast_count
    cdef uint8_t unicast[MAX_TABLE * MAC]
    cdef uint8_t multicast[MAX_TABLE * MAC]
    cdef uint64_t vlans[64]      # a bit for each

    # `frame` has at least 18 bytes to read.
    cdef bint accepts(self, const uint8_t *frame) noexcept nogil
    cdef bint is_own(self, const uint8_t *address) noexcept nogil
    cdef uint32_t _set_table(self, uint8_t *table, bytes addresses) noexcept
