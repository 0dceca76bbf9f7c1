"""The machine as Linux sees it: one guest with 4 CPUs and three disks, booted once for all tests here."""

import base64
import hashlib
import os
import re
import time
import uuid
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from propolis import __version__
from tests.machine.clocks import check_clocks, clocksource
from tests.machine.complaints import IN_LAB, check_complaints
from tests.machine.guest import Guest
from tests.machine.linux import TIMEOUT, linux

pytestmark = [
    pytest.mark.os,
    pytest.mark.shared,
    pytest.mark.timeout(TIMEOUT),
    pytest.mark.asyncio(loop_scope="module"),
]

CPUS = 4
MIB = 1 << 20
DISK_B = 16 * MIB
DISK_C = 8 * MIB
DISKS = {"00:04.0": 1, "00:05.0": 4, "00:06.0": 1}  # address: queues
WINDOW = range(0xC000_0000, 0xE000_0000)

MORE = """
[block_dev.b]
type = "file"
path = "b.raw"
[dev.b]
driver = "pci-virtio-block"
block_dev = "b"
pci-path = "0.5.0"
queues = 4
serial = "SERIAL-B"

[block_dev.c]
type = "file"
path = "c.raw"
read_only = true
[dev.c]
driver = "pci-virtio-block"
block_dev = "c"
pci-path = "0.6.0"

[dev.panic]
driver = "qemu-pvpanic"
enable_isa = true
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Guest]:
    """The guest, logged in."""
    directory = tmp_path_factory.mktemp("machine")
    for name, size in (("b", DISK_B), ("c", DISK_C)):
        with (directory / f"{name}.raw").open("wb") as image:
            image.truncate(size)
    async with linux(directory, cpus=CPUS, more=MORE) as guest:
        await guest.boot()
        await guest.login()
        yield guest
        assert await guest.poweroff() == 0


async def interrupts(vm: Guest) -> dict[str, tuple[list[int], str]]:
    """Lines of /proc/interrupts: counts for each CPU and the text after them, by number or name."""
    lines = (await vm.run("cat /proc/interrupts")).check().splitlines()[1:]
    rows = [re.fullmatch(r" *(\w+):((?: +\d+)+)(.*)", line) for line in lines]
    return {row[1]: ([int(count) for count in row[2].split()], row[3].strip()) for row in rows if row}


# -- processors and interrupts -----------------------------------------------------------------------------------------


async def test_every_cpu_has_a_timer_and_is_called_by_others(vm: Guest) -> None:
    """The local timers go on; interprocessor interrupts arrive everywhere."""
    assert (await vm.run("nproc")).check().strip() == str(CPUS)
    before = await interrupts(vm)
    await vm.run("for mask in 1 2 4 8; do taskset $mask sh -c 'for i in 1 2 3; do usleep 20000; done'; done")
    after = await interrupts(vm)
    assert all(new > old for old, new in zip(before["LOC"][0], after["LOC"][0], strict=True)), (before, after)
    assert all(after["CAL"][0][cpu] + after["RES"][0][cpu] > 0 for cpu in range(CPUS)), after
    assert after["ERR"][0] == [0]
    assert after["MIS"][0] == [0]


async def test_the_topology(vm: Guest) -> None:
    """One socket of single-threaded cores."""
    for key, value in (("siblings", CPUS), ("cpu cores", CPUS)):
        assert f"{CPUS} {key}\t: {value}" in " ".join(
            (await vm.run(f"grep '^{key}' /proc/cpuinfo | sort | uniq -c")).check().split(" ")
        )


async def test_what_the_machine_is_called(vm: Guest) -> None:
    """From SMBIOS; the UUID is one that a VM of this name always has."""
    identity = str(uuid.uuid5(uuid.NAMESPACE_URL, "propolis:linux"))
    for key, value in (
        ("sys_vendor", "Propolis"),
        ("product_name", "Propolis VM"),
        ("product_version", __version__),
        ("product_serial", identity),
        ("product_uuid", identity),
        ("bios_version", __version__),
    ):
        assert (await vm.run(f"cat /sys/class/dmi/id/{key}")).check().strip() == value


# -- PCI ---------------------------------------------------------------------------------------------------------------


async def test_lspci(vm: Guest) -> None:
    """Identities, assigned BARs, MSI-X, interrupt lines."""
    text = (await vm.run("lspci -vvn 2>/dev/null")).check()
    functions = {block.split(" ", 1)[0]: block for block in text.strip().split("\n\n")}
    assert {address: re.findall(r"\w{4}:\w{4}", block)[0] for address, block in functions.items()} == {
        "00:00.0": "8086:1237",
        "00:01.0": "8086:7000",
        "00:01.3": "8086:7113",
    } | dict.fromkeys(DISKS, "1af4:1042")
    for word in ("unassigned", "disabled", "virtual", "ignored", "<access denied>", "<TAbort+", "<MAbort+", "<PERR+"):
        assert word not in text
    assert "pin A routed to IRQ 9" in functions["00:01.3"]
    taken: list[range] = []
    for address, queues in DISKS.items():
        block = functions[address]
        bars = {
            int(n): (int(base, 16), size) for n, base, size in re.findall(r"Region (\d): .* at (\w+) .*=(\w+)\]", block)
        }
        assert {n: size for n, (_, size) in bars.items()} == {1: "4K", 2: "16K"}, block
        for base, size in bars.values():
            bar = range(base, base + (int(size[:-1]) << 10))
            assert base % len(bar) == 0
            assert bar.start in WINDOW
            assert all(bar.start >= other.stop or bar.stop <= other.start for other in taken), (bar, taken)
            taken.append(bar)
        assert f"MSI-X: Enable+ Count={queues + 1} Masked-" in block
        assert "BusMaster+" in block
        assert re.search(r"Interrupt: pin [A-D] routed to IRQ (5|10|11)\n", block), block
        assert "Kernel driver in use: virtio-pci" in block
        assert "(rev 01)" in block


async def test_configuration_space_reads_alike_at_every_width(vm: Guest) -> None:
    """`lspci -xxx` reads bytes; the kernel's file is read in larger pieces."""
    for address in ("00:01.0", "00:05.0"):
        dump = (await vm.run(f"lspci -xxx -s {address} 2>/dev/null")).check()
        listed = bytes.fromhex("".join(re.findall(r"^[0-9a-f]{2}: (.*)$", dump, re.MULTILINE)))
        assert len(listed) == 256
        whole = (await vm.run(f"base64 -w0 /sys/bus/pci/devices/0000:{address}/config")).check()
        assert base64.b64decode(whole) == listed


