"""What a worker will do, done once with a VM of nothing, so that it finds done what is done the first time only.

In the zygote that is what the interpreter writes to code and types as it learns them; in a worker that waits for its VM
it is the pages that it shares with the zygote until it first writes to them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
import uuid
from contextlib import ExitStack
from io import FileIO
from typing import TYPE_CHECKING

from propolis.console.history_file import MappedHistory, file_bytes
from propolis.errors import BackendError
from propolis.http import v5
from propolis.http.app import serve
from propolis.http.slot import SLOT
from propolis.keeper import LocalKeeper
from propolis.lifecycle import Record, Request
from propolis.log_tail import LogTail
from propolis.mapped_file import MappedFile
from propolis.spec import DirectBoot, Spec
from propolis.state_file import FILE_BYTES, StateWriter
from propolis.virtual_machine import VirtualMachine

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiohttp import web

_ENTRY = 0x10_0000
_REQUEST = (
    b"PUT /instance/state HTTP/1.1\r\nHost: worker\r\nAccept: */*\r\n"
    b'Content-Type: application/json\r\nContent-Length: 5\r\n\r\n"Run"'
)
_REPLY = b"HTTP/1.1 204 "
_KEPT_BYTES = 4096  # of the log and the console
_PATIENCE = 20.0  # seconds for the kernel to bury a thread


class _Keeper(LocalKeeper):
    """Opens a kernel that is in no file."""

    def open_image(self, path: str, what: str) -> FileIO:
        fd = os.memfd_create(what, os.MFD_CLOEXEC)
        os.write(fd, _kernel())
        return FileIO(path, opener=lambda _path, _flags: fd)


def practise(app: web.Application) -> None:
    """Makes a VM that `app` serves, has it run by a request, and ends it. Raises PropolisError."""
    # Not uvloop's: its library would keep a pipe for the whole process, whose numbers the jail gives to others.
    with _kept() as kept, asyncio.Runner() as runner:
        runner.run(_practise(app, *kept))
    deadline = time.monotonic() + _PATIENCE
    while len(os.listdir("/proc/self/task")) > 1:  # its vCPU's was joined, which the kernel sees a moment later
        if time.monotonic() > deadline:
            raise BackendError(f"prepare for a VM: a thread does not end within {_PATIENCE:g} s")
        time.sleep(0.001)


@contextlib.contextmanager
def _kept() -> Iterator[tuple[MappedHistory, MappedHistory, StateWriter]]:
    """A log, to which this process logs, a console's history and a state, as in a run directory."""
    with ExitStack() as stack:
        log = MappedHistory(_file(stack, file_bytes(_KEPT_BYTES)), _KEPT_BYTES)
        stack.callback(log.close)
        tail = LogTail(log)
        tail.install("info")
        stack.callback(tail.remove)
        state = StateWriter(MappedFile(_file(stack, FILE_BYTES), FILE_BYTES))
        stack.callback(state.close)
        history = MappedHistory(_file(stack, file_bytes(_KEPT_BYTES)), _KEPT_BYTES)
        stack.callback(history.close)
        yield log, history, state


def _file(stack: ExitStack, size: int) -> int:
    fd = os.memfd_create("practice", os.MFD_CLOEXEC)
    stack.callback(os.close, fd)
    os.ftruncate(fd, size)
    return fd


async def _practise(app: web.Application, log: MappedHistory, history: MappedHistory, state: StateWriter) -> None:
    spec = Spec(name="practice", cpus=1, memory_mib=16, boot=DirectBoot(kernel="none"))
    nobody = uuid.UUID(int=0)
    metadata = v5.InstanceMetadata(
        silo_id=nobody, project_id=nobody, sled_id=nobody, sled_serial="", sled_revision=0, sled_model=""
    )

    def note(record: Record) -> None:
        state.write(record.generation, record.state, record.detail)

    properties = v5.InstanceProperties(id=nobody, name="", description="", metadata=metadata)
    vm = VirtualMachine(spec, properties, _Keeper(), history=history, on_record=note, hypervisor="replay")
    app[SLOT].fill(vm, log)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("")  # to a name of the kernel's choice, which is no file: unix(7), autobind
    runner = await serve(app, listener)
    running = asyncio.create_task(vm.run())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.setblocking(False)
            client.connect(listener.getsockname())
            client.send(_REQUEST)
            reply = await asyncio.get_running_loop().sock_recv(client, 4096)
            if not reply.startswith(_REPLY):
                raise BackendError(f"prepare for a VM: {reply!r}")
        await vm.lifecycle.perform(Request.PAUSE)
        vm.lifecycle.request(Request.STOP)
        await running
    finally:
        await runner.cleanup()
        await vm.close()


def _kernel() -> bytes:
    """An ELF file that can be entered as the PVH boot protocol says, with nothing in it."""
    note = struct.pack("<III", 4, 4, 18) + b"Xen\0" + struct.pack("<I", _ENTRY)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _ENTRY, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    header += struct.pack("<IIQQQQQQ", 1, 5, 0, _ENTRY, _ENTRY, 64, 64, 0x1000)
    header += struct.pack("<IIQQQQQQ", 4, 4, len(header) + 56, 0, 0, len(note), len(note), 4)
    return header + note
