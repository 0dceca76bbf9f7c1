"""`doctor`: what the server's host, or this one, lacks of what VMs need."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from propolis.errors import BackendError
from propolis.http.client_replies import Diagnosis, UnreachableError, decode

from .output import printable

if TYPE_CHECKING:
    from propolis.http.client import Client

    from .output import Output
    from .session import Work

_PROBE = (
    "-P",
    "-m",
    "propolis.daemon",
    "doctor",
    "--json",
)  # a process of its own: it tries what the client never loads


def doctor(is_explicit: bool) -> Work:
    """Asks the server, or looks at this host where none answers and none was named."""

    async def work(client: Client, output: Output) -> int | None:
        async with output.progress("looking at the host"):
            try:
                diagnosis = await client.doctor()
            except UnreachableError:
                if is_explicit:
                    raise
                output.say("[no server answers: this is about this host]")
                diagnosis = await _probe()
        if output.is_json:
            output.json(diagnosis)
        else:
            _show(diagnosis, output)
        return 1 if any(check.status == "error" for check in diagnosis.checks) else None

    return work


async def _probe() -> Diagnosis:
    process = await asyncio.create_subprocess_exec(
        sys.executable, *_PROBE, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    found, _ = await process.communicate()
    if not found:
        raise BackendError(f"look at this host: propolis-server doctor ended with status {process.returncode}")
    return decode(found, Diagnosis)


def _show(diagnosis: Diagnosis, output: Output) -> None:
    width = max((len(check.name) for check in diagnosis.checks), default=0)
    for check in diagnosis.checks:
        verdict = output.mark(check.status) + " " * (len("warning") - len(check.status))
        output.line(f"{verdict}  {printable(check.name):{width}}  {printable(check.message)}")
        if check.remedy:
            output.line(" " * (len("warning") + width + 4) + printable(check.remedy))
