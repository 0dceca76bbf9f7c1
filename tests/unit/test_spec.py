"""A Spec checks itself: what is wrong is found at once, and where."""

import msgspec
import pytest

from propolis.errors import ConfigError
from propolis.spec import (
    BOARD_FUNCTIONS,
    BlobBlock,
    BootOrder,
    CloudInit,
    DirectBoot,
    FileBlock,
    FirmwareBoot,
    PciPath,
    Pvpanic,
    SerialPort,
    Spec,
    SpecError,
    VirtioBlock,
    is_name,
)


def make(**changes: object) -> Spec:
    fields: dict[str, object] = {"name": "vm", "cpus": 1, "memory_mib": 128, "boot": DirectBoot(kernel="/k")}
    return Spec(**(fields | changes))  # type: ignore[arg-type]  # wrong types are what some tests are about


def disk(name: str = "disk0", backend: str = "image", pci: str = "0.4.0", **changes: object) -> VirtioBlock:
    fields: dict[str, object] = {"name": name, "backend": backend, "pci_path": PciPath.parse(pci)}
    return VirtioBlock(**(fields | changes))  # type: ignore[arg-type]  # as above


IMAGES = {"image": FileBlock(path="/a"), "other": FileBlock(path="/b")}


def test_defaults() -> None:
    spec = make()
    assert spec.memory_backing == "anonymous"
    assert spec.hypervisor_interface == "kvm"
    assert [port.number for port in spec.serial_ports] == [1, 2, 3, 4]
    assert (spec.exit_on_halt, spec.exit_on_reboot) == (0, None)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"name": ""}, ("name",)),
        ({"name": "a/b"}, ("name",)),
        ({"cpus": 0}, ("cpus",)),
        ({"cpus": 65}, ("cpus",)),
        ({"memory_mib": 15}, ("memory_mib",)),
        ({"memory_mib": (1 << 20) + 1}, ("memory_mib",)),
        ({"memory_mib": 129, "memory_backing": "hugetlb"}, ("memory_mib",)),
        ({"exit_on_halt": 256}, ("exit_on_halt",)),
        ({"exit_on_reboot": -1}, ("exit_on_reboot",)),
        ({"serial_ports": (SerialPort(number=5),)}, ("serial_ports", 0, "number")),
        ({"serial_ports": (SerialPort(number=1), SerialPort(number=1))}, ("serial_ports", 1, "number")),
        ({"boot": DirectBoot(kernel="")}, ("boot", "kernel")),
        ({"boot": DirectBoot(kernel="/k", initrd="\0")}, ("boot", "initrd")),
        ({"boot": DirectBoot(kernel="/k", cmdline="a\nb")}, ("boot", "cmdline")),
        ({"boot": DirectBoot(kernel="/k", cmdline="é" * 40000)}, ("boot", "cmdline")),
        ({"boot": FirmwareBoot(bootrom="")}, ("boot", "bootrom")),
        ({"devices": (disk(name=""),)}, ("devices", 0, "name")),
        ({"devices": (disk(), Pvpanic(name="disk0"))}, ("devices", 1, "name")),
        ({"devices": (Pvpanic(name="a"), Pvpanic(name="b"))}, ("devices", 1)),
        ({"devices": (disk(backend="none"),)}, ("devices", 0, "backend")),
        ({"devices": (disk(), disk("disk1", pci="0.5.0"))}, ("devices", 1, "backend")),
        ({"devices": (disk(), disk("disk1", "other"))}, ("devices", 1, "pci_path")),
        ({"devices": (disk(pci="0.4.1"),)}, ("devices", 0, "pci_path")),
        ({"devices": (disk(pci_path=PciPath(1, 4, 0)),)}, ("devices", 0, "pci_path")),
        ({"devices": (disk(queues=0),)}, ("devices", 0, "queues")),
        ({"devices": (disk(queues=17),)}, ("devices", 0, "queues")),
        ({"devices": (disk(serial="x" * 21),)}, ("devices", 0, "serial")),
        ({"devices": (disk(serial="é"),)}, ("devices", 0, "serial")),
        ({"boot_order": BootOrder(devices=("disk0",))}, ("boot_order", "devices", 0)),
        (
            {"devices": (disk(), disk("d", "other", "0.5.0")), "boot_order": BootOrder(devices=("d", "disk0", "d"))},
            ("boot_order", "devices", 2),
        ),
        (
            {"devices": (disk(), Pvpanic(name="p")), "boot_order": BootOrder(devices=("disk0", "p"))},
            ("boot_order", "devices", 1),
        ),
        ({"hyperv_features": ("reference_tsc",)}, ("hyperv_features",)),
        ({"backends": IMAGES | {"": FileBlock(path="/a")}}, ("backends", "")),
        ({"backends": IMAGES | {"x": FileBlock(path="")}}, ("backends", "x", "path")),
        ({"backends": IMAGES | {"x": FileBlock(path="/a", block_size=513)}}, ("backends", "x", "block_size")),
        ({"backends": IMAGES | {"x": FileBlock(path="/a", workers=33)}}, ("backends", "x", "workers")),
        ({"backends": IMAGES | {"x": BlobBlock(content=b"")}}, ("backends", "x", "content")),
        ({"backends": IMAGES | {"x": BlobBlock(content=bytes(513))}}, ("backends", "x", "content")),
        ({"backends": IMAGES | {"x": CloudInit(user_data="x" * 524289)}}, ("backends", "x", "user_data")),
        ({"backends": IMAGES | {"x": CloudInit(meta_data="\ud800")}}, ("backends", "x", "meta_data")),
    ],
)
def test_one_thing_wrong_is_one_problem(changes: dict[str, object], where: tuple[str | int, ...]) -> None:
    with pytest.raises(SpecError) as caught:
        make(**({"backends": IMAGES} | changes))
    assert [problem.where for problem in caught.value.problems] == [where]
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("path", BOARD_FUNCTIONS, ids=str)
def test_functions_of_the_board_are_taken(path: PciPath) -> None:
    with pytest.raises(ConfigError, match=f"PCI path {path} belongs to"):
        make(backends=IMAGES, devices=(disk(pci_path=path),))


