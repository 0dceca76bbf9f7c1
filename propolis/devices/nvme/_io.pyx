"""I/O commands: parsed and checked here, performed by a block engine, completed exactly once.

`service` touches one queue and the records it owns; one thread serves all that share a completion queue.
"""

cimport cython
from libc.errno cimport ENOSPC, EOPNOTSUPP
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from propolis._memory cimport ACCESS_READ, ACCESS_WRITE
from propolis.backends.block._engine cimport IO_DISCARD, IO_FLUSH, IO_READ, IO_WRITE, IO_ZERO, MAX_EXTENTS
from propolis.devices._polling cimport LOOK_ON, LOOK_YIELD, Look
from propolis.devices.nvme._data cimport MAX_BYTES, MAX_SEGMENTS, equal, gather, map_data
from propolis.devices.nvme._doorbells cimport Doorbells
from propolis.devices.nvme._status cimport (
    ABORTED,
    CAPACITY_EXCEEDED,
    COMPARE_FAILURE,
    DO_NOT_RETRY,
    ID_CONFLICT,
    INTERNAL_ERROR,
    INVALID_FIELD,
    INVALID_NAMESPACE,
    INVALID_OPCODE,
    LBA_RANGE,
    READ_ERROR,
    SUCCESS,
    WRITE_FAULT,
    WRITE_PROTECTED,
)

cdef enum:
    # §6
    OP_FLUSH = 0x00
    OP_WRITE = 0x01
    OP_READ = 0x02
    OP_COMPARE = 0x05
    OP_ZEROES = 0x08
    OP_DATASET = 0x09
    FUA = 1 << 30            # of command dword 12
    DIRECTIVE = 0xF << 20
    DEALLOCATE = 1 << 25
    ATTRIBUTE_DEALLOCATE = 4  # of dword 11

    NSID = 1
    EVERY_NSID = 0xFFFFFFFF
    COST_SHIFT = 14          # of the budget: that many bytes take about as long as a command itself
    WITH_ENGINE = -1         # not a status: the engine has it

cdef packed struct WireRange:  # §6.7
    uint32_t attributes
    uint32_t blocks
    uint64_t lba


cdef class Namespace:
    """`capacity` and `max_extent`, the most that is zeroed or discarded at once, are in bytes."""

    def __cinit__(self, *, capacity: int, block_size: int, read_only: bool, can_zero: bool, can_discard: bool,
                  max_extent: int) -> None:
        self.shift = block_size.bit_length() - 1
        self.blocks = capacity >> self.shift
        self.read_only = read_only
        self.can_zero = can_zero and not read_only
        self.can_discard = can_discard and not read_only
        self.max_extent = max_extent
        self.write_cache = True

    @property
    def block_count(self) -> int:
        return self.blocks

    def resize(self, capacity: int) -> None:
        """The backend has another size now; commands in flight were checked against the old one."""
        self.blocks = <uint64_t>capacity >> self.shift


