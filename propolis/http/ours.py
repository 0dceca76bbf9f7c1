"""The wire types of the routes that are ours, below the same prefix as those of Propolis API 5.0.0."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from propolis.http import v5


class ShutdownRequest(v5.Wire, frozen=True):
    """How long a guest has, after its power button was pressed, until it is stopped; for ever without."""

    deadline_seconds: Annotated[float, Meta(ge=0, le=86400 * 7)] | None = None


class EventsRequest(v5.Wire, frozen=True):
    """A query: from the event after this one on; without it, those from now on."""

    after: v5.U64 | None = None


class LogRequest(v5.Wire, frozen=True):
    """A query: the latest bytes, or those from an offset on."""

    from_start: v5.U64 | None = None
    most_recent: v5.U64 | None = None
    max_bytes: v5.U64 | None = None


class LogResponse(v5.Reply, frozen=True):
    """Lines of the log, and the offset just after them, from which to read on."""

    text: str
    last_byte_offset: v5.U64


class ProcessMetrics(v5.Reply, frozen=True):
    """What the VM's process took of its host since it began."""

    user_seconds: float
    system_seconds: float
    max_resident_kib: int


class ConsoleMetrics(v5.Reply, frozen=True):
    """A serial console."""

    output_bytes: int
    clients: int
    waiting_input: int


class ScreenMetrics(v5.Reply, frozen=True):
    """Of a screen: who looks at it, and its size in pixels."""

    clients: int
    width: int
    height: int


class MetricsResponse(v5.Reply, frozen=True):
    """Numbers of a VM; counters begin with its process. Those of devices are named by the device."""

    state: v5.InstanceState
    paused: bool
    generation: int
    process: ProcessMetrics
    vcpus: list[dict[str, int]]
    pio: dict[str, int]
    mmio: dict[str, int]
    devices: dict[str, dict[str, int]]
    consoles: dict[str, ConsoleMetrics]
    reboots: int
    screen: ScreenMetrics | None = None
