"""The compiled core: guest memory, buses, interrupts, doorbells, the mailbox and the one vCPU loop.

See _vmm.pxd for the classes with their fields, and docs/design.md for how data flows between them.
"""

cimport cython
from cpython.buffer cimport PyBuffer_FillInfo
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.errno cimport ENOSYS, errno
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
from posix.signal cimport SIG_SETMASK, sigaction, sigaction_t, sigdelset, sigfillset, sigset_t
from posix.unistd cimport close, ftruncate

from propolis._atomic cimport (
    add64_rlx,
    fence_seq,
    ld32_acq,
    ld64_acq,
    ld64_rlx,
    ldptr_acq,
    or32_seq,
    or64_seq,
    st32_rel,
    st64_rel,
    st64_rlx,
    stptr_rel,
    swap32_seq,
    swap64_seq,
)
from propolis._posix cimport (
    EFD_CLOEXEC,
    EFD_NONBLOCK,
    MADV_DONTDUMP,
    MADV_DONTFORK,
    MADV_HUGEPAGE,
    MAP_NORESERVE,
    MFD_CLOEXEC,
    MFD_HUGETLB,
    SIGURG,
    eventfd,
    eventfd_read,
    eventfd_write,
    madvise,
    memfd_create,
    pthread_cond_destroy,
    pthread_cond_init,
    pthread_cond_signal,
    pthread_cond_wait,
    pthread_kill,
    pthread_mutex_destroy,
    pthread_mutex_init,
    pthread_mutex_lock,
    pthread_mutex_unlock,
    pthread_self,
    pthread_sigmask,
    sched_yield,
)

from propolis.errors import GuestMemoryError, HypervisorError

cdef enum:
    PAGE_SHIFT = 12
    PAGE_SIZE = 4096
    HUGE_PAGE_SIZE = 2 * 1024 * 1024


# -- guest memory ------------------------------------------------------------------------------------------------------

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


# -- buses -------------------------------------------------------------------------------------------------------------

cdef class Region:
    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return ~<uint64_t>0

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        pass

    cdef void placed(self, Bus bus, uint64_t base) noexcept nogil:
        pass

    cdef void removed(self, Bus bus, uint64_t base) noexcept nogil:
        pass


cdef inline bint find(const Table *table, uint64_t address, Mapping *found) noexcept nogil:
    """Binary search for the mapping that holds `address`."""
    cdef uint32_t low = 0
    cdef uint32_t high = table.count
    cdef uint32_t middle
    while low < high:
        middle = (low + high) >> 1
        if address > table.at[middle].last:
            low = middle + 1
        else:
            high = middle
    if low == table.count or address < table.at[low].base:
        return False
    found[0] = table.at[low]
    return True


cdef inline uint32_t touch(
    const Mapping *mapping, uint64_t address, uint32_t size, bint is_write, uint8_t *data
) noexcept nogil:
    """Performs as much of an access as the region takes at once: a power of two, up to its width. Returns its bytes."""
    cdef uint64_t value = 0
    cdef uint32_t step = 8
    while step > 1 and (step > size or step > (<Region>mapping.region).width or step - 1 > mapping.last - address):
        step >>= 1
    if is_write:
        memcpy(&value, data, step)
        (<Region>mapping.region).write(address - mapping.base, step, value)
    else:
        value = (<Region>mapping.region).read(address - mapping.base, step)
        memcpy(data, &value, step)
    return step


