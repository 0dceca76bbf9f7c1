"""The split ring from the driver's side: honest use, every broken rule of it, notification suppression, dirty pages."""

import random
import struct

import pytest

from tests.driver import (
    DRIVER_OK,
    F_EVENT_IDX,
    F_INDIRECT_DESC,
    F_VERSION_1,
    INDIRECT,
    NEEDS_RESET,
    NEXT,
    WRITE,
    DriverQueue,
    until,
)
from tests.unit.devices.virtio.rig import HIGH_BASE, RAM, ROM_BASE, Echo, MakeRig, Rig

PLAIN = 1 << F_VERSION_1
NO_EVENT = 1 << F_VERSION_1 | 1 << F_INDIRECT_DESC


async def echo(rig: Rig, queue: DriverQueue, data: bytes, *, indirect: bool = False, pieces: int = 1) -> None:
    """One request whose parts are cut into pieces comes back with its bytes backwards."""
    size = len(data) // pieces
    readable = [rig.ram.put(data[i * size : (i + 1) * size if i < pieces - 1 else None]) for i in range(pieces)]
    room = [(rig.ram.take(size), size) for _ in range(pieces - 1)]
    room.append((rig.ram.take(len(data)), len(data)))
    head = queue.add(readable, room, indirect=indirect)
    queue.kick()
    assert await queue.wait() == [(head, len(data))]
    got = b"".join(rig.vm.memory.read(address, length) for address, length in room)
    assert got[: len(data)] == data[::-1]


async def expect_reset(rig: Rig, reason: str) -> None:
    """The device stops with NEEDS_RESET and a configuration interrupt, and works again after a reset."""
    driver = rig.driver
    await until(lambda: driver.status & NEEDS_RESET, f"NEEDS_RESET for {reason}")
    assert rig.device.queues[0].failure is not None
    assert reason in rig.device.queues[0].failure
    assert driver.read("num_queues") in driver.messages()
    await driver.reset()
    assert driver.status == 0
    driver.restart()
    await echo(rig, driver.queues[0], b"again")


