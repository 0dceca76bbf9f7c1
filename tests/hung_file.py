"""A file whose storage hangs when a test says so.

Whoever waits for it is in the kernel and cannot be interrupted, as with a server of NFS that is gone. Closing it ends
that by an error.
"""

import ctypes
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests import fuse_file

_DETACH = 2  # MNT_DETACH
_TIMEOUT = 20.0
_libc = ctypes.CDLL(None, use_errno=True)


class HungFile:
    """Context manager; skips the test where this host lets nobody mount. Numbers of requests are fuse_file's."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.path = folder / fuse_file.NAME
        self._folder = folder
        try:
            fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            pytest.skip(f"no FUSE here: {error}")
        folder.mkdir()
        options = f"fd={fuse},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}"
        if _libc.mount(b"test", os.fsencode(folder), b"fuse", 0, options.encode()) < 0:
            os.close(fuse)
            pytest.skip(f"no FUSE here: {os.strerror(ctypes.get_errno())}")
        source = folder.with_suffix(".content")
        source.write_bytes(content)
        self._control, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(_TIMEOUT)
        command = [sys.executable, "-I", fuse_file.__file__, str(fuse), str(its.fileno()), str(source)]
        self._process = subprocess.Popen(command, pass_fds=[fuse, its.fileno()])
        its.close()
        os.close(fuse)  # it is the process's alone: whoever waits is let go when that ends

    def hang(self, *requests: int) -> None:
        """From now on these are not answered."""
        self._tell(" ".join(map(str, requests)))

    def go_on(self) -> None:
        """Whoever waits is answered, and nothing hangs any more."""
        self._tell(" ")

    def wait(self) -> None:
        """Until somebody waits for it."""
        assert self._control.recv(100) == b"held"

    def _tell(self, what: str) -> None:
        self._control.send(what.encode())
        assert self._control.recv(100) == b"done"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._control.close()
        _libc.umount2(os.fsencode(self._folder), _DETACH)
