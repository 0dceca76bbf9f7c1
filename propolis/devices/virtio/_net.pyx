"""The packet loop of one pair of queues: frames between a guest's buffers and a link to the host.

Frames are read into and written from guest pages. What of a frame decides anything, its virtio header and its Ethernet
header, is in a copy of ours: it is checked there, and that copy is what goes on.

Between two calls no chain is held: one that was looked at before there was a frame for it goes back.
"""

cimport cython
from libc.errno cimport EAGAIN, EINVAL, EIO, EMSGSIZE, ENOBUFS, ENOMEM
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset

from propolis.backends.net._link cimport MAX_MESSAGE, NET_HEADER
from propolis.devices.virtio._queue cimport RING_REQUEST, gather, scatter

cdef enum:
    # §5.1.6
    NEEDS_CSUM = 1
    DATA_VALID = 2
    GSO_NONE = 0
    GSO_TCPV4 = 1
    GSO_TCPV6 = 4
    GSO_ECN = 0x80

    ETHERNET = 14
    # As much of a frame as the receive filter looks at, with a VLAN tag.
    LOOKED_AT = NET_HEADER + ETHERNET + 4
    SENT_COPY = NET_HEADER + ETHERNET
    SPREAD_ROOM = 64         # the least that a chain has room for, when a frame is spread over several


