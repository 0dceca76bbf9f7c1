"""What firmware is to try first: the text of fw_cfg's file "bootorder".

A line for each device, its path as in OpenFirmware; QEMU's documentation of fw_cfg, docs/specs/fw_cfg.rst, and how OVMF
reads it, OvmfPkg/Library/QemuBootOrderLib. Firmware passes over a device on which it finds nothing to boot.
"""

from __future__ import annotations

from typing import Literal

from propolis import spec as model

Kind = Literal["virtio-block", "nvme", "network"]

# A PCI slot and function, in hexadecimal, and what is below them. OVMF knows NVMe by the numbers of QEMU's controller,
# whatever those of the real one are; what follows the number of the namespace is its EUI-64, of which we have none.
_PATHS: dict[Kind, str] = {
    "virtio-block": "/pci@i0cf8/scsi@{device:x},{function:x}/disk@0,0",
    "nvme": "/pci@i0cf8/pci8086,5845@{device:x},{function:x}/namespace@1,0",
    "network": "/pci@i0cf8/ethernet@{device:x},{function:x}/ethernet-phy@0",
}
_NOTHING_ELSE = "HALT"  # SeaBIOS then tries no other device; OVMF passes over it


def open_firmware_path(kind: Kind, path: model.PciPath) -> str:
    """Where firmware finds a device on bus 0."""
    return _PATHS[kind].format(device=path.device, function=path.function)


def boot_order(spec: model.Spec) -> bytes | None:
    """The text, which ends with a NUL; None where the VM leaves the order to its firmware.

    What nobody can boot from is left out.
    """
    if spec.boot_order is None:
        return None
    devices = {device.name: device for device in spec.devices}
    lines = [line for name in spec.boot_order.devices if (line := _line(spec, devices[name])) is not None]
    return "\n".join([*lines, _NOTHING_ELSE]).encode("ascii") + b"\0" if lines else None


def _line(spec: model.Spec, device: model.Device) -> str | None:
    if isinstance(device, model.VirtioNic):
        return open_firmware_path("network", device.pci_path)
    if not isinstance(device, model.VirtioBlock) or isinstance(spec.backends[device.backend], model.CloudInit):
        return None
    return open_firmware_path("virtio-block", device.pci_path)