@cython.no_gc_clear
cdef class Bus:
    """Ports or physical addresses and who answers them.

    Look-ups take no lock: vCPUs read a published table. A changed table is built beside it and published by one store;
    the writer then waits until no vCPU is inside a look-up (some nanoseconds) before it reuses the old one.
    """

    def __cinit__(self, name: str, is_pio: bool) -> None:
        self.name = name
        self.is_pio = is_pio
        self.owners = {}
        self.table = calloc(1, sizeof(Table))
        self.spare = <Table *>calloc(1, sizeof(Table))
        if self.table == NULL or self.spare == NULL:
            raise MemoryError
        pthread_mutex_init(&self.lock, NULL)
        self.readers[0] = &self.own
        self.reader_count = 1

    def __dealloc__(self) -> None:
        free(self.table)
        free(self.spare)
        pthread_mutex_destroy(&self.lock)

    def own_region(self, Region region) -> None:
        """Makes a region known, so that the guest can place it later; the bus keeps it alive."""
        self.owners[id(region)] = region

    def add(self, Region region, base: int, length: int) -> None:
        """Makes a region answer at a fixed range. Raises HypervisorError when that range is taken."""
        self.own_region(region)
        if not self.place(region, base, length):
            self.remove(region)
            raise HypervisorError(f"{self.name} {base:#x}, {length:#x} bytes: {region.name} overlaps another device")

    def discard(self, Region region) -> None:
        """Removes a region for good; the vCPUs must be held, since one may be inside it."""
        self.remove(region)
        self.owners.pop(id(region), None)

    cdef bint place(self, Region region, uint64_t base, uint64_t length) noexcept nogil:
        cdef uint32_t i
        cdef bint fits = False
        pthread_mutex_lock(&self.lock)
        for i in range(self.wanted.count):
            if self.wanted.at[i].region == <void *>region:
                break
        else:
            i = self.wanted.count
        if length != 0 and base + (length - 1) >= base and i < MAX_MAPPINGS:
            if i == self.wanted.count:
                self.wanted.count += 1
            self.wanted.at[i].base = base
            self.wanted.at[i].last = base + (length - 1)
            self.wanted.at[i].region = <void *>region
            self._publish()
            for i in range((<Table *>self.table).count):
                if (<Table *>self.table).at[i].region == <void *>region:
                    fits = True
        pthread_mutex_unlock(&self.lock)
        return fits

    cdef void remove(self, Region region) noexcept nogil:
        cdef uint32_t i, j
        pthread_mutex_lock(&self.lock)
        for i in range(self.wanted.count):
            if self.wanted.at[i].region == <void *>region:
                self.wanted.count -= 1
                for j in range(i, self.wanted.count):
                    self.wanted.at[j] = self.wanted.at[j + 1]
                self._publish()
                break
        pthread_mutex_unlock(&self.lock)

    cdef void _publish(self) noexcept nogil:
        """Under the lock: publishes the wanted mappings, older rank first where two overlap."""
        cdef Table *new = self.spare
        cdef Table *old = <Table *>self.table
        cdef Mapping *wish
        cdef uint32_t i, j
        cdef uint64_t before
        new.count = 0
        for i in range(self.wanted.count):
            wish = &self.wanted.at[i]
            j = new.count
            while j > 0 and new.at[j - 1].base > wish.last:
                j -= 1
            if j > 0 and new.at[j - 1].last >= wish.base:
                continue  # overlaps: not decoded until the other one moves
            for before in range(new.count - j):
                new.at[new.count - before] = new.at[new.count - before - 1]
            new.at[j] = wish[0]
            new.count += 1
        stptr_rel(&self.table, new)  # pairs with the acquire in _find
        fence_seq()                  # the table is out before we look who is still in the old one; pairs with _find
        for i in range(self.reader_count):
            before = ld64_acq(&self.readers[i].sequence)
            while before & 1 and ld64_acq(&self.readers[i].sequence) == before:
                sched_yield()
        self.spare = old
        self._tell(old, new)

    cdef void _tell(self, const Table *old, const Table *new) noexcept nogil:
        """Calls removed() and placed() for what differs between two tables."""
        cdef uint32_t i
        cdef Mapping found
        for i in range(old.count):
            if not (find(new, old.at[i].base, &found) and found.region == old.at[i].region
                    and found.base == old.at[i].base):
                (<Region>old.at[i].region).removed(self, old.at[i].base)
        for i in range(new.count):
            if not (find(old, new.at[i].base, &found) and found.region == new.at[i].region
                    and found.base == new.at[i].base):
                (<Region>new.at[i].region).placed(self, new.at[i].base)

    cdef bint _find(self, Reader *reader, uint64_t address, Mapping *found) noexcept nogil:
        cdef bint hit
        st64_rlx(&reader.sequence, reader.sequence + 1)
        fence_seq()  # seen inside before we read the pointer; pairs with the fence in _publish
        hit = find(<const Table *>ldptr_acq(&self.table), address, found)
        st64_rel(&reader.sequence, reader.sequence + 1)
        return hit

    cdef void access(
        self, Reader *reader, uint64_t address, uint32_t size, bint is_write, uint8_t *data
    ) noexcept nogil:
        cdef Mapping found
        cdef uint32_t done
        while size > 0:
            if self._find(reader, address, &found):
                done = touch(&found, address, size, is_write, data)
            else:
                done = 1
                if not is_write:
                    data[0] = 0xff
                add64_rlx(&self.missed, 1)
            address += done
            data += done
            size -= done

    def read(self, address: int, size: int) -> int:
        """One read of 1 to 8 bytes as a vCPU does it; unanswered bytes are all ones."""
        cdef uint64_t value = 0
        if not 1 <= size <= 8:
            raise ValueError(f"an access has 1 to 8 bytes, not {size}")
        self.access(&self.own, address, size, False, <uint8_t *>&value)
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """One write of 1 to 8 bytes as a vCPU does it; unanswered bytes are dropped."""
        cdef uint64_t data = value
        if not 1 <= size <= 8:
            raise ValueError(f"an access has 1 to 8 bytes, not {size}")
        self.access(&self.own, address, size, True, <uint8_t *>&data)

    def mappings(self) -> list:
        """(base, length, name) of each region that answers now, in order."""
        cdef Table table
        # The lock: a vCPU that moves two BARs would build the next table but one in what we read. Nobody who holds it
        # waits for the GIL.
        pthread_mutex_lock(&self.lock)
        table = (<Table *>self.table)[0]
        pthread_mutex_unlock(&self.lock)
        return [
            (table.at[i].base, table.at[i].last - table.at[i].base + 1, (<Region>table.at[i].region).name)
            for i in range(table.count)
        ]

    def stats(self) -> dict:
        return {"missed": ld64_rlx(&self.missed)}

    cdef int _enrol(self, Reader *reader) except -1:
        """A vCPU of this machine will read the table."""
        if self.reader_count == MAX_READERS:
            raise HypervisorError(f"{self.name}: more than {MAX_READERS - 1} vCPUs")
        pthread_mutex_lock(&self.lock)
        self.readers[self.reader_count] = reader
        self.reader_count += 1
        pthread_mutex_unlock(&self.lock)
        return 0

    cdef void _dismiss(self, Reader *reader) noexcept:
        cdef uint32_t i
        pthread_mutex_lock(&self.lock)
        for i in range(self.reader_count):
            if self.readers[i] == reader:
                self.reader_count -= 1
                self.readers[i] = self.readers[self.reader_count]
                break
        pthread_mutex_unlock(&self.lock)


