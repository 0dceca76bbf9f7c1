"""A typed client of the HTTP API, of a daemon with many VMs or of a server that runs one.

    async with Client("unix:/run/propolis/propolis.sock") as client:
        await client.create("web", spec)
        await client.run("web")
        async with client.serial("web", from_start=0) as console:
            print(await console.read())
        await client.stop("web")

What a server refuses is raised as an error of propolis.errors, with the server's message.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import msgspec

from propolis.errors import AlreadyInitializedError, ConfigError, NoInstanceError, NotFoundError, StateError
from propolis.http import v5
from propolis.http.client_console import Console
from propolis.http.client_replies import (
    ConsoleHistory,
    Diagnosis,
    Event,
    LogPiece,
    UnknownVmError,
    Version,
    VmIsOverError,
    VmList,
    VmSummary,
    decode,
)
from propolis.http.client_transport import TIMEOUT, Address, Transport
from propolis.http.v5_spec import from_spec, properties_of
from propolis.spec import NAME_RULE, Spec, is_name

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
    from types import TracebackType

    import aiohttp

    from propolis.errors import PropolisError

T = TypeVar("T")

Restart = Literal["never", "on-failure", "always"]

_FOLLOW_PAUSE = 0.5  # seconds between looks at a log


class Client:
    """One server. The methods are called as the routes are; `name` is a VM's name or UUID.

    A server that runs one VM is found out by itself. There a name may be left out; one that is given is checked.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        ca_file: str | None = None,
        insecure: bool = False,
        bare: bool | None = None,
    ) -> None:
        """`ca_file` has the certificates that a server's is checked with; `bare` says whether it runs one VM only.

        `insecure` lets a token be sent where others can read it.
        """
        self.address = Address.parse(url)
        if token is not None and self.address.is_readable_on_the_way and not insecure:
            raise ConfigError(f"{self.address}: a token is only sent by https, to this host, or with insecure=True")
        self._transport = Transport(self.address, token, ca_file)
        self._bare = bare
        self._known: set[str] = set()  # names that are the one VM's

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; twice is fine."""
        await self._transport.close()

    # -- the server

    async def list(self) -> tuple[VmSummary, ...]:
        """All VMs, by name; of a server of one VM, that one."""
        found: list[VmSummary] = []
        after: str | None = None
        while True:
            try:
                body = await self._call("GET", "/instances", params={} if after is None else {"after": after})
            except NotFoundError:
                return await self._list_bare()
            page = decode(body, VmList)
            found += page.instances
            if page.next is None or not page.instances:
                return tuple(found)
            after = page.next

    async def version(self) -> Version:
        """What the server is."""
        return decode(await self._call("GET", "/version"), Version)

    async def doctor(self) -> Diagnosis:
        """Whether the server's host has what VMs need."""
        return decode(await self._call("GET", "/doctor"), Diagnosis)

    async def events(self, name: str | None = None, *, after: int | None = None) -> AsyncGenerator[Event]:
        """What happens to this VM or to all, from now on or after the event `after`, until the connection is lost."""
        headers = {"Accept": "text/event-stream"} | ({} if after is None else {"Last-Event-ID": str(after)})

        async def begin(path: str) -> AsyncGenerator[bytes]:
            lines = self._transport.stream(path, headers)
            await anext(lines)  # a refusal is raised here
            return lines

        lines = await (begin("/events") if name is None else self._at(name, "/events", begin))
        async with contextlib.aclosing(lines):
            async for data in _server_sent(lines):
                yield decode(data, Event)

    # -- a VM's beginning and end

    async def create(
        self,
        name: str,
        spec: Spec | v5.InstanceSpec | msgspec.Raw,
        *,
        identity: uuid.UUID | None = None,
        description: str = "",
        autostart: bool | None = None,
        restart: Restart | None = None,
    ) -> bool:
        """Have this VM made, and say whether it was; False where there is one that is equal already.

        A Raw `spec` is the JSON of an InstanceSpec. Without an `identity`, that of the VM which is there will do.
        `autostart` and `restart` are a daemon's to know.
        """
        if isinstance(spec, Spec):
            spec = from_spec(spec)
        properties = properties_of(name, identity or uuid.uuid4(), description)
        keeping = {} if autostart is None else {"autostart": str(autostart).lower()}
        keeping |= {} if restart is None else {"restart": restart}
        try:
            return await self._ensure(name, properties, spec, keeping)
        except (StateError, AlreadyInitializedError):
            if identity is not None:
                raise
            try:
                there = (await self.get(name)).properties
            except (NotFoundError, NoInstanceError):
                there = properties
            if there.id == properties.id:
                raise
        return await self._ensure(name, properties_of(name, there.id, description), spec, keeping)

    async def keep(self, name: str, *, autostart: bool | None = None, restart: Restart | None = None) -> None:
        """Have a daemon start this VM with the host, or again once it has ended."""
        wanted = {"autostart": autostart, "restart": restart}
        body = msgspec.json.encode({key: value for key, value in wanted.items() if value is not None})
        await self._transport.call("PATCH", f"/instances/{_checked(name)}", body=body)

    async def delete(self, name: str, *, force: bool = False) -> None:
        """Forget this VM; with `force` one that runs is stopped for it."""
        await self._call("DELETE", f"/instances/{_checked(name)}", params={"force": "true"} if force else {})

    async def get(self, name: str | None = None) -> v5.Instance:
        """The VM's properties and state."""
        return decode(await self._ask("GET", name, ""), v5.InstanceGetResponse).instance

    async def spec(self, name: str | None = None) -> v5.InstanceSpecGetResponse:
        """What the VM was made of."""
        return decode(await self._ask("GET", name, "/spec"), v5.InstanceSpecGetResponse)

    # -- a VM's state

    async def run(self, name: str | None = None) -> None:
        """Start it, or let it go on."""
        await self._request_state(name, v5.InstanceStateRequested.RUN)

    async def reboot(self, name: str | None = None) -> None:
        """Reset it in an orderly way."""
        await self._request_state(name, v5.InstanceStateRequested.REBOOT)

    async def stop(self, name: str | None = None) -> None:
        """End it at once, whatever it does."""
        await self._ask("PUT", name, "/stop")

    async def shutdown(self, name: str | None = None, *, deadline: float | None = None) -> None:
        """Press its power button; `deadline` seconds later it is stopped where the guest has not done so itself."""
        await self._ask("PUT", name, "/shutdown", body=msgspec.json.encode({"deadline_seconds": deadline}))

    async def reset(self, name: str | None = None) -> None:
        """Press its reset button."""
        await self._ask("PUT", name, "/reset")

    async def pause(self, name: str | None = None) -> None:
        """Hold it where it is."""
        await self._ask("PUT", name, "/pause")

    async def resume(self, name: str | None = None) -> None:
        """Let it go on from there."""
        await self._ask("PUT", name, "/resume")

    async def inject_nmi(self, name: str | None = None) -> None:
        """Send a non-maskable interrupt to each of its CPUs."""
        await self._ask("POST", name, "/nmi")

    async def state_monitor(self, name: str | None = None, gen: int = 0) -> v5.InstanceStateMonitorResponse:
        """The present state, once its generation is at least `gen`. VmIsOverError where that will not be."""
        request = v5.InstanceStateMonitorRequest(gen=gen)
        body = await self._ask("GET", name, "/state-monitor", body=msgspec.json.encode(request), timeout=None)
        return decode(body, v5.InstanceStateMonitorResponse)

    async def states(self, name: str | None = None) -> AsyncGenerator[v5.InstanceStateMonitorResponse]:
        """The present state and each later one, as far as they are seen, until there are no more."""
        gen = 0
        while True:
            try:
                now = await self.state_monitor(name, gen)
            except VmIsOverError:
                return
            yield now
            gen = now.gen + 1

    # -- a VM's output

    async def history(
        self,
        name: str | None = None,
        *,
        from_start: int | None = None,
        most_recent: int | None = None,
        max_bytes: int | None = None,
        com: int = 1,
    ) -> tuple[bytes, int]:
        """What a serial port printed, from an offset or the latest; with the offset just after it."""
        params = _given(
            from_start=from_start, most_recent=most_recent, max_bytes=max_bytes, com=com if com > 1 else None
        )
        body = await self._ask("GET", name, "/serial/history", params=params)
        piece = decode(body, ConsoleHistory)
        return bytes(piece.data), piece.last_byte_offset

    @contextlib.asynccontextmanager
    async def serial(
        self,
        name: str | None = None,
        *,
        from_start: int | None = None,
        most_recent: int | None = None,
        com: int = 1,
        patience: float = 0.0,
        on_lost: Callable[[PropolisError], None] | None = None,
        on_back: Callable[[], None] | None = None,
    ) -> AsyncIterator[Console]:
        """A serial port: its output from an offset, the latest bytes, or from now on; and input for it.

        A lost connection is made again for up to `patience` seconds, and goes on where it was; `on_lost` and `on_back`
        hear of that.
        """

        async def connect(
            from_start: int | None, most_recent: int | None
        ) -> tuple[aiohttp.ClientWebSocketResponse, int]:
            return await self._open_console(name, com, from_start, most_recent)

        async def read_history(from_start: int | None, most_recent: int | None) -> tuple[bytes, int]:
            max_bytes = 1 if from_start is None else None
            return await self.history(
                name, from_start=from_start, most_recent=most_recent, max_bytes=max_bytes, com=com
            )

        console = Console(connect, read_history, patience=patience, on_lost=on_lost, on_back=on_back)
        await console.open(from_start, most_recent)
        try:
            yield console
        finally:
            await console.close()

    async def screenshot(self, name: str | None = None) -> bytes:
        """What the VM's screen shows, as a PNG file."""
        return await self._ask("GET", name, "/screenshot")

    @contextlib.asynccontextmanager
    async def screen(self, name: str | None = None) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """The VM's screen, keyboard and mouse: RFB 3.8 in the binary messages of a websocket."""
        websocket, _ = await self._at(name, "/vnc", lambda path: self._transport.websocket(path, {}, "open the screen"))
        try:
            yield websocket
        finally:
            await websocket.close()

    async def log(
        self, name: str | None = None, *, from_start: int | None = None, most_recent: int | None = None
    ) -> LogPiece:
        """What the VM's own processes had to say, from an offset or the latest bytes."""
        params = _given(from_start=from_start, most_recent=most_recent)
        return decode(await self._ask("GET", name, "/log", params=params), LogPiece)

    async def follow_log(self, name: str | None = None, *, from_start: int = 0) -> AsyncGenerator[str]:
        """The same from an offset on, and what is added to it, without end."""
        while True:
            piece = await self.log(name, from_start=from_start)
            from_start = piece.last_byte_offset
            if piece.text:
                yield piece.text
            else:
                await asyncio.sleep(_FOLLOW_PAUSE)

    # -- how it is asked

    async def _open_console(
        self, name: str | None, com: int, from_start: int | None, most_recent: int | None
    ) -> tuple[aiohttp.ClientWebSocketResponse, int]:
        params = _given(from_start=from_start, most_recent=most_recent, com=com if com > 1 else None)
        params["control"] = "true"
        websocket, offset = await self._at(name, "/serial", lambda path: self._transport.websocket(path, params))
        if offset is not None:
            return websocket, offset
        if from_start is not None:
            return websocket, from_start
        # A server that does not say where it begins: the history does, and it can be asked to begin there.
        await websocket.close()
        data, after = await self.history(name, most_recent=most_recent or 0, max_bytes=1, com=com)
        return await self._open_console(name, com, after - len(data), None)

    async def _ensure(
        self,
        name: str,
        properties: v5.InstanceProperties,
        spec: v5.InstanceSpec | msgspec.Raw,
        keeping: Mapping[str, str],
    ) -> bool:
        value = {"properties": properties, "init": {"method": "Spec", "value": {"spec": spec}}}
        body = msgspec.json.encode(value)
        # Whether it is the one that is there, the server compares itself.
        status, _ = await self._at(
            name, "", lambda path: self._transport.call("PUT", path, params=keeping, body=body), is_checked=False
        )
        return status == 201

    async def _list_bare(self) -> tuple[VmSummary, ...]:
        self._bare = True
        try:
            there = await self.spec()
        except NoInstanceError:
            return ()
        board = there.spec.value.board if isinstance(there.spec, v5.SpecPresent) else None
        return (
            VmSummary(
                name=there.properties.name,
                uuid=there.properties.id,
                state=there.state,
                cpus=board.cpus if board is not None else 0,
                memory_mib=board.memory_mb if board is not None else 0,
            ),
        )

    async def _request_state(self, name: str | None, wanted: v5.InstanceStateRequested) -> None:
        await self._ask("PUT", name, "/state", body=msgspec.json.encode(wanted))

    async def _ask(
        self,
        method: str,
        name: str | None,
        rest: str,
        *,
        params: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout: float | None = TIMEOUT,
    ) -> bytes:
        async def call(path: str) -> bytes:
            _, answer = await self._transport.call(method, path, params=params, body=body, timeout=timeout)
            return answer

        return await self._at(name, rest, call)

    async def _call(self, method: str, path: str, params: Mapping[str, str] | None = None) -> bytes:
        _, answer = await self._transport.call(method, path, params=params)
        return answer

    async def _at(
        self, name: str | None, rest: str, call: Callable[[str], Awaitable[T]], *, is_checked: bool = True
    ) -> T:
        """Have `call` ask for what is at `rest` of the VM, wherever this server has its VMs."""
        if name is not None:
            name = _checked(name)
        elif self._bare is None:
            self._bare = await self._is_bare()
        if not self._bare:
            if name is None:
                raise ConfigError(f"{self.address} runs many VMs: expected the name of one")
            try:
                found = await call(f"/instances/{name}{rest}")
            except NotFoundError:
                if self._bare is None:
                    self._bare = await self._is_bare()
                if not self._bare:
                    raise
            else:
                self._bare = False
                return found
        if name is not None and is_checked and name not in self._known:
            await self._check(name)
        return await call(f"/instance{rest}")

    async def _is_bare(self) -> bool:
        try:
            await self._call("GET", "/instances", params={"limit": "1"})
        except NotFoundError:
            return True
        return False

    async def _check(self, name: str) -> None:
        """That the one VM here is the one that is meant."""
        try:
            body = await self._call("GET", "/instance")
        except NoInstanceError:
            return  # which whoever asked is told by the server
        there = decode(body, v5.InstanceGetResponse).instance.properties
        if name not in (there.name, str(there.id)):
            error = v5.Error(request_id="", message=f"there is no VM {name!r}: {self.address} runs {there.name!r}")
            raise UnknownVmError(404, error)
        self._known.add(name)


def _checked(name: str) -> str:
    """A name that can stand in a path."""
    if not is_name(name):
        raise ConfigError(f"{name!r} cannot name a VM: expected {NAME_RULE}")
    return name


def _given(**values: int | None) -> dict[str, str]:
    """A query of what there is."""
    return {key: str(value) for key, value in values.items() if value is not None}


async def _server_sent(lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event, from the lines of a stream of them, as HTML's chapter on server-sent events has it."""
    data: list[bytes] = []
    async for line in lines:
        text = line.rstrip(b"\r\n")
        field, _, value = text.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif not text and data:
            yield b"\n".join(data)
            data.clear()
