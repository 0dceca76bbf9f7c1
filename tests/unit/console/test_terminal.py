"""A terminal on a real pty: what is typed and printed, how it is left, and that it is restored whatever happens."""

import asyncio
import contextlib
import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from propolis.console.history import ConsoleHistory
from propolis.console.hub import INPUT_BYTES, ConsoleHub
from propolis.console.terminal import Leave, Terminal
from propolis.errors import BackendError
from tests.unit.console.terminals import TIMEOUT, Pty, until


class Guest:
    """A console with a guest that takes `room` bytes of input."""

    def __init__(self, room: int = 1 << 30) -> None:
        self.room = room
        self.typed = bytearray()
        self.hub = ConsoleHub(ConsoleHistory(), self._take)

    def _take(self, data: bytes) -> int:
        size = min(self.room, len(data))
        self.room -= size
        self.typed += data[:size]
        return size


@pytest.fixture
def tty() -> Iterator[Pty]:
    tty = Pty()
    yield tty
    tty.close()


@contextlib.contextmanager
def opened(path: Path | str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def pipe() -> Iterator[list[int]]:
    ends = list(os.pipe())
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def start(guest: Guest, stdin: int, stdout: int, stderr: int, **settings: Any) -> "asyncio.Task[Leave]":
    terminal = Terminal(stdin=stdin, stdout=stdout, stderr=stderr, **settings)
    return asyncio.create_task(terminal.attach(guest.hub.attach))


def start_on(tty: Pty, guest: Guest, **settings: Any) -> "asyncio.Task[Leave]":
    return start(guest, tty.fd, tty.fd, tty.fd, **settings)


async def finished(task: "asyncio.Task[Leave]") -> Leave:
    async with asyncio.timeout(TIMEOUT):
        return await task


async def test_reading_typing_and_leaving(tty: Pty) -> None:
    guest = Guest()
    guest.hub.feed(b"history\r\n")
    task = start_on(tty, guest, name="vm")
    await until(lambda: tty.look().endswith(b"history\r\n"), "the history")
    assert tty.look() == b"[console of VM 'vm'; Ctrl-] or ~. leaves]\r\nhistory\r\n"
    assert tty.is_raw
    guest.hub.feed(bytes(range(256)))
    await until(lambda: tty.look().endswith(bytes(range(256))), "all bytes as they are")
    keys = bytes(key for key in range(256) if key != 0x1D)
    tty.type(keys)
    await until(lambda: len(guest.typed) == 255, "all keys as they are")
    assert guest.typed == keys
    tty.type(b"before\x1dafter")
    assert await finished(task) == "escape"
    assert guest.typed == keys + b"before"
    assert guest.hub.clients == 0
    assert tty.is_restored
    assert tty.look().endswith(b"\r\n[left the console]\r\n")


async def test_control_keys_are_the_guest_s(tty: Pty) -> None:
    guest = Guest()
    task = start_on(tty, guest)
    await until(lambda: tty.is_raw, "raw mode")
    tty.type(b"\x03\x1a\x1c\x13\x11\x04\r")
    await until(lambda: guest.typed == b"\x03\x1a\x1c\x13\x11\x04\r", "the control keys")
    tty.type(b"\x1d")
    await finished(task)


async def test_another_escape_and_none(tty: Pty) -> None:
    guest = Guest()
    task = start_on(tty, guest, escape=0x01)
    await until(lambda: b"[console; Ctrl-A or ~. leaves]" in tty.look(), "how to leave")
    tty.type(b"\x1d\x01")
    assert await finished(task) == "escape"
    assert guest.typed == b"\x1d"
    task = start_on(tty, guest, escape=None)
    await until(lambda: b"[console]" in tty.look(), "the greeting")
    tty.type(b"\x01\x1d")
    await until(lambda: guest.typed == b"\x1d\x01\x1d", "what are no escapes")
    await guest.hub.close()
    assert await finished(task) == "ended"


async def test_leaving_by_tilde_and_dot(tty: Pty) -> None:
    guest = Guest()
    task = start_on(tty, guest)
    await until(lambda: tty.is_raw, "raw mode")
    tty.type(b"a~.\r~~.\r~a\r~")
    await until(lambda: guest.typed == b"a~.\r~.\r~a\r", "what does not leave")
    tty.type(b".after")
    assert await finished(task) == "escape"
    assert guest.typed == b"a~.\r~.\r~a\r"
    assert tty.is_restored


async def test_the_end_of_the_console_after_its_last_output(tty: Pty) -> None:
    guest = Guest()
    task = start_on(tty, guest)
    await until(lambda: guest.hub.clients == 1, "the client")
    guest.hub.feed(b"x" * 3000 + b"power off")
    await guest.hub.close()
    assert await finished(task) == "ended"
    assert b"x" * 3000 + b"power off" in tty.look()
    assert tty.is_restored


async def test_a_terminal_that_hangs_up(tty: Pty) -> None:
    guest = Guest()
    task = start_on(tty, guest)
    await until(lambda: guest.hub.clients == 1, "the client")
    os.close(tty.person)
    tty.person = -1
    assert await finished(task) == "hangup"
    assert guest.hub.clients == 0


async def test_a_terminal_that_nobody_reads_holds_up_nobody(tty: Pty) -> None:
    guest = Guest()
    task = start_on(tty, guest)
    await until(lambda: b"leaves]" in tty.look(), "the greeting")
    tty.seen.clear()
    output = random.Random(5).randbytes(1_500_000)
    for at in range(0, len(output), 10_000):
        guest.hub.feed(output[at : at + 10_000])
        await asyncio.sleep(0)
    (client,) = guest.hub._clients
    assert client.offset < 200_000
    await until(lambda: tty.look() == output, "all of the output, once it is read")
    assert not fcntl.fcntl(tty.fd, fcntl.F_GETFL) & os.O_NONBLOCK
    tty.type(b"\x1d")
    assert await finished(task) == "escape"


async def test_leaving_a_terminal_that_is_stopped(tty: Pty) -> None:
    guest = Guest()
    guest.hub.feed(bytes(1_000_000))
    task = start_on(tty, guest, grace=0.05)
    await until(lambda: guest.hub.clients == 1, "the client")
    termios.tcflow(tty.fd, termios.TCOOFF)
    tty.type(b"\x1d")
    assert await finished(task) == "escape"
    assert tty.is_restored


async def test_restored_when_connecting_fails(tty: Pty) -> None:
    guest = Guest()
    await guest.hub.close()
    with pytest.raises(Exception, match="it is closed"):
        await finished(start_on(tty, guest))
    assert tty.is_restored


async def test_restored_when_cancelled(tty: Pty) -> None:
    guest = Guest()
    task = start_on(tty, guest)
    await until(lambda: tty.is_raw and guest.hub.clients == 1, "the client")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tty.is_restored
    assert guest.hub.clients == 0


async def test_typing_faster_than_the_guest_reads(tty: Pty) -> None:
    guest = Guest(room=0)
    task = start_on(tty, guest)
    await until(lambda: tty.is_raw and guest.hub.clients == 1, "the client")
    sent = 0
    while guest.hub.waiting_input < INPUT_BYTES:
        with contextlib.suppress(BlockingIOError):
            sent += os.write(tty.person, b"y" * 1000)
        await asyncio.sleep(0)
    assert guest.hub.waiting_input < INPUT_BYTES + 4096
    guest.room = 1 << 30
    guest.hub.input_ready()
    await until(lambda: len(guest.typed) == sent, "all that was typed")
    tty.type(b"\x1d")
    await finished(task)


async def test_a_pipe_s_end_ends_the_typing_but_not_the_reading(tty: Pty, pipe: list[int]) -> None:
    guest = Guest()
    os.write(pipe[1], b"\x1dbinary\x00\xff\x1d")
    os.close(pipe[1])
    task = start(guest, pipe[0], tty.fd, tty.fd)
    await until(lambda: guest.typed == b"\x1dbinary\x00\xff\x1d", "all that was piped")
    assert not tty.is_raw
    guest.hub.feed(b"answer")
    await until(lambda: tty.look().endswith(b"answer"), "the answer")
    assert b"leaves" not in tty.look()
    await guest.hub.close()
    assert await finished(task) == "ended"


async def test_a_file_to_a_file(tmp_path: Path) -> None:
    typed = random.Random(9).randbytes(3 * INPUT_BYTES)
    (tmp_path / "in").write_bytes(typed)
    (tmp_path / "out").write_bytes(b"header ")
    guest = Guest(room=0)
    with (
        opened(tmp_path / "in", os.O_RDONLY) as stdin,
        opened(tmp_path / "out", os.O_WRONLY) as stdout,
        opened("/dev/null", os.O_WRONLY) as stderr,
    ):
        os.lseek(stdout, 7, os.SEEK_SET)
        task = start(guest, stdin, stdout, stderr)
        await until(lambda: guest.hub.waiting_input >= INPUT_BYTES, "the input to fill up")
        assert guest.hub.waiting_input < INPUT_BYTES + 4096
        guest.room = 1 << 30
        guest.hub.input_ready()
        await until(lambda: guest.typed == typed, "the whole file")
        guest.hub.feed(bytes(200_000))
        await guest.hub.close()
        assert await finished(task) == "ended"
    assert (tmp_path / "out").read_bytes() == b"header " + bytes(200_000)


async def test_no_input_at_all(tty: Pty) -> None:
    guest = Guest()
    with opened("/dev/null", os.O_RDWR) as null:
        gone = os.dup(null)
        os.close(gone)
        for stdin in (null, gone):
            task = start(guest, stdin, tty.fd, gone)
            guest.hub.feed(b"x")
            await until(lambda: b"x" in tty.look(), "output")
            tty.seen.clear()
            task.cancel()
            await asyncio.wait([task])
        with pytest.raises(BackendError, match="standard output"):
            await finished(start(guest, null, gone, null))


async def test_a_pipe_whose_reader_is_gone(pipe: list[int]) -> None:
    guest = Guest()
    with opened("/dev/null", os.O_RDWR) as null:
        task = start(guest, null, pipe[1], null)
        guest.hub.feed(bytes(500_000))
        await until(lambda: any(client.offset for client in guest.hub._clients), "output")
        os.close(pipe[0])
        assert await finished(task) == "hangup"


async def test_sockets(tty: Pty) -> None:
    guest = Guest()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        task = start(guest, theirs.fileno(), theirs.fileno(), tty.fd)
        ours.sendall(b"typed")
        await until(lambda: guest.typed == b"typed", "the typed bytes")
        output = random.Random(2).randbytes(1_000_000)
        guest.hub.feed(output)
        await asyncio.sleep(0)
        assert theirs.getblocking()
        ours.setblocking(False)
        got = bytearray()

        def read() -> bool:
            with contextlib.suppress(BlockingIOError):
                got.extend(ours.recv(1 << 20))
            return len(got) == len(output)

        await until(read, "all output")
        assert got == output
        await guest.hub.close()
        assert await finished(task) == "ended"


# -- what ends or stops a whole program --------------------------------------------------------------------------------

PROGRAM = """
import asyncio, atexit, os, sys
from propolis.console.history import ConsoleHistory
from propolis.console.hub import ConsoleHub
from propolis.console.terminal import Terminal

def typed(data):
    if data == b"abort":
        os.abort()
    if data == b"exit":
        raise SystemExit(3)
    if data == b"fork":
        if os.fork() == 0:
            atexit._run_exitfuncs()
            os._exit(5)
        os.wait()
        hub.feed(b"forked")
    if data == b"_exit":
        os._exit(4)
    return len(data)

hub = ConsoleHub(ConsoleHistory(), typed)

async def main():
    hub.feed(b"ready")
    await Terminal().attach(hub.attach)

if sys.argv[1] == "uvloop":
    import uvloop
    uvloop.run(main())
else:
    asyncio.run(main())
"""


@pytest.fixture(params=["asyncio", "uvloop"])
def program(request: pytest.FixtureRequest, tty: Pty) -> Iterator["subprocess.Popen[bytes]"]:
    """A program attached to `tty`, in a process group that can be stopped."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, request.param], stdin=tty.fd, stdout=tty.fd, stderr=tty.fd, process_group=0
    ) as process:
        wait_for(lambda: b"ready" in tty.look(), "the program")
        assert tty.is_raw
        yield process
        process.kill()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    async def wait() -> None:
        await until(condition, what)

    with asyncio.Runner() as runner:
        runner.run(wait())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGKILL, signal.SIGSEGV])
def test_restored_after_a_signal(tty: Pty, program: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    program.send_signal(number)
    assert program.wait(TIMEOUT) == -number
    wait_for(lambda: tty.is_restored, "the terminal as it was")


def test_restored_after_an_interrupt(tty: Pty, program: "subprocess.Popen[bytes]") -> None:
    program.send_signal(signal.SIGINT)
    assert program.wait(TIMEOUT) in (-signal.SIGINT, 1, 130)
    assert tty.is_restored


@pytest.mark.parametrize(("word", "status"), [(b"abort", -signal.SIGABRT), (b"exit", 3), (b"_exit", 4), (b"\x1d", 0)])
def test_restored_however_the_program_ends(
    tty: Pty, program: "subprocess.Popen[bytes]", word: bytes, status: int
) -> None:
    tty.type(word)
    assert program.wait(TIMEOUT) == status
    wait_for(lambda: tty.is_restored, "the terminal as it was")


def test_a_child_of_the_program_restores_nothing(tty: Pty, program: "subprocess.Popen[bytes]") -> None:
    tty.type(b"fork")
    wait_for(lambda: b"forked" in tty.look(), "the child to be gone")
    assert tty.is_raw
    tty.type(b"\x1d")
    assert program.wait(TIMEOUT) == 0
    assert tty.is_restored


def test_stopped_and_continued(tty: Pty, program: "subprocess.Popen[bytes]") -> None:
    for _ in range(2):
        program.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(program.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert tty.is_restored
        program.send_signal(signal.SIGCONT)
        wait_for(lambda: tty.is_raw, "raw mode again")
    tty.type(b"\x1d")
    assert program.wait(TIMEOUT) == 0
    assert tty.is_restored
