"""fw_cfg from the guest's side: the selector and data ports, DMA, what is written, and what no firmware would ask."""

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from propolis.devices import fw_cfg
from propolis.devices.fw_cfg import FirmwareConfig
from propolis.hypervisor._replay import ReplayVcpu, ReplayVm
from tests import fuse_file
from tests.hung_file import HungFile
from tests.rig import Replayed, Rig

MEMORY = 1 << 20
COMMAND = 0x8000
BUFFER = 0x1_0000
ERROR, READ, SKIP, SELECT, WRITE = 1, 2, 4, 8, 16
MAX_TRANSFER = 1 << 26
FILE = bytes(range(256)) * 3


class Bench:
    """The device and a guest that reads it."""

    def __init__(self) -> None:
        self.vm = ReplayVm()
        self.vm.memory.add(0, MEMORY)
        self.config = FirmwareConfig(self.vm)
        self.written: list[bytes] = []
        self.config.add_file("etc/one", FILE)
        self.config.add_writable_file("etc/two", 28, self.written.append)
        self.config.publish()

    def read(self, key: int, length: int) -> bytes:
        """By the ports."""
        self.vm.pio.write(0x510, 2, key)
        return bytes(self.vm.pio.read(0x511, 1) for _ in range(length))

    def dma(self, control: int, length: int, address: int = BUFFER, at: int = COMMAND) -> int:
        """Returns the answer in the command."""
        self.vm.memory.write(at, struct.pack(">IIQ", control, length, address))
        self.vm.pio.write(0x514, 4, int.from_bytes((at >> 32).to_bytes(4, "big"), "little"))
        self.vm.pio.write(0x518, 4, int.from_bytes((at & 0xFFFF_FFFF).to_bytes(4, "big"), "little"))
        (answer,) = struct.unpack(">I", self.vm.memory.read(at, 4))
        assert isinstance(answer, int)
        return answer

    def directory(self) -> dict[str, tuple[int, int]]:
        """Size and key of each file."""
        (count,) = struct.unpack(">I", self.read(fw_cfg.FILE_DIR, 4))
        files = {}
        for _ in range(count):
            entry = bytes(self.vm.pio.read(0x511, 1) for _ in range(64))
            size, key, name = struct.unpack(">IHxx56s", entry)
            files[name.rstrip(b"\0").decode()] = (size, key)
        return files

    def close(self) -> None:
        """Nothing refers to the machine any more, so that its descriptors go."""
        self.__dict__.clear()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_signature_and_features(bench: Bench) -> None:
    assert bench.read(0, 4) == b"QEMU"
    assert bench.read(1, 4) == b"\3\0\0\0"
    assert bench.vm.pio.read(0x514, 4) == int.from_bytes(b"QEMU", "little")
    assert bench.vm.pio.read(0x518, 4) == int.from_bytes(b" CFG", "little")


def test_files_by_name(bench: Bench) -> None:
    assert bench.directory() == {"etc/one": (768, 0x20), "etc/two": (28, 0x21)}
    assert bench.read(0x20, 770) == FILE + b"\0\0"


def test_what_is_not_there_reads_as_zeros(bench: Bench) -> None:
    assert bench.read(0x3FFF, 3) == bytes(3)
    bench.vm.memory.write(BUFFER, b"\xff" * 4)
    assert bench.dma(0x3FFF << 16 | SELECT | READ, 4) == 0
    assert bench.vm.memory.read(BUFFER, 4) == bytes(4)


def test_dma(bench: Bench) -> None:
    """Select and read; read on; skip; beyond the end there are zeros."""
    assert bench.dma(0x20 << 16 | SELECT | READ, 10) == 0
    assert bench.vm.memory.read(BUFFER, 10) == FILE[:10]
    assert bench.dma(SKIP, 700) == 0
    assert bench.dma(READ, 60) == 0
    assert bench.vm.memory.read(BUFFER, 60) == FILE[710:] + bytes(2)
    assert bench.dma(READ, 0, address=1 << 60) == 0


def test_dma_by_one_wide_write(bench: Bench) -> None:
    """As a register of 64 bits, which memory-mapped versions of the device have."""
    bench.vm.memory.write(COMMAND, struct.pack(">IIQ", 0x20 << 16 | SELECT | READ, 4, BUFFER))
    bench.vm.pio.write(0x514, 8, int.from_bytes(COMMAND.to_bytes(8, "big"), "little"))
    assert bench.vm.memory.read(BUFFER, 4) == FILE[:4]


def test_what_is_written_is_told(bench: Bench) -> None:
    bench.vm.memory.write(BUFFER, b"abcdefgh")
    assert bench.dma(0x21 << 16 | SELECT | WRITE, 4) == 0
    assert bench.dma(SKIP, 20) == 0
    assert bench.dma(WRITE, 4, address=BUFFER + 4) == 0
    bench.vm.mailbox.dispatch()
    assert bench.written == [b"abcd" + bytes(20) + b"efgh"]
    bench.config.reset()
    assert bench.read(0x21, 28) == bytes(28)


def test_an_item_in_a_file(bench: Bench, tmp_path: Path) -> None:
    """Read when it is asked for; where the file ends too early the operation fails."""
    path = tmp_path / "kernel"
    path.write_bytes(b"0123456789")
    with open(path, "rb", buffering=0) as file:
        bench.config.add_open_file(fw_cfg.INITRD_DATA, file, 3, 7)
        assert bench.dma(fw_cfg.INITRD_DATA << 16 | SELECT | READ, 9) == 0
        assert bench.vm.memory.read(BUFFER, 9) == b"3456789\0\0"
        path.write_bytes(b"0123")
        assert bench.dma(fw_cfg.INITRD_DATA << 16 | SELECT | READ, 4) == ERROR


