"""Both servers against the OpenAPI document that they serve: requests made from it, good and bad, by schemathesis.

The requests are the same in each run; more of them with more rounds.
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from tests.source.tree import TREE
from tests.unit.daemons import TIMEOUT, server
from tests.unit.http.serving import ensure_body

pytestmark = [pytest.mark.program, pytest.mark.timeout(3600)]

EXAMPLES = 1  # of each operation and kind of data, times the rounds
PATIENCE = 0.1  # seconds for the answer of what may wait for ever
WAITING = ("/state-monitor", "/events")
MAY_BE_UNAVAILABLE = 503  # documented: the server starts or ends, or storage hangs
SHAPE: list[Any] = [status_code_conformance, content_type_conformance, response_schema_conformance]


def free_port() -> int:
    """One that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Examiner:
    """Asks one server all that its document has."""

    def __init__(self, port: int, rounds: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.count = EXAMPLES * rounds
        self.statuses: dict[str, set[int]] = {}

    def examine(self, prefix: str, revive: Callable[[], None]) -> None:
        """All operations below one of the prefixes, each after a call of `revive`."""
        document = requests.get(f"{self.url}/openapi.json", timeout=TIMEOUT).json()
        document["paths"] = {
            path: operations for path, operations in document["paths"].items() if path.split("/")[1].startswith(prefix)
        }
        for found in schemathesis.openapi.from_dict(document).get_all_operations():
            assert isinstance(found, Ok), found
            operation: Any = found.ok()
            revive()
            self._ask(operation, is_good=True)
            parameters = operation.definition.raw.get("parameters", [])
            if "requestBody" in operation.definition.raw or any(one["in"] == "query" for one in parameters):
                self._ask(operation, is_good=False)

    def _ask(self, operation: Any, *, is_good: bool) -> None:
        statuses = self.statuses.setdefault(operation.label, set())
        may_wait = operation.path.endswith(WAITING)

        def ask(case: "Case[Any]") -> None:
            if is_good and "name" in case.path_parameters:
                case.path_parameters["name"] = "web"
            try:
                response = case.call(base_url=self.url, timeout=PATIENCE if may_wait else TIMEOUT)
            except requests.Timeout:
                assert may_wait, f"no answer to {case.as_curl_command()}"
                return
            statuses.add(response.status_code)
            checks = list(SHAPE)
            if response.status_code != MAY_BE_UNAVAILABLE:
                checks.append(not_a_server_error)
            if not is_good:
                checks.append(negative_data_rejection)
            case.validate_response(response, checks=checks)

        mode = GenerationMode.POSITIVE if is_good else GenerationMode.NEGATIVE
        settings = hypothesis.settings(
            max_examples=self.count,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        given: Any = hypothesis.given(operation.as_strategy(generation_mode=mode))
        settings(given(ask))()


def put(url: str, body: Any) -> int:
    """The status of the reply."""
    return requests.put(url, json=body, timeout=TIMEOUT).status_code


async def test_the_daemon(tmp_path: Path, rounds: int) -> None:
    port = free_port()
    async with server(tmp_path, port=port) as one:
        examiner = Examiner(port, rounds)

        def revive() -> None:
            assert put(f"{examiner.url}/instances/web", one.body("web")) in (200, 201)
            deadline = time.monotonic() + TIMEOUT
            while put(f"{examiner.url}/instances/web/state", "Run") != 204:  # a stop that was asked for is under way
                assert time.monotonic() < deadline
                time.sleep(0.05)

        await asyncio.to_thread(examiner.examine, "", revive)
        assert " error " not in one.log
    succeeded = {label for label, statuses in examiner.statuses.items() if min(statuses, default=200) < 300}
    assert succeeded >= {"GET /instances/{name}", "PUT /instances/{name}/state", "GET /events"}


def test_one_vm(tmp_path: Path, rounds: int) -> None:
    port = free_port()
    command = [sys.executable, "-m", "propolis.daemon", "run-one", "--hypervisor", "replay", f"127.0.0.1:{port}"]
    with open(tmp_path / "stderr", "wb") as stderr:
        process = subprocess.Popen(command, cwd=TREE, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        examiner = Examiner(port, rounds)
        body = ensure_body(tmp_path)
        body["properties"]["name"] = f"conformance-{port}"
        deadline = time.monotonic() + TIMEOUT * rounds
        while "listening on" not in (tmp_path / "stderr").read_text():
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline, "it does not listen"
            time.sleep(0.01)

        def revive() -> None:
            while put(f"{examiner.url}/instance/state", "Run") != 204:  # the one before may yet be stopping
                assert put(f"{examiner.url}/instance", body) in (201, 409)
                assert time.monotonic() < deadline, "it does not run"

        examiner.examine("instance", revive)
    finally:
        process.terminate()
        process.wait(TIMEOUT)
    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    print(json.dumps({label: sorted(statuses) for label, statuses in examiner.statuses.items()}, indent=1))