async def test_a_chain_comes_back_with_its_answer(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.driver.begin()
    await until(lambda: rig.device.activations, "activation")
    await echo(rig, rig.driver.queues[0], b"hello, ring")
    assert rig.driver.messages() == [0]
    assert rig.device.activations == [rig.driver.features]


@pytest.mark.parametrize("wanted", [PLAIN, NO_EVENT, 1 << F_EVENT_IDX | PLAIN, -1])
@pytest.mark.parametrize("size", [1, 2, 4, 256])
async def test_sizes_and_features(make_rig: MakeRig, wanted: int, size: int) -> None:
    rig = await make_rig()
    rig.driver.begin(wanted if wanted >= 0 else rig_all(), size=size)
    queue = rig.driver.queues[0]
    indirect = bool(rig.driver.features >> F_INDIRECT_DESC & 1)
    for number in range(size + 5):
        if size == 1 and not indirect:
            head = queue.add([], [(rig.ram.take(4), 4)])
            queue.kick()
            assert await queue.wait() == [(head, 0)]
        else:
            await echo(rig, queue, b"%04d" % number, indirect=indirect)


def rig_all() -> int:
    return (1 << 64) - 1


@pytest.mark.parametrize("pieces", [2, 7, 60])
@pytest.mark.parametrize("indirect", [False, True])
async def test_many_buffers(make_rig: MakeRig, pieces: int, indirect: bool) -> None:
    rig = await make_rig()
    rig.driver.begin()
    await echo(rig, rig.driver.queues[0], random.Random(pieces).randbytes(3000), indirect=indirect, pieces=pieces)


async def test_normal_descriptors_before_an_indirect_one(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.driver.begin()
    queue = rig.driver.queues[0]
    first, (out, _) = rig.ram.put(b"ab"), rig.ram.put(bytes(4))
    second = rig.ram.put(b"cd")
    table = struct.pack("<QIHHQIHH", *second, NEXT, 1, out, 4, WRITE, 0)
    queue.set_desc(0, *first, NEXT, 1)
    # An odd address: a table needs no alignment. Its WRITE flag means nothing (§2.7.5.3.2).
    queue.set_desc(1, *rig.ram.put(b"?" + table, align=16), INDIRECT | WRITE)
    address = rig.ram.next - len(table)
    queue.set_desc(1, address, len(table), INDIRECT | WRITE)
    queue.chains[0] = [0, 1]
    queue.offer(0)
    queue.kick()
    assert await queue.wait() == [(0, 4)]
    assert rig.vm.memory.read(out, 4) == b"dcba"


async def test_a_kick_before_activation_is_not_lost(make_rig: MakeRig) -> None:
    rig = await make_rig()
    driver = rig.driver
    driver.probe()
    driver.negotiate()
    driver.enable_msix()
    queue = driver.set_up(0)
    queue.add([rig.ram.put(b"early")], [(rig.ram.take(5), 5)])
    queue.kick()
    driver.add_status(DRIVER_OK)
    assert len(await queue.wait()) == 1


async def test_indices_wrap(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.driver.begin(size=64)
    queue = rig.driver.queues[0]
    room = (rig.ram.take(16), 16)
    data = rig.ram.put(b"round and round")
    done = 0
    while done < 66_000:
        for _ in range(32):
            queue.add([data], [room])
        queue.set_used_event(queue.next_used + 31)
        queue.kick()
        done += len(await queue.wait(32))
        # Exactly one interrupt, at the 32nd: also where used_event and the index pass 65535.
        assert rig.driver.messages() == [0]
    assert queue.used_index == done & 0xFFFF
    assert rig.device.heads == done


# -- suppression (VQ 27, 32) -------------------------------------------------------------------------------------------


async def test_interrupts_are_suppressed_by_flag(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.driver.begin(PLAIN)
    queue = rig.driver.queues[0]
    queue.set_flags(1)
    await echo(rig, queue, b"quiet")
    assert rig.driver.messages() == []
    queue.set_flags(0)
    await echo(rig, queue, b"loud")
    assert rig.driver.messages() == [0]


@pytest.mark.parametrize(("event", "expected"), [(0, [0]), (1, []), (2, []), (0xFFFF, [])])
async def test_interrupts_follow_used_event(make_rig: MakeRig, event: int, expected: list[int]) -> None:
    rig = await make_rig()
    rig.driver.begin()
    queue = rig.driver.queues[0]
    queue.set_used_event(event)
    queue.set_flags(1)  # has no meaning with EVENT_IDX (§2.7.7.2)
    await echo(rig, queue, b"once")
    assert rig.driver.messages() == expected


@pytest.mark.parametrize("wanted", [NO_EVENT, None])
async def test_the_device_asks_for_the_next_kick(make_rig: MakeRig, wanted: int | None) -> None:
    rig = await make_rig()
    rig.driver.begin(wanted)
    queue = rig.driver.queues[0]
    for count in range(1, 5):
        await echo(rig, queue, b"kick me")
        if wanted is None:
            assert queue.avail_event == count
        assert queue.used_flags == 0


async def test_more_than_the_budget_needs_no_second_kick(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.driver.begin()
    queue = rig.driver.queues[0]
    for _ in range(Echo.budget + 20):
        queue.add([rig.ram.put(b"x")], [(rig.ram.take(1), 1)])
    queue.kick()
    assert len(await queue.wait(Echo.budget + 20)) == Echo.budget + 20


async def test_spurious_kicks_are_harmless(make_rig: MakeRig) -> None:
    rig = await make_rig()
    rig.driver.begin()
    queue = rig.driver.queues[0]
    for _ in range(10):
        queue.kick()
    await echo(rig, queue, b"still there")
    assert rig.device.heads == 1


# -- broken rules (VQ 1 to 18) -----------------------------------------------------------------------------------------


async def begun(make_rig: MakeRig, wanted: int | None = None, size: int = 16) -> tuple[Rig, DriverQueue]:
    rig = await make_rig()
    rig.driver.begin(wanted, size=size)
    return rig, rig.driver.queues[0]


@pytest.mark.parametrize("head", [16, 17, 255, 0xFFFF])
async def test_head_outside_the_table(make_rig: MakeRig, head: int) -> None:
    rig, queue = await begun(make_rig)
    queue.offer(head)
    queue.kick()
    await expect_reset(rig, "head outside")


@pytest.mark.parametrize("following", [16, 0x8000, 0xFFFF])
async def test_next_outside_the_table(make_rig: MakeRig, following: int) -> None:
    rig, queue = await begun(make_rig)
    queue.set_desc(0, *rig.ram.put(b"x"), NEXT, following)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "next index outside")


@pytest.mark.parametrize("length", [1, 2, 16])
async def test_a_chain_that_loops(make_rig: MakeRig, length: int) -> None:
    rig, queue = await begun(make_rig)
    for i in range(length):
        queue.set_desc(i, *rig.ram.put(b"x"), NEXT, (i + 1) % length)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "loops")


async def test_more_buffers_than_the_device_takes(make_rig: MakeRig) -> None:
    rig, queue = await begun(make_rig)
    address, _ = rig.ram.put(b"x")
    entries = 1000
    table = b"".join(struct.pack("<QIHH", address, 1, NEXT, i + 1) for i in range(entries))
    queue.set_desc(0, *rig.ram.put(table + struct.pack("<QIHH", address, 1, 0, 0)), INDIRECT)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "more buffers")


@pytest.mark.parametrize(
    "length", [0, 1, 15, 17, 16 * 0x10000, 0xFFFF_FFF0], ids=["0", "1", "15", "17", "65536 entries", "4 GiB"]
)
async def test_indirect_table_of_a_bad_length(make_rig: MakeRig, length: int) -> None:
    rig, queue = await begun(make_rig)
    queue.set_desc(0, rig.ram.take(64), length, INDIRECT)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "indirect")


@pytest.mark.parametrize("address", [RAM - 16, RAM, ROM_BASE - 16, HIGH_BASE - 16, 0xD000_0000, 2**64 - 16])
async def test_indirect_table_outside_ram(make_rig: MakeRig, address: int) -> None:
    rig, queue = await begun(make_rig)
    queue.set_desc(0, address, 32, INDIRECT)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "indirect")