cdef class Window(Region):
    def __init__(self, name: str) -> None:
        self.name = name
        self.width = 8
        self.owners = []

    def add(self, Region region, offset: int, length: int) -> None:
        """Adds a part; parts do not overlap, and are added before the window is placed."""
        cdef uint32_t i = self.parts.count
        cdef uint32_t j
        cdef uint64_t base = offset
        cdef uint64_t last = base + (<uint64_t>length - 1)
        if length == 0 or last < base or self.parts.count == MAX_PARTS:
            raise HypervisorError(f"{self.name}: no room for {region.name}")
        while i > 0 and self.parts.at[i - 1].base > last:
            i -= 1
        if i > 0 and self.parts.at[i - 1].last >= base:
            raise HypervisorError(f"{self.name} {base:#x}: {region.name} overlaps another part")
        for j in range(self.parts.count - i):
            self.parts.at[self.parts.count - j] = self.parts.at[self.parts.count - j - 1]
        self.parts.at[i] = Mapping(base=base, last=last, region=<void *>region)
        self.parts.count += 1
        self.owners.append(region)

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        cdef uint64_t value = ~<uint64_t>0
        self._access(offset, size, False, <uint8_t *>&value)
        return value

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        self._access(offset, size, True, <uint8_t *>&value)

    cdef void _access(self, uint64_t offset, uint32_t size, bint is_write, uint8_t *data) noexcept nogil:
        cdef Mapping found
        cdef uint32_t done
        while size > 0:
            done = 1
            if find(&self.parts, offset, &found):
                done = touch(&found, offset, size, is_write, data)
            offset += done
            data += done
            size -= done

    cdef void placed(self, Bus bus, uint64_t base) noexcept nogil:
        cdef uint32_t i
        for i in range(self.parts.count):
            (<Region>self.parts.at[i].region).placed(bus, base + self.parts.at[i].base)

    cdef void removed(self, Bus bus, uint64_t base) noexcept nogil:
        cdef uint32_t i
        for i in range(self.parts.count):
            (<Region>self.parts.at[i].region).removed(bus, base + self.parts.at[i].base)


