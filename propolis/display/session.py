"""One client of a screen: RFB from its first byte to its last, over whatever carries bytes."""

from __future__ import annotations

import asyncio
import zlib
from typing import TYPE_CHECKING, Protocol

from propolis.display import keysyms, rfb
from propolis.display._encode import Format, raw, zrle
from propolis.display._surface import Surface, View
from propolis.display.rfb import ClientMessage, Encoding, ProtocolError, Region, Security
from propolis.display.screen import MAX_CLIENTS
from propolis.errors import StateError

if TYPE_CHECKING:
    from propolis.display.screen import Screen

HANDSHAKE_SECONDS = 20.0
MESSAGE_SECONDS = 30.0  # for the rest of a message once it has begun
PIECE = 65536  # bytes that are made before the client has to take some
_LEVEL = 3  # of compression: higher ones take more time than they save
_LEFT, _RIGHT, _MIDDLE = 1, 2, 4  # of a PS/2 mouse
_BUTTONS = {0: _LEFT, 1: _MIDDLE, 2: _RIGHT}  # by RFB's
_WHEEL = {3: -1, 4: 1}


class Stream(Protocol):
    """What carries the bytes. Raises EOFError or OSError where it does not any more."""

    async def readexactly(self, count: int, /) -> bytes: ...
    def write(self, data: bytes, /) -> None: ...
    async def drain(self) -> None:
        """Returns once the client has taken enough that more may be made."""


