"""Which VMs there are: created, found again, told to run and to stop, deleted. No HTTP in it.

A VM's definition is in the store, what is known of its runs in its run directory. Its processes do not need this one:
they are found by their run directories when the daemon comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from typing import TYPE_CHECKING

import msgspec

from propolis.background import Background
from propolis.errors import (
    AlreadyInitializedError,
    BusyError,
    ConfigError,
    NotFoundError,
    PropolisError,
    StateError,
)
from propolis.host_files import check_paths
from propolis.instance import Instance
from propolis.lifecycle import State
from propolis.restarts import FIRST_DELAY, Restarts
from propolis.runs import Runs
from propolis.store import Definition, Restart, Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from propolis.cgroup import Subtree
    from propolis.config import Settings
    from propolis.running_vm import RunningVm
    from propolis.runs import Starter
    from propolis.spec import Spec
    from propolis.state_file import StateRecord

log = logging.getLogger(__name__)

STOP_SECONDS = 20.0  # for a VM that is told to stop


class Supervisor:
    """All VMs by name and by UUID."""

    def __init__(
        self,
        store: Store,
        starter: Starter,
        settings: Settings,
        tell_to_run: Callable[[Instance], Awaitable[None]],
        *,
        groups: Subtree | None = None,
        hypervisor: str = "kvm",
        first_delay: float = FIRST_DELAY,
    ) -> None:
        """`tell_to_run` gives a worker the request that starts its guest; `groups` is where VMs get control groups.

        The store is the caller's to close.
        """
        self.settings = settings
        self.observers: list[Callable[[str, Instance], None]] = []  # of "created", "worker", "ended", "deleted"
        self._store = store
        self._tell_to_run = tell_to_run
        self._groups = groups
        self._background = Background()
        self._restarts = Restarts(self._start_and_run, self._background, first_delay)
        self._runs = Runs(starter, lambda: self.settings, self._background, self, groups=groups, hypervisor=hypervisor)
        self._instances: dict[str, Instance] = {}
        self._names: dict[str, str] = {}  # by UUID
        self._root = os.path.join(settings.run_directory, "vms")

    # -- the set -------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Finds all VMs, and those that run. Starts none: that is `start_wanted`."""
        os.makedirs(self._root, 0o700, exist_ok=True)
        for definition in self._store.load().values():
            instance = self._add(definition)
            instance.is_made = True
            if os.path.isdir(instance.path):
                self._runs.find(instance)
        for entry in os.scandir(self._root):
            if entry.name not in self._instances and entry.is_dir(follow_symlinks=False):
                self._runs.clear_leftover(entry.path)
        if self._groups is not None:
            self._groups.sweep()

    def start_wanted(self) -> None:
        """What is to run by itself and does not is started, in tasks of its own."""
        for instance in tuple(self._instances.values()):
            if instance.running is not None:
                continue
            seen = None if instance.directory is None else instance.directory.state()
            if seen is None:
                if instance.definition.autostart:
                    self._restarts.start_after(instance, 0)
            else:
                self._restarts.follow_policy(instance, seen)

    async def close(self) -> None:
        """Lets go of all VMs, which run on; twice is fine."""
        await self._background.close()
        for instance in self._instances.values():
            instance.let_go()
        self._instances.clear()
        self._names.clear()

    def __iter__(self) -> Iterator[Instance]:
        """All VMs that were made, by name."""
        return (self._instances[name] for name in sorted(self._instances) if self._instances[name].is_made)

    def __len__(self) -> int:
        return len(self._instances)

    def get(self, key: str) -> Instance:
        """By name or UUID. Raises NotFoundError."""
        instance = self._instances.get(key)
        if instance is None and len(key) in (32, 36):
            with contextlib.suppress(ValueError):
                instance = self._instances.get(self._names.get(str(uuid.UUID(key)), ""))
        if instance is None or not instance.is_made:
            raise NotFoundError(f"there is no VM {key[:100]!r}")
        return instance

    # -- create and delete ---------------------------------------------------------------------------------------------

    async def create(
        self,
        requested: Spec,
        identity: uuid.UUID,
        properties: msgspec.Struct,
        *,
        autostart: bool | None = None,
        restart: Restart | None = None,
    ) -> tuple[Instance, bool]:
        """A VM of this spec, and whether it is new: one that is there already is left as it is.

        Raises AlreadyInitializedError where there is another one, and what its worker met where it cannot be made.
        """
        wanted = msgspec.Raw(msgspec.json.encode(properties))
        while (there := self._instances.get(requested.name)) is not None:
            async with there.turn:  # of whoever makes or deletes it
                if there.is_deleted:
                    continue
                _compare(there.definition, requested, wanted)
                await self._keep(there, autostart, restart)
                return there, False
        if (other := self._names.get(str(identity))) is not None:
            raise AlreadyInitializedError(f"VM {other!r} has the UUID {identity}")
        _check_name(requested.name, identity)
        if len(self._instances) >= self.settings.limits.vms:
            raise BusyError(f"this server has {self.settings.limits.vms} VMs, as many as [limits] vms lets it have")
        spec = self.settings.defaults.added_to(requested)
        check_paths(spec, self.settings.allowed_directories)
        definition = Definition(
            uuid=str(identity),
            created=time.time(),
            index=self._free_index(),
            spec=spec,
            requested=requested,
            properties=wanted,
            autostart=bool(autostart),
            restart=restart or "never",
        )
        instance = self._add(definition)
        async with instance.turn:
            try:
                await self._make(instance)
            except BaseException:
                self._forget(instance)
                raise
        self._tell("created", instance)
        log.info("created", extra={"vm": instance.name, "uuid": instance.uuid})
        return instance, True

    async def _make(self, instance: Instance) -> None:
        """The definition is written and the worker made at the same time; both, or neither."""
        saving = asyncio.create_task(asyncio.to_thread(self._store.save, instance.definition))
        try:
            await self._runs.start(instance)
            await asyncio.shield(saving)
        except BaseException:
            await asyncio.shield(self._unmake(instance, saving))
            raise
        instance.is_made = True

    async def _unmake(self, instance: Instance, saving: asyncio.Task[None]) -> None:
        await asyncio.wait({saving})
        saving.exception()
        with contextlib.suppress(PropolisError):
            await self._runs.end(instance)
        with contextlib.suppress(PropolisError):
            await asyncio.to_thread(self._store.remove, instance.name)
        instance.remove_directory()

    async def keep(self, instance: Instance, autostart: bool | None, restart: Restart | None) -> None:
        """Changes how the VM is kept; None leaves as it is."""
        async with instance.turn:
            instance.refuse_deleted()
            await self._keep(instance, autostart, restart)

    async def _keep(self, instance: Instance, autostart: bool | None, restart: Restart | None) -> None:
        old = instance.definition
        new = msgspec.structs.replace(
            old,
            autostart=old.autostart if autostart is None else autostart,
            restart=old.restart if restart is None else restart,
        )
        if new != old:
            await asyncio.to_thread(self._store.save, new)
            instance.definition = new

    async def delete(self, instance: Instance, *, force: bool = False) -> None:
        """Ends what is left of the VM and forgets it. Raises StateError where it runs, unless by `force`."""
        async with instance.turn:
            instance.refuse_deleted()
            record = instance.record
            if instance.is_live and record.state is not State.CREATING and not force:
                error = StateError(f"cannot delete: the VM is {record.state.value.lower()}, so stop it first")
                error.state = record.state.value
                raise error
            self._restarts.cancel(instance)
            await self._runs.end(instance)
            # In this order, so that one that is half deleted when the daemon is killed is not started again.
            await asyncio.to_thread(self._store.remove, instance.name)
            self._tell("deleted", instance)
            instance.remove_directory()
            self._forget(instance)
        log.info("deleted", extra={"vm": instance.name, "uuid": instance.uuid})

    # -- run and stop --------------------------------------------------------------------------------------------------

    async def prepare_run(self, instance: Instance) -> None:
        """A worker that can be told to run: a fresh one where there is none, or where the VM is over."""
        async with instance.turn:
            instance.refuse_deleted()
            self._restarts.cancel(instance)
            instance.failures = 0
            instance.clear_stop_mark()
            if not instance.is_live:
                await self._runs.end(instance, patience=STOP_SECONDS)
                await self._runs.start(instance)

    def note_stop(self, instance: Instance, deadline: float | None = STOP_SECONDS) -> None:
        """Somebody asked for the VM's end, so no policy undoes it. Past the deadline its worker is killed."""
        self._restarts.cancel(instance)
        if instance.directory is not None and not instance.record.state.is_final:
            instance.set_stop_mark()
        if deadline is not None and instance.running is not None and instance.stopper is None:
            instance.stopper = self._background.spawn(self._see_to_stop(instance, instance.running, deadline))

    async def _see_to_stop(self, instance: Instance, running: RunningVm, deadline: float) -> None:
        try:
            async with asyncio.timeout(deadline):
                while instance.running is running:
                    await instance.moved()
        except TimeoutError:
            log.warning("killed, as it did not stop", extra={"vm": instance.name, "seconds": deadline})
            running.kill()
        finally:
            instance.stopper = None

    async def _start_and_run(self, instance: Instance) -> None:
        await self._runs.start(instance)
        await self._tell_to_run(instance)

    # -- what its processes do -----------------------------------------------------------------------------------------

    def worker_came(self, instance: Instance) -> None:
        """A worker was started, or found."""
        self._tell("worker", instance)

    def run_ended(self, instance: Instance, last: StateRecord, seconds: float) -> None:
        """With this state, after so long."""
        self._tell("ended", instance)
        self._restarts.note_run(instance, seconds)
        if not instance.is_ending:
            self._restarts.follow_policy(instance, last)

    # -- small ---------------------------------------------------------------------------------------------------------

    def _add(self, definition: Definition) -> Instance:
        instance = Instance(definition, os.path.join(self._root, definition.name))
        self._instances[definition.name] = instance
        self._names[definition.uuid] = definition.name
        return instance

    def _forget(self, instance: Instance) -> None:
        instance.is_deleted = True
        del self._instances[instance.name]
        del self._names[instance.uuid]
        instance.note_move()

    def _free_index(self) -> int:
        taken = {instance.definition.index for instance in self._instances.values()}
        return next(index for index in range(len(taken) + 1) if index not in taken)

    def _tell(self, kind: str, instance: Instance) -> None:
        for observer in self.observers:
            observer(kind, instance)


def _compare(there: Definition, requested: Spec, properties: msgspec.Raw) -> None:
    known = there.requested
    if known.boot_is_default and requested.boot_is_default:  # the server's choice, whatever it was then
        known = msgspec.structs.replace(known, boot=requested.boot)
    if known != requested:
        raise AlreadyInitializedError(f"there is a VM {there.name!r} with another spec")
    if msgspec.json.decode(there.properties) != msgspec.json.decode(properties):
        raise AlreadyInitializedError(f"there is a VM {there.name!r} with other properties")


def _check_name(name: str, identity: uuid.UUID) -> None:
    """A name that reads as the UUID of another VM would be two VMs'."""
    with contextlib.suppress(ValueError):
        if len(name) in (32, 36) and uuid.UUID(name) != identity:
            raise ConfigError(f"{name!r} cannot name a VM: it reads as a UUID, and not as this VM's")
