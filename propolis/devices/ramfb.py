"""ramfb: a framebuffer in the guest's own memory, whose place and shape it writes into the fw_cfg file etc/ramfb."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, NamedTuple, Protocol

from propolis.devices.device import Device

if TYPE_CHECKING:
    from propolis._memory import GuestMemory

FILE = "etc/ramfb"
_CONFIGURATION = struct.Struct(">QIIIII")  # address, fourcc, flags, width, height, stride
SIZE = _CONFIGURATION.size
XRGB8888 = int.from_bytes(b"XR24", "little")  # drm_fourcc.h: bytes blue, green, red, and one that means nothing
MAX_SIDE = 4096  # pixels
MAX_STRIDE = 4 * MAX_SIDE * 4


class Mode(NamedTuple):
    """Where and what the guest shows."""

    gpa: int
    width: int
    height: int
    stride: int  # bytes from row to row


class Copy(Protocol):
    """A picture of this size that is made like what the guest shows."""

    width: int
    height: int

    def refresh(self, memory: GuestMemory, gpa: int, stride: int) -> bool: ...


class Ramfb(Device):
    """The guest's screen. `mode` is None until the guest has set one that can be shown."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__("ramfb")
        self._memory: GuestMemory | None = memory
        self._looking = threading.Lock()  # held while guest memory is read, so that nobody unmaps it then
        self.mode: Mode | None = None
        self.refused = 0

    def configure(self, content: bytes) -> None:
        """The guest wrote the file. One that makes no sense leaves nothing to be shown."""
        self.mode = self._mode(content)
        if self.mode is None and any(content):
            self.refused += 1

    def _mode(self, content: bytes) -> Mode | None:
        if len(content) != SIZE:
            return None
        gpa, fourcc, flags, width, height, stride = _CONFIGURATION.unpack(content)
        stride = stride or 4 * width
        if fourcc != XRGB8888 or flags or not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
            return None
        if not 4 * width <= stride <= MAX_STRIDE or gpa + stride * height > 1 << 64:
            return None
        return Mode(gpa, width, height, stride)

    def copy(self, surface: Copy) -> bool:
        """Looks at the guest's memory for a copy of this mode's size; whether anything had changed. On any thread."""
        with self._looking:
            mode = self.mode
            if self._memory is None or mode is None or (mode.width, mode.height) != (surface.width, surface.height):
                return False
            return surface.refresh(self._memory, mode.gpa, mode.stride)

    def stats(self) -> dict[str, int]:
        """How often the guest asked for what cannot be shown (`refused`)."""
        return {"refused": self.refused}

    def reset(self) -> None:
        self.mode = None

    async def halt(self) -> None:
        """Guest memory goes; a look takes a few milliseconds at most."""
        with self._looking:
            self._memory = None
