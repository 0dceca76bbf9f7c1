"""A process that is one VM: it serves the VM's API on the run directory's socket and ends when the VM does.

Whatever it needs of the host it is given: a socket to its keeper, one that listens, and the run directory, of which it
maps three files before it goes into its jail. All that is of the guest's making is met inside.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import logging
import os
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import msgspec
import uvloop

from propolis import jail
from propolis.errors import JailError, PropolisError
from propolis.http import v5
from propolis.http.app import make_app, serve
from propolis.http.slot import SLOT
from propolis.keeper_protocol import RemoteKeeper
from propolis.lifecycle import Record, Request, State
from propolis.log_tail import LogTail
from propolis.practice import practise
from propolis.virtual_machine import VirtualMachine

if TYPE_CHECKING:
    from aiohttp import web

    from propolis.console.history_file import MappedHistory
    from propolis.keeper_process import Ends
    from propolis.state_file import StateWriter

log = logging.getLogger(__name__)

_PROPERTIES = msgspec.json.Decoder(v5.InstanceProperties)  # made in the zygote, as all of this module
_JAILS = msgspec.json.Decoder(jail.JailSettings)
_apps: list[web.Application] = []  # made in the zygote: one to practise with, one for the VM
PRACTICE = 10  # so often, and the interpreter writes to what it runs no more
_LATER = (  # what is imported where it is first needed: a worker in its jail finds no file
    "propolis.hypervisor._kvm",
    "propolis.hypervisor._replay",
    "encodings.idna",
    "encodings.ascii",
    "encodings.latin_1",
    "concurrent.futures.thread",
    "PIL.BmpImagePlugin",
    "PIL.GifImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.PpmImagePlugin",
)


def preload() -> None:
    """In the zygote: all that workers import, or otherwise do each."""
    for name in _LATER:
        importlib.import_module(name)
    for _ in range(PRACTICE):
        practise(make_app(None))
    _apps.extend(make_app(None) for _ in range(2))
    try:
        jail.prepare()
    except JailError as error:
        log.warning("%s", error)  # and whoever starts a VM that is to be confined is told


def prepare() -> None:
    """In a worker that waits for its VM: makes one as it will have to, so that the pages for that are there already."""
    practise(_apps.pop())
    gc.collect()  # what is left of it has descriptors: the jail closes their numbers, which are others' a moment later


def main(ends: Ends) -> int:
    """The life of a worker; returns its exit status."""
    with ExitStack() as stack:
        log_history = ends.directory.map_log()
        stack.callback(log_history.close)
        tail = LogTail(log_history, ends.start.options.log_format)
        tail.install(ends.start.options.log_level)
        stack.callback(tail.remove)
        state = ends.directory.map_state()
        stack.callback(state.close)
        history = ends.directory.map_history()
        stack.callback(history.close)
        ends.directory.close()
        worker = _Worker(ends, state, history, log_history)
        stack.callback(worker.close)
        try:
            # From here on this process has nothing of the host but what it holds. The loop is made inside, where it
            # finds out what it may use.
            jail.enter(_JAILS.decode(ends.start.options.jail), keep=[0, 1, 2, *worker.descriptors()])
        except JailError as error:
            return worker.give_up(error)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(worker.run())


class _Worker:
    """One run of one VM."""

    def __init__(self, ends: Ends, state: StateWriter, history: MappedHistory, log_history: MappedHistory) -> None:
        self._start = ends.start
        self._listener = ends.listener
        self._keeper = RemoteKeeper(ends.keeper)
        self._state = state
        self._history = history
        self._log_history = log_history
        self._generation = 0 if state.last is None else state.last.generation + 1

    def descriptors(self) -> tuple[int, int]:
        """All that it needs; the run directory's files are mapped."""
        return self._keeper.fileno(), self._listener.fileno()

    def close(self) -> None:
        self._keeper.close()
        self._listener.close()

    def give_up(self, error: PropolisError) -> int:
        """The VM cannot be made. Returns the exit status."""
        log.error("the VM cannot be made: %s", error)
        self._state.write(self._generation, State.FAILED, str(error))
        self._keeper.report_failure(error)
        return 1

    async def run(self) -> int:
        """Returns the exit status."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._keeper.fileno(), _follow_keeper)
        try:
            vm = VirtualMachine(
                self._start.spec,
                _PROPERTIES.decode(self._start.properties),
                self._keeper,
                history=self._history,
                first_generation=self._generation,
                on_record=self._note,
                hypervisor=self._start.options.hypervisor,
            )
        except PropolisError as error:
            return self.give_up(error)
        app = _apps.pop()
        app[SLOT].fill(vm, self._log_history)
        runner = await serve(app, self._listener)
        try:
            loop.add_signal_handler(signal.SIGTERM, vm.lifecycle.request, Request.STOP)
            self._keeper.report_ready()
            record = await vm.run()
        finally:
            await runner.cleanup()
            loop.remove_reader(self._keeper.fileno())
        return 1 if record.state is State.FAILED else 0

    def _note(self, record: Record) -> None:
        self._state.write(record.generation, record.state, record.detail, paused=record.state is State.PAUSED)


def _follow_keeper() -> None:
    """Nobody is left who could tell how this worker ended, or whom it could ask for anything."""
    os.kill(os.getpid(), signal.SIGKILL)
