"""Status of a completed command, type and code together (NVMe 1.4 §4.6.1.2)."""

cdef enum Status:
    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    ID_CONFLICT = 0x003
    TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    ABORTED = 0x007
    INVALID_NAMESPACE = 0x00B
    SGL_SEGMENT = 0x00D              # invalid SGL segment descriptor
    SGL_COUNT = 0x00E                # invalid number of SGL descriptors
    SGL_LENGTH = 0x00F               # data SGL length invalid
    SGL_TYPE = 0x011                 # SGL descriptor type invalid
    PRP_OFFSET = 0x013
    WRITE_PROTECTED = 0x020
    LBA_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    WRITE_FAULT = 0x280
    READ_ERROR = 0x281
    COMPARE_FAILURE = 0x285
    DO_NOT_RETRY = 0x4000
