"""Starts VMs for the daemon: by a process that has everything imported already and is forked for each.

The daemon itself loads nothing compiled and has threads and connections, so it is not what is forked. VMs outlive the
zygote as they outlive the daemon; one that has died is replaced.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import msgspec

from propolis.errors import BackendError, PropolisError
from propolis.keeper_protocol import Answer, Start, Started, StartOptions, receive
from propolis.running_vm import RunningVm

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from propolis.run_directory import RunDirectory
    from propolis.spec import Spec

_BIRTH = 60.0  # seconds that all the imports may take
_LAST_WAIT = 5.0  # seconds for a VM that cannot be made to end by itself
_ENVIRONMENT = ("PATH", "LANG", "HOME", "TZ", "TMPDIR")
_ENVIRONMENTS = ("LC_", "PYTHON", "LD_", "ASAN_", "UBSAN_", "LSAN_", "TSAN_")


class Zygote:
    """The daemon's connection to its zygote. Async context manager."""

    def __init__(self) -> None:
        """Use `spawn`."""
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._turn = asyncio.Lock()  # for the control socket

    @classmethod
    async def spawn(cls) -> Self:
        """Returns once it has everything imported. Raises BackendError."""
        zygote = cls()
        async with zygote._turn:
            await zygote._be_born()
        return zygote

    @property
    def pid(self) -> int | None:
        """Its process; None where it has ended."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    async def close(self) -> None:
        """Ends it. VMs run on; twice is fine."""
        async with self._turn:
            self._bury()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start_vm(
        self,
        directory: RunDirectory,
        spec: Spec,
        properties: msgspec.Struct | None = None,
        options: StartOptions | None = None,
    ) -> RunningVm:
        """A VM that is made and not started, whose worker serves the directory's socket.

        Raises what the worker met when it made the VM; BusyError where the directory has a keeper; BackendError where
        one of the processes died. Cancelled, it has the half-made VM ended.
        """
        start = msgspec.json.encode(
            Start(
                directory=directory.path,
                spec=spec,
                properties=msgspec.Raw(msgspec.json.encode(properties)),
                options=options or StartOptions(),
            )
        )
        for is_last in (False, True):
            mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with mine:
                mine.setblocking(False)
                with its:
                    control = await self._ask(directory, start, its)
                vm = await _introduction(mine, directory)
                if vm is not None:
                    await _outcome(mine, vm)
                    return vm
            # If the zygote died it took the request along, and nothing has come of it.
            if is_last or _is_answered(control):
                raise BackendError(f"start VM {spec.name!r}: its keeper was killed")
        raise AssertionError

    async def _ask(self, directory: RunDirectory, start: bytes, reply: socket.socket) -> socket.socket:
        """Returns to which zygote this went."""
        request = _in_memory(start)
        try:
            async with self._turn:
                if self._control is None or not _is_answered(self._control):
                    self._bury()
                    await self._be_born()
                assert self._control is not None
                control = self._control
                while True:
                    try:
                        socket.send_fds(control, [b"start"], [directory.fileno(), request, reply.fileno()])
                    except BlockingIOError:
                        await _until(control, asyncio.get_running_loop().add_writer, is_writer=True)
                    except OSError:  # it has just died: whoever waits for an answer hears that
                        return control
                    else:
                        return control
        finally:
            os.close(request)

    async def _be_born(self) -> None:
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._control = mine
            mine.setblocking(False)
            self._process = _execute(its.fileno())
        try:
            async with asyncio.timeout(_BIRTH):
                data, _ = await _receive(mine, 0)
        except TimeoutError:
            self._bury()
            raise BackendError(f"start the zygote: it is not ready within {_BIRTH:g} s") from None
        except BaseException:
            self._bury()
            raise
        if not data:
            status = self._process.wait()
            self._bury()
            raise BackendError(f"start the zygote: it ended with status {status}")

    def _bury(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _is_answered(control: socket.socket) -> bool:
    """Whether the other end is open. A zygote closes it before anything else when it ends, and says nothing before."""
    try:
        control.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:  # reset, or closed here because there is another zygote by now
        pass
    return False


def _in_memory(content: bytes) -> int:
    """A descriptor of it: a message has not room for every spec."""
    fd = os.memfd_create("start", os.MFD_CLOEXEC)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    return fd


def _execute(control: int) -> subprocess.Popen[bytes]:
    """The zygote's process, with nothing of the daemon's but what it says to its standard error."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENTS)
    }  # fmt: skip
    # -P: whatever lies in the daemon's folder is not imported.
    command = [sys.executable, "-P", "-m", "propolis.zygote_process", str(control)]
    try:
        return subprocess.Popen(
            command,
            pass_fds=[control],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise BackendError(f"start the zygote: {error.strerror}") from error


async def _introduction(channel: socket.socket, directory: RunDirectory) -> RunningVm | None:
    """Who the keeper and the worker are; None where nobody says. Raises what kept the keeper from beginning."""
    data, fds = await _receive(channel, 2)
    if not data:
        return None
    if len(fds) != 2:
        for fd in fds:
            os.close(fd)
        msgspec.json.decode(data, type=Answer).raise_error()
        raise BackendError("start a VM: its keeper does not say who it is")
    started = msgspec.json.decode(data, type=Started)
    return RunningVm(directory, started.keeper, fds[0], started.worker, fds[1])


async def _outcome(channel: socket.socket, vm: RunningVm) -> None:
    """Waits until the VM is made. Raises what prevented it, with nothing left of it."""
    try:
        data, _ = await _receive(channel, 0)
        if not data:
            raise BackendError("start a VM: its keeper was killed")
        msgspec.json.decode(data, type=Answer).raise_error()
    except PropolisError:
        with vm:
            try:
                async with asyncio.timeout(_LAST_WAIT):
                    await vm.wait()
            except TimeoutError:
                vm.kill_all()
        raise
    except BaseException:
        with vm:
            vm.kill()
        raise


async def _receive(channel: socket.socket, max_fds: int) -> tuple[bytes, list[int]]:
    """A message; an empty one where the other side has ended."""
    while True:
        try:
            return receive(channel, max_fds)
        except BlockingIOError:
            await _until(channel, asyncio.get_running_loop().add_reader)
        except ConnectionError:
            return b"", []


async def _until(channel: socket.socket, add: Callable[..., object], *, is_writer: bool = False) -> None:
    """Until the loop says that there is something to read, or room to write."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    add(channel.fileno(), lambda: None if ready.done() else ready.set_result(None))
    try:
        await ready
    finally:
        with suppress(OSError, ValueError):
            (loop.remove_writer if is_writer else loop.remove_reader)(channel.fileno())
