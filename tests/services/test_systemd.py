"""The installed service, as a real systemd runs it, with tiny guests: what a restart, a crash, a VM that needs too much
memory and a reboot do to VMs, and what is denied.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

import pytest

from propolis.http.client import Client
from propolis.http.client_console import Console
from propolis.http.v5 import InstanceState
from propolis.install_service import UNITS
from propolis.standalone_config import load
from tests.machine import tiny
from tests.machine.guest import SLOWER
from tests.services import host

pytestmark = [pytest.mark.program, pytest.mark.kvm, pytest.mark.slow, pytest.mark.timeout(300 * SLOWER)]

PROGRAMS = Path(sys.executable).parent
SERVER, CLI = str(PROGRAMS / "propolis-server"), str(PROGRAMS / "propolis-cli")
SOCKET = "/run/propolis/propolis.sock"
TCP = "127.0.0.1:12400"
VMS = "/sys/fs/cgroup/machine.slice/propolis-vms.service"
MIB = 1 << 20
LIMIT = 64 * MIB + MIB + 128 * MIB  # of a VM with 64 MiB: docs/services.md
SOON = 60 * SLOWER
WATCHDOG = 5
CONFIG = """
[tokens]
full = ["/etc/propolis/tokens"]
"""


class Person:
    """Who reads a VM's console and types on it, from one daemon to the next."""

    def __init__(self) -> None:
        self._seen = b""
        self._has_seen = asyncio.Event()
        self._is_back = asyncio.Event()
        self._console: Console | None = None

    @contextlib.asynccontextmanager
    async def at(self, client: Client, name: str) -> AsyncIterator[Self]:
        """In front of it, from what was printed first."""
        async with client.serial(name, from_start=0, patience=SOON, on_back=self._is_back.set) as console:
            self._console = console
            reading = asyncio.create_task(self._read(console))
            try:
                yield self
            finally:
                await console.close()
                await reading

    async def _read(self, console: Console) -> None:
        async for piece in console:
            self._seen += piece
            self._has_seen.set()

    async def sees(self, text: bytes) -> None:
        """Waits for it."""
        async with asyncio.timeout(SOON):
            while text not in self._seen:
                self._has_seen.clear()
                await self._has_seen.wait()
        self._seen = self._seen.partition(text)[2]

    async def types(self, text: bytes) -> None:
        """And the guest echoes it."""
        assert self._console is not None
        await self._console.send(text)
        await self.sees(text)

    async def comes_back(self, text: bytes) -> None:
        """Connected anew, nothing is lost: what is typed is the next thing that is seen."""
        async with asyncio.timeout(SOON):
            await self._is_back.wait()
        self._is_back.clear()
        await self.types(text)


async def becomes(client: Client, name: str, state: InstanceState) -> str | None:
    """Waits for a VM's state; why it is so."""
    async with asyncio.timeout(SOON):
        async for now in client.states(name):
            if now.state is state:
                return now.detail
    raise AssertionError(f"{name} is never {state}")


def installed(machine: host.Host, directory: Path) -> None:
    """By its own command. The daemon listens at a port as well, for which clients need a token."""
    machine.call("rm", "-rf", "/etc/propolis", "/var/lib/propolis", "/run/propolis")
    machine.write("/etc/propolis/config.toml", CONFIG)
    machine.write("/etc/propolis/tokens", "first-token-of-the-test\n")
    machine.call("chmod", "600", "/etc/propolis/tokens")
    machine.write("/etc/systemd/system/propolis-server.socket.d/more.conf", f"[Socket]\nListenStream={TCP}\n")
    assert "enabled, and running" in machine.call(SERVER, "install-service", "--enable")
    assert {machine.show(unit, "ActiveState") for unit in UNITS} == {"active"}
    assert machine.call("stat", "-c", "%a %U %G", SOCKET) == "660 root propolis"
    assert machine.call("stat", "-c", "%a", "/run/propolis", "/var/lib/propolis").split() == ["755", "700"]
    # The guests of this test never halt: where the kernel can do that, they get little of the host's processors.
    machine.call("systemctl", "set-property", "--runtime", "machine.slice", "CPUWeight=10")
    tiny.write(directory, name="web")
    machine.call(CLI, "new", "web", "-t", str(directory / "vm.toml"))
    machine.call(CLI, "state", "web", "run", "--wait")


def members(machine: host.Host, name: str) -> list[str]:
    """The processes in a VM's control group."""
    return machine.call("cat", f"{VMS}/vm-{name}/cgroup.procs").split()


def check_denials(machine: host.Host) -> None:
    """Neither the daemon nor a VM's keeper writes to the system; what is in a VM's group opens no device but those."""
    for pid in (machine.show("propolis-server", "MainPID"), members(machine, "web")[0]):
        for path in ("/sys/fs/cgroup/elsewhere", "/etc/elsewhere"):
            refused = machine.attempt("nsenter", "--mount", "--target", pid, "mkdir", path)
            assert "Read-only file system" in refused.stderr, refused
    machine.call("mknod", "/run/kernel-log", "c", "1", "11")
    script = f'echo $$ >{VMS}/vm-web/cgroup.procs && exec 3<>/dev/kvm 4<>"$0"'
    refused = machine.attempt("sh", "-c", script, "/run/kernel-log")
    assert "cannot create /run/kernel-log: Operation not permitted" in refused.stderr, refused


