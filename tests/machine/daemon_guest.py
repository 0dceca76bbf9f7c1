"""The Linux guest behind the daemon, as its user has it: propolis-cli makes it, runs it and shows its console."""

import asyncio
import contextlib
import json
import os
import pty
import sys
import tty
from collections.abc import Callable
from pathlib import Path

from tests.machine.guest import SLOWER, Guest, GuestError
from tests.machine.linux import linux

SERVER = """\
[server]
listen = ["unix:api"]
state_directory = "state"
run_directory = "run"
"""
PROGRAMS = Path(sys.executable).parent


class DaemonGuest(Guest):
    """One VM of a daemon of its own, in a directory that has its vm.toml. `tell` hears of every command of the CLI."""

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        show: Callable[[str], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__([PROGRAMS / "propolis-server", "run", "server.toml"], directory, console="api", show=show)
        (directory / "server.toml").write_text(SERVER)
        self._name = name
        self._tell = tell
        self._is_made = False
        self._viewer: asyncio.subprocess.Process | None = None

    async def cli(self, *words: str, within: float = 60) -> str:
        """What propolis-cli printed. Raises GuestError where it did not succeed."""
        if self._tell is not None:
            self._tell(f"propolis-cli {' '.join(words)}")
        return await self._printed(self._command(*words), within)

    async def curl(self, path: str, *options: str, within: float = 60) -> str:
        """What the daemon answered at a path of its API. Raises GuestError where it refused."""
        command = ["curl", "--silent", "--show-error", "--fail-with-body", "--unix-socket", "api", *options]
        return await self._printed([*command, f"http://x{path}"], within)

    async def becomes(self, state: str, within: float = 60) -> None:
        """Follows the VM's states up to this one."""
        generation = 0
        async with asyncio.timeout(within * SLOWER):
            while True:
                now = json.loads(await self.curl(f"/instances/{self._name}/state-monitor?gen={generation}"))
                if now["state"] == state:
                    return
                generation = now["gen"] + 1

    async def _printed(self, command: list[str], within: float) -> str:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=self.directory, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        async with asyncio.timeout(within * SLOWER):
            printed, _ = await process.communicate()
        if process.returncode != 0:
            raise GuestError(f"{' '.join(command)}: status {process.returncode}: {printed.decode()}")
        return printed.decode()

    def _command(self, *words: str) -> list[str]:
        return [str(PROGRAMS / "propolis-cli"), "--url", f"unix:{self.directory / 'api'}", *words]

    # ---- what differs from a program that is one VM

    async def start(self, within: float = 60) -> None:
        """Start the daemon, make the VM and attach to its console."""
        await super().start(within)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The console at a terminal, once the daemon listens and the VM runs."""
        _, probe = await super().connect()  # raises as long as nobody listens
        probe.close()
        await self.cli("new", self._name, "-t", "vm.toml")
        self._is_made = True
        await self.cli("state", self._name, "run")
        if self._tell is not None:
            self._tell(f"propolis-cli serial {self._name}")
        person, terminal = pty.openpty()
        tty.setraw(terminal)
        self._viewer = await asyncio.create_subprocess_exec(
            *self._command("serial", self._name), cwd=self.directory, stdin=terminal, stdout=terminal, stderr=terminal
        )
        os.close(terminal)
        return await _streams(person)

    async def stop(self) -> None:
        """Delete the VM, which would outlive its daemon, and end the daemon."""
        if self._is_made and self.process is not None and self.process.returncode is None:
            with contextlib.suppress(GuestError, TimeoutError):  # the test has deleted it itself
                await self.curl(f"/instances/{self._name}?force=true", "-X", "DELETE")
        self._is_made = False
        if self._viewer is not None and self._viewer.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._viewer.kill()
            await self._viewer.wait()
        await super().stop()

    async def poweroff(self, within: float = 60) -> int:
        """Power off from inside; the exit status of the console's viewer, which ends with the VM."""
        assert self._viewer is not None
        await self.send("poweroff\n")
        try:
            async with asyncio.timeout(within * SLOWER):
                status = await self._viewer.wait()
        except TimeoutError:
            raise GuestError(f"the console did not end within {within * SLOWER:g} s{self._context()}") from None
        await self.becomes("Stopped")  # the console ends a moment before
        return status


async def _streams(descriptor: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Streams over the person's end of a terminal."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    read_end, write_end = os.fdopen(descriptor, "rb", 0), os.fdopen(os.dup(descriptor), "wb", 0)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), read_end)
    transport, protocol = await loop.connect_write_pipe(
        lambda: asyncio.StreamReaderProtocol(asyncio.StreamReader()), write_end
    )
    return reader, asyncio.StreamWriter(transport, protocol, None, loop)


def daemon_linux(
    directory: Path,
    *,
    name: str = "linux",
    kernel: str = "vmlinux",
    cmdline: str = "console=ttyS0 quiet",
    show: Callable[[str], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> DaemonGuest:
    """As `linux`, behind a daemon."""
    linux(directory, name=name, kernel=kernel, cmdline=cmdline)  # for its files
    return DaemonGuest(directory, name, show=show, tell=tell)
