"""The split virtqueue: what the driver offers is checked here, whole, and devices see only chains of valid buffers.

A descriptor or index that breaks the rules is a ring error: the queue pops nothing more, and the device tells the guest
by DEVICE_NEEDS_RESET. Nothing here raises on guest input.
"""

cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from propolis._atomic cimport (
    fence_seq,
    ld8_rlx,
    ld16_acq,
    ld16_rlx,
    ld64_rlx,
    st16_rel,
    st16_rlx,
    st32_rlx,
)
from propolis._memory cimport ACCESS_READ, ACCESS_WRITE

cdef enum:
    # §2.7.5, §2.7.6, §2.7.8
    DESC_SIZE = 16
    DESC_NEXT = 1
    DESC_WRITE = 2
    DESC_INDIRECT = 4
    AVAIL_NO_INTERRUPT = 1
    USED_NO_NOTIFY = 1
    # §6
    F_INDIRECT_DESC = 28
    F_EVENT_IDX = 29

ERRORS = (
    "no error",
    "a queue size that is not a power of two up to the device's",
    "a part of the ring is misaligned, outside RAM or overlaps another part",
    "the available index moved by more than the queue size",
    "an available head outside the descriptor table",
    "an available head that the device still has",
    "a next index outside the descriptor table",
    "a descriptor chain that loops",
    "a descriptor chain with more buffers than the device takes",
    "a device-readable buffer after a device-writable one",
    "a buffer of no bytes",
    "a buffer that is not wholly in guest RAM",
    "a descriptor chain of more than 4 GiB",
    "an indirect table that is not allowed, of a bad length or outside RAM",
    "a request without room for an answer",
)


cdef struct Descriptor:
    uint64_t address
    uint32_t length
    uint16_t flags
    uint16_t next


cdef inline void load_descriptor(const uint8_t *at, Descriptor *copy) noexcept nogil:
    """Reads each byte of a descriptor once. Only an indirect table may be misaligned."""
    cdef uint64_t words[2]
    cdef uint32_t i
    if <uint64_t>at & 7:
        for i in range(<uint32_t>DESC_SIZE):
            (<uint8_t *>words)[i] = ld8_rlx(at + i)
    else:
        words[0] = ld64_rlx(at)
        words[1] = ld64_rlx(at + 8)
    copy.address = words[0]
    copy.length = <uint32_t>words[1]
    copy.flags = <uint16_t>(words[1] >> 32)
    copy.next = <uint16_t>(words[1] >> 48)


cdef inline bint overlap(uint64_t a, uint64_t a_length, uint64_t b, uint64_t b_length) noexcept nogil:
    """Both ranges were translated, so neither wraps."""
    return a < b + b_length and b < a + a_length


cdef bint gather(const Chain *chain, uint64_t offset, void *destination, uint64_t length) noexcept nogil:
    # Not inlined into the caller: what it copied cannot be read from guest memory a second time.
    cdef uint8_t *to = <uint8_t *>destination
    cdef uint64_t part
    cdef uint32_t i
    if offset > chain.readable_bytes or length > chain.readable_bytes - offset:
        return False
    for i in range(chain.readable):
        if length == 0:
            break
        if offset >= chain.iov[i].iov_len:
            offset -= chain.iov[i].iov_len
            continue
        part = min(length, <uint64_t>chain.iov[i].iov_len - offset)
        memcpy(to, <uint8_t *>chain.iov[i].iov_base + offset, part)
        to += part
        length -= part
        offset = 0
    return True


cdef uint64_t scatter(
    GuestMemory memory, const Chain *chain, uint64_t offset, const void *source, uint64_t length
) noexcept nogil:
    cdef const uint8_t *origin = <const uint8_t *>source
    cdef uint64_t part
    cdef uint64_t done = 0
    cdef uint32_t i
    for i in range(chain.readable, chain.readable + chain.writable):
        if done == length:
            break
        if offset >= chain.iov[i].iov_len:
            offset -= chain.iov[i].iov_len
            continue
        part = min(length - done, <uint64_t>chain.iov[i].iov_len - offset)
        memcpy(<uint8_t *>chain.iov[i].iov_base + offset, origin + done, part)
        memory.mark_dirty(chain.gpa[i] + offset, part)
        done += part
        offset = 0
    return done


