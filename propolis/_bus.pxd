"""Buses: which region answers a port or a physical address.

Threads: everything declared `noexcept nogil` may run on a vCPU thread and never takes the GIL. The rest runs on the
loop thread. Each shared field says who writes it.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from propolis._lock cimport Lock


cdef class Region:
    """A range of ports or physical addresses that a device answers. Subclasses override the four methods."""
    cdef readonly str name
    cdef uint32_t width      # widest access in bytes that `read` and `write` take; the bus splits wider ones

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil
    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil
    # The region now answers at `base` / no longer answers there. Called under the bus lock.
    cdef void placed(self, Bus bus, uint64_t base) noexcept nogil
    cdef void removed(self, Bus bus, uint64_t base) noexcept nogil

cdef enum:
    MAX_MAPPINGS = 512
    MAX_PARTS = 24
    MAX_READERS = 66

cdef struct Mapping:
    uint64_t base
    uint64_t last            # inclusive, so that a region may end at 2^64 - 1
    void *region             # borrowed Region; Bus.owners keeps it alive

cdef struct Table:
    uint32_t count
    Mapping at[MAX_MAPPINGS]

cdef struct Reader:
    uint64_t sequence        # odd while its owner looks into the table; written by: the owner

cdef class Bus:
    cdef readonly str name
    cdef bint is_pio
    cdef void *table                     # Table, sorted by base; published with release, read with acquire
    cdef Table wanted                    # in order of rank: what should be mapped; under: lock
    cdef Table *spare                    # the table that is not published; under: lock
    cdef Reader *readers[MAX_READERS]    # of Python callers and of each vCPU while it exists; under: lock
    cdef uint32_t reader_count           # under: lock
    cdef Reader own                      # the reader of Python callers; under: GIL
    cdef uint64_t missed                 # accesses nobody answered; relaxed
    cdef Lock lock
    cdef dict owners                     # regions that may be placed; written by: loop

    cdef void access(self, Reader *reader, uint64_t address, uint32_t size, bint is_write, uint8_t *data) noexcept nogil
    # Makes a region, made known by `own`, answer at [base, base + length), or nowhere. Callable on a vCPU thread: a
    # BAR write. False when it did not fit: it overlaps a region of older rank, wraps or the table is full.
    cdef bint place(self, Region region, uint64_t base, uint64_t length) noexcept nogil
    cdef void remove(self, Region region) noexcept nogil
    cdef void _publish(self) noexcept nogil
    cdef void _tell(self, const Table *old, const Table *new) noexcept nogil
    cdef bint _find(self, Reader *reader, uint64_t address, Mapping *found) noexcept nogil
    cdef int _enrol(self, Reader *reader) except -1
    cdef void _dismiss(self, Reader *reader) noexcept

cdef class Window(Region):
    """Regions side by side in one range, as a BAR holds them. Parts are added before it is placed."""
    cdef Table parts         # sorted by base; written by: loop, before the window is placed
    cdef list owners

    cdef void _access(self, uint64_t offset, uint32_t size, bint is_write, uint8_t *data) noexcept nogil
