"""The end of a websocket that this side closes."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiohttp import web

CLOSE_PATIENCE = 1.0  # seconds for a client to answer a close


async def close(request: web.Request, socket: web.WebSocketResponse, code: int, reason: str) -> None:
    """Says why, and waits a moment for the answer; then the connection is cut."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(2 * CLOSE_PATIENCE):  # one that does not read does not take the close either
            await socket.close(code=code, message=reason.encode()[:123])
            return
    if request.transport is not None:
        request.transport.abort()
