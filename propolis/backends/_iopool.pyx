"""A pool of threads for preadv, pwritev, fdatasync and fallocate on guest memory, shared by the disks of one machine.

Nothing maps the file, so a file that shrinks under us is a short read, not a SIGBUS.
"""

cimport cython
from libc.errno cimport EINTR, EIO, ENOSYS, EOPNOTSUPP, errno
from posix.signal cimport SIG_BLOCK, sigfillset, sigset_t
from posix.types cimport off_t
from posix.uio cimport preadv, pwritev

from propolis._lock cimport Lock
from propolis._posix cimport (
    pthread_cond_broadcast,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_signal,
    pthread_cond_wait,
    pthread_sigmask,
)
from propolis.backends.block._engine cimport IO_DISCARD, IO_FLUSH, IO_READ, IO_WRITE, IO_ZERO

from propolis.threads import start as start_thread

cdef extern from "<fcntl.h>" nogil:
    int fallocate(int fd, int mode, off_t offset, off_t length)
    int FALLOC_FL_KEEP_SIZE
    int FALLOC_FL_PUNCH_HOLE
    int FALLOC_FL_ZERO_RANGE

cdef extern from "<unistd.h>" nogil:
    int fdatasync(int fd)

cdef enum:
    MAX_VECTORS = 1024  # IOV_MAX


cdef int transfer(int fd, bint is_write, iovec *iov, uint32_t count, uint64_t offset, uint64_t length) noexcept nogil:
    cdef uint64_t done = 0
    cdef uint64_t skip = 0  # of the first vector
    cdef uint32_t first = 0
    cdef iovec whole
    cdef ssize_t n
    cdef int vectors
    while done < length:
        while skip >= iov[first].iov_len:
            skip -= iov[first].iov_len
            first += 1
        vectors = <int>(count - first if count - first < MAX_VECTORS else MAX_VECTORS)
        whole = iov[first]
        iov[first].iov_base = <char *>whole.iov_base + skip
        iov[first].iov_len = whole.iov_len - skip
        if is_write:
            n = pwritev(fd, iov + first, vectors, <off_t>(offset + done))
        else:
            n = preadv(fd, iov + first, vectors, <off_t>(offset + done))
        iov[first] = whole
        if n < 0:
            if errno == EINTR:
                continue
            return -errno
        if n == 0:
            return -EIO
        done += <uint64_t>n
        skip += <uint64_t>n
    return 0


cdef int sync(int fd) noexcept nogil:
    while fdatasync(fd) < 0:
        if errno != EINTR:
            return -errno
    return 0


cdef int allocate(int fd, int mode, const Extent *extent) noexcept nogil:
    while fallocate(fd, mode, <off_t>extent.offset, <off_t>extent.length) < 0:
        if errno != EINTR:
            return -errno
    return 0


def punch_hole(fd: int, offset: int, length: int) -> int:
    """Makes a hole in a file, without changing its size. 0, or the errno."""
    cdef Extent extent = Extent(offset=offset, length=length, unmap=True)
    return -allocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, &extent)


cdef uint8_t[ZERO_BYTES] zeros  # only ever read, so no memory is needed for them


