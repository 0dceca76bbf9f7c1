"""The flash from firmware's side: how it is found, programmed and erased, and what its file then has."""

import asyncio
import os
import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from propolis.backends._iopool import IoPool
from propolis.devices.pflash import SYNC_DELAY, ParallelFlash
from propolis.errors import BusyError, ImageError
from propolis.firmware import nvram
from propolis.hypervisor._replay import ReplayVcpu, ReplayVm
from propolis.keeper import LocalKeeper
from tests.fuse_file import FSYNC, WRITE
from tests.hung_file import HungFile
from tests.rig import Replayed, Rig

END = 0xFFC8_4000
SIZE = 0x8000
BASE = END - SIZE
PROGRAM, ERASE, CONFIRM, CLEAR, STATUS, ID, QUERY, ARRAY = 0x10, 0x20, 0xD0, 0x50, 0x70, 0x90, 0x98, 0xFF
READY, PROGRAM_ERROR, ERASE_ERROR = 0x80, 0x10, 0x20


class Bench:
    """A flash and the firmware that uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(range(256)) * (SIZE // 256))
        self.fd = LocalKeeper().open_nvram(str(path), None)
        self.vm = ReplayVm()
        place = nvram.load(self.vm.memory, self.fd, str(path), END)
        assert (place.base, place.size) == (BASE, SIZE)
        self.pool = IoPool(1)
        self.device = ParallelFlash(self.vm, place.base, place.size, self.fd, str(path), self.pool)

    def write(self, offset: int, value: int, size: int = 1) -> None:
        self.vm.mmio.write(BASE + offset, size, value)

    def read(self, offset: int, size: int = 1) -> int:
        return self.vm.mmio.read(BASE + offset, size)

    def program(self, offset: int, data: bytes) -> None:
        """As EDK2 does."""
        for index, byte in enumerate(data):
            self.write(offset + index, PROGRAM)
            self.write(offset + index, byte)
        self.write(offset, ARRAY)

    def erase(self, offset: int) -> None:
        self.write(offset, ERASE)
        self.write(offset, CONFIRM)
        self.write(offset, ARRAY)

    def status(self) -> int:
        self.write(0, STATUS)
        return self.read(0)

    def array(self) -> bytes:
        """As the guest reads it from its memory."""
        return self.vm.memory.read(BASE, SIZE)

    def syncs(self) -> int:
        """How often its file was synced."""
        return self.pool.stats()["performed"]

    def close(self) -> None:
        self.pool.close()
        os.close(self.fd)
        self.__dict__.clear()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path / "nvram")
    yield bench
    bench.close()


def test_it_is_found_to_be_a_flash(bench: Bench) -> None:
    """EDK2 tells it from RAM and ROM: after "clear status" and "read status" there is 0 where there was something."""
    assert bench.read(7) == 7
    bench.write(7, CLEAR)
    assert bench.read(7) != CLEAR
    bench.write(7, STATUS)
    assert bench.read(7) == 0
    bench.write(7, ARRAY)
    assert bench.read(7) == 7
    assert bench.status() == 0


def test_who_it_is(bench: Bench) -> None:
    bench.write(0, QUERY)
    assert bytes(bench.read(0x10 + n) for n in range(3)) == b"QRY"
    assert (bench.read(0x27), bench.read(0x2C)) == (15, 1)
    assert (bench.read(0x2D, 2) + 1, bench.read(0x2F, 2) * 256) == (SIZE // 4096, 4096)
    bench.write(0, ID)
    assert bench.read(0) == 0x89
    bench.write(0, ARRAY)
    assert bench.read(0x10, 8) == int.from_bytes(bytes(range(0x10, 0x18)), "little")


def test_erase_and_program(bench: Bench) -> None:
    """Both the array and the file have it at once."""
    bench.erase(0x1234)
    expected = bytearray(bytes(range(256)) * (SIZE // 256))
    expected[0x1000:0x2000] = b"\xff" * 4096
    assert bench.array() == bench.path.read_bytes() == expected
    bench.program(0x1FFE, b"ab\0\1")  # over a block's end: the second half can only lose bits
    expected[0x1FFE:0x2002] = b"ab\0\1"
    assert bench.array() == bench.path.read_bytes() == expected
    assert bench.status() == READY


def test_bits_are_set_by_erasing_only(bench: Bench) -> None:
    bench.program(0x0F, b"\xf5")
    assert bench.array()[0x0F] == 0x0F & 0xF5
    assert bench.status() == READY | PROGRAM_ERROR
    bench.write(0, CLEAR)
    bench.program(0x0F, b"\x01")
    assert bench.array()[0x0F] == 1
    assert bench.status() == READY


def test_an_erase_that_is_not_confirmed(bench: Bench) -> None:
    before = bench.array()
    bench.write(0, ERASE)
    bench.write(0, ARRAY)
    assert bench.array() == bench.path.read_bytes() == before
    assert bench.status() & (PROGRAM_ERROR | ERASE_ERROR) == PROGRAM_ERROR | ERASE_ERROR


def test_wide_accesses(bench: Bench) -> None:
    bench.erase(0)
    bench.write(8, PROGRAM, 4)
    bench.write(8, 0x04030201, 4)
    bench.write(8, ARRAY, 4)
    assert bench.read(8, 4) == 0x04030201
    assert bench.path.read_bytes()[8:12] == b"\1\2\3\4"


def test_a_reset_shows_the_array(bench: Bench) -> None:
    bench.write(0, PROGRAM)
    bench.device.reset()
    bench.write(0, ARRAY)
    assert bench.array()[0] == bench.read(0) == 0
    assert bench.status() == READY


async def test_what_is_written_reaches_the_disk(bench: Bench) -> None:
    """Soon, once for many commands, and before anybody is told that the device has come to rest."""
    bench.device.start(asyncio.get_running_loop())
    bench.erase(0)
    for offset in range(50):
        bench.program(offset, b"x")
        bench.vm.mailbox.dispatch()
    async with asyncio.timeout(10):
        while not bench.syncs():  # noqa: ASYNC110 -- nobody tells
            await asyncio.sleep(0.01)
    await asyncio.sleep(2 * SYNC_DELAY)
    assert bench.syncs() == 1
    bench.program(50, b"y")
    bench.vm.mailbox.dispatch()
    await bench.device.drained()
    assert bench.syncs() == 2
    await asyncio.sleep(2 * SYNC_DELAY)
    assert bench.syncs() == 2
    await bench.device.halt()


def test_a_file_that_cannot_be_written(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The command fails for the guest, and the log says so once."""
    with open(tmp_path / "nvram", "rb") as readable:
        os.dup2(readable.fileno(), bench.fd)

    async def serve() -> None:
        bench.device.start(asyncio.get_running_loop())
        for _ in range(3):
            bench.program(0x0F, b"\x01")
            bench.vm.mailbox.dispatch()
        await bench.device.halt()

    asyncio.run(serve())
    assert bench.status() & PROGRAM_ERROR
    assert bench.device.stats() == {"failed_writes": 3}
    assert len([record for record in caplog.records if "cannot be kept" in record.getMessage()]) == 1


