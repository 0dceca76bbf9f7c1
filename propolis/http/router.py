"""The daemon's application: VMs by name, each with the routes of one VM below /instances/{name}.

What is known without a VM's worker is answered here, so it is answered too when there is none; the rest is passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import uuid
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from propolis import __version__, standalone_config
from propolis.console.history import ConsoleHistory
from propolis.errors import (
    BackendError,
    ConfigError,
    FieldError,
    ForbiddenError,
    ForbiddenStateError,
    NotFoundError,
    PropolisError,
    StateError,
    UnreachableGenerationError,
)
from propolis.http import codec, errors, openapi, ours, serial, v5
from propolis.http.access import ACCESS, Access
from propolis.http.daemon_types import (
    DeleteQuery,
    HealthReply,
    InstanceEntry,
    InstanceList,
    InstanceReply,
    Keeping,
    ListQuery,
    VersionReply,
)
from propolis.http.forward import WorkerGoneError, Workers, read_body
from propolis.http.v5_spec import from_spec, properties_of, to_spec
from propolis.lifecycle import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from propolis.http.access import Guard
    from propolis.instance import Instance
    from propolis.spec import Spec
    from propolis.state_file import StateRecord
    from propolis.supervisor import Supervisor

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = logging.getLogger(__name__)

LOG_LINES = 20  # of the log of a VM that failed, in what GET tells of it
_SETTLE_SECONDS = 10.0  # for the daemon to notice that a worker has ended
_DOCTOR_SECONDS = 30.0
_HISTORY_BYTES = 16384
_MAX_HISTORY_BYTES = 2 << 20
_TOML = "application/toml"


class Router:
    """The handlers and what they share."""

    def __init__(self, supervisor: Supervisor, workers: Workers, config_file: str | None = None) -> None:
        """`config_file` is the daemon's, for the doctor."""
        self._supervisor = supervisor
        self._workers = workers
        self._tasks: set[asyncio.Task[web.StreamResponse]] = set()
        self._config_file = None if config_file is None else os.path.abspath(config_file)
        self._doctor_turn = asyncio.Lock()
        self.is_ready = False  # VMs that ran were found again

    def application(self, guard: Guard) -> web.Application:
        """Everything but what needs no VM: `add_routes` of other modules."""
        app = web.Application(
            middlewares=[errors.middleware], client_max_size=self._supervisor.settings.limits.body_bytes
        )
        app.on_response_prepare.append(errors.on_prepare)
        app.on_shutdown.append(self._on_shutdown)
        guard.install(app)
        app.router.add_routes(openapi.routes)
        one = "/instances/{key}"
        app.router.add_routes(
            [
                web.get("/healthz", self._get_health),
                web.get("/readyz", self._get_ready),
                web.get("/version", self._get_version),
                web.get("/doctor", self._get_doctor),
                web.get("/instances", self._list),
                web.get(one, self._get),
                web.put(one, self._whole(self._create)),
                web.post(one, self._whole(self._create)),
                web.patch(one, self._whole(self._patch)),
                web.delete(one, self._whole(self._delete)),
                web.get(one + "/spec", self._get_spec),
                web.get(one + "/state-monitor", self._monitor_state),
                web.get(one + "/serial", self._get_serial),
                web.get(one + "/serial/history", self._get_history),
                web.get(one + "/log", self._get_log),
                web.get(one + "/migration-status", self._get_migration_status),
                web.put(one + "/state", self._whole(self._put_state)),
                web.put(one + "/stop", self._whole(self._stop)),
                web.put(one + "/shutdown", self._whole(self._shutdown)),
                web.route("*", one + "/{rest:.+}", self._forward),
            ]
        )
        return app

    async def _on_shutdown(self, _: web.Application) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_SETTLE_SECONDS)

    def _whole(self, handler: Callable[[web.Request], Coroutine[object, object, web.StreamResponse]]) -> Handler:
        """What has begun is done, also when the client that asked for it does not wait."""

        async def run(request: web.Request) -> web.StreamResponse:
            task = asyncio.create_task(handler(request))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return await asyncio.shield(task)

        return run

    # -- the daemon ----------------------------------------------------------------------------------------------------

    async def _get_health(self, _: web.Request) -> web.Response:
        return codec.encode(HealthReply("ok"))

    async def _get_ready(self, _: web.Request) -> web.Response:
        return codec.encode(HealthReply("ok" if self.is_ready else "starting"), 200 if self.is_ready else 503)

    async def _get_version(self, _: web.Request) -> web.Response:
        return codec.encode(VersionReply(name="propolis", version=__version__, api=errors.SUPPORTED_VERSIONS))

    async def _get_doctor(self, _: web.Request) -> web.Response:
        """By a process of its own; one at a time, as each starts a guest."""
        async with self._doctor_turn:
            report = await _ask_doctor(self._config_file)
        return web.Response(body=report, content_type=codec.JSON)

    # -- the set of VMs ------------------------------------------------------------------------------------------------

    async def _list(self, request: web.Request) -> web.Response:
        wanted = codec.query(request, ListQuery)
        page = [instance for instance in self._supervisor if instance.name > wanted.after][: wanted.limit + 1]
        more = page[wanted.limit - 1].name if len(page) > wanted.limit else None
        return codec.encode(InstanceList(instances=tuple(map(_entry, page[: wanted.limit])), next=more))

    async def _create(self, request: web.Request) -> web.Response:
        name = request.match_info["key"]
        keeping = codec.query(request, Keeping)
        boot = self._supervisor.settings.defaults.boot
        if request.content_type == _TOML:
            body = await codec.body(request, _TOML)
            spec = _from_toml(body, name)
            properties = properties_of(name, _stable_uuid(self._supervisor, name))
        else:
            wanted = await codec.decode(request, v5.InstanceEnsureRequest)
            properties = wanted.properties
            if properties.name != name:
                raise FieldError([("/properties/name", f"{properties.name[:100]!r} is not the name in the path")])
            if not isinstance(wanted.init, v5.InitializeBySpec):
                raise FieldError([("/init/method", "this server does not migrate VMs: expected 'Spec'")])
            spec = to_spec(wanted.init.value.spec, name, default_boot=boot)
        instance, is_new = await self._supervisor.create(
            spec, properties.id, properties, autostart=keeping.autostart, restart=keeping.restart
        )
        response = codec.encode(v5.InstanceEnsureResponse(), 201 if is_new else 200)
        response.headers["Location"] = f"/instances/{instance.name}"
        return response

    async def _patch(self, request: web.Request) -> web.Response:
        instance = self._instance(request)
        wanted = await codec.decode(request, Keeping)
        await self._supervisor.keep(instance, wanted.autostart, wanted.restart)
        return codec.no_content()

    async def _delete(self, request: web.Request) -> web.Response:
        instance = self._instance(request)
        await self._supervisor.delete(instance, force=codec.query(request, DeleteQuery).force)
        await self._workers.forget(instance)
        return codec.no_content()

    # -- one VM, answered here -----------------------------------------------------------------------------------------

    async def _get(self, request: web.Request) -> web.Response:
        instance = self._instance(request)
        record = instance.record
        definition = instance.definition
        next_start = instance.next_start
        return codec.encode(
            InstanceReply(
                instance=v5.Instance(
                    properties=_properties(instance),
                    state=_wire_state(record),
                    paused=record.paused,
                    detail=record.detail or None,
                ),
                name=instance.name,
                uuid=uuid.UUID(instance.uuid),
                generation=record.generation,
                created=definition.created,
                autostart=definition.autostart,
                restart=definition.restart,
                restarts=instance.restarts,
                starts_again_in=max(0.0, next_start - asyncio.get_running_loop().time()) if next_start else None,
                log=_last_lines(instance) if record.state is State.FAILED else None,
            )
        )

    async def _get_spec(self, request: web.Request) -> web.Response:
        instance = self._instance(request)
        return codec.encode(
            v5.InstanceSpecGetResponse(
                properties=_properties(instance),
                state=_wire_state(instance.record),
                spec=v5.SpecPresent(value=from_spec(instance.definition.spec)),
            )
        )

    async def _get_migration_status(self, request: web.Request) -> web.Response:
        self._instance(request)
        return codec.encode(v5.InstanceMigrateStatusResponse())

    async def _monitor_state(self, request: web.Request) -> web.Response:
        """A poll goes to the worker; it outlives that worker, and is answered here when there is no other."""
        instance = self._instance(request)
        wanted = codec.query(request, v5.InstanceStateMonitorQuery).gen
        if wanted is None or request.body_exists:  # a wrong body is told of, also where the query counts
            given = await codec.decode(request, v5.InstanceStateMonitorRequest)
            wanted = given.gen if wanted is None else wanted
        while True:
            record = instance.record
            if record.generation >= wanted:
                return codec.encode(
                    v5.InstanceStateMonitorResponse(
                        gen=record.generation,
                        state=_wire_state(record),
                        migration=v5.InstanceMigrateStatusResponse(),
                        paused=record.paused,
                        detail=record.detail or None,
                    )
                )
            moved = asyncio.create_task(instance.moved())
            try:
                if instance.is_live:
                    await self._poll(instance, wanted, request)
                    if instance.record.generation >= wanted:
                        continue
                elif not (instance.starts_again or instance.running is not None):
                    raise UnreachableGenerationError(
                        f"the VM is {record.state.value.lower()}: it does not reach generation {wanted} by itself"
                    )
                await asyncio.wait({moved}, timeout=None if instance.starts_again else _SETTLE_SECONDS)
            finally:
                moved.cancel()
            if instance.is_deleted:
                raise NotFoundError(f"VM {instance.name!r} was deleted")

    async def _poll(self, instance: Instance, wanted: int, request: web.Request) -> None:
        """Until the VM has reached the generation, or its worker cannot tell any more."""
        headers = {errors.REQUEST_ID: errors.request_id(request)}
        with contextlib.suppress(WorkerGoneError):
            await self._workers.ask(instance, "GET", f"/instance/state-monitor?gen={wanted}", headers=headers)

    async def _get_history(self, request: web.Request) -> web.StreamResponse:
        instance = self._instance(request)
        if instance.is_live:
            return await self._forward(request)
        wanted = codec.query(request, v5.InstanceSerialConsoleHistoryRequest)
        if (wanted.from_start is None) == (wanted.most_recent is None):
            raise FieldError([("", "expected exactly one of from_start and most_recent in the query")])
        if wanted.com != 1 or instance.directory is None:
            raise NotFoundError(f"nothing is kept of COM{wanted.com} of a VM that does not run")
        size = min(_HISTORY_BYTES if wanted.max_bytes is None else wanted.max_bytes, _MAX_HISTORY_BYTES)
        with instance.directory.history() as history:
            data, end = history.read(from_start=wanted.from_start, most_recent=wanted.most_recent, max_bytes=size)
        return codec.encode(v5.InstanceSerialConsoleHistoryResponse(data=tuple(data), last_byte_offset=end))

    async def _get_serial(self, request: web.Request) -> web.StreamResponse:
        """What a VM that nothing runs has printed can be watched to its end."""
        instance = self._instance(request)
        if instance.is_live:
            try:
                return await self._forward(request)
            except StateError:  # it has ended meanwhile
                instance = self._instance(request)
        wanted = codec.query(request, v5.InstanceSerialConsoleStreamRequest)
        if wanted.com != 1:
            raise NotFoundError(f"nothing is kept of COM{wanted.com} of a VM that does not run")
        if instance.directory is None:
            return await serial.stream_past(request, wanted, ConsoleHistory(1))
        with instance.directory.history() as history:
            return await serial.stream_past(request, wanted, history)

    async def _get_log(self, request: web.Request) -> web.StreamResponse:
        instance = self._instance(request)
        if instance.is_live:
            return await self._forward(request)
        wanted = codec.query(request, ours.LogRequest)
        if wanted.from_start is not None and wanted.most_recent is not None:
            raise FieldError([("", "expected one of from_start and most_recent in the query, not both")])
        if instance.directory is None:
            return codec.encode(ours.LogResponse(text="", last_byte_offset=0))
        size = min(_MAX_HISTORY_BYTES if wanted.max_bytes is None else wanted.max_bytes, _MAX_HISTORY_BYTES)
        with instance.directory.log() as lines:
            start = wanted.from_start
            if start is None:
                start = lines.total_bytes - (_HISTORY_BYTES if wanted.most_recent is None else wanted.most_recent)
                start = max(start, lines.resumes_at)
            data, end = lines.read(from_start=start, max_bytes=size)
        return codec.encode(ours.LogResponse(text=data.decode(errors="replace"), last_byte_offset=end))

    # -- one VM, run and stop ------------------------------------------------------------------------------------------

    async def _put_state(self, request: web.Request) -> web.StreamResponse:
        instance = self._instance(request)
        wanted = await codec.decode(request, v5.InstanceStateRequested)
        if wanted is v5.InstanceStateRequested.RUN:
            await self._supervisor.prepare_run(instance)
            return await self._forward(request)
        if wanted is v5.InstanceStateRequested.STOP:
            return await self._stop(request)
        if not instance.is_live:
            raise _forbidden("reboot", instance)
        return await self._forward(request)

    async def _stop(self, request: web.Request) -> web.StreamResponse:
        """Also where the worker does not answer: the supervisor sees to it."""
        instance = self._instance(request)
        self._supervisor.note_stop(instance)
        if not instance.is_live:
            return codec.no_content()
        try:
            return await self._forward(request)
        except WorkerGoneError:
            return codec.no_content()

    async def _shutdown(self, request: web.Request) -> web.StreamResponse:
        instance = self._instance(request)
        if instance.is_live:
            self._supervisor.note_stop(instance, deadline=None)
        return await self._forward(request)

    # -- everything else is the worker's -------------------------------------------------------------------------------

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        instance = self._instance(request)
        rest = request.rel_url.raw_path.split("/", 3)[3]
        query = request.rel_url.raw_query_string
        path = f"/instance/{rest}?{query}" if query else f"/instance/{rest}"
        is_upgrade = "upgrade" in request.headers.get("Connection", "").lower()
        if is_upgrade and request[ACCESS] is Access.READ_ONLY and rest not in ("serial", "events"):
            raise ForbiddenError("this needs a token with full access, and this one is read-only")
        if not instance.is_live:
            await read_body(request)
            raise _conflict(request, instance)
        try:
            if is_upgrade:
                return await self._workers.tunnel(request, instance, path)
            return await self._workers.forward(request, instance, path)
        except WorkerGoneError:
            await self._settle(instance)
            if not instance.is_live:
                raise _conflict(request, instance) from None
            raise

    async def _settle(self, instance: Instance) -> None:
        """Waits for the daemon to notice what has become of a worker that did not answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_SECONDS):
                while instance.is_live:
                    await instance.moved()

    def _instance(self, request: web.Request) -> Instance:
        return self._supervisor.get(request.match_info["key"])


async def _ask_doctor(config_file: str | None) -> bytes:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-m",
        "propolis.doctor",
        "--json",
        *([] if config_file is None else [config_file]),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(_DOCTOR_SECONDS):
            report, _ = await process.communicate()
    except TimeoutError:
        raise BackendError(f"the doctor does not answer within {_DOCTOR_SECONDS:g} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if not report.startswith(b"{"):
        raise BackendError(f"the doctor ended with status {process.returncode}")
    return report


def _entry(instance: Instance) -> InstanceEntry:
    record, definition = instance.record, instance.definition
    return InstanceEntry(
        name=instance.name,
        uuid=uuid.UUID(instance.uuid),
        state=_wire_state(record),
        paused=record.paused,
        generation=record.generation,
        cpus=definition.spec.cpus,
        memory_mib=definition.spec.memory_mib,
        created=definition.created,
        autostart=definition.autostart,
        restart=definition.restart,
        detail=record.detail or None,
    )


def _properties(instance: Instance) -> v5.InstanceProperties:
    return msgspec.json.decode(instance.definition.properties, type=v5.InstanceProperties)


def _wire_state(record: StateRecord) -> v5.InstanceState:
    """As 5.0.0 calls it, which has no word for a paused VM."""
    return v5.InstanceState.RUNNING if record.state is State.PAUSED else v5.InstanceState(record.state.value)


def _last_lines(instance: Instance) -> tuple[str, ...] | None:
    try:
        return None if instance.directory is None else tuple(instance.directory.last_log_lines(LOG_LINES))
    except PropolisError:
        return None


def _conflict(request: web.Request, instance: Instance) -> PropolisError:
    """What is asked of a VM that no worker has."""
    what = f"{request.method} {request.path[:200]}"
    error = StateError(f"{what}: the VM is {instance.record.state.value.lower()}")
    error.state = _wire_state(instance.record).value
    return error


def _forbidden(what: str, instance: Instance) -> ForbiddenStateError:
    error = ForbiddenStateError(f"cannot {what}: the VM is {instance.record.state.value.lower()}")
    error.state = _wire_state(instance.record).value
    return error


def _from_toml(body: bytes, name: str) -> Spec:
    """A standalone file, whose name gives way to the path's."""
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        raise ConfigError("the body is not UTF-8") from error
    return msgspec.structs.replace(standalone_config.parse(text, "the body", "", may_read=False), name=name)


def _stable_uuid(supervisor: Supervisor, name: str) -> uuid.UUID:
    """Of a VM that is there already, its own: so that the same request twice is the same VM."""
    try:
        return uuid.UUID(supervisor.get(name).uuid)
    except NotFoundError:
        return uuid.uuid4()
