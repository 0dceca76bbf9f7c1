"""A VM's life as clients of the API and its guest make it go: hypothesis finds the ways, a model says where they lead.

The model is the table of the controller of Propolis API 5.0.0, and what a VM that can be paused adds to it.
"""

import asyncio
import itertools
import shutil
import tempfile
from collections.abc import Coroutine, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import pytest
import uvloop
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from propolis.errors import StateError
from propolis.lifecycle import GuestEvent, Request
from tests.unit.http.serving import TIMEOUT, Served, one_vm, until

T = TypeVar("T")

TURNS = 10  # of the loop, more than the lifecycle takes to begin with what it is told
FINAL = ("Stopped", "Failed")
NEXT = {  # what may follow on a state that is published; the same is never published twice in a row
    "Creating": {"Starting", "Stopping"},
    "Starting": {"Running", "Stopping", "Failed"},
    "Running": {"Paused", "Rebooting", "Stopping", "Failed"},
    "Paused": {"Running", "Rebooting", "Stopping", "Failed"},
    "Rebooting": {"Running", "Stopping", "Failed"},
    "Stopping": {"Stopped", "Failed"},
}
ROUTES: dict[str, tuple[str, object]] = {  # of requests: where, and with which body
    "Run": ("/instance/state", "Run"),
    "Reboot": ("/instance/state", "Reboot"),
    "Stop": ("/instance/state", "Stop"),
    "pause": ("/instance/pause", None),
    "resume": ("/instance/resume", None),
    "reset": ("/instance/reset", None),
    "stop": ("/instance/stop", None),
    "button": ("/instance/shutdown", None),
}
MEANS = {  # in the model and in the lifecycle
    "Run": Request.RUN,
    "Reboot": Request.REBOOT,
    "Stop": Request.STOP,
    "pause": Request.PAUSE,
    "button": Request.POWER_BUTTON,
}
ENDS = ("Stop", "stop", "power off", "failure")  # rare, or nothing else would be seen
ALSO = {"resume": "Run", "reset": "Reboot", "stop": "Stop"}  # ours, by the name that 5.0.0 has for it
PORTS = {"guest reset": (0xCF9, 1, 6), "power off": (0xB004, 2, 0x2000)}  # what a guest writes for it
EVENTS = {
    "guest reset": GuestEvent.RESET,
    "triple fault": GuestEvent.TRIPLE_FAULT,
    "power off": GuestEvent.POWER_OFF,
    "failure": GuestEvent.FAILURE,
}
RESETS = {"guest reset", "triple fault"}


def mostly_alive(names: Iterable[str]) -> st.SearchStrategy[str]:
    """Any of these, and one that ends the VM less often."""
    return st.sampled_from([name for name in names for _ in range(1 if name in ENDS else 9 if name == "pause" else 4)])


class Model:
    """What has been published, and what waits to be done."""

    def __init__(self) -> None:
        self.published = ["Creating"]  # by generation
        self.pending: list[str] = []
        self.events: set[str] = set()

    @property
    def state(self) -> str:
        return self.published[-1]

    @property
    def is_over(self) -> bool:
        return self.state in FINAL

    def admits(self, request: str) -> bool:
        """Notes a request that has something to do. False where it is refused."""
        if request == "Stop":
            if not self.is_over and "Stop" not in self.pending:
                self.pending.append("Stop")
            return True
        if self.is_over or "Stop" in self.pending:
            return False
        if request == "Run":
            if self.state == "Creating" or self.state == "Paused" or "pause" in self.pending:
                self._replace("pause", "Run")
            return True
        if self.state == "Creating":
            return False
        is_paused = (self.state == "Paused" or "pause" in self.pending) and "Run" not in self.pending
        if request == "pause":
            if not is_paused:
                self._replace("Run", "pause")
            return True
        if self.state == "Paused" or "pause" in self.pending:
            return False
        if request not in self.pending:
            self.pending.append(request)
        return True

    def _replace(self, opposite: str, request: str) -> None:
        if request not in self.pending:
            self.pending = [other for other in self.pending if other != opposite] + [request]

    def settle(self) -> None:
        """Does all that waits: what the guest wants comes before what clients want, and a stop before the rest."""
        while not self.is_over:
            if "failure" in self.events:
                self.published += ["Failed"]
            elif "power off" in self.events or (
                "Stop" in self.pending and not (self.events & RESETS and self.state != "Paused")
            ):
                self.published += ["Stopping", "Stopped"]
            elif self.events & RESETS and self.state != "Paused":
                self._reboot()
            elif self.pending:
                self._perform(self.pending.pop(0))
            else:
                return
        self.pending.clear()

    def _perform(self, request: str) -> None:
        if request == "Run" and self.state == "Creating":
            self.published += ["Starting", "Running"]
        elif request == "Run" and self.state == "Paused" and self.events & RESETS:
            self._reboot()  # the guest must not run on
        elif request == "Run" and self.state == "Paused":
            self.published += ["Running"]
        elif request == "pause" and self.state == "Running":
            self.published += ["Paused"]
        elif request == "Reboot" and self.state == "Running":
            self._reboot()

    def _reboot(self) -> None:
        self.published += ["Rebooting", "Running"]
        self.events -= RESETS