async def test_indirect_inside_indirect(make_rig: MakeRig) -> None:
    rig, queue = await begun(make_rig)
    inner = rig.ram.put(struct.pack("<QIHH", *rig.ram.put(b"x"), 0, 0))
    queue.set_desc(0, *rig.ram.put(struct.pack("<QIHH", *inner, INDIRECT, 0)), INDIRECT)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "indirect")


async def test_indirect_with_next(make_rig: MakeRig) -> None:
    rig, queue = await begun(make_rig)
    queue.set_desc(0, *rig.ram.put(struct.pack("<QIHH", *rig.ram.put(b"x"), 0, 0)), INDIRECT | NEXT, 1)
    queue.set_desc(1, *rig.ram.put(b"y"))
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "indirect")


@pytest.mark.parametrize("following", [2, 100, 0xFFFF])
async def test_next_outside_the_indirect_table(make_rig: MakeRig, following: int) -> None:
    rig, queue = await begun(make_rig)
    data = rig.ram.put(b"x")
    queue.set_desc(0, *rig.ram.put(struct.pack("<QIHHQIHH", *data, NEXT, following, *data, 0, 0)), INDIRECT)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "next index outside")


async def test_indirect_table_that_loops(make_rig: MakeRig) -> None:
    rig, queue = await begun(make_rig)
    data = rig.ram.put(b"x")
    queue.set_desc(0, *rig.ram.put(struct.pack("<QIHHQIHH", *data, NEXT, 1, *data, NEXT, 0)), INDIRECT)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "loops")


async def test_indirect_without_negotiating(make_rig: MakeRig) -> None:
    rig, queue = await begun(make_rig, PLAIN)
    queue.set_desc(0, *rig.ram.put(struct.pack("<QIHH", *rig.ram.put(b"x"), 0, 0)), INDIRECT)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "indirect")


