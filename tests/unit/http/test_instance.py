"""The routes of one VM: shapes, statuses and error codes of Propolis API 5.0.0, and ours beside them."""

import asyncio
import copy
import io
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from propolis.http import codec
from propolis.http.slot import SLOT
from propolis.lifecycle import GuestEvent, Request, State
from tests.unit.http.serving import (
    NIL,
    PROPERTIES,
    TIMEOUT,
    Answer,
    Served,
    build,
    empty,
    ensure_body,
    kernel,
    one_vm,
    serving,
    until,
    wire_spec,
)


def is_error(answer: Answer, status: int, code: str) -> None:
    """The body of every error, and the header that names the request."""
    assert answer.status == status, answer
    assert answer.body["error_code"] == code
    assert answer.body["message"]
    assert answer.body["request_id"] == answer.headers["x-request-id"] == str(uuid.UUID(answer.body["request_id"]))


# -- create ------------------------------------------------------------------------------------------------------------


async def test_there_is_no_vm_at_first(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        for method, path, body in [
            ("GET", "/instance", None),
            ("GET", "/instance/spec", None),
            ("GET", "/instance/state-monitor?gen=0", None),
            ("PUT", "/instance/state", "Run"),
            ("POST", "/instance/nmi", None),
            ("GET", "/instance/migration-status", None),
            ("GET", "/instance/serial/history?from_start=0", None),
            ("GET", "/instance/serial", None),
            ("GET", "/instance/events", None),
            ("GET", "/instance/metrics", None),
            ("PUT", "/instance/stop", None),
            ("GET", "/instance/disk/d/status", None),
        ]:
            is_error(await served.ask(method, path, body), 424, "NoInstance")


async def test_create_run_stop_and_create_again(tmp_path: Path) -> None:
    """As a control plane does that has a server for each VM: the VM ends as Destroyed, and makes room."""
    async with empty(tmp_path) as served:
        body = ensure_body(tmp_path)
        for _ in range(2):
            answer = await served.put("/instance", body)
            assert (answer.status, answer.body) == (201, {})
            is_error(await served.put("/instance", body), 409, "AlreadyInitialized")
            answer = await served.get("/instance")
            assert (answer.status, answer.body) == (
                200,
                {"instance": {"properties": PROPERTIES, "state": "Creating"}},
            )
            await served.running()
            assert (await served.get("/instance")).body["instance"]["state"] == "Running"
            assert (await served.put("/instance/state", "Stop")).status == 204
            await served.reaches(State.DESTROYED)
            assert (await served.get("/instance")).body["instance"]["state"] == "Destroyed"
            is_error(await served.put("/instance/state", "Run"), 424, "NoInstance")


async def test_the_spec_read_back_is_the_one_sent(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        body = ensure_body(tmp_path)
        await served.put("/instance", body)
        answer = await served.get("/instance/spec")
        assert answer.body == {
            "properties": PROPERTIES,
            "state": "Creating",
            "spec": {"type": "Present", "value": body["init"]["value"]["spec"]},
        }


def changed(body: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy with one value at a slash-separated path."""
    body = copy.deepcopy(body)
    *folders, last = path.split("/")
    place = body
    for folder in folders:
        place = place[folder]
    place[last] = value
    return body


@pytest.mark.parametrize(
    ("path", "value", "pointer"),
    [
        ("properties/id", "no uuid", "/properties/id"),
        ("properties/name", "../../etc/passwd", "/properties/name"),
        ("properties/name", "n" * 65, "/properties/name"),
        ("properties/name", "näme", "/properties/name"),
        ("properties/color", "red", "/properties/color"),
        ("properties/metadata/sled_revision", -1, "/properties/metadata/sled_revision"),
        ("init/method", "Magic", "/init/method"),
        ("init/value/spec/board/cpus", 256, "/init/value/spec/board/cpus"),
        ("init/value/spec/board/cpus", "4", "/init/value/spec/board/cpus"),
        ("init/value/spec/board/threads", 1, "/init/value/spec/board/threads"),
        ("init/value/spec/components/com1/component/num", "com5", "/init/value/spec/components/com1/component/num"),
        ("init/value/spec/components/x~y", {"type": "floppy"}, "/init/value/spec/components/x~0y/type"),
        ("init/value/spec/extensions/boot/kernel", "", "/init/value/spec/extensions/boot/kernel"),
    ],
)
async def test_a_wrong_field_is_named(tmp_path: Path, path: str, value: object, pointer: str) -> None:
    async with empty(tmp_path) as served:
        answer = await served.put("/instance", changed(ensure_body(tmp_path), path, value))
        is_error(answer, 400, "field")
        assert answer.body["pointer"] == pointer
        is_error(await served.get("/instance"), 424, "NoInstance")


async def test_a_kernel_that_is_missing_is_the_clients_mistake(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        body = changed(ensure_body(tmp_path), "init/value/spec/extensions/boot/kernel", "/nowhere/vmlinuz")
        answer = await served.put("/instance", body)
        is_error(answer, 400, "image")
        assert "/nowhere/vmlinuz" in answer.body["message"]
        assert (await served.put("/instance", ensure_body(tmp_path))).status == 201


async def test_the_target_of_a_migration_is_parsed_and_refused(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        init = {
            "method": "MigrationTarget",
            "value": {"migration_id": NIL, "src_addr": "[::1]:1", "replace_components": {}},
        }
        answer = await served.put("/instance", {**ensure_body(tmp_path), "init": init})
        is_error(answer, 400, "field")
        assert answer.body["pointer"] == "/init/method"


async def test_many_creations_at_once_make_one_vm(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        body = ensure_body(tmp_path)
        answers = await asyncio.gather(*(served.put("/instance", body) for _ in range(10)))
        assert sorted(answer.status for answer in answers) == [201] + [409] * 9


# -- state -------------------------------------------------------------------------------------------------------------


async def test_what_a_state_admits(tmp_path: Path) -> None:
    """Refusals of 5.0.0's route are 403 with the reason, those of ours 409; both say the state."""
    async with one_vm(tmp_path) as served:
        answer = await served.put("/instance/state", "Reboot")
        is_error(answer, 403, "instance state change not allowed: cannot reboot: the VM has not been started")
        assert answer.body["state"] == "Creating"
        answer = await served.put("/instance/pause")
        is_error(answer, 409, "state")
        assert answer.body["state"] == "Creating"
        is_error(await served.put("/instance/resume"), 409, "state")
        is_error(await served.ask("POST", "/instance/nmi"), 409, "state")
        await served.running()
        assert (await served.put("/instance/state", "Run")).status == 204  # it does
        assert (await served.put("/instance/state", "Reboot")).status == 204
        await served.vm.lifecycle.wait_for(4)
        await served.reaches(State.RUNNING)
        assert (await served.put("/instance/pause")).status == 204
        assert served.vm.lifecycle.record.state is State.PAUSED
        answer = await served.put("/instance/state", "Reboot")
        assert (answer.status, answer.body["state"]) == (403, "Paused")
        assert (await served.put("/instance/resume")).status == 204
        assert (await served.put("/instance/reset")).status == 204
        assert served.vm.lifecycle.reboots == 2
        assert (await served.put("/instance/state", "Stop")).status == 204
        await served.reaches(State.STOPPED)
        assert (await served.put("/instance/state", "Stop")).status == 204
        assert (await served.put("/instance/stop")).status == 204
        answer = await served.put("/instance/state", "Run")
        is_error(answer, 403, "instance state change not allowed: cannot run: the VM is stopped")


@pytest.mark.parametrize("body", [b"Run", b'"run"', b'"Pause"', b"null", b"{}", b'["Run"]'])
async def test_no_other_state_can_be_asked_for(tmp_path: Path, body: bytes) -> None:
    async with one_vm(tmp_path) as served:
        answer = await served.ask(
            "PUT", "/instance/state", data=body, headers={"Content-Type": "application/json; charset=utf-8"}
        )
        assert answer.status == 400


async def test_a_paused_vm_is_running_to_5_0_0(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        await served.running()
        await served.put("/instance/pause")
        instance = (await served.get("/instance")).body["instance"]
        assert (instance["state"], instance["paused"]) == ("Running", True)
        monitor = (await served.get("/instance/state-monitor?gen=0")).body
        assert (monitor["state"], monitor["paused"]) == ("Running", True)
    (tmp_path / "http").unlink()
    async with serving(tmp_path, build(tmp_path), extra_fields=False) as served:
        await served.running()
        await served.put("/instance/pause")
        assert set((await served.get("/instance")).body["instance"]) == {"properties", "state"}
        assert (await served.get("/instance/state-monitor?gen=0")).body == {
            "gen": 3,
            "state": "Running",
            "migration": {},
        }


async def test_a_failure_says_why(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        await served.running()
        served.vm.lifecycle.report(GuestEvent.FAILURE)
        await served.reaches(State.FAILED)
        instance = (await served.get("/instance")).body["instance"]
        assert (instance["state"], instance["detail"]) == ("Failed", "no vCPU has failed")


async def test_a_failed_vm_makes_room_too(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        body = ensure_body(tmp_path)
        await served.put("/instance", body)
        await served.running()
        served.vm.lifecycle.report(GuestEvent.FAILURE)
        await served.reaches(State.FAILED)
        assert (await served.put("/instance", body)).status == 201
        assert (await served.get("/instance")).body["instance"]["state"] == "Creating"


# -- the state monitor -------------------------------------------------------------------------------------------------


async def test_a_poll_waits_for_its_generation(tmp_path: Path) -> None:
    """Given in the body of the GET, as in 5.0.0, or in the query."""
    async with one_vm(tmp_path) as served:
        answer = await served.ask("GET", "/instance/state-monitor", {"gen": 0})
        assert (answer.status, answer.body) == (
            200,
            {"gen": 0, "state": "Creating", "migration": {}, "paused": False},
        )
        polls = [
            asyncio.create_task(served.ask("GET", "/instance/state-monitor", {"gen": 2})),
            asyncio.create_task(served.get("/instance/state-monitor?gen=2")),
        ]
        await served.running()
        for answer in await asyncio.gather(*polls):
            assert (answer.status, answer.body["gen"], answer.body["state"]) == (200, 2, "Running")


async def test_a_generation_that_never_comes_is_gone(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        poll = asyncio.create_task(served.get("/instance/state-monitor?gen=99"))
        await served.running()
        await served.put("/instance/state", "Stop")
        is_error(await poll, 410, "NoInstance")
        last = served.vm.lifecycle.record.generation
        assert (await served.get(f"/instance/state-monitor?gen={last}")).body["state"] == "Stopped"
        is_error(await served.get(f"/instance/state-monitor?gen={last + 1}"), 410, "NoInstance")


@pytest.mark.parametrize("query", ["?gen=-1", "?gen=x", "?gen=1&gen=2", "?generation=1", "?gen=", "?gen=1.5"])
async def test_a_poll_for_no_generation(tmp_path: Path, query: str) -> None:
    async with one_vm(tmp_path) as served:
        is_error(await served.get("/instance/state-monitor" + query), 400, "field")


def is_waited_for(served: Served) -> bool:
    return bool(served.vm.lifecycle._changed._waiters)


async def test_a_poll_with_a_wrong_body_beside_its_query(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        answer = await served.ask("GET", "/instance/state-monitor?gen=0", {"gen": "soon"})
        is_error(answer, 400, "field")
        assert answer.body["pointer"] == "/gen"
        assert (await served.ask("GET", "/instance/state-monitor?gen=0", {"gen": 9})).body["gen"] == 0


async def test_a_poll_for_nothing(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        is_error(await served.get("/instance/state-monitor"), 400, "InvalidBody")


async def test_the_api_describes_itself(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        assert (await served.get("/openapi.json")).body["info"]["version"] == "5.0.0"
        answer = await served.get("/docs")
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert b"/instance/state-monitor" in answer.body


async def test_a_poll_whose_client_is_gone_ends(tmp_path: Path) -> None:
    """Or polls that nobody waits for would add up."""
    async with one_vm(tmp_path) as served:
        poll = asyncio.create_task(served.get("/instance/state-monitor?gen=99"))
        await until(lambda: is_waited_for(served), "the poll")
        poll.cancel()
        await asyncio.gather(poll, return_exceptions=True)
        await until(lambda: not is_waited_for(served), "the end of the poll")


async def test_polls_end_with_the_server(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        poll = asyncio.create_task(served.get("/instance/state-monitor?gen=99"))
        await until(lambda: is_waited_for(served), "the poll")
        served.app[SLOT].end_streams()
        is_error(await poll, 503, "shutdown")
        is_error(await served.get("/instance/state-monitor?gen=99"), 503, "shutdown")


# -- shutdown and stop -------------------------------------------------------------------------------------------------


async def test_a_guest_that_does_not_power_off_is_stopped_at_its_deadline(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        is_error(await served.put("/instance/shutdown", {"deadline_seconds": 0}), 409, "state")
        await served.running()
        assert (await served.put("/instance/shutdown")).status == 204
        assert (await served.put("/instance/shutdown", {"deadline_seconds": None})).status == 204
        assert (await served.put("/instance/shutdown", {"deadline_seconds": 3600})).status == 204
        assert served.vm.lifecycle.record.state is State.RUNNING
        assert (await served.put("/instance/shutdown", {"deadline_seconds": 0.01})).status == 204
        record = await served.reaches(State.STOPPED)
        assert record.detail == "stopped"


@pytest.mark.parametrize("deadline", [-1, 1e300, "soon", [], 604801])
async def test_a_deadline_is_a_sensible_number(tmp_path: Path, deadline: object) -> None:
    async with one_vm(tmp_path) as served:
        await served.running()
        answer = await served.put("/instance/shutdown", {"deadline_seconds": deadline})
        is_error(answer, 400, "field")
        assert answer.body["pointer"] == "/deadline_seconds"


async def test_a_stop_waits_for_nothing(tmp_path: Path) -> None:
    """Not for a device that does not drain: the pause that waits for it is told."""
    async with one_vm(tmp_path) as served:
        await served.running()
        never = asyncio.Event()
        served.vm._machine.devices[0].drained = never.wait  # type: ignore[assignment, method-assign]
        pause = asyncio.create_task(served.put("/instance/pause"))
        await until(lambda: served.vm.lifecycle._under_way is not None, "the pause")
        assert (await served.put("/instance/stop")).status == 204
        await served.reaches(State.STOPPED)
        is_error(await pause, 409, "state")


# -- NMI, disks, migration ---------------------------------------------------------------------------------------------


async def test_an_nmi(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        await served.running()
        served.vm._machine.vm.take_interrupts()  # type: ignore[union-attr]
        answer = await served.ask("POST", "/instance/nmi")
        assert (answer.status, answer.body) == (200, None)
        interrupts = served.vm._machine.vm.take_interrupts()  # type: ignore[union-attr]
        assert interrupts == [("msi", 0xFEEFF000, 0x400)]


async def test_disks_of_crucible_are_not_there(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        is_error(await served.ask("POST", f"/instance/disk/com1/snapshot/{NIL}"), 404, "NotFound")
        is_error(await served.get("/instance/disk/%2e%2e%2f/status"), 404, "NotFound")
        is_error(await served.put("/instance/disk/d/vcr", {"vcr_json": "{}"}), 404, "NotFound")
        is_error(await served.ask("POST", "/instance/disk/com1/snapshot/x"), 400, "field")
        is_error(await served.put("/instance/disk/d/vcr", {}), 400, "field")


async def test_migration_is_refused_clearly(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        assert (await served.get("/instance/migration-status")).body == {}
        answer = await served.get(f"/instance/migrate/{NIL}/start")
        assert answer.status == 403
        assert "does not migrate" in answer.body["message"]
        is_error(await served.get("/instance/migrate/x/start"), 400, "field")


# -- what no handler sees ----------------------------------------------------------------------------------------------


async def test_routes_that_do_not_exist(tmp_path: Path) -> None:
    async with one_vm(tmp_path) as served:
        is_error(await served.get("/instances"), 404, "NotFound")
        is_error(await served.get("/instance/../../etc/passwd"), 404, "NotFound")
        is_error(await served.get("/" + "x" * 5000), 404, "NotFound")
        answer = await served.ask("DELETE", "/instance")
        is_error(answer, 405, "MethodNotAllowed")
        assert answer.headers["Allow"] == "GET,HEAD,PUT"


@pytest.mark.parametrize("version", ["5.0.0", " 5.0.0 ", None])
async def test_the_version_that_is_served(tmp_path: Path, version: str | None) -> None:
    headers = {} if version is None else {"api-version": version}
    async with one_vm(tmp_path) as served:
        assert (await served.ask("GET", "/instance", headers=headers)).status == 200


@pytest.mark.parametrize("version", ["1.0.0", "5.0", "6.0.0", "", "5.0.0, 4.0.0", "x" * 2000])
async def test_versions_that_are_not_served(tmp_path: Path, version: str) -> None:
    async with one_vm(tmp_path) as served:
        answer = await served.ask("GET", "/instance", headers={"api-version": version})
        is_error(answer, 400, "config")
        assert "expected 5.0.0" in answer.body["message"]
        assert len(answer.body["message"]) < 200


async def test_a_request_keeps_the_number_it_came_with(tmp_path: Path) -> None:
    number = str(uuid.uuid4())
    async with one_vm(tmp_path) as served:
        answer = await served.ask("GET", "/instance", headers={"x-request-id": number})
        assert answer.headers["x-request-id"] == number
        answer = await served.ask("GET", "/instance", headers={"x-request-id": "<script>"})
        assert answer.headers["x-request-id"] != "<script>"


async def test_bodies_that_are_refused_unread(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        big = io.BytesIO(b'{"properties": "' + b"x" * codec.MAX_BODY + b'"}')
        answer = await served.ask("PUT", "/instance", data=big, headers={"Content-Type": "application/json"})
        is_error(answer, 413, "InvalidBody")
        for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x"):
            answer = await served.ask("PUT", "/instance", data=b"{}", headers={"Content-Type": content_type})
            is_error(answer, 400, "InvalidBody")
        headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
        answer = await served.ask("PUT", "/instance", data=b"no gzip at all", headers=headers)
        assert answer.status == 400


async def test_a_body_that_does_not_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "BODY_TIMEOUT", 0.05)
    async with empty(tmp_path) as served:
        reader, writer = await asyncio.open_unix_connection(served.path)
        writer.write(
            b"PUT /instance HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        async with asyncio.timeout(TIMEOUT):
            assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_a_bug_of_ours_tells_the_client_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with one_vm(tmp_path) as served:

        def broken(request: Request) -> None:
            raise KeyError("a secret")

        monkeypatch.setattr(served.vm.lifecycle, "request", broken)
        answer = await served.put("/instance/state", "Run")
        monkeypatch.undo()
        is_error(answer, 500, "Internal")
        assert "secret" not in answer.body["message"]
        assert "a secret" in caplog.text
        assert answer.body["request_id"] in caplog.text


# -- hostile bodies ----------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


@st.composite
def mutations(draw: st.DrawFn, tmp_path: Path) -> object:
    """The body of a creation with some of its values replaced, removed or added."""
    body: Any = ensure_body(tmp_path)
    for _ in range(draw(st.integers(1, 3))):
        place = body
        while isinstance(place, dict) and place:
            name = draw(st.sampled_from(sorted(place)))
            below = place[name]
            if isinstance(below, dict) and below and draw(st.integers(0, 4)):
                place = below
                continue
            action = draw(st.sampled_from(["replace", "remove", "add"]))
            if action == "replace":
                place[name] = draw(VALUES)
            elif action == "remove":
                del place[name]
            else:
                place[draw(st.text(max_size=5))] = draw(VALUES)
            break
    return body


async def test_no_body_is_an_error_of_the_server(tmp_path: Path) -> None:
    """Whatever becomes of the body of a creation: a VM, or a 4xx with a message."""
    kernel(tmp_path)
    bodies: list[object] = []

    @settings(max_examples=150, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(mutations(tmp_path))
    def collect(body: object) -> None:
        bodies.append(body)

    collect()
    async with empty(tmp_path) as served:
        for body in bodies:
            answer = await served.put("/instance", body)
            if answer.status == 201:
                await served.put("/instance/stop")
                await served.reaches(State.DESTROYED)
            else:
                assert 400 <= answer.status < 500, (body, answer)
                assert answer.body["message"]


def test_the_spec_of_the_tests_is_one(tmp_path: Path) -> None:
    assert wire_spec(tmp_path)["components"]
