"""What a VM's process can be asked about itself: numbers, and its log."""

from __future__ import annotations

import resource

import msgspec
from aiohttp import web

from propolis.errors import FieldError
from propolis.http import codec, ours
from propolis.http.slot import slot, wire_state

routes = web.RouteTableDef()

LOG_BYTES = 16384
MAX_LOG_BYTES = 1 << 20


@routes.get("/instance/metrics")
async def get_metrics(request: web.Request) -> web.Response:
    vm = slot(request).vm
    record = vm.lifecycle.record
    usage = resource.getrusage(resource.RUSAGE_SELF)
    metrics = {
        "state": wire_state(record),
        "paused": vm.is_paused,
        "generation": record.generation,
        "process": ours.ProcessMetrics(
            user_seconds=usage.ru_utime, system_seconds=usage.ru_stime, max_resident_kib=usage.ru_maxrss
        ),
        **vm.stats(),
    }
    return codec.encode(msgspec.convert(metrics, ours.MetricsResponse))


@routes.get("/instance/log")
async def get_log(request: web.Request) -> web.Response:
    wanted = codec.query(request, ours.LogRequest)
    log = slot(request).log
    start = wanted.from_start
    if start is None:  # as many of them as are kept in one piece
        start = log.total_bytes - (LOG_BYTES if wanted.most_recent is None else wanted.most_recent)
        start = max(start, log.resumes_at)
    elif wanted.most_recent is not None:
        raise FieldError([("", "expected one of from_start and most_recent in the query, not both")])
    max_bytes = min(MAX_LOG_BYTES if wanted.max_bytes is None else wanted.max_bytes, MAX_LOG_BYTES)
    data, end = log.read(from_start=start, max_bytes=max_bytes)
    return codec.encode(ours.LogResponse(text=data.decode(errors="replace"), last_byte_offset=end))
