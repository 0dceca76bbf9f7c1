"""A busy queue is looked at before it is waited for; an idle one is not."""

import asyncio
import struct
import threading
import time
from pathlib import Path

from propolis.backends._iopool import IoPool
from tests.driver import until
from tests.unit.devices.virtio.disk import IN, SECTOR, Disk, make_disk
from tests.unit.devices.virtio.rig import MakeRig

LONG = 20_000  # microseconds: longer than anything else on this host takes
REQUESTS = 200


class Guest(threading.Thread):
    """A driver on a thread of its own, as a vCPU is: one request after the other, kicks where they are asked for."""

    def __init__(self, disk: Disk) -> None:
        super().__init__(name="guest")
        self.disk = disk
        self.ring = disk.queue
        ram = disk.rig.ram
        self.buffers = [ram.put(struct.pack("<IIQ", IN, 0, 8))], [(ram.take(SECTOR), SECTOR), ram.put(b"\xee")]
        self.notify = self.ring.notify_address()
        self.kicks = 0
        self.failure = ""

    def run(self) -> None:
        for number in range(REQUESTS):
            self.ring.add(*self.buffers)
            if self.ring.avail_event == (self.ring.next_avail - 1) & 0xFFFF:
                self.kicks += 1
                self.disk.driver.vm.mmio.write(self.notify, 2, 0)
            deadline = time.monotonic() + 10
            while not self.ring.used():
                if time.monotonic() > deadline:
                    self.failure = f"request {number} did not come back"
                    return
                time.sleep(0)


async def driven(disk: Disk) -> Guest:
    guest = Guest(disk)
    guest.start()
    await until(lambda: not guest.is_alive(), "the end of the guest")
    guest.join()
    assert guest.failure == ""
    assert disk.rig.vm.memory.read(*guest.buffers[1][0]) == disk.image()[8 * SECTOR : 9 * SECTOR]
    return guest


async def test_a_busy_queue_needs_no_kicks(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img", poll_us=LONG)
    guest = await driven(disk)
    stats = disk.device.stats()
    assert stats["reads"] == REQUESTS
    assert stats["polled"] > 0
    assert guest.kicks < REQUESTS // 2


async def test_polling_can_be_switched_off(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img", poll_us=0)
    guest = await driven(disk)
    stats = disk.device.stats()
    assert (stats["reads"], stats["polled"]) == (REQUESTS, 0)
    assert guest.kicks > 0


async def test_an_idle_queue_is_left_alone(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    """Nothing runs on the loop once the moment is over."""
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img", poll_us=1000)
    for _ in range(10):
        await disk.do(IN, 0, room=SECTOR)
    await asyncio.sleep(0.02)
    sleeps = disk.device.stats()["sleeps"]
    cpu = time.thread_time()
    await asyncio.sleep(0.3)
    assert disk.device.stats()["sleeps"] == sleeps
    assert time.thread_time() - cpu < 0.1


async def test_others_have_their_turn(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    """A queue that is looked at for long does not keep the loop."""
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img", poll_us=1_000_000)
    for _ in range(5):
        await disk.do(IN, 0, room=SECTOR)
    sleeps = disk.device.stats()["sleeps"]
    start = time.monotonic()
    for _ in range(50):
        await asyncio.sleep(0)
    assert time.monotonic() - start < 1
    assert disk.device.stats()["sleeps"] == sleeps  # it was never asleep meanwhile
    disk.device.pause()
    await disk.device.drained()