# -- disks -------------------------------------------------------------------------------------------------------------


async def test_disks_say_what_they_are(vm: Guest) -> None:
    """Size, identifier, queues, write protection, what they can."""
    asked = "cd /sys/block/$d; echo $(cat serial); cat size ro queue/write_cache; ls mq | wc -l; cd"
    lines = (await vm.run(f"for d in vda vdb vdc; do {asked}; done")).check().splitlines()
    root = os.stat(vm.directory / "disk.raw").st_size
    assert lines == [
        *("root", str(root // 512), "0", "write back", "1"),
        *("SERIAL-B", str(DISK_B // 512), "0", "write back", str(CPUS)),
        *("c", str(DISK_C // 512), "1", lines[13], "1"),
    ]


async def test_every_queue_is_used(vm: Guest) -> None:
    """A CPU's requests go to its own queue and come back by that queue's vector."""
    for cpu in range(CPUS):
        await vm.run(f"taskset {1 << cpu:x} dd if=/dev/vdb of=/dev/null bs=64k skip={cpu * 16} count=16")
    rows = await interrupts(vm)
    counts = {text.rsplit(" ", 1)[1]: sum(row) for row, text in rows.values() if "virtio1-req" in text}
    assert counts.keys() == {f"virtio1-req.{queue}" for queue in range(CPUS)}
    assert all(counts.values()), counts


async def test_written_flushed_discarded(vm: Guest) -> None:
    """After fsync the file on this side has the data; after a discard neither side has, and the space is given back."""
    image = vm.directory / "b.raw"
    size = 4 * MIB
    written = await vm.run(
        f"dd if=/dev/urandom of=/tmp/data bs=64k count={size >> 16} && "
        f"dd if=/tmp/data of=/dev/vdb bs=64k conv=fsync && sha256sum </tmp/data"
    )
    data = image.read_bytes()[:size]
    assert hashlib.sha256(data).hexdigest() in written.check()
    held = image.stat().st_blocks
    assert held * 512 >= size
    (await vm.run("blkdiscard /dev/vdb")).check()
    assert image.stat().st_blocks < held
    assert image.read_bytes() == bytes(DISK_B)
    assert (await vm.run("cmp -n 4194304 /dev/vdb /dev/zero")).check() == ""


async def test_a_file_system_is_made_and_trimmed(vm: Guest) -> None:
    """By the guest, on a disk with several queues."""
    (await vm.run("mke2fs /dev/vdb >/dev/null && mount -t ext4 /dev/vdb /mnt")).check()
    (await vm.run("cp /bin/busybox /mnt/ && sync && rm /mnt/busybox && sync")).check()
    assert re.search(r"/mnt: \d+ bytes trimmed", (await vm.run("fstrim -v /mnt")).check())
    (await vm.run("umount /mnt")).check()


async def test_a_read_only_disk_cannot_be_written(vm: Guest) -> None:
    """The guest is told, and the file stays as it is."""
    assert (await vm.run("echo x >/dev/vdc")).status != 0
    assert (await vm.run("blkdiscard /dev/vdc")).status != 0
    assert (vm.directory / "c.raw").read_bytes() == bytes(DISK_C)


# -- clocks ------------------------------------------------------------------------------------------------------------


async def test_the_kvm_clock_and_the_rtc_are_right(vm: Guest) -> None:
    """At once and ten seconds later."""
    assert await clocksource(vm) == "kvm-clock"
    assert "Hypervisor detected: KVM" in (await vm.run("dmesg | grep Hypervisor")).check()
    await check_clocks(vm, time.time)
    await vm.run("sleep 10")
    await check_clocks(vm, time.time)


async def test_the_rtc_alarm_rings(vm: Guest) -> None:
    """Two seconds ahead, by interrupt 8; the hwclock program agrees with the kernel."""
    before = (await interrupts(vm))["8"]
    assert before[1] == "IO-APIC   8-edge      rtc0"
    (await vm.run("echo +2 >/sys/class/rtc/rtc0/wakealarm; sleep 4")).check()
    assert sum((await interrupts(vm))["8"][0]) > sum(before[0])
    shown = (await vm.run("hwclock -r -u; date -u +'%a %b %e %H:%M'")).check().splitlines()
    assert shown[1] in shown[0] or time.gmtime().tm_sec in (59, 0, 1, 2, 3), shown


# -- console -----------------------------------------------------------------------------------------------------------


async def test_four_serial_ports_with_fifos(vm: Guest) -> None:
    """All of them 16550A."""
    text = (await vm.run("dmesg | grep -o 'ttyS[0-3] at I/O 0x.*'")).check()
    assert re.findall(r"(ttyS\d) at I/O (0x\w+) \(irq = (\d), base_baud = 115200\) is a 16550A", text) == [
        ("ttyS0", "0x3f8", "4"),
        ("ttyS1", "0x2f8", "3"),
        ("ttyS2", "0x3e8", "4"),
        ("ttyS3", "0x2e8", "3"),
    ]


async def test_large_output_is_complete(vm: Guest, rounds: int) -> None:
    """Every character once and in order; emulated, a character takes 200 us."""
    last = rounds * (4_000 if IN_LAB else 200_000)
    output = (await vm.run(f"seq 1 {last}", within=300)).check()
    assert (
        hashlib.sha256(output.encode()).digest()
        == hashlib.sha256("".join(f"{number}\n" for number in range(1, last + 1)).encode()).digest()
    )


async def test_large_input_is_complete(vm: Guest) -> None:
    """Typed faster than anyone can."""
    text = base64.encodebytes(os.urandom(6000))
    await vm.run("stty -echo")
    await vm.send("echo ready; cat >/tmp/pasted\n")
    await vm.expect(r"ready\r\n", 20, "the reader")  # only now the terminal is no more the shell's own
    await vm.send(text.decode() + "\x04")
    await vm.expect(r"guest\[0\]:[^\r\n]*# ", 120, "the end of the input")
    await vm.run("stty echo")
    assert hashlib.sha256(text).hexdigest() in (await vm.run("sha256sum /tmp/pasted")).check()


# -- what the kernel says ----------------------------------------------------------------------------------------------


async def test_no_complaints(vm: Guest) -> None:
    """Last, so that it sees what all the others caused."""
    await check_complaints(vm)
