"""Does in place what takes no longer than to have it done: on a file in memory, or in the page cache.

Everything else, and all that may wait for a disk, goes to the pool.
"""

cimport cython
from libc.errno cimport EOPNOTSUPP, errno
from libc.stdint cimport uint64_t
from posix.types cimport off_t
from posix.uio cimport iovec

from propolis.backends._iopool cimport IoPool, transfer
from propolis.backends.block._engine cimport IO_FLUSH, IO_READ, IO_WRITE

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv2(int fd, const iovec *iov, int count, off_t offset, int flags)
    ssize_t pwritev2(int fd, const iovec *iov, int count, off_t offset, int flags)
    int RWF_NOWAIT

cdef extern from "<sys/vfs.h>" nogil:
    cdef struct statfs:
        long f_type
    int fstatfs(int fd, statfs *found)

cdef extern from "<linux/magic.h>" nogil:
    long TMPFS_MAGIC
    long RAMFS_MAGIC

cdef enum:
    MAX_NOW = 1 << 20        # bytes of a request that is copied in place
    MAX_VECTORS = 1024       # IOV_MAX

KINDS = ("other", "memory", "cached")  # by FileKind


def kind_of(file: int) -> str:
    """Which of KINDS an open file or block device is."""
    cdef statfs found
    if fstatfs(file, &found) == 0 and (found.f_type == TMPFS_MAGIC or found.f_type == RAMFS_MAGIC):
        return "memory"
    return "cached"


@cython.no_gc_clear
cdef class FileEngine(PoolEngine):
    """One queue's way to an open file of a kind in KINDS."""

    def __init__(self, IoPool pool, file: int, skip_sync: bool = False, *, kind: str) -> None:
        super().__init__(pool, file, skip_sync)
        self.kind = <FileKind><int>KINDS.index(kind)
        self.can_write_now = True

    cdef void submit(self, Io *io) noexcept nogil:
        if self.kind == KIND_OTHER or not self._perform_now(io):
            self.passed_on += 1
            PoolEngine.submit(self, io)
            return
        self.in_place += 1
        self.pending += 1
        io.engine = <void *>self
        self.finish(io)

    cdef bint _perform_now(self, Io *io) noexcept nogil:
        """False where it would have to wait, or has failed: then it is done as if it had not been tried."""
        cdef ssize_t n
        if io.op == IO_FLUSH:
            io.result = 0
            return self.kind == KIND_MEMORY or self.skip_sync
        if io.op != IO_READ and io.op != IO_WRITE or io.length > MAX_NOW:
            return False
        if self.kind == KIND_MEMORY:
            io.result = transfer(self.file, io.op == IO_WRITE, io.iov, io.iov_count, io.offset, io.length)
            return True
        if io.iov_count > MAX_VECTORS:
            return False
        if io.op == IO_READ:
            n = preadv2(self.file, io.iov, <int>io.iov_count, <off_t>io.offset, RWF_NOWAIT)
        elif self.can_write_now and (self.skip_sync or not io.durable):
            n = pwritev2(self.file, io.iov, <int>io.iov_count, <off_t>io.offset, RWF_NOWAIT)
            if n < 0 and errno == EOPNOTSUPP:
                self.can_write_now = False  # this file system never does
        else:
            return False
        io.result = 0
        return n >= 0 and <uint64_t>n == io.length

    def stats(self) -> dict:
        return {"in_place": self.in_place, "passed_on": self.passed_on}
