"""Commands about one VM as a whole: what it is, what it is to do, and the list of all."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from . import watch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    import msgspec

    from propolis.http import v5
    from propolis.http.client import Client, Restart
    from propolis.http.client_replies import VmSummary
    from propolis.spec import Spec

    from .output import Output
    from .session import Work

_GOALS = {"run": "running", "resume": "running", "pause": "paused", "stop": "stopped", "shutdown": "stopped"}
_DOING = {
    "run": "starting",
    "stop": "stopping",
    "reboot": "rebooting",
    "pause": "pausing",
    "resume": "resuming",
    "reset": "resetting",
    "shutdown": "shutting down",
}


class CloudInit(NamedTuple):
    """The files of a volume for cloud-init."""

    user_data: str
    meta_data: str | None
    network_config: str | None


class Made(NamedTuple):
    """What a new VM is made of."""

    name: str
    cpus: int | None
    memory_mib: int | None
    identity: UUID | None
    toml: str | None
    spec: str | None
    description: str
    autostart: bool
    restart: Restart
    cloud_init: CloudInit | None = None
    cpuid_profile: str | None = None
    hyperv: bool = False


def new(made: Made) -> Work:
    """Creates a VM."""

    async def work(client: Client, output: Output) -> None:
        async with output.progress(f"creating {made.name}"):
            is_new = await client.create(
                made.name,
                _spec_of(made),
                identity=made.identity,
                description=made.description,
                autostart=True if made.autostart else None,
                restart=None if made.restart == "never" else made.restart,
            )
            there = await client.get(made.name)
        if output.is_json:
            output.json(there)
        elif output.is_quiet:
            output.line(str(there.properties.id))
        else:
            verb = "created" if is_new else "is there already"
            output.say(f"[VM {made.name!r} {verb}: {there.properties.id}]")

    return work


def _spec_of(made: Made) -> Spec | msgspec.Raw:
    from . import spec_file

    if made.spec is not None:
        return spec_file.read_json(made.spec)
    if made.toml is not None:
        spec = spec_file.read_toml(made.toml, made.name, made.cpus, made.memory_mib, made.cpuid_profile)
    else:
        spec = spec_file.plain(made.name, made.cpus, made.memory_mib)
    if made.hyperv:
        spec = spec_file.with_hyperv(spec)
    return spec if made.cloud_init is None else spec_file.with_cloud_init(spec, *made.cloud_init)


def state(name: str, wanted: str, deadline: float | None, is_waiting: bool, timeout: float | None) -> Work:
    """Has a VM's state changed."""

    async def work(client: Client, output: Output) -> int | None:
        before = (await client.state_monitor(name)).gen if is_waiting else 0
        async with output.progress(f"{_DOING[wanted]} {name}"):
            await _ask(client, name, wanted, deadline)
        if not is_waiting:
            return None
        if wanted in _GOALS:
            return await watch.wait(name, _GOALS[wanted], timeout)(client, output)
        return await watch.wait(name, "running", timeout, after=before)(client, output)

    return work


async def _ask(client: Client, name: str, wanted: str, deadline: float | None) -> None:
    if wanted == "run":
        await client.run(name)
    elif wanted == "stop":
        await client.stop(name)
    elif wanted == "reboot":
        await client.reboot(name)
    elif wanted == "pause":
        await client.pause(name)
    elif wanted == "resume":
        await client.resume(name)
    elif wanted == "reset":
        await client.reset(name)
    else:
        await client.shutdown(name, deadline=deadline)


def get(name: str) -> Work:
    """Shows a VM."""

    async def work(client: Client, output: Output) -> None:
        there = await client.get(name)
        spec = (await client.spec(name)).spec
        if output.is_json:
            output.json({"instance": there, "spec": spec})
            return
        pairs = [("name", there.properties.name), ("uuid", str(there.properties.id)), ("state", watch.shown(there))]
        if there.detail:
            pairs.append(("detail", there.detail))
        if there.properties.description:
            pairs.append(("description", there.properties.description))
        output.fields(pairs + _spec_fields(spec))

    return work


def _spec_fields(spec: v5.InstanceSpecStatus) -> list[tuple[str, str]]:
    from propolis.http import v5

    if not isinstance(spec, v5.SpecPresent):
        return []
    board, more = spec.value.board, spec.value.extensions
    fields = [("cpus", str(board.cpus)), ("memory", f"{board.memory_mb} MiB")]
    boot = None if more is None else more.boot
    if isinstance(boot, v5.FirmwareBoot):
        fields.append(("bootrom", boot.bootrom))
        fields += [("nvram", boot.nvram)] if boot.nvram else []
    if boot is not None:
        named = (("kernel", boot.kernel), ("initrd", boot.initrd), ("cmdline", boot.cmdline))
        fields += [(name, value) for name, value in named if value]
    files = {
        key: component.component
        for key, component in spec.value.components.items()
        if isinstance(component, v5.FileStorageBackendComponent)
    }
    volumes = {} if more is None else more.cloud_init
    for key, component in spec.value.components.items():
        if isinstance(component, v5.VirtioDiskComponent):
            file = files.get(component.component.backend_id)
            path = component.component.pci_path
            what = f"{path.bus}.{path.device}.{path.function}"
            if file is not None:
                what += f"  {file.path}{'  read-only' if file.readonly else ''}"
            elif component.component.backend_id in volumes:
                what += "  for cloud-init  read-only"
            fields.append((key, what))
    return fields


async def ls(client: Client, output: Output) -> None:
    """Lists the VMs."""
    vms = await client.list()
    if output.is_json:
        output.json(vms)
    elif output.is_quiet:
        for vm in vms:
            output.line(vm.name)
    else:
        output.table(("NAME", "STATE", "CPUS", "MEMORY", "CREATED", "UUID"), [_row(vm) for vm in vms])


def _row(vm: VmSummary) -> Sequence[str]:
    created = "" if vm.created is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(vm.created))
    return (vm.name, watch.shown(vm), str(vm.cpus), f"{vm.memory_mib} MiB", created, str(vm.uuid))


def keep(name: str, autostart: bool | None, restart: Restart | None) -> Work:
    """Changes how the daemon keeps a VM."""

    async def work(client: Client, output: Output) -> None:
        await client.keep(name, autostart=autostart, restart=restart)

    return work


def rm(names: Sequence[str], force: bool) -> Work:
    """Deletes VMs, all that can be."""

    async def work(client: Client, output: Output) -> int | None:
        from propolis.errors import PropolisError
        from propolis.http.client_replies import UnreachableError

        from .output import fail
        from .session import status_of

        status = None
        for name in names:
            try:
                async with output.progress(f"deleting {name}"):
                    await client.delete(name, force=force)
            except UnreachableError:
                raise
            except PropolisError as error:
                fail(f"{name}: {error}")
                status = status or status_of(error)
        return status

    return work


def inject_nmi(name: str) -> Work:
    """Sends the interrupt."""

    async def work(client: Client, output: Output) -> None:
        await client.inject_nmi(name)

    return work