class Session:
    """Nobody is asked for a password: who may connect is for whoever hands over the stream to know."""

    def __init__(
        self,
        screen: Screen,
        stream: Stream,
        *,
        patience: float = MESSAGE_SECONDS,
    ) -> None:
        self._screen = screen
        self._stream = stream
        self._patience = patience
        self._format = rfb.pixel_format(rfb.NATIVE)
        self._encoding = Encoding.RAW
        self._may_resize = False
        # A stream of compression for each encoding, which lasts as long as the client.
        self._deflate = {encoding: zlib.compressobj(_LEVEL) for encoding in (Encoding.ZLIB, Encoding.ZRLE)}
        self._width, self._height = screen.size  # of the client's framebuffer
        self._view: View | None = None
        self._wanted: Region | None = None
        self._is_asked = asyncio.Event()
        self._announces_keys = False  # the client is to be told that it may send numbers of keys
        self._down: set[int] = set()  # keys, by number
        self._has_caps_lock = False
        self._pointer: tuple[int, int] | None = None
        self._buttons = 0

    async def run(self) -> str:
        """Until the client leaves or is sent away; returns why."""
        if self._screen.closed.is_set():
            return "the VM's screen is gone"
        self._screen.clients += 1
        tasks = [asyncio.create_task(work) for work in (self._serve(), self._screen.closed.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._screen.clients -= 1
            for task in tasks:
                task.cancel()
            why, _ = await asyncio.gather(*tasks, return_exceptions=True)
            self._let_go()
        if isinstance(why, asyncio.CancelledError):
            return "the VM's screen is gone"
        if isinstance(why, (ProtocolError, StateError)):
            return str(why)
        if isinstance(why, TimeoutError):
            return "the client is too slow"
        if isinstance(why, BaseException) and not isinstance(why, (EOFError, OSError)):
            raise why
        return "the client left"

    async def _serve(self) -> None:
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            await self._greet()
        tasks = [asyncio.create_task(work) for work in (self._listen(), self._show())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _let_go(self) -> None:
        """What the client held down is not held any more."""
        for number in self._down:
            self._screen.key(number, False)
        self._down.clear()
        if self._buttons:
            self._screen.move(0, 0, 0, 0)

    # -- the beginning -------------------------------------------------------------------------------------------------

    async def _greet(self) -> None:
        await self._send(rfb.VERSION)
        minor = rfb.version(await self._stream.readexactly(rfb.VERSION_BYTES))
        if self._screen.clients > MAX_CLIENTS:
            reason = f"{MAX_CLIENTS} clients look at this screen already"
            await self._send((bytes(4) if minor == 3 else bytes(1)) + rfb.refusal(reason))
            raise ProtocolError(reason)
        wanted = Security.NONE
        if minor == 3:
            await self._send(wanted.to_bytes(4, "big"))
        else:
            await self._send(rfb.security_types([wanted]))
            chosen = (await self._stream.readexactly(1))[0]
            if chosen != wanted:
                await self._refuse(minor, f"security type {chosen} was not offered")
        if minor == 8:
            await self._send(bytes(4))
        await self._stream.readexactly(1)  # whether others may stay: they may
        self._width, self._height = self._screen.size
        await self._send(rfb.server_init(self._width, self._height, self._screen.name))

    async def _refuse(self, minor: int, reason: str) -> None:
        await self._send((1).to_bytes(4, "big") + (rfb.refusal(reason) if minor == 8 else b""))
        raise ProtocolError(reason)

    async def _send(self, data: bytes) -> None:
        self._stream.write(data)
        async with asyncio.timeout(self._patience):
            await self._stream.drain()

    # -- what the client says ------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        while True:
            kind = (await self._stream.readexactly(1))[0]
            async with asyncio.timeout(MESSAGE_SECONDS):
                await self._hear(kind)

    async def _hear(self, kind: int) -> None:
        read = self._stream.readexactly
        match kind:
            case ClientMessage.SET_PIXEL_FORMAT:
                self._format = rfb.pixel_format((await read(3 + rfb.PIXEL_FORMAT_BYTES))[3:])
                self._forget()
            case ClientMessage.SET_ENCODINGS:
                count = int.from_bytes((await read(3))[1:], "big")
                self._take_encodings(rfb.encodings(await read(4 * count)))
            case ClientMessage.UPDATE_REQUEST:
                self._ask(*rfb.update_request(await read(rfb.UPDATE_REQUEST_BYTES)))
            case ClientMessage.KEY:
                self._type(*rfb.key(await read(rfb.KEY_BYTES)))
            case ClientMessage.POINTER:
                self._point(*rfb.pointer(await read(rfb.POINTER_BYTES)))
            case ClientMessage.CUT_TEXT:
                await self._skip(int.from_bytes((await read(7))[3:], "big"))
            case ClientMessage.QEMU:
                if (kind := (await read(1))[0]) != 0:
                    raise ProtocolError(f"message 255, {kind} is not spoken here")
                is_press, keysym, number = rfb.extended_key(await read(rfb.EXTENDED_KEY_BYTES))
                if 0 < number < 256:
                    self._press(number, is_press)
                else:
                    self._type(is_press, keysym)
            case _:
                raise ProtocolError(f"message {kind} is not spoken here")

    async def _skip(self, length: int) -> None:
        """Text for a clipboard. Its end is awaited, its bytes are not kept."""
        if length > rfb.MAX_CUT_TEXT:
            raise ProtocolError(f"a text of {length} bytes for the clipboard")
        while length:
            length -= len(await self._stream.readexactly(min(length, PIECE)))

    def _take_encodings(self, wanted: tuple[int, ...]) -> None:
        usable = (Encoding.ZRLE, Encoding.ZLIB, Encoding.RAW)
        self._encoding = next((Encoding(each) for each in wanted if each in usable), Encoding.RAW)
        self._may_resize = Encoding.DESKTOP_SIZE in wanted
        self._announces_keys = Encoding.QEMU_EXTENDED_KEY in wanted

    def _ask(self, is_incremental: bool, region: Region) -> None:
        if not is_incremental and self._view is not None:
            self._view.forget(*region)
        self._wanted = region if self._wanted is None else self._wanted.union(region)
        self._is_asked.set()

    def _forget(self) -> None:
        if self._view is not None:
            self._view.forget(0, 0, self._view.surface.width, self._view.surface.height)

    def _type(self, is_press: bool, keysym: int) -> None:
        """A key by what it means. On a US keyboard it may take a shift that the client's did not."""
        number, takes_shift = keysyms.KEYS.get(keysym, (0, None))
        if number == 0:
            return
        if keysym == keysyms.CAPS_LOCK and is_press:
            self._has_caps_lock = not self._has_caps_lock
        if takes_shift and self._has_caps_lock and chr(keysym).isalpha():
            takes_shift = False
        shifts = [held for keysym in keysyms.SHIFTS if (held := keysyms.KEYS[keysym][0]) in self._down]
        if is_press and takes_shift and not shifts:
            self._press(keysyms.SHIFT, True)
            self._press(number, True)
            self._press(keysyms.SHIFT, False)
        else:
            self._press(number, is_press)

    def _press(self, number: int, is_press: bool) -> None:
        (self._down.add if is_press else self._down.discard)(number)
        self._screen.key(number, is_press)
        self._screen.wake()

    def _point(self, buttons: int, x: int, y: int) -> None:
        """The client's pointer has a place, the guest's mouse only moves."""
        before = self._pointer or (x, y)
        self._pointer = x, y
        down = sum(its for bit, its in _BUTTONS.items() if buttons >> bit & 1)
        turn = sum(way for bit, way in _WHEEL.items() if (buttons & ~self._buttons) >> bit & 1)
        self._buttons = buttons
        self._screen.move(x - before[0], before[1] - y, turn, down)
        self._screen.wake()

    # -- what the client sees ------------------------------------------------------------------------------------------

    async def _show(self) -> None:
        while True:
            await self._is_asked.wait()
            surface = await self._screen.look()
            if self._view is None or self._view.surface is not surface:
                self._view = View(surface)
            if self._announces_keys:
                self._announces_keys = False
                self._take_wanted()
                nothing = rfb.rectangle(Region(0, 0, 0, 0), Encoding.QEMU_EXTENDED_KEY)
                await self._send(rfb.update(1) + nothing)
            elif self._may_resize and (self._width, self._height) != (surface.width, surface.height):
                self._width, self._height = surface.width, surface.height
                self._take_wanted()
                size = rfb.rectangle(Region(0, 0, self._width, self._height), Encoding.DESKTOP_SIZE)
                await self._send(rfb.update(1) + size)
            elif rectangles := self._unsent(self._view):
                self._take_wanted()
                await self._send_rectangles(surface, rectangles)

    def _take_wanted(self) -> None:
        self._wanted = None
        self._is_asked.clear()

    def _unsent(self, view: View) -> list[Region]:
        """What to send of what is wanted, as far as it lies within the client's framebuffer."""
        if self._wanted is None:
            return []
        found = []
        for x, y, width, height in view.unsent(*self._wanted):
            width, height = min(width, self._width - x), min(height, self._height - y)
            if width > 0 and height > 0:
                found.append(Region(x, y, width, height))
        return found

    async def _send_rectangles(self, surface: Surface, rectangles: list[Region]) -> None:
        """One at a time: what waits for a slow client is never more than a piece."""
        assert self._view is not None
        view, encoding, form = self._view, self._encoding, self._format
        waiting = [rfb.update(len(rectangles))]
        size = 0
        for region in rectangles:
            view.note_sent(*region)
            content = await self._screen.run(lambda region=region: self._encode(surface, region, encoding, form))  # type: ignore[misc]  # a lambda with a default
            waiting += [rfb.rectangle(region, encoding), content]
            size += len(content)
            if size >= PIECE:
                await self._send(b"".join(waiting))
                waiting, size = [], 0
        await self._send(b"".join(waiting))

    def _encode(self, surface: Surface, region: Region, encoding: Encoding, form: Format) -> bytes:
        """On the screen's thread."""
        if encoding is Encoding.RAW:
            return raw(surface, *region, form)
        content = (zrle if encoding is Encoding.ZRLE else raw)(surface, *region, form)
        deflate = self._deflate[encoding]
        packed = deflate.compress(content) + deflate.flush(zlib.Z_SYNC_FLUSH)
        return len(packed).to_bytes(4, "big") + packed
