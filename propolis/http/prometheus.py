"""GET /metrics: the daemon's own numbers, and those that each VM's worker gives of itself, for Prometheus.

A worker may have been taken over by its guest: of what it says, as much is passed on as a worker has to say.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from propolis import __version__
from propolis.errors import PropolisError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator

    from propolis.http.forward import Workers
    from propolis.instance import Instance
    from propolis.supervisor import Supervisor

log = logging.getLogger(__name__)

ASK_SECONDS = 2.0  # for all workers together
_AT_ONCE = 64
_MAX_PARTS = 256  # vCPUs, devices or counters of one VM
_LABEL = re.compile(r"[\w.:-]{1,64}", re.ASCII)
_OPERATIONS = ("reads", "writes", "flushes", "discards", "others")
_FRAMES = re.compile(r"(rx|tx)_(packets|bytes|dropped|filtered|errors)")
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_METHODS = frozenset(("GET", "HEAD", "PUT", "POST", "PATCH", "DELETE"))

Counters = dict[str, float]


class Numbers(msgspec.Struct):
    """What of a worker's reply is looked at."""

    vcpus: list[dict[str, object]] = []
    devices: dict[str, dict[str, object]] = {}
    consoles: dict[str, dict[str, object]] = {}
    process: dict[str, object] = {}
    reboots: int = 0