# -- interrupts and doorbells ------------------------------------------------------------------------------------------

cdef class IrqLine:
    def __init__(self, Vm vm, pin: int = -1) -> None:
        self.vm = vm
        self.pin = pin
        self.level = False

    cdef void set(self, bint level) noexcept nogil:
        pthread_mutex_lock(&self.vm.irq_lock)
        if level != self.level:
            self.level = level
            self._drive(level)
        pthread_mutex_unlock(&self.vm.irq_lock)

    cdef void pulse(self) noexcept nogil:
        self.set(True)
        self.set(False)

    cdef void route(self, int32_t pin) noexcept nogil:
        if pin < -1 or pin >= 24:
            pin = -1
        pthread_mutex_lock(&self.vm.irq_lock)
        if pin != self.pin:
            if self.level:
                self._drive(False)
            self.pin = pin
            if self.level:
                self._drive(True)
        pthread_mutex_unlock(&self.vm.irq_lock)

    cdef void _drive(self, bint level) noexcept nogil:
        """Under irq_lock: this wire changes; the input follows the OR of its wires."""
        cdef uint16_t *lines
        if self.pin < 0:
            return
        lines = &self.vm.asserted[self.pin]
        if level:
            lines[0] += 1
            if lines[0] == 1:
                self.vm.set_irq(<uint32_t>self.pin, True)
        else:
            lines[0] -= 1
            if lines[0] == 0:
                self.vm.set_irq(<uint32_t>self.pin, False)

    def drive(self, level: bool) -> None:
        """Raises or lowers the line; for devices written in Python."""
        self.set(level)

    def reroute(self, pin: int) -> None:
        """Wires the line to another input of the interrupt controllers; to none if there is no such input."""
        self.route(pin)

    def state(self) -> tuple:
        """(pin, level)."""
        cdef int32_t pin
        cdef bint level
        pthread_mutex_lock(&self.vm.irq_lock)
        pin = self.pin
        level = self.level
        pthread_mutex_unlock(&self.vm.irq_lock)
        return pin, bool(level)


@cython.no_gc_clear
cdef class MsiVector:
    def __init__(self, Vm vm) -> None:
        self.vm = vm
        self.fd = -1
        self.gsi = -1

    cdef void set_message(self, uint64_t address, uint32_t data) noexcept nogil:
        if address == self.address and data == self.data:
            return  # changing a route costs the kernel a grace period
        self.address = address
        self.data = data
        if self.fd >= 0:
            self.vm.route_msi(self.gsi, address, data)

    cdef void set_masked(self, bint masked) noexcept nogil:
        # While unassigned the eventfd keeps what was signalled; assigning it again delivers that.
        if self.fd >= 0:
            self.vm.assign_irqfd(self.fd, self.gsi, not masked)

    cdef void fire(self) noexcept nogil:
        if self.fd >= 0:
            eventfd_write(self.fd, 1)
        else:
            self.vm.signal_msi(self.address, self.data)

    def lend(self) -> int:
        """An eventfd that fires this vector without us: for vhost and other processes. Raises HypervisorError."""
        cdef int fd
        cdef int gsi
        if self.fd < 0:
            gsi = self.vm.route_msi(-1, self.address, self.data)
            if gsi < 0:
                raise HypervisorError(f"route an MSI vector: {strerror(-gsi).decode()}")
            fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
            if fd < 0:
                error = strerror(errno).decode()
                self.vm.unroute_msi(gsi)
                raise HypervisorError(f"create an eventfd: {error}")
            gsi_error = self.vm.assign_irqfd(fd, gsi, True)
            if gsi_error < 0:
                close(fd)
                self.vm.unroute_msi(gsi)
                raise HypervisorError(f"assign an irqfd: {strerror(-gsi_error).decode()}")
            self.gsi = gsi
            self.fd = fd
        return self.fd

    def trigger(self) -> None:
        """Fires the vector; for devices written in Python and for tests."""
        self.fire()

    def configure(self, address: int, data: int) -> None:
        self.set_message(address, data)

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            # Who borrowed the descriptor may keep it: it must not fire the next owner of the route.
            self.vm.assign_irqfd(self.fd, self.gsi, False)
            self.vm.unroute_msi(self.gsi)
            close(self.fd)


