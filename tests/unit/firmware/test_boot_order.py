"""The text of "bootorder": paths as OVMF and SeaBIOS read them."""

import pytest

from propolis.firmware.boot_order import Kind, boot_order, open_firmware_path
from propolis.spec import BootOrder, CloudInit, FileBlock, FirmwareBoot, PciPath, Spec, VirtioBlock


def spec(order: BootOrder | None) -> Spec:
    places = {"root": PciPath(0, 4, 0), "iso": PciPath(0, 16, 0), "other": PciPath(0, 16, 3), "seed": PciPath(0, 24, 0)}
    return Spec(
        name="vm",
        cpus=1,
        memory_mib=64,
        boot=FirmwareBoot(bootrom="/OVMF.fd"),
        devices=tuple(VirtioBlock(name=name, backend=name, pci_path=path) for name, path in places.items()),
        backends={name: CloudInit() if name == "seed" else FileBlock(path=f"/{name}") for name in places},
        boot_order=order,
    )


def test_the_devices_in_their_order_and_no_others() -> None:
    expected = b"/pci@i0cf8/scsi@10,3/disk@0,0\n/pci@i0cf8/scsi@4,0/disk@0,0\n/pci@i0cf8/scsi@10,0/disk@0,0\nHALT\0"
    assert boot_order(spec(BootOrder(devices=("other", "root", "iso")))) == expected


def test_a_volume_for_cloud_init_is_passed_over() -> None:
    assert boot_order(spec(BootOrder(devices=("seed", "root")))) == b"/pci@i0cf8/scsi@4,0/disk@0,0\nHALT\0"


@pytest.mark.parametrize("order", [None, BootOrder(devices=()), BootOrder(devices=("seed",))])
def test_without_anything_to_boot_from_the_order_is_the_firmware_s(order: BootOrder | None) -> None:
    assert boot_order(spec(order)) is None


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("virtio-block", "/pci@i0cf8/scsi@1f,7/disk@0,0"),
        ("nvme", "/pci@i0cf8/pci8086,5845@1f,7/namespace@1,0"),
        ("network", "/pci@i0cf8/ethernet@1f,7/ethernet-phy@0"),
    ],
)
def test_paths_of_each_kind(kind: Kind, path: str) -> None:
    assert open_firmware_path(kind, PciPath(0, 31, 7)) == path