class Metrics:
    """Collects when it is asked to."""

    def __init__(self, supervisor: Supervisor, workers: Workers, connections: Callable[[], tuple[int, int]]) -> None:
        """`connections` tells how many clients there are, and how many were refused."""
        self._supervisor = supervisor
        self._workers = workers
        self._connections = connections
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "propolis_http_request_seconds",
            "How long requests took, websockets and streams of events left out",
            ("method", "route", "status"),
            registry=self._registry,
            buckets=_BUCKETS,
        )

    def install(self, app: web.Application) -> None:
        """Look at every request of this application, and serve /metrics."""
        app.middlewares.insert(0, self._middleware())
        app.router.add_get("/metrics", self._get)

    def _middleware(self) -> Callable[..., Awaitable[web.StreamResponse]]:
        @web.middleware
        async def measure(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            start = time.perf_counter()
            response = await handler(request)
            seconds = time.perf_counter() - start
            resource = request.match_info.route.resource
            route = "other" if resource is None else resource.canonical
            method = request.method if request.method in _METHODS else "other"
            if response.status != 101 and response.content_type != "text/event-stream":
                self._requests.labels(method, route, f"{response.status // 100}xx").observe(seconds)
            fields = {"method": method, "path": request.path[:200], "status": response.status}
            log.debug("request", extra={**fields, "milliseconds": round(seconds * 1000, 2)})
            return response

        return measure

    async def _get(self, _: web.Request) -> web.Response:
        instances = list(self._supervisor)
        told = await self._ask_all([instance for instance in instances if instance.is_live])
        text = generate_latest(self._registry)
        text += generate_latest(_Fixed(self._own(instances, told)))
        for family in _of_workers(told):
            text += generate_latest(_Fixed([family]))
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _ask_all(self, instances: list[Instance]) -> dict[str, Numbers]:
        """Of the workers that answer in time, what they say."""
        gate = asyncio.Semaphore(_AT_ONCE)
        told: dict[str, Numbers] = {}

        async def ask(instance: Instance) -> None:
            try:
                async with gate:
                    answer = await self._workers.ask(instance, "GET", "/instance/metrics", seconds=ASK_SECONDS)
                if answer.status == 200:
                    told[instance.name] = msgspec.json.decode(answer.body, type=Numbers)
            except (PropolisError, TimeoutError, msgspec.MsgspecError, RecursionError) as error:
                log.debug("no numbers", extra={"vm": instance.name, "reason": str(error)[:200]})

        tasks = [asyncio.create_task(ask(instance)) for instance in instances]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=ASK_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return told

    def _own(self, instances: list[Instance], told: dict[str, Numbers]) -> Iterator[Metric]:
        info = GaugeMetricFamily("propolis_info", "The daemon", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        clients, refused = self._connections()
        yield GaugeMetricFamily("propolis_connections", "Clients' connections", value=clients)
        yield CounterMetricFamily("propolis_refused_connections", "Connections that were one too many", value=refused)
        state = GaugeMetricFamily("propolis_vm_state", "1 for the state that the VM is in", labels=["vm", "state"])
        up = GaugeMetricFamily("propolis_vm_up", "Whether the VM's worker gives its numbers", labels=["vm"])
        generation = GaugeMetricFamily("propolis_vm_generation", "How often the VM changed its state", labels=["vm"])
        restarts = CounterMetricFamily("propolis_vm_restarts", "Starts by the VM's restart policy", labels=["vm"])
        memory = GaugeMetricFamily("propolis_vm_memory_bytes", "The guest's memory", labels=["vm"])
        cpus = GaugeMetricFamily("propolis_vm_cpus", "The guest's processors", labels=["vm"])
        for instance in instances:
            record, spec = instance.record, instance.definition.spec
            state.add_metric([instance.name, record.state.value], 1)
            up.add_metric([instance.name], instance.name in told)
            generation.add_metric([instance.name], record.generation)
            restarts.add_metric([instance.name], instance.restarts)
            memory.add_metric([instance.name], spec.memory_mib << 20)
            cpus.add_metric([instance.name], spec.cpus)
        yield from (state, up, generation, restarts, memory, cpus)


class _Fixed:
    """Metrics that are there already, as the exposition wants them."""

    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> list[Metric]:
        return self._metrics


def _of_workers(told: dict[str, Numbers]) -> list[Metric]:
    exits = CounterMetricFamily("propolis_vm_vcpu_exits", "Exits of vCPUs", labels=["vm", "vcpu", "kind"])
    process = CounterMetricFamily("propolis_vm_process_seconds", "The worker's CPU time", labels=["vm", "mode"])
    vcpu_time = CounterMetricFamily("propolis_vm_vcpu_seconds", "CPU time of vCPUs", labels=["vm", "vcpu"])
    resident = GaugeMetricFamily("propolis_vm_resident_bytes", "Most memory the worker ever had", labels=["vm"])
    operations = CounterMetricFamily(
        "propolis_vm_block_operations", "Requests of disks", labels=["vm", "device", "operation"]
    )
    moved = CounterMetricFamily("propolis_vm_block_bytes", "Bytes of disks", labels=["vm", "device", "direction"])
    frames = CounterMetricFamily(
        "propolis_vm_network_packets", "Frames of network cards", labels=["vm", "device", "direction", "outcome"]
    )
    carried = CounterMetricFamily(
        "propolis_vm_network_bytes", "Bytes of network cards", labels=["vm", "device", "direction"]
    )
    linked = GaugeMetricFamily("propolis_vm_network_up", "Whether the card has a link", labels=["vm", "device"])
    other = CounterMetricFamily("propolis_vm_device_events", "What devices count", labels=["vm", "device", "kind"])
    printed = CounterMetricFamily("propolis_vm_console_bytes", "What consoles printed", labels=["vm", "console"])
    watchers = GaugeMetricFamily("propolis_vm_console_clients", "Clients of consoles", labels=["vm", "console"])
    reboots = CounterMetricFamily("propolis_vm_reboots", "Resets of the guest", labels=["vm"])
    for vm, numbers in told.items():
        for index, vcpu in enumerate(numbers.vcpus[:_MAX_PARTS]):
            for kind, value in _counters(vcpu):
                if kind == "seconds":
                    vcpu_time.add_metric([vm, str(index)], value)
                else:
                    exits.add_metric([vm, str(index), kind], value)
        for device, counters in list(numbers.devices.items())[:_MAX_PARTS]:
            for kind, value in _counters(counters):
                if kind in _OPERATIONS:
                    operations.add_metric([vm, _short(device), kind], value)
                elif kind in ("bytes_read", "bytes_written"):
                    moved.add_metric([vm, _short(device), kind.removeprefix("bytes_")], value)
                elif match := _FRAMES.fullmatch(kind):
                    direction = "received" if match[1] == "rx" else "sent"
                    if match[2] == "bytes":
                        carried.add_metric([vm, _short(device), direction], value)
                    else:
                        frames.add_metric([vm, _short(device), direction, match[2]], value)
                elif kind == "link_up":
                    linked.add_metric([vm, _short(device)], value)
                else:
                    other.add_metric([vm, _short(device), kind], value)
        for console, counters in list(numbers.consoles.items())[:_MAX_PARTS]:
            found = dict(_counters(counters))
            printed.add_metric([vm, _short(console)], found.get("output_bytes", 0))
            watchers.add_metric([vm, _short(console)], found.get("clients", 0))
        found = dict(_counters(numbers.process))
        process.add_metric([vm, "user"], found.get("user_seconds", 0))
        process.add_metric([vm, "system"], found.get("system_seconds", 0))
        resident.add_metric([vm], found.get("max_resident_kib", 0) * 1024)
        reboots.add_metric([vm], _finite(numbers.reboots) or 0)
    return [
        exits,
        vcpu_time,
        process,
        resident,
        operations,
        moved,
        frames,
        carried,
        linked,
        other,
        printed,
        watchers,
        reboots,
    ]


def _counters(given: dict[str, object]) -> Iterator[tuple[str, float]]:
    for name, value in list(given.items())[:_MAX_PARTS]:
        if (number := _finite(value)) is not None and _LABEL.fullmatch(name):
            yield name, number


def _finite(value: object) -> float | None:
    """A number that a worker says, unless it is none, or larger than any."""
    if not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(name: str) -> str:
    """A device's name may hold anything printable."""
    return name[:64]
