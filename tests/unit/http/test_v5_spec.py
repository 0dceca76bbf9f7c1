"""Specs of Propolis API 5.0.0 become ours and come back as they were."""

import base64
import copy
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from propolis import spec as model
from propolis.errors import FieldError
from propolis.http import v5, v5_spec
from tests.unit.http.serving import BOARD

AT = v5_spec.SPEC_AT
KERNEL = {"type": "direct", "kernel": "/boot/vmlinuz"}
ID = "0b3a7b64-0bb2-4c5e-9a7a-7f6b3f3ad1aa"


SMBIOS = {"manufacturer": "Oxide", "product_name": "OxVM", "serial_number": "", "version": 5}
BLOB = base64.b64encode(b"x" * 1024).decode()


def pci(device: int, function: int = 0) -> dict[str, int]:
    return {"bus": 0, "device": device, "function": function}


def disk(backend: str, device: int = 4) -> dict[str, Any]:
    return {"type": "virtio_disk", "component": {"backend_id": backend, "pci_path": pci(device)}}


def file(path: str = "/disk", **more: Any) -> dict[str, Any]:
    return {"type": "file_storage_backend", "component": {"path": path, "readonly": False, "block_size": 512, **more}}


def blob(content: str, **more: Any) -> dict[str, Any]:
    return {"type": "blob_storage_backend", "component": {"base64": content, "readonly": False, **more}}


def nic(backend: str, device: int = 5) -> dict[str, Any]:
    return {
        "type": "virtio_nic",
        "component": {"backend_id": backend, "interface_id": ID, "pci_path": pci(device)},
    }


def network(vnic: str) -> dict[str, Any]:
    return {"type": "virtio_network_backend", "component": {"vnic_name": vnic}}


def order(*devices: str) -> dict[str, Any]:
    return {"type": "boot_settings", "component": {"order": [{"id": device} for device in devices]}}


def hyper_v(*features: str) -> dict[str, Any]:
    return {**spec(), "board": {**BOARD, "guest_hv_interface": {"type": "hyper_v", "value": {"features": features}}}}


def leaf(number: int, **registers: int) -> dict[str, Any]:
    return {"leaf": number, "eax": 0, "ebx": 0, "ecx": 0, "edx": 0, **registers}


def cpuid(*more: dict[str, Any], vendor: str = "intel") -> dict[str, Any]:
    first = leaf(0, eax=7, ebx=0x756E6547, ecx=0x6C65746E, edx=0x49656E69)
    return {"vendor": vendor, "entries": [first, *more]}


