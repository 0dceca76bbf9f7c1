"""virtio-block requests: parsed and checked here, performed by a block engine, answered exactly once.

`service` touches one queue and the records it owns, so it may run on the loop or on a thread of its own.
"""

cimport cython
from libc.errno cimport EOPNOTSUPP
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from propolis._atomic cimport st8_rlx
from propolis.backends.block._engine cimport IO_DISCARD, IO_FLUSH, IO_READ, IO_WRITE, IO_ZERO, MAX_EXTENTS
from propolis.devices._polling cimport LOOK_ON, LOOK_YIELD, Look
from propolis.devices.virtio._queue cimport RING_REQUEST, gather, scatter

cdef enum:
    # §5.2.6
    T_IN = 0
    T_OUT = 1
    T_FLUSH = 4
    T_GET_ID = 8
    T_DISCARD = 11
    T_WRITE_ZEROES = 13
    S_OK = 0
    S_IOERR = 1
    S_UNSUPP = 2
    FLAG_UNMAP = 1

    HEADER_BYTES = 16
    EXTENT_BYTES = 16
    SERIAL_BYTES = 20
    SECTOR_SHIFT = 9
    COST_SHIFT = 14          # of the budget: that many bytes take about as long as a request itself

cdef packed struct Header:
    uint32_t type
    uint32_t reserved
    uint64_t sector

cdef packed struct WireExtent:
    uint64_t sector
    uint32_t sectors
    uint32_t flags


