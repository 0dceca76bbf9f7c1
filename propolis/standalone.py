"""One VM in this process, from a TOML file: `propolis-standalone CONFIG.toml`.

COM1 is the unix socket ./ttya, or this terminal with --console. The first SIGINT or SIGTERM presses the guest's power
button, the second ends the VM.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import uvloop

from propolis import __version__, standalone_config
from propolis.console.history import ConsoleHistory
from propolis.console.hub import ConsoleHub
from propolis.console.socket import ConsoleSocket
from propolis.display.port import ScreenPort
from propolis.display.screen import Screen
from propolis.errors import ConfigError, PropolisError, StateError
from propolis.keeper import LocalKeeper
from propolis.lifecycle import GuestEvent, Lifecycle, Record, Request, State
from propolis.logs import LineFormatter
from propolis.machine import Machine
from propolis.names import NameLock
from propolis.spec import FirmwareBoot
from propolis.unix_name import UnixName

if TYPE_CHECKING:
    from collections.abc import Iterator

    from propolis.console.terminal import Terminal
    from propolis.spec import Spec

SOCKET = "./ttya"
SCREEN = "./vnc"
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

EPILOG = """\
console:
  ./ttya takes any number of clients, for example: socat -,raw,echo=0,escape=0x1d UNIX-CONNECT:ttya

signals:
  the first SIGINT, SIGTERM or SIGHUP presses the guest's power button, the second ends the VM

exit status:
  0    the guest powered off (or [main] exit_on_halt)
  1    the VM failed, or something it needs is missing or busy
  2    wrong usage or configuration
  130  ended by a second SIGINT (143 by SIGTERM, 129 by SIGHUP)
  N    the guest rebooted and [main] exit_on_reboot is N
"""

log = logging.getLogger("propolis")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="propolis-standalone",
        description="Run one virtual machine described by a TOML file. Its COM1 is the unix socket ./ttya.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="the machine: see docs/standalone.md")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    parser.add_argument("--console", action="store_true", help="attach this terminal to COM1 instead of ./ttya")
    parser.add_argument("--escape", metavar="KEY", default="^]", help="leaves the console, as ~. does; or none (^])")
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="warning",
        help="what is written to standard error (warning)",
    )
    parser.add_argument("--version", action="version", version=f"propolis {__version__}")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The console script; returns the exit status."""
    try:
        _fill_standard_descriptors()
        options = arguments().parse_args(argv)
        handler = logging.StreamHandler()
        handler.setFormatter(LineFormatter("%(asctime)s.%(msecs)03d %(levelname)s %(message)s", "%H:%M:%S"))
        logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
        log.debug("imports done")
        spec = standalone_config.load(options.config)
        standalone = Standalone(spec, console=options.console, escape=options.escape)
        if options.check:
            return 0
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(standalone.run())
    except KeyboardInterrupt:  # before there is a loop to handle it
        return 128 + signal.SIGINT
    except ConfigError as error:
        _complain(str(error))  # a line for each problem, with its place in the file
        return 2
    except PropolisError as error:
        _complain(f"propolis-standalone: {error}")
        return 1


def _log_debug_port(data: bytes) -> None:
    """What firmware, or a guest of ours, writes to port 0x402."""
    log.debug("debug port: %s", data.decode("latin-1").rstrip())


