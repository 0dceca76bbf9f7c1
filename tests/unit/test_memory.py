"""Guest memory: regions and their backings, translation, guard pages, views and the record of dirty pages."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from propolis._memory import GuestMemory
from propolis.errors import GuestMemoryError

PAGE = 4096
HUGE = 2 << 20
TOP = 1 << 64


def free_huge_pages() -> int:
    """2 MiB pages that this host can give now."""
    try:
        return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())
    except FileNotFoundError:
        return 0


def need(backing: str) -> None:
    if backing == "hugetlb" and free_huge_pages() < 2:
        pytest.skip("this host has no free 2 MiB pages (sysctl vm.nr_hugepages)")


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """0x1000..0x4fff, read-only 0x8000..0x8fff, 0x9000..0xafff beside it, and the top of what RAM may be."""
    memory = GuestMemory()
    memory.add(0x1000, 4 * PAGE)
    memory.add(0x8000, PAGE, read_only=True)
    memory.add(0x9000, 2 * PAGE, "memfd")
    memory.add(TOP - 2 * PAGE, PAGE)
    yield memory
    memory.close()


# -- regions -----------------------------------------------------------------------------------------------------------


def test_regions_are_listed_as_they_were_added(memory: GuestMemory) -> None:
    """gpa, size, backing, read-only; only a file-backed region has a descriptor."""
    listed = memory.regions_list()
    assert [entry[:4] for entry in listed] == [
        (0x1000, 4 * PAGE, "anonymous", False),
        (0x8000, PAGE, "anonymous", True),
        (0x9000, 2 * PAGE, "memfd", False),
        (TOP - 2 * PAGE, PAGE, "anonymous", False),
    ]
    assert [entry[4] >= 0 for entry in listed] == [False, False, True, False]


@pytest.mark.parametrize("backing", ["anonymous", "memfd", "hugetlb"])
def test_every_backing_reads_zero_and_keeps_what_is_written(backing: str) -> None:
    """Also in its last byte, and a huge page begins at a huge-page boundary of the host."""
    need(backing)
    memory = GuestMemory()
    memory.add(0x4000_0000, HUGE, backing)
    assert memory.read(0x4000_0000, HUGE) == bytes(HUGE)
    memory.write(0x4000_0000, b"first")
    memory.write(0x4000_0000 + HUGE - 4, b"last")
    assert memory.read(0x4000_0000, 5) == b"first"
    assert memory.read(0x4000_0000 + HUGE - 4, 4) == b"last"
    assert memory.host_address(0x4000_0000, HUGE) % HUGE == 0
    memory.close()


def test_a_memfd_region_is_shared_with_who_has_its_descriptor() -> None:
    """Another process maps the same pages: rings for vhost-user need that."""
    memory = GuestMemory()
    memory.add(0, 2 * PAGE, "memfd")
    fd = memory.regions_list()[0][4]
    memory.write(PAGE, b"ours")
    assert os.pread(fd, 4, PAGE) == b"ours"
    os.pwrite(fd, b"theirs", 10)
    assert memory.read(10, 6) == b"theirs"
    assert not os.get_inheritable(fd)
    memory.close()


def test_hugetlb_memory_that_the_host_lacks_is_refused() -> None:
    """When it is added, not by a SIGBUS when it is first touched."""
    memory = GuestMemory()
    with pytest.raises(GuestMemoryError, match="hugetlb"):
        memory.add(0, (free_huge_pages() + 1) * HUGE, "hugetlb")
    assert memory.regions_list() == []
    memory.close()


def test_a_refused_region_leaves_nothing() -> None:
    """No region, and (by the check after every test) no descriptor."""
    memory = GuestMemory()
    with pytest.raises(GuestMemoryError):
        memory.add(0, 1 << 47, "memfd")
    assert memory.regions_list() == []
    memory.close()


@pytest.mark.parametrize(
    ("gpa", "size"),
    [(0, 0), (1, PAGE), (0, PAGE - 1), (0, PAGE + 1), (TOP - PAGE, PAGE), (TOP - PAGE, 2 * PAGE), (PAGE, TOP - PAGE)],
)
def test_a_range_that_is_no_range_of_pages_is_refused(gpa: int, size: int) -> None:
    """Empty, unaligned, or wrapping around the end of the address space."""
    with pytest.raises(GuestMemoryError, match="not a range"):
        GuestMemory().add(gpa, size)


@pytest.mark.parametrize(("gpa", "size"), [(0, TOP - PAGE), (0, 1 << 63), (PAGE, TOP - 2 * PAGE)])
def test_a_range_beyond_the_host_is_refused(gpa: int, size: int) -> None:
    """Sizes whose reservation would wrap included."""
    with pytest.raises(GuestMemoryError, match="Cannot allocate memory"):
        GuestMemory().add(gpa, size)


def test_hugetlb_wants_huge_pages() -> None:
    with pytest.raises(GuestMemoryError, match="2097152-byte pages"):
        GuestMemory().add(0, HUGE + PAGE, "hugetlb")


@pytest.mark.parametrize("backing", ["", "Anonymous", "file"])
def test_an_unknown_backing_is_refused(backing: str) -> None:
    with pytest.raises(GuestMemoryError, match="expected anonymous, memfd or hugetlb"):
        GuestMemory().add(0, PAGE, backing)


@pytest.mark.parametrize(
    ("gpa", "pages"),
    [(0x1000, 4), (0x0, 2), (0x4000, 1), (0x4000, 8), (0x2000, 1), (0x0, 64), (0x7000, 2), (0xA000, 1)],
)
def test_overlapping_regions_are_refused(memory: GuestMemory, gpa: int, pages: int) -> None:
    """Equal, at either end, inside, around, and over two."""
    with pytest.raises(GuestMemoryError, match="overlaps"):
        memory.add(gpa, pages * PAGE)


def test_neighbours_do_not_overlap(memory: GuestMemory) -> None:
    memory.add(0, PAGE)
    memory.add(0x5000, 3 * PAGE)
    assert len(memory.regions_list()) == 6


def test_there_is_an_end_to_regions() -> None:
    memory = GuestMemory()
    for number in range(16):
        memory.add(number * PAGE, PAGE)
    with pytest.raises(GuestMemoryError, match="more than 16"):
        memory.add(16 * PAGE, PAGE)
    memory.close()


# -- translation -------------------------------------------------------------------------------------------------------


VALID = [
    (0x1000, 1),
    (0x1000, 4 * PAGE),
    (0x4FFF, 1),
    (0x4000, PAGE),
    (0x8000, PAGE),
    (0x9000, 2 * PAGE),
    (0xAFFF, 1),
    (TOP - 2 * PAGE, PAGE),
    (TOP - PAGE - 1, 1),
]
INVALID = [
    (0x0FFF, 1),  # below
    (0x0FFF, 2),  # into it
    (0x0, TOP - 1),
    (0x4FFF, 2),  # out of it
    (0x1000, 4 * PAGE + 1),
    (0x5000, 1),  # behind
    (0x8FFF, 2),  # from one region into its neighbour
    (0x7FFF, 1),
    (0xB000, 1),
    (0x1000, TOP - 1),
    (0x1001, TOP - 1),
    (0x2000, TOP - 0x1000),  # address + length wraps to the start of the region
    (0x4FFF, TOP - 0x3FFF),
    (TOP - PAGE - 1, 2),
    (TOP - PAGE, 1),
    (TOP - 1, 1),
    (TOP - 1, 2),
    (TOP - 2 * PAGE, 3 * PAGE),  # wraps to 0x1000
]


@pytest.mark.parametrize(("gpa", "length"), VALID)
def test_a_range_inside_one_region_translates(memory: GuestMemory, gpa: int, length: int) -> None:
    assert memory.host_address(gpa, length)
    assert memory.read(gpa, length) == bytes(length)
    assert memory.view(gpa, length).nbytes == length


@pytest.mark.parametrize(("gpa", "length"), INVALID)
def test_a_range_not_wholly_in_one_region_does_not(memory: GuestMemory, gpa: int, length: int) -> None:
    """Address and length together, whatever they add up to."""
    for access in (memory.host_address, memory.read, memory.view):
        with pytest.raises(GuestMemoryError, match="not wholly in one region"):
            access(gpa, length)


@pytest.mark.parametrize("gpa", [0x0FFF, 0x4FFF, 0x5000, 0x8FFF, TOP - 1])
def test_a_write_out_of_a_region_changes_nothing(memory: GuestMemory, gpa: int) -> None:
    with pytest.raises(GuestMemoryError):
        memory.write(gpa, b"xx")
    assert memory.read(0x4FFF, 1) == memory.read(0x8FFF, 1) == memory.read(0x9000, 1) == b"\0"


@pytest.mark.parametrize("gpa", [0x1000, 0x4FFF, 0x5000, 0])
def test_no_length_is_no_range(memory: GuestMemory, gpa: int) -> None:
    """Pointers to nothing are never given; copying nothing is harmless."""
    with pytest.raises(GuestMemoryError):
        memory.host_address(gpa, 0)
    with pytest.raises(GuestMemoryError):
        memory.view(gpa, 0)
    assert memory.read(gpa, 0) == b""
    memory.write(gpa, b"")


@pytest.mark.parametrize(("gpa", "length"), [(-1, 1), (0x1000, -1), (TOP, 1), (0x1000, TOP)])
def test_numbers_outside_64_bits_are_refused(memory: GuestMemory, gpa: int, length: int) -> None:
    for access in (memory.host_address, memory.read, memory.view):
        with pytest.raises(OverflowError):
            access(gpa, length)


def test_intent_is_part_of_translation(memory: GuestMemory) -> None:
    """What a guest may not write, a device may not write for it; a loader may."""
    assert memory.host_address(0x8000, PAGE)
    with pytest.raises(GuestMemoryError, match="not wholly in one region"):
        memory.host_address(0x8000, PAGE, writable=True)
    assert memory.host_address(0x1000, 4 * PAGE, writable=True) == memory.host_address(0x1000, 4 * PAGE)
    memory.write(0x8000, b"firmware")
    assert memory.read(0x8000, 8) == b"firmware"


def test_regions_with_each_their_pages(memory: GuestMemory) -> None:
    """No two guest pages share a host page."""
    pages = [(0x1000, 4), (0x8000, 1), (0x9000, 2), (TOP - 2 * PAGE, 1)]
    for gpa, count in pages:
        for number in range(count):
            memory.write(gpa + number * PAGE, (gpa + number * PAGE).to_bytes(8, "little") * (PAGE // 8))
    for gpa, count in pages:
        for number in range(count):
            at = gpa + number * PAGE
            assert memory.read(at, PAGE) == at.to_bytes(8, "little") * (PAGE // 8)


# -- guard pages -------------------------------------------------------------------------------------------------------

TOUCH = """
import ctypes, resource, sys
from propolis._memory import GuestMemory
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
memory = GuestMemory()
memory.add(0x10000, 0x200000, sys.argv[1])
memory.add(0x210000, 0x200000, sys.argv[1])
first = memory.host_address(0x10000, 0x200000)
byte = ctypes.c_char.from_address(first + int(sys.argv[2]))
print("touch", flush=True)
if sys.argv[3] == "write":
    byte.value = b"x"
