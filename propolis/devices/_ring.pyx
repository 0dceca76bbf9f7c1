"""A byte ring from vCPU threads to the loop, without a lock and without a wake-up per byte."""

from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.string cimport memcpy
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

from propolis._atomic cimport fence_seq, ld32_acq, st32_rel


cdef class ByteRing:
    def __cinit__(self, size: int) -> None:
        if size < 1 or size > 1 << 24 or size & (size - 1):
            raise ValueError(f"a ring of {size} bytes")
        self.size = size
        # Pages of its own, which are there once they are written to: most rings of a VM are never used.
        cdef void *data = mmap(NULL, self.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        if data == MAP_FAILED:
            raise MemoryError
        self.data = <uint8_t *>data

    def __dealloc__(self) -> None:
        if self.data != NULL:
            munmap(self.data, self.size)

    cdef uint32_t used(self) noexcept nogil:
        return ld32_acq(&self.inward) - ld32_acq(&self.outward)

    cdef bint put(self, uint8_t byte) noexcept nogil:
        cdef uint32_t position = self.inward
        self.data[position & (self.size - 1)] = byte
        st32_rel(&self.inward, position + 1)  # the byte before the position; pairs with the acquire in take
        fence_seq()                           # either we see that it was emptied or take sees our byte
        return ld32_acq(&self.outward) == position

    def take(self, limit: int) -> tuple:
        """(at most `limit` bytes, whether there is more). When there is no more, the next put() says so."""
        cdef uint32_t start = self.outward
        cdef uint32_t length = min(ld32_acq(&self.inward) - start, <uint32_t>limit)
        cdef uint32_t at = start & (self.size - 1)
        cdef uint32_t first = min(length, self.size - at)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, length)
        memcpy(<char *>data, self.data + at, first)
        memcpy(<char *>data + first, self.data, length - first)
        st32_rel(&self.outward, start + length)  # copied before they may be overwritten; pairs with `used`
        fence_seq()                              # pairs with the fence in put
        return data, ld32_acq(&self.inward) != start + length
