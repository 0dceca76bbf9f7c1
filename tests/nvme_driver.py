"""An NVMe driver in plain Python: it knows PCI configuration space, the registers of the specification and guest RAM.

It can be an honest driver (`admin`, `io`) or write whatever it likes into queues and registers.
"""

import asyncio
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.driver import MSI_ADDRESS, MSI_DATA, PciDevice, Ram, until

PAGE = 4096
CAP, VS, INTMS, INTMC, CC, CSTS, NSSR, AQA, ASQ, ACQ = 0, 8, 0xC, 0x10, 0x14, 0x1C, 0x20, 0x24, 0x28, 0x30
DOORBELLS = 0x1000
ENABLE = 1
ENTRY_SIZES = 4 << 20 | 6 << 16
NORMAL_SHUTDOWN = 1 << 14
READY, FATAL = 1, 2
SHUTDOWN_STATUS = 3 << 2
SHUTDOWN_DONE = 2 << 2

# Opcodes
DELETE_SQ, CREATE_SQ, GET_LOG_PAGE, DELETE_CQ, CREATE_CQ, IDENTIFY, ABORT = 0, 1, 2, 4, 5, 6, 8
SET_FEATURES, GET_FEATURES, ASYNC_EVENT, SHADOW_DOORBELLS = 9, 0xA, 0xC, 0x7C
FLUSH, WRITE, READ, COMPARE, WRITE_ZEROES, DATASET = 0, 1, 2, 5, 8, 9
FUA = 1 << 30

# Status: type and code; the driver takes "do not retry" off.
OK = 0
INVALID_OPCODE, INVALID_FIELD, ID_CONFLICT, TRANSFER_ERROR, ABORTED = 1, 2, 3, 4, 7
INVALID_NAMESPACE, SGL_SEGMENT, SGL_COUNT, SGL_LENGTH, SGL_TYPE, PRP_OFFSET = 0xB, 0xD, 0xE, 0xF, 0x11, 0x13
WRITE_PROTECTED, LBA_RANGE, CAPACITY = 0x20, 0x80, 0x81
NO_CQ, BAD_QUEUE, BAD_SIZE, ASYNC_LIMIT, BAD_VECTOR, BAD_LOG_PAGE = 0x100, 0x101, 0x102, 0x105, 0x108, 0x109
BAD_DELETION, NOT_SAVEABLE, NOT_CHANGEABLE = 0x10C, 0x10D, 0x10E
WRITE_FAULT, READ_ERROR, COMPARE_FAILURE = 0x280, 0x281, 0x285


@dataclass(frozen=True)
class Completion:
    """A completion queue entry."""

    result: int
    sq_head: int
    sq_id: int
    cid: int
    status: int
    retry: bool


def command(
    opcode: int,
    cid: int = 0,
    *,
    nsid: int = 1,
    prp1: int = 0,
    prp2: int = 0,
    dwords: Sequence[int] = (),
    flags: int = 0,
) -> bytes:
    """A submission queue entry; `dwords` are those from 10 on."""
    rest = (*dwords, 0, 0, 0, 0, 0, 0)[:6]
    return struct.pack("<BBHI8xQQQ6I", opcode, flags, cid, nsid, 0, prp1, prp2, *rest)


