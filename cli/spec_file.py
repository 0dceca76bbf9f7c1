"""The files that `new` makes a VM of: a TOML file, of propolis-standalone or of devices alone, or a spec in JSON."""

from __future__ import annotations

import os
from typing import NamedTuple

import msgspec

from propolis import spec as model
from propolis import standalone_config
from propolis.errors import ConfigError
from propolis.toml_cpuid import CpuidTables, choose
from propolis.toml_devices import DeviceTables, place_in_file, read_cloud_init, report, take_boot_order
from propolis.toml_table import NOT_HERE, Log, Path, Table, UnexpectedError, flag, parse_text, read_text

CPUS, MEMORY_MIB = 4, 1024
MAX_JSON = 1 << 20
_OPTIONS = {"name": "NAME", "cpus": "--cpus", "memory_mib": "--memory"}
_CLOUD_INIT = "cloud-init"  # the disk that --cloud-init adds, where Propolis has always had it
_CLOUD_INIT_PATH = model.PciPath(0, 24, 0)


def plain(name: str, cpus: int | None, memory_mib: int | None) -> model.Spec:
    """A VM of nothing but a board: the server says what it boots, and may give it devices."""
    return _spec(name, cpus, memory_mib)


def read_toml(
    shown: str, name: str, cpus: int | None, memory_mib: int | None, cpuid_profile: str | None = None
) -> model.Spec:
    """The VM that a TOML file describes; what is given beside it counts more."""
    source = read_text(shown)
    folder = os.path.dirname(os.path.abspath(shown))
    document = parse_text(source, shown)
    main = document.get("main")
    if isinstance(main, dict) and not main.keys() <= {"boot_order"}:
        spec = standalone_config.parse(source, shown, folder, cpuid_profile=cpuid_profile)
        try:
            return msgspec.structs.replace(
                spec,
                name=name,
                cpus=spec.cpus if cpus is None else cpus,
                memory_mib=spec.memory_mib if memory_mib is None else memory_mib,
            )
        except model.SpecError as error:
            raise _of_options(error) from error
    log = Log()
    root = Table(log, (), document)
    profiles = CpuidTables(root.table("cpuid"))
    found = _devices(root, folder, profiles, cpuid_profile)
    if not log:
        _spec(name, cpus, memory_mib)  # what is wrong with this is not the file's fault
        try:
            return _spec(name, cpus, memory_mib, found)
        except model.SpecError as error:
            for problem in error.problems:
                place = profiles.place(problem.where) or place_in_file(problem.where, found.devices)
                report(log, problem, place or (problem.where, False))
    raise log.error(source, shown)


def with_hyperv(spec: model.Spec) -> model.Spec:
    """The VM with a Hyper-V for its guest, of all that one may have here."""
    return msgspec.structs.replace(spec, hypervisor_interface="hyper-v", hyperv_features=("reference_tsc",))


def with_cloud_init(spec: model.Spec, user: str, meta: str | None, network: str | None) -> model.Spec:
    """The VM with one disk more, a volume for cloud-init of what is in these files."""
    texts = []
    for option, path in (("--cloud-init", user), ("--meta-data", meta), ("--network-config", network)):
        try:
            texts.append(None if path is None else read_cloud_init(path))
        except UnexpectedError as error:
            raise ConfigError(f"{option}: {error}") from error
    volume = model.CloudInit(user_data=texts[0] or "", meta_data=texts[1], network_config=texts[2])
    disk = model.VirtioBlock(name=_CLOUD_INIT, backend=_CLOUD_INIT, pci_path=_CLOUD_INIT_PATH)
    if _CLOUD_INIT in spec.backends:
        raise ConfigError(f"--cloud-init: the VM has a block backend {_CLOUD_INIT!r} already")
    try:
        return msgspec.structs.replace(
            spec, devices=(*spec.devices, disk), backends={**spec.backends, _CLOUD_INIT: volume}
        )
    except model.SpecError as error:
        raise ConfigError("\n".join(f"--cloud-init: {problem.message}" for problem in error.problems)) from error


def read_json(shown: str) -> msgspec.Raw:
    """The JSON of an InstanceSpec, also where the file is a whole request; the server judges what is in it."""
    try:
        with open(shown, "rb") as file:
            data = file.read(MAX_JSON + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"open spec {shown!r}: {reason}") from error
    if len(data) > MAX_JSON:
        raise ConfigError(f"{shown}: expected a spec of at most {MAX_JSON} bytes")
    spec = msgspec.Raw(data)
    try:
        for key in ("init", "value", "spec"):
            fields = msgspec.json.decode(spec, type=dict[str, msgspec.Raw])
            if key not in fields:
                break
            spec = fields[key]
        msgspec.json.decode(spec, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"{shown}: expected a spec in JSON: {error}") from error
    return spec


class _Found(NamedTuple):
    """What a file without a board describes."""

    devices: list[model.Device]
    backends: dict[str, model.Backend]
    order: model.BootOrder | None
    cpuid: model.CpuidProfile | None


def _devices(root: Table, folder: str, profiles: CpuidTables, cpuid_profile: str | None) -> _Found:
    tables = DeviceTables(folder)
    main = root.table("main")
    order = take_boot_order(main)
    main.finish()
    chipset = root.table("chipset")
    if chipset.take("enable-pcie", flag, False):
        chipset.wrong("enable-pcie", f"enable-pcie = true {NOT_HERE}", is_key=True)
    chipset.finish()
    devices, backends = tables.read(root)
    root.unavailable("pci_bridge")
    root.finish()
    return _Found(devices, backends, order, choose(profiles, cpuid_profile))


def _spec(name: str, cpus: int | None, memory_mib: int | None, found: _Found | None = None) -> model.Spec:
    devices, backends, order, cpuid = found or _Found([], {}, None, None)
    try:
        return model.Spec(
            name=name,
            cpus=CPUS if cpus is None else cpus,
            memory_mib=MEMORY_MIB if memory_mib is None else memory_mib,
            boot=model.FirmwareBoot(bootrom="?"),
            boot_is_default=True,
            devices=tuple(devices),
            backends=backends,
            boot_order=order,
            cpuid=cpuid,
        )
    except model.SpecError as error:
        if found is None:
            raise _of_options(error) from error
        raise


def _of_options(error: model.SpecError) -> ConfigError:
    def shown(where: Path) -> str:
        return _OPTIONS.get(str(where[0]), ".".join(map(str, where)))

    return ConfigError("\n".join(f"{shown(problem.where)}: {problem.message}" for problem in error.problems))
