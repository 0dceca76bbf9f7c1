"""One VM's application: the routes of Propolis API 5.0.0 for one VM, and ours below the same prefix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from propolis.http import codec, errors, events, instance, metrics, openapi, screen, serial
from propolis.http.slot import SLOT, Slot

if TYPE_CHECKING:
    import socket

    from propolis.http.slot import Create, HistoryReader
    from propolis.virtual_machine import VirtualMachine


def make_app(
    vm: VirtualMachine | None,
    *,
    create: Create | None = None,
    log: HistoryReader | None = None,
    extra_fields: bool = True,
    console_patience: float = 30.0,
) -> web.Application:
    """The application of one VM, which `create` makes on request where there is none yet.

    `log` is what GET /instance/log shows. Without `extra_fields` replies have nothing but 5.0.0's fields. A client of a
    console that takes nothing for `console_patience` seconds is dropped.
    """
    app = web.Application(middlewares=[errors.middleware], client_max_size=codec.MAX_BODY)
    app.on_response_prepare.append(errors.on_prepare)
    slot = Slot(vm, create=create, log=log, extra_fields=extra_fields, console_patience=console_patience)
    app[SLOT] = slot
    app.on_shutdown.append(_on_shutdown)
    app.on_cleanup.append(_on_cleanup)
    for resource in (instance, serial, screen, events, metrics, openapi):
        app.router.add_routes(resource.routes)
    return app


async def _on_shutdown(app: web.Application) -> None:
    app[SLOT].end_streams()


async def _on_cleanup(app: web.Application) -> None:
    app[SLOT].let_go()  # aiohttp remembers an application for as long as the process lives


async def serve(app: web.Application, listener: socket.socket) -> web.AppRunner:
    """Serves the application on a listening socket, which is closed by the returned runner's `cleanup`."""
    # A client that goes away ends its handler: a poll that nobody waits for is not kept.
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner
