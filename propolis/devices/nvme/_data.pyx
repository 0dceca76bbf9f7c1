"""Where the data of a command is. Each list is copied once, whole, then checked; addresses become pointers here."""

from libc.string cimport memcmp, memcpy

from propolis.devices.nvme._status cimport (
    DO_NOT_RETRY,
    INVALID_FIELD,
    PRP_OFFSET,
    SGL_COUNT,
    SGL_LENGTH,
    SGL_SEGMENT,
    SGL_TYPE,
    SUCCESS,
    TRANSFER_ERROR,
)

cdef enum:
    ENTRIES = PAGE // 8      # of a whole PRP list
    MAX_LISTS = 4            # two hold the largest transfer; beginning in the middle of a page needs one more
    DESCRIPTORS = 256        # of an SGL segment, copied at once
    MAX_SGL_SEGMENTS = 8
    # §4.4
    SGL_DATA = 0x0
    SGL_NEXT = 0x2
    SGL_LAST = 0x3

cdef packed struct Descriptor:
    uint64_t address
    uint32_t length
    uint8_t reserved[3]
    uint8_t kind             # type 7:4, subtype 3:0


cdef uint16_t add(
    GuestMemory memory, uint64_t address, uint64_t length, int access, Segments *segments
) noexcept nogil:
    cdef uint8_t *host = memory.translate(address, length, access)
    cdef uint32_t last = segments.count - 1
    if host == NULL:
        return TRANSFER_ERROR | DO_NOT_RETRY
    # Guard pages keep regions apart on the host, so neighbours there lie in one region.
    if segments.count and <uint8_t *>segments.iov[last].iov_base + segments.iov[last].iov_len == host:
        segments.iov[last].iov_len += length
        return SUCCESS
    if segments.count == MAX_SEGMENTS:
        return SGL_COUNT | DO_NOT_RETRY
    segments.iov[segments.count].iov_base = host
    segments.iov[segments.count].iov_len = length
    segments.gpa[segments.count] = address
    segments.count += 1
    return SUCCESS


cdef uint16_t map_prp(
    GuestMemory memory, uint64_t prp1, uint64_t prp2, uint64_t length, int access, Segments *segments
) noexcept nogil:
    cdef uint64_t entries[ENTRIES]
    cdef uint64_t left = length
    cdef uint64_t part = PAGE - prp1 % PAGE
    cdef uint64_t at = prp2
    cdef uint32_t i, count, used
    cdef uint32_t lists = 0
    cdef uint16_t status
    segments.count = 0
    if prp1 % 4:
        return PRP_OFFSET | DO_NOT_RETRY
    status = add(memory, prp1, part if part < left else left, access, segments)
    if status or part >= left:
        return status
    left -= part
    if left <= PAGE:
        if prp2 % PAGE:
            return PRP_OFFSET | DO_NOT_RETRY
        return add(memory, prp2, left, access, segments)
    while True:
        lists += 1
        if at % 8:
            return PRP_OFFSET | DO_NOT_RETRY
        if lists > MAX_LISTS:
            return INVALID_FIELD | DO_NOT_RETRY
        count = <uint32_t>((PAGE - at % PAGE) // 8)  # up to the end of the list's page
        used = <uint32_t>((left + PAGE - 1) // PAGE)
        if used > count:
            used = count - 1  # the last entry is where the list goes on
        else:
            count = used
        if not memory.copy_in(at, entries, 8 * <uint64_t>count):
            return TRANSFER_ERROR | DO_NOT_RETRY
        for i in range(used):
            if entries[i] % PAGE:
                return PRP_OFFSET | DO_NOT_RETRY
            part = left if left < PAGE else PAGE
            status = add(memory, entries[i], part, access, segments)
            if status:
                return status
            left -= part
        if left == 0:
            return SUCCESS
        at = entries[count - 1]


cdef uint16_t map_sgl(
    GuestMemory memory, const Descriptor *first, uint64_t length, int access, Segments *segments
) noexcept nogil:
    cdef Descriptor list[DESCRIPTORS]
    cdef Descriptor last = first[0]
    cdef uint64_t left = length
    cdef uint32_t i, count
    cdef uint32_t hops = 0
    cdef uint16_t status
    segments.count = 0
    if last.kind == SGL_DATA << 4:
        if last.length != length:
            return SGL_LENGTH | DO_NOT_RETRY
        return add(memory, last.address, length, access, segments)
    while True:
        # `last` is the descriptor of the segment that follows.
        if last.kind != SGL_NEXT << 4 and last.kind != SGL_LAST << 4:
            return SGL_TYPE | DO_NOT_RETRY
        hops += 1
        if last.length == 0 or last.length % sizeof(Descriptor) or hops > MAX_SGL_SEGMENTS:
            return SGL_SEGMENT | DO_NOT_RETRY
        count = <uint32_t>(last.length // sizeof(Descriptor))
        if count > DESCRIPTORS:
            return SGL_COUNT | DO_NOT_RETRY
        if not memory.copy_in(last.address, list, last.length):
            return TRANSFER_ERROR | DO_NOT_RETRY
        if last.kind == SGL_NEXT << 4:
            count -= 1  # its last one is the next segment's
        for i in range(count):
            if list[i].kind != SGL_DATA << 4:
                if list[i].kind == SGL_NEXT << 4 or list[i].kind == SGL_LAST << 4:
                    return SGL_COUNT | DO_NOT_RETRY
                return SGL_TYPE | DO_NOT_RETRY
            if list[i].length == 0:
                continue
            if list[i].length > left:
                return SGL_LENGTH | DO_NOT_RETRY
            status = add(memory, list[i].address, list[i].length, access, segments)
            if status:
                return status
            left -= list[i].length
        if last.kind == SGL_LAST << 4:
            if left:
                return SGL_LENGTH | DO_NOT_RETRY
            return SUCCESS
        last = list[count]


cdef uint16_t map_data(
    GuestMemory memory, const Command *command, uint64_t length, int access, Segments *segments
) noexcept nogil:
    cdef uint32_t kind = command.flags >> 6
    if kind == 0:
        return map_prp(memory, command.prp1, command.prp2, length, access, segments)
    if kind == 3:
        return INVALID_FIELD | DO_NOT_RETRY
    return map_sgl(memory, <const Descriptor *>&command.prp1, length, access, segments)


cdef void gather(const Segments *segments, void *destination, uint64_t length) noexcept nogil:
    # Not inlined into the caller: what it copied cannot be read from guest memory a second time.
    cdef uint8_t *to = <uint8_t *>destination
    cdef uint64_t part
    cdef uint32_t i
    for i in range(segments.count):
        part = min(length, <uint64_t>segments.iov[i].iov_len)
        memcpy(to, segments.iov[i].iov_base, part)
        to += part
        length -= part


cdef void scatter(GuestMemory memory, const Segments *segments, const void *source, uint64_t length) noexcept nogil:
    cdef const uint8_t *origin = <const uint8_t *>source
    cdef uint64_t part
    cdef uint32_t i
    for i in range(segments.count):
        part = min(length, <uint64_t>segments.iov[i].iov_len)
        memcpy(segments.iov[i].iov_base, origin, part)
        memory.mark_dirty(segments.gpa[i], part)
        origin += part
        length -= part


cdef bint equal(const Segments *segments, const uint8_t *expected) noexcept nogil:
    cdef uint32_t i
    for i in range(segments.count):
        if memcmp(segments.iov[i].iov_base, expected, segments.iov[i].iov_len) != 0:
            return False
        expected += segments.iov[i].iov_len
    return True
