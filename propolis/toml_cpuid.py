"""The tables `[cpuid.NAME]` of a TOML file: what a processor says of itself, and the choice of one of them."""

from __future__ import annotations

from typing import Literal, NamedTuple

from propolis import spec as model
from propolis.errors import ConfigError
from propolis.toml_table import Path, Table, UnexpectedError, advice, show, text

_REGISTERS = 4
_MAX_VALUE = 0xFFFF_FFFF


class _Profile(NamedTuple):
    vendor: Literal["amd", "intel"]
    leaves: dict[str, model.CpuidLeaf]  # by the key that each was written as


class CpuidTables:
    """All of a file's; `choose` says which one counts."""

    def __init__(self, tables: Table) -> None:
        self._profiles = {name: _read(tables.table(name)) for name in tables.names}
        self._chosen: str | None = None

    def choose(self, name: str) -> model.CpuidProfile:
        """Raises UnexpectedError where there is none of this name."""
        if name not in self._profiles:
            hint = advice(name, list(self._profiles)) if self._profiles else "the file has no [cpuid.NAME]"
            raise UnexpectedError(f"there is no [cpuid.{name}]: {hint}")
        self._chosen = name
        vendor, leaves = self._profiles[name]
        return model.CpuidProfile(vendor=vendor, leaves=tuple(leaves.values()))

    def place(self, where: Path) -> tuple[Path, bool] | None:
        """The path in the file of a field of a Spec's CPUID, and whether the key there is at fault."""
        if where[0] != "cpuid" or self._chosen is None:
            return None
        table: Path = ("cpuid", self._chosen)
        if where[1:2] == ("vendor",):
            return (*table, "vendor"), False
        if len(where) < 3:
            return table, True
        return (*table, list(self._profiles[self._chosen].leaves)[int(where[2])]), True


def take_profile(main: Table, profiles: CpuidTables, instead: str | None) -> model.CpuidProfile | None:
    """The one that the key `cpuid_profile` names, or `instead`, as `choose` has it."""
    name = main.take("cpuid_profile", text, None)
    if instead is not None or name is None:
        return choose(profiles, instead)
    try:
        return profiles.choose(name)
    except UnexpectedError as error:
        main.wrong("cpuid_profile", f"cpuid_profile: {error}")
        return None


def choose(profiles: CpuidTables, name: str | None) -> model.CpuidProfile | None:
    """The one that an option names, if it is given. Raises ConfigError where the file has none of that name."""
    try:
        return None if name is None else profiles.choose(name)
    except UnexpectedError as error:
        raise ConfigError(f"--cpuid-profile: {error}") from error


def _read(table: Table) -> _Profile:
    vendor: Literal["amd", "intel"] = table.require("vendor", _vendor, "intel", "'amd' or 'intel'")
    leaves = {}
    for key in table.names:
        if key != "vendor" and (number := _leaf(table, key)) is not None:
            eax, ebx, ecx, edx = table.take(key, _registers, (0, 0, 0, 0))
            leaves[key] = model.CpuidLeaf(leaf=number[0], subleaf=number[1], eax=eax, ebx=ebx, ecx=ecx, edx=edx)
    return _Profile(vendor, leaves)


def _vendor(value: object) -> Literal["amd", "intel"]:
    if value == "amd" or value == "intel":
        return value
    raise UnexpectedError(f"expected 'amd' or 'intel', not {show(value)}")


def _leaf(table: Table, key: str) -> tuple[int, int | None] | None:
    """The numbers in "7-0", hexadecimal, with "0x" or without it."""
    leaf, dash, subleaf = key.partition("-")
    try:
        if "_" in key:  # which Python takes for a digit's neighbour
            raise ValueError
        numbers = int(leaf, 16), int(subleaf, 16) if dash else None
        if any(number not in range(_MAX_VALUE + 1) for number in numbers if number is not None):
            raise ValueError
    except ValueError:
        table.wrong(key, f"unknown key {show(key)}: expected 'vendor', or a leaf such as '1' or '7-0' in hexadecimal",
                    is_key=True)  # fmt: skip
        return None
    return numbers


def _registers(value: object) -> tuple[int, int, int, int]:
    values = value if isinstance(value, list) else []
    if len(values) != _REGISTERS or not all(type(entry) is int and 0 <= entry <= _MAX_VALUE for entry in values):
        raise UnexpectedError(f"expected the four registers [eax, ebx, ecx, edx], not {show(value)}")
    eax, ebx, ecx, edx = values
    return eax, ebx, ecx, edx
