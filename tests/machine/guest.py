"""A running guest as a set of verbs: boot, login, run, reboot, poweroff.

It drives any program that offers a serial console as a unix socket in its working directory. Every wait has a timeout
whose message names what was missing and shows the console's last lines.
"""

import asyncio
import codecs
import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

PROMPT = r"guest\[(\d+)\]:[^\r\n]*# "
LOGIN = r"login: "
PANIC = "Kernel panic - not syncing"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[78=>]")
_UNFINISHED = re.compile(r"\x1b(\[[0-9;?]*)?$")

SLOWER = 3 if os.environ.get("KVM_LAB") else 1
"""Everything takes longer in the lab, an emulated machine: waits are multiplied by this."""


class GuestError(AssertionError):
    """What was expected of the guest did not happen."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command in the guest printed (without its own echo) and its exit status."""

    command: str
    status: int
    output: str

    def check(self) -> str:
        """Return the output of a command that succeeded; raise otherwise."""
        if self.status != 0:
            raise GuestError(f"guest command {self.command!r} ended with status {self.status}:\n{self.output}")
        return self.output


class Guest:
    """One process that runs one guest, and its console."""

    def __init__(
        self,
        argv: Sequence[str | Path],
        directory: Path,
        *,
        console: str = "ttya",
        show: Callable[[str], None] | None = None,
    ) -> None:
        """Prepare to run `argv` in `directory`; `show` gets console text as it arrives."""
        self.argv = [str(word) for word in argv]
        self.directory = directory
        self.process: asyncio.subprocess.Process | None = None
        self.transcript = ""
        self._console = directory / console
        self._show = show
        self._at = 0  # what of the transcript was already consumed by expect()
        self._arrived = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._log = directory / "vmm.log"
        self._lost = ""  # what it did not answer in time: nobody waits for it again

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # ---- life cycle

    async def start(self, within: float = 20) -> None:
        """Start the process and attach to its console."""
        with self._log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self.argv, cwd=self.directory, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline = time.monotonic() + within * SLOWER
        while True:
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                reader, self._writer = await self.connect()
                break
            self._must_run("its console appeared")
            if time.monotonic() > deadline:
                raise GuestError(
                    f"no console socket {self._console.name} within {within * SLOWER:g} s{self._context()}"
                )
            await asyncio.sleep(0.02)
        self._reader = asyncio.create_task(self._read(reader), name="guest-console")

    async def stop(self) -> None:
        """End the process, however it is, and close the console."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
            self._writer = None
        if self._reader is not None:
            await self._reader
            self._reader = None

    async def exit_status(self, within: float = 60) -> int:
        """Wait for the process to end by itself; its exit status."""
        assert self.process is not None
        try:
            async with asyncio.timeout(within * SLOWER):
                return await self.process.wait()
        except TimeoutError:
            raise GuestError(f"{self.argv[0]} did not end within {within * SLOWER:g} s{self._context()}") from None

    # ---- verbs

    async def boot(self, within: float = 90) -> None:
        """Wait for the login prompt."""
        await self.expect(LOGIN, within, "a login prompt")

    async def login(self, within: float = 30) -> None:
        """Log in as root at a login prompt that was seen."""
        await self.send("root\n")
        await self.expect(PROMPT, within, "a shell prompt after the login")
        await self.run("stty cols 4000")  # the shell would redraw lines longer than the terminal is wide

    async def run(self, command: str, within: float = 60) -> Result:
        """Run one line in the guest's shell."""
        await self.send(command + "\n")
        match, before = await self.expect(f"{PROMPT}|{LOGIN}", within, f"the end of {command!r}")
        if match[1] is None:
            raise GuestError(f"the guest's shell ended during {command!r}{await self._last_words()}")
        _, _, output = before.partition("\n")  # the first line is the echo of the command
        return Result(command=command, status=int(match[1]), output=output.replace("\r\n", "\n"))

    async def _last_words(self) -> str:
        """What the guest's kernel said last, at a login prompt that nobody expected."""
        context = self._context()
        try:
            await self.login()
            log = (await self.run("dmesg | tail -n 20")).output
        except GuestError as error:
            log = str(error)
        return f"{context}\n--- its kernel's log:\n{log}"

    async def reboot(self, within: float = 120) -> None:
        """Reboot from inside and wait for the next login prompt."""
        await self.send("reboot\n")
        await self.boot(within)

    async def poweroff(self, within: float = 60) -> int:
        """Power off from inside; the exit status of the process."""
        await self.send("poweroff\n")
        return await self.exit_status(within)

    async def press_power_button(self, within: float = 60) -> int:
        """Press the power button (SIGTERM); the exit status of the process."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return await self.exit_status(within)

    # ---- console

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """One more client of the console."""
        # A socket's path may be at most 107 bytes long; through /proc/self/fd it is short wherever the directory is.
        folder = os.open(self.directory, os.O_PATH | os.O_DIRECTORY)
        try:
            return await asyncio.open_unix_connection(f"/proc/self/fd/{folder}/{self._console.name}")
        finally:
            os.close(folder)

    async def send(self, text: str) -> None:
        """Type on the console."""
        assert self._writer is not None, "the guest was not started"
        self._writer.write(text.encode())
        await self._writer.drain()

    async def expect(self, pattern: str, within: float, what: str) -> tuple[re.Match[str], str]:
        """Wait until `pattern` matches in what was not consumed yet; the match and the text before it."""
        if self._lost:
            raise GuestError(f"missing: {what}; already missing: {self._lost}")
        limit = within * SLOWER
        compiled = re.compile(pattern)
        try:
            async with asyncio.timeout(limit):
                while (match := compiled.search(self.transcript, self._at)) is None:
                    if self._reader is None or self._reader.done():
                        break
                    if PANIC in self.transcript[self._at :]:
                        raise GuestError(f"missing: {what}; the guest's kernel panicked{self._context()}")
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            self._lost = what
            raise GuestError(f"missing: {what} (no {pattern!r} within {limit:g} s){self._context()}") from None
        if match is None:
            raise GuestError(f"missing: {what}; the console was closed{self._context()}")
        before = self.transcript[self._at : match.start()]
        self._at = match.end()
        return match, before

    async def _read(self, reader: asyncio.StreamReader) -> None:
        pending = ""  # an escape sequence whose end has not arrived yet
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            while data := await reader.read(65536):
                text = _ESCAPES.sub("", pending + decoder.decode(data))
                unfinished = _UNFINISHED.search(text)
                pending = unfinished[0] if unfinished else ""
                text = text.removesuffix(pending)
                self.transcript += text
                if self._show is not None:
                    self._show(text)
                self._arrived.set()
        except OSError:
            pass  # the process died; whoever waits is told below
        finally:
            self._arrived.set()

    def _must_run(self, until: str) -> None:
        if self.process is not None and self.process.returncode is not None:
            raise GuestError(
                f"{self.argv[0]} ended with status {self.process.returncode} before {until}{self._context()}"
            )

    def _context(self) -> str:
        console = "\n".join(self.transcript.replace("\r", "").splitlines()[-25:])
        log = "\n".join(self._log.read_text(errors="replace").splitlines()[-10:]) if self._log.exists() else ""
        ended = None if self.process is None else self.process.returncode
        state = "runs" if ended is None else f"ended with {ended}"
        return f"\n--- process: {state}\n--- console:\n{console}\n--- log:\n{log}"
