"""`propolis-standalone` as a program: exit statuses, messages, signals, names, locks, reboots. Its guests are tiny."""

import asyncio
import contextlib
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from propolis.hypervisor._kvm import KvmVm
from propolis.hypervisor.cpuid import HYPERVISOR_LEAVES, SIGNIFICANT_INDEX, Entry
from propolis.names import NameLock
from tests.machine import kernels, tiny
from tests.machine.conftest import GUEST_PAGES, free_huge_pages
from tests.machine.guest import SLOWER, Guest

pytestmark = [pytest.mark.kvm, pytest.mark.program]

SOON = 20


async def ready(vm: Guest) -> None:
    """The guest has greeted."""
    await vm.expect("ready", SOON, "the kernel's greeting")


# -- exit statuses -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("main", "status"), [("", 0), ("exit_on_halt = 7", 7), ("exit_on_reboot = 9", 0)])
async def test_power_off(tmp_path: Path, main: str, status: int) -> None:
    """By the guest, after it ran for a while."""
    async with tiny.guest(tmp_path, main=main) as vm:
        await ready(vm)
        await vm.send("hello")
        await vm.expect("hello", SOON, "the echo")
        await vm.send("P")
        assert await vm.exit_status() == status
    assert tiny.log(vm) == ""
    assert not (tmp_path / "ttya").exists()


@pytest.mark.parametrize("key", ["R", "T"])
async def test_exit_on_reboot(tmp_path: Path, key: str) -> None:
    """A reset and a triple fault are reboots."""
    async with tiny.guest(tmp_path, main="exit_on_halt = 3\nexit_on_reboot = 9") as vm:
        await ready(vm)
        await vm.send(key)
        assert await vm.exit_status() == 9


async def test_a_failure_shows_registers_and_instruction(tmp_path: Path) -> None:
    """Once, in one line."""
    async with tiny.guest(tmp_path) as vm:
        await ready(vm)
        await vm.send("F")
        assert await vm.exit_status() == 1
    wanted = r"propolis-standalone: vCPU 0: KVM internal error: .*; rip=0x10[0-9a-f]{4} .* code=d9 05 00 00 00 d0 .*\n"
    assert re.fullmatch(wanted, tiny.log(vm))
    assert not (tmp_path / "ttya").exists()


def test_every_problem_of_a_configuration_is_told(tmp_path: Path) -> None:
    """With its place, and nothing is started."""
    (tmp_path / "vm.toml").write_text('[main]\nname = "x"\ncpus = 99\nmemory = "big"\nkernal = "k"\n')
    for options in ([], ["--check"]):
        ended = tiny.run(tmp_path, *options, "vm.toml")
        assert ended.returncode == 2
        lines = ended.stderr.splitlines()
        assert len(lines) == 4, lines
        assert all(re.match(r"vm\.toml:\d+:\d+: ", line) for line in lines)


