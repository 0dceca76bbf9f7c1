"""A card's backend of what its VM's spec says."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Protocol

from propolis import spec as model
from propolis.backends.net.peer import PeerBackend
from propolis.backends.net.tap import TapBackend
from propolis.errors import BackendError

if TYPE_CHECKING:
    from propolis.backends.net import NetBackend


class Opener(Protocol):
    """The keeper."""

    def open_network(self, name: str, network: model.Network, queues: int) -> list[int]: ...


def open_backend(keeper: Opener, name: str, network: model.Network, queues: int) -> NetBackend:
    """Raises BackendError where the host does not give it."""

    def connect() -> int:
        fds = keeper.open_network(name, network, 1)
        for fd in fds[1:]:
            os.close(fd)
        return fds[0]

    if isinstance(network, model.UserNetwork):
        with ExitStack() as failed:
            fd = connect()
            failed.callback(os.close, fd)
            peer = PeerBackend(fd, connect)
            failed.pop_all()
        return peer
    fds = keeper.open_network(name, network, queues)
    with ExitStack() as failed:
        for fd in fds:
            failed.callback(os.close, fd)
        if len(fds) != queues:
            raise BackendError(f"network {name!r}: {len(fds)} queues, not {queues}")
        tap = TapBackend(fds)
        failed.pop_all()
    return tap
