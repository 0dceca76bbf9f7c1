"""Commands as they lie in memory, and where their data is: PRPs and SGLs (NVMe 1.4 §4.2 to §4.4)."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from posix.uio cimport iovec

from propolis._memory cimport GuestMemory

cdef enum:
    COMMAND_BYTES = 64
    PAGE = 4096              # CC.MPS is 0
    MAX_BYTES = 1 << 20      # of one command: MDTS
    MAX_SEGMENTS = 257       # that many bytes in pages, not beginning at one

cdef packed struct Command:
    uint8_t opcode
    uint8_t flags            # FUSE 1:0, PSDT 7:6
    uint16_t cid
    uint32_t nsid
    uint64_t reserved
    uint64_t metadata
    uint64_t prp1
    uint64_t prp2
    uint32_t cdw10
    uint32_t cdw11
    uint32_t cdw12
    uint32_t cdw13
    uint32_t cdw14
    uint32_t cdw15

cdef struct Segments:
    iovec *iov               # room for MAX_SEGMENTS; in guest RAM, checked when they were added
    uint64_t *gpa            # where the guest sees each
    uint32_t count

# SUCCESS and `length` bytes of guest memory that allow `access`, or the status that answers the command.
cdef uint16_t map_data(GuestMemory memory, const Command *command, uint64_t length, int access,
                       Segments *segments) noexcept nogil
cdef uint16_t map_prp(GuestMemory memory, uint64_t prp1, uint64_t prp2, uint64_t length, int access,
                      Segments *segments) noexcept nogil
cdef void gather(const Segments *segments, void *destination, uint64_t length) noexcept nogil
cdef void scatter(GuestMemory memory, const Segments *segments, const void *source, uint64_t length) noexcept nogil
cdef bint equal(const Segments *segments, const uint8_t *expected) noexcept nogil
