"""The VM itself: what it is, what state it is in, what is asked of it."""

from __future__ import annotations

import uuid

from aiohttp import web

from propolis.errors import FieldError, ForbiddenStateError, NotFoundError, StateError, UnreachableGenerationError
from propolis.http import codec, ours, v5
from propolis.http.slot import slot, wire_state
from propolis.http.v5_spec import from_spec
from propolis.lifecycle import Request, State

routes = web.RouteTableDef()

_REQUESTS = {
    v5.InstanceStateRequested.RUN: Request.RUN,
    v5.InstanceStateRequested.STOP: Request.STOP,
    v5.InstanceStateRequested.REBOOT: Request.REBOOT,
}


@routes.put("/instance")
async def ensure(request: web.Request) -> web.Response:
    await slot(request).create(await codec.decode(request, v5.InstanceEnsureRequest))
    return codec.encode(v5.InstanceEnsureResponse(), 201)


@routes.get("/instance")
async def get(request: web.Request) -> web.Response:
    here = slot(request)
    record = here.vm.lifecycle.record
    instance = v5.Instance(
        properties=here.vm.properties,
        state=wire_state(record),
        paused=record.state is State.PAUSED if here.extra_fields else None,
        detail=(record.detail or None) if here.extra_fields else None,
    )
    return codec.encode(v5.InstanceGetResponse(instance=instance))


@routes.get("/instance/spec")
async def get_spec(request: web.Request) -> web.Response:
    vm = slot(request).vm
    return codec.encode(
        v5.InstanceSpecGetResponse(
            properties=vm.properties,
            state=wire_state(vm.lifecycle.record),
            spec=v5.SpecPresent(value=from_spec(vm.spec)),
        )
    )


@routes.put("/instance/state")
async def put_state(request: web.Request) -> web.Response:
    wanted = await codec.decode(request, v5.InstanceStateRequested)
    try:
        slot(request).active.lifecycle.request(_REQUESTS[wanted])
    except StateError as error:
        forbidden = ForbiddenStateError(str(error))
        forbidden.state = error.state
        raise forbidden from error
    return codec.no_content()


@routes.get("/instance/state-monitor")
async def monitor_state(request: web.Request) -> web.Response:
    wanted = codec.query(request, v5.InstanceStateMonitorQuery).gen
    if wanted is None or request.body_exists:  # a wrong body is told of, also where the query counts
        given = await codec.decode(request, v5.InstanceStateMonitorRequest)
        wanted = given.gen if wanted is None else wanted
    here = slot(request)
    async with here.until_shutdown():
        record = await here.vm.lifecycle.wait_for(wanted)
    if record.generation < wanted:
        raise UnreachableGenerationError(
            f"the VM is {record.state.value.lower()}: it never reaches generation {wanted}"
        )
    return codec.encode(
        v5.InstanceStateMonitorResponse(
            gen=record.generation,
            state=wire_state(record),
            migration=v5.InstanceMigrateStatusResponse(),
            paused=record.state is State.PAUSED if here.extra_fields else None,
            detail=(record.detail or None) if here.extra_fields else None,
        )
    )


@routes.post("/instance/nmi")
async def inject_nmi(request: web.Request) -> web.Response:
    slot(request).active.inject_nmi()
    return codec.encode(None)


# -- ours: what 5.0.0 has no route for ---------------------------------------------------------------------------------


@routes.put("/instance/pause")
async def pause(request: web.Request) -> web.Response:
    await slot(request).active.lifecycle.perform(Request.PAUSE)
    return codec.no_content()


@routes.put("/instance/resume")
async def resume(request: web.Request) -> web.Response:
    lifecycle = slot(request).active.lifecycle
    if lifecycle.record.state is State.CREATING:
        error = StateError("cannot resume: the VM has not been started")
        error.state = State.CREATING.value
        raise error
    await lifecycle.perform(Request.RUN)
    return codec.no_content()


@routes.put("/instance/reset")
async def reset(request: web.Request) -> web.Response:
    await slot(request).active.lifecycle.perform(Request.REBOOT)
    return codec.no_content()


@routes.put("/instance/stop")
async def stop(request: web.Request) -> web.Response:
    slot(request).vm.lifecycle.request(Request.STOP)
    return codec.no_content()


@routes.put("/instance/shutdown")
async def shutdown(request: web.Request) -> web.Response:
    wanted = await codec.decode(request, ours.ShutdownRequest) if request.body_exists else ours.ShutdownRequest()
    slot(request).active.shutdown(wanted.deadline_seconds)
    return codec.no_content()


# -- migration and Crucible's disks, which nothing here has ------------------------------------------------------------


@routes.get("/instance/migration-status")
async def get_migration_status(request: web.Request) -> web.Response:
    _ = slot(request).vm
    return codec.encode(v5.InstanceMigrateStatusResponse())


@routes.get("/instance/migrate/{migration_id}/start")
async def start_migration(request: web.Request) -> web.Response:
    _uuid(request, "migration_id")
    _ = slot(request).active
    raise ForbiddenStateError("this server does not migrate VMs")


@routes.post("/instance/disk/{id}/snapshot/{snapshot_id}")
async def snapshot_disk(request: web.Request) -> web.Response:
    _uuid(request, "snapshot_id")
    _ = slot(request).active
    raise _no_crucible(request)


@routes.get("/instance/disk/{id}/status")
async def get_disk_status(request: web.Request) -> web.Response:
    _ = slot(request).active
    raise _no_crucible(request)


@routes.put("/instance/disk/{id}/vcr")
async def replace_volume(request: web.Request) -> web.Response:
    await codec.decode(request, v5.InstanceVCRReplace)
    _ = slot(request).active
    raise _no_crucible(request)


def _no_crucible(request: web.Request) -> NotFoundError:
    return NotFoundError(f"there is no Crucible disk {request.match_info['id'][: codec.MAX_ECHO]!r}")


def _uuid(request: web.Request, name: str) -> uuid.UUID:
    text = request.match_info[name]
    try:
        return uuid.UUID(text)
    except ValueError:
        raise FieldError([("", f"{name} {text[: codec.MAX_ECHO]!r} in the path is no UUID")]) from None
