"""A disk that lives in memory and is gone with its machine."""

import os

from propolis.backends._iopool import IoPool
from propolis.backends.block.file import FileBackend
from propolis.errors import BackendError


class MemoryBackend(FileBackend):
    """`size` bytes, zero or starting with `contents`."""

    def __init__(self, size: int, pool: IoPool, *, contents: bytes = b"", read_only: bool = False) -> None:
        if len(contents) > size:
            raise BackendError(f"memory disk of {size} bytes: {len(contents)} bytes of contents")
        fd = os.memfd_create("disk", os.MFD_CLOEXEC)
        try:
            os.truncate(fd, size)
            os.pwrite(fd, contents, 0)
            super().__init__(fd, pool, read_only=read_only, path="memory")
        except BaseException:
            os.close(fd)
            raise
