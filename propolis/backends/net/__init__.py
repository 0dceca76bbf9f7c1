"""Network backends: where the frames of a network card go.

A backend has one link for each pair of the card's queues; the shape of links is in _link.pxd.
"""

from __future__ import annotations

import enum

from propolis.backends.net._link import Link, PacketLink, StreamLink


class Offload(enum.Flag):
    """What of a frame is left to the other side, in one direction."""

    CHECKSUM = enum.auto()
    TCP4 = enum.auto()
    TCP6 = enum.auto()
    ECN = enum.auto()


NO_OFFLOAD = Offload(0)
ALL_OFFLOADS = Offload.CHECKSUM | Offload.TCP4 | Offload.TCP6 | Offload.ECN


class NetBackend:
    """The host's side of a card. Whoever has it closes it."""

    links: list[Link]
    takes: Offload = NO_OFFLOAD  # what a guest may leave undone in frames that it sends
    gives: Offload = NO_OFFLOAD  # what may be left undone in frames for a guest that agrees

    def negotiate(self, guest: Offload) -> None:
        """From now on frames for the guest may lack this, a part of `gives`."""

    def use_pairs(self, count: int) -> None:
        """Only the first links get frames from now on."""

    def reopen(self) -> bool:
        """New links in place of those whose other side is gone; False where there will never be any.

        Raises PropolisError where there are none yet.
        """
        return False

    def close(self) -> None:
        """Twice is fine."""
        for link in self.links:
            link.close()


__all__ = ["ALL_OFFLOADS", "NO_OFFLOAD", "Link", "NetBackend", "Offload", "PacketLink", "StreamLink"]