cdef class Doorbell(Region):
    def __init__(self, Vm vm, name: str) -> None:
        self.name = name
        self.width = 8
        self.vm = vm
        self.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.fd < 0:
            raise HypervisorError(f"create an eventfd: {strerror(errno).decode()}")

    def __cinit__(self) -> None:
        self.fd = -1

    def fileno(self) -> int:
        return self.fd

    def drain(self) -> int:
        """How often it was rung since the last call."""
        cdef uint64_t value = 0
        eventfd_read(self.fd, &value)
        return value

    def stats(self) -> dict:
        return {"rung": ld64_rlx(&self.rung)}

    cdef uint64_t read(self, uint64_t offset, uint32_t size) noexcept nogil:
        return 0

    cdef void write(self, uint64_t offset, uint32_t size, uint64_t value) noexcept nogil:
        add64_rlx(&self.rung, 1)
        eventfd_write(self.fd, 1)

    cdef void placed(self, Bus bus, uint64_t base) noexcept nogil:
        self.vm.assign_doorbell(self.fd, bus.is_pio, base, True)

    cdef void removed(self, Bus bus, uint64_t base) noexcept nogil:
        self.vm.assign_doorbell(self.fd, bus.is_pio, base, False)

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            close(self.fd)


# -- mailbox -----------------------------------------------------------------------------------------------------------

@cython.no_gc_clear
cdef class Mailbox:
    def __cinit__(self) -> None:
        self.callbacks = []
        self.fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.fd < 0:
            raise HypervisorError(f"create an eventfd: {strerror(errno).decode()}")

    def __dealloc__(self) -> None:
        if self.fd >= 0:
            close(self.fd)

    def fileno(self) -> int:
        return self.fd

    def register(self, callback) -> int:
        """A slot whose events reach `callback(bits)` on the loop thread."""
        if self.count == MAX_SLOTS:
            raise HypervisorError(f"more than {MAX_SLOTS} event sources in one machine")
        self.callbacks.append(callback)
        self.count += 1
        return self.count - 1

    cdef void post(self, uint32_t slot, uint32_t bits) noexcept nogil:
        cdef uint64_t mask = <uint64_t>1 << (slot & 63)
        or32_seq(&self.bits[slot], bits)
        # The eventfd rings once per collection: only the poster that makes the slot ready pays for the call.
        if or64_seq(&self.ready[slot >> 6], mask) & mask == 0:
            eventfd_write(self.fd, 1)

    def send(self, slot: int, bits: int) -> None:
        """post() for Python callers."""
        if not 0 <= slot < self.count:
            raise ValueError(f"no slot {slot}")
        self.post(slot, bits)

    def dispatch(self) -> None:
        """Calls the callbacks of all slots with events; bounded by the number of slots."""
        cdef uint64_t value = 0
        cdef uint64_t word
        cdef uint32_t bit, bits
        cdef int i
        eventfd_read(self.fd, &value)
        events = []
        for i in range(SLOT_WORDS):
            word = swap64_seq(&self.ready[i], 0)  # before the bits: an event that comes now rings again
            bit = 0
            while word != 0:
                if word & 1:
                    bits = swap32_seq(&self.bits[i * 64 + bit], 0)
                    if bits:
                        events.append((self.callbacks[i * 64 + bit], bits))
                word >>= 1
                bit += 1
        errors = []
        for callback, bits in events:
            try:
                callback(bits)
            except Exception as error:
                errors.append(error)
        if errors:
            raise ExceptionGroup("event callbacks", errors)


