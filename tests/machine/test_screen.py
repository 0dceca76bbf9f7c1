"""A tiny guest that draws on its ramfb and says which keys it got: by screenshot, by RFB on the websocket."""

import asyncio
import io
import struct
from pathlib import Path

import aiohttp
import pytest
from PIL import Image

from tests.machine import kernels, tiny
from tests.machine.test_run_one import SOON, Server, serving

pytestmark = [pytest.mark.kvm, pytest.mark.program]

WIDTH, HEIGHT, STRIDE = 128, 64, 512
PICTURE, CONFIGURATION, COMMAND = 0x20_0000, 0x30_0000, 0x31_0000
FIRST_FILE = 0x20  # which etc/ramfb is where there is no firmware


def _put(address: int, data: bytes) -> bytes:
    """mov dword [address], ...; as often as it takes."""
    return b"".join(b"\xc7\x05" + struct.pack("<I", address + at) + data[at : at + 4] for at in range(0, len(data), 4))


def drawing() -> bytes:
    """Pixel n is n times 0x010203; then shows it, and passes on what the keyboard says to COM1; Escape powers off."""
    fill = bytes.fromhex("31 c9 69 c1 03 02 01 00 ab 41 81 f9") + struct.pack("<I", WIDTH * HEIGHT) + b"\x75\xf0"
    draw = b"\xbf" + struct.pack("<I", PICTURE) + fill
    fourcc = int.from_bytes(b"XR24", "little")
    mode = struct.pack(">QIIIII", PICTURE, fourcc, 0, WIDTH, HEIGHT, STRIDE)
    command = struct.pack(">IIQ", FIRST_FILE << 16 | 0x18, len(mode), CONFIGURATION)
    start = bytes.fromhex("66 ba 18 05 b8") + struct.pack(">I", COMMAND) + b"\xef"  # out dx, eax
    show = _put(CONFIGURATION, mode) + _put(COMMAND, command) + start
    take = bytes.fromhex("e4 60") + kernels.on_key("\x01", kernels.power_off()) + kernels.echo()
    poll = bytes.fromhex("e4 64 a8 01 0f 84") + struct.pack("<I", len(take)) + take
    enable = kernels.out8(0x64, 0xAE)
    return kernels.kernel(draw + show + enable + kernels.say("drawn\r\n") + kernels.forever(poll))


def expected() -> bytes:
    """Blue, green, red, 0."""
    return b"".join((number * 0x010203 & 0xFFFFFF).to_bytes(4, "little") for number in range(WIDTH * HEIGHT))


async def picture(server: Server) -> Image.Image:
    async with asyncio.timeout(SOON), server.client.get(server.url + "/instance/screenshot") as reply:
        assert (reply.status, reply.content_type) == (200, "image/png")
        return Image.open(io.BytesIO(await reply.read()))


class Viewer:
    """RFB over a websocket, by hand."""

    def __init__(self, websocket: aiohttp.ClientWebSocketResponse) -> None:
        self.websocket = websocket
        self._data = b""

    async def read(self, count: int) -> bytes:
        async with asyncio.timeout(SOON):
            while len(self._data) < count:
                message = await self.websocket.receive()
                assert message.type is aiohttp.WSMsgType.BINARY, message
                self._data += message.data
        found, self._data = self._data[:count], self._data[count:]
        return found

    async def write(self, data: bytes) -> None:
        await self.websocket.send_bytes(data)


async def test_what_the_guest_draws_and_hears(tmp_path: Path) -> None:
    async with serving(tmp_path, drawing()) as server:
        await server.create(extensions={"screen": {}})
        with await picture(server) as blank:
            assert blank.size == (640, 480)
        await server.run()
        async with server.console() as console:
            await console.expect(b"drawn\r\n")
            with await picture(server) as shown:
                assert shown.size == (WIDTH, HEIGHT)
                assert (
                    shown.convert("RGB").tobytes()
                    == Image.frombytes("RGB", (WIDTH, HEIGHT), expected(), "raw", "BGRX").tobytes()
                )
            async with server.client.ws_connect(server.url + "/instance/vnc", protocols=["binary"]) as websocket:
                assert websocket.protocol == "binary"
                viewer = Viewer(websocket)
                assert await viewer.read(12) == b"RFB 003.008\n"
                await viewer.write(b"RFB 003.008\n")
                assert await viewer.read(2) == b"\1\1"
                await viewer.write(b"\1\1")
                assert await viewer.read(4 + 4) == bytes(4) + struct.pack(">HH", WIDTH, HEIGHT)
                await viewer.read(16)
                name = await viewer.read(int.from_bytes(await viewer.read(4), "big"))
                assert name
                await viewer.write(struct.pack(">BBHHHH", 3, 0, 0, 0, WIDTH, HEIGHT))
                assert await viewer.read(4 + 12) == struct.pack(">BxHHHHHi", 0, 1, 0, 0, WIDTH, HEIGHT, 0)
                assert await viewer.read(4 * WIDTH * HEIGHT) == expected()
                for is_press in (1, 0):
                    await viewer.write(struct.pack(">BB2xI", 4, is_press, ord("a")))
                await console.expect(b"\x1e\x9e")
            await server.ask("PUT", "/instance/state", "Stop")


async def test_a_standalone_vm_shows_it_on_a_socket(tmp_path: Path) -> None:
    """Which is there as long as the VM, for its user alone."""
    vm = tiny.guest(tmp_path, drawing(), more='[dev.screen]\ndriver = "ramfb"\n')
    socket = tmp_path / "vnc"
    async with vm:
        await vm.expect("drawn", SOON, "the guest has drawn")
        assert socket.stat().st_mode & 0o777 == 0o600
        reader, writer = await asyncio.open_unix_connection(str(socket))
        try:
            assert await reader.readexactly(12) == b"RFB 003.008\n"
            writer.write(b"RFB 003.008\n\1\1")
            assert await reader.readexactly(2 + 4 + 4) == b"\1\1" + bytes(4) + struct.pack(">HH", WIDTH, HEIGHT)
            writer.write(struct.pack(">BBHHHH", 3, 0, 0, 0, WIDTH, HEIGHT))
            await reader.readexactly(16)
            await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big") + 16)
            assert await reader.readexactly(4 * WIDTH * HEIGHT) == expected()
            writer.write(struct.pack(">BB2xI", 4, 1, 0xFF1B))
            assert await vm.exit_status(SOON) == 0
            assert await reader.read() == b""
        finally:
            writer.close()
    assert not socket.exists()