def spec(components: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {
        "board": copy.deepcopy(BOARD),
        "components": components or {},
        "extensions": {"boot": KERNEL},
        **more,
    }


def read(wire: dict[str, Any], **options: Any) -> model.Spec:
    return v5_spec.to_spec(msgspec.convert(wire, v5.InstanceSpec), "vm", **options)


def problems(wire: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    with pytest.raises(FieldError) as caught:
        read(wire, **options)
    return caught.value.problems


# -- there and back ----------------------------------------------------------------------------------------------------

FULL = spec(
    {
        "root": disk("root-file"),
        "root-file": file(workers=4),
        ID: disk("data", 5),
        "data": {"type": "file_storage_backend", "component": {"path": "/b", "readonly": True, "block_size": 4096}},
        "com1": {"type": "serial_port", "component": {"num": "com1"}},
        "second": {"type": "serial_port", "component": {"num": "com2"}},
        "panic": {"type": "qemu_pvpanic", "component": {"enable_isa": True}},
        "in memory": disk("blob", 6),
        "blob": blob(BLOB),
        "seed": disk("texts", 24),
        "texts": blob("", readonly=True),
        "boot order": order(ID, "root"),
    },
    extensions={
        "boot": {"type": "direct", "kernel": "/k", "initrd": "/i", "cmdline": "quiet"},
        "memory_backing": "memfd",
        "disks": {"root": {"queues": 4, "serial": "S1"}},
        "files": {"data": {"skip_flush": True}},
        "cloud_init": {"texts": {"user_data": "#cloud-config", "network_config": "version: 2"}},
        "exit_on_halt": 3,
        "exit_on_reboot": 4,
    },
)


@pytest.mark.parametrize(
    "wire",
    [
        FULL,
        spec(),
        spec({"com3": {"type": "serial_port", "component": {"num": "com1"}}}),
        {**spec(), "board": {**BOARD, "guest_hv_interface": {"type": "bhyve"}}},
        spec(extensions={"boot": KERNEL, "hypervisor_interface": "none"}),
        spec({"d": disk("b"), "b": file(workers=None)}),
        spec({"d": disk("b"), "b": file(workers=8)}),
        spec({"n": nic("b"), "b": network("net0")}),
        spec({"n": nic("b"), "b": network("")}),
        spec(
            {"n": nic("b"), "b": network("")},
            extensions={
                "boot": KERNEL,
                "nics": {"n": {"mac": "02:00:00:00:00:01", "mtu": 1400, "own_address_only": True}},
                "networks": {"b": {"type": "user", "forward": ["2222:22"], "host": True}},
            },
        ),
        spec(
            {"n": nic("b"), "b": network("tap0")},
            extensions={"boot": KERNEL, "networks": {"b": {"type": "tap", "bridge": "br0"}}},
        ),
        spec({"n": nic("b"), "b": network("")}, extensions={"boot": KERNEL, "networks": {"b": {"type": "tap"}}}),
        spec({"boot_settings": order()}),
        spec(smbios=SMBIOS),
        hyper_v(),
        hyper_v("reference_tsc"),
        {**spec(), "board": {**BOARD, "cpuid": cpuid(leaf(7, subleaf=0, ebx=8), leaf(7, subleaf=1), leaf(0x80000000))}},
    ],
)
def test_a_spec_read_back_is_the_one_sent(wire: dict[str, Any]) -> None:
    assert v5_spec.from_spec(read(wire)) == msgspec.convert(wire, v5.InstanceSpec)


def test_a_spec_of_5_0_0_alone_has_no_extensions_when_read_back() -> None:
    wire = {"board": BOARD, "components": {"com1": {"type": "serial_port", "component": {"num": "com1"}}}}
    ours = read(wire, default_boot=model.DirectBoot(kernel="/server/kernel"))
    assert ours.boot == model.DirectBoot(kernel="/server/kernel")
    assert msgspec.to_builtins(v5_spec.from_spec(ours)) == wire


def test_what_is_made_of_it() -> None:
    ours = read(FULL)
    assert ours == model.Spec(
        name="vm",
        cpus=1,
        memory_mib=16,
        boot=model.DirectBoot(kernel="/k", initrd="/i", cmdline="quiet"),
        memory_backing="memfd",
        devices=(
            model.VirtioBlock(name="root", backend="root-file", pci_path=model.PciPath(0, 4, 0), queues=4, serial="S1"),
            model.VirtioBlock(name=ID, backend="data", pci_path=model.PciPath(0, 5, 0)),
            model.Pvpanic(name="panic", enable_isa=True),
            model.VirtioBlock(name="in memory", backend="blob", pci_path=model.PciPath(0, 6, 0)),
            model.VirtioBlock(name="seed", backend="texts", pci_path=model.PciPath(0, 24, 0)),
        ),
        backends={
            "root-file": model.FileBlock(path="/disk", workers=4),
            "data": model.FileBlock(path="/b", readonly=True, block_size=4096, skip_flush=True),
            "blob": model.BlobBlock(content=b"x" * 1024),
            "texts": model.CloudInit(user_data="#cloud-config", network_config="version: 2"),
        },
        boot_order=model.BootOrder(devices=(ID, "root"), name="boot order"),
        serial_ports=(model.SerialPort(number=1), model.SerialPort(number=2, name="second")),
        exit_on_halt=3,
        exit_on_reboot=4,
    )


@pytest.mark.parametrize("written", [ID.upper(), ID.replace("-", ""), f"{{{ID}}}", f"urn:uuid:{ID}"])
def test_a_uuid_is_the_same_however_it_is_written(written: str) -> None:
    ours = read(spec({"d": disk(written), ID: file()}))
    assert list(ours.backends) == [ID]
    assert problems(spec({ID: file(), written: file()}))[0][1].startswith("is the same UUID as")


def test_names_that_devices_and_backends_share_become_two() -> None:
    """TOML has a table for each; the API has one map for all."""
    ours = model.Spec(
        name="vm",
        cpus=1,
        memory_mib=64,
        boot=model.DirectBoot(kernel="/k"),
        devices=(
            model.VirtioBlock(name="disk", backend="disk", pci_path=model.PciPath(0, 4, 0)),
            model.VirtioBlock(name="disk-backend", backend="com1", pci_path=model.PciPath(0, 5, 0)),
        ),
        backends={"disk": model.FileBlock(path="/a"), "com1": model.FileBlock(path="/b")},
    )
    wire = v5_spec.from_spec(ours)
    assert set(wire.components) == {
        *("disk", "disk-backend", "disk-backend-2", "com1"),
        *("serial-com1", "com2", "com3", "com4"),
    }
    again = v5_spec.to_spec(wire, "vm")
    assert [again.backends[device.backend] for device in again.devices if isinstance(device, model.VirtioBlock)] == [
        model.FileBlock(path="/a"),
        model.FileBlock(path="/b"),
    ]


NAMES = st.from_regex(r"[a-z][a-z0-9~/ .-]{0,12}", fullmatch=True)


def _order(names: list[str]) -> model.BootOrder:
    return model.BootOrder(devices=tuple(names))


TEXTS = st.none() | st.text(max_size=20)
BACKENDS = (
    st.builds(
        model.FileBlock,
        path=st.sampled_from(["/a", "/b c", "/ü"]),
        readonly=st.booleans(),
        block_size=st.sampled_from(model.BLOCK_SIZES),
        skip_flush=st.booleans(),
        workers=st.none() | st.integers(1, 32),
    )
    | st.builds(
        model.BlobBlock, content=st.binary(min_size=1, max_size=2).map(lambda c: c * 512), readonly=st.booleans()
    )
    | st.builds(model.CloudInit, user_data=st.text(max_size=20), meta_data=TEXTS, network_config=TEXTS)
)


@st.composite
def specs(draw: st.DrawFn) -> model.Spec:
    names = draw(st.lists(NAMES, max_size=12, unique=True))
    has_panic = bool(names) and draw(st.booleans())
    panic = [model.Pvpanic(name=names.pop(), enable_isa=draw(st.booleans()))] if has_panic else []
    disks: list[model.VirtioBlock] = []
    backends: dict[str, model.Backend] = {}
    for device in range(2, 2 + len(names) // 2):
        name, backend = names.pop(), names.pop()
        disks.append(
            model.VirtioBlock(
                name=name,
                backend=backend,
                pci_path=model.PciPath(0, device, 0),
                queues=draw(st.integers(1, 16)),
                serial=draw(st.none() | st.from_regex(r"[A-Z0-9]{1,20}", fullmatch=True)),
            )
        )
        backends[backend] = draw(BACKENDS)
    return model.Spec(
        name="vm",
        cpus=draw(st.integers(1, 64)),
        memory_mib=draw(st.integers(8, 1 << 19)) * 2,
        boot=model.DirectBoot(kernel="/k", initrd=draw(st.none() | st.just("/i")), cmdline=draw(st.text("a b"))),
        memory_backing=draw(st.sampled_from(["anonymous", "memfd", "hugetlb"])),
        hypervisor_interface=draw(st.sampled_from(["kvm", "bhyve", "none"])),
        devices=(*disks, *panic),
        backends=backends,
        boot_order=draw(st.none() | st.permutations([d.name for d in disks]).map(_order)),
        serial_ports=tuple(model.SerialPort(number=number) for number in sorted(draw(st.sets(st.integers(1, 4))))),
        exit_on_halt=draw(st.integers(0, 255)),
        exit_on_reboot=draw(st.none() | st.integers(0, 255)),
    )  # fmt: skip


@given(specs())
def test_any_spec_comes_back(ours: model.Spec) -> None:
    wire = v5_spec.from_spec(ours)
    sent = msgspec.json.decode(msgspec.json.encode(wire), type=v5.InstanceSpec)
    assert sent == wire
    again = v5_spec.to_spec(sent, "vm")
    assert set(again.devices) == set(ours.devices)  # a map has no order
    assert msgspec.structs.replace(again, devices=ours.devices) == ours


# -- what is refused ---------------------------------------------------------------------------------------------------

UNAVAILABLE = {
    "nvme_disk": {"backend_id": "b", "pci_path": pci(4), "serial_number": [0] * 20},
    "pci_pci_bridge": {"downstream_bus": 1, "pci_path": pci(4)},
    "soft_npu_pci_port": {"pci_path": pci(4)},
    "soft_npu_port": {"backend_id": "b", "link_name": "l"},
    "soft_npu_p9": {"pci_path": pci(4)},
    "p9fs": {"chunk_size": 65536, "pci_path": pci(4), "source": "/", "target": "t"},
    "migration_failure_injector": {"fail_exports": 1, "fail_imports": 1},
    "crucible_storage_backend": {"readonly": False, "request_json": "{}"},
    "dlpi_network_backend": {"vnic_name": "v"},
}


AVAILABLE = {
    "virtio_nic",
    "virtio_network_backend",
    "virtio_disk",
    "boot_settings",
    "file_storage_backend",
    "blob_storage_backend",
    "serial_port",
    "qemu_pvpanic",
    "virtio_socket",
}


@pytest.mark.parametrize("kind", UNAVAILABLE)
def test_what_is_not_available_is_parsed_and_refused_by_name(kind: str) -> None:
    found = problems(spec({"x/1": {"type": kind, "component": UNAVAILABLE[kind]}}))
    assert found == [(f"{AT}/components/x~11", f"{kind} is not available in this version")]


@pytest.mark.parametrize(
    ("wire", "pointer"),
    [
        (spec(smbios={**SMBIOS, "manufacturer": "\n"}), "smbios/manufacturer"),
        (spec(smbios={**SMBIOS, "product_name": "ü"}), "smbios/product_name"),
        (spec(smbios={**SMBIOS, "serial_number": "x" * 65}), "smbios/serial_number"),
        (
            {**spec(), "board": {**BOARD, "chipset": {"type": "i440_fx", "value": {"enable_pcie": True}}}},
            "board/chipset/value/enable_pcie",
        ),
        ({**spec(), "board": {**BOARD, "cpuid": {"entries": [], "vendor": "amd"}}}, "board/cpuid/entries"),
        ({**spec(), "board": {**BOARD, "cpuid": cpuid(vendor="amd")}}, "board/cpuid/vendor"),
        ({**spec(), "board": {**BOARD, "cpuid": cpuid(leaf(0x4FFF_FFFF))}}, "board/cpuid/entries/1"),
        ({**spec(), "board": {**BOARD, "cpuid": cpuid(leaf(0))}}, "board/cpuid/entries/1"),
        ({**spec(), "board": {**BOARD, "cpuid": cpuid(leaf(7), leaf(7, subleaf=1))}}, "board/cpuid/entries/2"),
        (
            {**spec(), "board": {**BOARD, "cpuid": cpuid(*(leaf(1, subleaf=index) for index in range(128)))}},
            "board/cpuid/entries",
        ),
        (
            {
                **spec(extensions={"boot": KERNEL, "hypervisor_interface": "none"}),
                "board": {**BOARD, "guest_hv_interface": {"type": "hyper_v", "value": {"features": []}}},
            },
            "extensions/hypervisor_interface",
        ),
        ({**spec(), "board": {**BOARD, "cpus": 0}}, "board/cpus"),
        ({**spec(), "board": {**BOARD, "memory_mb": 1 << 70}}, "board/memory_mb"),
        (spec({"d": disk("nobody")}), "components/d/component/backend_id"),
        (spec({"d": disk("d")}), "components/d/component/backend_id"),
        (spec({"d": disk("b", 0), "b": file()}), "components/d/component/pci_path"),
        (spec({"a": disk("b"), "c": disk("e"), "b": file(), "e": file()}), "components/c/component/pci_path"),
        (spec({"x" * 65: {"type": "qemu_pvpanic", "component": {"enable_isa": True}}}), "components/" + "x" * 65),
        (spec({"b": file("")}), "components/b/component/path"),
        (spec({"b": file(block_size=513)}), "components/b/component/block_size"),
        (spec({"b": file(workers=33)}), "components/b/component/workers"),
        (spec({"\n": file()}), "components/\n"),
        (spec({"o": order("d")}), "components/o/component/order/0/id"),
        (spec({"d": disk("b"), "b": file(), "o": order("d", "d")}), "components/o/component/order/1/id"),
        (spec({"d": disk("b"), "b": file(), "o": order("b")}), "components/o/component/order/0/id"),
        (spec({"o": order(), "p": order()}), "components/p"),
        (spec({"b": blob("")}), "components/b/component/base64"),
        (spec({"b": blob("eHh4")}), "components/b/component/base64"),
        (spec({"b": blob("eHh4é")}), "components/b/component/base64"),
        (spec({"b": file()}, extensions={"boot": KERNEL, "cloud_init": {"b": {}}}), "extensions/cloud_init/b"),
        (spec({"b": blob(BLOB)}, extensions={"boot": KERNEL, "files": {"b": {}}}), "extensions/files/b"),
        (
            spec({"b": blob(BLOB, readonly=True)}, extensions={"boot": KERNEL, "cloud_init": {"b": {}}}),
            "components/b/component/base64",
        ),
        (
            spec({"b": blob("")}, extensions={"boot": KERNEL, "cloud_init": {"b": {}}}),
            "components/b/component/readonly",
        ),
        (
            spec(
                {ID: blob("", readonly=True)},
                extensions={"boot": KERNEL, "cloud_init": {ID.upper(): {"meta_data": "x" * 524289}}},
            ),
            f"extensions/cloud_init/{ID.upper()}/meta_data",
        ),
        (
            spec({number: {"type": "serial_port", "component": {"num": "com1"}} for number in ("a", "b")}),
            "components/b/component/num",
        ),
        (spec(extensions={"boot": {"type": "direct", "kernel": ""}}), "extensions/boot/kernel"),
        (spec(extensions={"boot": {"type": "firmware", "bootrom": ""}}), "extensions/boot/bootrom"),
        (
            spec(extensions={"boot": {"type": "firmware", "bootrom": "/rom", "initrd": "/initrd"}}),
            "extensions/boot/initrd",
        ),
        (spec(extensions={}), "extensions/boot"),
        (spec({"n": nic("b"), "b": network("a/b")}), "components/b/component/vnic_name"),
        (spec({"n": nic("b"), "b": file()}), "components/n/component/backend_id"),
        (spec({"d": disk("b"), "b": network("x")}), "components/d/component/backend_id"),
        (
            spec({"n": nic("b"), "b": network("x")}, extensions={"boot": KERNEL, "networks": {"b": {"type": "user"}}}),
            "components/b/component/vnic_name",
        ),
        *(
            (spec({"n": nic("b"), "b": network("")}, extensions={"boot": KERNEL, **more}), f"extensions/{where}")
            for more, where in (
                ({"networks": {"b": {"type": "user", "forward": ["0"]}}}, "networks/b/forward"),
                ({"networks": {"b": {"type": "tap", "bridge": ""}}}, "networks/b/bridge"),
                ({"networks": {"c": {"type": "tap"}}}, "networks/c"),
                ({"nics": {"n": {"queues": 9}}}, "nics/n/queues"),
                ({"nics": {"n": {"mac": "x"}}}, "nics/n/mac"),
                ({"nics": {"n": {"mtu": 1}}}, "nics/n/mtu"),
                ({"nics": {"m": {}}}, "nics/m"),
            )
        ),
        (spec(extensions={"boot": KERNEL, "disks": {"d": {}}}), "extensions/disks/d"),
        (spec(extensions={"boot": KERNEL, "files": {"d": {}}}), "extensions/files/d"),
        (
            spec({"d": disk("b"), "b": file()}, extensions={"boot": KERNEL, "disks": {"d": {"queues": 0}}}),
            "extensions/disks/d/queues",
        ),
        (
            spec({"d": disk("b"), "b": file()}, extensions={"boot": KERNEL, "disks": {"d": {"serial": "ü"}}}),
            "extensions/disks/d/serial",
        ),
        (
            {
                **spec(extensions={"boot": KERNEL, "hypervisor_interface": "none"}),
                "board": {**BOARD, "guest_hv_interface": {"type": "bhyve"}},
            },
            "extensions/hypervisor_interface",
        ),
    ],
)
def test_the_place_of_what_is_wrong(wire: dict[str, Any], pointer: str) -> None:
    assert [where for where, _ in problems(wire)] == [f"{AT}/{pointer}"]


def test_everything_wrong_is_told_at_once() -> None:
    wire = spec({"n": {"type": "dlpi_network_backend", "component": {"vnic_name": ""}}, "d": disk("b")})
    wire["board"]["cpus"] = 0
    with pytest.raises(FieldError) as caught:
        v5_spec.to_spec(msgspec.convert(wire, v5.InstanceSpec), "no name", name_at="/properties/name")
    assert {where for where, _ in caught.value.problems} == {
        "/properties/name",
        f"{AT}/components/n",
        f"{AT}/components/d/component/backend_id",
        f"{AT}/board/cpus",
    }


def test_nothing_is_left_out(tmp_path: Path) -> None:
    """Each kind of component is either made something of, or listed as not available."""
    kinds = set(msgspec.json.schema_components([v5.InstanceSpec])[1]["InstanceSpec"]["properties"]["components"][
        "additionalProperties"]["discriminator"]["mapping"])  # fmt: skip
    assert kinds == {*UNAVAILABLE, *AVAILABLE}