# -- the virtual machine and its vCPUs ---------------------------------------------------------------------------------

@cython.no_gc_clear
cdef class Vm:
    def __cinit__(self) -> None:
        self.memory = GuestMemory()
        self.pio = Bus("port", True)
        self.mmio = Bus("physical address", False)
        self.mailbox = Mailbox()
        pthread_mutex_init(&self.irq_lock, NULL)

    def __dealloc__(self) -> None:
        pthread_mutex_destroy(&self.irq_lock)

    cdef int set_irq(self, uint32_t gsi, bint level) noexcept nogil:
        return -ENOSYS

    cdef int signal_msi(self, uint64_t address, uint32_t data) noexcept nogil:
        return -ENOSYS

    cdef int assign_doorbell(self, int fd, bint is_pio, uint64_t address, bint assign) noexcept nogil:
        return -ENOSYS

    cdef int route_msi(self, int32_t gsi, uint64_t address, uint32_t data) noexcept nogil:
        return -ENOSYS

    cdef void unroute_msi(self, int32_t gsi) noexcept nogil:
        pass

    cdef int assign_irqfd(self, int fd, int32_t gsi, bint assign) noexcept nogil:
        return -ENOSYS


cdef void _on_kick(int number) noexcept nogil:
    """Does nothing: delivery alone makes KVM_RUN return EINTR."""


cdef bint kick_is_installed = False


cdef int _install_kick() except -1:
    """Once: SIGURG with an empty handler and without SA_RESTART.

    A standard signal needs no room in the user's queue of pending signals, which others may have filled. This one is
    ignored by default, and by those who do not expect it.
    """
    global kick_is_installed
    cdef sigaction_t action
    if not kick_is_installed:
        memset(&action, 0, sizeof(action))
        action.sa_handler = _on_kick
        if sigaction(SIGURG, &action, NULL) < 0:
            raise HypervisorError(f"install the kick signal: {strerror(errno).decode()}")
        kick_is_installed = True
    return 0


