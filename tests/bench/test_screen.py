"""What a screen of scrolling text costs: 1024 x 768, ten frames a second, to one client."""

import asyncio
import random
import time

import pytest

from tests.bench.report import show
from tests.unit.display.guest import Guest, connect, serve

pytestmark = pytest.mark.bench

WIDTH, HEIGHT, LINE = 1024, 768, 16
FRAMES, RATE = 50, 10
FORMS = {"raw": 0, "zlib": 6, "zrle": 16}


def lines(dice: random.Random) -> list[bytes]:
    """Lines of text as they look: glyphs of 8 x 16 pixels in two colours, a third of each line blank."""
    glyphs = [[dice.getrandbits(8) & dice.getrandbits(8) for _ in range(LINE)] for _ in range(64)]
    ink, paper = (0xAAAAAA).to_bytes(4, "little"), bytes(4)
    cells = [[b"".join(ink if row >> bit & 1 else paper for bit in range(8)) for row in glyph] for glyph in glyphs]
    blank = [paper * 8] * LINE
    found = []
    for _ in range(HEIGHT // LINE + FRAMES):
        text = [dice.choice(cells) for _ in range(WIDTH // 12)]
        text += [blank] * (WIDTH // 8 - len(text))
        found.append(b"".join(b"".join(cell[row] for cell in text) for row in range(LINE)))
    return found


@pytest.mark.parametrize("name", FORMS)
async def test_scrolling_text(name: str) -> None:
    text = lines(random.Random(1))
    shown = HEIGHT // LINE
    guest = Guest()
    guest.show(WIDTH, HEIGHT)
    sizes: list[float] = []
    delays: list[float] = []
    first = read = 0.0
    async with serve(guest) as port, connect(port) as client:
        await client.greet()
        client.encodings(FORMS[name])
        guest.vm.memory.write(0x1000, b"".join(text[:shown]))
        client.ask(0, 0, WIDTH, HEIGHT, incremental=False)
        await client.rectangles()
        client.ask(0, 0, WIDTH, HEIGHT)
        began, cpu = time.monotonic(), time.process_time()
        for frame in range(1, FRAMES + 1):
            await asyncio.sleep(began + frame / RATE - time.monotonic())
            guest.vm.memory.write(0x1000, b"".join(text[frame : frame + shown]))
            drawn = time.monotonic()
            sizes.append(sum(len(content) for *_, content in await client.rectangles()) / 1024)
            read = time.monotonic()
            delays.append(1000 * (read - drawn))
            first = first or read
            client.ask(0, 0, WIDTH, HEIGHT)
        used, took = time.process_time() - cpu, time.monotonic() - began
    what = f"scrolling text, {name}"
    show(f"{what}: frames", [(FRAMES - 1) / (read - first)], "1/s", goal="10")
    show(f"{what}: processor, guest and client included", [100 * used / took], "% of one", goal="50")
    show(f"{what}: from drawn to read", delays, "ms")
    show(f"{what}: size of a frame", sizes, "KiB")