@cython.no_gc_clear
cdef class BlkQueue:
    """The requests of one queue. `capacity` is in bytes; `max_sectors` bounds one discard or write-zeroes segment."""

    def __cinit__(
        self,
        Queue queue,
        Engine engine,
        Polling polling,
        *,
        capacity: int,
        block_size: int,
        read_only: bool,
        serial: bytes,
        max_sectors: int,
    ) -> None:
        cdef uint32_t i
        cdef uint32_t count = queue.max_size + 1  # so that pop, not a lack of records, sees a head too many
        self.queue = queue
        self.memory = queue.memory
        self.engine = engine
        self.polling = polling
        self.sectors = <uint64_t>capacity >> SECTOR_SHIFT
        self.sector_mask = (<uint64_t>block_size >> SECTOR_SHIFT) - 1
        self.read_only = read_only
        self.max_sectors = max_sectors
        for i in range(min(<uint32_t>len(serial), <uint32_t>SERIAL_BYTES)):
            self.serial[i] = <uint8_t>serial[i]
        # Pages of these that are never touched cost nothing.
        self.requests = <Request *>calloc(count, sizeof(Request))
        self.vectors = <iovec *>calloc(<size_t>count * count, sizeof(iovec))
        self.addresses = <uint64_t *>calloc(<size_t>count * count, sizeof(uint64_t))
        if self.requests == NULL or self.vectors == NULL or self.addresses == NULL:
            raise MemoryError
        for i in range(count):
            self.requests[i].chain.iov = self.vectors + <size_t>i * count
            self.requests[i].chain.gpa = self.addresses + <size_t>i * count
            self.requests[i].chain.capacity = count
            self.requests[i].next = self.free_list
            self.free_list = &self.requests[i]

    def __dealloc__(self) -> None:
        # An engine that still has records may write to them and to guest memory: leak rather than free.
        if self.engine is None or self.engine.pending == 0:
            free(self.requests)
            free(self.vectors)
            free(self.addresses)

    # -- the loop thread's side ----------------------------------------------------------------------------------------

    def negotiate(self, durable: bool, discard: bool, zero: bool) -> None:
        """What the driver accepted, before the first request."""
        self.durable = durable
        self.discard = discard
        self.zero = zero

    def run(self, budget: int) -> int:
        """Completes what is done and begins up to `budget` requests. Returns ServiceResult bits."""
        cdef uint32_t limit = budget
        cdef uint32_t result
        with nogil:
            result = self.service(limit)
        return result

    def complete(self) -> None:
        """Completes what is done, and begins nothing."""
        with nogil:
            self.collect()
            self.queue.signal()

    def resize(self, capacity: int) -> None:
        """The backend has another size now; requests in flight were checked against the old one."""
        self.sectors = <uint64_t>capacity >> SECTOR_SHIFT

    @property
    def last_error(self) -> int:
        """The errno of the last request that the backend failed, or 0."""
        return self.last_errno

    def stats(self) -> dict:
        return {
            "reads": self.reads, "writes": self.writes, "flushes": self.flushes, "discards": self.discards,
            "others": self.others, "bytes_read": self.bytes_read, "bytes_written": self.bytes_written,
            "errors": self.errors, "polled": self.polling.hits, "sleeps": self.polling.sleeps,
        }

    # -- service -------------------------------------------------------------------------------------------------------

    cdef uint32_t service(self, uint32_t budget) noexcept nogil:
        cdef uint32_t result = SERVICE_IDLE
        cdef Look look
        self.polling.begin()
        self.collect()
        self.queue.suppress()
        while True:
            budget = self._pass(budget)
            if self.queue.error:
                result = SERVICE_BROKEN
                break
            if budget == 0:
                result = SERVICE_AGAIN
                break
            self.queue.signal()
            look = LOOK_ON
            while look == LOOK_ON and not self.queue.offered() and not self.engine.waiting():
                look = self.polling.idle()
            if look == LOOK_ON:
                self.polling.found()
            elif look == LOOK_YIELD:
                result = SERVICE_AGAIN
                break
            elif self.queue.listen():
                self.queue.suppress()
            else:
                break  # what completes from now on rings
        self.queue.signal()
        return result

    cdef uint32_t _pass(self, uint32_t budget) noexcept nogil:
        """Completes what is done and begins what is offered; returns what is left of the budget."""
        cdef Request *request
        cdef uint64_t cost
        if self.engine.waiting():
            self.collect()
        while budget > 0:
            request = self.free_list
            if self.queue.pop(&request.chain) != 1:
                break
            self.free_list = request.next
            self._begin(request)
            cost = 1 + (request.io.length >> COST_SHIFT)
            budget -= <uint32_t>min(cost, <uint64_t>budget)
            self._completed(self.engine.take())
        self.engine.commit()
        return budget

    cdef void collect(self) noexcept nogil:
        self._completed(self.engine.reap())

    cdef void _completed(self, Io *io) noexcept nogil:
        cdef Request *request
        while io != NULL:
            request = <Request *>io
            io = io.next
            self._complete(request)

    cdef void _begin(self, Request *request) noexcept nogil:
        """Checks one request; answers it, or gives it to the engine."""
        cdef Chain *chain = &request.chain
        cdef Io *io = &request.io
        cdef uint32_t last = chain.readable + chain.writable - 1
        cdef Header header
        cdef uint64_t room
        cdef int status
        io.length = 0
        if chain.writable == 0:
            # §5.2.6: the status byte is not optional, and without it the driver would wait for ever.
            self._answer(request, S_IOERR, 0)
            self.queue.fail(RING_REQUEST)
            return
        request.status = <uint8_t *>chain.iov[last].iov_base + chain.iov[last].iov_len - 1
        request.status_gpa = chain.gpa[last] + chain.iov[last].iov_len - 1
        room = chain.writable_bytes - 1
        memset(&header, 0, sizeof(header))
        if not gather(chain, 0, &header, HEADER_BYTES):
            self._answer(request, S_IOERR, 0)
            return
        io.durable = False
        io.extent_count = 0
        io.iov_count = 0
        if header.type == T_IN or header.type == T_OUT:
            if self._data(request, header.sector, header.type == T_OUT):
                self.engine.submit(io)
            else:
                self._answer(request, S_IOERR, 0)
        elif header.type == T_FLUSH:
            self.flushes += 1
            io.op = IO_FLUSH
            self.engine.submit(io)
        elif header.type == T_GET_ID:
            self.others += 1
            room = scatter(self.memory, chain, 0, self.serial, room if room < SERIAL_BYTES else SERIAL_BYTES)
            self._answer(request, S_OK, room)
        elif header.type == T_DISCARD or header.type == T_WRITE_ZEROES:
            status = self._extents(request, header.type == T_WRITE_ZEROES)
            if status == S_OK:
                self.engine.submit(io)
            else:
                self._answer(request, <uint8_t>status, 0)
        else:
            self.others += 1
            self._answer(request, S_UNSUPP, 0)

    cdef bint _data(self, Request *request, uint64_t sector, bint is_write) noexcept nogil:
        """Fills in a read or write; False when it is not whole sectors of the disk or may not be written."""
        cdef Chain *chain = &request.chain
        cdef Io *io = &request.io
        cdef uint64_t skip = HEADER_BYTES
        cdef uint32_t first = 0
        cdef uint32_t last
        if is_write:
            if self.read_only:
                return False
            io.length = chain.readable_bytes - HEADER_BYTES
        else:
            io.length = chain.writable_bytes - 1
        if io.length == 0 or io.length & ((1 << SECTOR_SHIFT) - 1):
            return False
        if (sector | io.length >> SECTOR_SHIFT) & self.sector_mask:
            return False
        if sector > self.sectors or io.length >> SECTOR_SHIFT > self.sectors - sector:
            return False
        io.offset = sector << SECTOR_SHIFT
        if is_write:
            io.op = IO_WRITE
            io.durable = self.durable
            while skip >= chain.iov[first].iov_len:
                skip -= chain.iov[first].iov_len
                first += 1
            chain.iov[first].iov_base = <uint8_t *>chain.iov[first].iov_base + skip
            chain.iov[first].iov_len -= skip
            io.iov = chain.iov + first
            io.iov_count = chain.readable - first
            self.writes += 1
        else:
            io.op = IO_READ
            io.iov = chain.iov + chain.readable
            last = chain.writable - 1
            io.iov[last].iov_len -= 1  # the status byte
            io.iov_count = chain.writable if io.iov[last].iov_len else last
            self.reads += 1
        return True

    cdef int _extents(self, Request *request, bint is_zero) noexcept nogil:
        """Fills in a discard or write-zeroes; S_OK, or the status that answers it (§5.2.6.1, §5.2.6.2)."""
        cdef Chain *chain = &request.chain
        cdef Io *io = &request.io
        cdef uint64_t length = chain.readable_bytes - HEADER_BYTES
        cdef WireExtent wire
        cdef uint32_t i
        self.discards += 1
        if not (self.zero if is_zero else self.discard):
            return S_IOERR if self.read_only else S_UNSUPP
        if length == 0 or length % EXTENT_BYTES or length // EXTENT_BYTES > MAX_EXTENTS:
            return S_IOERR
        io.op = IO_ZERO if is_zero else IO_DISCARD
        io.durable = self.durable
        io.extent_count = <uint32_t>(length // EXTENT_BYTES)
        memset(&wire, 0, sizeof(wire))
        for i in range(io.extent_count):
            if not gather(chain, HEADER_BYTES + EXTENT_BYTES * <uint64_t>i, &wire, EXTENT_BYTES):
                return S_IOERR
            if wire.flags & ~<uint32_t>(FLAG_UNMAP if is_zero else 0):
                return S_UNSUPP
            if wire.sectors == 0 or wire.sectors > self.max_sectors:
                return S_IOERR
            if (wire.sector | wire.sectors) & self.sector_mask:
                return S_IOERR
            if wire.sector > self.sectors or wire.sectors > self.sectors - wire.sector:
                return S_IOERR
            io.extents[i].offset = wire.sector << SECTOR_SHIFT
            io.extents[i].length = <uint64_t>wire.sectors << SECTOR_SHIFT
            io.extents[i].unmap = wire.flags & FLAG_UNMAP
        return S_OK

    cdef void _complete(self, Request *request) noexcept nogil:
        """The engine gave the request back."""
        cdef Io *io = &request.io
        cdef uint8_t status = S_OK
        cdef uint64_t written = 0
        cdef uint32_t i
        if io.op == IO_READ:
            # Also after an error: some of it may have been written.
            for i in range(io.iov_count):
                self.memory.mark_dirty(request.chain.gpa[request.chain.readable + i], io.iov[i].iov_len)
        if io.result != 0:
            self.last_errno = -io.result
            status = S_IOERR
            if io.result == -EOPNOTSUPP and (io.op == IO_DISCARD or io.op == IO_ZERO):
                status = S_UNSUPP
        elif io.op == IO_READ:
            written = io.length
            self.bytes_read += io.length
        elif io.op == IO_WRITE:
            self.bytes_written += io.length
        self._answer(request, status, written)

    cdef void _answer(self, Request *request, uint8_t status, uint64_t written) noexcept nogil:
        """`written` bytes at the start of the writable part, then the status byte at its end; frees the record."""
        if status != S_OK:
            self.errors += 1
        if request.chain.writable:
            st8_rlx(request.status, status)
            self.memory.mark_dirty(request.status_gpa, 1)
            if written == request.chain.writable_bytes - 1:
                written += 1  # the used length counts from the start without a gap (§2.7.8.2)
        self.queue.push(request.chain.head, <uint32_t>written)
        request.next = self.free_list
        self.free_list = request
