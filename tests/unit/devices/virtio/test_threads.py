"""vCPU threads against the loop: rings that change while they are read, registers while the device is reset."""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from propolis.backends._iopool import IoPool
from propolis.hypervisor._replay import ReplayVcpu
from tests.driver import COMMON, DRIVER_OK, FEATURES_OK, NEEDS_RESET, NEXT, NOTIFY, WRITE, DriverQueue, until
from tests.unit.devices.virtio.disk import IN, OK, SECTOR, SECTORS, Disk, make_disk
from tests.unit.devices.virtio.rig import RAM, MakeRig, Rig


@contextmanager
def vcpu(rig: Rig, script: list[tuple[object, ...]], rounds: int) -> Iterator[ReplayVcpu]:
    """A vCPU that runs the script on a thread of its own."""
    processor = ReplayVcpu(rig.vm, 0, lambda bits: None, script, rounds)
    thread = threading.Thread(target=processor.run, name="vcpu-0")
    thread.start()
    processor.release()
    try:
        yield processor
    finally:
        processor.stop()
        thread.join()


def initialisation(disk: Disk, ring: DriverQueue) -> list[tuple[object, ...]]:
    """A driver's way to DRIVER_OK without optional features, as steps of a script."""
    common = disk.driver.structures[COMMON][0]
    return [
        *(("write", common + 20, 1, value) for value in (1, 3)),
        *(step for word in range(2) for step in (("write", common + 8, 4, word), ("write", common + 12, 4, word))),
        ("write", common + 20, 1, 3 | FEATURES_OK),
        ("write", common + 22, 2, 0),
        *(("write", common + 32 + 8 * i, 4, at) for i, at in enumerate((ring.desc, ring.avail, ring.used_ring))),
        ("write", common + 28, 2, 1),
        ("write", common + 20, 1, 3 | FEATURES_OK | DRIVER_OK),
    ]


async def test_no_activation_is_lost(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    """The loop may see the event before the vCPU has left the register."""
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img")
    for _ in range(100):
        ring = disk.queue
        await disk.driver.reset()
        disk.rig.vm.memory.write(ring.avail, bytes(4))
        disk.rig.vm.memory.write(ring.used_ring, bytes(4))
        ring.next_avail = ring.next_used = 0
        sent = disk.send(IN, 8, room=SECTOR)
        disk.device.function.doorbells[0].drain()
        with vcpu(disk.rig, [*initialisation(disk, ring), ("write", ring.notify_address(), 2, 0)], 1):
            await ring.wait()
        assert sent.read_status() == OK


@pytest.mark.parametrize("seed", range(3))
async def test_descriptors_that_change_under_us(make_rig: MakeRig, pool: IoPool, tmp_path: Path, seed: int) -> None:
    """VQ 28: the copy that was checked is the one that is used. The disk's file is as it was."""
    print(f"seed {seed}")
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img")
    before = disk.image()
    rand = random.Random(seed)
    queue = disk.queue
    room, header = disk.rig.ram.take(4096), disk.rig.ram.put(IN.to_bytes(16, "little"))
    status = disk.rig.ram.put(b"\xee")
    # A vCPU without a processor cannot write RAM, so a thread of the test does: in one piece, as a guest's store is.
    view = disk.rig.vm.memory.view(queue.desc, 16 * 4)
    stop = threading.Event()

    def meddle() -> None:
        good = bytes(view)
        bad = [
            (value).to_bytes(8, "little")
            for value in (RAM - 1, 2**64 - 16, 0xD000_0000, room, queue.used_ring, 1 << 32, rand.getrandbits(64))
        ]
        while not stop.is_set():
            for i, value in enumerate(bad):
                view[16 * (i % 3) : 16 * (i % 3) + 8] = value
                view[16 * (i % 3) + 8 : 16 * (i % 3) + 16] = value
            view[:] = good

    for _ in range(30):
        queue = disk.queue
        queue.set_desc(0, *header, NEXT, 1)
        queue.set_desc(1, room, SECTOR, WRITE | NEXT, 2)
        queue.set_desc(2, *status, WRITE, 0)
        stop.clear()
        thread = threading.Thread(target=meddle)
        thread.start()
        try:
            for _ in range(20):
                start = queue.used_index
                queue.offer(0)
                queue.kick()
                await until(
                    lambda q=queue, s=start: q.used_index != s or disk.driver.status & NEEDS_RESET,  # type: ignore[misc]
                    "an answer or NEEDS_RESET",
                )
                if disk.driver.status & NEEDS_RESET:
                    break
        finally:
            stop.set()
            thread.join()
        await disk.driver.reset()
        disk.rig.ram.next = queue.desc  # the ring goes where it was
        disk.driver.restart()
        disk.rig.ram.next = 0x200000
    view.release()
    assert (await disk.do(IN, 8, room=SECTOR)).status == OK
    assert len(disk.image()) == len(before) == SECTORS * SECTOR


@pytest.mark.parametrize("seed", range(4))
async def test_registers_while_the_loop_works(make_rig: MakeRig, pool: IoPool, tmp_path: Path, seed: int) -> None:
    """VQ 23, 33 and 34: kicks, resets, whole initialisations and moving BARs from a vCPU, with requests in flight."""
    print(f"seed {seed}")
    rand = random.Random(seed)
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img")
    driver = disk.driver
    ring = disk.queue
    common, notify = driver.structures[COMMON][0], driver.structures[NOTIFY][0]
    function = 0x8000_0000 | driver.slot << 11
    pieces: list[list[tuple[object, ...]]] = [
        [("write", notify, 2, 0)] * 5,
        [("write", common + 20, 1, 0)] + [("read", common + 20, 1)] * 5,
        initialisation(disk, ring),
        [("read", common + 4 * i, 4) for i in range(14)],
        [("out", 0xCF8, 4, function | 4), ("out", 0xCFC, 2, 0), ("out", 0xCFC, 2, 6)],
        [("out", 0xCF8, 4, function | 4), ("out", 0xCFC, 2, 2), ("out", 0xCFC, 2, 6)],
        [("write", common + 24, 2, 8), ("write", common + 28, 2, 1)],
    ]
    script = [step for _ in range(40) for step in rand.choice(pieces)]
    with vcpu(disk.rig, script, 40) as processor:
        for i in range(64):
            disk.send(IN, i, room=SECTOR)
        await until(lambda: processor.is_done, "the end of the script", 60)
    await until(lambda: not disk.device.function.common.is_resetting, "the end of the last reset")
    await driver.reset()
    disk.rig.ram.next = 0x200000
    driver.place_bars()
    driver.restart()
    assert (await disk.do(IN, 8, room=SECTOR)).status == OK
    assert disk.device.in_flight() == 0
