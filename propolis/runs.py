"""The processes of VMs: started, watched to their end, ended, found again. Which VMs there are is not known here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from typing import TYPE_CHECKING, Protocol

import msgspec

from propolis.cgroup import Limits, bytes_in_memory, memory_limit
from propolis.errors import BusyError, PropolisError
from propolis.host_files import check_paths, largest_file
from propolis.http.v5 import InstanceProperties
from propolis.instance import remove_run_directory
from propolis.jail import JailMode, JailSettings
from propolis.keeper_protocol import StartOptions
from propolis.lifecycle import State
from propolis.names import clear_stale
from propolis.run_directory import RunDirectory
from propolis.running_vm import RunningVm, find_running

if TYPE_CHECKING:
    from collections.abc import Callable

    from propolis.background import Background
    from propolis.cgroup import Subtree, VmGroup
    from propolis.config import Settings
    from propolis.instance import Instance
    from propolis.spec import Spec
    from propolis.state_file import StateRecord
    from propolis.store import Definition

log = logging.getLogger(__name__)

_END_SECONDS = 5.0  # for each stronger way of ending processes
_PROCESSES, _PROCESSES_OF_CPU = 512, 4  # how many a VM may have: keeper, worker, helpers, and their threads


class Starter(Protocol):
    """Makes the processes of a VM: the zygote."""

    async def start_vm(
        self,
        directory: RunDirectory,
        spec: Spec,
        properties: msgspec.Struct | None = None,
        options: StartOptions | None = None,
    ) -> RunningVm: ...


class Observer(Protocol):
    """Who hears of VMs' processes."""

    def worker_came(self, instance: Instance) -> None: ...

    def run_ended(self, instance: Instance, last: StateRecord, seconds: float) -> None: ...


class Runs:
    """Of all VMs."""

    def __init__(
        self,
        starter: Starter,
        settings: Callable[[], Settings],
        background: Background,
        observer: Observer,
        *,
        groups: Subtree | None,
        hypervisor: str,
    ) -> None:
        """`settings` tells those that hold now; `groups` is where VMs get control groups."""
        self._starter = starter
        self._settings = settings
        self._background = background
        self._observer = observer
        self._groups = groups
        self._hypervisor = hypervisor

    async def start(self, instance: Instance) -> None:
        """The caller has the turn, and no process has the VM."""
        check_paths(instance.definition.spec, self._settings().allowed_directories)
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
        jail = self._settings().jail
        confined = JailSettings(
            mode=JailMode(jail.mode),
            uid=jail.first_uid + definition.index if os.geteuid() == 0 and jail.mode != "off" else None,
            core_size=jail.core_bytes,
            file_size=max(largest_file(definition.spec), jail.core_bytes),
        )
        return StartOptions(
            log_level=self._settings().log_level,
            hypervisor=self._hypervisor,
            jail=msgspec.Raw(msgspec.json.encode(confined)),
            cgroup=group,
            names=self._settings().run_directory,
        )

    def _watch(self, instance: Instance, running: RunningVm) -> None:
        instance.running = running
        instance.started_at = asyncio.get_running_loop().time()
        self._background.spawn(self._bury(instance, running))
        instance.note_move()
        self._observer.worker_came(instance)

    async def _bury(self, instance: Instance, running: RunningVm) -> None:
        """Waits for the end of a run, and sees to what follows."""
        end = await running.wait()
        reason = self._remove_group(instance) or end.reason
        if end.keeper_died:
            clear_stale(instance.name, self._settings().run_directory)
        last = _write_end(running.run_directory, reason)
        running.close()
        instance.running = None
        fields = {"vm": instance.name, "state": last.state.value, "reason": last.detail, "worker": end.reason}
        log.log(logging.ERROR if last.state is State.FAILED else logging.INFO, "ended", extra=fields)
        instance.note_move()
        self._observer.run_ended(instance, last, asyncio.get_running_loop().time() - instance.started_at)

    async def end(self, instance: Instance, patience: float = _END_SECONDS) -> None:
        """No process has the VM when this returns. Raises BusyError where the kernel does not let go of one."""
        running = instance.running
        if running is None:
            return
        steps: list[Callable[[], None]] = [running.terminate, running.kill, running.kill_all]
        if instance.record.state.is_final:
            steps.insert(0, lambda: None)  # it is about to end by itself
        instance.is_ending = True
        try:
            for step in steps:
                step()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(patience):
                        while instance.running is running:
                            await instance.moved()
                        return
        finally:
            instance.is_ending = False
        raise BusyError(f"VM {instance.name!r}: process {running.worker_pid} was killed and does not end")

    def find(self, instance: Instance) -> None:
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

    def clear_leftover(self, path: str) -> None:
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
            self._background.spawn(self._end_leftover(directory, running))  # nobody was told that there is such a VM
            return
        directory.close()
        if running is None:
            remove_run_directory(path)
        else:
            running.close()
            log.warning("a VM without a definition runs", extra={"path": path, "worker": running.worker_pid})

    async def _end_leftover(self, directory: RunDirectory, running: RunningVm) -> None:
        with directory, running:
            running.kill_all()
            await running.wait()
        remove_run_directory(directory.path)


def _write_end(directory: RunDirectory, reason: str) -> StateRecord:
    """The final state of a run. Where its worker could not write one it is written for it."""
    with contextlib.closing(directory.map_state()) as state:
        last = state.last
        if last is None or not last.state.is_final:
            state.write(0 if last is None else last.generation + 1, State.FAILED, reason)
    found = directory.state()
    assert found is not None
    return found