def _fill_standard_descriptors() -> None:
    """Where 0, 1 or 2 is closed, a file that is opened later would get that number: uvloop aborts the process then."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, which is this one


def _complain(message: str) -> None:
    with suppress(OSError):  # a terminal that hung up: nobody is there to be told, and the exit status still counts
        print(message, file=sys.stderr)  # noqa: T201 -- this is what a program says to its user


def _remark(message: str) -> None:
    """For the person at a terminal, not for whoever keeps standard error."""
    with suppress(OSError):
        if os.isatty(2):
            _complain(f"[{message}]")


@contextmanager
def _log_to_raw_terminal() -> Iterator[None]:
    """Lines of the log begin at the left edge of a terminal that does not see to that itself."""
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
    for handler in handlers:
        handler.terminator = "\r\n"
    try:
        yield
    finally:
        for handler in handlers:
            handler.terminator = "\n"


def _look(spec: Spec, keeper: LocalKeeper) -> None:
    """What is missing is told before an earlier VM of this name is ended for it.

    Disks are left out, as that VM may have them locked.
    """
    os.close(keeper.open_hypervisor())
    boot = spec.boot
    bootrom = boot.bootrom if isinstance(boot, FirmwareBoot) else None
    for path, what in ((bootrom, "bootrom"), (boot.kernel, "kernel"), (boot.initrd, "initrd")):
        if path is not None:
            keeper.open_image(path, what).close()


class Standalone:
    """One run of one VM: its name, its console, its signals."""

    def __init__(self, spec: Spec, *, console: bool, escape: str) -> None:
        """Raises ConfigError where there is no such `escape` key."""
        self._spec = spec
        self._terminal: Terminal | None = None
        if console:
            from propolis.console.escape import parse_escape
            from propolis.console.terminal import Terminal

            self._terminal = Terminal(escape=parse_escape(escape), name=spec.name)
        self._lifecycle: Lifecycle | None = None
        self._socket: ConsoleSocket | None = None
        self._signals: list[signal.Signals] = []
        self._ended_by: signal.Signals | None = None
        self._is_attached = False  # the terminal shows the console
        self._waiting: asyncio.Task[NameLock] | None = None

    async def run(self) -> int:
        """Runs the VM to its end; returns the exit status. Raises PropolisError where it cannot begin."""
        loop = asyncio.get_running_loop()
        for number in ENDING_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        keeper = LocalKeeper()
        _look(self._spec, keeper)
        async with AsyncExitStack() as stack:
            self._waiting = loop.create_task(NameLock.acquire(self._spec.name))
            try:
                stack.enter_context(await self._waiting)
            except asyncio.CancelledError:
                if self._ended_by is None:
                    raise
                return 128 + self._ended_by
            machine = Machine(self._spec, keeper, self._report)
            stack.push_async_callback(machine.halt)
            self._lifecycle = Lifecycle(machine, reboot_ends=self._spec.exit_on_reboot is not None)
            hub = self._connect(machine)
            await self._open_screen(machine, stack)
            if self._terminal is not None:
                record = await self._run_at_terminal(self._terminal, hub, stack)
            else:
                await self._open_socket(hub, stack)
                _remark(f"VM '{self._spec.name}': its console is {SOCKET}, Ctrl-C presses its power button")
                record = await self._run_lifecycle(hub)
        return self._status(record)

    def _report(self, event: GuestEvent) -> None:
        if self._lifecycle is not None:
            self._lifecycle.report(event)

    def _connect(self, machine: Machine) -> ConsoleHub:
        com1 = machine.board.serial_ports[1]
        hub = ConsoleHub(ConsoleHistory(), com1.feed)
        com1.on_output = hub.feed
        com1.on_input_room = hub.input_ready
        com1.on_reset = hub.discard_input
        machine.board.debug_console.on_output = _log_debug_port
        return hub

    async def _open_screen(self, machine: Machine, stack: AsyncExitStack) -> None:
        """Where the VM has one."""
        board = machine.board
        if board.ramfb is None:
            return
        screen = Screen(self._spec.name, board.ramfb, board.keyboard.key, board.keyboard.move)
        stack.push_async_callback(screen.close)
        name = UnixName(SCREEN, "screen socket")
        listener = await name.take(0o600)
        stack.push_async_callback(name.release)
        port = ScreenPort(screen, listener)
        stack.push_async_callback(port.close)
        await port.open()

    async def _open_socket(self, hub: ConsoleHub, stack: AsyncExitStack) -> None:
        self._socket = ConsoleSocket(SOCKET, hub)
        await self._socket.open()
        stack.push_async_callback(self._socket.close)

    async def _run_lifecycle(self, hub: ConsoleHub) -> Record:
        assert self._lifecycle is not None
        if self._ended_by is not None:  # a signal came before there was anything to end
            return self._lifecycle.record
        self._lifecycle.request(Request.RUN)
        record = await self._lifecycle.run()
        if self._socket is not None:
            await self._socket.stop_listening()  # those who had just connected see the history as well
        await hub.close()
        return record

    async def _run_at_terminal(self, terminal: Terminal, hub: ConsoleHub, stack: AsyncExitStack) -> Record:
        """Attaches this terminal until the VM ends or its user leaves; then the console is ./ttya after all."""
        try:
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(self._run_lifecycle(hub))
                with _log_to_raw_terminal():
                    self._is_attached = True
                    why = await terminal.attach(hub.attach)
                self._is_attached = False
                if why != "ended":
                    await self._move_console(hub, stack)
        except BaseExceptionGroup as group:
            if len(group.exceptions) == 1:
                raise group.exceptions[0] from None
            raise
        return running.result()

    async def _move_console(self, hub: ConsoleHub, stack: AsyncExitStack) -> None:
        """To the socket. The guest must not end because that cannot be had."""
        try:
            await self._open_socket(hub, stack)
        except PropolisError as error:
            _complain(f"[the VM runs on without a console: {error}; Ctrl-C presses its power button]")
        else:
            _complain(f"[the VM runs on: its console is {SOCKET}, Ctrl-C presses its power button]")

    def _status(self, record: Record) -> int:
        assert self._lifecycle is not None
        if record.state is State.FAILED:
            _complain(f"propolis-standalone: {record.detail}")
            return 1
        if self._ended_by is not None:
            return 128 + self._ended_by
        if self._lifecycle.rebooted and self._spec.exit_on_reboot is not None:
            return self._spec.exit_on_reboot
        return self._spec.exit_on_halt

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals.append(number)
        if self._lifecycle is None:
            self._ended_by = number
            if self._waiting is not None:  # for an earlier VM of this name to end
                self._waiting.cancel()
            return
        if self._lifecycle.record.state is State.STOPPING or self._lifecycle.record.state.is_final:
            return  # it ends already, and its own way decides the exit status
        try:
            if len(self._signals) == 1:
                self._lifecycle.request(Request.POWER_BUTTON)
                if not self._is_attached:
                    _remark("pressed the power button; once more ends the VM")
                return
        except StateError:
            pass  # not running: there is no guest to ask
        self._ended_by = number
        self._lifecycle.request(Request.STOP)


if __name__ == "__main__":
    sys.exit(main())
