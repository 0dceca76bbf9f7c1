"""A process of the host that takes a guest's frames on a socket, such as passt on a stream."""

from __future__ import annotations

import os
import socket
import stat
from typing import TYPE_CHECKING

from propolis.backends.net import Link, NetBackend, Offload, PacketLink, StreamLink
from propolis.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable


class PeerBackend(NetBackend):
    """Owns `fd`, a connected socket. `connect` gives another one when its other side is gone."""

    def __init__(self, fd: int, connect: Callable[[], int] | None = None, *, has_header: bool = False) -> None:
        self._connect = connect
        self._has_header = has_header
        if has_header:
            self.takes = self.gives = Offload.CHECKSUM
        self.links = [self._link(fd)]

    def _link(self, fd: int) -> Link:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise BackendError(f"descriptor {fd}: not a socket")
        os.set_blocking(fd, False)
        with socket.socket(fileno=os.dup(fd)) as end:
            is_stream = end.type == socket.SOCK_STREAM
        return (StreamLink if is_stream else PacketLink)(fd, self._has_header)

    def reopen(self) -> bool:
        if self._connect is None:
            return False
        fd = self._connect()
        self.links[0].close()
        self.links = [self._link(fd)]
        return True
