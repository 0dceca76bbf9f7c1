"""What systemd is told of this process, and asks of it: sd_notify(3), in a datagram each."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import MutableMapping

log = logging.getLogger(__name__)

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_MAX_SECONDS = 86400.0


class ServiceManager:
    """The service manager that started this process; where there is none, all of it does nothing."""

    def __init__(self, address: str | None, watchdog_seconds: float | None) -> None:
        self.watchdog_seconds = watchdog_seconds
        self._address = address

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Self:
        """What the environment says, which no child of ours is to see."""
        address = environ.get("NOTIFY_SOCKET", "")
        seconds = None
        microseconds = environ.get("WATCHDOG_USEC", "")
        if microseconds.isascii() and microseconds.isdigit() and environ.get("WATCHDOG_PID", _me()) == _me():
            seconds = min(int(microseconds) / 1e6, _MAX_SECONDS) or None
        for name in _VARIABLES:
            environ.pop(name, None)
        return cls(address if address[:1] in ("/", "@") else None, seconds)

    def ready(self, status: str) -> None:
        """It serves."""
        self._tell(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """It reads its configuration again, and says `ready` after that."""
        self._tell(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """It is about to end."""
        self._tell("STOPPING=1")

    async def keep_alive(self) -> None:
        """Shows, as often as is asked for, that the loop turns; without end."""
        if self.watchdog_seconds is None:
            await asyncio.Event().wait()
        while True:
            self._tell("WATCHDOG=1")
            assert self.watchdog_seconds is not None
            await asyncio.sleep(self.watchdog_seconds / 3)

    def _tell(self, message: str) -> None:
        if self._address is None:
            return
        # A name that begins with "@" is an abstract one.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
                channel.sendto(message.encode(), address)
        except OSError as error:
            log.warning("service manager not told", extra={"reason": error.strerror})


def _me() -> str:
    return str(os.getpid())
