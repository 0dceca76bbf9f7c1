"""Which VMs there are, and their processes: made, found again, ended, started once more. No HTTP in it.

A VM's definition is in the store, what is known of its runs in its run directory. Its processes do not need this one:
they are found by their run directories when the daemon comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
import uuid
from typing import TYPE_CHECKING, Protocol

import msgspec

from propolis.cgroup import Limits, bytes_in_memory, memory_limit
from propolis.errors import (
    AlreadyInitializedError,
    BusyError,
    ConfigError,
    ForbiddenError,
    NotFoundError,
    PropolisError,
    StateError,
)
from propolis.http.v5 import InstanceProperties
from propolis.jail import JailMode, JailSettings
from propolis.keeper_protocol import StartOptions
from propolis.lifecycle import State
from propolis.run_directory import RunDirectory
from propolis.running_vm import RunningVm, find_running
from propolis.spec import CLOUD_INIT_VOLUME_BYTES, BlobBlock, CloudInit, Spec, boot_files
from propolis.state_file import StateRecord
from propolis.store import Definition, Restart, Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from propolis.cgroup import Subtree, VmGroup
    from propolis.config import Defaults, Settings

log = logging.getLogger(__name__)

FIRST_DELAY, LAST_DELAY = 1.0, 300.0  # seconds between an end and the next start
STEADY_SECONDS = 60.0  # a run that lasted so long was no failure to start
STOP_SECONDS = 20.0  # for a VM that is told to stop
_END_SECONDS = 5.0  # for each stronger way of ending processes
_PROCESSES, _PROCESSES_OF_CPU = 512, 4  # how many a VM may have: keeper, worker, helpers, and their threads
_STOP_MARK = "asked-to-stop"


class Starter(Protocol):
    """Makes the processes of a VM: the zygote."""

    async def start_vm(
        self,
        directory: RunDirectory,
        spec: Spec,
        properties: msgspec.Struct | None = None,
        options: StartOptions | None = None,
    ) -> RunningVm: ...


class Instance:
    """One VM, whether it runs or not."""

    def __init__(self, definition: Definition, path: str) -> None:
        self.definition = definition
        self.path = path  # of its run directory
        self.directory: RunDirectory | None = None
        self.running: RunningVm | None = None
        self.turn = asyncio.Lock()  # who starts, ends or deletes it
        self.is_made = False
        self.is_deleted = False
        self.restarts = 0
        self.next_start: float | None = None  # of the loop's clock
        self.is_fresh = False  # its worker was started by this daemon
        self._moved = asyncio.Event()
        self._is_ending = False  # whoever has the turn ends its processes
        self._failures = 0  # in a row
        self._started_at = 0.0
        self._watcher: asyncio.Task[None] | None = None
        self._restart: asyncio.Task[None] | None = None
        self._stopper: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def uuid(self) -> str:
        return self.definition.uuid

    @property
    def record(self) -> StateRecord:
        """The VM's last state. One that no process has had since the host started is stopped."""
        found = None if self.directory is None else self.directory.state()
        if found is not None:
            return found
        if self.running is not None or not self.is_made:
            return StateRecord(generation=0, state=State.CREATING)
        return StateRecord(generation=0, state=State.STOPPED, detail="not started since the host was")

    @property
    def is_live(self) -> bool:
        """Whether there is a worker that may yet do something for the VM."""
        return self.running is not None and not self.record.state.is_final

    @property
    def starts_again(self) -> bool:
        """Whether its restart policy is about to start it."""
        return self._restart is not None

    def moved(self) -> Coroutine[object, object, object]:
        """To be awaited: until, from this call on, a worker has come or gone, or the VM is deleted."""
        return self._moved.wait()

    def _note_move(self) -> None:
        self._moved.set()
        self._moved = asyncio.Event()


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
        self._starter = starter
        self._tell_to_run = tell_to_run
        self._groups = groups
        self._hypervisor = hypervisor
        self._first_delay = first_delay
        self._instances: dict[str, Instance] = {}
        self._names: dict[str, str] = {}  # by UUID
        self._tasks: set[asyncio.Task[None]] = set()
        self._root = os.path.join(settings.run_directory, "vms")

    # -- the set -------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Finds all VMs, and those that run. Starts none: that is `start_wanted`."""
        os.makedirs(self._root, 0o700, exist_ok=True)
        for definition in self._store.load().values():
            instance = self._add(definition)
            instance.is_made = True
            if os.path.isdir(instance.path):
                self._find(instance)
        for entry in os.scandir(self._root):
            if entry.name not in self._instances and entry.is_dir(follow_symlinks=False):
                self._clear_leftover(entry.path)
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
                    self._restart_after(instance, 0)
            else:
                self._follow_policy(instance, seen)

    async def close(self) -> None:
        """Lets go of all VMs, which run on; twice is fine."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for instance in self._instances.values():
            _let_go(instance)
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
        spec = add_defaults(requested, self.settings.defaults)
        self._check_paths(spec)
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
            await self._start(instance)
            await asyncio.shield(saving)
        except BaseException:
            await asyncio.shield(self._unmake(instance, saving))
            raise
        instance.is_made = True

    async def _unmake(self, instance: Instance, saving: asyncio.Task[None]) -> None:
        await asyncio.wait({saving})
        saving.exception()
        with contextlib.suppress(PropolisError):
            await self._end(instance)
        with contextlib.suppress(PropolisError):
            await asyncio.to_thread(self._store.remove, instance.name)
        self._remove_directory(instance)

    async def keep(self, instance: Instance, autostart: bool | None, restart: Restart | None) -> None:
        """Changes how the VM is kept; None leaves as it is."""
        async with instance.turn:
            _refuse_deleted(instance)
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
            _refuse_deleted(instance)
            record = instance.record
            if instance.is_live and record.state is not State.CREATING and not force:
                error = StateError(f"cannot delete: the VM is {record.state.value.lower()}, so stop it first")
                error.state = record.state.value
                raise error
            self._cancel_restart(instance)
            await self._end(instance)
            # In this order, so that one that is half deleted when the daemon is killed is not started again.
            await asyncio.to_thread(self._store.remove, instance.name)
            self._tell("deleted", instance)
            self._remove_directory(instance)
            self._forget(instance)
        log.info("deleted", extra={"vm": instance.name, "uuid": instance.uuid})

    # -- run and stop --------------------------------------------------------------------------------------------------

    async def prepare_run(self, instance: Instance) -> None:
        """A worker that can be told to run: a fresh one where there is none, or where the VM is over."""
        async with instance.turn:
            _refuse_deleted(instance)
            self._cancel_restart(instance)
            instance._failures = 0
            _clear_stop_mark(instance)
            if not instance.is_live:
                await self._end(instance, patience=STOP_SECONDS)
                await self._start(instance)

    def note_stop(self, instance: Instance, deadline: float | None = STOP_SECONDS) -> None:
        """Somebody asked for the VM's end, so no policy undoes it. Past the deadline its worker is killed."""
        self._cancel_restart(instance)
        if instance.directory is not None and not instance.record.state.is_final:
            fd = os.open(_STOP_MARK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=instance.directory.fileno())
            os.close(fd)
        if deadline is not None and instance.running is not None and instance._stopper is None:
            instance._stopper = self._spawn(self._see_to_stop(instance, instance.running, deadline))

    async def _see_to_stop(self, instance: Instance, running: RunningVm, deadline: float) -> None:
        try:
            async with asyncio.timeout(deadline):
                while instance.running is running:
                    await instance.moved()
        except TimeoutError:
            log.warning("killed, as it did not stop", extra={"vm": instance.name, "seconds": deadline})
            running.kill()
        finally:
            instance._stopper = None

    # -- processes -----------------------------------------------------------------------------------------------------

    async def _start(self, instance: Instance) -> None:
        """The caller has the turn, and no process has the VM."""
        self._check_paths(instance.definition.spec)
        if instance.directory is None:
            instance.directory = RunDirectory.create(instance.path)
        properties = msgspec.json.decode(instance.definition.properties, type=InstanceProperties)
        group = self._make_group(instance.definition.spec)
        try:
            running = await self._starter.start_vm(
                instance.directory,
                instance.definition.spec,
                properties,
                self._options(instance.definition, None if group is None else group.path),
            )
        except BaseException:
            self._remove_group(instance)
            raise
        instance.is_fresh = True
        self._watch(instance, running)

    def _make_group(self, spec: Spec) -> VmGroup | None:
        if self._groups is None:
            return None
        files = bytes_in_memory(file.path for file in spec.files())
        limits = Limits(
            memory_bytes=memory_limit(spec.memory_mib << 20, files_in_memory=files),
            processes=_PROCESSES + _PROCESSES_OF_CPU * spec.cpus,
        )
        return self._groups.make(spec.name, limits)

    def _remove_group(self, instance: Instance) -> str | None:
        """What the group says about its end, if it ended by it."""
        group = None if self._groups is None else self._groups.open(instance.name)
        if group is None:
            return None
        try:
            kills = group.oom_kills()
            group.kill()  # helpers, if any outlived their VM
            group.remove()
        except PropolisError as error:
            log.warning("control group stays", extra={"vm": instance.name, "reason": str(error)})
            return None
        return "the VM was killed at its limit of memory, or as the host had none left" if kills else None

    def _options(self, definition: Definition, group: str | None) -> StartOptions:
        jail = self.settings.jail
        confined = JailSettings(
            mode=JailMode(jail.mode),
            uid=jail.first_uid + definition.index if os.geteuid() == 0 and jail.mode != "off" else None,
            core_size=jail.core_bytes,
            file_size=max(largest_file(definition.spec), jail.core_bytes),
        )
        return StartOptions(
            log_level=self.settings.log_level,
            hypervisor=self._hypervisor,
            jail=msgspec.Raw(msgspec.json.encode(confined)),
            cgroup=group,
        )

    def _watch(self, instance: Instance, running: RunningVm) -> None:
        instance.running = running
        instance._started_at = asyncio.get_running_loop().time()
        instance._watcher = self._spawn(self._bury(instance, running))
        instance._note_move()
        self._tell("worker", instance)

    async def _bury(self, instance: Instance, running: RunningVm) -> None:
        """Waits for the end of a run, and sees to what follows."""
        end = await running.wait()
        reason = self._remove_group(instance) or end.reason
        last = _write_end(running.run_directory, reason)
        running.close()
        instance.running = None
        instance._watcher = None
        fields = {"vm": instance.name, "state": last.state.value, "reason": last.detail, "worker": end.reason}
        log.log(logging.ERROR if last.state is State.FAILED else logging.INFO, "ended", extra=fields)
        instance._note_move()
        self._tell("ended", instance)
        if asyncio.get_running_loop().time() - instance._started_at >= STEADY_SECONDS:
            instance._failures = 0
        if not instance._is_ending:
            self._follow_policy(instance, last)

    async def _end(self, instance: Instance, patience: float = _END_SECONDS) -> None:
        """No process has the VM when this returns. Raises BusyError where the kernel does not let go of one."""
        running = instance.running
        if running is None:
            return
        steps: list[Callable[[], None]] = [running.terminate, running.kill, running.kill_all]
        if instance.record.state.is_final:
            steps.insert(0, lambda: None)  # it is about to end by itself
        instance._is_ending = True
        try:
            for step in steps:
                step()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        while instance.running is running:
                            await instance.moved()
                        return
        finally:
            instance._is_ending = False
        raise BusyError(f"VM {instance.name!r}: process {running.worker_pid} was killed and does not end")

    def _find(self, instance: Instance) -> None:
        """What an earlier daemon left of this VM."""
        try:
            instance.directory = RunDirectory.open(instance.path)
            running = find_running(instance.directory)
        except PropolisError as error:
            log.error("run directory not usable", extra={"vm": instance.name, "reason": str(error)})  # noqa: TRY400
            return
        if running is not None:
            log.info("found running", extra={"vm": instance.name, "worker": running.worker_pid})
            self._watch(instance, running)
            return
        seen = instance.directory.state()
        if seen is not None and not seen.state.is_final:
            end = instance.directory.exit_record()
            reason = self._remove_group(instance) or (end and end.reason) or "it ended, and nobody saw how"
            _write_end(instance.directory, reason)

    def _clear_leftover(self, path: str) -> None:
        """The run directory of a VM that was deleted, half made, or whose definition was set aside."""
        try:
            directory = RunDirectory.open(path)
        except PropolisError as error:
            log.warning("leftover stays", extra={"path": path, "reason": str(error)})
            return
        state = directory.state()
        running = None
        with contextlib.suppress(PropolisError):
            running = find_running(directory)
        if running is not None and (state is None or state.state in (State.CREATING, State.FAILED)):
            self._spawn(self._end_leftover(directory, running))  # nobody was told that there is such a VM
            return
        directory.close()
        if running is None:
            _remove(path)
        else:
            running.close()
            log.warning("a VM without a definition runs", extra={"path": path, "worker": running.worker_pid})

    async def _end_leftover(self, directory: RunDirectory, running: RunningVm) -> None:
        with directory, running:
            running.kill_all()
            await running.wait()
        _remove(directory.path)

    # -- policy --------------------------------------------------------------------------------------------------------

    def _follow_policy(self, instance: Instance, last: StateRecord) -> None:
        policy = instance.definition.restart
        wanted = last.state is State.FAILED or (policy == "always" and last.state is State.STOPPED)
        if policy == "never" or not wanted or _has_stop_mark(instance) or instance.is_deleted:
            return
        delay = min(self._first_delay * 2**instance._failures, LAST_DELAY)
        instance._failures += 1
        self._restart_after(instance, delay)

    def _restart_after(self, instance: Instance, delay: float) -> None:
        self._cancel_restart(instance)
        instance.next_start = asyncio.get_running_loop().time() + delay
        instance._restart = self._spawn(self._start_again(instance, delay))

    def _cancel_restart(self, instance: Instance) -> None:
        if instance._restart is not None and instance._restart is not asyncio.current_task():
            instance._restart.cancel()
            instance._restart = None
            instance.next_start = None
            instance._note_move()

    async def _start_again(self, instance: Instance, delay: float) -> None:
        me = asyncio.current_task()
        await asyncio.sleep(delay)
        problem: PropolisError | None = None
        async with instance.turn:
            if instance._restart is not me:
                return
            try:
                if instance.running is None:
                    instance.restarts += 1
                    await self._start(instance)
                    await self._tell_to_run(instance)
                    log.info("started", extra={"vm": instance.name, "after_seconds": delay})
            except PropolisError as error:
                problem = error
            instance._restart = None
            instance.next_start = None
        instance._note_move()
        if problem is not None:
            log.error("not started", extra={"vm": instance.name, "reason": str(problem)})
            if instance.running is None:
                failed = StateRecord(generation=0, state=State.FAILED, detail=str(problem))
                self._follow_policy(instance, failed)

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
        instance._note_move()

    def _remove_directory(self, instance: Instance) -> None:
        if instance.directory is not None:
            instance.directory.close()
            instance.directory = None
        _remove(instance.path)

    def _free_index(self) -> int:
        taken = {instance.definition.index for instance in self._instances.values()}
        return next(index for index in range(len(taken) + 1) if index not in taken)

    def _check_paths(self, spec: Spec) -> None:
        check_paths(spec, self.settings.allowed_directories)

    def _tell(self, kind: str, instance: Instance) -> None:
        for observer in self.observers:
            observer(kind, instance)

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("bug in a task of the supervisor", exc_info=error)