@cython.no_gc_clear
cdef class NetPair:
    """Queues `rx` and `tx` and the link behind them; without a link what the guest sends is dropped."""

    def __cinit__(self, Queue rx, Queue tx, ReceiveFilter rules) -> None:
        cdef uint32_t count = max(rx.max_size, tx.max_size) + 1
        self.rx = rx
        self.tx = tx
        self.memory = rx.memory
        self.filter = rules
        self.vectors = <iovec *>calloc(2 * count, sizeof(iovec))
        self.parts = <iovec *>calloc(count + 4, sizeof(iovec))
        self.addresses = <uint64_t *>calloc(2 * count, sizeof(uint64_t))
        self.frame = <uint8_t *>malloc(MAX_MESSAGE)
        if self.vectors == NULL or self.parts == NULL or self.addresses == NULL or self.frame == NULL:
            raise MemoryError
        self.chain.iov = self.vectors
        self.chain.gpa = self.addresses
        self.more.iov = self.vectors + count
        self.more.gpa = self.addresses + count
        self.chain.capacity = self.more.capacity = count

    def __dealloc__(self) -> None:
        free(self.vectors)
        free(self.parts)
        free(self.addresses)
        free(self.frame)

    # -- the loop thread's side ----------------------------------------------------------------------------------------

    def attach(self, Link link) -> None:
        """The link from now on; the caller keeps it open."""
        self.link = link

    def negotiate(self, mergeable: bool, guest: tuple, host: tuple) -> None:
        """Before the first frame. Of both directions: whether checksum, TCP over IPv4, over IPv6, ECN are offloaded."""
        self.mergeable = mergeable
        self.guest.checksum, self.guest.tcp4, self.guest.tcp6, self.guest.ecn = guest
        self.host.checksum, self.host.tcp4, self.host.tcp6, self.host.ecn = host

    def check_source(self, on: bool) -> None:
        """Whether the guest may send from its own address alone."""
        self.only_own = on

    def run_receive(self, budget: int) -> int:
        """Moves up to `budget` frames to the guest. Returns a NetResult."""
        cdef uint32_t limit = budget
        cdef uint32_t result
        with nogil:
            result = self.receive(limit)
        return result

    def run_transmit(self, budget: int) -> int:
        """Moves up to `budget` frames from the guest. Returns a NetResult."""
        cdef uint32_t limit = budget
        cdef uint32_t result
        with nogil:
            result = self.transmit(limit)
        return result

    @property
    def link_error(self) -> int:
        """The errno with which the link went."""
        return self.last_errno

    def stats(self) -> dict:
        return {
            "rx_packets": self.rx_packets, "rx_bytes": self.rx_bytes, "rx_dropped": self.rx_dropped,
            "rx_filtered": self.rx_filtered, "rx_errors": self.rx_errors,
            "tx_packets": self.tx_packets, "tx_bytes": self.tx_bytes, "tx_dropped": self.tx_dropped,
            "tx_errors": self.tx_errors,
        }

    # -- to the guest --------------------------------------------------------------------------------------------------

    cdef uint32_t receive(self, uint32_t budget) noexcept nogil:
        cdef uint32_t result = NET_AGAIN
        cdef bint have = False
        cdef int64_t took
        cdef int got
        if self.link is None:
            return NET_GONE
        self.rx.suppress()
        while budget > 0:
            if not have:
                got = self.rx.pop(&self.chain)
                if got < 0:
                    result = NET_BROKEN
                    break
                if got == 0:
                    if self.rx.listen():
                        continue
                    result = NET_STARVED
                    break
                if self.chain.readable or self.chain.writable_bytes < LOOKED_AT:
                    self.rx.push(self.chain.head, 0)
                    self.rx.fail(RING_REQUEST)
                    result = NET_BROKEN
                    break
                have = True
            budget -= 1
            took = self._take()
            if took < 0:
                result = NET_IDLE if took == -EAGAIN else NET_GONE
                self.last_errno = <int>-took
                break
            have = took == 0
            if self.rx.error:
                result = NET_BROKEN
                break
        if have:
            self.rx.unpop(self.chain.head)
        self.rx.signal()
        return result

    cdef int64_t _take(self) noexcept nogil:
        """One frame from the link. 1: it used the chain; 0: it was dropped, and the chain is still there; -errno."""
        cdef NetHeader *header = <NetHeader *>self.frame
        cdef iovec *parts = self.parts + 1
        cdef uint32_t skip = 0 if self.link.has_header else NET_HEADER
        # A frame that has to be changed comes into our own buffer alone.
        cdef bint direct = self.guest.checksum or not self.link.has_header
        cdef uint32_t count = 1
        cdef int64_t got
        memset(header, 0, NET_HEADER)
        parts[0].iov_base = self.frame + skip
        parts[0].iov_len = (LOOKED_AT if direct else MAX_MESSAGE) - skip
        if direct:
            count += self._direct(parts + 1)
        got = self.link.receive(parts, count)
        if got < 0:
            return got
        got += skip
        if got < NET_HEADER + ETHERNET or not self._sound(header, NULL, <uint64_t>got - NET_HEADER):
            self.rx_errors += 1
            return 0
        if got < LOOKED_AT:
            memset(self.frame + got, 0, <size_t>(LOOKED_AT - got))
        if not self.filter.accepts(self.frame + NET_HEADER):
            self.rx_filtered += 1
            return 0
        header.flags &= NEEDS_CSUM | DATA_VALID
        if not self._sound(header, &self.guest, <uint64_t>got - NET_HEADER):
            if header.gso_type != GSO_NONE or direct:
                self.rx_dropped += 1
                return 0
            self._checksum(header, <uint64_t>got)
        if not self.guest.checksum:
            memset(header, 0, NET_HEADER)
        if not self._deliver(<uint64_t>got, direct):
            self.rx_dropped += 1
            return 0
        self.rx_packets += 1
        self.rx_bytes += <uint64_t>got - NET_HEADER
        return 1

    cdef uint32_t _direct(self, iovec *at) noexcept nogil:
        """Vectors for what follows the part that is looked at: the chain's room, then ours. Returns how many."""
        cdef uint64_t skip = LOOKED_AT
        cdef uint32_t i
        cdef uint32_t count = 0
        for i in range(self.chain.writable):
            if skip >= self.chain.iov[i].iov_len:
                skip -= self.chain.iov[i].iov_len
                continue
            at[count].iov_base = <uint8_t *>self.chain.iov[i].iov_base + skip
            at[count].iov_len = self.chain.iov[i].iov_len - skip
            skip = 0
            count += 1
        at[count].iov_base = self.frame + LOOKED_AT
        at[count].iov_len = MAX_MESSAGE - LOOKED_AT
        return count + 1

    cdef bint _deliver(self, uint64_t length, bint direct) noexcept nogil:
        """Gives the guest a frame of `length` bytes with its header. False: it has no room for it."""
        cdef NetHeader *header = <NetHeader *>self.frame
        cdef uint64_t room = self.chain.writable_bytes
        cdef uint64_t offset = 0
        cdef uint64_t part
        cdef uint32_t i
        header.num_buffers = 1
        if length > room and not self.mergeable:
            return False
        if direct:
            # What the link wrote into guest pages itself, also where the frame is dropped after all.
            for i in range(self.chain.writable):
                part = self.chain.iov[i].iov_len
                if offset < length and offset + part > LOOKED_AT:
                    self.memory.mark_dirty(self.chain.gpa[i], part)
                offset += part
        if length > room:
            # What lies behind the chain's room is behind the part looked at where the link wrote to guest pages, else
            # in its place.
            return self._spread(length, self.frame + (LOOKED_AT if direct else room), LOOKED_AT if direct else room)
        scatter(self.memory, &self.chain, 0, self.frame, min(length, <uint64_t>LOOKED_AT) if direct else length)
        self.rx.push(self.chain.head, <uint32_t>length)
        return True

    cdef bint _spread(self, uint64_t length, const uint8_t *rest, uint64_t begin) noexcept nogil:
        """§5.1.6.4: the driver sees all chains of a frame at once. `begin` bytes are not in the first one yet."""
        cdef NetHeader *header = <NetHeader *>self.frame
        cdef uint64_t left = length - self.chain.writable_bytes
        cdef uint32_t count = 1
        cdef uint32_t i
        self.heads[0] = self.chain.head
        self.lengths[0] = <uint32_t>self.chain.writable_bytes
        while left > 0 and count < MAX_PARTS:
            if self.rx.pop(&self.more) != 1:
                break
            if self.more.readable or self.more.writable_bytes < SPREAD_ROOM:
                self.rx.push(self.more.head, 0)
                self.rx.fail(RING_REQUEST)
                break
            self.heads[count] = self.more.head
            self.lengths[count] = <uint32_t>min(left, self.more.writable_bytes)
            scatter(self.memory, &self.more, 0, rest, self.lengths[count])
            rest += self.lengths[count]
            left -= self.lengths[count]
            count += 1
        if left > 0:
            for i in range(count - 1, 0, -1):
                self.rx.unpop(self.heads[i])
            return False
        header.num_buffers = <uint16_t>count
        scatter(self.memory, &self.chain, 0, self.frame, begin)
        for i in range(count):
            self.rx.put(self.heads[i], self.lengths[i])
        self.rx.publish()
        return True

    cdef void _checksum(self, NetHeader *header, uint64_t length) noexcept nogil:
        """Completes the checksum that the frame, which is wholly ours, still lacks (§5.1.6.2)."""
        cdef uint8_t *at = self.frame + NET_HEADER + header.csum_start
        cdef uint64_t left = length - NET_HEADER - header.csum_start
        cdef uint64_t total = 0
        while left > 1:
            total += <uint32_t>at[0] << 8 | at[1]
            at += 2
            left -= 2
        if left:
            total += <uint32_t>at[0] << 8
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        total = ~total & 0xFFFF
        at = self.frame + NET_HEADER + header.csum_start + header.csum_offset
        at[0] = <uint8_t>(total >> 8)
        at[1] = <uint8_t>total

    # -- from the guest ------------------------------------------------------------------------------------------------

    cdef uint32_t transmit(self, uint32_t budget) noexcept nogil:
        cdef uint32_t result = NET_IDLE
        cdef int64_t error
        if self.link is not None and self.link.is_behind():
            return NET_BEHIND
        while True:
            self.tx.suppress()
            while budget > 0 and self.tx.pop(&self.chain) == 1:
                budget -= 1
                if self.chain.writable or self.chain.readable_bytes < NET_HEADER:
                    self.tx.push(self.chain.head, 0)
                    self.tx.fail(RING_REQUEST)
                    break
                error = self._give()
                if error == -EAGAIN:
                    self.tx.unpop(self.chain.head)
                    result = NET_BEHIND
                    break
                self.tx.push(self.chain.head, 0)
                if error < 0:
                    self.last_errno = <int>-error
                    result = NET_GONE
                    break
            if self.tx.error:
                result = NET_BROKEN
            if result != NET_IDLE:
                break
            if budget == 0:
                result = NET_AGAIN
                break
            if not self.tx.listen():
                break
        if result == NET_IDLE and self.link is not None and self.link.is_behind():
            result = NET_BEHIND
        self.tx.signal()
        return result

    cdef int64_t _give(self) noexcept nogil:
        """One frame to the link, or dropped and counted: 0. -EAGAIN where the link is full, or why it is gone."""
        cdef NetHeader *header = <NetHeader *>self.frame
        cdef iovec *parts = self.parts + 1
        cdef uint64_t length = self.chain.readable_bytes
        cdef uint64_t skip
        cdef uint32_t count = 1
        cdef uint32_t i
        cdef int64_t error
        if length < SENT_COPY or length > MAX_MESSAGE or not gather(&self.chain, 0, self.frame, SENT_COPY):
            self.tx_errors += 1
            return 0
        header.flags &= NEEDS_CSUM  # what else there is means nothing in this direction (§5.1.6.2)
        header.num_buffers = 0
        if not self._sound(header, &self.host, length - NET_HEADER):
            self.tx_errors += 1
            return 0
        if self.link is None or (self.only_own and not self.filter.is_own(self.frame + NET_HEADER + 6)):
            self.tx_dropped += 1
            return 0
        skip = 0 if self.link.has_header else NET_HEADER
        parts[0].iov_base = self.frame + skip
        parts[0].iov_len = SENT_COPY - skip
        length -= skip
        skip = SENT_COPY
        for i in range(self.chain.readable):
            if skip >= self.chain.iov[i].iov_len:
                skip -= self.chain.iov[i].iov_len
                continue
            parts[count].iov_base = <uint8_t *>self.chain.iov[i].iov_base + skip
            parts[count].iov_len = self.chain.iov[i].iov_len - skip
            skip = 0
            count += 1
        error = self.link.send(parts, count, length)
        if error == 0:
            self.tx_packets += 1
            self.tx_bytes += self.chain.readable_bytes - NET_HEADER
        elif error in (-EINVAL, -EIO, -ENOBUFS, -ENOMEM, -EMSGSIZE):  # this frame alone, or the tap is down
            self.tx_errors += 1
            return 0
        return error

    cdef bint _sound(self, const NetHeader *header, const Offloads *allowed, uint64_t length) noexcept nogil:
        """Whether a header fits its frame of `length` bytes and, unless NULL, what was negotiated."""
        cdef uint8_t gso = header.gso_type & ~<uint8_t>GSO_ECN
        if header.flags & NEEDS_CSUM:
            if allowed != NULL and not allowed.checksum:
                return False
            if <uint32_t>header.csum_start + header.csum_offset + 2 > length:
                return False
        if header.gso_type == GSO_NONE:
            return True
        if gso not in (GSO_TCPV4, GSO_TCPV6) or header.gso_size == 0 or header.hdr_len > length:
            return False
        if not header.flags & NEEDS_CSUM:
            return False
        if allowed == NULL:
            return True
        if header.gso_type & GSO_ECN and not allowed.ecn:
            return False
        return allowed.tcp4 if gso == GSO_TCPV4 else allowed.tcp6
