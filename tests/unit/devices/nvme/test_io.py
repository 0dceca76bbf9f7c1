"""I/O commands from the driver's side: every one, and every way to ask wrongly."""

import os
import random
import struct
from itertools import pairwise

import pytest

from tests.driver import until
from tests.nvme_driver import (
    CAPACITY,
    COMPARE,
    COMPARE_FAILURE,
    DATASET,
    FLUSH,
    FUA,
    ID_CONFLICT,
    INVALID_FIELD,
    INVALID_NAMESPACE,
    INVALID_OPCODE,
    LBA_RANGE,
    OK,
    PAGE,
    PRP_OFFSET,
    READ,
    READ_ERROR,
    SGL_COUNT,
    SGL_LENGTH,
    SGL_SEGMENT,
    SGL_TYPE,
    TRANSFER_ERROR,
    WRITE,
    WRITE_PROTECTED,
    WRITE_ZEROES,
    command,
)
from tests.unit.devices.nvme.disk import BLOCKS, RAM, ROM_BASE, Disk, MakeDisk

SGL = 1 << 6  # PSDT
DATA, SEGMENT, LAST = 0x00, 0x20, 0x30
DEALLOCATE = 4


def sgl(address: int, length: int, kind: int = DATA) -> bytes:
    return struct.pack("<QI3xB", address, length, kind)


def prps(descriptor: bytes) -> dict[str, int]:
    """A descriptor where the PRPs are."""
    first, second = struct.unpack("<QQ", descriptor)
    return {"prp1": first, "prp2": second, "flags": SGL}


