"""Seeded fuzz of a device written in Python: rings that hold together, with whatever may be in them."""

import asyncio
import random
from collections.abc import Callable

from tests.driver import DEVICE, NEEDS_RESET, Buffer, VirtioDriver, until
from tests.unit.devices.virtio.rig import RAM, Rig

Content = Callable[[random.Random], bytes]
TIMES = 150


def anything(chance: random.Random) -> bytes:
    return chance.randbytes(chance.choice((1, 3, 8, 44, 200, 4096)))


async def hammer(rig: Rig, seed: int, contents: dict[int, Content], *, times: int = TIMES) -> None:
    """Chains of all shapes into every queue, `contents` being what each queue may be meant to hold; resets in between.

    The driver's own checks hold: nothing comes back that was not out, or twice. At the end the device still works as
    far as a reset and another start go.
    """
    print(f"seed {seed}")
    chance = random.Random(seed)
    driver = rig.driver
    driver.begin()
    begun = rig.ram.next
    for _ in range(times):
        queue = driver.queues[chance.choice(list(driver.queues))]
        rig.ram.next = max(begun, rig.ram.next if rig.ram.next < RAM // 2 else begun)
        content = chance.choice((contents.get(queue.index, anything), anything))(chance)
        if len(queue.free) > 8:
            queue.add(*_chain(rig, chance, content), indirect=chance.random() < 0.2)
        if chance.random() < 0.02:
            queue.set_desc(chance.randrange(queue.size), chance.randrange(1 << 64), chance.randrange(1 << 32), 1, 3)
        if chance.random() < 0.7:
            queue.kick()
        if chance.random() < 0.1 and DEVICE in driver.structures:
            rig.vm.mmio.write(driver.structures[DEVICE][0] + chance.randrange(64), 4, chance.getrandbits(32))
        await asyncio.sleep(0)
        queue.used()
        if driver.status & NEEDS_RESET or chance.random() < 0.03:
            await restart(rig, driver)
            begun = rig.ram.next
    await restart(rig, driver)
    assert not driver.status & NEEDS_RESET


async def restart(rig: Rig, driver: VirtioDriver) -> None:
    """A reset that ends, and all of the memory is the driver's again."""
    await driver.reset()
    await until(lambda: not rig.device.in_flight(), "the last chain coming back")
    driver.queues.clear()
    rig.ram.next = rig.ram.base
    driver.restart()
    driver.messages()


def _chain(rig: Rig, chance: random.Random, content: bytes) -> tuple[list[Buffer], list[Buffer]]:
    """Readable and writable parts; the content in one to three pieces, or none of it."""
    readable: list[Buffer] = []
    if chance.random() < 0.8:
        address, length = rig.ram.put(content)
        cut = chance.randrange(length)
        readable = [(address, length)] if cut == 0 else [(address, cut), (address + cut, length - cut)]
    sizes = [chance.choice((1, 10, 44, 45, 64, 1500, 5000)) for _ in range(chance.randrange(0 if readable else 1, 4))]
    return readable, [(rig.ram.take(size), size) for size in sizes]
