"""Virtual machines with tiny kernels, run by `propolis-standalone` of this tree as a process of its own."""

import contextlib
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.machine import kernels
from tests.machine.guest import SLOWER, Guest

TREE = Path(__file__).resolve().parents[2]
PROGRAM = ["env", f"PYTHONPATH={TREE}", sys.executable, "-c", "from propolis.entry import standalone; standalone()"]
NAME = f"test-{os.getpid()}"
"""What the VMs of these tests are called: nobody else's is ended by them."""

MONITOR = kernels.monitor()
DEAF = kernels.monitor(button=kernels.say("not now\r\n"))
"""A monitor that only says that the power button was pressed."""


def write(
    directory: Path,
    kernel: bytes = MONITOR,
    *,
    name: str = NAME,
    main: str = "",
    more: str = "",
    file: str = "vm.toml",
    cpus: int = 1,
) -> None:
    """A VM's files; `main` and `more` are further lines of TOML."""
    image = f"{file}.kernel"
    (directory / image).write_bytes(kernel)
    text = f'[main]\nname = "{name}"\ncpus = {cpus}\nmemory = 64\nkernel = "{image}"\n{main}\n{more}'
    (directory / file).write_text(text)


def disk(path: str, *, options: str = "", name: str = "disk", pci_path: str = "0.4.0") -> str:
    """The TOML of a disk."""
    return (
        f'[block_dev.{name}]\ntype = "file"\npath = "{path}"\n{options}\n'
        f'[dev.{name}]\ndriver = "pci-virtio-block"\nblock_dev = "{name}"\npci-path = "{pci_path}"\n'
    )


def guest(
    directory: Path, kernel: bytes = MONITOR, *, name: str = NAME, main: str = "", more: str = "", cpus: int = 1
) -> Guest:
    """A VM to start, its console at ./ttya."""
    write(directory, kernel, name=name, main=main, more=more, cpus=cpus)
    return Guest([*PROGRAM, "vm.toml"], directory)


class Ended(NamedTuple):
    """A program that has run."""

    returncode: int
    stdout: str
    stderr: str


def run(directory: Path, *arguments: str, before: Sequence[str] = (), within: float = 30, typed: bytes = b"") -> Ended:
    """Runs the program to its end, with `typed` as its input; `before` are words before its command line."""
    ended = subprocess.run(
        [*before, *PROGRAM, *(arguments or ("vm.toml",))],
        check=False,
        cwd=directory,
        capture_output=True,
        input=typed,
        timeout=within * SLOWER,
    )
    return Ended(ended.returncode, ended.stdout.decode(), ended.stderr.decode())


def log(vm: Guest) -> str:
    """What the program wrote to standard error."""
    return (vm.directory / "vmm.log").read_text()


class AtTerminal:
    """The program in a session of its own on a pseudo-terminal, and the person in front of that."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._person, self._terminal = pty.openpty()
        self.mode = termios.tcgetattr(self._terminal)
        self.transcript = ""
        self._at = 0
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *PROGRAM, *options, "vm.toml"],
            cwd=directory,
            stdin=self._terminal,
            stdout=self._terminal,
            stderr=self._terminal,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        self.hang_up()
        os.close(self._terminal)

    def hang_up(self) -> None:
        """The person is gone; twice is fine."""
        if self._person >= 0:
            os.close(self._person)
            self._person = -1

    def type(self, text: str) -> None:
        """Keys."""
        os.write(self._person, text.encode())

    def expect(self, pattern: str, within: float = 20) -> None:
        """Waits until the screen shows `pattern`, after what was expected before."""
        deadline = time.monotonic() + within * SLOWER
        while (match := re.compile(pattern).search(self.transcript, self._at)) is None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._person], [], [], left)[0]:
                raise AssertionError(f"missing on the terminal: {pattern!r}; there is {self.transcript!r}")
            self.transcript += os.read(self._person, 65536).decode(errors="replace")
        self._at = match.end()

    def exit_status(self, within: float = 20) -> int:
        """Waits for the end of the program; all that it wrote is in the transcript then."""
        status = self.process.wait(within * SLOWER)
        while self._person >= 0 and select.select([self._person], [], [], 0)[0]:
            with contextlib.suppress(OSError):
                self.transcript += os.read(self._person, 65536).decode(errors="replace")
        return status

    @property
    def is_raw(self) -> bool:
        """Whether keys reach the program as they are."""
        return not termios.tcgetattr(self._terminal)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)

    def restored(self, within: float = 10) -> bool:
        """Whether the terminal's mode is what it was at first, at last."""
        deadline = time.monotonic() + within * SLOWER
        while termios.tcgetattr(self._terminal) != self.mode:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True
