"""Completion: the names of VMs, asked of the server, and the script that a shell loads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer

_PATIENCE = 1.0  # seconds: whoever pressed Tab waits


def names(context: typer.Context, incomplete: str) -> list[str]:
    """The VMs whose names begin like that; none where the server does not tell."""
    import asyncio

    from propolis.errors import PropolisError

    from .session import Options, open_client

    given = context.find_root().params
    options = Options(
        server=given.get("server"),
        port=given.get("port"),
        url=given.get("url") or os.environ.get("PROPOLIS_URL"),
        token_file=given.get("token_file") or os.environ.get("PROPOLIS_TOKEN_FILE"),
        ca_file=given.get("ca_file") or os.environ.get("PROPOLIS_CA_FILE"),
        insecure=bool(given.get("insecure")),
    )

    async def ask() -> list[str]:
        async with asyncio.timeout(_PATIENCE), open_client(options) as client:
            return [vm.name for vm in await client.list() if vm.name.startswith(incomplete)]

    try:
        return asyncio.run(ask())
    except (PropolisError, TimeoutError):
        return []


def script(shell: str) -> str:
    """What `shell` is to load."""
    environment = os.environ | {"_PROPOLIS_CLI_COMPLETE": f"source_{shell}"}
    command = [sys.executable, "-P", "-m", "propolis_cli.main"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
