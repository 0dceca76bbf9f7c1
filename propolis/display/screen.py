"""A VM's screen for all its clients: one copy of what the guest shows, and the thread that looks and encodes.

Everything but what `run` is given happens on the loop thread. The thread does one thing at a time, so the copy needs no
lock, and most of its time is spent in compiled code without the GIL.
"""

from __future__ import annotations

import asyncio
import io
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

from propolis.display._surface import Surface
from propolis.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from propolis._memory import GuestMemory

INTERVAL = 1 / 30  # seconds from look to look
IDLE_INTERVAL = 1 / 10  # once nothing has changed for a while
IDLE_LOOKS = 30
BLANK = (640, 480)  # what is shown before the guest shows anything
MAX_CLIENTS = 16

T = TypeVar("T")


class Mode(Protocol):
    """What the guest shows, as far as the screen needs it."""

    @property
    def width(self) -> int: ...
    @property
    def height(self) -> int: ...


class Copy(Protocol):
    """See propolis.devices.ramfb."""

    width: int
    height: int

    def refresh(self, memory: GuestMemory, gpa: int, stride: int) -> bool: ...


class Source(Protocol):
    """The guest's screen."""

    @property
    def mode(self) -> Mode | None: ...
    def copy(self, surface: Copy) -> bool: ...


class Screen:
    """`key` is told of keys by number, `move` of the mouse: see propolis.devices._i8042."""

    def __init__(
        self,
        name: str,
        source: Source,
        key: Callable[[int, bool], None],
        move: Callable[[int, int, int, int], None],
    ) -> None:
        self.name = name
        self.key = key
        self.move = move
        self.clients = 0
        self.closed = asyncio.Event()
        self._source = source
        self._surface = Surface(*BLANK)
        self._thread: ThreadPoolExecutor | None = None
        self._looking: asyncio.Task[Surface] | None = None
        self._next_look = 0.0
        self._looks_in_vain = 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        mode = self._source.mode
        return BLANK if mode is None else (mode.width, mode.height)

    async def run(self, work: Callable[[], T]) -> T:
        """Does this on the screen's thread, after what it has to do already. Raises StateError once it is closed."""
        if self.closed.is_set():
            raise StateError("the VM's screen is gone")
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "screen")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def look(self) -> Surface:
        """The guest's picture as it is now; of several clients that ask, all get the same look."""
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(self._end_look)
        return await asyncio.shield(self._looking)

    def _end_look(self, task: asyncio.Task[Surface]) -> None:
        self._looking = None
        if not task.cancelled():
            task.exception()  # who asked is told of it, if anybody still waits

    async def _look(self) -> Surface:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, self._next_look - loop.time()))
        surface, has_changed = await self.run(self._copy)
        self._surface = surface
        self._looks_in_vain = 0 if has_changed else self._looks_in_vain + 1
        self._next_look = loop.time() + (IDLE_INTERVAL if self._looks_in_vain > IDLE_LOOKS else INTERVAL)
        return surface

    def _copy(self) -> tuple[Surface, bool]:
        """On the screen's thread. A surface of another size is another one: who sends the old one can finish."""
        width, height = self.size
        surface = self._surface
        is_new = (surface.width, surface.height) != (width, height)
        if is_new:
            surface = Surface(width, height)
        return surface, self._source.copy(surface) or is_new

    def wake(self) -> None:
        """Somebody types or points: something will change soon."""
        self._looks_in_vain = 0
        self._next_look = min(self._next_look, asyncio.get_running_loop().time() + INTERVAL)

    async def png(self) -> bytes:
        """The picture as a PNG file."""
        surface = await self.look()
        return await self.run(lambda: _png(surface))

    def stats(self) -> dict[str, int]:
        """How many `clients` there are, and the picture's size."""
        width, height = self.size
        return {"clients": self.clients, "width": width, "height": height}

    async def close(self) -> None:
        """Sends all clients away; twice is fine."""
        self.closed.set()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        if self._thread is not None:
            self._thread.shutdown()  # at most one rectangle's encoding
            self._thread = None


def _png(surface: Surface) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    size = surface.width, surface.height
    Image.frombytes("RGB", size, surface.rgb(), "raw", "BGRX").save(file, "PNG", compress_level=1)
    return file.getvalue()
