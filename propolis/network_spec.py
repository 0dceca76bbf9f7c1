"""Network cards and the networks that they can be on, as a Spec has them, and what can be wrong with them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from uuid import UUID  # noqa: TC003 -- msgspec reads it

import msgspec

from propolis.pci_path import PciPath  # noqa: TC001 -- likewise

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_NIC_QUEUES = 8
MTUS = range(1280, 65521)  # IPv6 needs the least of these, RFC 8200 §5
MAX_FORWARDS = 64
MAX_INTERFACE = 15  # IFNAMSIZ of the kernel

_INTERFACE = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_INTERFACE - 1}}}", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII | re.IGNORECASE)
_FORWARD = re.compile(r"(?:(?:tcp|udp) )?(?:[0-9a-fA-F.:]{2,45}/)?(\d{1,5})(?::(\d{1,5}))?", re.ASCII)


class VirtioNic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="virtio-net"):
    """A virtio network card of `queues` pairs of queues.

    Without `mac` its address is made of the VM's identity and the card's name. With `own_address_only` the guest may
    send from that address alone.
    """

    name: str
    backend: str
    pci_path: PciPath
    queues: int = 1
    mac: str | None = None
    mtu: int | None = None
    own_address_only: bool = False
    interface_id: UUID | None = None  # what the API calls it; nothing here is done with it


class UserNetwork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="user-network"):
    """The host's network as a user without privileges has it, by passt: addresses, DNS and routes are the host's.

    An entry of `forward` is "[tcp|udp ][ADDRESS/]PORT[:GUEST-PORT]". With `host` the gateway's address is this host.
    """

    forward: tuple[str, ...] = ()
    host: bool = False


class Tap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="tap"):
    """A tap device of the host, made unless it is there, and a port of `bridge`."""

    interface: str | None = None
    bridge: str | None = None


Network = UserNetwork | Tap


def network_problems(network: Network) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What is wrong, each with the field that it is about."""
    if isinstance(network, Tap):
        for field, name in (("interface", network.interface), ("bridge", network.bridge)):
            if name is not None and not _INTERFACE.fullmatch(name):
                yield (field,), f"expected the name of an interface, 1 to {MAX_INTERFACE} of A-Z a-z 0-9 . _ -"
        return
    if len(network.forward) > MAX_FORWARDS:
        yield ("forward",), f"expected at most {MAX_FORWARDS} ports, not {len(network.forward)}"
    for entry in network.forward:
        match = _FORWARD.fullmatch(entry)
        if match is None or not all(0 < int(port) < 65536 for port in match.groups() if port is not None):
            wanted = 'expected a port such as "2222:22", "udp 5353" or "127.0.0.1/8080:80"'
            yield ("forward",), f"{wanted}, not {entry[:60]!r}"


def nic_problems(nic: VirtioNic, cpus: int, network: object) -> Iterator[tuple[str, str]]:
    """What is wrong with a card of a VM of so many CPUs on this network, each with the field that it is about."""
    if not 1 <= nic.queues <= MAX_NIC_QUEUES:
        yield "queues", f"expected 1 to {MAX_NIC_QUEUES} pairs of queues, not {nic.queues}"
    elif nic.queues > cpus:
        yield "queues", f"expected at most a pair of queues for each CPU, {cpus}, not {nic.queues}"
    elif nic.queues > 1 and isinstance(network, UserNetwork):
        yield "queues", f"a network of type 'user' has one pair of queues, not {nic.queues}"
    if nic.mac is not None and not is_station(nic.mac):
        yield "mac", f'expected a MAC address of one card such as "02:00:00:00:00:01", not {nic.mac[:40]!r}'
    if nic.mtu is not None and nic.mtu not in MTUS:
        yield "mtu", f"expected an MTU from {MTUS.start} to {MTUS[-1]}, not {nic.mtu}"


def is_station(text: str) -> bool:
    """Whether it is the MAC address of one card: neither of a group nor all zeros."""
    if not _MAC.fullmatch(text):
        return False
    address = bytes.fromhex(text.replace(":", ""))
    return not address[0] & 1 and any(address)
