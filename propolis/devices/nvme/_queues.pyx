"""Submission and completion queues. Indexes that the host wrote are checked here, each time they are used."""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.string cimport memcpy
from posix.uio cimport iovec

from propolis._atomic cimport st32_rel, st32_rlx
from propolis._memory cimport ACCESS_READ, ACCESS_WRITE
from propolis.devices.nvme._data cimport (
    COMMAND_BYTES,
    MAX_BYTES,
    MAX_SEGMENTS,
    PAGE,
    Segments,
    map_prp,
    scatter,
)

from propolis.devices.nvme.status import CommandError

cdef enum:
    COMPLETION_BYTES = 16


@cython.no_gc_clear
cdef class CompletionQueue:
    """Raises ValueError where its entries are not page-aligned guest RAM."""

    def __init__(
        self, Doorbells doorbells, number: int, gpa: int, size: int, vector: int = 0, interrupts: bool = True
    ) -> None:
        self.doorbells = doorbells
        self.memory = doorbells.memory
        self.msix = doorbells.function.msix
        self.id = number
        self.gpa = gpa
        self.size = size
        self.vector = vector
        self.interrupts = interrupts
        self.phase = True
        self.base = self.memory.translate(self.gpa, COMPLETION_BYTES * <uint64_t>self.size, ACCESS_READ | ACCESS_WRITE)
        if self.base == NULL or self.gpa % PAGE:
            raise ValueError(f"completion queue {number}: {gpa:#x} is not page-aligned guest RAM")
        doorbells.open_completion(self.id, self.size, self.vector, self.interrupts)

    cdef void _look(self) noexcept nogil:
        cdef uint32_t head = self.doorbells.head(self.id)
        cdef uint32_t unread = (self.tail + self.size - self.head) % self.size
        # Only forward, and not beyond what is there.
        if head < self.size and (head + self.size - self.head) % self.size <= unread:
            self.head = head

    cdef bint _has_room(self) noexcept nogil:
        cdef uint32_t following = (self.tail + 1) % self.size
        if following != self.head:
            return True
        self._look()
        if following != self.head:
            return True
        self.doorbells.block(self.id)
        self._look()
        return following != self.head

    cdef bint post(
        self, uint32_t sq_id, uint32_t sq_head, uint16_t cid, uint16_t status, uint32_t result
    ) noexcept nogil:
        cdef uint8_t *entry = self.base + COMPLETION_BYTES * <uint64_t>self.tail
        if not self._has_room():
            return False
        st32_rlx(entry, result)
        st32_rlx(entry + 4, 0)
        st32_rlx(entry + 8, sq_head | sq_id << 16)
        # With the phase, after all else and after the data; pairs with the driver's acquire.
        st32_rel(entry + 12, cid | (<uint32_t>status << 1 | self.phase) << 16)
        self.memory.mark_dirty(self.gpa + COMPLETION_BYTES * <uint64_t>self.tail, COMPLETION_BYTES)
        self.tail += 1
        if self.tail == self.size:
            self.tail = 0
            self.phase = not self.phase
        st32_rel(&self.doorbells.completions[self.id].tail, self.tail)
        self.posted = True
        return True

    cdef void signal(self) noexcept nogil:
        if not self.posted:
            return
        self.posted = False
        if self.interrupts:
            self.interrupt_count += 1
            self.msix.fire(self.vector)
            self.doorbells.update_pin()

    # -- on the loop ---------------------------------------------------------------------------------------------------

    def answer(self, SubmissionQueue queue, cid: int, status: int, result: int) -> bool:
        """Posts a completion. False when there is no room."""
        return self.post(queue.id, queue.head, cid, status, result)

    def interrupt(self) -> None:
        """signal() for Python callers."""
        self.signal()

    def close(self) -> None:
        """The host deleted it, or reset the controller."""
        self.doorbells.close_completion(self.id)


@cython.no_gc_clear
cdef class SubmissionQueue:
    """A queue of the controller: it exists for the host between create() and destroy()."""

    def __cinit__(self, Doorbells doorbells, number: int, *args: object) -> None:
        self.doorbells = doorbells
        self.memory = doorbells.memory
        self.id = number

    cdef bint peek(self, Command *copy) noexcept nogil:
        cdef uint32_t tail
        if self.base == NULL:
            return False
        tail = self.doorbells.tail(self.id)
        if tail == self.head or tail >= self.size:
            return False
        memcpy(copy, self.base + COMMAND_BYTES * <uint64_t>self.head, COMMAND_BYTES)
        return True

    cdef bint offered(self) noexcept nogil:
        cdef uint32_t tail = self.doorbells.tail(self.id)
        return self.base != NULL and tail != self.head and tail < self.size

    cdef void consume(self) noexcept nogil:
        self.head += 1
        if self.head == self.size:
            self.head = 0

    cdef bint listen(self) noexcept nogil:
        if self.base == NULL:
            return False
        self.doorbells.listen(self.id, self.head)
        return self.offered()

    # -- on the loop ---------------------------------------------------------------------------------------------------

    def create(self, CompletionQueue cq, gpa: int, size: int) -> None:
        """Raises ValueError where its entries are not page-aligned guest RAM."""
        cdef uint64_t at = gpa
        cdef uint32_t entries = size
        cdef uint8_t *base = self.memory.translate(at, COMMAND_BYTES * <uint64_t>entries, ACCESS_READ)
        if base == NULL or at % PAGE:
            raise ValueError(f"submission queue {self.id}: {gpa:#x} is not page-aligned guest RAM")
        self.base = base
        self.size = entries
        self.head = 0
        self.cq = cq
        cq.users += 1
        self.doorbells.open_submission(self.id, entries)

    def destroy(self) -> None:
        """Nothing of it is in flight any more."""
        if self.cq is not None:
            self.doorbells.close_submission(self.id)
            self.cq.users -= 1
        self.cq = None
        self.base = NULL
        self.size = self.head = 0

    @property
    def exists(self) -> bool:
        return self.base != NULL

    @property
    def completion_queue(self) -> CompletionQueue | None:
        return self.cq

    # -- the admin queue, whose commands are Python's ------------------------------------------------------------------

    def take(self) -> bytes | None:
        """A copy of the next command."""
        cdef Command copy
        if not self.peek(&copy):
            return None
        self.consume()
        return PyBytes_FromStringAndSize(<char *>&copy, COMMAND_BYTES)

    def watch(self) -> bool:
        """listen() for Python callers."""
        return self.listen()

    def put(self, prp1: int, prp2: int, data: bytes) -> None:
        """Copies data to where PRPs say. Raises CommandError."""
        cdef iovec iov[MAX_SEGMENTS]
        cdef uint64_t gpa[MAX_SEGMENTS]
        cdef Segments segments
        cdef const uint8_t[::1] source = data
        cdef uint64_t length = <uint64_t>source.shape[0]
        cdef uint16_t status
        if not 0 < length <= MAX_BYTES:
            raise ValueError(f"{length} bytes for one command")
        segments.iov, segments.gpa = iov, gpa
        status = map_prp(self.memory, prp1, prp2, length, ACCESS_WRITE, &segments)
        if status:
            raise CommandError(status)
        scatter(self.memory, &segments, &source[0], length)
