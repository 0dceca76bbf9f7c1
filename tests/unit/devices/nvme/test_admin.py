"""Admin commands from the driver's side: every one, and every way to ask wrongly."""

import asyncio
import random
import struct

import pytest

from tests.driver import until
from tests.nvme_driver import (
    ABORT,
    ABORTED,
    ASYNC_EVENT,
    ASYNC_LIMIT,
    BAD_DELETION,
    BAD_LOG_PAGE,
    BAD_QUEUE,
    BAD_SIZE,
    BAD_VECTOR,
    CC,
    CREATE_CQ,
    CREATE_SQ,
    DELETE_CQ,
    DELETE_SQ,
    ENABLE,
    FLUSH,
    GET_FEATURES,
    ID_CONFLICT,
    IDENTIFY,
    INVALID_FIELD,
    INVALID_NAMESPACE,
    INVALID_OPCODE,
    NO_CQ,
    NOT_CHANGEABLE,
    NOT_SAVEABLE,
    OK,
    PAGE,
    PRP_OFFSET,
    READ,
    READY,
    SET_FEATURES,
    TRANSFER_ERROR,
    WRITE,
    NvmeDriver,
    command,
)
from tests.unit.devices.nvme.disk import BLOCKS, NAMES, RAM, Disk, MakeDisk

KNOWN = (0x00, 0x01, 0x02, 0x04, 0x05, 0x06, 0x08, 0x09, 0x0A, 0x0C, 0x7C)


