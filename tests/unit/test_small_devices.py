"""The small devices in a Spec: from a TOML file, through the API and back, and what is wrong with them."""

from typing import Any

import msgspec
import pytest

from propolis import spec as model
from propolis import standalone_config
from propolis.errors import ConfigError, FieldError
from propolis.http import v5, v5_spec
from propolis.small_devices import ConsolePort, VirtioConsole, VirtioRng, VirtioSocket
from propolis.spec import DirectBoot, PciPath, Spec, SpecError
from tests.unit.http.serving import BOARD

MAIN = '[main]\nname = "vm"\ncpus = 1\nmemory = 128\nkernel = "k"\n'
AT = PciPath(0, 6, 0)
PATH = {"bus": 0, "device": 6, "function": 0}

# A table of a TOML file, the same in `extensions.devices`, and the device of the Spec that both are.
DEVICES: list[tuple[str, dict[str, Any], model.SmallDevice]] = [
    ('driver = "pci-virtio-rng"', {"type": "virtio-rng"}, VirtioRng(name="x", pci_path=AT)),
    (
        'driver = "pci-virtio-rng"\nbytes_per_second = 4096',
        {"type": "virtio-rng", "bytes_per_second": 4096},
        VirtioRng(name="x", pci_path=AT, bytes_per_second=4096),
    ),
    (
        'driver = "pci-virtio-console"\nconsole = "hvc0"\nports = {"org.qemu.guest_agent.0" = "agent"}',
        {
            "type": "virtio-console",
            "ports": (
                {"name": "console", "path": "/vms/hvc0", "is_console": True},
                {"name": "org.qemu.guest_agent.0", "path": "/vms/agent"},
            ),
        },
        VirtioConsole(
            name="x",
            pci_path=AT,
            ports=(
                ConsolePort(name="console", path="/vms/hvc0", is_console=True),
                ConsolePort(name="org.qemu.guest_agent.0", path="/vms/agent"),
            ),
        ),
    ),
]

# A virtio_socket is a component of 5.0.0; what is ours of it is in `extensions.sockets`.
SOCKET = VirtioSocket(name="x", pci_path=AT, guest_cid=3, path="/vms/v.sock")

# What is wrong: the device's fields in the API, and where that is found. A TOML file has the same keys.
PORT = {"name": "p", "path": "/a"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"type": "virtio-rng", "bytes_per_second": 0}, "bytes_per_second"),
    ({"type": "virtio-rng", "bytes_per_second": 1 << 31}, "bytes_per_second"),
    ({"type": "virtio-console", "ports": ()}, "ports"),
    ({"type": "virtio-console", "ports": tuple(PORT | {"name": f"p{i}", "path": f"/{i}"} for i in range(8))}, "ports"),
    ({"type": "virtio-console", "ports": (PORT | {"name": ""},)}, "ports/0/name"),
    ({"type": "virtio-console", "ports": (PORT | {"name": "a/b"},)}, "ports/0/name"),
    ({"type": "virtio-console", "ports": (PORT | {"path": ""},)}, "ports/0/path"),
    ({"type": "virtio-console", "ports": (PORT, PORT | {"path": "/b"})}, "ports/1/name"),
    ({"type": "virtio-rng", "pci_path": {**PATH, "device": 1}}, "pci_path"),
]


def wire(fields: dict[str, Any]) -> v5.InstanceSpec:
    extensions = {"boot": {"type": "direct", "kernel": "/k"}, "devices": {"x": {"pci_path": PATH, **fields}}}
    return msgspec.convert({"board": BOARD, "components": {}, "extensions": extensions}, v5.InstanceSpec)


@pytest.mark.parametrize(("text", "fields", "device"), DEVICES)
def test_the_device_that_it_is(text: str, fields: dict[str, Any], device: model.SmallDevice) -> None:
    spec = standalone_config.parse(f'{MAIN}[dev.x]\npci-path = "0.6.0"\n{text}', "vm.toml", "/vms")
    assert spec.devices == (device,)
    sent = wire(fields)
    assert v5_spec.to_spec(sent, "vm").devices == (device,)
    assert v5_spec.from_spec(v5_spec.to_spec(sent, "vm")) == sent
    assert msgspec.json.decode(msgspec.json.encode(spec), type=Spec) == spec


