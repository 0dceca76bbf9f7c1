"""RFB as clients see it: one that is used by people, and ones that break every rule."""

import asyncio
import random
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable

import asyncvnc
import pytest

from propolis.display.screen import MAX_CLIENTS
from tests.unit.display.guest import Client, Guest, connect, serve
from tests.unit.display.zrle import Layout, decode, decode_raw

RAW, ZLIB, ZRLE, DESKTOP_SIZE, EXTENDED_KEY = 0, 6, 16, -223, -258


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    guest = Guest()
    guest.show(300, 200)
    yield guest
    await guest.close()


async def until(what: str, reached: Callable[[], object], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < deadline, f"missing after {timeout:g} s: {what}"
        await asyncio.sleep(0.005)


# -- a client that is not ours -----------------------------------------------------------------------------------------


async def test_asyncvnc_sees_what_the_guest_draws(guest: Guest) -> None:
    dice = random.Random(1)
    guest.scribble(dice)
    async with serve(guest) as port, asyncvnc.connect("127.0.0.1", port) as client:
        assert (client.video.width, client.video.height, client.video.name) == (300, 200, "guest")
        for _ in range(5):
            for _ in range(3):
                guest.scribble(dice)
            expected = guest.picture()
            client.video.refresh()
            picture = b""
            async with asyncio.timeout(10):
                while picture != expected:
                    if await client.read() is asyncvnc.UpdateType.VIDEO:
                        shown = client.video.data.copy()
                        shown[:, :, 3] = 0
                        picture = shown.tobytes()
                        client.video.refresh()


async def test_asyncvnc_types_and_points(guest: Guest) -> None:
    async with serve(guest) as port, asyncvnc.connect("127.0.0.1", port) as client:
        client.keyboard.write("a!")
        client.keyboard.press("Ctrl", "Del")
        client.mouse.move(10, 10)
        client.mouse.move(15, 7)
        client.mouse.right_click()
        client.mouse.scroll_up()
        await client.drain()
        await until("all moves", lambda: len(guest.moves) == 6)
    shift, a, one, control, delete = 0x2A, 0x1E, 0x02, 0x1D, 0xD3
    assert guest.keys == [
        (a, True), (a, False),
        (shift, True), (one, True), (shift, False), (one, False),
        (control, True), (delete, True), (delete, False), (control, False),
    ]  # fmt: skip
    assert guest.moves == [(0, 0, 0, 0), (5, 3, 0, 0), (0, 0, 0, 2), (0, 0, 0, 0), (0, 0, -1, 0), (0, 0, 0, 0)]


# -- what is sent ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", [RAW, ZLIB, ZRLE])
async def test_encodings(guest: Guest, encoding: int) -> None:
    dice = random.Random(encoding)
    layout = Layout(16, 16, False, 31, 63, 31, 11, 5, 0) if encoding else Layout()
    inflate = zlib.decompressobj()
    shown = [[-1] * 300 for _ in range(200)]
    async with serve(guest) as port, connect(port) as client:
        await client.greet()
        client.encodings(encoding, 12345)
        if encoding:
            client.write(bytes(4) + struct.pack(">BBBBHHHBBB3x", 16, 16, 0, 1, 31, 63, 31, 11, 5, 0))
        for number in range(4):
            guest.scribble(dice)
            client.ask(0, 0, 300, 200, incremental=number > 0)
            for x, y, width, height, kind, content in await client.rectangles():
                assert kind == encoding
                if encoding:
                    content = inflate.decompress(content)
                rows = (
                    decode(content, width, height, layout)[0]
                    if encoding == ZRLE
                    else decode_raw(content, width, height, layout)
                )
                for row, pixels in enumerate(rows):
                    shown[y + row][x : x + width] = pixels
            picture = guest.picture()
            expected = [
                [layout.pixel(int.from_bytes(picture[at : at + 4], "little")) for at in range(row, row + 1200, 4)]
                for row in range(0, len(picture), 1200)
            ]
            assert shown == expected


async def test_only_changes_are_sent(guest: Guest) -> None:
    async with serve(guest) as port, connect(port) as client:
        await client.greet()
        client.ask(0, 0, 300, 200)
        assert sum(width * height for _, _, width, height, _, _ in await client.rectangles()) == 300 * 200
        client.ask(0, 0, 300, 200)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.read(1)
        guest.draw(70, 70, 1, 1, 0xFFFFFF)
        assert [rectangle[:4] for rectangle in await client.rectangles()] == [(64, 64, 64, 64)]
        client.ask(0, 0, 10, 10, incremental=False)
        assert [rectangle[:4] for rectangle in await client.rectangles()] == [(0, 0, 64, 64)]


async def test_another_size(guest: Guest) -> None:
    async with serve(guest) as port, connect(port) as able, connect(port) as unable:
        for client in (able, unable):
            await client.greet()
            client.encodings(RAW, *([DESKTOP_SIZE] if client is able else []))
            client.ask(0, 0, 300, 200)
            await client.rectangles()
            client.ask(0, 0, 300, 200)
        guest.show(400, 100)
        assert await able.rectangles() == [(0, 0, 400, 100, DESKTOP_SIZE, b"")]
        able.ask(0, 0, 400, 100)
        assert [rectangle[:4] for rectangle in await able.rectangles()] == [(0, 0, 400, 64), (0, 64, 400, 36)]
        assert [rectangle[:4] for rectangle in await unable.rectangles()] == [(0, 0, 300, 64), (0, 64, 300, 36)]


async def test_before_the_guest_shows_anything() -> None:
    guest = Guest()
    async with serve(guest) as port, connect(port) as client:
        await client.greet()
        assert (client.width, client.height) == (640, 480)
        client.ask(0, 0, 640, 480)
        assert b"".join(content for *_, content in await client.rectangles()) == bytes(640 * 480 * 4)


async def test_keys_by_number(guest: Guest) -> None:
    """The QEMU extension: the server says that it knows it, and takes a key's number over its keysym."""
    async with serve(guest) as port, connect(port) as client:
        await client.greet()
        client.encodings(ZRLE, EXTENDED_KEY)
        client.ask(0, 0, 300, 200)
        assert await client.rectangles() == [(0, 0, 0, 0, EXTENDED_KEY, b"")]
        for key in ((1, 0xE9, 0x03), (0, 0xE9, 0x03), (1, ord("q"), 0), (1, 0, 0xC8), (1, 0, 0x1C8)):
            client.write(struct.pack(">BBHII", 255, 0, *key))
        await until("all keys", lambda: len(guest.keys) == 4)
        assert guest.keys == [(3, True), (3, False), (0x10, True), (0xC8, True)]
        client.close()
        await until("what was held is let go", lambda: len(guest.keys) == 6)
        assert sorted(guest.keys[4:]) == [(0x10, False), (0xC8, False)]


# -- clients that are not as they should be ----------------------------------------------------------------------------


async def test_a_client_that_reads_nothing_costs_nobody_anything(guest: Guest) -> None:
    guest.show(1024, 768)
    dice = random.Random(3)
    async with serve(guest, patience=0.5) as port, connect(port) as lazy, connect(port) as client:
        await lazy.greet()
        await client.greet()
        deadline = time.monotonic() + 30
        while guest.screen.clients == 2:  # until the kernel's buffers are full, and then for its patience
            assert time.monotonic() < deadline
            guest.scribble(dice)
            lazy.ask(0, 0, 1024, 768, incremental=False)
            client.ask(0, 0, 1024, 768, incremental=False)
            await client.rectangles()
        assert await lazy.rest(1)


async def test_too_many(guest: Guest) -> None:
    async with serve(guest) as port:
        clients: list[Client] = []
        try:
            for _ in range(MAX_CLIENTS):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                clients.append(Client(reader, writer))
                await clients[-1].greet()
            async with connect(port) as late:
                await late.read(12)
                late.write(b"RFB 003.008\n")
                assert b"16 clients" in await late.rest()
        finally:
            for client in clients:
                client.close()


@pytest.mark.parametrize(
    "hello", [b"GET / HTTP/1.", b"RFB 004.001\n", b"RFB 003.0x8\n", b"RFB 003.008 ", bytes(12)], ids=repr
)
async def test_no_version(guest: Guest, hello: bytes) -> None:
    async with serve(guest) as port, connect(port) as client:
        await client.read(12)
        client.write(hello)
        assert await client.rest() == b""


async def test_old_versions(guest: Guest) -> None:
    async with serve(guest) as port:
        async with connect(port) as client:
            await client.read(12)
            client.write(b"RFB 003.003\n")
            assert await client.read(4) == b"\0\0\0\1"
            await client.begin()
        async with connect(port) as client:
            await client.read(12)
            client.write(b"RFB 003.007\n")
            assert await client.read(2) == b"\1\1"
            client.write(b"\1")
            await client.begin()
            assert client.name == "guest"


async def test_a_security_type_that_was_not_offered(guest: Guest) -> None:
    async with serve(guest) as port, connect(port) as client:
        await client.read(12)
        client.write(b"RFB 003.008\n")
        await client.read(2)
        client.write(b"\x10")
        assert await client.read(4) == b"\0\0\0\1"
        assert b"not offered" in await client.rest()


FORMAT = ">B3xBBBBHHHBBB3x"


@pytest.mark.parametrize(
    "message",
    [
        b"\x01", b"\x09", b"\xfe", b"\xff\x01",
        *(struct.pack(FORMAT, 0, bits, 24, 0, 1, 255, 255, 255, 16, 8, 0) for bits in (0, 7, 24, 64)),
        struct.pack(FORMAT, 0, 32, 24, 0, 0, 255, 255, 255, 16, 8, 0),
        struct.pack(FORMAT, 0, 32, 24, 0, 1, 0, 255, 255, 16, 8, 0),
        struct.pack(FORMAT, 0, 32, 24, 0, 1, 255, 255, 255, 200, 8, 0),
        b"\x06\0\0\0" + b"\x7f\xff\xff\xff", b"\x06\0\0\0" + b"\xff\xff\xff\xfc",
    ],
    ids=lambda message: message.hex(),
)  # fmt: skip
async def test_what_may_not_be_said(guest: Guest, message: bytes) -> None:
    async with serve(guest) as port:
        async with connect(port) as client:
            await client.greet()
            client.write(message)
            assert await client.rest() == b""
        async with connect(port) as client:
            await client.greet()


async def test_what_may_be_said_though_nobody_should(guest: Guest) -> None:
    async with serve(guest) as port, connect(port) as client:
        await client.greet()
        client.encodings(*range(2000, 67535))
        client.encodings()
        client.write(b"\x06\0\0\0" + (1 << 20).to_bytes(4, "big") + bytes(1 << 20))
        client.write(b"\x06\0\0\0" + bytes(4))
        client.ask(65535, 65535, 65535, 65535)
        client.ask(0, 0, 0, 0, incremental=False)
        client.write(struct.pack(">B3xI", 4, 0xFFFF_FFFF) * 1000)
        client.write(struct.pack(">BBHH", 5, 255, 65535, 65535) * 1000)
        client.ask(0, 0, 65535, 65535, incremental=False)
        assert sum(width * height for _, _, width, height, _, _ in await client.rectangles()) == 300 * 200


async def test_it_ends_with_the_vm(guest: Guest) -> None:
    async with serve(guest) as port, connect(port) as client:
        await client.greet()
        client.ask(0, 0, 300, 200)
        await guest.screen.close()
        await client.rest()
        async with connect(port) as late:
            assert await late.rest() == b""


@pytest.mark.parametrize("seed", range(3))
async def test_fuzz(seed: int) -> None:
    """Whatever clients say and however the guest changes its screen, the next one is served, and nothing is left."""
    print("seed", seed)
    dice = random.Random(seed)
    guest = Guest()
    async with serve(guest, patience=1) as port:
        for _ in range(40):
            guest.show(dice.randint(1, 500), dice.randint(1, 300))
            guest.scribble(dice)
            async with connect(port) as client:
                if dice.random() < 0.8:
                    await client.greet()
                data = bytearray()
                for _ in range(dice.randrange(20)):
                    kind = dice.choice((0, 2, 3, 3, 3, 4, 5, 6, 255, dice.randrange(256)))
                    size = {0: 19, 2: 7, 3: 9, 4: 7, 5: 5, 6: 7, 255: 11}.get(kind, 3)
                    body = dice.choice((dice.randbytes(size), bytes(size), b"\0\0\1" * size))[:size]
                    if kind == 2:
                        body = b"\0\0\1" + struct.pack(">i", dice.choice((RAW, ZLIB, ZRLE, DESKTOP_SIZE, EXTENDED_KEY)))
                    data += bytes([kind]) + body
                client.write(bytes(data))
                guest.show(dice.randint(1, 500), dice.randint(1, 300))
                with_end = asyncio.create_task(client.rest(dice.choice((1, 100, 10000))))
                await asyncio.wait([with_end], timeout=0.02)
                client.close()
                await asyncio.wait([with_end])
        guest.show(64, 64)
        async with connect(port) as client:
            await client.greet()
            client.ask(0, 0, 64, 64)
            assert len(await client.rectangles()) == 1
        await until("all are gone", lambda: guest.screen.clients == 0)


async def test_a_picture(guest: Guest) -> None:
    import io

    from PIL import Image

    guest.scribble(random.Random(9))
    with Image.open(io.BytesIO(await guest.screen.png())) as image:
        assert image.format == "PNG"
        assert image.size == (300, 200)
        assert image.tobytes() == _rgb(guest)


def _rgb(guest: Guest) -> bytes:
    picture = guest.picture()
    return b"".join(picture[at : at + 3][::-1] for at in range(0, len(picture), 4))
