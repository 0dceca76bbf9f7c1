"""The TOML file of `propolis-standalone`, read into a Spec.

Everything wrong with a file is reported at once, a line for each place: `vm.toml:3:8: cpus: expected ...`.
"""

from __future__ import annotations

import os
from typing import Literal

from propolis import spec as model
from propolis.toml_boot import take_boot
from propolis.toml_cpuid import CpuidTables, take_profile
from propolis.toml_devices import DeviceTables, place_in_file, report, take_boot_order
from propolis.toml_table import (
    NOT_HERE,
    Log,
    Path,
    Table,
    UnexpectedError,
    flag,
    parse_text,
    read_text,
    show,
    text,
    whole,
)

# What the grammar has beside the things that this version runs.
_OTHER_TABLES = ("pci_bridge",)
_OTHER_MAIN_KEYS = ("bootrom_version", "cpu_binding", "acpi_variant")

# The keys of the file that are not called as the field of the Spec which they set.
_MAIN_KEYS = {"memory_mib": "memory"}


def load(path: str | os.PathLike[str]) -> model.Spec:
    """Read the file at `path`; a ConfigError has one line for each thing wrong with it."""
    shown = os.fspath(path)
    return parse(read_text(shown), shown, os.path.dirname(os.path.abspath(shown)))


def parse(
    source: str, shown: str, folder: str, *, may_read: bool = True, cpuid_profile: str | None = None
) -> model.Spec:
    """Read the text of a file; messages call it `shown`, relative paths in it begin at `folder`.

    Without `may_read` no other file is opened, as the text came from elsewhere. `cpuid_profile` takes the place of the
    one that the file chooses.
    """
    log = Log()
    reader = _Reader(log, DeviceTables(folder, may_read=may_read), cpuid_profile)
    spec = reader.document(Table(log, (), parse_text(source, shown)))
    if spec is None or log:
        raise log.error(source, shown)
    return spec


class _Reader:
    """The grammar, a method for each table."""

    def __init__(self, log: Log, devices: DeviceTables, cpuid_profile: str | None) -> None:
        self._log = log
        self._devices = devices
        self._cpuid_profile = cpuid_profile

    def document(self, root: Table) -> model.Spec | None:
        main = root.table("main")
        chipset = root.table("chipset")
        if chipset.take("enable-pcie", flag, False):
            chipset.wrong("enable-pcie", f"enable-pcie = true {NOT_HERE}", is_key=True)
        chipset.finish()
        devices, backends = self._devices.read(root)
        profiles = CpuidTables(root.table("cpuid"))
        root.unavailable(*_OTHER_TABLES)
        spec = None
        if "main" not in root:
            root.wrong("main", "the file has no [main]: expected one with name, cpus, memory and kernel", is_key=True)
        else:
            spec = self._main(main, devices, backends, profiles)
        root.finish(lambda key: "it belongs in [main]" if key in main.known else None)
        return spec

    def _main(
        self,
        main: Table,
        devices: list[model.Device],
        backends: dict[str, model.Backend],
        profiles: CpuidTables,
    ) -> model.Spec | None:
        name = main.require("name", text, "unnamed", "the VM's name")
        cpus = main.require("cpus", whole, 1, f"a number from 1 to {model.MAX_CPUS}")
        memory_mib = main.require("memory", whole, model.MIN_MEMORY_MIB, "a number of MiB")
        boot = self._boot(main)
        order = take_boot_order(main)
        interface: model.HypervisorInterface = main.take("hypervisor_interface", _hypervisor_interface, "kvm")
        backing: model.MemoryBacking = main.take("memory_backing", _memory_backing, "anonymous")
        cpuid = take_profile(main, profiles, self._cpuid_profile)
        exit_on_halt = main.take("exit_on_halt", whole, 0)
        exit_on_reboot = main.take("exit_on_reboot", whole, None)
        if main.take("use_reservoir", flag, False):
            main.wrong("use_reservoir", f"use_reservoir = true {NOT_HERE}", is_key=True)
        main.unavailable(*_OTHER_MAIN_KEYS)
        main.finish()
        try:
            return model.Spec(
                name=name,
                cpus=cpus,
                memory_mib=memory_mib,
                boot=boot,
                memory_backing=backing,
                hypervisor_interface=interface,
                hyperv_features=("reference_tsc",) if interface == "hyper-v" else (),
                devices=tuple(devices),
                backends=backends,
                boot_order=order,
                cpuid=cpuid,
                exit_on_halt=exit_on_halt,
                exit_on_reboot=exit_on_reboot,
            )
        except model.SpecError as error:
            for problem in error.problems:
                report(self._log, problem, profiles.place(problem.where) or _place_in_file(problem.where, devices))
            return None

    def _boot(self, main: Table) -> model.Boot:
        boot = take_boot(main, self._devices.path)
        if boot is None:
            message = "[main] has no 'kernel' and no 'bootrom': expected the path of a Linux kernel, or of firmware"
            main.wrong("kernel", message, is_key=True)
            return model.DirectBoot(kernel="?")
        return boot


def _place_in_file(where: Path, devices: list[model.Device]) -> tuple[Path, bool]:
    """The path in the file of a field of the Spec, and whether the key there is at fault."""
    if (place := place_in_file(where, devices)) is not None:
        return place
    field = str(where[-1])
    return ("main", _MAIN_KEYS.get(field, field)), False


def _hypervisor_interface(value: object) -> model.HypervisorInterface:
    if value == "kvm" or value == "bhyve" or value == "hyper-v" or value == "none":
        return value
    raise UnexpectedError(f"expected 'kvm', 'bhyve', 'hyper-v' or 'none', not {show(value)}")


def _memory_backing(value: object) -> Literal["anonymous", "memfd", "hugetlb"]:
    if value == "anonymous" or value == "memfd" or value == "hugetlb":
        return value
    raise UnexpectedError(f"expected 'anonymous', 'memfd' or 'hugetlb', not {show(value)}")
