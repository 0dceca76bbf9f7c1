"""Where a function sits on the PCI bus."""

from __future__ import annotations

import msgspec


class PciPath(msgspec.Struct, frozen=True, order=True):
    """Where a function sits on the PCI bus, written "bus.device.function" in decimal."""

    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> PciPath:
        """Read "0.4.0"; ValueError says what was expected."""
        parts = text.split(".")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() and len(part) <= 3 for part in parts):
            raise ValueError('expected a PCI path "bus.device.function" in decimal, such as "0.4.0"')
        path = cls(*map(int, parts))
        if wrong := path.range_problem():
            raise ValueError(wrong)
        return path

    def range_problem(self) -> str | None:
        """What is wrong with the numbers themselves, if anything."""
        if self.bus != 0:
            return f"PCI bus {self.bus} does not exist: expected bus 0"
        if not 0 <= self.device <= 31:
            return f"PCI device {self.device} does not exist: expected 0 to 31"
        if not 0 <= self.function <= 7:
            return f"PCI function {self.function} does not exist: expected 0 to 7"
        return None

    def __str__(self) -> str:
        return f"{self.bus}.{self.device}.{self.function}"