@cython.no_gc_clear
cdef class Vcpu:
    """One virtual CPU: a control word, and the loop that obeys it. Created held.

    A thread runs `run()`; the loop thread calls hold(), release() and stop(). A held vCPU has no I/O pending inside the
    hypervisor, so its registers are consistent.
    """

    def __cinit__(self, Vm vm, index: int, on_event, *args, **kwargs) -> None:
        _install_kick()
        self.vm = vm
        self.index = index
        self.control = CONTROL_HOLD
        self.slot = vm.mailbox.register(on_event)
        pthread_mutex_init(&self.lock, NULL)
        pthread_cond_init(&self.changed, NULL)
        vm.pio._enrol(&self.pio_reader)
        vm.mmio._enrol(&self.mmio_reader)

    def __dealloc__(self) -> None:
        if self.vm is not None:
            self.vm.pio._dismiss(&self.pio_reader)
            self.vm.mmio._dismiss(&self.mmio_reader)
        pthread_mutex_destroy(&self.lock)
        pthread_cond_destroy(&self.changed)

    def run(self) -> None:
        """The body of the vCPU's thread: returns after stop()."""
        cdef sigset_t mask
        cdef bint refused
        sigfillset(&mask)
        sigdelset(&mask, SIGURG)
        pthread_sigmask(SIG_SETMASK, &mask, NULL)
        pthread_mutex_lock(&self.lock)
        refused = self.running
        if not refused:
            self.thread = pthread_self()
            self.running = True
        pthread_mutex_unlock(&self.lock)
        if refused:
            raise HypervisorError(f"vCPU {self.index} already has a thread")
        with nogil:
            self._loop()
            pthread_mutex_lock(&self.lock)
            self.running = False
            pthread_mutex_unlock(&self.lock)
            self.vm.mailbox.post(self.slot, VCPU_ENDED)

    cdef void _loop(self) noexcept nogil:
        cdef Exit *exit = &self.exit
        cdef uint32_t i
        cdef int kind
        self.set_immediate_exit(True)
        while True:
            kind = self.enter()
            st64_rlx(&self.exits[kind], self.exits[kind] + 1)
            if kind == EXIT_PIO:
                for i in range(exit.count):
                    self.vm.pio.access(&self.pio_reader, exit.address, exit.size, exit.is_write,
                                       exit.data + i * exit.size)
            elif kind == EXIT_MMIO:
                self.vm.mmio.access(&self.mmio_reader, exit.address, exit.size, exit.is_write, exit.data)
            elif kind == EXIT_INTERRUPTED:
                # First forget the kick, then look at what it was for: the other order loses one.
                self.set_immediate_exit(False)
                fence_seq()  # pairs with the fence in _kick
                if ld32_acq(&self.control) != CONTROL_RUN and not self._park():
                    return
            elif kind == EXIT_SHUTDOWN:
                if not self._give_up(VCPU_SHUTDOWN):
                    return
            elif kind == EXIT_FAILED:
                if not self._give_up(VCPU_FAILED):
                    return

    cdef bint _park(self) noexcept nogil:
        cdef bint go_on
        pthread_mutex_lock(&self.lock)
        while self.control == CONTROL_HOLD:
            if not self.parked:
                self.parked = True
                self.vm.mailbox.post(self.slot, VCPU_PARKED)
            pthread_cond_wait(&self.changed, &self.lock)
        self.parked = False
        go_on = self.control == CONTROL_RUN
        pthread_mutex_unlock(&self.lock)
        return go_on

    cdef bint _give_up(self, uint32_t event) noexcept nogil:
        """Tells the loop of an exit it cannot answer, and parks at once: another entry may fail for good."""
        pthread_mutex_lock(&self.lock)
        if self.control == CONTROL_RUN:
            self.control = CONTROL_HOLD
        pthread_mutex_unlock(&self.lock)
        self.vm.mailbox.post(self.slot, event)
        return self._park()

    cdef int _kick(self) noexcept nogil:
        """Under the lock, after the control word was stored."""
        fence_seq()  # the word is visible before the flag; pairs with the fence in _loop
        self.set_immediate_exit(True)
        return pthread_kill(self.thread, SIGURG) if self.running else 0

    cdef int _command(self, uint32_t control) except -1:
        cdef int error = 0
        pthread_mutex_lock(&self.lock)
        if self.control != CONTROL_STOP:
            st32_rel(&self.control, control)
            if control != CONTROL_RUN:
                error = self._kick()
            pthread_cond_signal(&self.changed)
        pthread_mutex_unlock(&self.lock)
        if error:
            raise HypervisorError(f"signal the thread of vCPU {self.index}: {strerror(error).decode()}")
        return 0

    def hold(self) -> None:
        """Asks it to park; VCPU_PARKED arrives through the mailbox unless it is parked already."""
        self._command(CONTROL_HOLD)

    def release(self) -> None:
        """Lets it run."""
        self._command(CONTROL_RUN)

    def stop(self) -> None:
        """Asks its thread to end, for good."""
        self._command(CONTROL_STOP)

    @property
    def is_parked(self) -> bool:
        """True while it is held and has no thread inside the guest or the hypervisor."""
        cdef bint parked
        pthread_mutex_lock(&self.lock)
        parked = self.control != CONTROL_RUN and (self.parked or not self.running)
        pthread_mutex_unlock(&self.lock)
        return parked

    def stats(self) -> dict:
        """Exits by kind since creation."""
        names = ("interrupted", "pio", "mmio", "retry", "shutdown", "failed")
        return {name: ld64_rlx(&self.exits[i]) for i, name in enumerate(names)}

    def failure(self) -> tuple:
        """(reason, details) of the last EXIT_FAILED, as the back end filled them."""
        return self.exit.reason, tuple([self.exit.detail[i] for i in range(4)])

    cdef int enter(self) noexcept nogil:
        self.exit.reason = 0
        return EXIT_FAILED

    cdef void set_immediate_exit(self, bint on) noexcept nogil:
        pass
