"""A file in memory: what is stored there outlives the process, however it ends, and no descriptor stays open for it.

Without a descriptor a worker that was taken over can change what is in the file, but not make it longer. `mmap.mmap`
would keep one.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import cast

from propolis.errors import BackendError

_FAILED = ctypes.c_void_p(-1).value
_WRITABLE = 0x200  # PyBUF_WRITE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_view_of = ctypes.pythonapi.PyMemoryView_FromMemory
_view_of.restype = ctypes.py_object
_view_of.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)


class MappedFile:
    """The first `size` bytes of a file, shared with whoever else has it open.

    The file has to be as long, with room on its disk: a store behind its end kills the process.
    """

    def __init__(self, fd: int, size: int) -> None:
        """Raises BackendError. The descriptor stays the caller's."""
        if os.fstat(fd).st_size < size:
            raise BackendError(f"map a file of {size} bytes: it has {os.fstat(fd).st_size}")
        address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if address == _FAILED:
            raise BackendError(f"map a file of {size} bytes: {os.strerror(ctypes.get_errno())}")
        self._address = address
        self._size = size
        # Owned here, alive until close(): a view of it that is made elsewhere has to be released before.
        self.view = cast("memoryview", _view_of(address, size, _WRITABLE))

    def close(self) -> None:
        """Let go; twice is fine. Raises BufferError, and keeps the mapping, while a part of `view` is in use."""
        if self._address:
            self.view.release()
            _libc.munmap(self._address, self._size)
            self._address = 0