def add_defaults(requested: Spec, defaults: Defaults) -> Spec:
    """The VM as asked for, with the devices that every VM of this server gets. Raises SpecError where they clash."""
    if not defaults.devices and not defaults.backends:
        return requested
    if twice := sorted(defaults.backends.keys() & requested.backends.keys()):
        raise ConfigError(f"backend {twice[0]!r} is one that this server's configuration gives to every VM")
    return msgspec.structs.replace(
        requested,
        devices=(*requested.devices, *defaults.devices),
        backends={**requested.backends, **defaults.backends},
    )


def check_paths(spec: Spec, allowed: tuple[str, ...] | None) -> None:
    """Raises ConfigError for a relative path, ForbiddenError for one outside the allowed directories."""
    for path in paths_of(spec):
        if not os.path.isabs(path):
            raise ConfigError(f"path {path[:200]!r}: expected an absolute one")
        if allowed is not None and not any(_is_below(os.path.realpath(path), _real(folder)) for folder in allowed):
            raise ForbiddenError(f"path {path[:200]!r}: it is in none of [server] allowed_directories")


def paths_of(spec: Spec) -> list[str]:
    """The files that a VM needs."""
    return [*boot_files(spec.boot), *(file.path for file in spec.files())]


def largest_file(spec: Spec) -> int:
    """How far a file needs to reach that the worker of a VM writes to, in bytes: a disk, or memory with a name.

    Disks that are devices have their size by nature. What is not there is missed by whoever opens it.
    """
    sizes = [0 if spec.memory_backing == "anonymous" else spec.memory_mib << 20]
    for backend in spec.backends.values():
        if isinstance(backend, BlobBlock):
            sizes.append(len(backend.content))
        elif isinstance(backend, CloudInit):
            sizes.append(CLOUD_INIT_VOLUME_BYTES)
        elif not backend.readonly:
            with contextlib.suppress(OSError):
                sizes.append(os.stat(backend.path).st_size)
    return max(sizes)


@functools.cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder


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


def _refuse_deleted(instance: Instance) -> None:
    if instance.is_deleted:
        raise NotFoundError(f"there is no VM {instance.name!r}")


def _write_end(directory: RunDirectory, reason: str) -> StateRecord:
    """The final state of a run. Where its worker could not write one it is written for it."""
    with contextlib.closing(directory.map_state()) as state:
        last = state.last
        if last is None or not last.state.is_final:
            state.write(0 if last is None else last.generation + 1, State.FAILED, reason)
    found = directory.state()
    assert found is not None
    return found


def _remove(path: str) -> None:
    """What is known of a VM that is no more."""
    try:
        RunDirectory.remove(path)
    except (PropolisError, OSError) as error:
        log.warning("leftover stays", extra={"path": path, "reason": str(error)})


def _has_stop_mark(instance: Instance) -> bool:
    return os.path.lexists(os.path.join(instance.path, _STOP_MARK))


def _clear_stop_mark(instance: Instance) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(instance.path, _STOP_MARK))


def _let_go(instance: Instance) -> None:
    if instance.running is not None:
        instance.running.close()
        instance.running = None
    if instance.directory is not None:
        instance.directory.close()
        instance.directory = None
