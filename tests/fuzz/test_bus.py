"""Random buses against a plain model: every byte of every access goes where its address says, and nowhere else.

Time-boxed (FUZZ_SECONDS, default 2). The seed is printed; FUZZ_SEED repeats a run. A found case joins CORPUS.
"""

import os
import random
import time

import pytest

from propolis._bus import Bus, Region, Window
from propolis._interrupts import Doorbell
from propolis.devices.pci._msix import Msix
from propolis.errors import HypervisorError
from propolis.hypervisor._replay import ReplayVm

SECONDS = float(os.environ.get("FUZZ_SECONDS", "2"))
CORPUS = [0, 1, 2, 3]  # seeds of short runs
TOP = 1 << 64
# Where things meet: the ends of the address space and of a few pages in between.
EDGES = [0, 0x1000, 0x2000, 0xFFFF, 0x1_0000, 0xC000_0000, 1 << 32, 1 << 63, TOP - 0x1000, TOP - 1]


class Model:
    """Who answers each byte, and the splitting rule, written as plainly as possible."""

    def __init__(self) -> None:
        self.placed: list[tuple[int, int, Doorbell | bytes]] = []  # base, last, a bell or what memory holds
        self.missed = 0

    def free(self, base: int, last: int) -> bool:
        return last < TOP and last >= base and all(last < b or base > e for b, e, _ in self.placed)

    def at(self, address: int) -> tuple[int, int, Doorbell | bytes] | None:
        return next((entry for entry in self.placed if entry[0] <= address <= entry[1]), None)

    def steps(self, address: int, size: int) -> list[tuple[int, int, Doorbell | bytes | None]]:
        """(address, bytes, who) of each piece: the largest power of two that fits what is left and the region."""
        pieces: list[tuple[int, int, Doorbell | bytes | None]] = []
        while size:
            here = self.at(address)
            step = 1
            if here is not None:
                step = max(s for s in (1, 2, 4, 8) if s == 1 or (s <= size and s - 1 <= here[1] - address))
            pieces.append((address, step, None if here is None else here[2]))
            address, size = (address + step) % TOP, size - step
        return pieces

    def read(self, address: int, size: int) -> int:
        data = b""
        for start, step, who in self.steps(address, size):
            if who is None:
                self.missed += 1
                data += b"\xff"
            elif isinstance(who, bytes):
                base = next(b for b, _, owner in self.placed if owner is who)
                data += (who + b"\xff" * 8)[start - base : start - base + step]
            else:
                data += bytes(step)
        return int.from_bytes(data, "little")

    def write(self, address: int, size: int) -> dict[int, int]:
        """How often each bell rings, by its identity."""
        rings: dict[int, int] = {}
        for _, _, who in self.steps(address, size):
            if who is None:
                self.missed += 1
            elif isinstance(who, Doorbell):
                rings[id(who)] = rings.get(id(who), 0) + 1
        return rings


def address(dice: random.Random) -> int:
    return max(0, min(TOP - 1, dice.choice(EDGES) + dice.randint(-20, 40)))


def memory(vm: ReplayVm, dice: random.Random) -> tuple[Msix, bytes]:
    """An MSI-X table and what it reads as."""
    count = dice.randint(1, 3)
    msix = Msix(vm, count)
    scratch = Bus("scratch", False)
    scratch.add(msix.table, 0, 16 * count)
    for offset in range(0, 16 * count, 4):
        scratch.write(offset, 4, dice.getrandbits(32))
    content = b"".join(scratch.read(offset, 1).to_bytes(1, "little") for offset in range(16 * count))
    return msix, content