async def test_a_disk_that_fails(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    """A pause and a reboot go on: the log says what is lost, each time."""
    bench.device.start(asyncio.get_running_loop())
    bench.erase(0)
    ours, theirs = os.pipe()
    os.dup2(theirs, bench.fd)  # which nothing syncs
    os.close(ours)
    os.close(theirs)
    bench.vm.mailbox.dispatch()
    async with asyncio.timeout(10):
        while not caplog.records:  # noqa: ASYNC110 -- nobody else tells
            await asyncio.sleep(0.01)
    await bench.device.drained()
    told = [record.getMessage() for record in caplog.records if "cannot be kept" in record.getMessage()]
    assert len(told) == 2
    assert all(line.endswith("reason=Invalid argument") for line in told)
    await bench.device.halt()


async def test_a_disk_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The VM ends all the same, and says what that may have cost."""
    monkeypatch.setattr("propolis.devices.pflash.HALT_PATIENCE", 0.1)
    with HungFile(tmp_path / "storage", bytes(SIZE)) as file, closing(Bench(file.path)) as bench:
        bench.device.start(asyncio.get_running_loop())
        bench.erase(0)
        file.hang(FSYNC)
        bench.vm.mailbox.dispatch()
        await asyncio.to_thread(file.wait)
        await bench.device.halt()
        assert "its storage hangs" in caplog.text
        assert not bench.pool.close(0.1)
        file.go_on()
        assert bench.pool.close()


def test_a_command_that_hangs(tmp_path: Path) -> None:
    """A vCPU waits for the file; nobody else does."""
    with HungFile(tmp_path / "storage", bytes(SIZE)) as file, closing(Bench(file.path)) as bench:
        file.hang(WRITE)
        rig: Replayed = Rig(bench.vm)
        vcpu = ReplayVcpu(bench.vm, 0, rig.hear(), [("write", BASE, 1, ERASE), ("write", BASE, 1, CONFIRM)])
        rig.vcpus.append(vcpu)
        with rig:
            rig.start()
            file.wait()
            assert bench.device.stats() == {"failed_writes": 0}
            assert not vcpu.is_done
            file.go_on()
            rig.spin_until("the end of the command", lambda: vcpu.is_done)
        assert file.path.read_bytes()[:2] == b"\xff\xff"


@pytest.mark.parametrize("seed", range(4))
def test_fuzz(bench: Bench, seed: int) -> None:
    """Whatever is written, the file is what the array is."""
    dice = random.Random(seed)
    commands = (PROGRAM, 0x40, ERASE, CONFIRM, CLEAR, STATUS, ID, QUERY, ARRAY, 0xE8, 0)
    for _ in range(3000):
        size = dice.choice((1, 2, 4, 8))
        offset = dice.randrange(SIZE - size + 1)
        if dice.random() < 0.3:
            bench.read(offset, size)
        else:
            bench.write(offset, dice.choice((*commands, dice.getrandbits(8 * size))), size)
    assert bench.array() == bench.path.read_bytes()


# -- its file ----------------------------------------------------------------------------------------------------------


def test_a_file_is_made_from_the_template_once(tmp_path: Path) -> None:
    template, path = tmp_path / "OVMF_VARS.fd", tmp_path / "vm.nvram"
    template.write_bytes(b"t" * 4096)
    keeper = LocalKeeper()
    fd = keeper.open_nvram(str(path), str(template))
    try:
        assert path.read_bytes() == b"t" * 4096
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(BusyError, match=r"nvram '.*vm.nvram' for writing: in use by"):
            keeper.open_nvram(str(path), str(template))
        os.pwrite(fd, b"kept", 0)
    finally:
        os.close(fd)
    os.close(keeper.open_nvram(str(path), str(template)))
    assert path.read_bytes()[:4] == b"kept"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["OVMF_VARS.fd", "vm.nvram"]


def test_neither_file_nor_template(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"open nvram '.*none'"):
        LocalKeeper().open_nvram(str(tmp_path / "none"), None)
    with pytest.raises(ImageError, match=r"open nvram_template '.*none'"):
        LocalKeeper().open_nvram(str(tmp_path / "vm"), str(tmp_path / "none"))


@pytest.mark.parametrize("size", [0, 4095, (4 << 20) + 4096])
def test_a_size_that_no_flash_has(tmp_path: Path, size: int) -> None:
    path = tmp_path / "nvram"
    path.write_bytes(bytes(size))
    fd = os.open(path, os.O_RDWR)
    try:
        with pytest.raises(ImageError, match=f"size: {size} bytes, expected whole blocks of 4 KiB and at most 4 MiB"):
            nvram.load(ReplayVm().memory, fd, str(path), END)
    finally:
        os.close(fd)
