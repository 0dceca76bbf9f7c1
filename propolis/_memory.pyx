"""Guest memory: regions between guard pages, translation, and which pages the host wrote."""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport errno
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset, strerror
from posix.mman cimport (
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_FIXED,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    mmap,
    munmap,
)
from posix.unistd cimport close, ftruncate

from propolis._atomic cimport ld32_acq, ld64_rlx, or64_seq, st32_rel, swap64_seq
from propolis._posix cimport (
    MADV_DONTDUMP,
    MADV_DONTFORK,
    MADV_HUGEPAGE,
    MAP_NORESERVE,
    MFD_CLOEXEC,
    MFD_HUGETLB,
    madvise,
    memfd_create,
)

from propolis.errors import GuestMemoryError

cdef enum:
    PAGE_SHIFT = 12
    PAGE_SIZE = 4096
    HUGE_PAGE_SIZE = 2 * 1024 * 1024


@cython.no_gc_clear
cdef class GuestMemory:
    """Guest RAM in regions that name their backing.

    Each region lies between PROT_NONE guard pages, so that an overrun faults instead of reaching a neighbour.
    Addresses are guest-physical, lengths in bytes.
    """

    def __cinit__(self) -> None:
        self.count = 0
        self.tracking = 0
        self.exports = 0
        self.backings = []

    def add(self, gpa: int, size: int, backing: str = "anonymous", read_only: bool = False) -> None:
        """Adds a region; only before the vCPUs run. `backing` is "anonymous", "memfd" (shared) or "hugetlb".

        Raises GuestMemoryError when it is not page-aligned, overlaps another region or the host has no such memory.
        """
        cdef uint64_t start = gpa
        cdef uint64_t length = size
        cdef uint64_t unit = HUGE_PAGE_SIZE if backing == "hugetlb" else PAGE_SIZE
        cdef uint32_t i
        cdef MemoryRegion region
        cdef void *fixed
        if backing not in ("anonymous", "memfd", "hugetlb"):
            raise GuestMemoryError(f"memory backing {backing!r}: expected anonymous, memfd or hugetlb")
        if length == 0 or start % unit or length % unit or start + length < start:
            raise GuestMemoryError(f"memory at {start:#x}, {length:#x} bytes: not a range of {unit}-byte pages")
        if self.count == MAX_MEMORY_REGIONS:
            raise GuestMemoryError(f"more than {MAX_MEMORY_REGIONS} memory regions")
        for i in range(self.count):
            if start < self.regions[i].gpa + self.regions[i].size and self.regions[i].gpa < start + length:
                raise GuestMemoryError(f"memory at {start:#x}, {length:#x} bytes: overlaps {self.regions[i].gpa:#x}")
        memset(&region, 0, sizeof(region))
        region.gpa = start
        region.size = length
        region.access = ACCESS_READ if read_only else ACCESS_READ | ACCESS_WRITE
        region.fd = -1
        # Room for a guard on each side and for alignment to a huge page, which both THP and hugetlb want.
        region.reserved_size = length + 3 * HUGE_PAGE_SIZE
        fixed = mmap(NULL, region.reserved_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if fixed == MAP_FAILED:
            raise GuestMemoryError(f"reserve {length:#x} bytes of guest memory: {strerror(errno).decode()}")
        region.reserved = <uint8_t *>fixed
        region.host = <uint8_t *>((<uint64_t>fixed + 2 * HUGE_PAGE_SIZE - 1) & ~<uint64_t>(HUGE_PAGE_SIZE - 1))
        try:
            self._back(&region, backing)
            if self.tracking:
                self._record_dirty(&region)
        except BaseException:
            munmap(region.reserved, region.reserved_size)
            if region.fd >= 0:
                close(region.fd)
            raise
        self.regions[self.count] = region
        self.backings.append(backing)
        st32_rel(&self.count, self.count + 1)  # pairs with the acquire in translate

    cdef int _back(self, MemoryRegion *region, str backing) except -1:
        cdef int flags = MAP_FIXED
        cdef unsigned int memfd_flags = MFD_CLOEXEC
        cdef void *fixed
        if backing == "anonymous":
            flags |= MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        else:
            flags |= MAP_SHARED
            if backing == "hugetlb":
                memfd_flags |= MFD_HUGETLB  # reserved now: a page that is missing later would be a SIGBUS
            else:
                flags |= MAP_NORESERVE
            region.fd = memfd_create(b"guest-memory", memfd_flags)
            if region.fd < 0 or ftruncate(region.fd, <long>region.size) < 0:
                raise GuestMemoryError(f"create {backing} guest memory: {strerror(errno).decode()}")
        fixed = mmap(region.host, region.size, PROT_READ | PROT_WRITE, flags, region.fd, 0)
        if fixed == MAP_FAILED:
            raise GuestMemoryError(f"map {region.size:#x} bytes of {backing} memory: {strerror(errno).decode()}")
        # A forked helper must never see guest memory, nor a core dump hold it; huge pages are a wish, not a need.
        madvise(fixed, region.size, MADV_DONTFORK)
        madvise(fixed, region.size, MADV_DONTDUMP)
        if backing == "anonymous" and region.size >= HUGE_PAGE_SIZE:
            madvise(fixed, region.size, MADV_HUGEPAGE)
        return 0

    cdef uint8_t *translate(self, uint64_t gpa, uint64_t length, int access) noexcept nogil:
        cdef uint32_t i
        cdef uint32_t count = ld32_acq(&self.count)  # pairs with the release in add
        cdef uint64_t offset
        for i in range(count):
            offset = gpa - self.regions[i].gpa  # wraps, and is then too large, for an address below the region
            if offset < self.regions[i].size:
                if length == 0 or length > self.regions[i].size - offset or (self.regions[i].access & access) != access:
                    return NULL
                return self.regions[i].host + offset
        return NULL

    cdef bint copy_in(self, uint64_t gpa, void *destination, uint64_t length) noexcept nogil:
        cdef uint8_t *source = self.translate(gpa, length, ACCESS_READ)
        if source == NULL:
            return False
        memcpy(destination, source, length)
        return True

    cdef bint copy_out(self, uint64_t gpa, const void *source, uint64_t length) noexcept nogil:
        cdef uint8_t *destination = self.translate(gpa, length, ACCESS_WRITE)
        if destination == NULL:
            return False
        memcpy(destination, source, length)
        self.mark_dirty(gpa, length)
        return True

    cdef void mark_dirty(self, uint64_t gpa, uint64_t length) noexcept nogil:
        cdef uint32_t i
        cdef uint64_t first, last, page
        if ld32_acq(&self.tracking) == 0 or length == 0:
            return
        for i in range(ld32_acq(&self.count)):
            first = gpa - self.regions[i].gpa
            if first >= self.regions[i].size:
                continue
            last = first + length - 1
            if last >= self.regions[i].size or last < first:
                last = self.regions[i].size - 1
            for page in range(first >> PAGE_SHIFT, (last >> PAGE_SHIFT) + 1):
                or64_seq(&self.regions[i].dirty[page >> 6], <uint64_t>1 << (page & 63))
            return

    def track_dirty(self) -> None:
        """Starts to record which pages the host writes, all clean. The hypervisor keeps the record of vCPU writes."""
        cdef uint32_t i
        for i in range(self.count):
            self._record_dirty(&self.regions[i])
        self.take_dirty()
        st32_rel(&self.tracking, 1)  # after the bitmaps exist; pairs with the acquire in mark_dirty

    cdef int _record_dirty(self, MemoryRegion *region) except -1:
        """Gives a region its bitmap."""
        if region.dirty == NULL:
            region.dirty = <uint64_t *>calloc((region.size >> PAGE_SHIFT) // 64 + 1, 8)
            if region.dirty == NULL:
                raise MemoryError
        return 0

    def take_dirty(self) -> list:
        """The guest-physical addresses of the pages written since the last call, in order; marks them clean."""
        cdef uint32_t i, bit
        cdef uint64_t word, word_index
        pages = []
        for i in range(self.count):
            if self.regions[i].dirty == NULL:
                continue
            for word_index in range((self.regions[i].size >> PAGE_SHIFT) // 64 + 1):
                if ld64_rlx(&self.regions[i].dirty[word_index]) == 0:
                    continue
                word = swap64_seq(&self.regions[i].dirty[word_index], 0)
                for bit in range(64):
                    if word >> bit & 1:
                        pages.append(self.regions[i].gpa + ((word_index * 64 + bit) << PAGE_SHIFT))
        return pages

    def regions_list(self) -> list:
        """(gpa, size, backing, read_only, fd) of each region; fd is -1 for anonymous memory."""
        return [
            (self.regions[i].gpa, self.regions[i].size, self.backings[i], not self.regions[i].access & ACCESS_WRITE,
             self.regions[i].fd)
            for i in range(self.count)
        ]

    def host_address(self, gpa: int, length: int, writable: bool = False) -> int:
        """Where the VMM sees this range, which the guest may read, or also write; for hypervisor back ends."""
        return <uint64_t>self._at(gpa, length, ACCESS_READ | ACCESS_WRITE if writable else ACCESS_READ)

    def read(self, gpa: int, length: int) -> bytes:
        """Copies bytes out of guest memory. Raises GuestMemoryError."""
        if length == 0:
            return b""
        return PyBytes_FromStringAndSize(<char *>self._at(gpa, length, ACCESS_READ), length)

    def write(self, gpa: int, data) -> None:
        """Copies bytes into guest memory; the host may also write what the guest may not. Raises GuestMemoryError."""
        cdef const uint8_t[::1] source = data
        cdef uint64_t length = <uint64_t>source.shape[0]
        if length == 0:
            return
        memcpy(self._at(gpa, length, ACCESS_READ), &source[0], length)
        self.mark_dirty(gpa, length)

    def view(self, gpa: int, length: int) -> memoryview:
        """A writable memoryview; close() is refused while one is alive. The writer calls mark() when tracking."""
        cdef MemoryView exporter = MemoryView.__new__(MemoryView)
        exporter.start = self._at(gpa, length, ACCESS_READ)
        exporter.length = length
        exporter.memory = self
        return memoryview(exporter)

    def mark(self, gpa: int, length: int) -> None:
        """Marks pages written through a view."""
        self.mark_dirty(gpa, length)

    cdef uint8_t *_at(self, uint64_t gpa, uint64_t length, int access) except NULL:
        cdef uint8_t *host = self.translate(gpa, length, access)
        if host == NULL:
            raise GuestMemoryError(f"guest memory {gpa:#x}, {length:#x} bytes: not wholly in one region")
        return host

    def close(self) -> None:
        """Unmaps everything; no vCPU or device may run any more. Raises GuestMemoryError while views are alive."""
        if self.exports:
            raise GuestMemoryError(f"guest memory is still in use by {self.exports} views")
        self._release()

    cdef void _release(self) noexcept:
        cdef uint32_t i
        for i in range(self.count):
            munmap(self.regions[i].reserved, self.regions[i].reserved_size)
            if self.regions[i].fd >= 0:
                close(self.regions[i].fd)
            free(self.regions[i].dirty)
        self.count = 0
        self.tracking = 0

    def __dealloc__(self) -> None:
        self._release()


@cython.no_gc_clear
cdef class MemoryView:
    """Exports a range of guest memory through the buffer protocol and counts who looks at it."""

    cdef GuestMemory memory
    cdef uint8_t *start
    cdef Py_ssize_t length

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        PyBuffer_FillInfo(buffer, self, self.start, self.length, False, flags)
        self.memory.exports += 1

    def __releasebuffer__(self, Py_buffer *buffer):
        self.memory.exports -= 1