class NvmeDriver(PciDevice):
    """Drives the controller in a slot."""

    def __init__(self, vm: Any, slot: int, ram: Ram, bar_base: int = 0xD000_0000) -> None:
        super().__init__(vm, slot, bar_base)
        self.ram = ram
        self.pairs: dict[int, Pair] = {}
        self.shadow = 0  # guest addresses of the two pages, once they are used
        self.events = 0

    # -- registers -----------------------------------------------------------------------------------------------------

    def read(self, register: int, size: int = 4) -> int:
        return int(self.vm.mmio.read(self.bars[0] + register, size))

    def write(self, register: int, value: int, size: int = 4) -> None:
        self.vm.mmio.write(self.bars[0] + register, size, value)

    def ring(self, number: int, value: int, *, head: bool = False, size: int = 4) -> None:
        self.write(DOORBELLS + 8 * number + 4 * head, value, size)

    @property
    def status(self) -> int:
        return self.read(CSTS)

    def enable_msix(self) -> None:
        """One message for each vector."""
        msix = next(offset for identity, offset in self.capabilities() if identity == 0x11)
        control = self.config_read(msix + 2, 2)
        table = self.config_read(msix + 4, 4)
        base = self.bars[table & 7] + (table & ~7)
        for vector in range((control & 0x7FF) + 1):
            for i, word in enumerate((MSI_ADDRESS, 0, MSI_DATA + vector, 0)):
                self.vm.mmio.write(base + 16 * vector + 4 * i, 4, word)
        self.config_write(msix + 2, 2, control | 0x8000)

    def messages(self) -> list[int]:
        """Vectors that fired, in order, since the last look."""
        return [data - MSI_DATA for kind, _, data in self.vm.take_interrupts() if kind == "msi"]

    # -- the controller's life, §7.6.1 ---------------------------------------------------------------------------------

    def prepare(self, entries: int = 32) -> None:
        """Writes the registers of the admin queue."""
        self.shadow = self.events = 0
        self.pairs = {0: Pair(self, 0, entries, entries)}
        self.write(AQA, (entries - 1) << 16 | (entries - 1))
        self.write(ASQ, self.pairs[0].sq, 8)
        self.write(ACQ, self.pairs[0].cq, 8)

    async def enable(self, entries: int = 32) -> None:
        """Up to CSTS.RDY."""
        self.prepare(entries)
        self.write(CC, ENTRY_SIZES | ENABLE)
        await until(lambda: self.status & READY, "CSTS.RDY")

    async def disable(self) -> None:
        self.write(CC, ENTRY_SIZES)
        await until(lambda: not self.status & READY, "CSTS.RDY gone")

    async def begin(self, *, queues: int = 1, entries: int = 64, msix: bool = True) -> None:
        """Everything up to I/O queues; completion queue i has vector i."""
        self.place_bars()
        if msix:
            self.enable_msix()
        await self.enable()
        for number in range(1, queues + 1):
            await self.create_pair(number, entries, vector=number if msix else 0)

    async def create_pair(self, number: int, entries: int, *, vector: int = 0, cq_entries: int = 0) -> "Pair":
        pair = Pair(self, number, entries, cq_entries or entries)
        made = await self.admin(
            CREATE_CQ, prp1=pair.cq, dwords=((pair.cq_entries - 1) << 16 | number, vector << 16 | 3)
        )
        assert made.status == OK, made
        made = await self.admin(CREATE_SQ, prp1=pair.sq, dwords=((entries - 1) << 16 | number, number << 16 | 1))
        assert made.status == OK, made
        self.pairs[number] = pair
        return pair

    async def cast_shadows(self) -> Completion:
        """Doorbell Buffer Config; from then on pairs use shadows."""
        shadow, events = self.ram.take(PAGE, PAGE), self.ram.take(PAGE, PAGE)
        for page in (shadow, events):
            self.ram.memory.write(page, bytes(PAGE))
        done = await self.admin(SHADOW_DOORBELLS, prp1=shadow, prp2=events)
        if done.status == OK:
            self.shadow, self.events = shadow, events
        return done

    # -- commands ------------------------------------------------------------------------------------------------------

    async def admin(self, opcode: int, **fields: Any) -> Completion:
        """One admin command, to its end."""
        return await self.pairs[0].do(opcode, **fields)

    async def io(
        self, opcode: int, lba: int = 0, blocks: int = 1, *, number: int = 1, dword12: int = 0, **fields: Any
    ) -> Completion:
        """One I/O command of `blocks` blocks."""
        dwords = (lba & 0xFFFF_FFFF, lba >> 32, dword12 | blocks - 1)
        return await self.pairs[number].do(opcode, dwords=dwords, **fields)

    async def identify(self, what: int, nsid: int = 0) -> tuple[int, bytes]:
        """(status, the structure)."""
        page = self.ram.take(PAGE, PAGE)
        done = await self.admin(IDENTIFY, nsid=nsid, prp1=page, dwords=(what,))
        return done.status, self.ram.memory.read(page, PAGE)

    async def log_page(
        self, page: int, length: int, *, offset: int = 0, nsid: int = 0xFFFF_FFFF, keep: bool = False
    ) -> tuple[int, bytes]:
        """(status, the first bytes of the page)."""
        count = length // 4 - 1
        prp1, prp2 = self.prps(at := self.ram.take(length, PAGE), length)
        dwords = ((count & 0xFFFF) << 16 | keep << 15 | page, count >> 16, offset & 0xFFFF_FFFF, offset >> 32)
        done = await self.admin(GET_LOG_PAGE, nsid=nsid, prp1=prp1, prp2=prp2, dwords=dwords)
        return done.status, self.ram.memory.read(at, length)

    def prps(self, address: int, length: int) -> tuple[int, int]:
        """PRP1 and PRP2 of a buffer that is contiguous; makes a list where one is needed."""
        pages = list(range((address & ~(PAGE - 1)) + PAGE, address + length, PAGE))
        if len(pages) <= 1:
            return address, pages[0] if pages else 0
        return address, self.prp_list(pages)

    def prp_list(self, pages: Sequence[int]) -> int:
        """A list of these entries, in as many pages as it takes."""
        if len(pages) <= PAGE // 8:
            return self.ram.put(struct.pack(f"<{len(pages)}Q", *pages), PAGE)[0]
        rest = self.prp_list(pages[PAGE // 8 - 1 :])
        return self.ram.put(struct.pack("<512Q", *pages[: PAGE // 8 - 1], rest), PAGE)[0]


class Pair:
    """The driver's side of a submission queue and the completion queue of the same number."""

    def __init__(self, driver: NvmeDriver, number: int, entries: int, cq_entries: int) -> None:
        self.driver = driver
        self.number = number
        self.entries = entries
        self.cq_entries = cq_entries
        self.memory = driver.ram.memory
        self.sq = driver.ram.take(64 * entries, PAGE)
        self.cq = driver.ram.take(16 * cq_entries, PAGE)
        self.memory.write(self.sq, bytes(64 * entries))
        self.memory.write(self.cq, bytes(16 * cq_entries))
        self.tail = self.head = self.sq_head = 0
        self.phase = 1
        self.next_cid = 0
        self.rung = 0  # doorbells that the event index asked for
        self.done: dict[int, Completion] = {}

    # -- raw -----------------------------------------------------------------------------------------------------------

    def put(self, entry: bytes) -> None:
        """Writes an entry and moves the tail, without telling anybody."""
        self.memory.write(self.sq + 64 * self.tail, entry)
        self.tail = (self.tail + 1) % self.entries

    def ring(self) -> None:
        """The submission doorbell, by its shadow where there is one."""
        self._doorbell(self.tail, is_head=False)

    def acknowledge(self) -> None:
        """The completion doorbell."""
        self._doorbell(self.head, is_head=True)

    def _doorbell(self, value: int, *, is_head: bool) -> None:
        driver = self.driver
        if not driver.shadow or not self.number:
            driver.ring(self.number, value, head=is_head)
            return
        at = 8 * self.number + 4 * is_head
        old = self._word(driver.shadow + at)
        self.memory.write(driver.shadow + at, value.to_bytes(4, "little"))
        event = self._word(driver.events + at)
        if (value - event - 1) & 0xFFFF < (value - old) & 0xFFFF:
            self.rung += not is_head
            driver.ring(self.number, value, head=is_head)

    def _word(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 4), "little")

    def poll(self, *, acknowledge: bool = True, limit: int = 1 << 30) -> list[Completion]:
        """What was completed since the last look."""
        found: list[Completion] = []
        while len(found) < limit:
            result, _, sq_head, sq_id, cid, status = struct.unpack(
                "<IIHHHH", self.memory.read(self.cq + 16 * self.head, 16)
            )
            if status & 1 != self.phase:
                break
            found.append(Completion(result, sq_head, sq_id, cid, status >> 1 & 0x7FF, not status >> 15))
            self.sq_head = sq_head
            self.head += 1
            if self.head == self.cq_entries:
                self.head, self.phase = 0, self.phase ^ 1
        if found and acknowledge:
            self.acknowledge()
        return found

    # -- honest --------------------------------------------------------------------------------------------------------

    def submit(self, opcode: int, **fields: Any) -> int:
        """Submits a command and rings; returns its identifier."""
        cid = self.next_cid
        self.next_cid = (cid + 1) & 0xFFFF
        assert (self.tail + 1) % self.entries != self.sq_head, "the submission queue is full"
        self.put(command(opcode, cid, **fields))
        self.ring()
        return cid

    async def wait(self, count: int = 1) -> list[Completion]:
        """The next `count` completions."""
        found: list[Completion] = []
        async with asyncio.timeout(10):
            while len(found) < count:
                found += self.poll(limit=count - len(found))
                await asyncio.sleep(0 if found else 0.0002)
        return found

    async def do(self, opcode: int, **fields: Any) -> Completion:
        """One command, to its end; others that end meanwhile are kept in `done`."""
        cid = self.submit(opcode, **fields)
        while cid not in self.done:
            for completion in await self.wait():
                self.done[completion.cid] = completion
        return self.done.pop(cid)