print(byte.value.hex(), flush=True)
"""


def touch(backing: str, offset: int, how: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", TOUCH, backing, str(offset), how]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("backing", ["anonymous", "memfd", "hugetlb"])
@pytest.mark.parametrize("offset", [-1, -PAGE, HUGE, HUGE + PAGE - 1])
def test_a_guard_page_lies_on_both_sides(backing: str, offset: int) -> None:
    """Even between regions whose guest addresses are neighbours."""
    need(backing)
    ended = touch(backing, offset, "write" if offset % 2 else "read")
    assert (ended.returncode, ended.stdout) == (-signal.SIGSEGV, "touch\n"), ended.stderr


@pytest.mark.parametrize("offset", [0, HUGE - 1])
def test_no_guard_page_lies_inside(offset: int) -> None:
    ended = touch("anonymous", offset, "write")
    assert (ended.returncode, ended.stdout) == (0, "touch\n78\n"), ended.stderr


def test_a_forked_child_does_not_see_guest_memory() -> None:
    """A helper that a VMM forks must not hold the guest's secrets."""
    code = """
import ctypes, os, resource
from propolis._memory import GuestMemory
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
memory = GuestMemory()
memory.add(0, 0x1000)
child = os.fork()
if child == 0:
    ctypes.c_char.from_address(memory.host_address(0, 1)).value
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == f"{-signal.SIGSEGV}\n", ended.stderr


# -- views -------------------------------------------------------------------------------------------------------------


def test_a_view_is_the_memory_itself(memory: GuestMemory) -> None:
    view = memory.view(0x2000, PAGE)
    view[0:4] = b"view"
    assert memory.read(0x2000, 4) == b"view"
    memory.write(0x2FFF, b"!")
    assert view[-1] == ord("!")
    assert ctypes.addressof(ctypes.c_char.from_buffer(view)) == memory.host_address(0x2000, PAGE)


def test_close_is_refused_while_a_view_is_alive(memory: GuestMemory) -> None:
    """Every export counts, a slice of a view none of its own."""
    first, second = memory.view(0x2000, 16), memory.view(0x3000, 16)
    part = first[4:8]
    with pytest.raises(GuestMemoryError, match="2 views"):
        memory.close()
    second.release()
    del first
    with pytest.raises(GuestMemoryError, match="1 views"):
        memory.close()
    assert bytes(part) == bytes(4)
    part.release()
    memory.close()


def test_a_view_keeps_its_memory(memory: GuestMemory) -> None:
    """Dropping the last name of the memory does not unmap it under a view."""
    other = GuestMemory()
    other.add(0, PAGE)
    view = other.view(0, 16)
    del other
    view[0] = 7
    assert view[0] == 7


def test_close_twice_and_use_after_close(memory: GuestMemory) -> None:
    memory.close()
    memory.close()
    assert memory.regions_list() == []
    with pytest.raises(GuestMemoryError):
        memory.read(0x1000, 1)


# -- dirty pages -------------------------------------------------------------------------------------------------------


def test_nothing_is_recorded_until_tracking_starts(memory: GuestMemory) -> None:
    memory.write(0x1000, b"x")
    assert memory.take_dirty() == []
    memory.track_dirty()
    assert memory.take_dirty() == []


@pytest.mark.parametrize(
    ("gpa", "length", "pages"),
    [
        (0x1000, 1, [0x1000]),
        (0x1FFF, 1, [0x1000]),
        (0x1FFF, 2, [0x1000, 0x2000]),
        (0x2000, PAGE, [0x2000]),
        (0x2001, PAGE, [0x2000, 0x3000]),
        (0x1000, 4 * PAGE, [0x1000, 0x2000, 0x3000, 0x4000]),
        (0x8000, PAGE, [0x8000]),
        (0xAFFF, 1, [0xA000]),
        (TOP - PAGE - 1, 1, [TOP - 2 * PAGE]),
    ],
)
@pytest.mark.parametrize("how", ["write", "view"])
def test_exactly_the_written_pages_are_dirty_once(
    memory: GuestMemory, gpa: int, length: int, pages: list[int], how: str
) -> None:
    memory.track_dirty()
    if how == "write":
        memory.write(gpa, b"d" * length)
    else:
        with memory.view(gpa, length) as view:
            view[:] = b"d" * length
        assert memory.take_dirty() == []  # the writer says what it wrote
        memory.mark(gpa, length)
    assert memory.take_dirty() == pages
    assert memory.take_dirty() == []


def test_reading_dirties_nothing(memory: GuestMemory) -> None:
    memory.track_dirty()
    memory.read(0x1000, 4 * PAGE)
    memory.view(0x1000, PAGE).release()
    memory.host_address(0x1000, PAGE)
    assert memory.take_dirty() == []


def test_a_refused_write_dirties_nothing(memory: GuestMemory) -> None:
    memory.track_dirty()
    with pytest.raises(GuestMemoryError):
        memory.write(0x4FFF, b"xx")
    assert memory.take_dirty() == []


@pytest.mark.parametrize(
    ("gpa", "length", "pages"),
    [
        (0x4000, TOP - 1, [0x4000]),
        (0x4FFF, 2, [0x4000]),
        (0x1000, 0, []),
        (0x5000, PAGE, []),
        (0x0, TOP - 1, []),
        (TOP - 1, 1, []),
    ],
)
def test_marking_ends_with_the_region(memory: GuestMemory, gpa: int, length: int, pages: list[int]) -> None:
    """However wrong the length is."""
    memory.track_dirty()
    memory.mark(gpa, length)
    assert memory.take_dirty() == pages


def test_dirty_pages_come_in_order_over_words_and_regions() -> None:
    """Bits 0, 63, 64 and the last one of a bitmap, of two regions."""
    memory = GuestMemory()
    memory.add(1 << 32, 256 * PAGE)
    memory.add(0, 65 * PAGE)
    memory.track_dirty()
    expected = []
    for base, numbers in ((1 << 32, (0, 63, 64, 255)), (0, (0, 64))):
        for number in numbers:
            memory.write(base + number * PAGE, b"x")
            expected.append(base + number * PAGE)
    assert memory.take_dirty() == expected
    memory.track_dirty()  # again: still recording, and clean
    assert memory.take_dirty() == []
    memory.write(0, b"x")
    assert memory.take_dirty() == [0]
    memory.close()


def test_a_region_added_while_tracking_is_tracked_too(memory: GuestMemory) -> None:
    memory.track_dirty()
    memory.add(0x10_0000, PAGE)
    memory.write(0x10_0000, b"x")
    assert memory.take_dirty() == [0x10_0000]
