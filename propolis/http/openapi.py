"""The API as an OpenAPI document, made of the wire types, and as a page for people that needs nothing but itself."""

from __future__ import annotations

import html
import inspect
import json
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from aiohttp import web

from propolis import __version__
from propolis.event_log import Event
from propolis.http import ours, v5

if TYPE_CHECKING:
    import argparse

routes = web.RouteTableDef()

Schema = dict[str, Any]

_REF = "#/components/schemas/{name}"
_UPGRADE = 101
EVENT_STREAM = "text/event-stream"
_NAMES: dict[str, Any] = {  # unions and others that have a name in 5.0.0
    "Chipset": v5.Chipset,
    "Component": v5.Component,
    "DownstairsInfoStatus": v5.DownstairsInfoStatus,
    "GuestHypervisorInterface": v5.GuestHypervisorInterface,
    "InstanceInitializationMethod": v5.InstanceInitializationMethod,
    "InstanceSpecStatus": v5.InstanceSpecStatus,
    "ReplacementComponent": v5.ReplacementComponent,
    "SpecKey": v5.SpecKey,
}


class Operation(NamedTuple):
    """One method of one path. `query` is a Struct whose fields are the parameters."""

    method: str
    path: str
    name: str
    summary: str
    body: Any = None
    query: Any = None
    status: int = 204
    reply: Any = None
    content_type: str = "application/json"
    is_body_optional: bool = False


VM_OPERATIONS = (
    Operation(
        "put", "/instance", "instance_ensure", "Create the VM of a server that has one",
        body=v5.InstanceEnsureRequest, status=201, reply=v5.InstanceEnsureResponse,
    ),
    Operation("get", "/instance", "instance_get", "What the VM is", status=200, reply=v5.InstanceGetResponse),
    Operation(
        "get", "/instance/spec", "instance_spec_get", "What the VM is made of", status=200,
        reply=v5.InstanceSpecGetResponse,
    ),
    Operation(
        "put", "/instance/state", "instance_state_put", "Run, stop or reboot the VM", body=v5.InstanceStateRequested,
    ),
    Operation(
        "get", "/instance/state-monitor", "instance_state_monitor",
        "Wait until the VM's state is of this generation or a later one; the generation is in the body or the query",
        body=v5.InstanceStateMonitorRequest, query=v5.InstanceStateMonitorQuery, status=200,
        reply=v5.InstanceStateMonitorResponse, is_body_optional=True,
    ),
    Operation(
        "get", "/instance/serial", "instance_serial",
        "A serial console by websocket, binary frames both ways; the header propolis-console-offset of the reply is "
        "the offset of the first byte that is sent",
        query=v5.InstanceSerialConsoleStreamRequest, status=_UPGRADE,
    ),
    Operation(
        "get", "/instance/serial/history", "instance_serial_history_get",
        "What was printed, from an offset on or the latest: exactly one of from_start and most_recent",
        query=v5.InstanceSerialConsoleHistoryRequest, status=200, reply=v5.InstanceSerialConsoleHistoryResponse,
    ),
    Operation(
        "get", "/instance/vnc", "instance_vnc",
        "The VM's screen, keyboard and mouse by websocket: RFB 3.8 in binary frames, without a password of its own",
        status=_UPGRADE,
    ),
    Operation(
        "get", "/instance/screenshot", "instance_screenshot", "What the VM's screen shows", status=200, reply=bytes,
        content_type="image/png",
    ),
    Operation(
        "post", "/instance/nmi", "instance_issue_nmi", "Send an NMI to every vCPU", status=200, reply=type(None),
    ),
    Operation(
        "get", "/instance/migration-status", "instance_migrate_status", "Migrations of the VM: none so far", status=200,
        reply=v5.InstanceMigrateStatusResponse,
    ),
    Operation(
        "get", "/instance/migrate/{migration_id}/start", "instance_migrate_start",
        "Refused: VMs are not migrated in this version", status=_UPGRADE,
    ),
    Operation(
        "post", "/instance/disk/{id}/snapshot/{snapshot_id}", "instance_issue_crucible_snapshot_request",
        "For Crucible's disks, which no VM here has", status=200, reply=type(None),
    ),
    Operation(
        "get", "/instance/disk/{id}/status", "disk_volume_status", "For Crucible's disks, which no VM here has",
        status=200, reply=v5.VolumeStatus,
    ),
    Operation(
        "put", "/instance/disk/{id}/vcr", "instance_issue_crucible_vcr_request",
        "For Crucible's disks, which no VM here has", body=v5.InstanceVCRReplace, status=200, reply=v5.ReplaceResult,
    ),
    Operation("put", "/instance/pause", "instance_pause", "Pause the VM; answers when it is held"),
    Operation("put", "/instance/resume", "instance_resume", "Let a paused VM run on"),
    Operation("put", "/instance/reset", "instance_reset", "Reset the VM; answers when it runs again"),
    Operation("put", "/instance/stop", "instance_stop", "Stop the VM at once, whatever it does"),
    Operation(
        "put", "/instance/shutdown", "instance_shutdown",
        "Press the power button; stop the VM if it has not powered off by a deadline",
        body=ours.ShutdownRequest, is_body_optional=True,
    ),
    Operation(
        "get", "/instance/events", "instance_events",
        "What happens to the VM, as server-sent events, or by websocket; Last-Event-ID or ?after= goes on",
        query=ours.EventsRequest, status=200, reply=Event, content_type=EVENT_STREAM,
    ),
    Operation(
        "get", "/instance/log", "instance_log", "The VM's log", query=ours.LogRequest, status=200,
        reply=ours.LogResponse,
    ),
    Operation(
        "get", "/instance/metrics", "instance_metrics", "Numbers of the VM's process", status=200,
        reply=ours.MetricsResponse,
    ),
)  # fmt: skip