@pytest.mark.parametrize(
    ("control", "length", "address"),
    [
        (0x20 << 16 | SELECT | READ, 16, MEMORY - 8),  # runs out of RAM
        (0x20 << 16 | SELECT | READ, 16, 1 << 63),
        (0x20 << 16 | SELECT | READ, 16, (1 << 64) - 8),  # wraps
        (0x20 << 16 | SELECT | READ, MAX_TRANSFER + 1, 0),
        (0x20 << 16 | SELECT | WRITE, 4, BUFFER),  # read-only
        (0x21 << 16 | SELECT | WRITE, 29, BUFFER),  # longer than it is
        (0x21 << 16 | SELECT | WRITE, 4, MEMORY),
        (0x3000 << 16 | SELECT | WRITE, 4, BUFFER),  # not there
    ],
)
def test_what_cannot_be_done_is_an_error(bench: Bench, control: int, length: int, address: int) -> None:
    assert bench.dma(control, length, address) == ERROR
    bench.vm.mailbox.dispatch()
    assert bench.written == []
    assert bench.read(0x20, 4) == FILE[:4]


def test_a_write_behind_a_far_skip(bench: Bench) -> None:
    """The position is beyond any size then; it never wraps into the item."""
    assert bench.dma(0x21 << 16 | SELECT, 0) == 0
    for _ in range(8):
        assert bench.dma(SKIP, 0xFFFF_FFFF) == 0
    assert bench.dma(WRITE, 4) == ERROR
    assert bench.dma(READ, 4) == 0
    assert bench.vm.memory.read(BUFFER, 4) == bytes(4)


@pytest.mark.parametrize("at", [MEMORY - 8, 1 << 40, (1 << 64) - 4])
def test_a_command_outside_of_memory(bench: Bench, at: int) -> None:
    """There is no place for an answer, and nothing happens."""
    bench.vm.pio.write(0x514, 4, int.from_bytes((at >> 32).to_bytes(4, "big"), "little"))
    bench.vm.pio.write(0x518, 4, int.from_bytes((at & 0xFFFF_FFFF).to_bytes(4, "big"), "little"))
    assert bench.read(0, 4) == b"QEMU"


def test_a_command_that_its_own_data_overwrites(bench: Bench) -> None:
    """It was read once: what it becomes while it is carried out does not matter."""
    assert bench.dma(0x20 << 16 | SELECT | READ, 64, address=COMMAND - 8) == 0
    assert bench.vm.memory.read(COMMAND + 4, 52) == FILE[12:64]


def test_every_host_write_is_marked(bench: Bench) -> None:
    bench.vm.memory.track_dirty()
    assert bench.dma(0x20 << 16 | SELECT | READ, 16, address=0x2_0FF8) == 0
    assert bench.vm.memory.take_dirty() == [COMMAND, 0x2_0000, 0x2_1000]


def test_keys_are_given_once(bench: Bench) -> None:
    with pytest.raises(ValueError, match="is there already"):
        bench.config.add(fw_cfg.SIGNATURE, b"")
    with pytest.raises(ValueError, match="14 bits"):
        bench.config.add(0x4000, b"")


@pytest.mark.parametrize("seed", range(4))
def test_fuzz(bench: Bench, seed: int) -> None:
    """Any sequence of accesses leaves a device that answers."""
    dice = random.Random(seed)
    for _ in range(3000):
        port = dice.choice((0x510, 0x511, 0x514, 0x516, 0x518, 0x51B))
        size = dice.choice((1, 2, 4))
        if dice.random() < 0.3:
            bench.vm.pio.read(port, size)
        elif dice.random() < 0.5:
            bench.vm.pio.write(port, size, dice.getrandbits(8 * size))
        else:
            control = dice.getrandbits(5) | dice.choice((0, 1, 0x19, 0x20, 0x21, 0x22)) << 16
            bench.dma(control, dice.choice((0, 1, 28, 4096, 1 << 31)), dice.choice((0, BUFFER, MEMORY - 1, 1 << 50)))
    assert bench.read(0, 4) == b"QEMU"
    assert bench.directory()["etc/one"] == (768, 0x20)


def test_a_file_that_hangs(bench: Bench, tmp_path: Path) -> None:
    """The vCPU that reads it waits; the loop does not, which hears of what another one wrote."""
    key = 0x8
    with HungFile(tmp_path / "storage", FILE) as file, open(file.path, "rb", buffering=0) as opened:
        bench.config.add_open_file(key, opened, 0, len(FILE))
        two = bench.directory()["etc/two"][1]
        bench.vm.memory.write(BUFFER, b"w" * 28)
        assert bench.dma(two << 16 | SELECT | WRITE, 28) == 0
        file.hang(fuse_file.READ)
        rig: Replayed = Rig(bench.vm)
        vcpu = ReplayVcpu(bench.vm, 0, rig.hear(), [("out", 0x510, 2, key), ("in", 0x511, 1), ("in", 0x511, 1)])
        rig.vcpus.append(vcpu)
        with rig:
            rig.start()
            file.wait()
            bench.vm.mailbox.dispatch()
            assert bench.written == [b"w" * 28]
            assert not vcpu.is_done
            file.go_on()
            rig.spin_until("the vCPU's end", lambda: vcpu.is_done)
            assert vcpu.results() == [FILE[0], FILE[1]]