def run(seed: int, deadline: float, steps: int) -> None:
    dice = random.Random(seed)
    vm = ReplayVm()
    bus, model = vm.mmio, Model()
    owners: dict[int, Doorbell | Msix] = {}  # by base
    rung: dict[int, int] = {}
    for _ in range(steps):
        if time.monotonic() > deadline:
            break
        what = dice.random()
        if what < 0.15:
            base = address(dice)
            made: Doorbell | Msix
            region: Region
            entry: Doorbell | bytes
            if dice.random() < 0.3:
                made, content = memory(vm, dice)
                region, last, entry = made.table, base + len(content) - 1, content
            else:
                made = region = entry = Doorbell(vm, hex(base))
                last = base + dice.choice((1, 2, 3, 4, 8, 16, 64)) - 1
            try:
                bus.add(region, base, last - base + 1)
            except HypervisorError:
                assert not model.free(base, last)
            else:
                assert model.free(base, last)
                model.placed.append((base, last, entry))
                owners[base] = made
        elif what < 0.22 and model.placed:
            base, last, entry = model.placed.pop(dice.randrange(len(model.placed)))
            owner = owners.pop(base)
            bus.discard(owner if isinstance(owner, Doorbell) else owner.table)
        elif what < 0.6:
            where, size = address(dice), dice.randint(1, 8)
            assert bus.read(where, size) == model.read(where, size), f"read {where:#x}, {size} bytes"
        else:
            where, size = address(dice), dice.randint(1, 8)
            before = {id(o): o.stats()["rung"] for o in owners.values() if isinstance(o, Doorbell)}
            if any(isinstance(who, bytes) for _, _, who in model.steps(where, size)):
                continue  # it would change what the memory holds
            rings = model.write(where, size)
            bus.write(where, size, dice.getrandbits(64))
            rung = {id(o): o.stats()["rung"] - before[id(o)] for o in owners.values() if isinstance(o, Doorbell)}
            assert {key: value for key, value in rung.items() if value} == rings, f"write {where:#x}, {size} bytes"
        assert bus.stats()["missed"] == model.missed
    assert [(base, length) for base, length, _ in bus.mappings()] == sorted((b, e - b + 1) for b, e, _ in model.placed)


@pytest.mark.parametrize("seed", CORPUS)
def test_cases_found_before(seed: int) -> None:
    run(seed, time.monotonic() + 30, 400)


def test_random_buses() -> None:
    seed = int(os.environ.get("FUZZ_SEED", random.randrange(1 << 32)))
    print("FUZZ_SEED", seed)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        run(seed, end, 600)
        seed += 1


def test_random_windows() -> None:
    """A window answers as a bus with the same parts does, but for what nobody answers, which it does not count."""
    seed = int(os.environ.get("FUZZ_SEED", random.randrange(1 << 32)))
    print("FUZZ_SEED", seed)
    dice = random.Random(seed)
    end = time.monotonic() + SECONDS / 2
    while time.monotonic() < end:
        vm = ReplayVm()
        window, flat, nested = Window("window"), Bus("flat", False), Bus("nested", False)
        for _ in range(dice.randint(0, 8)):
            offset = dice.randrange(256)
            msix, content = memory(vm, dice)
            twin = Msix(vm, msix.count)
            scratch = Bus("scratch", False)
            scratch.add(twin.table, 0, len(content))
            for at in range(0, len(content), 4):
                scratch.write(at, 4, int.from_bytes(content[at : at + 4], "little"))
            try:
                flat.add(twin.table, offset, len(content))
            except HypervisorError:
                with pytest.raises(HypervisorError):
                    window.add(msix.table, offset, len(content))
            else:
                window.add(msix.table, offset, len(content))
        nested.add(window, 0x1_0000, 0x200)
        for _ in range(300):
            offset, size = dice.randrange(0x200 - 8), dice.randint(1, 8)
            if dice.random() < 0.3:
                # Another width is split before it reaches the window, and the device takes only words that are whole.
                width, value = dice.choice((1, 2, 4, 8)), dice.getrandbits(64)
                flat.write(offset, width, value)
                nested.write(0x1_0000 + offset, width, value)
            assert nested.read(0x1_0000 + offset, size) == flat.read(offset, size)
        assert nested.stats() == {"missed": 0}
