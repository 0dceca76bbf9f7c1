"""The small virtio devices of a VM, as its Spec has them. Each says by itself what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from propolis.pci_path import PciPath  # noqa: TC001 -- msgspec reads it

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_RANDOM_RATE = 1 << 30
MAX_CONSOLE_PORTS = 7  # of as many queues as a device may have
MAX_PORT_NAME = 64
_PORT_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")
MIN_GUEST_CID, MAX_GUEST_CID = 3, 0xFFFF_FFFE  # virtio 1.2 §5.10.4: the others have a meaning, or none yet

Wrong = tuple[tuple[str | int, ...], str]  # the field, and what was expected there


class VirtioRng(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="virtio-rng"):
    """The host's random numbers, at most so many bytes each second where there is a limit."""

    name: str
    pci_path: PciPath
    bytes_per_second: int | None = None

    def sockets(self) -> list[str]:
        """The paths at which the host listens: none."""
        return []

    def problems(self) -> Iterator[Wrong]:
        """What is wrong with it."""
        if self.bytes_per_second is not None and not 1 <= self.bytes_per_second <= MAX_RANDOM_RATE:
            yield ("bytes_per_second",), f"expected 1 to {MAX_RANDOM_RATE}, not {self.bytes_per_second}"


class VirtioSocket(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="virtio-socket"):
    """Streams to and from the guest, which is `guest_cid`: the host's side is unix sockets, if it has a `path`."""

    name: str
    pci_path: PciPath
    guest_cid: int
    path: str | None = None

    def sockets(self) -> list[str]:
        """The paths at which the host listens."""
        return [] if self.path is None else [self.path]

    def problems(self) -> Iterator[Wrong]:
        """What is wrong with it."""
        if not MIN_GUEST_CID <= self.guest_cid <= MAX_GUEST_CID:
            yield ("guest_cid",), f"expected {MIN_GUEST_CID} to {MAX_GUEST_CID}, not {self.guest_cid}"
        if self.path is not None and (wrong := _path_problem(self.path)):
            yield ("path",), wrong


class ConsolePort(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A port of a virtio-console, whose client connects to the unix socket `path`; a console is a terminal as well."""

    name: str
    path: str
    is_console: bool = False


class VirtioConsole(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="virtio-console"):
    """Ports by which programs of the guest, found by name, and of the host talk."""

    name: str
    pci_path: PciPath
    ports: tuple[ConsolePort, ...]

    def sockets(self) -> list[str]:
        """The paths at which the host listens."""
        return [port.path for port in self.ports]

    def problems(self) -> Iterator[Wrong]:
        """What is wrong with it."""
        if not 1 <= len(self.ports) <= MAX_CONSOLE_PORTS:
            yield ("ports",), f"expected 1 to {MAX_CONSOLE_PORTS} ports, not {len(self.ports)}"
        names = [port.name for port in self.ports]
        for index, port in enumerate(self.ports):
            if not (0 < len(port.name) <= MAX_PORT_NAME and _PORT_CHARACTERS.issuperset(port.name)):
                yield ("ports", index, "name"), f"expected 1 to {MAX_PORT_NAME} of the characters A-Z a-z 0-9 . _ -"
            elif names.index(port.name) < index:
                yield ("ports", index, "name"), f"a second port is named {port.name!r}"
            if wrong := _path_problem(port.path):
                yield ("ports", index, "path"), wrong


SmallDevice = VirtioRng | VirtioSocket | VirtioConsole


def _path_problem(path: str) -> str | None:
    if path and "\0" not in path and not path.endswith("/"):
        return None
    return "expected the path of a socket"