@cython.no_gc_clear
cdef class IoPool:
    """`threads` workers. Engines of any number of disks share them."""

    def __cinit__(self, threads: int = 4) -> None:
        cdef uint32_t i
        self.lock = Lock()
        pthread_cond_init(&self.work, NULL)
        self.threads = []
        self.engines = []
        for i in range(<uint32_t>ZERO_VECTORS):
            self.zero_vectors[i].iov_base = zeros
            self.zero_vectors[i].iov_len = ZERO_BYTES

    def __init__(self, threads: int = 4) -> None:
        if not 1 <= threads <= 64:
            raise ValueError(f"{threads} I/O threads: expected 1 to 64")
        for i in range(threads):
            self.threads.append(start_thread("io", f"io-{i}", self.run))

    def __dealloc__(self) -> None:
        # No thread is left: each holds a reference to the pool.
        pthread_cond_destroy(&self.work)

    def run(self) -> None:
        """The body of each thread."""
        cdef sigset_t mask
        sigfillset(&mask)
        pthread_sigmask(SIG_BLOCK, &mask, NULL)
        with nogil:
            self._serve()

    cdef void _serve(self) noexcept nogil:
        cdef Io *io
        self.lock.acquire()
        while True:
            while self.first == NULL and not self.stopping:
                self.idle += 1
                pthread_cond_wait(&self.work, &self.lock.mutex)
                self.idle -= 1
            io = self.first
            if io == NULL:
                break
            self.first = io.next
            if self.first == NULL:
                self.last = NULL
            self.performed += 1
            self.lock.release()
            io.result = self._perform((<PoolEngine>io.engine).file, (<PoolEngine>io.engine).skip_sync, io)
            (<PoolEngine>io.engine).complete(io)
            self.lock.acquire()
        self.lock.release()

    cdef void enqueue(self, Io *first, Io *last, uint32_t count) noexcept nogil:
        cdef uint32_t wake
        self.lock.acquire()
        if self.first == NULL:
            self.first = first
        else:
            self.last.next = first
        self.last = last
        wake = self.idle if self.idle < count else count
        self.lock.release()
        while wake > 0:
            pthread_cond_signal(&self.work)
            wake -= 1

    cdef int _perform(self, int fd, bint skip_sync, Io *io) noexcept nogil:
        cdef int result = 0
        cdef uint32_t i
        if io.op == IO_READ or io.op == IO_WRITE:
            result = transfer(fd, io.op == IO_WRITE, io.iov, io.iov_count, io.offset, io.length)
        elif io.op == IO_DISCARD or io.op == IO_ZERO:
            for i in range(io.extent_count):
                if io.op == IO_DISCARD:
                    result = allocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, &io.extents[i])
                else:
                    result = self._zero(fd, &io.extents[i])
                if result < 0:
                    return result
        if not skip_sync and (io.op == IO_FLUSH or io.durable and result == 0):
            result = sync(fd)
        return result

    cdef int _zero(self, int fd, const Extent *extent) noexcept nogil:
        """A hole where that is allowed, else zeros by the file system, else zeros written."""
        cdef uint64_t done = 0
        cdef uint64_t part
        cdef int result = -EOPNOTSUPP
        cdef iovec vectors[ZERO_VECTORS]
        cdef uint32_t i
        if extent.unmap:
            result = allocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, extent)
        if result == -EOPNOTSUPP or result == -ENOSYS:
            result = allocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, extent)
        if result != -EOPNOTSUPP and result != -ENOSYS:
            return result
        for i in range(<uint32_t>ZERO_VECTORS):
            vectors[i] = self.zero_vectors[i]  # a copy: transfer changes them for a moment
        while done < extent.length:
            part = min(extent.length - done, <uint64_t>ZERO_BYTES * ZERO_VECTORS)
            i = <uint32_t>((part + ZERO_BYTES - 1) // ZERO_BYTES)
            vectors[i - 1].iov_len = part - <uint64_t>ZERO_BYTES * (i - 1)
            result = transfer(fd, True, vectors, i, extent.offset + done, part)
            if result < 0:
                return result
            done += part
        return 0

    def close(self, timeout: float = 5.0) -> bool:
        """Ends the threads after what is queued. False when one hangs in the kernel; it is left behind then."""
        self.lock.acquire()
        self.stopping = True
        pthread_cond_broadcast(&self.work)
        self.lock.release()
        for thread in self.threads:
            thread.join(timeout)
        self.threads = [thread for thread in self.threads if thread.is_alive()]
        return not self.threads

    def stats(self) -> dict:
        cdef uint64_t performed
        self.lock.acquire()
        performed = self.performed
        self.lock.release()
        return {"performed": performed, "threads": len(self.threads)}


@cython.no_gc_clear
cdef class PoolEngine(Engine):
    """One queue's way to the pool, for the open file `file`; with `skip_sync` nothing waits until it is durable."""

    def __init__(self, IoPool pool, file: int, skip_sync: bool = False) -> None:
        self.pool = pool
        self.file = file
        self.skip_sync = skip_sync
        pool.engines.append(self)

    cdef void submit(self, Io *io) noexcept nogil:
        io.engine = <void *>self
        io.next = NULL
        if self.batch_first == NULL:
            self.batch_first = io
        else:
            self.batch_last.next = io
        self.batch_last = io
        self.batch_count += 1
        self.pending += 1

    cdef void commit(self) noexcept nogil:
        if self.batch_first != NULL:
            self.pool.enqueue(self.batch_first, self.batch_last, self.batch_count)
            self.batch_first = self.batch_last = NULL
            self.batch_count = 0
        self._ring_for_ready()

    def close(self) -> bool:
        """True once nothing is pending, when it may be dropped."""
        if self.pending:
            return False
        if self in self.pool.engines:
            self.pool.engines.remove(self)
        return True
