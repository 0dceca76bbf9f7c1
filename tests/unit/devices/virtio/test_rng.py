"""virtio-rng from the driver's side: numbers, the limit, and drivers that mean no good."""

import random
import time

import pytest

from propolis.devices.virtio.rng import MAX_BYTES, VirtioRng
from tests.driver import NEEDS_RESET, NEXT, WRITE, until
from tests.unit.devices.virtio.hammer import hammer
from tests.unit.devices.virtio.rig import MakeRig, Rig


async def make(make_rig: MakeRig, *, limit: int | None = None) -> Rig:
    rig = await make_rig(lambda vm: VirtioRng(vm, "rng", bytes_per_second=limit))
    rig.driver.begin()
    return rig


async def ask(rig: Rig, *sizes: int) -> list[bytes]:
    """One request for each size, all at once: what came."""
    queue = rig.driver.queues[0]
    places = {queue.add([], [(at, size)]): at for size in sizes if (at := rig.ram.take(size))}
    queue.kick()
    done = dict(await queue.wait(len(sizes)))
    return [rig.vm.memory.read(at, done[head]) for head, at in places.items()]


async def test_numbers(make_rig: MakeRig) -> None:
    rig = await make(make_rig)
    first, second = await ask(rig, 64, 64)
    assert len(first) == len(second) == 64
    assert first != second
    assert rig.driver.messages() == [0]
    assert rig.device.stats()["random_bytes"] == 128


async def test_a_request_of_any_length_costs_a_page(make_rig: MakeRig) -> None:
    """A chain of gigabytes, as of the same buffer many times, is answered with what one request may have."""
    rig = await make(make_rig)
    queue = rig.driver.queues[0]
    at = rig.ram.take(1 << 20)
    head = queue.add([], [(at, 1 << 20)] * 60)
    queue.kick()
    assert await queue.wait() == [(head, MAX_BYTES)]
    assert rig.vm.memory.read(at + MAX_BYTES, 64) == bytes(64)


async def test_a_request_without_room_gets_nothing(make_rig: MakeRig) -> None:
    rig = await make(make_rig)
    queue = rig.driver.queues[0]
    head = queue.add([rig.ram.put(b"read me")])
    queue.kick()
    assert await queue.wait() == [(head, 0)]
    assert [len(data) for data in await ask(rig, 16)] == [16]


async def test_what_is_readable_stays_as_it_is(make_rig: MakeRig) -> None:
    rig = await make(make_rig)
    queue = rig.driver.queues[0]
    given, room = rig.ram.put(b"mine"), rig.ram.take(16)
    head = queue.add([given], [(room, 16)])
    queue.kick()
    assert await queue.wait() == [(head, 16)]
    assert rig.vm.memory.read(*given) == b"mine"


async def test_the_limit(make_rig: MakeRig) -> None:
    """A second's worth at once, and then no more than the limit; nobody is woken while nobody waits."""
    rig = await make(make_rig, limit=2000)
    assert [len(data) for data in await ask(rig, 1500)] == [1500]
    start = time.monotonic()
    got = sum(len(data) for data in await ask(rig, *[64] * 20))
    took = time.monotonic() - start
    assert got >= 64
    assert got <= 500 + took * 2000 + 64
    assert rig.device.stats()["limit_waits"] >= 1
    await until(lambda: rig.device._timer is None, "the end of the wait")


@pytest.mark.parametrize("how", ["reset", "pause", "halt"])
async def test_a_wait_for_the_limit_holds_nothing_up(make_rig: MakeRig, how: str) -> None:
    rig = await make(make_rig, limit=100)
    await ask(rig, 100)
    queue = rig.driver.queues[0]
    queue.add([], [(rig.ram.take(64), 64)])
    queue.kick()
    await until(lambda: rig.device._timer is not None, "a request that waits")
    if how == "reset":
        await rig.driver.reset()
        rig.driver.restart()
    elif how == "pause":
        rig.device.pause()
        await rig.device.drained()
        rig.device.resume()
        assert len(await queue.wait()) == 1
    # and the end of the test halts it


async def test_a_broken_ring(make_rig: MakeRig) -> None:
    """A chain that ends nowhere, then one that is a loop."""
    rig = await make(make_rig)
    for descriptor in ((1 << 40, 64, WRITE, 0), (rig.ram.take(64), 64, WRITE | NEXT, 0)):
        queue = rig.driver.queues[0]
        queue.set_desc(0, *descriptor)
        queue.offer(0)
        queue.kick()
        await until(lambda: rig.driver.status & NEEDS_RESET, "a device that needs a reset")
        await rig.driver.reset()
        rig.driver.restart()
        assert [len(data) for data in await ask(rig, 32)] == [32]


async def test_a_flood_leaves_others_their_turn(make_rig: MakeRig) -> None:
    """A full ring is not answered within one turn of the loop where that is more than a turn's work."""
    rig = await make(make_rig)
    for _ in range(5):
        assert all(len(data) == 4096 for data in await ask(rig, *[4096] * 64))
        rig.ram.next -= 64 * 4096


async def test_random_drivers(make_rig: MakeRig, rounds: int) -> None:
    for seed in [7, *(random.randrange(1 << 32) for _ in range(rounds - 1))]:
        rig = await make_rig(lambda vm: VirtioRng(vm, "rng", bytes_per_second=1 << 30))
        await hammer(rig, seed, {})