cdef class Notifier:
    cdef void used(self, uint32_t queue) noexcept nogil:
        pass


@cython.no_gc_clear
cdef class Queue:
    """One virtqueue. `max_size` is the device's limit, a power of two; the guest chooses a size up to it."""

    def __init__(self, GuestMemory memory, Notifier notifier, index: int, max_size: int) -> None:
        if not 1 <= max_size <= MAX_QUEUE_SIZE or max_size & (max_size - 1):
            raise ValueError(f"queue size {max_size}: expected a power of two up to {MAX_QUEUE_SIZE}")
        self.memory = memory
        self.notifier = notifier
        self.index = index
        self.max_size = max_size

    # -- set-up: on a vCPU thread, under the transport's lock ----------------------------------------------------------

    cdef int set_up(self, uint32_t size, uint64_t desc, uint64_t driver, uint64_t device) noexcept nogil:
        cdef uint64_t desc_length = DESC_SIZE * <uint64_t>size
        cdef uint64_t driver_length = 6 + 2 * <uint64_t>size  # with used_event
        cdef uint64_t device_length = 6 + 8 * <uint64_t>size  # with avail_event
        self.tear_down()
        if size == 0 or size > self.max_size or size & (size - 1):
            return RING_SIZE
        if desc & 15 or driver & 1 or device & 3:  # §2.7
            return RING_ADDRESS
        self.avail = self.memory.translate(driver, driver_length, ACCESS_READ)
        self.used = self.memory.translate(device, device_length, ACCESS_READ | ACCESS_WRITE)
        self.desc = self.memory.translate(desc, desc_length, ACCESS_READ)
        if (self.desc == NULL or self.avail == NULL or self.used == NULL
                or overlap(desc, desc_length, driver, driver_length)
                or overlap(desc, desc_length, device, device_length)
                or overlap(driver, driver_length, device, device_length)):
            self.tear_down()
            return RING_ADDRESS
        self.used_gpa = device
        self.size = size
        return RING_FINE

    cdef void negotiate(self, uint64_t features) noexcept nogil:
        self.indirect = features >> F_INDIRECT_DESC & 1
        self.event_idx = features >> F_EVENT_IDX & 1

    cdef void tear_down(self) noexcept nogil:
        self.desc = self.avail = self.used = NULL
        self.size = 0
        self.event_idx = self.indirect = self.suppressed = False
        self.next_avail = self.next_used = self.signalled = 0
        self.in_flight = 0
        self.error = RING_FINE
        memset(self.busy, 0, sizeof(self.busy))

    # -- work: one thread, from activation to reset --------------------------------------------------------------------

    cdef void fail(self, int error) noexcept nogil:
        if self.error == RING_FINE:
            self.error = error

    cdef int pop(self, Chain *chain) noexcept nogil:
        cdef uint32_t waiting, head
        cdef int error
        if self.error != RING_FINE:
            return -1
        if self.desc == NULL:
            return 0
        # Pairs with the driver's release of avail.idx: the entries and descriptors before it are visible.
        waiting = <uint16_t>(ld16_acq(self.avail + 2) - self.next_avail)
        if waiting == 0:
            return 0
        if waiting > self.size or self.in_flight >= self.size:
            self.fail(RING_JUMP)
            return -1
        head = ld16_rlx(self.avail + 4 + 2 * (self.next_avail & (self.size - 1)))
        if head >= self.size:
            self.fail(RING_HEAD)
            return -1
        if self.busy[head >> 6] >> (head & 63) & 1:
            self.fail(RING_TWICE)
            return -1
        error = self._walk(head, chain)
        if error != RING_FINE:
            self.fail(error)
            return -1
        self.busy[head >> 6] |= <uint64_t>1 << (head & 63)
        self.in_flight += 1
        self.next_avail += 1
        self.popped += 1
        return 1

    cdef int _walk(self, uint32_t head, Chain *chain) noexcept nogil:
        """Follows the chain; each table, the ring's and at most one indirect, is left after as many steps as it has."""
        cdef Descriptor d
        cdef const uint8_t *table = self.desc
        cdef uint32_t entries = self.size
        cdef uint32_t i = head
        cdef uint32_t steps = 0
        cdef bint inside = False
        cdef int error
        chain.head = <uint16_t>head
        chain.readable = chain.writable = 0
        chain.readable_bytes = chain.writable_bytes = 0
        while True:
            if i >= entries:
                return RING_INDEX
            if steps == entries:
                return RING_LOOP
            steps += 1
            load_descriptor(table + DESC_SIZE * <uint64_t>i, &d)
            if d.flags & DESC_INDIRECT:  # §2.7.5.3; its WRITE flag has no meaning
                if not self.indirect or inside or d.flags & DESC_NEXT:
                    return RING_INDIRECT
                if d.length == 0 or d.length % DESC_SIZE or d.length // DESC_SIZE > 0xFFFF:
                    return RING_INDIRECT
                table = self.memory.translate(d.address, d.length, ACCESS_READ)
                if table == NULL:
                    return RING_INDIRECT
                entries = d.length // DESC_SIZE
                i = steps = 0
                inside = True
                continue
            error = self._add(chain, d.address, d.length, d.flags & DESC_WRITE != 0)
            if error != RING_FINE:
                return error
            if not d.flags & DESC_NEXT:
                return RING_FINE
            i = d.next

    cdef int _add(self, Chain *chain, uint64_t address, uint32_t length, bint writable) noexcept nogil:
        """Appends one buffer to the chain."""
        cdef uint32_t n = chain.readable + chain.writable
        cdef uint8_t *host
        if n == chain.capacity:
            return RING_LONG
        if length == 0:
            return RING_EMPTY
        if chain.readable_bytes + chain.writable_bytes + length > MAX_CHAIN_BYTES:
            return RING_BYTES
        host = self.memory.translate(address, length, ACCESS_WRITE if writable else ACCESS_READ)
        if host == NULL:
            return RING_BUFFER
        chain.iov[n].iov_base = host
        chain.iov[n].iov_len = length
        chain.gpa[n] = address
        if writable:
            chain.writable += 1
            chain.writable_bytes += length
        elif chain.writable:
            return RING_ORDER
        else:
            chain.readable += 1
            chain.readable_bytes += length
        return RING_FINE

    cdef void unpop(self, uint16_t head) noexcept nogil:
        """The chain popped last is the next one again; nothing of it was pushed."""
        self.busy[head >> 6] &= ~(<uint64_t>1 << (head & 63))
        self.in_flight -= 1
        self.next_avail -= 1
        self.popped -= 1

    cdef void put(self, uint16_t head, uint32_t written) noexcept nogil:
        cdef uint64_t offset
        if self.used == NULL or head >= self.size or not self.busy[head >> 6] >> (head & 63) & 1:
            return
        self.busy[head >> 6] &= ~(<uint64_t>1 << (head & 63))
        self.in_flight -= 1
        offset = 4 + 8 * <uint64_t>(self.next_used & (self.size - 1))
        st32_rlx(self.used + offset, head)
        st32_rlx(self.used + offset + 4, written)
        self.memory.mark_dirty(self.used_gpa + offset, 8)
        self.next_used += 1

    cdef void publish(self) noexcept nogil:
        if self.used != NULL:
            # After the elements and the buffers; pairs with the driver's acquire.
            st16_rel(self.used + 2, self.next_used)
            self.memory.mark_dirty(self.used_gpa + 2, 2)

    cdef void push(self, uint16_t head, uint32_t written) noexcept nogil:
        self.put(head, written)
        self.publish()

    cdef void suppress(self) noexcept nogil:
        """A hint that we look at the ring anyway. With EVENT_IDX the old avail_event does that by itself."""
        if self.used != NULL and not self.event_idx and not self.suppressed:
            self.suppressed = True
            st16_rlx(self.used, USED_NO_NOTIFY)
            self.memory.mark_dirty(self.used_gpa, 2)

    cdef bint listen(self) noexcept nogil:
        """Asks for a notification of the next buffer; True when one has come already."""
        cdef uint64_t event = 4 + 8 * <uint64_t>self.size
        if self.used == NULL or self.error != RING_FINE:
            return False
        if self.event_idx:
            st16_rlx(self.used + event, self.next_avail)
            self.memory.mark_dirty(self.used_gpa + event, 2)
        else:
            self.suppressed = False
            st16_rlx(self.used, 0)
            self.memory.mark_dirty(self.used_gpa, 2)
        fence_seq()  # pairs with the driver's fence between its avail.idx and reading our event or flag
        return ld16_acq(self.avail + 2) != self.next_avail

    cdef bint offered(self) noexcept nogil:
        if self.avail == NULL or self.error != RING_FINE:
            return False
        return ld16_acq(self.avail + 2) != self.next_avail

    cdef void signal(self) noexcept nogil:
        if self._wants_interrupt():
            self.interrupts += 1
            self.notifier.used(self.index)

    cdef bint _wants_interrupt(self) noexcept nogil:
        cdef uint16_t event
        cdef uint16_t last = self.signalled
        if self.used == NULL or self.next_used == last:
            return False
        self.signalled = self.next_used
        fence_seq()  # used.idx is out before we read what the driver wants; pairs with the driver's fence
        if not self.event_idx:
            return ld16_rlx(self.avail) & AVAIL_NO_INTERRUPT == 0
        # §2.7.7.1: when used.idx passes used_event; all modulo 2^16.
        event = ld16_rlx(self.avail + 4 + 2 * self.size)
        return <uint16_t>(self.next_used - event - 1) < <uint16_t>(self.next_used - last)

    # -- for devices written in Python ---------------------------------------------------------------------------------

    def take(self) -> Buffers | None:
        """The next chain, or None when there is none or the ring is broken (see `failure`)."""
        cdef Buffers buffers = Buffers.__new__(Buffers, self)
        if self.pop(&buffers.chain) != 1:
            return None
        return buffers

    def hush(self) -> None:
        """suppress() for Python callers."""
        self.suppress()

    def watch(self) -> bool:
        """listen() for Python callers."""
        return self.listen()

    def interrupt(self) -> None:
        """signal() for Python callers."""
        self.signal()

    def give_up(self, error: int) -> None:
        """Marks the ring broken: a chain that the device cannot answer."""
        self.fail(error)

    @property
    def is_ready(self) -> bool:
        """Whether the guest set it up."""
        return self.desc != NULL

    @property
    def in_flight_count(self) -> int:
        """Chains popped and not yet pushed."""
        return self.in_flight

    @property
    def failure(self) -> str | None:
        """What broke the ring, or None."""
        return ERRORS[self.error] if self.error != RING_FINE else None

    def stats(self) -> dict:
        return {"requests": self.popped, "interrupts": self.interrupts, "in_flight": self.in_flight}


