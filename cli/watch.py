"""Commands that watch: a VM's state, its log, events."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Protocol

from propolis.http.client_replies import UnavailableError, UnreachableError, VmIsOverError

from .output import fail, printable

if TYPE_CHECKING:
    from propolis.http import v5
    from propolis.http.client import Client
    from propolis.http.client_replies import Event

    from .output import Output
    from .session import Work

TIMEOUT_STATUS = 124
_AGAIN = 0.5  # seconds after which a VM that is over is looked at again, or a server that went away
_PATIENCE = 60.0  # seconds for a server to come back
_LOG_BYTES = 1 << 18
_FINAL = ("stopped", "failed", "destroyed")
_ENDS = {"stopped": ("stopped", "destroyed"), "destroyed": ("stopped", "destroyed")}  # what is as good


class Shown(Protocol):
    """Something with a state."""

    @property
    def state(self) -> v5.InstanceState: ...
    @property
    def paused(self) -> bool | None: ...


def shown(vm: Shown) -> str:
    """A state, for people: 5.0.0 has no word for paused."""
    return "Paused" if vm.paused else vm.state.value


def monitor(name: str) -> Work:
    """Prints each state, until there are no more."""

    async def work(client: Client, output: Output) -> None:
        async with contextlib.aclosing(client.states(name)) as states:
            async for now in states:
                if output.is_json:
                    output.json(now, is_one_line=True)
                else:
                    detail = f"  {printable(now.detail)}" if now.detail else ""
                    output.line(f"{now.gen:5}  {output.mark(shown(now))}{detail}")

    return work


def wait(name: str, goal: str, timeout: float | None, *, after: int = -1) -> Work:
    """Waits for a state with a generation later than `after`."""

    async def work(client: Client, output: Output) -> int | None:
        try:
            async with asyncio.timeout(timeout), output.progress(f"waiting until {name} is {goal}"):
                reason = await _wait(client, name, goal, after)
        except TimeoutError:
            fail(f"{name} is not {goal} after {timeout:g} s")
            return TIMEOUT_STATUS
        if reason is not None:
            fail(reason)
            return 1
        return None

    return work


async def _wait(client: Client, name: str, goal: str, after: int) -> str | None:
    """None once it is so, or why it will not be."""
    goals = _ENDS.get(goal, (goal,))
    gen = after + 1
    lost: float | None = None
    while True:
        try:
            now = await client.state_monitor(name, gen)
        except VmIsOverError:  # a daemon may start it again
            now = await client.state_monitor(name)
            if now.gen < gen:
                await asyncio.sleep(_AGAIN)
                continue
        except (UnreachableError, UnavailableError):
            # A daemon that is restarted; but the first time it must be there.
            lost = lost or time.monotonic()
            if gen == after + 1 or time.monotonic() > lost + _PATIENCE:
                raise
            await asyncio.sleep(_AGAIN)
            continue
        lost = None
        state = shown(now).lower()
        if state in goals:
            return None
        if state == "failed" or (state in _FINAL and goal not in ("running", "starting", "creating")):
            why = f": {now.detail}" if now.detail else ""
            return f"{name} is {state}{why}"
        gen = now.gen + 1


def logs(name: str, lines: int | None, follow: bool) -> Work:
    """Prints the log."""

    async def work(client: Client, output: Output) -> None:
        if lines == 0:
            piece = await client.log(name, most_recent=0)
            text = ""
        else:
            piece = await client.log(name, most_recent=_LOG_BYTES)
            text = piece.text if lines is None else "".join(piece.text.splitlines(keepends=True)[-lines:])
        output.text(_lines(text))
        if follow:
            async with contextlib.aclosing(client.follow_log(name, from_start=piece.last_byte_offset)) as pieces:
                async for text in pieces:
                    output.text(_lines(text))

    return work


def _lines(text: str) -> str:
    return "".join("\n" if character == "\n" else printable(character) for character in text)


def events(name: str | None, after: int | None) -> Work:
    """Prints events, across restarts of the server."""

    async def work(client: Client, output: Output) -> None:
        last = after
        lost: float | None = None
        is_first = True
        while True:
            try:
                async with contextlib.aclosing(client.events(name, after=last)) as stream:
                    async for event in stream:
                        last, lost, is_first = event.id, None, False
                        _show(event, output)
            except (UnreachableError, UnavailableError):
                lost = lost or time.monotonic()
                if (is_first and last is None) or time.monotonic() > lost + _PATIENCE:
                    raise
            await asyncio.sleep(_AGAIN)

    return work


def _show(event: Event, output: Output) -> None:
    if output.is_json:
        output.json(event, is_one_line=True)
        return
    when = time.strftime("%H:%M:%S", time.localtime(event.time))
    words = [when, f"{event.id:5}", printable(event.name), printable(event.kind)]
    if event.state:
        words.append(output.mark(printable(event.state)))
    if event.detail:
        words.append(printable(event.detail))
    output.line("  ".join(word for word in words if word))