async def test_an_empty_buffer(make_rig: MakeRig) -> None:
    rig, queue = await begun(make_rig)
    queue.set_desc(0, rig.ram.take(16), 0)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "no bytes")


@pytest.mark.parametrize(
    ("address", "length", "flags"),
    [
        (0x1000, 2**32 - 1, 0),
        (2**64 - 8, 16, 0),  # wraps
        (2**64 - 1, 1, 0),
        (RAM - 8, 16, 0),  # runs into the hole
        (RAM, 1, 0),
        (HIGH_BASE - 8, 16, 0),
        (HIGH_BASE + (1 << 20) - 1, 2, 0),
        (ROM_BASE, 16, WRITE),  # readable only
        (ROM_BASE - 1, 2, 0),
        (0xD000_0000, 16, WRITE),  # the device's own registers: no re-entrancy
        (0xD000_0000, 16, 0),
        (0xFEE0_0000, 16, WRITE),
    ],
)
async def test_a_buffer_outside_ram(make_rig: MakeRig, address: int, length: int, flags: int) -> None:
    rig, queue = await begun(make_rig)
    queue.set_desc(0, address, length, flags)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "not wholly in guest RAM")


async def test_rom_is_readable(make_rig: MakeRig) -> None:
    rig, queue = await begun(make_rig)
    rig.vm.memory.write(ROM_BASE, b"rom!")
    room = rig.ram.take(4)
    head = queue.add([(ROM_BASE, 4)], [(room, 4)])
    queue.kick()
    assert await queue.wait() == [(head, 4)]
    assert rig.vm.memory.read(room, 4) == b"!mor"


async def test_readable_after_writable(make_rig: MakeRig) -> None:
    rig, queue = await begun(make_rig)
    queue.set_desc(0, rig.ram.take(16), 16, WRITE | NEXT, 1)
    queue.set_desc(1, *rig.ram.put(b"late"))
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "after a device-writable")


async def test_more_than_four_gib_in_a_chain(make_rig: MakeRig) -> None:
    rig = await make_rig(lambda vm: Echo(vm, queue_size=1024))
    rig.driver.begin()
    queue = rig.driver.queues[0]
    piece = RAM - 0x1000
    entries = 2**32 // piece + 1
    table = b"".join(struct.pack("<QIHH", 0x1000, piece, NEXT if i + 1 < entries else 0, i + 1) for i in range(entries))
    queue.set_desc(0, *rig.ram.put(table), INDIRECT)
    queue.offer(0)
    queue.kick()
    await expect_reset(rig, "more than 4 GiB")


@pytest.mark.parametrize("jump", [17, 0x100, 0x8000, 0xFFFF])
async def test_available_index_jumps(make_rig: MakeRig, jump: int) -> None:
    """Forwards by more than the ring, or backwards, which is the same modulo 2^16."""
    rig, queue = await begun(make_rig)
    queue.set_word(queue.avail + 2, jump)
    queue.kick()
    await expect_reset(rig, "available index")


async def test_available_index_goes_backwards(make_rig: MakeRig) -> None:
    rig, queue = await begun(make_rig)
    await echo(rig, queue, b"forward")
    rig.driver.messages()
    queue.set_word(queue.avail + 2, 0)
    queue.kick()
    await expect_reset(rig, "available index")


async def test_a_head_posted_twice(make_rig: MakeRig) -> None:
    """While the device has it. A device that gave it back in between may see it again."""

    class Holding(Echo):
        held: list[object]

        def kick(self, index: int) -> None:
            queue = self.queues[index]
            self.held = getattr(self, "held", [])
            while (buffers := queue.take()) is not None:
                self.held.append(buffers)
            if queue.failure is not None:
                self.broken(index, queue.failure)

        def in_flight(self) -> int:
            return 0  # a reset drops what it holds

    rig = await make_rig(Holding)
    rig.driver.begin(size=16)
    queue = rig.driver.queues[0]
    queue.set_desc(3, *rig.ram.put(b"x"))
    queue.offer(3)
    queue.offer(3)
    queue.kick()
    await until(lambda: rig.driver.status & NEEDS_RESET, "NEEDS_RESET")
    assert "still has" in rig.device.queues[0].failure
    assert len(rig.device.held) == 1
    assert rig.device.queues[0].in_flight_count == 1


