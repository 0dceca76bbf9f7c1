"""Buses: which region answers a port or a physical address."""

cimport cython
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from propolis._atomic cimport add64_rlx, fence_seq, ld64_acq, ld64_rlx, ldptr_acq, st64_rel, st64_rlx, stptr_rel
from propolis._lock cimport Lock
from propolis._posix cimport sched_yield

from propolis.errors import HypervisorError


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
        self.lock = Lock()
        self.readers[0] = &self.own
        self.reader_count = 1

    def __dealloc__(self) -> None:
        free(self.table)
        free(self.spare)

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
        self.lock.acquire()
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
        self.lock.release()
        return fits

    cdef void remove(self, Region region) noexcept nogil:
        cdef uint32_t i, j
        self.lock.acquire()
        for i in range(self.wanted.count):
            if self.wanted.at[i].region == <void *>region:
                self.wanted.count -= 1
                for j in range(i, self.wanted.count):
                    self.wanted.at[j] = self.wanted.at[j + 1]
                self._publish()
                break
        self.lock.release()

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
        self.lock.acquire()
        table = (<Table *>self.table)[0]
        self.lock.release()
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
        self.lock.acquire()
        self.readers[self.reader_count] = reader
        self.reader_count += 1
        self.lock.release()
        return 0

    cdef void _dismiss(self, Reader *reader) noexcept:
        cdef uint32_t i
        self.lock.acquire()
        for i in range(self.reader_count):
            if self.readers[i] == reader:
                self.reader_count -= 1
                self.readers[i] = self.readers[self.reader_count]
                break
        self.lock.release()


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