def test_what_holds_together_is_accepted() -> None:
    devices = (disk(), disk("disk1", "other", "0.4.1", queues=16, serial="S1"), Pvpanic(name="p", enable_isa=True))
    make(backends=IMAGES, devices=devices, cpus=64, memory_mib=1 << 20, memory_backing="hugetlb", exit_on_reboot=255)
    make(backends=IMAGES, devices=(disk(pci="0.1.7"),))
    make(serial_ports=())


def test_everything_wrong_is_reported_together() -> None:
    with pytest.raises(SpecError) as caught:
        make(name="", cpus=0, devices=(disk(),))
    assert [problem.where for problem in caught.value.problems] == [("name",), ("cpus",), ("devices", 0, "backend")]


def test_json_round_trip_and_no_way_around_the_checks() -> None:
    spec = make(backends=IMAGES, devices=(disk(), Pvpanic(name="p")))
    encoded = msgspec.json.encode(spec)
    assert msgspec.json.decode(encoded, type=Spec) == spec
    with pytest.raises(SpecError):
        msgspec.json.decode(encoded.replace(b'"cpus":1', b'"cpus":0'), type=Spec)
    with pytest.raises(SpecError):
        msgspec.structs.replace(spec, cpus=0)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(encoded.replace(b'"cpus":1', b'"cpus":1,"extra":0'), type=Spec)


@pytest.mark.parametrize("text", ["0.4.0", "0.31.7", "0.04.0"])
def test_pci_paths(text: str) -> None:
    path = PciPath.parse(text)
    assert PciPath.parse(str(path)) == path
    assert len({path, PciPath.parse(text)}) == 1


@pytest.mark.parametrize(
    "text",
    ["", "0.4", "0.4.0.0", "0.4.x", "0.-4.0", "0.+4.0", " 0.4.0", "0.4.0\n", "0.32.0", "0.4.8", "1.4.0", "0.².0"],
)
def test_what_is_no_pci_path(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected"):
        PciPath.parse(text)


def test_pci_path_with_more_digits_than_python_reads() -> None:
    with pytest.raises(ValueError, match=r"expected a PCI path"):
        PciPath.parse(f"0.{'4' * 5000}.0")


@pytest.mark.parametrize("name", ["a", "A-b_c.9", "0", "_", "x" * 64])
def test_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "-a", "a b", "a/b", "a\n", "é", "x" * 65, "a\0"])
def test_what_is_no_name(name: str) -> None:
    assert not is_name(name)