def sockets(cid: int = 3, **more: Any) -> v5.InstanceSpec:
    component = {"type": "virtio_socket", "component": {"guest_cid": cid, "pci_path": PATH}}
    extensions = {"boot": {"type": "direct", "kernel": "/k"}} | more
    return msgspec.convert({"board": BOARD, "components": {"x": component}, "extensions": extensions}, v5.InstanceSpec)


@pytest.mark.parametrize("cid", ["3", '"3"'])
def test_a_socket_in_a_file(cid: str) -> None:
    text = f'{MAIN}[dev.x]\ndriver = "pci-virtio-socket"\npci-path = "0.6.0"\nguest_cid = {cid}\npath = "v.sock"'
    assert standalone_config.parse(text, "vm.toml", "/vms").devices == (SOCKET,)


@pytest.mark.parametrize("more", [{"sockets": {"x": {"path": "/vms/v.sock"}}}, {}])
def test_a_socket_in_the_api(more: dict[str, Any]) -> None:
    sent = sockets(**more)
    spec = v5_spec.to_spec(sent, "vm")
    assert spec.devices == (SOCKET if more else msgspec.structs.replace(SOCKET, path=None),)
    assert spec.sockets() == (["/vms/v.sock"] if more else [])
    assert v5_spec.from_spec(spec) == sent


@pytest.mark.parametrize(
    ("wrong", "place"),
    [
        (sockets(2), "components/x/component/guest_cid"),
        (sockets(0xFFFF_FFFF), "components/x/component/guest_cid"),
        (sockets(sockets={"x": {"path": ""}}), "extensions/sockets/x/path"),
        (sockets(sockets={"x": {"path": "/a/"}}), "extensions/sockets/x/path"),
        (sockets(sockets={"y": {"path": "/a"}}), "extensions/sockets/y"),
    ],
)
def test_what_is_wrong_with_a_socket(wrong: v5.InstanceSpec, place: str) -> None:
    with pytest.raises(FieldError) as caught:
        v5_spec.to_spec(wrong, "vm")
    assert [where for where, _ in caught.value.problems] == [f"{v5_spec.SPEC_AT}/{place}"]


def test_two_sockets_at_one_path() -> None:
    other = msgspec.structs.replace(SOCKET, name="y", pci_path=PciPath(0, 7, 0))
    with pytest.raises(SpecError, match=r"devices.0: two sockets have the same path\n"):
        Spec(name="vm", cpus=1, memory_mib=64, boot=DirectBoot(kernel="/k"), devices=(SOCKET, other))


@pytest.mark.parametrize(("fields", "field"), WRONG)
def test_what_is_wrong_is_told_where_it_is(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        v5_spec.to_spec(wire(fields), "vm")
    assert [where for where, _ in caught.value.problems] == [f"{v5_spec.SPEC_AT}/extensions/devices/x/{field}"]


def test_what_is_wrong_in_a_file() -> None:
    text = f'{MAIN}[dev.x]\npci-path = "0.6.0"\ndriver = "pci-virtio-rng"\nbytes_per_second = 0\n'
    with pytest.raises(ConfigError, match=r"vm.toml:9:20: bytes_per_second: expected 1 to"):
        standalone_config.parse(text, "vm.toml", "/vms")


def test_nothing_is_booted_from_one() -> None:
    boot = DirectBoot(kernel="/k")
    order = model.BootOrder(devices=("x",))
    with pytest.raises(SpecError, match="nothing can be booted from device 'x', a virtio-rng"):
        Spec(name="vm", cpus=1, memory_mib=64, boot=boot, devices=(VirtioRng(name="x", pci_path=AT),), boot_order=order)