def check_tokens(machine: host.Host, accepted: str, refused: str) -> None:
    """By curl."""
    for token, status in ((accepted, "200"), (refused, "401")):
        options = ("--silent", "--output", "/dev/null", "--write-out", "%{http_code}")
        header = f"Authorization: Bearer {token}"
        assert machine.call("curl", *options, "--header", header, f"http://{TCP}/instances") == status


async def test_vms_outlive_the_daemon_and_go_off_before_the_host(tmp_path: Path) -> None:
    """The whole life of the installed service, on one host."""
    with host.running(tmp_path) as machine:
        installed(machine, tmp_path)
        vm = members(machine, "web")
        assert len(vm) >= 2  # keeper, worker, and threads of some kernels' KVM
        check_denials(machine)
        async with Client(f"unix:{machine.root}{SOCKET}") as client:
            async with Person().at(client, "web") as person:
                await person.sees(b"ready\r\n")
                await check_the_daemon_s_ends(machine, person)
            assert members(machine, "web") == vm
            assert (await client.get("web")).state is InstanceState.RUNNING
            await check_memory(machine, client, tmp_path)
            assert members(machine, "web") == vm
            await client.keep("web", autostart=True)

        # Shut down, a host powers its VMs off first. Started again, it starts those that are to start.
        machine.reboot(*UNITS)
        machine.call("journalctl", "--sync")
        log = machine.call("journalctl", "--unit", "propolis-vms", "--output", "cat")
        assert log == "web: the worker ended"  # by its button: nothing harder is told of
        assert {machine.show(unit, "ActiveState") for unit in UNITS} == {"active"}
        async with Client(f"unix:{machine.root}{SOCKET}") as client:
            await becomes(client, "web", InstanceState.RUNNING)
            async with Person().at(client, "web") as person:
                await person.sees(b"ready\r\n")
            assert [(vm.name, vm.state) for vm in await client.list()] == [
                ("other", InstanceState.STOPPED),
                ("web", InstanceState.RUNNING),
            ]


async def check_the_daemon_s_ends(machine: host.Host, person: Person) -> None:
    """Whatever happens to the daemon does not happen to the VM, whose console goes on."""

    async def call(*command: str) -> None:
        await asyncio.to_thread(machine.call, *command)  # as the console's client answers the daemon that closes it

    async def next_one(typed: bytes) -> str:
        await person.comes_back(typed)
        return machine.show("propolis-server", "MainPID")

    await person.types(b"one")
    first = machine.show("propolis-server", "MainPID")
    await call("systemctl", "restart", "propolis-server")
    second = await next_one(b"two")
    assert second != first

    check_tokens(machine, "first-token-of-the-test", "second-token-of-the-test")
    machine.write("/etc/propolis/tokens", "second-token-of-the-test\n")
    await call("systemctl", "reload", "propolis-server")
    check_tokens(machine, "second-token-of-the-test", "first-token-of-the-test")
    assert machine.show("propolis-server", "MainPID") == second

    await call("kill", "-KILL", second)
    third = await next_one(b"three")
    assert third != second
    assert machine.show("propolis-server", "NRestarts") == "1"

    # Nor does what happens to systemd, and to the process that keeps the group.
    holder = machine.show("propolis-vms", "MainPID")
    assert int(holder) > 1
    await call("kill", "-KILL", holder)
    machine.write("/etc/systemd/system/propolis-server.service.d/more.conf", f"[Service]\nWatchdogSec={WATCHDOG}\n")
    await call("systemctl", "daemon-reload")
    await call("systemctl", "daemon-reexec")
    await call("systemctl", "restart", "propolis-server")
    fourth = await next_one(b"four")
    assert machine.show("propolis-vms", "ActiveState") == "active"

    # A daemon that stands still, as this one would for good, is ended and started again.
    await call("kill", "-STOP", fourth)
    fifth = await next_one(b"five")
    assert fifth != fourth
    assert machine.show("propolis-server", "NRestarts") == "1"


async def check_memory(machine: host.Host, client: Client, directory: Path) -> None:
    """A VM that needs too much memory is ended, alone; where the kernel cannot do that the log says so."""
    daemon = machine.show("propolis-server", "MainPID")
    tiny.write(directory, name="other")
    await client.create("other", load(str(directory / "vm.toml")))
    await client.run("other")
    machine.call("journalctl", "--sync")
    log = machine.call("journalctl", "--unit", "propolis-server", "--output", "cat")
    if machine.attempt("test", "-e", f"{VMS}/vm-other/memory.max").returncode:
        assert "VMs are not limited in cpu, memory, pids: the controller is not there" in log
        await client.stop("other")
        await becomes(client, "other", InstanceState.STOPPED)
        return
    assert "VMs are not limited" not in log
    assert machine.call("cat", f"{VMS}/vm-other/memory.max") == str(LIMIT)
    grow = f"echo $$ >{VMS}/vm-other/cgroup.procs && exec {sys.executable} -c \"b'x' * {2 * LIMIT}\""
    assert machine.attempt("sh", "-c", grow).returncode == -9
    reason = await becomes(client, "other", InstanceState.FAILED)
    assert reason == "the VM was killed at its limit of memory, or as the host had none left"
    assert reason in machine.call(CLI, "get", "other")
    assert machine.show("propolis-server", "MainPID") == daemon
    assert {machine.show(unit, "ActiveState") for unit in UNITS} == {"active"}