def ranges(*parts: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<IIQ", 0, blocks, lba) for lba, blocks in parts)


# -- what they do ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", [0, 512, 4092])
async def test_read_and_write(disk: Disk, skew: int) -> None:
    for blocks in (1, 7, 8, 9, 16, 300, 2048):
        done, data = await disk.read(BLOCKS - blocks, blocks, skew=skew)
        assert done.status == OK
        assert data == disk.part(BLOCKS - blocks, blocks)
        before = disk.image()
        data = random.Random(blocks).randbytes(blocks * 512)
        assert (await disk.write(0, data, skew=skew)).status == OK
        assert disk.image() == data + before[len(data) :]


async def test_blocks_of_4096_bytes(make_disk: MakeDisk) -> None:
    disk = await make_disk(block_size=4096, blocks=512)
    data = random.Random(3).randbytes(4096 * 256)
    assert (await disk.write(17, data)).status == OK
    done, seen = await disk.read(17, 256)
    assert (done.status, seen) == (OK, data)
    assert disk.part(17, 256) == data
    assert (await disk.driver.io(READ, 511, 2)).status == LBA_RANGE
    assert (await disk.driver.io(READ, 0, 257)).status == INVALID_FIELD  # more than MDTS


async def test_compare(disk: Disk) -> None:
    data = disk.part(100, 300)
    assert (await disk.write(100, data, opcode=COMPARE, skew=512)).status == OK
    done = await disk.write(100, data[:-1] + b"\xff", opcode=COMPARE)
    assert (done.status, done.retry) == (COMPARE_FAILURE, False)
    assert (await disk.write(100, data, opcode=COMPARE, dword12=FUA)).status == OK
    assert disk.part(100, 300) == data


async def test_many_compares_at_once_are_done_one_by_one(disk: Disk) -> None:
    pair, ram = disk.driver.pairs[1], disk.ram
    for i in range(40):
        at, _ = ram.put(disk.part(i, 1), 512)
        pair.submit(COMPARE, prp1=at, dwords=(i + i % 2, 0, 0))
    found = await pair.wait(40)
    assert {done.cid: done.status for done in found} == {i: COMPARE_FAILURE if i % 2 else OK for i in range(40)}


@pytest.mark.parametrize("flags", [0, 1 << 25, FUA])
async def test_write_zeroes(disk: Disk, flags: int) -> None:
    before = disk.image()
    assert (await disk.driver.io(WRITE_ZEROES, 3, 700, dword12=flags)).status == OK
    assert disk.image() == before[: 3 * 512] + bytes(700 * 512) + before[703 * 512 :]


async def test_write_zeroes_of_more_than_the_engine_takes_at_once(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False, block_size=4096, blocks=256)
    disk.device.namespace.resize(300 << 20)
    await disk.driver.begin()
    os.truncate(disk.path, 300 << 20)
    assert (await disk.driver.io(WRITE_ZEROES, 0, 65536, dword12=1 << 25)).status == OK
    assert disk.part(0, 256) == bytes(1 << 20)


@pytest.mark.parametrize("count", [1, 17, 256])
async def test_deallocate(disk: Disk, count: int) -> None:
    """As many ranges as a command may have; blocks read as zeros then."""
    before = disk.image()
    list_at, _ = disk.ram.put(ranges(*((8 * i, 3 if i else 8) for i in range(count))), PAGE)
    done = await disk.driver.pairs[1].do(DATASET, prp1=list_at, dwords=(count - 1, DEALLOCATE))
    assert done.status == OK
    after = disk.image()
    expected = bytearray(before)
    for i in range(count):
        expected[8 * i * 512 : (8 * i + (3 if i else 8)) * 512] = bytes((3 if i else 8) * 512)
    assert after == bytes(expected)


async def test_hints_change_nothing(disk: Disk) -> None:
    before = disk.image()
    list_at, _ = disk.ram.put(ranges((0, BLOCKS)), PAGE)
    assert (await disk.driver.pairs[1].do(DATASET, prp1=list_at, dwords=(0, 3))).status == OK
    assert disk.image() == before


@pytest.mark.parametrize("nsid", [1, 0xFFFF_FFFF])
async def test_flush_and_counters(disk: Disk, nsid: int) -> None:
    assert (await disk.driver.io(FLUSH, nsid=nsid)).status == OK
    await disk.read(0)
    await disk.read(0, dword12=FUA)
    await disk.write(0, bytes(512), dword12=FUA)
    await disk.driver.io(0x99)
    stats = disk.device.stats()
    assert {key: stats[key] for key in ("flushes", "reads", "writes", "others", "errors", "requests", "in_flight")} == {
        "flushes": 1, "reads": 2, "writes": 1, "others": 1, "errors": 1, "requests": 5, "in_flight": 0,
    }  # fmt: skip
    assert (stats["bytes_read"], stats["bytes_written"]) == (1024, 512)


async def test_interrupts_one_for_a_batch(disk: Disk) -> None:
    pair = disk.driver.pairs[1]
    disk.driver.messages()
    assert (await disk.driver.io(FLUSH)).status == OK
    assert disk.driver.messages() == [1]
    for cid in range(20):
        pair.put(command(0x99, 1000 + cid))
    pair.ring()
    assert len(await pair.wait(20)) == 20
    assert disk.driver.messages() == [1]


# -- SGLs --------------------------------------------------------------------------------------------------------------


async def test_sgl_of_every_shape(disk: Disk) -> None:
    memory, ram = disk.vm.memory, disk.ram
    at = ram.take(8 * 512 + 3)
    expected = disk.part(9, 8)
    pair = disk.driver.pairs[1]
    dwords = (9, 0, 7)
    assert (await pair.do(READ, dwords=dwords, **prps(sgl(at + 3, 4096)))).status == OK
    assert memory.read(at + 3, 4096) == expected
    # Pieces of odd sizes, some of nothing, in two segments.
    cuts = [0, 1, 1, 700, 2000, 2001, 4096]
    pieces = [sgl(at + start, end - start) for start, end in pairwise(cuts)]
    last_at, last_length = ram.put(b"".join(pieces[3:]))
    first_at, first_length = ram.put(b"".join([*pieces[:3], sgl(last_at, last_length, LAST)]))
    memory.write(at, bytes(4096))
    assert (await pair.do(READ, dwords=dwords, **prps(sgl(first_at, first_length, SEGMENT)))).status == OK
    assert memory.read(at, 4096) == expected
    # A last segment alone, for a write.
    data = random.Random(5).randbytes(4096)
    memory.write(at, data)
    whole_at, whole_length = ram.put(b"".join(pieces))
    assert (await pair.do(WRITE, dwords=dwords, **prps(sgl(whole_at, whole_length, LAST)))).status == OK
    assert disk.part(9, 8) == data


async def test_wrong_sgls(disk: Disk) -> None:
    ram = disk.ram
    at = ram.take(4096)
    pair = disk.driver.pairs[1]
    before = disk.image()

    def listed(*parts: bytes, kind: int = LAST, length: int | None = None, at: int | None = None) -> bytes:
        where, size = ram.put(b"".join(parts))
        return sgl(where if at is None else at, size if length is None else length, kind)

    half = sgl(at, 256)
    loop_at = ram.take(32)
    disk.vm.memory.write(loop_at, sgl(at, 0) + sgl(loop_at, 32, SEGMENT))
    cases = [
        (sgl(at, 511), SGL_LENGTH),
        (sgl(at, 513), SGL_LENGTH),
        (sgl(at, 0), SGL_LENGTH),
        (sgl(at, 0xFFFF_FFFF), SGL_LENGTH),
        (sgl(RAM - 256, 512), TRANSFER_ERROR),
        (sgl(2**64 - 256, 512), TRANSFER_ERROR),
        (sgl(0xD000_0000, 512), TRANSFER_ERROR),  # our own registers
        (sgl(at, 512, 0x10), SGL_TYPE),  # a bit bucket
        (sgl(at, 512, 0x40), SGL_TYPE),  # keyed
        (sgl(at, 512, 0x01), SGL_TYPE),  # an offset
        (sgl(at, 512, 0xF0), SGL_TYPE),
        (listed(half), SGL_LENGTH),
        (listed(half, half, half), SGL_LENGTH),
        (listed(half, half, length=0), SGL_SEGMENT),
        (listed(half, half, length=31), SGL_SEGMENT),
        (listed(half, half, length=0xFFFF_FFF0), SGL_COUNT),
        (listed(half, half, at=2**64 - 32), TRANSFER_ERROR),
        (listed(half, half, at=RAM - 16), TRANSFER_ERROR),
        (listed(half, sgl(at, 256, SEGMENT)), SGL_COUNT),  # a segment in the last one
        (listed(half, sgl(at, 256, 0x10)), SGL_TYPE),
        (listed(half, sgl(2**63, 256)), TRANSFER_ERROR),
        (listed(sgl(at, 0xFFFF_FFFF), half), SGL_LENGTH),
        (listed(half, half, kind=SEGMENT), SGL_TYPE),  # nothing leads on
        (sgl(loop_at, 32, SEGMENT), SGL_SEGMENT),
        (listed(*[sgl(at, 1)] * 256, sgl(at, 256)), SGL_COUNT),
    ]
    for descriptor, status in cases:
        for opcode in (READ, WRITE):
            done = await pair.do(opcode, dwords=(0, 0, 0), **prps(descriptor))
            assert (done.status, done.retry) == (status, False), (descriptor.hex(), done)
    assert (await pair.do(READ, dwords=(0, 0, 0), flags=3 << 6, prp1=at)).status == INVALID_FIELD
    assert disk.image() == before


# -- hostile: PRPs (73) ------------------------------------------------------------------------------------------------


async def test_wrong_prps(disk: Disk) -> None:
    before = disk.image()
    ram = disk.ram
    page = ram.take(PAGE, PAGE)
    good = disk.driver.prp_list([page] * 255)
    bar = disk.driver.bars[0]
    bent = ram.put(struct.pack("<4Q", page, page + 8, page, page), PAGE)[0]
    holes = ram.put(struct.pack("<4Q", page, 2**63, page, page), PAGE)[0]
    own = ram.put(struct.pack("<4Q", page, bar, bar + 0x1000, page), PAGE)[0]
    loop = ram.take(PAGE, PAGE)
    disk.vm.memory.write(loop + PAGE - 8, struct.pack("<Q", loop + PAGE - 8))
    cases = [
        (1, {"prp1": page + 1}, PRP_OFFSET),
        (1, {"prp1": page + 2}, PRP_OFFSET),
        (1, {"prp1": 2**64 - 4}, TRANSFER_ERROR),
        (1, {"prp1": RAM}, TRANSFER_ERROR),
        (1, {"prp1": bar}, TRANSFER_ERROR),
        (1, {"prp1": bar + 0x1000}, TRANSFER_ERROR),
        (16, {"prp1": page, "prp2": page + 4}, PRP_OFFSET),
        (16, {"prp1": page, "prp2": 2**64 - PAGE}, TRANSFER_ERROR),
        (40, {"prp1": page, "prp2": good + 4}, PRP_OFFSET),
        (40, {"prp1": page, "prp2": bent}, PRP_OFFSET),
        (40, {"prp1": page, "prp2": holes}, TRANSFER_ERROR),
        (40, {"prp1": page, "prp2": own}, TRANSFER_ERROR),
        (40, {"prp1": page, "prp2": bar}, TRANSFER_ERROR),
        (40, {"prp1": page, "prp2": 2**64 - 8}, TRANSFER_ERROR),
        (40, {"prp1": page, "prp2": RAM - 8}, TRANSFER_ERROR),  # goes on where there is nothing
        (40, {"prp1": page, "prp2": loop + PAGE - 8}, INVALID_FIELD),
        (2049, {"prp1": page, "prp2": good}, INVALID_FIELD),  # more than MDTS
        (65536, {"prp1": page, "prp2": good}, INVALID_FIELD),
    ]
    disk.vm.memory.write(RAM - 8, struct.pack("<Q", 2**63))
    for blocks, where, status in cases:
        for opcode in (READ, WRITE, COMPARE):
            done = await disk.driver.io(opcode, 0, blocks, **where)
            assert (done.status, done.retry) == (status, False), (blocks, where, done)
    assert disk.image() == before


async def test_a_list_that_crosses_pages(disk: Disk) -> None:
    """It begins at the end of a page, so that its first entry is where it goes on."""
    ram = disk.ram
    pages = [ram.take(PAGE, PAGE) for _ in range(256)]
    rest = disk.driver.prp_list(pages[1:])
    start = ram.take(PAGE, PAGE)
    disk.vm.memory.write(start + PAGE - 8, struct.pack("<Q", rest))
    done = await disk.driver.io(READ, 0, 2048, prp1=pages[0], prp2=start + PAGE - 8)
    assert done.status == OK
    assert b"".join(disk.vm.memory.read(page, PAGE) for page in pages) == disk.image()


async def test_entry_0_is_the_first_page_of_memory(disk: Disk) -> None:
    """And not a continuation of whatever was there before."""
    page = disk.ram.take(PAGE, PAGE)
    entries = disk.ram.put(struct.pack("<2Q", 0, 0), PAGE)[0]
    assert (await disk.driver.io(READ, 0, 24, prp1=page, prp2=entries)).status == OK
    assert disk.vm.memory.read(page, PAGE) == disk.part(0, 8)
    assert disk.vm.memory.read(0, PAGE) == disk.part(16, 8)


async def test_read_only_memory_is_not_written(disk: Disk) -> None:
    before = disk.vm.memory.read(ROM_BASE, 512)
    assert (await disk.driver.io(READ, 0, 1, prp1=ROM_BASE)).status == TRANSFER_ERROR
    assert disk.vm.memory.read(ROM_BASE, 512) == before
    assert (await disk.driver.io(WRITE, 0, 1, prp1=ROM_BASE)).status == OK
    assert disk.part(0, 1) == before


# -- hostile: blocks and namespaces (75), ranges (78) ------------------------------------------------------------------


async def test_what_is_not_on_the_disk(disk: Disk) -> None:
    before = disk.image()
    page = disk.ram.take(2 * PAGE, PAGE)
    for opcode in (READ, WRITE, COMPARE, WRITE_ZEROES):
        for lba, blocks in (
            (BLOCKS, 1), (BLOCKS - 1, 2), (BLOCKS + 1, 1), (2**55, 1), (2**55 + 1, 1), (2**64 - 1, 1), (2**64 - 1, 2),
            (2**64 - 8, 9), (2**63, 1),
        ):  # fmt: skip
            done = await disk.driver.io(opcode, lba, blocks, prp1=page, prp2=page + PAGE)
            assert (done.status, done.retry) == (LBA_RANGE, False), (opcode, lba, blocks)
        for nsid in (0, 2, 0xFFFF_FFFE, 0xFFFF_FFFF):
            assert (await disk.driver.io(opcode, 0, 1, prp1=page, nsid=nsid)).status == INVALID_NAMESPACE
    assert disk.image() == before


async def test_flush_of_no_namespace(disk: Disk) -> None:
    for nsid in (0, 2, 0xFFFF_FFFE):
        assert (await disk.driver.io(FLUSH, nsid=nsid)).status == INVALID_NAMESPACE


async def test_wrong_ranges(disk: Disk) -> None:
    before = disk.image()
    pair = disk.driver.pairs[1]
    for parts in (
        [(BLOCKS, 1)],
        [(0, BLOCKS + 1)],
        [(1, BLOCKS)],
        [(2**64 - 1, 1)],
        [(2**64 - 1, 2)],
        [(2**55, 1)],
        [(0, 0xFFFF_FFFF)],
        [(0, 8)] * 255 + [(BLOCKS - 1, 2)],
    ):
        at, _ = disk.ram.put(ranges(*parts), PAGE)
        assert (await pair.do(DATASET, prp1=at, dwords=(len(parts) - 1, DEALLOCATE))).status == LBA_RANGE
    assert (await pair.do(DATASET, prp1=RAM, dwords=(255, DEALLOCATE))).status == TRANSFER_ERROR
    assert (await pair.do(DATASET, prp1=3, dwords=(0, DEALLOCATE))).status == PRP_OFFSET
    assert disk.image() == before


async def test_256_times_the_whole_disk(disk: Disk) -> None:
    at, _ = disk.ram.put(ranges(*[(0, BLOCKS)] * 256), PAGE)
    assert (await disk.driver.pairs[1].do(DATASET, prp1=at, dwords=(255, DEALLOCATE))).status == OK
    assert disk.image() == bytes(BLOCKS * 512)
    at, _ = disk.ram.put(ranges(*[(5, 0)] * 256), PAGE)
    assert (await disk.driver.pairs[1].do(DATASET, prp1=at, dwords=(255, DEALLOCATE))).status == OK


async def test_unknown_commands(disk: Disk) -> None:
    for opcode in sorted(set(range(256)) - {FLUSH, WRITE, READ, COMPARE, WRITE_ZEROES, DATASET}):
        done = await disk.driver.io(opcode, nsid=(0, 1, 0xFFFF_FFFF)[opcode % 3])
        assert (done.status, done.retry) == (INVALID_OPCODE, False), hex(opcode)


async def test_fused_commands_and_directives(disk: Disk) -> None:
    page = disk.ram.take(PAGE, PAGE)
    for flags in (1, 2, 3):
        assert (await disk.driver.io(READ, flags=flags, prp1=page)).status == INVALID_FIELD
    assert (await disk.driver.io(WRITE, dword12=1 << 20, prp1=page)).status == INVALID_FIELD


async def test_a_read_only_disk(make_disk: MakeDisk) -> None:
    disk = await make_disk(read_only=True)
    before = disk.image()
    page = disk.ram.put(ranges((0, 8)).ljust(PAGE, b"x"), PAGE)[0]
    assert (await disk.driver.io(WRITE, 0, 1, prp1=page)).status == WRITE_PROTECTED
    assert (await disk.driver.io(WRITE_ZEROES, 0, 1)).status == WRITE_PROTECTED
    assert (await disk.driver.pairs[1].do(DATASET, prp1=page, dwords=(0, DEALLOCATE))).status == WRITE_PROTECTED
    assert (await disk.driver.io(FLUSH)).status == OK
    done, data = await disk.read(4, 4)
    assert (done.status, data) == (OK, disk.part(4, 4))
    assert disk.image() == before


# -- hostile: identifiers (79), queues that are full (81, 82) ----------------------------------------------------------


async def test_the_same_identifier_twice(disk: Disk) -> None:
    """The second is refused, and the first one is still answered."""
    pair = disk.driver.pairs[1]
    for _ in range(2):
        pair.put(command(WRITE_ZEROES, 77, dwords=(0, 0, 7)))  # nothing that is done at once
    pair.ring()
    found = sorted(done.status for done in await pair.wait(2))
    assert found == [OK, ID_CONFLICT]
    pair.put(command(WRITE_ZEROES, 77, dwords=(0, 0, 7)))
    pair.ring()
    assert [(done.cid, done.status) for done in await pair.wait(1)] == [(77, OK)]


async def test_a_full_completion_queue_stalls_and_loses_nothing(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False)
    driver = disk.driver
    driver.place_bars()
    driver.enable_msix()
    await driver.enable()
    pair = await driver.create_pair(1, 64, vector=1, cq_entries=4)
    page = disk.ram.take(PAGE, PAGE)
    for cid in range(50):
        pair.put(command((READ, 0x99, FLUSH)[cid % 3], cid, prp1=page))
    pair.ring()
    seen: list[int] = []

    def is_full() -> bool:
        last = (pair.head + 2) % 4
        phase = pair.phase if last >= pair.head else pair.phase ^ 1
        return bool(pair.memory.read(pair.cq + 16 * last + 14, 1)[0] & 1 == phase)

    for _ in range(20):
        await until(is_full, "a full completion queue")
        await until(lambda: not disk.device.in_flight(), "nothing in flight")
        found = pair.poll()
        assert len(found) == 3  # one entry stays free, §4.1.2
        seen += [done.cid for done in found]
        if len(seen) == 48:
            break
    seen += [done.cid for done in await pair.wait(2)]
    assert sorted(seen) == list(range(50))
    assert (await driver.io(FLUSH)).status == OK


@pytest.mark.parametrize("entries", [2, 3, 17])
async def test_the_phase_turns_with_every_round(make_disk: MakeDisk, entries: int) -> None:
    disk = await make_disk(entries=entries)
    pair = disk.driver.pairs[1]
    for number in range(5 * entries + 1):
        pair.submit(FLUSH)
        [done] = await pair.wait()
        assert (done.cid, done.status, done.sq_head) == (number, OK, pair.tail)


async def test_more_commands_than_are_worked_on_at_once(make_disk: MakeDisk) -> None:
    disk = await make_disk(entries=1024)
    pair = disk.driver.pairs[1]
    pages = disk.ram.take(8 * PAGE, PAGE)
    for cid in range(1000):
        pair.put(command(READ, cid, prp1=pages + PAGE * (cid % 8), dwords=(cid, 0, 0)))
    pair.ring()
    found = await pair.wait(1000)
    assert {done.cid for done in found} == set(range(1000))
    assert {done.status for done in found} == {OK}


# -- what the backend says ---------------------------------------------------------------------------------------------


async def test_the_file_shrinks_under_us(disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    os.truncate(disk.path, 100 * 512 + 7)
    assert (await disk.read(99))[0].status == OK
    done, _ = await disk.read(100)
    assert (done.status, done.retry) == (READ_ERROR, True)
    assert (await disk.write(1000, bytes(512), opcode=COMPARE)).status == READ_ERROR
    assert [record.message for record in caplog.records if "disk error" in record.message] == [
        "disk error: device=nvme0 errno=EIO reason='Input/output error'"
    ]
    assert (await disk.write(1000, b"z" * 512)).status == OK
    assert (await disk.write(1000, b"z" * 512, opcode=COMPARE)).status == OK


async def test_a_full_disk(make_disk: MakeDisk) -> None:
    import resource  # a file size limit is the nearest thing to a full disk that needs no mount

    disk = await make_disk()
    os.truncate(disk.path, 512)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        done = await disk.write(1000, b"z" * 512)
        assert (done.status, done.retry) in ((0x280, True), (CAPACITY, True))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (await disk.write(1000, b"z" * 512)).status == OK


async def test_reads_and_completions_mark_their_pages(disk: Disk) -> None:
    pair = disk.driver.pairs[1]
    room = disk.ram.take(4 * PAGE, PAGE)
    entries = disk.ram.put(struct.pack("<2Q", room + 2 * PAGE, room + PAGE), PAGE)[0]
    disk.vm.memory.track_dirty()
    pair.submit(READ, prp1=room + 512, prp2=entries, dwords=(0, 0, 15))
    await pair.wait()
    pages = {room, room + PAGE, room + 2 * PAGE, pair.cq & -PAGE}
    assert set(disk.vm.memory.take_dirty()) == pages | {pair.sq & -PAGE}  # that one by the driver