async def test_a_broken_ring_logs_once(make_rig: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    rig, queue = await begun(make_rig)
    for _ in range(5):
        queue.offer(99)
        queue.kick()
        await until(lambda: rig.driver.status & NEEDS_RESET, "NEEDS_RESET")
    lines = [record for record in caplog.records if "needs reset" in record.message]
    assert len(lines) == 1
    assert "device=echo" in lines[0].message
    await expect_reset(rig, "head outside")


async def test_a_buffer_on_the_ring_itself(make_rig: MakeRig) -> None:
    """Self-inflicted, and nobody else's problem: whatever the guest reads there, we go on."""
    rig, queue = await begun(make_rig)
    junk = rig.ram.put(random.Random(11).randbytes(128))
    queue.set_desc(0, *junk, NEXT, 1)
    queue.set_desc(1, queue.avail, 6 + 2 * 16, WRITE)
    queue.offer(0)
    queue.kick()
    await until(lambda: rig.device.heads, "the request")
    queue.kick()
    await until(lambda: rig.driver.status & NEEDS_RESET, "NEEDS_RESET")
    await rig.driver.reset()


# -- dirty pages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [PLAIN, None])
async def test_every_write_marks_its_page(make_rig: MakeRig, wanted: int | None) -> None:
    rig = await make_rig()
    rig.driver.begin(wanted)
    queue = rig.driver.queues[0]
    await echo(rig, queue, b"warm")
    room = rig.ram.take(3 * 4096, 4096)
    queue.add([rig.ram.put(b"abcdef", align=4096)], [(room + 4094, 4), (room + 8192, 2)])
    rig.vm.memory.track_dirty()
    queue.kick()
    await queue.wait()
    ring = {(queue.used_ring + offset) >> 12 for offset in (0, 2, 4 + 8, 4 + 8 * queue.size)}
    expected = {room >> 12, (room >> 12) + 1, (room >> 12) + 2} | ring
    assert {page >> 12 for page in rig.vm.memory.take_dirty()} == expected


# -- fuzz --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
async def test_fuzzed_rings(make_rig: MakeRig, seed: int) -> None:
    """A ring that mostly makes sense, with content that often does not; the device survives and works after a reset."""
    print(f"seed {seed}")
    rand = random.Random(seed)
    rig = await make_rig()
    rig.driver.begin(size=16)
    resets = 0
    good = [rig.ram.take(4096) for _ in range(8)]
    rig.device.heads = 0
    for _ in range(60):
        queue = rig.driver.queues[0]
        for _ in range(rand.randrange(1, 8)):
            for i in range(queue.size):
                address = rand.choice([*good, *good, rand.getrandbits(64), RAM - 4, queue.desc, queue.used_ring])
                length = rand.choice([1, 16, 512, 4096, 0, rand.getrandbits(32)] + [64] * 8)
                flags = rand.choice([0, NEXT, NEXT, WRITE, WRITE | NEXT, INDIRECT, rand.getrandbits(16)])
                queue.set_desc(i, address, length, flags, rand.choice([(i + 1) % 16, rand.getrandbits(16)]))
            for address in good:
                table = b"".join(
                    struct.pack(
                        "<QIHH", rand.choice(good), rand.choice([1, 64, 0]), rand.getrandbits(3), rand.randrange(6)
                    )
                    for _ in range(4)
                )
                rig.vm.memory.write(address, table)
            queue.offer(rand.choice([rand.randrange(16), rand.randrange(16), rand.getrandbits(16)]))
            queue.kick()
        await until(lambda: rig.device.heads or rig.driver.status & NEEDS_RESET, "any reaction")
        rig.device.heads = 0
        if rig.driver.status & NEEDS_RESET:
            resets += 1
            await rig.driver.reset()
            rig.driver.ram.next = good[-1] + 4096
            rig.driver.restart(size=16)
    assert resets
    await rig.driver.reset()
    rig.driver.restart(size=16)
    await echo(rig, rig.driver.queues[0], b"alive")