def test_check_starts_nothing(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    ended = tiny.run(tmp_path, "--check", "vm.toml")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_no_configuration(tmp_path: Path) -> None:
    ended = tiny.run(tmp_path, "absent.toml")
    assert ended.returncode == 2
    assert re.fullmatch(r".*absent\.toml.*No such file or directory\n", ended.stderr)


def test_no_kernel(tmp_path: Path) -> None:
    tiny.write(tmp_path)
    (tmp_path / "vm.toml.kernel").unlink()
    ended = tiny.run(tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == (
        f"propolis-standalone: open kernel '{tmp_path}/vm.toml.kernel': No such file or directory\n"
    )


def test_no_disk(tmp_path: Path) -> None:
    tiny.write(tmp_path, more=tiny.disk("absent.raw"))
    ended = tiny.run(tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == f"propolis-standalone: open disk '{tmp_path}/absent.raw': No such file or directory\n"


def test_a_kernel_that_is_cut_off(tmp_path: Path) -> None:
    """One line that names the field."""
    tiny.write(tmp_path, kernel=tiny.MONITOR[:-100])
    ended = tiny.run(tmp_path)
    assert ended.returncode == 1
    assert re.fullmatch(r"propolis-standalone: kernel '.*vm\.toml\.kernel': .*p_filesz.*\n", ended.stderr)


def test_without_standard_descriptors(tmp_path: Path) -> None:
    """Nothing that is opened later passes for one of them."""
    tiny.write(tmp_path, kernels.kernel(kernels.power_off()))
    ended = tiny.run(tmp_path, before=["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"])
    assert ended.returncode == 0


NO_KVM = {
    "mount -t tmpfs none /dev": "/dev/kvm does not exist: load the module kvm_intel or kvm_amd",
    "mount -t tmpfs -o nodev none /dev && mknod /dev/kvm c 10 232": (
        "/dev/kvm: permission denied: join the group kvm, or run as root"
    ),
}


@pytest.mark.parametrize("hide", NO_KVM)
def test_without_kvm(tmp_path: Path, hide: str) -> None:
    """The message says what to do. In a mount namespace whose /dev is ours."""
    tiny.write(tmp_path)
    ended = tiny.run(tmp_path, before=["unshare", "--mount", "sh", "-c", f'{hide} || exit 99; exec "$@"', "sh"])
    if ended.returncode == 99 or ended.stderr.startswith("unshare:"):
        pytest.skip(f"no mount namespace to hide /dev/kvm in: {ended.stderr.strip()}")
    assert ended.returncode == 1
    assert ended.stderr == f"propolis-standalone: {NO_KVM[hide]}\n"


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_the_first_signal_presses_the_power_button(tmp_path: Path, number: signal.Signals) -> None:
    """The guest powers off because of it."""
    async with tiny.guest(tmp_path) as vm:
        await ready(vm)
        assert vm.process is not None
        vm.process.send_signal(number)
        await vm.expect("button", SOON, "the guest's word that the button was pressed")
        assert await vm.exit_status() == 0


@pytest.mark.parametrize("key", ["", "S"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_the_second_signal_ends_the_vm(tmp_path: Path, number: signal.Signals, key: str) -> None:
    """Whether the guest has heard the first and does nothing, or spins."""
    async with tiny.guest(tmp_path, tiny.DEAF) as vm:
        await ready(vm)
        assert vm.process is not None
        vm.process.send_signal(number)
        await vm.expect("not now", SOON, "the guest's word that the button was pressed")
        await vm.send(key)
        vm.process.send_signal(number)
        assert await vm.exit_status() == 128 + number
    assert tiny.log(vm) == ""
    assert not (tmp_path / "ttya").exists()


START = 0.3  # seconds in which a start on a quick machine is over


def started(directory: Path, *before: str) -> "subprocess.Popen[str]":
    """The program, whose signals are its own from now on: Python itself leaves SIGHUP alone."""
    process = subprocess.Popen([*before, *tiny.PROGRAM, "vm.toml"], cwd=directory, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + SOON * SLOWER
    while not is_caught(process.pid, signal.SIGHUP):
        assert time.monotonic() < deadline, "the program does not look after its signals"
        assert process.poll() is None, process.stderr and process.stderr.read()
    return process


def is_caught(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return match is not None and bool(int(match[1], 16) >> (number - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_at_any_moment_of_the_start(tmp_path: Path, number: signal.Signals, rounds: int) -> None:
    """Ends the program with its status and without a word; where the guest runs already, the second one does."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    dice = random.Random(seed)
    tiny.write(tmp_path, tiny.DEAF)
    for _ in range(6 * rounds):
        process = started(tmp_path)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(dice.random() ** 2 * START * SLOWER)
            for _ in range(20):
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5 * SLOWER)
                    break
            _, said = process.communicate(timeout=SOON * SLOWER)
        finally:
            process.kill()
        assert (process.returncode, said) == (128 + number, "")
        assert not (tmp_path / "ttya").exists()


async def test_the_button_is_pressed_before_a_reboot_and_after(tmp_path: Path) -> None:
    """A reboot does not wear it out."""
    async with tiny.guest(tmp_path, tiny.DEAF) as vm:
        assert vm.process is not None
        await ready(vm)
        vm.process.send_signal(signal.SIGTERM)
        await vm.expect("not now", SOON, "the guest's word that the button was pressed")
        await vm.send("R")
        await ready(vm)
        await vm.send("P")
        assert await vm.exit_status() == 0


# -- names -------------------------------------------------------------------------------------------------------------


async def test_a_second_start_ends_the_first(tmp_path: Path) -> None:
    """That is asked to power off, wherever it was started; the second is a new VM."""
    (tmp_path / "elsewhere").mkdir()
    async with tiny.guest(tmp_path) as first:
        await ready(first)
        async with tiny.guest(tmp_path / "elsewhere") as second:
            assert await first.exit_status() == 0
            await first.expect("button", SOON, "the first guest's word that its button was pressed")
            await ready(second)
            await second.send("P")
            assert await second.exit_status() == 0


async def test_a_second_start_in_the_same_folder(tmp_path: Path) -> None:
    """Has the console and the disk that the first one had, which does not want to end and is made to."""
    more = tiny.disk("disk.raw")
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    async with tiny.guest(tmp_path, tiny.DEAF, more=more) as first:
        await ready(first)
        await first.send("S")
        tiny.write(tmp_path, kernels.kernel(kernels.power_off()), more=more)
        ended = await asyncio.to_thread(tiny.run, tmp_path)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert await first.exit_status() == 128 + signal.SIGTERM


async def test_a_signal_while_an_earlier_vm_is_ended(tmp_path: Path) -> None:
    """Ends the waiting one, which has not begun; the other was asked to power off and has not."""
    tiny.write(tmp_path)
    async with tiny.guest(tmp_path, tiny.DEAF) as first:
        await ready(first)
        second = await asyncio.create_subprocess_exec(
            *tiny.PROGRAM, "vm.toml", cwd=tmp_path, stderr=asyncio.subprocess.PIPE
        )
        await first.expect("not now", SOON, "the first guest's word that its button was pressed")
        second.send_signal(signal.SIGINT)
        _, error = await second.communicate()
        assert (second.returncode, error) == (128 + signal.SIGINT, b"")
        await first.send("still here")
        await first.expect("still here", SOON, "the first guest's echo")


async def test_a_start_that_cannot_be_ends_nobody(tmp_path: Path) -> None:
    """A kernel that is missing is told while the first VM runs on."""
    async with tiny.guest(tmp_path) as first:
        await ready(first)
        tiny.write(tmp_path, main='initrd = "gone"', file="second.toml")
        ended = await asyncio.to_thread(tiny.run, tmp_path, "second.toml")
        assert ended.returncode == 1
        assert "gone': No such file" in ended.stderr
        await first.send("still here")
        await first.expect("still here", SOON, "the first guest's echo")


async def test_the_daemons_name_is_refused(tmp_path: Path) -> None:
    """And nothing of it is touched."""
    tiny.write(tmp_path)
    with await NameLock.acquire(tiny.NAME, program="daemon"):
        ended = await asyncio.to_thread(tiny.run, tmp_path)
    assert ended.returncode == 1
    assert re.fullmatch(
        rf"propolis-standalone: VM '{tiny.NAME}' belongs to the daemon's keeper, process \d+\n", ended.stderr
    )


# -- disks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["", "read_only = true"])
async def test_a_disk_that_another_vm_writes(tmp_path: Path, second: str) -> None:
    """Is refused for writing and for reading, with the name of the holder."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    async with tiny.guest(tmp_path, more=tiny.disk("disk.raw")) as vm:
        await ready(vm)
        assert vm.process is not None
        tiny.write(tmp_path, name=f"{tiny.NAME}-2", more=tiny.disk("disk.raw", options=second), file="second.toml")
        ended = await asyncio.to_thread(tiny.run, tmp_path, "second.toml")
        assert ended.returncode == 1
        wanted = "reading" if second else "writing"
        assert f"disk '{tmp_path}/disk.raw' for {wanted}: in use by " in ended.stderr
        assert f"(pid {vm.process.pid})" in ended.stderr
        assert ended.stderr.count("\n") == 1
        await vm.send("P")
        assert await vm.exit_status() == 0


async def test_a_disk_that_is_only_read_is_shared(tmp_path: Path) -> None:
    """By two VMs, in folders of their own because of their consoles."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    more = tiny.disk("../disk.raw", options="readonly = true")
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    async with (
        tiny.guest(folders[0], name=f"{tiny.NAME}-a", more=more) as first,
        tiny.guest(folders[1], name=f"{tiny.NAME}-b", more=more) as second,
    ):
        await ready(first)
        await ready(second)


# -- reboots -----------------------------------------------------------------------------------------------------------


def _held(pid: int) -> tuple[int, int, int]:
    """Descriptors, threads, and KiB of memory that only this process has."""
    process = Path(f"/proc/{pid}")
    rollup = (process / "smaps_rollup").read_text()
    memory = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    assert memory is not None
    return len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())), int(memory[1])


@pytest.mark.parametrize("key", ["R", "T"])
async def test_reboots_leak_nothing(tmp_path: Path, key: str, rounds: int) -> None:
    """Twenty in a row: descriptors and threads are as many after the last as after the first, memory is about as much.

    The history of the console goes on.
    """
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    count = max(20, rounds)
    async with tiny.guest(tmp_path, more=tiny.disk("disk.raw"), cpus=2) as vm:
        assert vm.process is not None
        await ready(vm)
        after = []
        for number in range(count):
            await vm.send(f"{number}.{key}")
            await vm.expect(rf"{number}\.", SOON, "the echo")
            await ready(vm)
            after.append(_held(vm.process.pid))
        _, writer = late = await vm.connect()
        async with asyncio.timeout(SOON):
            history = await late[0].readuntil(f"{count - 1}.".encode())
        writer.close()
        await writer.wait_closed()
        assert history.count(b"ready") == count
        await vm.send("P")
        assert await vm.exit_status() == 0
    assert after[-1][:2] == after[0][:2]
    assert after[-1][2] < after[0][2] + 1024, after


# -- the machine -------------------------------------------------------------------------------------------------------

NAMES = {"kvm": "KVMKVMKVM\0\0\0", "bhyve": "bhyve bhyve ", "none": None}


@pytest.mark.parametrize("cpus", [1, 2, 3, 4])
async def test_processors_start(tmp_path: Path, cpus: int) -> None:
    """All others by INIT and SIPI, again after a reboot."""
    image = kernels.kernel(
        kernels.wake_others(cpus - 1) + kernels.say("all up\r\n") + kernels.forever(kernels.on_input(kernels.reset()))
    )
    async with tiny.guest(tmp_path, image, cpus=cpus) as vm:
        await vm.expect("all up", SOON, "the word that all processors run")
        await vm.send("x")
        await vm.expect("all up", SOON, "the word that all processors run after a reboot")


@pytest.mark.parametrize("interface", NAMES)
async def test_hypervisor_interfaces(tmp_path: Path, interface: str) -> None:
    """What the guest is told that it runs on."""
    image = kernels.kernel(
        kernels.say("[")
        + kernels.cpuid(0x4000_0000)
        + kernels.say_registers()
        + kernels.say("]")
        + kernels.forever(kernels.on_input(kernels.power_off()))
    )
    async with tiny.guest(tmp_path, image, main=f'hypervisor_interface = "{interface}"') as vm:
        match, _ = await vm.expect(r"(?s)\[(.*)\]", SOON, "the hypervisor's name")
        await vm.send("x")
        assert await vm.exit_status() == 0
    name = NAMES[interface]
    assert match[1] == name if name is not None else match[1] not in NAMES.values()


BRAND = range(0x8000_0002, 0x8000_0005)


def _host_cpuid(brand: bytes) -> str:
    """The host's CPUID as a profile of a TOML file, with another brand string."""
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        vm = KvmVm(fd)
        entries = [Entry(*leaf) for leaf in vm.supported_cpuid()]
        vm.close()
    finally:
        os.close(fd)
    words = [int.from_bytes(brand.ljust(48, b"\0")[at : at + 4], "little") for at in range(0, 48, 4)]
    lines = ["[cpuid.own]", f'vendor = "{"intel" if entries[0].ebx == 0x756E6547 else "amd"}"']
    for entry in entries:
        if entry.function in HYPERVISOR_LEAVES:
            continue
        key = f"{entry.function:x}" + (f"-{entry.subleaf:x}" if entry.flags & SIGNIFICANT_INDEX else "")
        at = 4 * BRAND.index(entry.function) if entry.function in BRAND else -1
        lines.append(f"{key} = {words[at : at + 4] if at >= 0 else list(entry[3:])}")
    return "\n".join(lines)


async def test_a_cpuid_of_one_s_own(tmp_path: Path) -> None:
    """The guest reads the brand that the file gives, in the order in which its three leaves have it."""
    image = kernels.kernel(
        kernels.say("[")
        + kernels.cpuid(BRAND[0])
        + kernels.say_registers()
        + kernels.say("][")
        + kernels.cpuid(BRAND[2])
        + kernels.say_registers()
        + kernels.say("]")
        + kernels.forever(kernels.on_input(kernels.power_off()))
    )
    profile = _host_cpuid(b"____EBX1ECX1EDX1" + b"-" * 16 + b"____EBX3ECX3EDX3")
    async with tiny.guest(tmp_path, image, main='cpuid_profile = "own"', more=profile) as vm:
        match, _ = await vm.expect(r"(?s)\[(.*)\]\[(.*)\]", SOON, "the processor's brand")
        await vm.send("x")
        assert await vm.exit_status() == 0
    assert match.groups() == ("EBX1ECX1EDX1", "EBX3ECX3EDX3")


def test_a_cpuid_that_this_host_cannot_give(tmp_path: Path) -> None:
    other = '[cpuid.own]\nvendor = "amd"\n0 = [1, 0x68747541, 0x444d4163, 0x69746e65]\n7-0 = [0, 0, 0, 0xffffffff]'
    tiny.write(tmp_path, main='cpuid_profile = "own"', more=other)
    ended = tiny.run(tmp_path)
    assert ended.returncode == 1
    assert "propolis-standalone: the VM's CPUID does not fit this host: " in ended.stderr
    assert re.search(r"leaf 0x7 edx, bits [0-9, ]+: this host lacks it", ended.stderr)


def _mappings(pid: int) -> str:
    return Path(f"/proc/{pid}/smaps").read_text()


@pytest.mark.parametrize(
    ("backing", "mapping"), [("anonymous", ""), ("memfd", "/memfd:"), ("hugetlb", "KernelPageSize:     2048 kB\n")]
)
async def test_memory_backings(tmp_path: Path, backing: str, mapping: str, request: pytest.FixtureRequest) -> None:
    """The guest runs in each, and reboots."""
    if backing == "hugetlb":
        request.getfixturevalue("huge_pages")
    async with tiny.guest(tmp_path, main=f'memory_backing = "{backing}"') as vm:
        await ready(vm)
        assert vm.process is not None
        assert mapping in _mappings(vm.process.pid)
        await vm.send("R")
        await ready(vm)
        await vm.send("P")
        assert await vm.exit_status() == 0


def test_huge_pages_that_are_not_there(tmp_path: Path) -> None:
    """One line that says so."""
    if free_huge_pages() >= GUEST_PAGES:
        pytest.skip("this host has enough huge pages")
    tiny.write(tmp_path, main='memory_backing = "hugetlb"')
    ended = tiny.run(tmp_path)
    assert ended.returncode == 1
    assert re.fullmatch(r"propolis-standalone: .*huge.*\n", ended.stderr)
