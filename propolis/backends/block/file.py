"""A raw image file or a block device, given as an open descriptor."""

import fcntl
import logging
import os
import stat

from propolis.backends._iopool import IoPool, punch_hole
from propolis.backends.block import BlockBackend, Engine
from propolis.backends.block._file_engine import FileEngine, kind_of
from propolis.errors import BackendError, ImageError

log = logging.getLogger(__name__)

BLKGETSIZE64 = 0x80081272  # linux/fs.h
BLKSSZGET = 0x1268
BLKPBSZGET = 0x127B
MAX_EXTENT = 32 << 20  # a bound for the time of one operation where zeros have to be written


class FileBackend(BlockBackend):
    """Owns `fd` from now on. `path` is for messages. The size is fixed when it is opened.

    `block_size` is that of a file; a block device has its own. With `skip_flush` a flush, and a write that asks to be
    durable, complete without waiting for the disk.

    Whoever opened it holds the lock (disk_image.py): it goes with the open file, so it ends with the last descriptor.
    """

    def __init__(
        self,
        fd: int,
        pool: IoPool,
        *,
        read_only: bool = False,
        path: str = "",
        block_size: int = 512,
        skip_flush: bool = False,
        discard: bool | None = None,
    ) -> None:
        self.fd = fd
        self.path = path or f"descriptor {fd}"
        self.read_only = read_only
        self._pool = pool
        self._skip_flush = skip_flush
        self._engines: list[FileEngine] = []
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if not read_only and flags & os.O_ACCMODE != os.O_RDWR:
            raise BackendError(f"disk {self.path!r}: not opened for writing")
        if flags & os.O_APPEND:
            raise BackendError(f"disk {self.path!r}: opened to append, which ignores where a write belongs")
        mode = os.fstat(fd).st_mode
        self.kind = kind_of(fd)
        if stat.S_ISBLK(mode):
            self._measure_device()
        elif stat.S_ISREG(mode):
            self.capacity = os.fstat(fd).st_size
            self.block_size = block_size
        else:
            raise ImageError(f"disk {self.path!r}: neither a file nor a block device")
        if self.capacity % self.block_size:
            log.warning("last block is cut off: disk=%s size=%d", self.path, self.capacity)
            self.capacity -= self.capacity % self.block_size
        if self.capacity == 0:
            raise ImageError(f"disk {self.path!r}: smaller than one block of {self.block_size} bytes")
        if not read_only:
            self.can_zero = True
            self.can_discard = self._probe_discard(stat.S_ISREG(mode)) if discard is None else discard
            self.max_extent = MAX_EXTENT

    def _measure_device(self) -> None:
        def ask(request: int, size: int) -> int:
            return int.from_bytes(fcntl.ioctl(self.fd, request, bytes(size)), "little")

        try:
            self.capacity = ask(BLKGETSIZE64, 8)
            self.block_size = ask(BLKSSZGET, 4)
            self.physical_block_size = max(ask(BLKPBSZGET, 4), self.block_size)
        except OSError as error:
            raise BackendError(f"measure block device {self.path!r}: {error.strerror}") from error

    def _probe_discard(self, is_file: bool) -> bool:
        """Whether holes can be punched: tried beyond the end, where it changes nothing. Devices are told explicitly."""
        if not is_file:
            return False
        return punch_hole(self.fd, self.capacity + (1 << 20), 4096) == 0

    def engine(self) -> Engine:
        engine = FileEngine(self._pool, self.fd, self._skip_flush, kind=self.kind)
        self._engines.append(engine)
        return engine

    def close(self) -> bool:
        self._engines = [engine for engine in self._engines if not engine.close()]
        if self._engines:
            return False
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        return True
