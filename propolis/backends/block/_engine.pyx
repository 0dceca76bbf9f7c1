"""The completion side that all block engines share, and a way to run single operations from Python."""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.errno cimport EOPNOTSUPP
from libc.string cimport memset, strerror
from posix.unistd cimport close

from propolis._atomic cimport ldptr_acq
from propolis._lock cimport Lock
from propolis._posix cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd, eventfd_read, eventfd_write

from propolis.errors import BackendError

OPERATIONS = {"read": IO_READ, "write": IO_WRITE, "flush": IO_FLUSH, "discard": IO_DISCARD, "zero": IO_ZERO}


@cython.no_gc_clear
cdef class Engine:
    """Where the requests of one queue go. This base refuses them all."""

    def __cinit__(self, *args: object, **kwargs: object) -> None:
        self.done_lock = Lock()
        self.operations = set()
        self.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.fd < 0:
            raise BackendError("create an eventfd for a block engine")

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            close(self.fd)

    cdef void submit(self, Io *io) noexcept nogil:
        self.pending += 1
        io.engine = <void *>self
        io.result = -EOPNOTSUPP
        self.finish(io)

    cdef void commit(self) noexcept nogil:
        self._ring_for_ready()

    cdef void _ring_for_ready(self) noexcept nogil:
        if self.ready_first != NULL:
            eventfd_write(self.fd, 1)

    cdef void finish(self, Io *io) noexcept nogil:
        io.next = NULL
        if self.ready_first == NULL:
            self.ready_first = io
        else:
            self.ready_last.next = io
        self.ready_last = io

    cdef Io *take(self) noexcept nogil:
        cdef Io *first = self.ready_first
        cdef Io *io = first
        self.ready_first = self.ready_last = NULL
        while io != NULL:
            self.pending -= 1
            io = io.next
        return first

    cdef bint waiting(self) noexcept nogil:
        # Only a hint without the lock: whoever sees it takes the lock, and whoever misses it hears the eventfd.
        return self.ready_first != NULL or ldptr_acq(<void **>&self.done_first) != NULL

    cdef void complete(self, Io *io) noexcept nogil:
        cdef bint first
        io.next = NULL
        self.done_lock.acquire()
        first = self.done_first == NULL
        if first:
            self.done_first = io
        else:
            self.done_last.next = io
        self.done_last = io
        # Inside the lock: once the submitter has reaped its last record it may drop the engine and this descriptor.
        if first:
            eventfd_write(self.fd, 1)
        self.done_lock.release()

    cdef Io *reap(self) noexcept nogil:
        cdef uint64_t value = 0
        eventfd_read(self.fd, &value)  # before the list: what completes after we took it rings again
        self.done_lock.acquire()
        self._join(self.done_first, self.done_last)
        self.done_first = self.done_last = NULL
        self.done_lock.release()
        return self.take()

    cdef void _join(self, Io *first, Io *last) noexcept nogil:
        """Puts a list behind what is ready."""
        if first == NULL:
            return
        if self.ready_first == NULL:
            self.ready_first = first
        else:
            self.ready_last.next = first
        self.ready_last = last

    # -- single operations, for control paths and tests ----------------------------------------------------------------

    def fileno(self) -> int:
        return self.fd

    def start(self, Operation operation) -> None:
        """Submits one operation; `finished` returns it when fileno() becomes readable."""
        if operation in self.operations:
            raise ValueError("the operation is in flight")
        self.operations.add(operation)
        self.submit(&operation.io)
        self.commit()

    def finished(self) -> list:
        """The operations that completed since the last call."""
        cdef Io *io = self.reap()
        found = []
        while io != NULL:
            operation = <Operation>io.owner
            io = io.next
            self.operations.discard(operation)
            found.append(operation)
        return found

    @property
    def pending_count(self) -> int:
        return self.pending

    def close(self) -> bool:
        """True once nothing is pending, when it may be dropped."""
        return self.pending == 0


@cython.no_gc_clear
cdef class Operation:
    """One read, write, flush, discard or zero of a backend, from Python. `buffers` stay exported until it goes."""

    cdef Io io
    cdef iovec vectors[16]
    cdef Py_buffer views[16]
    cdef uint32_t views_count

    def __init__(self, name: str, offset: int = 0, buffers: object = (), length: int = 0, unmap: bool = False,
                 durable: bool = False) -> None:
        cdef uint32_t i
        memset(&self.io, 0, sizeof(self.io))
        if name not in OPERATIONS or len(buffers) > 16:
            raise ValueError(f"block operation {name!r} with {len(buffers)} buffers")
        self.io.op = OPERATIONS[name]
        self.io.offset = offset
        self.io.durable = durable
        self.io.owner = <void *>self
        self.io.iov = self.vectors
        for buffer in buffers:
            i = self.views_count
            PyObject_GetBuffer(buffer, &self.views[i], PyBUF_WRITABLE if name == "read" else PyBUF_SIMPLE)
            self.views_count += 1
            self.vectors[i].iov_base = self.views[i].buf
            self.vectors[i].iov_len = <size_t>self.views[i].len
            self.io.length += <uint64_t>self.views[i].len
        self.io.iov_count = self.views_count
        if name in ("discard", "zero"):
            self.io.extent_count = 1
            self.io.extents[0] = Extent(offset=offset, length=length, unmap=unmap)

    def __dealloc__(self) -> None:
        for i in range(self.views_count):
            PyBuffer_Release(&self.views[i])

    @property
    def error(self) -> int:
        """0, or the errno that it failed with."""
        return -self.io.result

    @property
    def message(self) -> str:
        return strerror(-self.io.result).decode()
