"""The small virtio devices of a VM, as its Spec has them. Each says by itself what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from propolis.pci_path import PciPath  # noqa: TC001 -- msgspec reads it

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_RANDOM_RATE = 1 << 30
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


SmallDevice = VirtioRng | VirtioSocket


def _path_problem(path: str) -> str | None:
    if path and "\0" not in path and not path.endswith("/"):
        return None
    return "expected the path of a socket"