@cython.no_gc_clear
cdef class IoQueue(SubmissionQueue):
    """The I/O queue of this number; an engine of its own does what it is asked."""

    def __cinit__(self, Doorbells doorbells, number: int, Engine engine, Polling polling, Namespace namespace) -> None:
        cdef uint32_t i
        self.engine = engine
        self.polling = polling
        self.namespace = namespace
        # Pages of these that are never touched cost nothing.
        self.requests = <Request *>calloc(DEPTH, sizeof(Request))
        self.vectors = <iovec *>calloc(<size_t>DEPTH * MAX_SEGMENTS, sizeof(iovec))
        self.addresses = <uint64_t *>calloc(<size_t>DEPTH * MAX_SEGMENTS, sizeof(uint64_t))
        self.ranges = <Range *>calloc(<size_t>DEPTH * MAX_RANGES, sizeof(Range))
        self.bounce = <uint8_t *>malloc(MAX_BYTES)
        if not (self.requests and self.vectors and self.addresses and self.ranges and self.bounce):
            raise MemoryError
        for i in range(<uint32_t>DEPTH):
            self.requests[i].data.iov = self.vectors + <size_t>i * MAX_SEGMENTS
            self.requests[i].data.gpa = self.addresses + <size_t>i * MAX_SEGMENTS
            self.requests[i].ranges = self.ranges + <size_t>i * MAX_RANGES
            self.requests[i].next = self.free_list
            self.free_list = &self.requests[i]

    def __dealloc__(self) -> None:
        # An engine that still has records may write to them and to guest memory: leak rather than free.
        if self.engine is None or self.engine.pending == 0:
            free(self.requests)
            free(self.vectors)
            free(self.addresses)
            free(self.ranges)
            free(self.bounce)

    # -- service -------------------------------------------------------------------------------------------------------

    cdef uint32_t service(self, uint32_t budget) noexcept nogil:
        cdef uint32_t result = SERVICE_IDLE
        cdef Look look
        self.polling.begin()
        self.collect()
        if self.base == NULL:
            return SERVICE_IDLE
        while not self.stopping:
            budget = self._pass(budget)
            if budget == 0:
                result = SERVICE_AGAIN
                break
            budget -= 1  # also where the guest takes back what we just saw
            self.cq.signal()
            look = LOOK_ON
            while look == LOOK_ON and (self.is_stuck or not self.offered()) and not self.engine.waiting():
                look = self.polling.idle()
            if look == LOOK_ON:
                self.polling.found()
            elif look == LOOK_YIELD:
                result = SERVICE_AGAIN
                break
            elif self.is_stuck or not self.listen():
                break  # what completes from now on rings
        self.cq.signal()
        return result

    cdef uint32_t _pass(self, uint32_t budget) noexcept nogil:
        """Completes what is done and begins what is offered; returns what is left of the budget."""
        cdef Command command
        cdef Request *request
        cdef uint64_t cost
        if self.engine.waiting():
            self.collect()
        self.is_stuck = False
        while budget > 0 and self.peek(&command):
            request = self.free_list
            # What was copied is copied again when its turn has come.
            self.is_stuck = request == NULL or self.held_first != NULL
            self.is_stuck = self.is_stuck or (command.opcode == OP_COMPARE and self.comparing)
            if self.is_stuck:
                break
            self.fetched += 1
            self.consume()
            self._begin(&command)
            cost = 1 + (request.io.length >> COST_SHIFT)
            budget -= <uint32_t>min(cost, <uint64_t>budget)
            self._completed(self.engine.take())
        self.engine.commit()
        return budget

    cdef void collect(self) noexcept nogil:
        cdef Request *request
        while self.held_first != NULL and self._post(self.held_first):
            request = self.held_first
            self.held_first = request.next
            self._free(request)
        self._completed(self.engine.reap())

    cdef void _completed(self, Io *io) noexcept nogil:
        cdef Request *request
        while io != NULL:
            request = <Request *>io
            io = io.next
            self.active -= 1
            self._complete(request)

    cdef void _begin(self, const Command *command) noexcept nogil:
        """Checks one command; completes it, or gives it to the engine."""
        cdef Request *request = self.free_list
        cdef uint64_t bit = <uint64_t>1 << (command.cid & 63)
        cdef int status
        self.free_list = request.next
        request.cid = command.cid
        request.opcode = command.opcode
        request.lba = 0
        request.range_count = request.range_index = 0
        request.range_done = 0
        request.data.count = 0
        request.io.durable = False
        request.io.extent_count = 0
        request.io.iov_count = 0
        request.io.length = 0
        request.is_duplicate = self.busy[command.cid >> 6] & bit != 0
        self.busy[command.cid >> 6] |= bit
        status = ID_CONFLICT | DO_NOT_RETRY if request.is_duplicate else self._prepare(request, command)
        if status == WITH_ENGINE:
            self._submit(request)
        else:
            self._finish(request, <uint16_t>status)

    cdef void _submit(self, Request *request) noexcept nogil:
        self.active += 1
        self.engine.submit(&request.io)

    cdef int _prepare(self, Request *request, const Command *command) noexcept nogil:
        cdef uint8_t opcode = command.opcode
        if not (opcode <= OP_READ or opcode == OP_COMPARE or (opcode == OP_ZEROES and self.namespace.can_zero)
                or (opcode == OP_DATASET and self.namespace.can_discard)):
            self.others += 1
            if self.namespace.read_only and (opcode == OP_ZEROES or opcode == OP_DATASET):
                return WRITE_PROTECTED | DO_NOT_RETRY
            return INVALID_OPCODE | DO_NOT_RETRY
        if command.nsid != NSID and not (opcode == OP_FLUSH and command.nsid == EVERY_NSID):
            return INVALID_NAMESPACE | DO_NOT_RETRY
        if command.flags & 3:  # fused with another
            return INVALID_FIELD | DO_NOT_RETRY
        if opcode == OP_FLUSH:
            self.flushes += 1
            request.io.op = IO_FLUSH
            return WITH_ENGINE
        if opcode == OP_DATASET:
            return self._dataset(request, command)
        request.lba = <uint64_t>command.cdw11 << 32 | command.cdw10
        if opcode == OP_ZEROES:
            return self._zeroes(request, command)
        return self._transfer(request, command)

    cdef int _transfer(self, Request *request, const Command *command) noexcept nogil:
        """A read, write or compare."""
        cdef Io *io = &request.io
        cdef uint64_t blocks = <uint64_t>(command.cdw12 & 0xFFFF) + 1
        cdef bint is_write = request.opcode == OP_WRITE
        cdef int status
        if is_write:
            self.writes += 1
            if self.namespace.read_only:
                return WRITE_PROTECTED | DO_NOT_RETRY
            if command.cdw12 & DIRECTIVE:
                return INVALID_FIELD | DO_NOT_RETRY
        else:
            self.reads += 1
        io.length = blocks << self.namespace.shift
        if io.length > MAX_BYTES:
            return INVALID_FIELD | DO_NOT_RETRY
        if request.lba > self.namespace.blocks or blocks > self.namespace.blocks - request.lba:
            return LBA_RANGE | DO_NOT_RETRY
        status = map_data(self.memory, command, io.length, ACCESS_WRITE if request.opcode == OP_READ else ACCESS_READ,
                          &request.data)
        if status:
            return status
        io.offset = request.lba << self.namespace.shift
        io.iov = request.data.iov
        io.iov_count = request.data.count
        if is_write:
            io.op = IO_WRITE
            io.durable = command.cdw12 & FUA != 0 or not self.namespace.write_cache
            return WITH_ENGINE
        io.op = IO_READ
        if request.opcode == OP_COMPARE:
            self.comparing = True
            self.bounce_vector = iovec(iov_base=self.bounce, iov_len=io.length)
            io.iov = &self.bounce_vector
            io.iov_count = 1
        if command.cdw12 & FUA:
            io.op = IO_FLUSH  # first, so that what is read is what is on stable storage
        return WITH_ENGINE

    cdef int _zeroes(self, Request *request, const Command *command) noexcept nogil:
        cdef uint64_t blocks = <uint64_t>(command.cdw12 & 0xFFFF) + 1
        self.discards += 1
        if request.lba > self.namespace.blocks or blocks > self.namespace.blocks - request.lba:
            return LBA_RANGE | DO_NOT_RETRY
        request.ranges[0].offset = request.lba << self.namespace.shift
        request.ranges[0].length = blocks << self.namespace.shift
        request.range_count = 1
        request.io.op = IO_ZERO
        request.io.durable = command.cdw12 & FUA != 0 or not self.namespace.write_cache
        request.io.extents[0].unmap = command.cdw12 & DEALLOCATE != 0
        self._next_extents(request)
        return WITH_ENGINE

    cdef int _dataset(self, Request *request, const Command *command) noexcept nogil:
        cdef WireRange wire[MAX_RANGES]
        cdef uint32_t count = (command.cdw10 & 0xFF) + 1
        cdef uint32_t i
        cdef int status
        self.discards += 1
        status = map_data(self.memory, command, count * sizeof(WireRange), ACCESS_READ, &request.data)
        if status:
            return status
        memset(wire, 0, sizeof(wire))
        gather(&request.data, wire, count * sizeof(WireRange))
        for i in range(count):
            if wire[i].lba > self.namespace.blocks or wire[i].blocks > self.namespace.blocks - wire[i].lba:
                request.lba = wire[i].lba
                return LBA_RANGE | DO_NOT_RETRY
            request.ranges[i].offset = wire[i].lba << self.namespace.shift
            request.ranges[i].length = <uint64_t>wire[i].blocks << self.namespace.shift
        if command.cdw11 & ATTRIBUTE_DEALLOCATE == 0:
            return SUCCESS  # the other attributes are hints
        request.range_count = count
        request.io.op = IO_DISCARD
        request.io.durable = not self.namespace.write_cache
        return WITH_ENGINE if self._next_extents(request) else SUCCESS

    cdef bint _next_extents(self, Request *request) noexcept nogil:
        """Fills in as many extents as the engine takes at once; False when none are left."""
        cdef Io *io = &request.io
        cdef Range *part
        cdef uint64_t length
        cdef bint unmap = io.extents[0].unmap
        io.extent_count = 0
        while io.extent_count < MAX_EXTENTS and request.range_index < request.range_count:
            part = &request.ranges[request.range_index]
            length = min(part.length - request.range_done, self.namespace.max_extent)
            if length == 0:
                request.range_index += 1
                request.range_done = 0
                continue
            io.extents[io.extent_count].offset = part.offset + request.range_done
            io.extents[io.extent_count].length = length
            io.extents[io.extent_count].unmap = unmap
            io.extent_count += 1
            request.range_done += length
        return io.extent_count > 0

    # -- completion ----------------------------------------------------------------------------------------------------

    cdef bint _goes_on(self, Request *request) noexcept nogil:
        """Fills in the next step of a command that has succeeded so far, if it has one."""
        if request.opcode == OP_ZEROES or request.opcode == OP_DATASET:
            return not self.stopping and self._next_extents(request)
        if request.opcode != OP_FLUSH and request.io.op == IO_FLUSH:
            request.io.op = IO_READ
            return True
        return False

    cdef void _complete(self, Request *request) noexcept nogil:
        """The engine gave the request back."""
        cdef Io *io = &request.io
        cdef uint16_t status = SUCCESS
        cdef uint32_t i
        if request.opcode == OP_READ and io.op == IO_READ:
            # Also after an error: some of it may have been written.
            for i in range(request.data.count):
                self.memory.mark_dirty(request.data.gpa[i], request.data.iov[i].iov_len)
        if io.result != 0 and not (io.result == -EOPNOTSUPP and request.opcode == OP_DATASET):
            self.last_errno = -io.result
            if io.result == -ENOSPC:
                status = CAPACITY_EXCEEDED
            elif io.result == -EOPNOTSUPP:
                status = INTERNAL_ERROR
            else:
                status = READ_ERROR if io.op == IO_READ else WRITE_FAULT
        elif io.result == 0 and self._goes_on(request):
            self._submit(request)
            self.engine.commit()
            return
        elif io.result == 0 and request.range_index < request.range_count and self.stopping:
            status = ABORTED
        elif request.opcode == OP_COMPARE and not equal(&request.data, self.bounce):
            status = COMPARE_FAILURE | DO_NOT_RETRY
        elif request.opcode == OP_READ:
            self.bytes_read += io.length
        elif request.opcode == OP_WRITE:
            self.bytes_written += io.length
        if request.opcode == OP_COMPARE:
            self.comparing = False
        self._finish(request, status)

    cdef void _finish(self, Request *request, uint16_t status) noexcept nogil:
        """Tells the host, or remembers to, and frees the record."""
        cdef timespec now
        cdef ErrorEntry *entry
        request.status = status
        if status != SUCCESS:
            clock_gettime(CLOCK_MONOTONIC, &now)
            entry = &self.failures[self.errors % ERRORS]
            entry.when = <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec
            entry.lba = request.lba
            entry.cid = request.cid
            entry.status = status
            self.errors += 1
        if self.held_first == NULL and self._post(request):
            self._free(request)
            return
        request.next = NULL
        if self.held_first == NULL:
            self.held_first = request
        else:
            self.held_last.next = request
        self.held_last = request

    cdef bint _post(self, Request *request) noexcept nogil:
        if not self.cq.post(self.id, self.head, request.cid, request.status, 0):
            return False
        if not request.is_duplicate:
            self.busy[request.cid >> 6] &= ~(<uint64_t>1 << (request.cid & 63))
        return True

    cdef void _free(self, Request *request) noexcept nogil:
        request.next = self.free_list
        self.free_list = request

    # -- the loop thread's side ----------------------------------------------------------------------------------------

    def run(self, budget: int) -> int:
        """Completes what is done and begins up to `budget` commands. Returns ServiceResult bits."""
        cdef uint32_t limit = budget
        cdef uint32_t result
        with nogil:
            result = self.service(limit)
        return result

    def complete(self) -> None:
        """Completes what is done, and begins nothing."""
        with nogil:
            self.collect()
            if self.cq is not None:
                self.cq.signal()

    def stop(self) -> None:
        """Begins nothing more, until it is created again."""
        self.stopping = True

    def destroy(self) -> None:
        """Nothing is in flight any more. What the host was not told yet, it is not told (§5.6)."""
        cdef Request *request
        if self.active:
            raise RuntimeError(f"queue {self.id} has {self.active} commands in flight")
        while self.held_first != NULL:
            request = self.held_first
            self.held_first = request.next
            self._free(request)
        memset(self.busy, 0, sizeof(self.busy))
        self.stopping = self.comparing = False
        SubmissionQueue.destroy(self)

    @property
    def in_flight(self) -> int:
        """Commands that the engine has."""
        return self.active

    @property
    def last_error(self) -> int:
        """The errno of the last command that the backend failed, or 0."""
        return self.last_errno

    @property
    def error_count(self) -> int:
        return self.errors

    def recent_errors(self) -> list:
        """(when, queue, command, status, LBA) of the last commands that failed; `when` in ns of the monotonic clock."""
        count = min(self.errors, <uint64_t>ERRORS)
        return [(entry.when, self.id, entry.cid, entry.status, entry.lba) for entry in self.failures[:count]]

    def stats(self) -> dict:
        return {
            "reads": self.reads, "writes": self.writes, "flushes": self.flushes, "discards": self.discards,
            "others": self.others, "bytes_read": self.bytes_read, "bytes_written": self.bytes_written,
            "errors": self.errors, "requests": self.fetched, "in_flight": self.active,
            "polled": self.polling.hits, "sleeps": self.polling.sleeps,
        }