def named_vm_operations() -> tuple[Operation, ...]:
    """The operations of one VM among others, below its name: those of a VM, but for what the daemon has of its own."""
    return tuple(
        operation._replace(
            path=operation.path.replace("/instance", "/instances/{name}", 1), name=f"named_{operation.name}"
        )
        for operation in VM_OPERATIONS
        if operation.name not in ("instance_ensure", "instance_get")
    )


def daemon_operations() -> tuple[Operation, ...]:
    """Those of the daemon alone: the set of VMs, and the daemon itself."""
    from propolis import doctor  # what the daemon asks for is known without it
    from propolis.http import daemon_types as daemon

    return (
        Operation(
            "get", "/instances", "instance_list", "All VMs, by name", query=daemon.ListQuery, status=200,
            reply=daemon.InstanceList,
        ),
        Operation(
            "put", "/instances/{name}", "named_instance_ensure",
            "Create a VM, unless there is one of that spec; the body may be a TOML file as well",
            body=v5.InstanceEnsureRequest, query=daemon.Keeping, status=201, reply=v5.InstanceEnsureResponse,
        ),
        Operation(
            "post", "/instances/{name}", "named_instance_create", "The same as PUT", body=v5.InstanceEnsureRequest,
            query=daemon.Keeping, status=201, reply=v5.InstanceEnsureResponse,
        ),
        Operation(
            "get", "/instances/{name}", "named_instance_get", "What the VM is, and what became of it", status=200,
            reply=daemon.InstanceReply,
        ),
        Operation(
            "patch", "/instances/{name}", "named_instance_keep", "Change how the VM is kept", body=daemon.Keeping
        ),
        Operation(
            "delete", "/instances/{name}", "named_instance_delete", "Delete a VM that does not run, or by force any",
            query=daemon.DeleteQuery,
        ),
        Operation(
            "get", "/events", "events",
            "What happens to all VMs, as server-sent events, or by websocket; Last-Event-ID or ?after= goes on",
            query=ours.EventsRequest, status=200, reply=Event, content_type=EVENT_STREAM,
        ),
        Operation(
            "get", "/doctor", "doctor", "What this host lacks for VMs, and how to mend it", status=200,
            reply=doctor.Report,
        ),
        Operation("get", "/healthz", "healthz", "Whether the daemon serves", status=200, reply=daemon.HealthReply),
        Operation(
            "get", "/readyz", "readyz", "Whether VMs that ran were found again", status=200, reply=daemon.HealthReply
        ),
        Operation("get", "/version", "version", "What this is", status=200, reply=daemon.VersionReply),
        Operation(
            "get", "/metrics", "metrics", "Numbers for Prometheus", status=200, reply=str, content_type="text/plain"
        ),
    )  # fmt: skip


def document(operations: tuple[Operation, ...]) -> Schema:
    """The OpenAPI document of these operations."""
    kinds = [
        kind for operation in operations for kind in (operation.body, operation.reply) if kind not in (None, type(None))
    ]
    _, schemas = msgspec.json.schema_components([*kinds, *_NAMES.values(), v5.Error], ref_template=_REF)
    for name, kind in _NAMES.items():
        (schemas[name],), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    for schema in schemas.values():
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
    paths: dict[str, Schema] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation)
    error = {"description": "an error", "content": {"application/json": {"schema": _ref(v5.Error)}}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Propolis",
            "version": v5.API_VERSION,
            "description": "Propolis API 5.0.0 for one VM, and what this implementation adds to it.",
        },
        "paths": dict(sorted(paths.items())),
        "components": {"schemas": dict(sorted(schemas.items())), "responses": {"Error": error}},
    }


def _ref(kind: Any) -> Schema:
    (schema,), _ = msgspec.json.schema_components([kind], ref_template=_REF)
    return schema