@cython.no_gc_clear
cdef class Buffers:
    """A chain in Python's hands, to be finished exactly once."""

    cdef Chain chain
    cdef Queue queue
    cdef bint finished
    cdef uint64_t at  # bytes of the writable part already filled

    def __cinit__(self, Queue queue) -> None:
        self.queue = queue
        self.chain.capacity = queue.max_size
        self.chain.iov = <iovec *>calloc(queue.max_size, sizeof(iovec))
        self.chain.gpa = <uint64_t *>calloc(queue.max_size, sizeof(uint64_t))
        if self.chain.iov == NULL or self.chain.gpa == NULL:
            raise MemoryError

    def __dealloc__(self) -> None:
        free(self.chain.iov)
        free(self.chain.gpa)

    @property
    def readable(self) -> int:
        """Bytes that the guest gave."""
        return self.chain.readable_bytes

    @property
    def writable(self) -> int:
        """Bytes of room that the guest offers."""
        return self.chain.writable_bytes

    def read(self, limit: int) -> bytes:
        """A copy of the first bytes that the guest gave, at most `limit`."""
        cdef uint64_t length = min(<uint64_t>limit, self.chain.readable_bytes)
        data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
        if length:
            gather(&self.chain, 0, <char *>data, length)
        return data

    def write(self, data: bytes) -> int:
        """Appends to what is written to the guest; returns how many bytes had room."""
        cdef const uint8_t[::1] source = data
        cdef uint64_t done
        if self.finished or source.shape[0] == 0:
            return 0
        done = scatter(self.queue.memory, &self.chain, self.at, &source[0], <uint64_t>source.shape[0])
        self.at += done
        return done

    def finish(self) -> None:
        """Gives the chain back with what was written; the caller interrupts once for a batch."""
        if self.finished:
            raise RuntimeError("these buffers were given back already")
        self.finished = True
        self.queue.push(self.chain.head, <uint32_t>self.at)
