"""The array of the flash in which firmware keeps its variables: it ends where the bootrom begins, as OVMF has it."""

import os

from propolis._memory import GuestMemory
from propolis.errors import ImageError
from propolis.firmware.layout import PAGE_SIZE, Range
from propolis.spec import NVRAM_MAX_BYTES


def load(memory: GuestMemory, fd: int, path: str, end: int) -> Range:
    """Adds the array, with what the file has, to guest memory before that is mapped. Raises ImageError."""
    size = os.fstat(fd).st_size
    if not size or size % PAGE_SIZE or size > NVRAM_MAX_BYTES:
        raise ImageError(f"nvram '{path}': size: {size} bytes, expected whole blocks of 4 KiB and at most 4 MiB")
    place = Range(end - size, size)
    memory.add(place.base, place.size, read_only=True)
    with memory.view(place.base, place.size) as view:
        try:
            count = os.preadv(fd, [view], 0)
        except OSError as error:
            raise ImageError(f"nvram '{path}': read: {error.strerror}") from error
    if count != size:
        raise ImageError(f"nvram '{path}': it changed while being read")
    return place