def _operation(operation: Operation) -> Schema:
    found: Schema = {"operationId": operation.name, "summary": operation.summary}
    parameters = [
        {"name": part[1:-1], "in": "path", "required": True, "schema": _path_schema(part[1:-1])}
        for part in operation.path.split("/")
        if part.startswith("{")
    ]
    if operation.query is not None:
        (_,), known = msgspec.json.schema_components([operation.query], ref_template=_REF)
        schema = known[operation.query.__name__]
        parameters += [
            {"name": name, "in": "query", "required": name in schema["required"], "schema": _without_null(field)}
            for name, field in schema["properties"].items()
        ]
    if parameters:
        found["parameters"] = parameters
    if operation.body is not None:
        content = {"application/json": {"schema": _ref(operation.body)}}
        found["requestBody"] = {"required": not operation.is_body_optional, "content": content}
    reply: Schema = {"description": "the protocol becomes websocket" if operation.status == _UPGRADE else "done"}
    if operation.reply is not None:
        schema = _ref(operation.reply)
        is_stream = operation.content_type == EVENT_STREAM
        reply["content"] = {operation.content_type: {"schema": _server_sent(schema) if is_stream else schema}}
    error = {"$ref": "#/components/responses/Error"}
    found["responses"] = {str(operation.status): reply, "4XX": error, "5XX": error}
    return found


def _server_sent(schema: Schema) -> Schema:
    """One event of a stream, as OpenAPI 3.2 describes them: a field of text each, with JSON in `data`."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": schema}
    fields = {"id": {"type": "string"}, "event": {"type": "string"}, "data": data}
    return {"type": "object", "properties": fields, "required": ["event", "data"]}


def _path_schema(name: str) -> Schema:
    return {"type": "string", "format": "uuid"} if name in ("migration_id", "snapshot_id") else {"type": "string"}


def _without_null(schema: Schema) -> Schema:
    """A parameter that is not given has no value."""
    choices = [choice for choice in schema.get("anyOf", []) if choice != {"type": "null"}]
    return choices[0] if len(choices) == 1 else {name: value for name, value in schema.items() if name != "default"}


# -- served ------------------------------------------------------------------------------------------------------------

OPERATIONS = (*VM_OPERATIONS, *named_vm_operations(), *daemon_operations())


@cache
def text() -> str:
    """The document as it is served and as docs/openapi.json has it."""
    return json.dumps(document(OPERATIONS), indent=2) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `propolis-server open-api`."""
    parser.description = "Print the API as an OpenAPI document."


def run(_: argparse.Namespace) -> int:
    """Prints it."""
    sys.stdout.write(text())
    return 0


@routes.get("/openapi.json")
async def get_document(request: web.Request) -> web.Response:
    return web.Response(text=text(), content_type="application/json")


@routes.get("/docs")
async def get_page(request: web.Request) -> web.Response:
    headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
    return web.Response(text=page(), content_type="text/html", headers=headers)


_STYLE = """
body { font: 16px/1.5 sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; background: #fff }
code, pre { font: 14px/1.4 monospace } pre { background: #f4f4f4; padding: .7rem; overflow: auto }
summary { cursor: pointer; padding: .2rem 0 } summary b { display: inline-block; width: 4rem; color: #06c }
details > div { margin: 0 0 1rem 4rem } a { color: #06c } :target { background: #ffd }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818 } pre { background: #282828 } a, summary b { color: #6bf }
  :target { background: #440 }
}
"""


@cache
def page() -> str:
    """The document for people: no script, nothing from elsewhere."""
    spec = json.loads(text())
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Propolis API</title>",
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>",
        f"<h1>Propolis API</h1><p>{html.escape(spec['info']['description'])} This is Propolis {__version__}. ",
        "The same as <a href=openapi.json>OpenAPI</a>.</p><h2>Routes</h2>",
    ]
    for path, methods in spec["paths"].items():
        parts += [_route(path, method, operation) for method, operation in methods.items()]
    parts.append("<h2>Types</h2>")
    for name, schema in spec["components"]["schemas"].items():
        parts.append(f"<h3 id={name}>{name}</h3>{_schema(schema)}")
    return "\n".join(parts) + "</html>\n"


def _route(path: str, method: str, operation: Schema) -> str:
    lines = [f"<details><summary><b>{method.upper()}</b> <code>{html.escape(path)}</code></summary><div>"]
    lines.append(f"<p>{html.escape(operation['summary'])}.</p>")
    for parameter in operation.get("parameters", []):
        need = "required" if parameter["required"] else "optional"
        lines.append(f"<p><code>{parameter['name']}</code> in the {parameter['in']}, {need}</p>")
    if "requestBody" in operation:
        lines.append(f"<p>Body:</p>{_content(operation['requestBody'])}")
    for status, reply in operation["responses"].items():
        if status.isdigit():
            lines.append(f"<p>Answers {status}{':' if 'content' in reply else ''}</p>{_content(reply)}")
    return "\n".join(lines) + "</div></details>"


def _content(holder: Schema) -> str:
    return "".join(_schema(entry["schema"]) for entry in holder.get("content", {}).values())


def _schema(schema: Schema) -> str:
    """JSON with its references as links."""
    prefix = _REF.removesuffix("{name}")
    about = f"<p>{html.escape(schema['description'])}</p>" if "description" in schema else ""
    shown = json.dumps({key: value for key, value in schema.items() if key not in ("description", "title")}, indent=2)
    lines = []
    for line in html.escape(shown, quote=False).splitlines():
        before, found, rest = line.partition(f'"{prefix}')
        name, quote, after = rest.partition('"')
        lines.append(f'{before}<a href="#{name}">{name}</a>{after}' if found and quote else line)
    return about + "<pre>" + "\n".join(lines) + "</pre>"
