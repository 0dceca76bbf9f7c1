"""One VM behind Propolis API 5.0.0, in this process: `propolis-server run-one ADDRESS`.

For control planes that expect a server to each VM. The VM is created, run and stopped by the API; once it is destroyed
another can be created. As long as it is there it holds its name, like a standalone VM.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import os
import signal
import socket
import stat
import sys
from typing import Self

import uvloop

from propolis.console.history import ConsoleHistory
from propolis.errors import BackendError, BusyError, ConfigError, PropolisError
from propolis.http import v5, v5_spec
from propolis.http.app import make_app, serve
from propolis.keeper import LocalKeeper
from propolis.lifecycle import Request
from propolis.logs import LineFormatter
from propolis.names import NameLock
from propolis.spec import Boot, DirectBoot, FirmwareBoot
from propolis.virtual_machine import VirtualMachine

log = logging.getLogger(__name__)

LOG_BYTES = 65536  # of the first and of the latest lines, which GET /instance/log shows
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LINE = 4096  # characters of one line of the log that are kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("address", metavar="ADDRESS", help="IP:PORT or unix:PATH to listen on")
    boots = parser.add_mutually_exclusive_group()
    boots.add_argument("--bootrom", metavar="FILE", help="firmware for VMs that do not say what they boot")
    boots.add_argument("--kernel", metavar="FILE", help="a Linux kernel for VMs that do not say what they boot")
    parser.add_argument("--initrd", metavar="FILE", help="with --kernel: its initial file system")
    parser.add_argument("--cmdline", metavar="TEXT", default="", help="with --kernel: its command line")
    parser.add_argument("--hypervisor", choices=("kvm", "replay"), default="kvm", help=argparse.SUPPRESS)
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="what is logged (info)"
    )


def run(options: argparse.Namespace) -> int:
    """Serves until a signal ends it; returns the exit status."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(LOG_FORMAT))
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(options))
    except ConfigError as error:
        sys.stderr.write(f"propolis-server: {error}\n")
        return 2
    except PropolisError as error:
        sys.stderr.write(f"propolis-server: {error}\n")
        return 1
    return 0


async def _run(options: argparse.Namespace) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    async with RunOne(default_boot(options), options.hypervisor) as one:
        listener = listen(options.address)
        runner = await serve(make_app(None, create=one.create, log=one.log, extra_fields=False), listener)
        log.info("listening on %s", _shown(listener, options.address))
        try:
            await ended.wait()
            await one.stop()
        finally:
            await runner.cleanup()
            if options.address.startswith("unix:"):
                os.unlink(options.address.removeprefix("unix:"))


def _shown(listener: socket.socket, address: str) -> str:
    """The address with the port that it became, where any would do."""
    return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{listener.getsockname()[1]}"


def default_boot(options: argparse.Namespace) -> Boot | None:
    """What a VM boots that does not say so."""
    if options.bootrom is not None:
        return FirmwareBoot(bootrom=options.bootrom)
    if options.kernel is not None:
        return DirectBoot(kernel=options.kernel, initrd=options.initrd, cmdline=options.cmdline)
    if options.initrd is not None or options.cmdline:
        raise ConfigError("--initrd and --cmdline belong to --kernel, which is missing")
    return None


class RunOne:
    """The VM of this process, and its log."""

    def __init__(self, boot: Boot | None, hypervisor: str = "kvm") -> None:
        self._boot = boot
        self._hypervisor = hypervisor
        self._task: asyncio.Task[object] | None = None
        self._vm: VirtualMachine | None = None
        self.log = ConsoleHistory(LOG_BYTES)
        self._handler = _LogKeeper(self.log)

    async def __aenter__(self) -> Self:
        logging.getLogger("propolis").addHandler(self._handler)
        return self

    async def __aexit__(self, *exception: object) -> None:
        logging.getLogger("propolis").removeHandler(self._handler)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def create(self, request: v5.InstanceEnsureRequest) -> VirtualMachine:
        """Makes the VM of a request. An earlier one is destroyed."""
        if isinstance(request.init, v5.InitializeAsMigrationTarget):
            raise v5_spec.no_migration()
        if self._task is not None:  # it is about to end
            await asyncio.wait({self._task})
        spec = v5_spec.to_spec(request.init.value.spec, request.properties.name, default_boot=self._boot)
        name = await NameLock.acquire(spec.name, program="run-one")
        try:
            vm = VirtualMachine(spec, request.properties, LocalKeeper(), is_destroyed=True, hypervisor=self._hypervisor)
        except BaseException:
            name.release()
            raise
        self._vm = vm
        self._task = asyncio.create_task(_run_named(vm, name), name="vm")
        return vm

    async def stop(self) -> None:
        """Ends the VM, if there is one; returns once it is over."""
        if self._vm is not None and self._task is not None:
            self._vm.lifecycle.request(Request.STOP)
            await asyncio.gather(self._task, return_exceptions=True)


async def _run_named(vm: VirtualMachine, name: NameLock) -> None:
    with name:
        await vm.run()


class _LogKeeper(logging.Handler):
    """Keeps the log for those who ask for it by the API."""

    def __init__(self, history: ConsoleHistory) -> None:
        super().__init__()
        self.setFormatter(LineFormatter(LOG_FORMAT))
        self._history = history

    def emit(self, record: logging.LogRecord) -> None:
        self._history.append(self.format(record)[:_LINE].encode(errors="replace") + b"\n")


def listen(address: str) -> socket.socket:
    """A listening socket. Raises ConfigError for what is no address, BusyError where somebody else listens."""
    try:
        if address.startswith("unix:"):
            return _listen_unix(address.removeprefix("unix:"))
        host, colon, port = address.rpartition(":")
        if not colon or not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
            raise ConfigError(f"address {address!r}: expected IP:PORT or unix:PATH")
        host = host.removeprefix("[").removesuffix("]")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, int(port)), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BusyError(f"listen on {address}: another program does") from error
        raise BackendError(f"listen on {address}: {error.strerror or error}") from error


def _listen_unix(path: str) -> socket.socket:
    """A socket that its user and group may use; what a dead program left there is replaced."""
    if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        mask = os.umask(0o117)
        try:
            listener.bind(path)
        finally:
            os.umask(mask)
        listener.listen(128)
    except BaseException:
        listener.close()
        raise
    return listener