def word(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")


# -- identify (77) -----------------------------------------------------------------------------------------------------


async def test_identify_controller(disk: Disk) -> None:
    status, data = await disk.driver.identify(1)
    assert status == OK
    assert (word(data, 0, 2), word(data, 2, 2)) == (0x1DE, 0x1DE)
    assert data[4:24] == b"SERIAL-0".ljust(20)
    assert data[24:64] == b"A disk".ljust(40)
    assert data[64:72].strip().decode().isprintable()
    assert data[73:76] == bytes.fromhex("2540a8")
    assert data[77] == 8  # MDTS
    assert word(data, 80, 4) == 0x1_0400
    assert data[111] == 1  # an I/O controller
    assert word(data, 256, 2) == 1 << 8  # OACS: doorbell buffer configuration and nothing else
    assert data[258:263] == bytes([3, 3, 3, 7, 63])
    assert data[512:514] == b"\x66\x44"
    assert word(data, 516, 4) == 1
    assert word(data, 520, 2) == 0x1D  # compare, dataset management, write zeroes, select
    assert data[525] == 7
    assert word(data, 536, 4) == 1
    assert data[768:1024].rstrip(b"\0").decode() == f"nqn.2014-08.org.nvmexpress:uuid:{NAMES.identity}"


@pytest.mark.parametrize(("block_size", "shift"), [(512, 9), (4096, 12)])
async def test_identify_namespace(make_disk: MakeDisk, block_size: int, shift: int) -> None:
    disk = await make_disk(block_size=block_size)
    status, data = await disk.driver.identify(0, 1)
    assert status == OK
    assert [word(data, at, 8) for at in (0, 8, 16)] == [BLOCKS] * 3
    assert data[25:28] == bytes(3)  # one format, no metadata
    assert data[33] == 1 | 1 << 3  # deallocated blocks read as zeros
    assert data[99] == 0
    assert word(data, 64, 2) == 4096 // block_size - 1
    assert data[104:128] == bytes(24)  # neither NGUID nor EUI-64
    assert word(data, 128, 4) == shift << 16


async def test_identify_a_read_only_namespace(make_disk: MakeDisk) -> None:
    disk = await make_disk(read_only=True)
    assert (await disk.driver.identify(0, 1))[1][99] == 1
    assert word((await disk.driver.identify(1))[1], 520, 2) == 0x11


async def test_the_lists(disk: Disk) -> None:
    assert await disk.driver.identify(2, 0) == (OK, struct.pack("<I", 1).ljust(PAGE, b"\0"))
    assert await disk.driver.identify(2, 1) == (OK, bytes(PAGE))
    status, data = await disk.driver.identify(3, 1)
    assert (status, data[:4], data[20:]) == (OK, b"\x03\x10\0\0", bytes(PAGE - 20))
    assert data[4:20] != bytes(16)


async def test_what_cannot_be_identified(disk: Disk) -> None:
    for nsid in (0, 2, 0xFFFF_FFFE, 0xFFFF_FFFF):
        assert (await disk.driver.identify(0, nsid))[0] == INVALID_NAMESPACE
        assert (await disk.driver.identify(3, nsid))[0] == INVALID_NAMESPACE
    assert (await disk.driver.identify(2, 0xFFFF_FFFE))[0] == INVALID_NAMESPACE
    assert (await disk.driver.identify(2, 0xFFFF_FFFF))[0] == INVALID_NAMESPACE
    for what in (4, 5, 6, 8, 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x80, 0xFF):
        assert (await disk.driver.identify(what, 1))[0] == INVALID_FIELD
    page = disk.ram.take(2 * PAGE, PAGE)
    for prp1, prp2, status in (
        (page + 1, 0, PRP_OFFSET),
        (page + 8, page + 8, PRP_OFFSET),
        (RAM, 0, TRANSFER_ERROR),
        (RAM - PAGE + 8, RAM, TRANSFER_ERROR),
        (disk.driver.bars[0], 0, TRANSFER_ERROR),
        (2**64 - PAGE, 0, TRANSFER_ERROR),
    ):
        done = await disk.driver.admin(IDENTIFY, prp1=prp1, prp2=prp2, dwords=(1,))
        assert (done.status, done.retry) == (status, False)
    assert (await disk.driver.admin(IDENTIFY, prp1=page, dwords=(1,), flags=1 << 6)).status == INVALID_FIELD


# -- commands that there are not ---------------------------------------------------------------------------------------


async def test_unknown_commands(disk: Disk) -> None:
    """Format, firmware, security, sanitize and the like: refused, whatever they ask."""
    dice = random.Random(2)
    for opcode in sorted(set(range(256)) - set(KNOWN)):
        done = await disk.driver.admin(opcode, nsid=dice.getrandbits(32), dwords=[dice.getrandbits(32)] * 6)
        assert (done.status, done.retry) == (INVALID_OPCODE, False), hex(opcode)


# -- queues (72) -------------------------------------------------------------------------------------------------------


async def create_cq(
    driver: NvmeDriver, number: int, *, size: int = 16, at: int | None = None, vector: int = 0, flags: int = 3
) -> int:
    """The status."""
    at = driver.ram.take(16 * size, PAGE) if at is None else at
    dwords = (size - 1 << 16 | number, vector << 16 | flags)
    return (await driver.admin(CREATE_CQ, prp1=at, dwords=dwords)).status


async def create_sq(
    driver: NvmeDriver, number: int, cq: int, *, size: int = 16, at: int | None = None, flags: int = 1
) -> int:
    at = driver.ram.take(64 * size, PAGE) if at is None else at
    return (await driver.admin(CREATE_SQ, prp1=at, dwords=(size - 1 << 16 | number, cq << 16 | flags))).status


async def test_queues_that_cannot_be_made(disk: Disk) -> None:
    driver = disk.driver
    bad = (1, RAM, RAM - PAGE, driver.bars[0], 2**64 - PAGE)
    for number in (0, 1, 5, 16, 17, 0xFFFF):
        assert await create_cq(driver, number) == BAD_QUEUE
        assert await create_sq(driver, number, 1) == BAD_QUEUE
    assert await create_cq(driver, 2, size=1) == BAD_SIZE
    assert await create_sq(driver, 2, 1, size=1) == BAD_SIZE
    for at in bad[1:]:
        assert await create_cq(driver, 2, at=at, size=1024) == INVALID_FIELD
        assert await create_sq(driver, 2, 1, at=at, size=1024) == INVALID_FIELD
    for at in (1, 64, 2048):
        assert await create_cq(driver, 2, at=0x8000 + at) == PRP_OFFSET
        assert await create_sq(driver, 2, 1, at=0x8000 + at) == PRP_OFFSET
    assert await create_cq(driver, 2, flags=2) == INVALID_FIELD  # not contiguous
    assert await create_sq(driver, 2, 1, flags=0) == INVALID_FIELD
    for vector in (5, 6, 2048, 0xFFFF):
        assert await create_cq(driver, 2, vector=vector) == BAD_VECTOR
    for cq in (0, 2, 5, 17, 0xFFFF):
        assert await create_sq(driver, 2, cq) == NO_CQ
    for number in (0, 2, 5, 0xFFFF):
        assert (await driver.admin(DELETE_SQ, dwords=(number,))).status == BAD_QUEUE
        assert (await driver.admin(DELETE_CQ, dwords=(number,))).status == BAD_QUEUE
    assert (await driver.admin(DELETE_CQ, dwords=(1,))).status == BAD_DELETION
    assert (await driver.io(FLUSH)).status == OK


async def test_entries_of_other_sizes(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False)
    driver = disk.driver
    driver.place_bars()
    for sizes in (0, 4 << 20, 6 << 16, 4 << 20 | 7 << 16, 5 << 20 | 6 << 16, 0xFF << 16):
        driver.prepare()
        driver.write(CC, sizes | ENABLE)
        await until(lambda: driver.status & READY, "CSTS.RDY")
        assert await create_cq(driver, 1) == INVALID_FIELD
        await driver.disable()


async def test_queues_come_and_go(disk: Disk) -> None:
    driver = disk.driver
    for round_ in range(3):
        pair = await driver.create_pair(2, 8 + round_, vector=2)
        assert (await driver.io(FLUSH, number=2)).status == OK
        assert await create_sq(driver, 3, 2) == OK  # two that complete in one
        assert (await driver.admin(DELETE_SQ, dwords=(2,))).status == OK
        driver.ring(2, 1)
        assert (await driver.admin(DELETE_CQ, dwords=(2,))).status == BAD_DELETION
        assert (await driver.admin(DELETE_SQ, dwords=(3,))).status == OK
        assert (await driver.admin(DELETE_CQ, dwords=(2,))).status == OK
        assert (await driver.admin(DELETE_CQ, dwords=(2,))).status == BAD_QUEUE
        assert pair.poll() == []


async def test_deleted_with_commands_in_flight(disk: Disk) -> None:
    """They are completed first; then nothing more is written."""
    driver = disk.driver
    for _ in range(5):
        pair = await driver.create_pair(2, 64)
        page = disk.ram.take(PAGE, PAGE)
        for cid in range(40):
            pair.put(command(READ, cid, prp1=page, dwords=(cid, 0, 7)))
        pair.ring()
        assert (await driver.admin(DELETE_SQ, dwords=(2,))).status == OK
        found = pair.poll()
        disk.vm.memory.write(page, b"\xaa" * PAGE)
        await asyncio.sleep(0.001)
        assert disk.vm.memory.read(page, PAGE) == b"\xaa" * PAGE
        assert pair.poll() == []
        assert {done.status for done in found} <= {OK}
        assert (await driver.admin(DELETE_CQ, dwords=(2,))).status == OK


async def test_deleted_while_its_completion_queue_is_full(disk: Disk) -> None:
    pair = await disk.driver.create_pair(2, 64, cq_entries=2)
    for cid in range(40):
        pair.put(command(FLUSH, cid))
    pair.ring()
    await until(lambda: pair.memory.read(pair.cq + 14, 1)[0] & 1, "a completion")
    assert (await disk.driver.admin(DELETE_SQ, dwords=(2,))).status == OK
    assert (await disk.driver.admin(DELETE_CQ, dwords=(2,))).status == OK
    pair = await disk.driver.create_pair(2, 64)
    assert (await disk.driver.io(FLUSH, number=2)).status == OK


async def test_a_full_admin_completion_queue_loses_nothing(make_disk: MakeDisk) -> None:
    disk = await make_disk(begin=False)
    driver = disk.driver
    driver.place_bars()
    await driver.enable(8)
    pair = driver.pairs[0]
    seen: list[int] = []
    cid = 0
    for _ in range(6):
        while (pair.tail + 1) % 8 != pair.sq_head and len(seen) + 20 > cid:
            pair.put(command(0xFF, cid))
            cid += 1
        pair.ring()
        await asyncio.sleep(0.003)
        seen += [done.cid for done in pair.poll(acknowledge=False)]
    assert len(seen) == 7  # as many as there is room for
    pair.acknowledge()
    while len(seen) < cid:
        seen += [done.cid for done in await pair.wait(1)]
    assert seen == list(range(cid))


async def test_the_same_identifier_twice(disk: Disk) -> None:
    pair = disk.driver.pairs[0]
    pair.put(command(ASYNC_EVENT, 500))
    pair.put(command(ASYNC_EVENT, 500))
    pair.ring()
    assert [(done.cid, done.status) for done in await pair.wait(1)] == [(500, ID_CONFLICT)]


# -- features (77) -----------------------------------------------------------------------------------------------------

FEATURES = {1: 7, 2: 0, 4: 343, 5: 0, 6: 1, 7: 3 << 16 | 3, 8: 0, 9: 0, 10: 0, 11: 0}


async def test_features(disk: Disk) -> None:
    driver = disk.driver
    for feature, value in FEATURES.items():
        for select in range(3):
            done = await driver.admin(GET_FEATURES, dwords=(select << 8 | feature,))
            assert (done.status, done.result) == (OK, value), feature
        assert (await driver.admin(GET_FEATURES, dwords=(3 << 8 | feature,))).result == 4
        assert (await driver.admin(GET_FEATURES, dwords=(4 << 8 | feature,))).status == INVALID_FIELD
        assert (await driver.admin(SET_FEATURES, dwords=(1 << 31 | feature, 0))).status == NOT_SAVEABLE
    for feature in (0, 3, 12, 13, 14, 0x10, 0x7F, 0x80, 0x82, 0xC0, 0xFF):
        assert (await driver.admin(GET_FEATURES, dwords=(feature,))).status == INVALID_FIELD
        assert (await driver.admin(SET_FEATURES, dwords=(feature, 1))).status == INVALID_FIELD
    for feature, value, kept in (
        (1, 0xFFFF_FFFF, 0xFFFF_FF07), (4, 300, 300), (4, 1 << 20 | 250, 300), (5, 7, 7), (8, 0xABCD, 0xABCD),
        (9, 1 << 16 | 2, 0), (10, 1, 1), (11, 1 << 8, 1 << 8),
    ):  # fmt: skip
        assert (await driver.admin(SET_FEATURES, dwords=(feature, value))).status == OK
        assert (await driver.admin(GET_FEATURES, dwords=(feature,))).result == kept
    assert (await driver.admin(GET_FEATURES, dwords=(4, 1 << 20))).result == 250
    assert (await driver.admin(GET_FEATURES, dwords=(9, 2))).result == 1 << 16 | 2
    await driver.disable()
    await driver.begin()
    assert (await driver.admin(GET_FEATURES, dwords=(8,))).result == 0


async def test_odd_features(disk: Disk) -> None:
    for feature, value, status in (
        (2, 1, INVALID_FIELD),
        (4, 1 << 16, INVALID_FIELD),
        (4, 2 << 20, INVALID_FIELD),
        (5, 1 << 16, NOT_CHANGEABLE),
        (7, 0xFFFF, INVALID_FIELD),
        (7, 0xFFFF << 16, INVALID_FIELD),
        (9, 5, INVALID_FIELD),
        (9, 0xFFFF, INVALID_FIELD),
    ):
        assert (await disk.driver.admin(SET_FEATURES, dwords=(feature, value))).status == status


async def test_the_number_of_queues(disk: Disk) -> None:
    for asked, given in ((0, 0), (1, 1), (3, 3), (4, 3), (0xFFFE, 3)):
        done = await disk.driver.admin(SET_FEATURES, dwords=(7, asked << 16 | asked))
        assert (done.status, done.result) == (OK, given << 16 | given)


# -- the write cache (84) ----------------------------------------------------------------------------------------------


async def test_a_write_cache_that_is_off_is_off(disk: Disk) -> None:
    """From then on each change reaches stable storage before it completes; before that, what was written does."""
    driver, pair = disk.driver, disk.driver.pairs[1]
    page = disk.ram.take(PAGE, PAGE)
    for cid in range(30):
        pair.put(command(WRITE, cid, prp1=page, dwords=(cid, 0, 0)))
    pair.ring()
    assert (await driver.admin(SET_FEATURES, dwords=(6, 0))).status == OK
    assert (await driver.admin(GET_FEATURES, dwords=(6,))).result == 0
    is_off = not disk.device.namespace.write_cache
    assert is_off
    assert len(await pair.wait(30)) == 30
    assert (await disk.write(0, b"x" * 512)).status == OK
    assert (await driver.admin(SET_FEATURES, dwords=(6, 1))).status == OK
    assert disk.device.namespace.write_cache
    assert (await driver.admin(SET_FEATURES, dwords=(6, 0))).status == OK
    await driver.disable()  # the default comes back
    await driver.begin()
    assert (await driver.admin(GET_FEATURES, dwords=(6,))).result == 1


# -- log pages (76) ----------------------------------------------------------------------------------------------------


async def test_smart(disk: Disk) -> None:
    for i in range(7):
        await disk.read(0, 500)
        await disk.write(i, bytes(512))
    await disk.driver.io(0x99)
    for nsid in (0, 1, 0xFFFF_FFFF):
        status, data = await disk.driver.log_page(2, 512, nsid=nsid)
        assert status == OK
        assert (data[0], word(data, 1, 2), data[3], data[5]) == (0, 298, 100, 0)
        assert [word(data, at, 16) for at in (32, 48, 64, 80, 112, 160, 176)] == [4, 1, 7, 7, 1, 0, 1]


async def test_error_information(disk: Disk) -> None:
    assert await disk.driver.log_page(1, 4096) == (OK, bytes(4096))
    await disk.driver.io(READ, BLOCKS, prp1=0)
    await disk.driver.admin(0xFF)
    await disk.driver.io(FLUSH, nsid=9)
    status, data = await disk.driver.log_page(1, 256)
    assert status == OK
    entries = [struct.unpack_from("<QHHHHQI", data, at) for at in range(0, 256, 64)]
    assert [(count, queue, error >> 1 & 0x7FF, lba) for count, queue, _, error, _, lba, _ in entries] == [
        (3, 1, INVALID_NAMESPACE, 0), (2, 0, INVALID_OPCODE, 0), (1, 1, 0x80, BLOCKS), (0, 0, 0, 0),
    ]  # fmt: skip
    for _ in range(100):
        await disk.driver.io(0x99)
    status, data = await disk.driver.log_page(1, 4096)
    assert (status, word(data, 0, 8)) == (OK, 103)


async def test_firmware_and_effects(disk: Disk) -> None:
    status, data = await disk.driver.log_page(3, 512)
    assert (status, data[0]) == (OK, 1)
    assert data[8:16] == (await disk.driver.identify(1))[1][64:72]
    status, data = await disk.driver.log_page(5, 4096)
    assert status == OK
    assert [code for code in range(256) if word(data, 4 * code, 4) & 1] == list(KNOWN)
    assert [code for code in range(256) if word(data, 1024 + 4 * code, 4) & 1] == [0, 1, 2, 5, 8, 9]


async def test_log_pages_from_the_middle_and_past_the_end(disk: Disk) -> None:
    whole = (await disk.driver.log_page(2, 512))[1]
    assert await disk.driver.log_page(2, 32, offset=32) == (OK, whole[32:64])
    assert await disk.driver.log_page(2, 64, offset=480) == (OK, whole[480:].ljust(64, b"\0"))
    assert await disk.driver.log_page(2, 64, offset=512) == (OK, bytes(64))
    assert await disk.driver.log_page(2, 8192) == (OK, whole.ljust(8192, b"\0"))
    for offset in (516, 4096, 2**32, 2**63, 2**64 - 4, 1, 2):
        assert (await disk.driver.log_page(2, 64, offset=offset))[0] == INVALID_FIELD
    page = disk.ram.take(PAGE, PAGE)
    for count in (0x4_0000, 0xFFF_FFFF, 0xFFFF_FFFF):
        dwords = ((count & 0xFFFF) << 16 | 2, count >> 16)
        assert (await disk.driver.admin(2, nsid=1, prp1=page, dwords=dwords)).status == INVALID_FIELD
    for number in (0, 6, 7, 8, 0xD, 0x70, 0x80, 0x81, 0xC0, 0xFF):
        assert (await disk.driver.log_page(number, 64))[0] == BAD_LOG_PAGE
    for nsid in (2, 0xFFFF_FFFE):
        assert (await disk.driver.log_page(2, 64, nsid=nsid))[0] == INVALID_NAMESPACE


# -- events (80), abort (79) -------------------------------------------------------------------------------------------


async def test_more_event_requests_than_the_limit(disk: Disk) -> None:
    pair = disk.driver.pairs[0]
    for _ in range(4):
        pair.submit(ASYNC_EVENT)
    assert (await disk.driver.admin(ASYNC_EVENT)).status == ASYNC_LIMIT
    assert (await disk.driver.identify(1))[0] == OK


async def test_the_disk_becomes_larger(disk: Disk) -> None:
    driver = disk.driver
    assert (await driver.admin(SET_FEATURES, dwords=(11, 1 << 8))).status == OK
    pair = driver.pairs[0]
    pair.submit(ASYNC_EVENT)
    await asyncio.sleep(0.002)
    disk.device.resize(BLOCKS * 1024)
    [done] = await pair.wait(1)
    assert done.result == 0x04_00_02
    disk.device.resize(BLOCKS * 512)
    pair.submit(ASYNC_EVENT)
    await asyncio.sleep(0.002)
    assert pair.poll() == []  # the list was not read yet
    assert word((await driver.log_page(4, 4096, keep=True))[1], 0, 4) == 1
    assert word((await driver.log_page(4, 4096))[1], 0, 4) == 1
    assert word((await driver.log_page(4, 4096))[1], 0, 4) == 0
    disk.device.resize(BLOCKS * 2048)
    assert [done.result for done in await pair.wait(1)] == [0x04_00_02]
    assert word((await driver.identify(0, 1))[1], 0, 8) == 4 * BLOCKS


async def test_a_host_that_did_not_ask_hears_nothing_of_it(disk: Disk) -> None:
    disk.driver.pairs[0].submit(ASYNC_EVENT)
    disk.device.resize(BLOCKS * 1024)
    await asyncio.sleep(0.002)
    assert disk.driver.pairs[0].poll() == []


async def test_abort(disk: Disk) -> None:
    driver, pair = disk.driver, disk.driver.pairs[0]
    waiting = pair.submit(ASYNC_EVENT)
    done = await driver.admin(ABORT, dwords=(waiting << 16,))
    assert (done.status, done.result) == (OK, 0)
    assert pair.done.pop(waiting).status == ABORTED
    own = pair.next_cid
    for queue, cid in ((0, waiting), (0, own), (1, 5), (1, 0xFFFF), (0, 0xFFFF)):
        done = await driver.admin(ABORT, dwords=(cid << 16 | queue,))
        assert (done.status, done.result) == (OK, 1)
    for queue in (2, 5, 17, 0xFFFF):
        assert (await driver.admin(ABORT, dwords=(queue,))).status == BAD_QUEUE
