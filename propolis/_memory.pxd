"""Guest memory: regions between guard pages, translation, and which pages the host wrote.

Threads: everything declared `noexcept nogil` may run on a vCPU thread and never takes the GIL. The rest runs on the
loop thread. Each shared field says who writes it.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t


cdef enum Access:
    ACCESS_READ = 1
    ACCESS_WRITE = 2

cdef enum:
    MAX_MEMORY_REGIONS = 16

cdef struct MemoryRegion:
    uint64_t gpa
    uint64_t size
    uint8_t *host            # first byte; PROT_NONE guard pages on both sides
    uint8_t *reserved        # the whole reservation, guards included
    uint64_t reserved_size
    int access               # what the guest, and devices on its behalf, may do: Access bits
    int fd                   # memfd or hugetlb file, -1 for anonymous memory
    uint64_t *dirty          # one bit per 4 KiB page; NULL until tracking first starts; any thread, or64_seq

cdef class GuestMemory:
    cdef MemoryRegion regions[MAX_MEMORY_REGIONS]   # written by: loop, before `count` publishes them
    cdef uint32_t count                             # written by: loop (release)
    cdef uint32_t tracking                          # written by: loop
    cdef uint32_t exports                           # memoryviews alive; written by: loop
    cdef list backings

    # NULL unless [gpa, gpa + length) lies wholly in one region that allows `access`; length 0 is never valid.
    cdef uint8_t *translate(self, uint64_t gpa, uint64_t length, int access) noexcept nogil
    cdef bint copy_in(self, uint64_t gpa, void *destination, uint64_t length) noexcept nogil
    cdef bint copy_out(self, uint64_t gpa, const void *source, uint64_t length) noexcept nogil
    # Every host write to guest memory ends here, after the bytes are in place. A no-op while tracking is off.
    cdef void mark_dirty(self, uint64_t gpa, uint64_t length) noexcept nogil
    cdef int _back(self, MemoryRegion *region, str backing) except -1
    cdef int _record_dirty(self, MemoryRegion *region) except -1
    cdef uint8_t *_at(self, uint64_t gpa, uint64_t length, int access) except NULL
    cdef void _release(self) noexcept