class Life(RuleBasedStateMachine):
    """One VM on the replay hypervisor, with a client that follows its states all the time."""

    loop_factory: Any = asyncio.SelectorEventLoop

    def __init__(self) -> None:
        super().__init__()
        self._runner = asyncio.Runner(loop_factory=self.loop_factory)
        self._folder = Path(tempfile.mkdtemp())
        self._do(self._begin())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    async def _begin(self) -> None:
        self._stack = AsyncExitStack()
        self._model = Model()
        self._seen: dict[int, str] = {}  # by the client that follows
        self._served = await self._stack.enter_async_context(one_vm(self._folder))
        self._follower = asyncio.create_task(self._follow(self._served))

    async def _follow(self, served: Served) -> int:
        """Polls for ever newer states, as 5.0.0's clients do; returns the status that ends it."""
        wanted = 0
        while True:
            # Not by `ask`, which has a deadline: a VM may rest as long as it likes.
            async with served.client.get(f"http://vm/instance/state-monitor?gen={wanted}") as reply:
                if reply.status != 200:
                    return reply.status
                body = await reply.json()
            assert body["gen"] >= wanted
            self._seen[body["gen"]] = "Paused" if body["paused"] else body["state"]
            wanted = body["gen"] + 1

    def teardown(self) -> None:
        """Whatever state it is in, the VM can be ended."""
        try:
            self._do(self._end())
        finally:
            self._runner.close()
            shutil.rmtree(self._folder)

    async def _end(self) -> None:
        """And whoever polled is told so."""
        try:
            await self._served.put("/instance/stop")
            async with asyncio.timeout(TIMEOUT):
                assert await self._follower == 410
                await asyncio.gather(*self._served.tasks)
            assert self._seen[max(self._seen)] in FINAL
        finally:
            self._follower.cancel()
            await self._stack.aclose()
            (self._folder / "http").unlink()

    @precondition(lambda self: self._model.is_over)
    @rule()
    def another(self) -> None:
        """A VM after the one that is over."""

        async def make() -> None:
            await self._end()
            await self._begin()

        self._do(make())

    @precondition(lambda self: self._model.state == "Creating")
    @rule()
    def start(self) -> None:
        """Most of what there is to see comes after that."""
        self.ask("Run")

    @rule(request=mostly_alive(ROUTES))
    def ask(self, request: str) -> None:
        """One client, who waits until all is done that follows on its request."""
        meaning = ALSO.get(request, request)
        if request == "resume" and self._model.state == "Creating":  # what never ran cannot go on
            expected = 409
        elif self._model.admits(meaning):
            expected = 204
        else:
            expected = 403 if ROUTES[request][0] == "/instance/state" else 409
        path, body = ROUTES[request]
        answer = self._do(self._served.put(path, body))
        assert answer.status == expected, (request, self._model.state, answer)
        if expected != 204:
            assert answer.body["state"] == self._model.state
        self._model.settle()
        self.all_was_published()
        instance = self._do(self._served.get("/instance")).body["instance"]
        assert instance["paused"] == (self._model.state == "Paused")
        assert instance["state"] == ("Running" if instance["paused"] else self._model.state)

    @precondition(lambda self: self._model.state in ("Running", "Paused"))
    @rule(wanted=st.lists(mostly_alive([*MEANS, *EVENTS]), min_size=2, max_size=5))
    def at_once(self, wanted: list[str]) -> None:
        """Requests and guest events that are all there before any of them is served."""

        async def make() -> None:
            for what in wanted:
                if what in MEANS:
                    is_admitted = self._model.admits(what)
                    try:
                        self._served.vm.lifecycle.request(MEANS[what])
                    except StateError:
                        assert not is_admitted, (what, wanted)
                    else:
                        assert is_admitted, (what, wanted)
                else:
                    self._served.vm.lifecycle.report(EVENTS[what])
                    self._model.events.add(what)

        self._do(make())
        self._model.settle()

    @precondition(lambda self: self._model.state in ("Running", "Paused"))
    @rule(what=mostly_alive(PORTS))
    def guest(self, what: str) -> None:
        """It writes the register; of a paused VM, it did so just before it was held."""

        async def make() -> None:
            self._served.vm._machine.vm.pio.write(*PORTS[what])
            await self._served.vm._machine.pause() if self._model.state == "Paused" else None

        self._do(make())
        self._model.events.add(what)
        self._model.settle()

    @precondition(lambda self: not self._model.is_over)
    @rule(requests=st.lists(mostly_alive(ROUTES), min_size=2, max_size=3))
    def race(self, requests: list[str]) -> None:
        """Clients that ask at the same time: each is answered, in whatever order, and what was published may be so."""

        async def make() -> list[int]:
            answers = await asyncio.gather(*(self._served.put(*ROUTES[request]) for request in requests))
            if any(ALSO.get(request, request) == "Stop" for request in requests):
                await asyncio.wait_for(asyncio.shield(self._served.tasks[0]), TIMEOUT)
            await self._at_rest()
            return [answer.status for answer in answers]

        statuses = self._do(make())
        for request, status in zip(requests, statuses, strict=True):
            is_stop = ALSO.get(request, request) == "Stop"
            assert status == 204 or (status in (403, 409) and not is_stop), (request, status)
        told = [event.state for event in self._served.vm.events.after(0).events if event.kind == "state"]
        assert told[: len(self._model.published)] == self._model.published
        self._model.published = [state for state in told if state is not None]
        if self._model.state != "Paused":
            self._model.events.clear()
        for before, after in itertools.pairwise(told):
            assert after in NEXT[str(before)], told

    async def _at_rest(self) -> None:
        """Nothing is asked for that is not done; a reset may wait for a VM that is paused."""
        for _ in range(TURNS):
            await asyncio.sleep(0)
        lifecycle = self._served.vm.lifecycle
        await until(lambda: lifecycle.is_over or not lifecycle._requests, "the end of what was asked for")

    @invariant()
    def all_was_published(self) -> None:
        """Exactly what the model says, each with a generation of its own, and the client that follows sees the last."""
        generation, state = len(self._model.published) - 1, self._model.state

        async def look() -> None:
            async with asyncio.timeout(TIMEOUT):
                await self._served.vm.lifecycle.wait_for(generation)
            await self._at_rest()
            await until(lambda: max(self._seen, default=-1) >= generation, "the sight of the latest state")

        self._do(look())
        record = self._served.vm.lifecycle.record
        assert (record.generation, record.state.value) == (generation, state), self._model.published
        assert all(self._model.published[at] == seen for at, seen in self._seen.items())


@pytest.mark.parametrize("factory", [asyncio.SelectorEventLoop, uvloop.new_event_loop])
def test_any_life(rounds: int, factory: Any) -> None:
    """Two rounds are always the same."""

    class OnLoop(Life):
        loop_factory = staticmethod(factory)

    settings = hypothesis.settings(
        max_examples=3 * rounds,
        stateful_step_count=30,
        derandomize=rounds == 2,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(OnLoop, settings=settings)
