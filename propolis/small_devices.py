"""The small virtio devices of a VM, as its Spec has them. Each says by itself what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from propolis.pci_path import PciPath  # noqa: TC001 -- msgspec reads it

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_RANDOM_RATE = 1 << 30

Wrong = tuple[tuple[str | int, ...], str]  # the field, and what was expected there


class VirtioRng(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="virtio-rng"):
    """The host's random numbers, at most so many bytes each second where there is a limit."""

    name: str
    pci_path: PciPath
    bytes_per_second: int | None = None

    def problems(self) -> Iterator[Wrong]:
        """What is wrong with it."""
        if self.bytes_per_second is not None and not 1 <= self.bytes_per_second <= MAX_RANDOM_RATE:
            yield ("bytes_per_second",), f"expected 1 to {MAX_RANDOM_RATE}, not {self.bytes_per_second}"


SmallDevice = VirtioRng
