"""The daemon: it serves many VMs by name, and outlives none of them.

SIGHUP has configuration, tokens and certificates read again; SIGTERM and SIGINT end it. Its VMs run on, and the next
daemon finds them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import signal
import stat
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

import msgspec
import uvloop

from propolis import cgroup, config, logs
from propolis.errors import BackendError, PropolisError
from propolis.http.access import Guard, TokenSet
from propolis.http.door import Door, make_runner, passed_sockets
from propolis.http.feed import Feed
from propolis.http.forward import Workers
from propolis.http.prometheus import Metrics
from propolis.http.router import Router
from propolis.service_manager import ServiceManager
from propolis.store import Store
from propolis.supervisor import Supervisor
from propolis.zygote import Zygote

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Coroutine

    from propolis.config import Address, Settings
    from propolis.instance import Instance

log = logging.getLogger(__name__)

_RUN_SECONDS = 30.0  # for a worker to take the request that starts its guest


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line says over the configuration."""

    file: str | None
    addresses: tuple[Address, ...]
    log_level: config.LogLevel | None
    log_format: config.LogFormat | None
    jail: config.JailMode | None
    insecure: bool
    hypervisor: str

    def settings(self) -> Settings:
        """The configuration with the command line's words over it. Raises ConfigError."""
        found = config.load(self.file) if self.file is not None else config.default_settings()
        return msgspec.structs.replace(
            found,
            listen=self.addresses or found.listen,
            insecure=self.insecure or found.insecure,
            log_level=self.log_level or found.log_level,
            log_format=self.log_format or found.log_format,
            jail=msgspec.structs.replace(found.jail, mode=self.jail or found.jail.mode),
        )


def serve(options: Options) -> None:
    """Until a signal ends it. Raises PropolisError where it cannot begin."""
    settings = options.settings()
    logs.configure(settings.log_level, settings.log_format)
    passed = passed_sockets(os.environ)  # before the manager's variables are taken
    manager = ServiceManager.take(os.environ)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(Daemon(options, settings, manager, passed).run())


class Daemon:
    """One run of the daemon."""

    def __init__(
        self, options: Options, settings: Settings, manager: ServiceManager, passed: list[socket.socket]
    ) -> None:
        """`passed` are listening sockets of the service manager's, ours from now on."""
        self._options = options
        self._settings = settings
        self._manager = manager
        self._passed = passed
        self._end = asyncio.Event()
        self._workers = Workers()

    async def run(self) -> None:
        """Until a signal ends it. Raises PropolisError where it cannot begin."""
        _raise_limit_of_files()
        async with AsyncExitStack() as stack:
            for listener in self._passed:
                stack.callback(listener.close)
            tokens = TokenSet.load(self._settings.tokens)
            _make_run_directory(self._settings.run_directory)
            store = stack.enter_context(Store.open(self._settings.state_directory))
            zygote = await stack.enter_async_context(await Zygote.spawn())
            supervisor = Supervisor(
                store,
                zygote,
                self._settings,
                self._tell_to_run,
                groups=cgroup.find(),
                hypervisor=self._options.hypervisor,
            )
            stack.push_async_callback(supervisor.close)
            await stack.enter_async_context(self._workers)
            feed = Feed(supervisor, self._workers)
            supervisor.open()
            router = Router(supervisor, self._workers, self._options.file)
            guard = Guard(self._settings, tokens)
            app = router.application(guard)
            feed.install(app)
            runner = make_runner(app, self._settings.limits)
            door = Door(runner, self._settings)
            Metrics(supervisor, self._workers, lambda: (door.connections, door.refused_connections)).install(app)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            listen = () if self._passed and not self._options.addresses else self._settings.listen
            await door.open(listen, self._passed)
            stack.push_async_callback(door.close)
            alive = asyncio.create_task(self._manager.keep_alive())
            stack.callback(alive.cancel)
            self._handle_signals(stack, lambda: self._reload(door, guard, supervisor))
            router.is_ready = True
            where = " ".join(map(str, door.addresses))
            log.info("ready", extra={"listening": where, "vms": len(supervisor), "pid": os.getpid()})
            self._manager.ready(f"listening at {where}")
            supervisor.start_wanted()
            await self._end.wait()
            self._manager.stopping()
            log.info("ending; VMs run on")

    def _handle_signals(self, stack: AsyncExitStack, reload: Callable[[], Coroutine[object, object, None]]) -> None:
        loop = asyncio.get_running_loop()
        reloads: set[asyncio.Task[None]] = set()

        def begin_reload() -> None:
            task = loop.create_task(reload())
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, begin_reload)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end.set)
        for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
            stack.callback(loop.remove_signal_handler, number)

    async def _reload(self, door: Door, guard: Guard, supervisor: Supervisor) -> None:
        """Takes over what is new, or stays with all that was."""
        self._manager.reloading()
        try:
            settings = self._options.settings()
            tokens = TokenSet.load(settings.tokens)
            await door.reload(settings)
        except PropolisError as error:
            log.error("not reloaded", extra={"reason": str(error)})  # noqa: TRY400 -- its message is all there is
        else:
            fixed = ("state_directory", "run_directory", "listen")
            if changed := [name for name in fixed if getattr(settings, name) != getattr(self._settings, name)]:
                log.warning("a change that needs a restart", extra={"settings": " ".join(changed)})
            self._settings = msgspec.structs.replace(
                settings, **{name: getattr(self._settings, name) for name in fixed}
            )
            guard.settings, guard.tokens = self._settings, tokens
            supervisor.settings = self._settings
            logs.configure(self._settings.log_level, self._settings.log_format)
            log.info("reloaded", extra={"tokens": len(tokens)})
        self._manager.ready("reloaded")

    async def _tell_to_run(self, instance: Instance) -> None:
        answer = await self._workers.ask(
            instance,
            "PUT",
            "/instance/state",
            body=b'"Run"',
            headers={"Content-Type": "application/json"},
            seconds=_RUN_SECONDS,
        )
        if answer.status != 204:
            raise BackendError(f"start VM {instance.name!r}: its worker answers {answer.status}")


def _raise_limit_of_files() -> None:
    """Each VM has a few descriptors here, and each client one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _make_run_directory(path: str) -> None:
    """Others may look in, for the API's socket; what is a VM's is closed to them. Raises BackendError."""
    try:
        os.makedirs(path, 0o755, exist_ok=True)
        status = os.stat(path)
    except OSError as error:
        raise BackendError(f"make run directory {path!r}: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise BackendError(f"run directory {path!r}: expected a directory that only this user can write to")
