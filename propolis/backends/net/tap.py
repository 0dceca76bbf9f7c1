"""A tap device of the host's kernel, given as one open queue of it for each pair of the card's."""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING

from propolis.backends.net import ALL_OFFLOADS, NetBackend, Offload, PacketLink
from propolis.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

# linux/if_tun.h
TUNSETOFFLOAD = 0x400454D0
TUNSETQUEUE = 0x400454D9
_IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE = 0x200, 0x400
_FLAGS = {Offload.CHECKSUM: 1, Offload.TCP4: 2, Offload.TCP6: 4, Offload.ECN: 8}


class TapBackend(NetBackend):
    """Owns the descriptors: of one tap, with virtio headers of 12 bytes."""

    takes = gives = ALL_OFFLOADS

    def __init__(self, fds: Sequence[int]) -> None:
        self.links = []
        for fd in fds:
            os.set_blocking(fd, False)
            self.links.append(PacketLink(fd, has_header=True))
        self._attached = len(fds)

    def negotiate(self, guest: Offload) -> None:
        flags = sum(flag for offload, flag in _FLAGS.items() if offload in guest)
        try:
            fcntl.ioctl(self.links[0].fileno(), TUNSETOFFLOAD, flags)
        except OSError as error:
            raise BackendError(f"set a tap's offloads to {flags:#x}: {error.strerror}") from error

    def use_pairs(self, count: int) -> None:
        """The kernel spreads flows over the queues that are attached."""
        if len(self.links) == 1:
            return
        for index in range(min(count, self._attached), max(count, self._attached)):
            flag = _IFF_ATTACH_QUEUE if index < count else _IFF_DETACH_QUEUE
            try:
                fcntl.ioctl(self.links[index].fileno(), TUNSETQUEUE, struct.pack("16xH22x", flag))
            except OSError as error:
                raise BackendError(f"use {count} queues of a tap: {error.strerror}") from error
        self._attached = count
