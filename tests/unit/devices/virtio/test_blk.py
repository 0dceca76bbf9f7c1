"""virtio-block from the driver's side: every request, and every way to ask wrongly."""

import asyncio
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from propolis.backends._iopool import IoPool
from propolis.backends.block.memory import MemoryBackend
from propolis.devices.virtio.blk import F_DISCARD, F_FLUSH, F_MQ, F_RO, F_WRITE_ZEROES, VirtioBlk
from tests.driver import NEEDS_RESET, until
from tests.unit.devices.virtio.disk import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SECTOR,
    SECTORS,
    UNSUPP,
    WRITE_ZEROES,
    Disk,
    cut,
    extent,
    make_disk,
)
from tests.unit.devices.virtio.rig import MakeRig


@pytest.fixture
async def disk(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> Disk:
    return await make_disk(make_rig, pool, tmp_path / "disk.img")


# -- facts -------------------------------------------------------------------------------------------------------------


async def test_configuration(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img", queues=3)
    read = disk.driver.device_config
    assert disk.driver.config_read(0, 4) == 0x1042_1AF4
    assert disk.driver.config_read(8, 4) == 0x0100_0001
    assert disk.driver.config_read(0x2C, 4) == 0xFFFA_01DE
    assert read(0, 4) | read(4, 4) << 32 == SECTORS
    assert read(12, 4) == 254  # seg_max
    assert read(20, 4) == 512  # blk_size
    assert read(24, 1) == 3  # physical_block_exp
    assert read(34, 2) == 3  # num_queues
    assert read(36, 4) == read(48, 4) == 65536
    assert read(40, 4) == read(52, 4) == 16
    assert read(56, 1) == 1
    assert disk.driver.offered() & (F_FLUSH | F_MQ | F_DISCARD | F_WRITE_ZEROES | F_RO) == (
        F_FLUSH | F_MQ | F_DISCARD | F_WRITE_ZEROES
    )


async def test_read_only_is_offered_and_nothing_that_writes(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img", read_only=True)
    assert disk.driver.offered() & (F_FLUSH | F_RO | F_DISCARD | F_WRITE_ZEROES) == F_FLUSH | F_RO


# -- requests ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 3, 60])
@pytest.mark.parametrize("indirect", [False, True])
async def test_read(disk: Disk, pieces: int, indirect: bool) -> None:
    sent = await disk.do(IN, 8, room=16 * SECTOR, pieces=pieces, indirect=indirect)
    assert (sent.status, sent.written) == (OK, 16 * SECTOR + 1)
    assert sent.data == disk.image()[8 * SECTOR : 24 * SECTOR]


@pytest.mark.parametrize("pieces", [1, 3, 60])
@pytest.mark.parametrize("indirect", [False, True])
async def test_write(disk: Disk, pieces: int, indirect: bool) -> None:
    before = disk.image()
    data = random.Random(1).randbytes(16 * SECTOR)
    sent = await disk.do(OUT, 8, out=data, pieces=pieces, indirect=indirect)
    assert (sent.status, sent.written) == (OK, 1)
    assert disk.image() == before[: 8 * SECTOR] + data + before[24 * SECTOR :]


async def test_254_segments(disk: Disk) -> None:
    data = random.Random(2).randbytes(254 * SECTOR)
    assert (await disk.do(OUT, 0, out=data, pieces=254, indirect=True)).status == OK
    sent = await disk.do(IN, 0, room=254 * SECTOR, pieces=254, indirect=True)
    assert sent.status == OK
    assert sent.data == data


async def test_flush_and_counters(disk: Disk) -> None:
    assert (await disk.do(FLUSH)).status == OK
    await disk.do(IN, 0, room=SECTOR)
    await disk.do(OUT, 0, out=bytes(SECTOR))
    await disk.do(99)
    stats = disk.device.stats()
    assert {key: stats[key] for key in ("flushes", "reads", "writes", "others", "errors", "requests", "in_flight")} == {
        "flushes": 1, "reads": 1, "writes": 1, "others": 1, "errors": 1, "requests": 4, "in_flight": 0,
    }  # fmt: skip
    assert stats["bytes_read"] == stats["bytes_written"] == SECTOR


@pytest.mark.parametrize("room", [0, 1, 19, 20, 21, 512])
async def test_get_id(disk: Disk, room: int) -> None:
    sent = await disk.do(GET_ID, room=room)
    assert sent.status == OK
    assert sent.data[:20] == b"propolis-disk-0".ljust(20, b"\0")[:room]
    assert sent.written == (room + 1 if room <= 20 else 20)


@pytest.mark.parametrize("kind", [2, 3, 5, 7, 9, 10, 12, 14, 26, 0x8000_0000, 0xFFFF_FFFF])
async def test_unknown_requests(disk: Disk, kind: int) -> None:
    assert (await disk.do(kind, out=bytes(32))).status == UNSUPP
    assert (await disk.do(kind, room=32)).status == UNSUPP


async def test_discard_makes_a_hole(disk: Disk) -> None:
    blocks = os.stat(disk.path).st_blocks
    assert (await disk.do(DISCARD, out=extent(0, 512) + extent(1024, 512))).status == OK
    assert os.stat(disk.path).st_blocks < blocks
    image = disk.image()
    assert len(image) == SECTORS * SECTOR
    assert image[: 512 * SECTOR] == image[1024 * SECTOR : 1536 * SECTOR] == bytes(512 * SECTOR)
    assert any(image[512 * SECTOR : 1024 * SECTOR])


@pytest.mark.parametrize("flags", [0, 1])
async def test_write_zeroes(disk: Disk, flags: int) -> None:
    before = disk.image()
    assert (await disk.do(WRITE_ZEROES, out=extent(3, 700, flags))).status == OK
    assert disk.image() == before[: 3 * SECTOR] + bytes(700 * SECTOR) + before[703 * SECTOR :]


async def test_without_flush_writes_are_durable(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    """A driver that knows no FLUSH takes the disk for write-through (§5.2.5.1)."""
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img", begin=False)
    disk.driver.begin(0)
    assert (await disk.do(OUT, 0, out=b"x" * SECTOR)).status == OK
    assert disk.image()[:SECTOR] == b"x" * SECTOR
    assert (await disk.do(DISCARD, out=extent(0, 8))).status == UNSUPP
    assert (await disk.do(WRITE_ZEROES, out=extent(0, 8))).status == UNSUPP


# -- BLK 42 to 49 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sector", "room"),
    [
        (SECTORS, SECTOR),
        (SECTORS - 1, 2 * SECTOR),
        (SECTORS + 1, SECTOR),
        (2**55, SECTOR),  # times 512 wraps to 0
        (2**55 + 1, SECTOR),
        (2**64 - 1, SECTOR),
        (2**64 - 1, 2 * SECTOR),
        (0, 0),
        (0, 1),
        (0, 511),
        (0, 513),
        (0, SECTORS * SECTOR + SECTOR),
    ],
)
async def test_what_is_not_on_the_disk(disk: Disk, sector: int, room: int) -> None:
    before = disk.image()
    assert (await disk.do(IN, sector, room=room)).status == IOERR
    assert (await disk.do(OUT, sector, out=b"x" * room)).status == IOERR
    assert disk.image() == before


async def test_the_whole_disk_at_once(disk: Disk) -> None:
    sent = await disk.do(IN, 0, room=SECTORS * SECTOR)
    assert sent.status == OK
    assert sent.data == disk.image()
    assert (await disk.do(IN, SECTORS - 1, room=SECTOR)).status == OK


@pytest.mark.parametrize("count", [2, 4, 16])
async def test_a_header_in_pieces(disk: Disk, count: int) -> None:
    ram = disk.rig.ram
    room = (ram.take(SECTOR), SECTOR)
    status = ram.put(b"\xee")
    head = disk.queue.add(cut(ram.put(struct.pack("<IIQ", IN, 0, 5)), count), [room, status])
    disk.queue.kick()
    assert await disk.queue.wait() == [(head, SECTOR + 1)]
    assert ram.memory.read(status[0], 1) == b"\0"
    assert ram.memory.read(*room) == disk.image()[5 * SECTOR : 6 * SECTOR]


async def test_header_and_data_in_one_buffer(disk: Disk) -> None:
    ram = disk.rig.ram
    status = ram.put(b"\xee")
    head = disk.queue.add([ram.put(struct.pack("<IIQ", OUT, 0, 7) + b"y" * SECTOR)], [status])
    disk.queue.kick()
    assert await disk.queue.wait() == [(head, 1)]
    assert disk.image()[7 * SECTOR : 8 * SECTOR] == b"y" * SECTOR


async def test_data_and_status_in_one_buffer(disk: Disk) -> None:
    ram = disk.rig.ram
    room = (ram.take(SECTOR + 1), SECTOR + 1)
    head = disk.queue.add([ram.put(struct.pack("<IIQ", IN, 0, 9))], [room])
    disk.queue.kick()
    assert await disk.queue.wait() == [(head, SECTOR + 1)]
    assert ram.memory.read(*room) == disk.image()[9 * SECTOR : 10 * SECTOR] + b"\0"


async def test_status_shares_its_byte_with_the_data(disk: Disk) -> None:
    """The status is written last."""
    ram = disk.rig.ram
    room = ram.take(SECTOR)
    head = disk.queue.add([ram.put(struct.pack("<IIQ", IN, 0, 9))], [(room, SECTOR), (room + 4, 1)])
    disk.queue.kick()
    assert await disk.queue.wait() == [(head, SECTOR + 1)]
    expected = bytearray(disk.image()[9 * SECTOR : 10 * SECTOR])
    expected[4] = 0
    assert ram.memory.read(room, SECTOR) == bytes(expected)


@pytest.mark.parametrize("length", [1, 8, 15])
async def test_a_short_header(disk: Disk, length: int) -> None:
    ram = disk.rig.ram
    status = ram.put(b"\xee")
    disk.queue.add([ram.put(bytes(length))], [status])
    disk.queue.kick()
    await disk.queue.wait()
    assert ram.memory.read(status[0], 1)[0] == IOERR


async def test_no_header(disk: Disk) -> None:
    ram = disk.rig.ram
    status = ram.put(b"\xee")
    disk.queue.add([], [status])
    disk.queue.kick()
    await disk.queue.wait()
    assert ram.memory.read(status[0], 1)[0] == IOERR


@pytest.mark.parametrize("kind", [IN, OUT, FLUSH, GET_ID, 99])
async def test_no_room_for_a_status(disk: Disk, kind: int) -> None:
    before = disk.image()
    disk.queue.add([disk.rig.ram.put(struct.pack("<IIQ", kind, 0, 0) + b"x" * SECTOR)], [])
    disk.queue.kick()
    await until(lambda: disk.driver.status & NEEDS_RESET, "NEEDS_RESET")
    assert disk.image() == before
    assert disk.device.in_flight() == 0
    await disk.driver.reset()
    disk.driver.restart()
    assert (await disk.do(IN, 0, room=SECTOR)).status == OK


async def test_a_read_only_disk_is_not_written(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img", read_only=True, begin=False)
    disk.driver.begin(0)  # ignores F_RO
    before = disk.image()
    assert (await disk.do(OUT, 0, out=b"x" * SECTOR)).status == IOERR
    assert (await disk.do(DISCARD, out=extent(0, 8))).status == IOERR
    assert (await disk.do(WRITE_ZEROES, out=extent(0, 8))).status == IOERR
    assert (await disk.do(FLUSH)).status == OK
    assert (await disk.do(IN, 0, room=SECTOR)).data == before[:SECTOR]
    assert disk.image() == before


@pytest.mark.parametrize(
    ("out", "status"),
    [
        (b"", IOERR),
        (bytes(8), IOERR),
        (extent(0, 8)[:-1], IOERR),
        (extent(0, 8) + b"x", IOERR),
        (extent(0, 0), IOERR),
        (extent(SECTORS, 1), IOERR),
        (extent(SECTORS - 1, 2), IOERR),
        (extent(2**55, 1), IOERR),
        (extent(2**64 - 1, 2), IOERR),
        (extent(0, 2**32 - 1), IOERR),
        (extent(1, SECTORS), IOERR),
        (extent(0, 8) + extent(SECTORS, 1), IOERR),
        (extent(0, 8) * 17, IOERR),
        (extent(0, 8, 2), UNSUPP),
        (extent(0, 8, 0x8000_0000), UNSUPP),
    ],
)
async def test_wrong_extents(disk: Disk, out: bytes, status: int) -> None:
    before = disk.image()
    assert (await disk.do(DISCARD, out=out)).status == status
    assert (await disk.do(WRITE_ZEROES, out=out)).status == status
    assert (await disk.do(DISCARD, out=extent(0, 8, 1))).status == UNSUPP
    assert disk.image() == before


async def test_sixteen_extents(disk: Disk) -> None:
    out = b"".join(extent(64 * i, 8) for i in range(16))
    assert (await disk.do(DISCARD, out=out)).status == OK
    assert (await disk.do(WRITE_ZEROES, out=out)).status == OK


async def test_the_file_shrinks_under_us(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    os.truncate(disk.path, 100 * SECTOR + 7)
    assert (await disk.do(IN, 99, room=SECTOR)).status == OK
    assert (await disk.do(IN, 100, room=SECTOR)).status == IOERR
    assert (await disk.do(IN, 1000, room=8 * SECTOR)).status == IOERR
    assert [record.message for record in caplog.records if "disk error" in record.message] == [
        "disk error: device=disk0 errno=EIO reason='Input/output error'"
    ]
    assert (await disk.do(OUT, 1000, out=b"z" * SECTOR)).status == OK


async def test_a_full_disk(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    import resource  # a file size limit is the nearest thing to a full disk that needs no mount

    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, SECTORS * SECTOR)
    disk = await make_disk(make_rig, pool, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SECTOR, hard))
    try:
        assert (await disk.do(OUT, 1000, out=b"z" * SECTOR)).status == IOERR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert disk.device.stats()["errors"] == 1
    assert (await disk.do(OUT, 1000, out=b"z" * SECTOR)).status == OK


async def test_more_requests_than_the_ring_holds(disk: Disk) -> None:
    """In flight are at most as many as there are descriptors (VQ 29): a head too many is a ring error."""
    for _ in range(64):
        disk.send(IN, 0, room=SECTOR)
    disk.queue.set_word(disk.queue.avail + 2, disk.queue.next_avail + 257)
    disk.queue.kick()
    await until(lambda: disk.driver.status & NEEDS_RESET, "NEEDS_RESET")
    await disk.driver.reset()


# -- dirty pages -------------------------------------------------------------------------------------------------------


async def test_reads_and_status_mark_their_pages(disk: Disk) -> None:
    ram = disk.rig.ram
    room = ram.take(4 * 4096, 4096)
    status = ram.take(4096, 4096)
    header = ram.put(struct.pack("<IIQ", IN, 0, 0), 4096)
    ring = {(disk.queue.used_ring + offset) >> 12 for offset in (0, 2, 4, 12, 4 + 8 * disk.queue.size)}
    disk.queue.add([header], [(room, 512), (room + 4096 + 3584, 1024), (status, 1)])
    ram.memory.track_dirty()
    disk.queue.kick()
    await disk.queue.wait()
    pages = {page >> 12 for page in ram.memory.take_dirty()}
    assert pages == {room >> 12, (room >> 12) + 1, (room >> 12) + 2, status >> 12} | ring
    await disk.do(GET_ID, room=20)
    assert pages.isdisjoint({header[0] >> 12})


# -- reset and pause ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [1, 3, 60])
async def test_reset_with_requests_in_flight(disk: Disk, in_flight: int) -> None:
    for round_ in range(5):
        sent = [disk.send(IN, 8 * i, room=4096) for i in range(in_flight)]
        if round_ % 2:
            await until(lambda: disk.queue.used_index, "the first completion")
        await disk.driver.reset()
        # Nothing is written to guest memory any more: what it frees now, it may use for something else.
        assert disk.device.in_flight() == 0
        memory = disk.rig.vm.memory
        for each in sent:
            memory.write(each.data_at[0], b"\xaa" * each.data_at[1])
        await asyncio.sleep(0.001)
        assert all(each.read() == b"\xaa" * each.data_at[1] for each in sent)
        disk.driver.ram.next = 0x20000
        disk.driver.restart()
        assert (await disk.do(IN, 8, room=SECTOR)).status == OK


async def test_pause_drains_and_resume_catches_up(disk: Disk) -> None:
    early = [disk.send(IN, i, room=SECTOR) for i in range(10)]
    await until(lambda: disk.device.stats()["requests"], "the first request")
    disk.device.pause()
    await disk.device.drained()
    assert disk.device.in_flight() == 0
    done = len(disk.queue.used())
    late = [disk.send(IN, i, room=SECTOR) for i in range(10)]
    await asyncio.sleep(0.005)
    assert disk.queue.used() == []
    disk.device.resume()
    await disk.queue.wait(20 - done)
    assert {each.read_status() for each in early + late} == {OK}


async def test_machine_reset(disk: Disk) -> None:
    for i in range(20):
        disk.send(IN, i, room=SECTOR)
    disk.device.pause()
    await disk.device.drained()
    disk.rig.bus.reset()
    disk.device.reset()
    disk.device.resume()
    disk.driver.place_bars()
    assert disk.driver.status == 0
    disk.driver.restart()
    assert (await disk.do(IN, 8, room=SECTOR)).status == OK


async def test_halt_with_requests_in_flight(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img")
    for i in range(30):
        disk.send(OUT, i, out=bytes([i]) * SECTOR)
    await until(lambda: disk.device.stats()["requests"], "the first request")
    await disk.device.halt()
    assert disk.device.in_flight() == 0


async def test_without_bus_mastering_nothing_happens(disk: Disk) -> None:
    disk.driver.config_write(4, 2, 0x2)
    sent = disk.send(IN, 0, room=SECTOR)
    await asyncio.sleep(0.005)
    assert disk.queue.used_index == 0
    disk.driver.config_write(4, 2, 0x6)
    await disk.queue.wait()
    assert sent.read_status() == OK


# -- integrity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
async def test_random_requests_against_a_model(make_rig: MakeRig, pool: IoPool, tmp_path: Path, seed: int) -> None:
    """Several queues, many requests in flight on regions of their own: file and reads equal the model."""
    print(f"seed {seed}")
    rand = random.Random(seed)
    disk = await make_disk(make_rig, pool, tmp_path / "disk.img", queues=4, queue_size=64)
    model = bytearray(disk.image())
    base = disk.rig.ram.next
    for _ in range(40):
        disk.rig.ram.next = base
        regions = rand.sample(range(SECTORS // 16), 24)
        sent = []
        for region in regions:
            queue = rand.randrange(4)
            count = rand.randrange(1, 17)
            sector = region * 16 + rand.randrange(17 - count)
            span = slice(sector * SECTOR, (sector + count) * SECTOR)
            how: dict[str, Any] = {"queue": queue, "indirect": rand.random() < 0.5, "pieces": rand.randrange(1, 6)}
            kind = rand.choice([IN, IN, OUT, OUT, DISCARD, WRITE_ZEROES, FLUSH])
            if kind == IN:
                sent.append((disk.send(IN, sector, room=count * SECTOR, **how), bytes(model[span])))
            elif kind == OUT:
                data = rand.randbytes(count * SECTOR)
                model[span] = data
                sent.append((disk.send(OUT, sector, out=data, **how), b""))
            elif kind == FLUSH:
                sent.append((disk.send(FLUSH, queue=queue), b""))
            else:
                flags = rand.randrange(2) if kind == WRITE_ZEROES else 0
                model[span] = bytes(count * SECTOR)
                sent.append((disk.send(kind, out=extent(sector, count, flags), queue=queue), b""))
        for index in range(4):
            ring = disk.driver.queues[index]
            await until(lambda r=ring: r.used() is not None and not r.chains, f"queue {index}")  # type: ignore[misc]
        for each, expected in sent:
            assert each.read_status() == OK
            if expected:
                assert each.read() == expected
    assert disk.image() == bytes(model)


async def test_memory_disk(make_rig: MakeRig, pool: IoPool, tmp_path: Path) -> None:
    rig = await make_rig(lambda vm: VirtioBlk(vm, "ram", MemoryBackend(1 << 20, pool, contents=b"boot" * 128)))
    rig.driver.begin()
    disk = Disk(rig, tmp_path)
    assert (await disk.do(IN, 0, room=SECTOR)).data == b"boot" * 128
    assert (await disk.do(OUT, 4, out=b"w" * SECTOR)).status == OK
    assert (await disk.do(IN, 4, room=SECTOR)).data == b"w" * SECTOR


# -- fuzz --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
async def test_fuzzed_requests(disk: Disk, seed: int) -> None:
    """A valid ring with any content: each request is answered once, and the disk never grows."""
    print(f"seed {seed}")
    rand = random.Random(seed)
    ram = disk.rig.ram
    base = ram.next
    for _ in range(100):
        ram.next = base
        count = rand.randrange(1, 12)
        statuses = []
        for _ in range(count):
            kind = rand.choice([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, rand.getrandbits(32)])
            sector = rand.choice([0, 1, SECTORS - 1, SECTORS, rand.getrandbits(64), rand.randrange(SECTORS)])
            header = struct.pack("<IIQ", kind, rand.getrandbits(32), sector)
            body = rand.choice([b"", extent(sector, rand.randrange(9), rand.getrandbits(1)), rand.randbytes(512)])
            room = rand.choice([0, 1, 20, 511, 512, 4096])
            status = ram.put(b"\xee")
            readable = cut(ram.put(header[: rand.choice([16, 16, 16, 9])] + body), rand.randrange(1, 9))
            writable = cut((ram.take(room), room), rand.randrange(1, 3) if room > 1 else room)
            disk.queue.add(readable, [*writable, status], indirect=rand.random() < 0.5)
            statuses.append(status[0])
        disk.queue.kick()
        await disk.queue.wait(count)
        assert {ram.memory.read(at, 1)[0] for at in statuses} <= {OK, IOERR, UNSUPP}
    assert disk.device.in_flight() == 0
    assert os.stat(disk.path).st_size == SECTORS * SECTOR
    assert not disk.driver.status & NEEDS_RESET
