"""The lifecycle: what is admitted in which state, and what one task makes of requests and guest events."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Self

import pytest

from propolis.errors import HypervisorError, ImageError, PauseError, StateError
from propolis.lifecycle import GuestEvent, Lifecycle, Record, Request, State, Verdict, admit

TIMEOUT = 5.0
Step = Callable[[], Awaitable[None]]

# -- admission ---------------------------------------------------------------------------------------------------------

RUN, PAUSE, REBOOT, BUTTON, STOP = Request.RUN, Request.PAUSE, Request.REBOOT, Request.POWER_BUTTON, Request.STOP
Y, I = Verdict.ACCEPT, Verdict.IGNORE  # noqa: E741
N = None  # refused

TABLE = {  # nothing pending: RUN, PAUSE, REBOOT, POWER_BUTTON, STOP
    State.CREATING: (Y, N, N, N, Y),
    State.STARTING: (I, Y, N, Y, Y),
    State.RUNNING: (I, Y, Y, Y, Y),
    State.PAUSED: (Y, I, N, N, Y),
    State.REBOOTING: (I, Y, I, Y, Y),
    State.STOPPING: (N, N, N, N, Y),
    State.STOPPED: (N, N, N, N, I),
    State.FAILED: (N, N, N, N, I),
    State.DESTROYED: (N, N, N, N, I),
}
PENDING = {  # where something pending changes the answer, for the states in which it can be
    (State.CREATING, RUN): (I, N, N, N, Y),
    (State.RUNNING, RUN): (I, Y, Y, Y, Y),
    (State.PAUSED, RUN): (I, Y, N, N, Y),
    (State.RUNNING, PAUSE): (Y, I, N, N, Y),
    (State.REBOOTING, PAUSE): (Y, I, N, N, Y),
    (State.STARTING, PAUSE): (Y, I, N, N, Y),
    (State.RUNNING, REBOOT): (I, Y, I, Y, Y),
    (State.RUNNING, BUTTON): (I, Y, Y, I, Y),
    (State.REBOOTING, BUTTON): (I, Y, I, I, Y),
}


def verdict(state: State, pending: frozenset[Request], request: Request) -> Verdict | None:
    try:
        return admit(state, pending, request)
    except StateError as error:
        return None if str(error).startswith(f"cannot {request.value}: the VM ") else Verdict.IGNORE


@pytest.mark.parametrize("state", State)
def test_admission_with_nothing_pending(state: State) -> None:
    assert tuple(verdict(state, frozenset(), request) for request in Request) == TABLE[state]


@pytest.mark.parametrize(("state", "pending"), PENDING)
def test_admission_with_something_pending(state: State, pending: Request) -> None:
    assert tuple(verdict(state, frozenset({pending}), request) for request in Request) == PENDING[state, pending]


@pytest.mark.parametrize("state", State)
def test_nothing_but_the_same_goes_after_a_pending_stop(state: State) -> None:
    for others in (set(), {RUN}, {PAUSE, BUTTON}):
        pending = frozenset({STOP, *others})
        assert tuple(verdict(state, pending, request) for request in Request) == (N, N, N, N, I)


def test_admission_is_total() -> None:
    """An answer or a StateError for every state, set of pending requests and request."""
    requests = list(Request)
    for state in State:
        for chosen in range(1 << len(requests)):
            pending = frozenset(request for number, request in enumerate(requests) if chosen >> number & 1)
            for request in requests:
                answer = verdict(state, pending, request)
                if request in pending:
                    assert answer is not Verdict.ACCEPT, (state, pending, request)
                if state.is_final:
                    assert answer is (Verdict.IGNORE if request is STOP else None)


# -- a machine that does what the test says ----------------------------------------------------------------------------


class ScriptedMachine:
    """Satisfies lifecycle.Machine. Notes each call; a test may give a call something to do."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.during: dict[str, Step] = {}

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        await asyncio.sleep(0)
        if name in self.during:
            await self.during[name]()

    async def start(self) -> None:
        await self._call("start")

    async def pause(self) -> None:
        await self._call("pause")

    async def resume(self) -> None:
        await self._call("resume")

    async def reboot(self) -> None:
        await self._call("reboot")

    async def halt(self) -> None:
        await self._call("halt")

    def press_power_button(self) -> None:
        self.calls.append("button")

    def failure_text(self) -> str:
        return "vCPU 0: a made-up failure; rip=0x1000"


class Scene:
    """A machine, its lifecycle, and the task that runs it."""

    def __init__(self, *, reboot_ends: bool = False) -> None:
        self.machine = ScriptedMachine()
        self.lifecycle = Lifecycle(self.machine, reboot_ends=reboot_ends)
        self.states: list[State] = []
        self.task: asyncio.Task[Record] | None = None

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self.lifecycle.run())
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exception: object) -> None:
        for task in (self.task, self._watcher):
            assert task is not None
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

    async def _watch(self) -> None:
        record = self.lifecycle.record
        while not record.state.is_final:
            record = await self.lifecycle.wait_for(record.generation + 1)
            self.states.append(record.state)

    async def reaches(self, state: State) -> Record:
        async with asyncio.timeout(TIMEOUT):
            record = self.lifecycle.record
            while record.state is not state:
                assert not record.state.is_final, record
                record = await self.lifecycle.wait_for(record.generation + 1)
        return record

    async def running(self) -> None:
        self.lifecycle.request(RUN)
        await self.reaches(State.RUNNING)

    async def ends(self) -> Record:
        assert self.task is not None
        async with asyncio.timeout(TIMEOUT):
            return await asyncio.shield(self.task)

    @property
    def state(self) -> State:
        return self.lifecycle.record.state

    async def rest(self) -> None:
        """Everything that was asked is done."""
        for _ in range(20):
            await asyncio.sleep(0)


# -- requests ----------------------------------------------------------------------------------------------------------


async def test_the_usual_life() -> None:
    async with Scene() as scene:
        assert scene.lifecycle.record == Record(0, State.CREATING)
        await scene.running()
        scene.lifecycle.request(PAUSE)
        await scene.reaches(State.PAUSED)
        scene.lifecycle.request(RUN)
        await scene.reaches(State.RUNNING)
        scene.lifecycle.request(REBOOT)
        await scene.rest()
        scene.lifecycle.request(BUTTON)
        await scene.rest()
        scene.lifecycle.request(STOP)
        record = await scene.ends()
        assert (record.state, record.detail) == (State.STOPPED, "stopped")
        assert scene.machine.calls == ["start", "pause", "resume", "reboot", "button", "halt"]
        assert scene.lifecycle.reboots == 1
        assert record.generation == 8  # starting, running, paused, running, rebooting, running, stopping, stopped


async def test_states_are_published_in_order() -> None:
    async with Scene() as scene:
        await scene.running()
        await scene.rest()
        scene.lifecycle.report(GuestEvent.POWER_OFF)
        record = await scene.ends()
        await scene.rest()
        assert record.detail == "the guest powered off"
        assert scene.states[-1] is State.STOPPED
        assert scene.states == sorted(scene.states, key=list(State).index)


async def test_a_vm_that_never_ran_can_be_stopped() -> None:
    async with Scene() as scene:
        scene.lifecycle.request(STOP)
        assert (await scene.ends()).state is State.STOPPED
        assert scene.machine.calls == ["halt"]


async def test_the_same_request_twice_is_done_once() -> None:
    async with Scene() as scene:
        await scene.running()
        for _ in range(3):
            scene.lifecycle.request(REBOOT)
            scene.lifecycle.request(BUTTON)
        await scene.rest()
        assert scene.machine.calls == ["start", "reboot", "button"]
        scene.lifecycle.request(PAUSE)
        scene.lifecycle.request(PAUSE)
        await scene.rest()
        scene.lifecycle.request(PAUSE)
        await scene.rest()
        assert scene.machine.calls == ["start", "reboot", "button", "pause"]


@pytest.mark.parametrize(
    ("requests", "state"),
    [
        ([PAUSE, RUN], State.RUNNING),
        ([PAUSE, RUN, PAUSE], State.PAUSED),
        ([PAUSE, RUN, PAUSE, RUN], State.RUNNING),
        ([REBOOT, PAUSE], State.PAUSED),
        ([BUTTON, PAUSE, RUN], State.RUNNING),
    ],
)
async def test_of_run_and_pause_the_last_word_counts(requests: list[Request], state: State) -> None:
    """However quickly they follow each other, from either state."""
    async with Scene() as scene:
        await scene.running()
        for request in requests:
            scene.lifecycle.request(request)
        await scene.rest()
        assert scene.state is state
        if state is State.PAUSED:
            scene.lifecycle.request(RUN)
            scene.lifecycle.request(PAUSE)
            await scene.rest()
            assert scene.state is State.PAUSED


@pytest.mark.parametrize(
    ("under_way", "requests", "state"),
    [
        ("pause", [RUN], State.RUNNING),
        ("pause", [PAUSE], State.PAUSED),
        ("pause", [RUN, PAUSE], State.PAUSED),
        ("resume", [PAUSE], State.PAUSED),
        ("resume", [RUN], State.RUNNING),
        ("resume", [PAUSE, RUN], State.RUNNING),
        ("start", [PAUSE], State.PAUSED),
        ("start", [PAUSE, RUN], State.RUNNING),
        ("reboot", [PAUSE], State.PAUSED),
        ("reboot", [REBOOT, RUN], State.RUNNING),
    ],
)
async def test_the_last_word_counts_while_the_one_before_is_under_way(
    under_way: str, requests: list[Request], state: State
) -> None:
    async with Scene() as scene:

        async def ask() -> None:
            del scene.machine.during[under_way]
            for request in requests:
                scene.lifecycle.request(request)
            await asyncio.sleep(0)

        scene.machine.during[under_way] = ask
        for request in {"start": [RUN], "pause": [RUN, PAUSE], "resume": [RUN, PAUSE, RUN], "reboot": [RUN, REBOOT]}[
            under_way
        ]:
            scene.lifecycle.request(request)
            await scene.rest()
        assert scene.state is state
        assert scene.machine.calls.count("reboot") <= 1


async def test_what_is_refused_changes_nothing() -> None:
    async with Scene() as scene:
        for request in (PAUSE, REBOOT, BUTTON):
            with pytest.raises(StateError, match="has not been started"):
                scene.lifecycle.request(request)
        await scene.running()
        scene.lifecycle.request(PAUSE)
        await scene.reaches(State.PAUSED)
        for request in (REBOOT, BUTTON):
            with pytest.raises(StateError, match="is paused"):
                scene.lifecycle.request(request)
        scene.lifecycle.request(STOP)
        with pytest.raises(StateError, match="is stopping"):
            scene.lifecycle.request(RUN)
        await scene.ends()
        with pytest.raises(StateError, match="is stopped"):
            scene.lifecycle.request(RUN)
        scene.lifecycle.request(STOP)
        assert scene.machine.calls == ["start", "pause", "halt"]


async def test_stop_while_it_starts() -> None:
    """Comes right after, before anything else that was asked."""
    async with Scene() as scene:

        async def ask() -> None:
            scene.lifecycle.request(PAUSE)
            scene.lifecycle.request(STOP)
            await scene.rest()

        scene.machine.during["start"] = ask
        scene.lifecycle.request(RUN)
        assert (await scene.ends()).state is State.STOPPED
        assert scene.machine.calls == ["start", "halt"]


# -- guest events ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", [GuestEvent.RESET, GuestEvent.TRIPLE_FAULT])
async def test_a_guest_reset_reboots(event: GuestEvent) -> None:
    async with Scene() as scene:
        await scene.running()
        scene.lifecycle.report(event)
        record = await scene.reaches(State.REBOOTING)
        assert record.detail == ("triple fault" if event is GuestEvent.TRIPLE_FAULT else "guest")
        await scene.reaches(State.RUNNING)
        assert scene.machine.calls == ["start", "reboot"]
        assert scene.lifecycle.reboots == 1
        assert not scene.lifecycle.rebooted


async def test_twenty_reboots() -> None:
    async with Scene() as scene:
        await scene.running()
        for number in range(1, 21):
            scene.lifecycle.report(GuestEvent.RESET)
            await scene.reaches(State.REBOOTING)
            await scene.reaches(State.RUNNING)
            assert scene.lifecycle.reboots == number


async def test_several_resets_are_one_reboot() -> None:
    """Also those of other vCPUs that arrive while it is under way."""
    async with Scene() as scene:

        async def again() -> None:
            scene.lifecycle.report(GuestEvent.RESET)
            scene.lifecycle.report(GuestEvent.TRIPLE_FAULT)

        scene.machine.during["reboot"] = again
        await scene.running()
        scene.lifecycle.report(GuestEvent.RESET)
        scene.lifecycle.report(GuestEvent.TRIPLE_FAULT)
        scene.lifecycle.report(GuestEvent.RESET)
        await scene.rest()
        assert scene.machine.calls == ["start", "reboot"]
        assert scene.state is State.RUNNING


@pytest.mark.parametrize("event", [GuestEvent.RESET, GuestEvent.TRIPLE_FAULT])
async def test_where_a_reboot_ends_the_vm(event: GuestEvent) -> None:
    async with Scene(reboot_ends=True) as scene:
        await scene.running()
        scene.lifecycle.report(event)
        record = await scene.ends()
        assert (record.state, record.detail) == (State.STOPPED, "the guest rebooted")
        assert scene.lifecycle.rebooted
        assert scene.machine.calls == ["start", "halt"]


async def test_a_reboot_on_request_does_not_end_it() -> None:
    async with Scene(reboot_ends=True) as scene:
        await scene.running()
        scene.lifecycle.request(REBOOT)
        await scene.rest()
        assert scene.machine.calls == ["start", "reboot"]
        assert scene.state is State.RUNNING


@pytest.mark.parametrize(
    ("events", "requests", "state", "calls"),
    [
        ({GuestEvent.FAILURE, GuestEvent.POWER_OFF, GuestEvent.RESET}, {STOP}, State.FAILED, ["halt"]),
        ({GuestEvent.POWER_OFF, GuestEvent.RESET}, {REBOOT}, State.STOPPED, ["halt"]),
        ({GuestEvent.RESET}, {STOP}, State.STOPPED, ["reboot", "halt"]),
        ({GuestEvent.RESET}, {PAUSE}, State.PAUSED, ["reboot", "pause"]),
        (set(), {PAUSE, STOP}, State.STOPPED, ["halt"]),
    ],
)
async def test_what_comes_first(
    events: set[GuestEvent], requests: set[Request], state: State, calls: list[str]
) -> None:
    """Failure, power off, reset, stop, then requests in their order."""
    async with Scene() as scene:
        await scene.running()
        for request in sorted(requests, key=lambda request: request.value):
            scene.lifecycle.request(request)
        for event in events:
            scene.lifecycle.report(event)
        await scene.rest()
        assert scene.state is state
        assert scene.machine.calls == ["start", *calls]


async def test_a_reset_that_meets_a_pause_waits_for_it_to_end() -> None:
    """The guest asked for it before it was held; who paused the VM still finds it paused."""
    async with Scene() as scene:

        async def reset() -> None:
            scene.lifecycle.report(GuestEvent.RESET)

        scene.machine.during["pause"] = reset
        await scene.running()
        scene.lifecycle.request(PAUSE)
        await scene.rest()
        assert (scene.state, scene.machine.calls) == (State.PAUSED, ["start", "pause"])
        scene.lifecycle.request(RUN)
        await scene.rest()
        assert (scene.state, scene.machine.calls) == (State.RUNNING, ["start", "pause", "reboot"])


async def test_a_paused_vm_can_fail_and_be_stopped() -> None:
    for event, state in ((GuestEvent.FAILURE, State.FAILED), (GuestEvent.POWER_OFF, State.STOPPED)):
        async with Scene() as scene:
            await scene.running()
            scene.lifecycle.request(PAUSE)
            await scene.reaches(State.PAUSED)
            scene.lifecycle.report(event)
            assert (await scene.ends()).state is state


# -- failures ----------------------------------------------------------------------------------------------------------


async def test_a_failure_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """In the record, which whoever runs the VM tells in its own way; the log has it among the states."""
    caplog.set_level("INFO")
    async with Scene() as scene:
        await scene.running()
        scene.lifecycle.report(GuestEvent.FAILURE)
        record = await scene.ends()
        assert record == Record(3, State.FAILED, "vCPU 0: a made-up failure; rip=0x1000")
        assert scene.machine.calls == ["start", "halt"]
    assert "state Failed: vCPU 0: a made-up failure" in caplog.text


@pytest.mark.parametrize("call", ["start", "pause", "resume", "reboot"])
async def test_a_call_that_fails_fails_the_vm(call: str) -> None:
    """With the message of its error; the machine is halted and run() returns."""
    async with Scene() as scene:

        async def fail() -> None:
            raise ImageError(f"kernel: no {call} today")

        scene.machine.during[call] = fail
        scene.lifecycle.request(RUN)
        await scene.rest()
        for request in {"pause": [PAUSE], "resume": [PAUSE, RUN], "reboot": [REBOOT]}.get(call, []):
            scene.lifecycle.request(request)
            await scene.rest()
        record = await scene.ends()
        assert (record.state, record.detail) == (State.FAILED, f"kernel: no {call} today")
        assert scene.machine.calls[-2:] == [call, "halt"]


@pytest.mark.parametrize("how", ["stop", "failure", "start"])
async def test_a_halt_that_fails_is_a_failed_vm(how: str) -> None:
    """A vCPU that does not end: final, with both reasons, and whoever waits is told."""
    async with Scene() as scene:

        async def fail() -> None:
            raise HypervisorError("vCPU 0 did not end within 10 s")

        async def no_start() -> None:
            raise ImageError("kernel: truncated")

        scene.machine.during["halt"] = fail
        if how == "start":
            scene.machine.during["start"] = no_start
            scene.lifecycle.request(RUN)
        else:
            await scene.running()
            if how == "stop":
                scene.lifecycle.request(STOP)
            else:
                scene.lifecycle.report(GuestEvent.FAILURE)
        record = await scene.ends()
        await scene.rest()
        assert record.state is State.FAILED
        assert "vCPU 0 did not end within 10 s" in record.detail
        if how == "failure":
            assert "a made-up failure" in record.detail
        if how == "start":
            assert "kernel: truncated" in record.detail
        assert scene.states[-1] is State.FAILED


async def too_late() -> None:
    raise PauseError("disk did not finish its requests within 30 s")


@pytest.mark.parametrize("request_", [PAUSE, REBOOT])
async def test_a_machine_that_cannot_rest_runs_on(request_: Request) -> None:
    """Who asked is told, and may ask again."""
    call = {PAUSE: "pause", REBOOT: "reboot"}[request_]
    async with Scene() as scene:
        await scene.running()
        scene.machine.during[call] = too_late
        with pytest.raises(PauseError, match="disk did not finish"):
            await scene.lifecycle.perform(request_)
        assert scene.machine.calls == ["start", call, "resume"]
        assert scene.lifecycle.record[1:] == (
            State.RUNNING,
            f"cannot {request_.value}: disk did not finish its requests within 30 s",
        )
        del scene.machine.during[call]
        await scene.lifecycle.perform(request_)
        assert scene.state is (State.PAUSED if request_ is PAUSE else State.RUNNING)


@pytest.mark.parametrize("request_", [PAUSE, REBOOT])
async def test_a_guest_that_asked_for_a_reset_does_not_run_on(request_: Request) -> None:
    """It asked before it was held for something that could not be done."""
    call = {PAUSE: "pause", REBOOT: "reboot"}[request_]
    async with Scene() as scene:

        async def reset() -> None:
            scene.machine.during.clear()
            scene.lifecycle.report(GuestEvent.TRIPLE_FAULT)
            await too_late()

        await scene.running()
        scene.machine.during[call] = reset
        with pytest.raises(PauseError):
            await scene.lifecycle.perform(request_)
        await scene.rest()
        assert scene.machine.calls == ["start", call, "reboot"]
        assert scene.state is State.RUNNING


@pytest.mark.parametrize("end", ["drained", "stop", "failure"])
async def test_a_guest_reset_waits_for_storage_that_hangs(end: str) -> None:
    """Until it answers or somebody ends the VM."""
    async with Scene() as scene:
        attempts = 0

        async def attempt() -> None:
            nonlocal attempts
            attempts += 1
            if attempts == 3 and end == "stop":
                scene.lifecycle.request(STOP)
            if attempts == 3 and end == "failure":
                scene.lifecycle.report(GuestEvent.FAILURE)
            if attempts < 3 or end != "drained":
                await too_late()

        await scene.running()
        scene.machine.during["reboot"] = attempt
        scene.lifecycle.report(GuestEvent.RESET)
        if end == "drained":
            await scene.rest()
            assert scene.state is State.RUNNING
            assert scene.lifecycle.reboots == 1
        else:
            assert (await scene.ends()).state is (State.STOPPED if end == "stop" else State.FAILED)
            assert scene.lifecycle.reboots == 0
        assert scene.machine.calls[1:4] == ["reboot"] * 3
        assert "resume" not in scene.machine.calls


async def test_perform_returns_when_it_is_done() -> None:
    """For each who asked, and at once for what is so already."""
    async with Scene() as scene:
        first = asyncio.create_task(scene.lifecycle.perform(RUN))
        await asyncio.sleep(0)
        await asyncio.gather(first, scene.lifecycle.perform(RUN))
        assert scene.state is State.RUNNING
        pausing = asyncio.create_task(scene.lifecycle.perform(PAUSE))
        await asyncio.sleep(0)
        also = asyncio.create_task(scene.lifecycle.perform(PAUSE))
        await asyncio.sleep(0)
        also.cancel()
        await asyncio.gather(also, return_exceptions=True)
        await pausing
        await scene.lifecycle.perform(PAUSE)
        with pytest.raises(StateError, match="is paused"):
            await scene.lifecycle.perform(REBOOT)
        await scene.lifecycle.perform(STOP)
        assert scene.machine.calls == ["start", "pause", "halt"]


async def test_perform_says_why_it_was_not_done() -> None:
    async with Scene() as scene:
        await scene.running()
        pausing = asyncio.create_task(scene.lifecycle.perform(PAUSE))
        running = asyncio.create_task(scene.lifecycle.perform(RUN))
        with pytest.raises(StateError, match="cannot pause: run was asked for after it"):
            await pausing
        await running
        rebooting = asyncio.create_task(scene.lifecycle.perform(REBOOT))
        stopping = asyncio.create_task(scene.lifecycle.perform(STOP))
        with pytest.raises(StateError, match="cannot reboot: the VM has ended"):
            await rebooting
        await stopping
        assert scene.state is State.STOPPED


async def test_a_failure_during_a_reboot() -> None:
    async with Scene() as scene:

        async def fail() -> None:
            scene.lifecycle.report(GuestEvent.FAILURE)

        scene.machine.during["reboot"] = fail
        await scene.running()
        scene.lifecycle.report(GuestEvent.RESET)
        assert (await scene.ends()).state is State.FAILED
        assert scene.machine.calls == ["start", "reboot", "halt"]


async def test_a_bug_halts_the_machine_and_is_not_hidden() -> None:
    async with Scene() as scene:

        async def bug() -> None:
            raise ZeroDivisionError

        scene.machine.during["start"] = bug
        scene.lifecycle.request(RUN)
        with pytest.raises(ZeroDivisionError):
            await scene.ends()
        assert scene.machine.calls == ["start", "halt"]


@pytest.mark.parametrize("when", ["idle", "running", "start", "reboot"])
async def test_cancelled(when: str) -> None:
    """The machine is halted once, whatever was under way."""
    async with Scene() as scene:
        assert scene.task is not None
        await scene.rest()
        if when in ("start", "reboot"):
            scene.machine.during[when] = asyncio.Event().wait  # type: ignore[assignment]
        if when != "idle":
            scene.lifecycle.request(RUN)
            await scene.rest()
        if when == "reboot":
            scene.lifecycle.report(GuestEvent.RESET)
            await scene.rest()
        scene.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await scene.ends()
        assert scene.machine.calls[-1] == "halt"
        assert scene.machine.calls.count("halt") == 1


# -- a stop that waits for nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("under_way", ["start", "pause", "reboot", "guest reset"])
async def test_a_stop_gives_up_what_is_under_way(under_way: str) -> None:
    """A disk that never drains holds up a pause or a reboot, and no stop; who asked for those is told."""
    async with Scene() as scene:
        asked: asyncio.Task[None] | None = None
        if under_way == "start":
            scene.machine.during["start"] = asyncio.Event().wait  # type: ignore[assignment]
            scene.lifecycle.request(RUN)
        else:
            await scene.running()
            scene.machine.during["reboot" if under_way == "guest reset" else under_way] = asyncio.Event().wait  # type: ignore[assignment]
            if under_way == "guest reset":
                scene.lifecycle.report(GuestEvent.RESET)
            else:
                asked = asyncio.create_task(scene.lifecycle.perform(PAUSE if under_way == "pause" else REBOOT))
        await scene.rest()
        await scene.lifecycle.perform(STOP)
        assert (await scene.ends()).state is State.STOPPED
        assert scene.machine.calls[-1] == "halt"
        if asked is not None:
            with pytest.raises(StateError, match="the VM is stopping"):
                await asked


async def test_a_stop_does_not_end_the_end() -> None:
    """One that comes while the machine is halted for another reason is answered by that."""
    async with Scene(reboot_ends=True) as scene:

        async def stop() -> None:
            scene.lifecycle.request(STOP)
            await scene.rest()

        await scene.running()
        scene.machine.during["halt"] = stop
        scene.lifecycle.report(GuestEvent.RESET)
        record = await scene.ends()
        assert (record.state, record.detail) == (State.STOPPED, "the guest rebooted")
        assert scene.machine.calls == ["start", "halt"]


async def test_an_expired_timeout_is_not_a_stop() -> None:
    """A TimeoutError of the machine's own is a bug of ours, and seen as one."""
    async with Scene() as scene:

        async def late() -> None:
            raise TimeoutError

        await scene.running()
        scene.machine.during["pause"] = late
        scene.lifecycle.request(PAUSE)
        with pytest.raises(TimeoutError):
            await scene.ends()


# -- records -----------------------------------------------------------------------------------------------------------


async def test_records_are_told_before_they_are_waited_for() -> None:
    """The first included; generations go on where an earlier life of the VM ended."""
    told: list[Record] = []
    machine = ScriptedMachine()
    lifecycle = Lifecycle(machine, first_generation=7, on_record=told.append, is_destroyed=True)
    assert told == [Record(7, State.CREATING)]
    lifecycle.request(RUN)
    task = asyncio.create_task(lifecycle.run())
    async with asyncio.timeout(TIMEOUT):
        assert (await lifecycle.wait_for(9)) == told[-1]
        lifecycle.request(STOP)
        last = await task
    assert [record.state for record in told[-3:]] == [State.STOPPING, State.STOPPED, State.DESTROYED]
    assert last == told[-1] == Record(12, State.DESTROYED, "stopped")
    assert lifecycle.is_over
    assert (await lifecycle.wait_for(99)) == last


async def test_a_failed_vm_is_not_destroyed() -> None:
    machine = ScriptedMachine()
    lifecycle = Lifecycle(machine, is_destroyed=True)
    lifecycle.report(GuestEvent.FAILURE)
    async with asyncio.timeout(TIMEOUT):
        assert (await lifecycle.run()).state is State.FAILED


async def test_a_refusal_says_the_state() -> None:
    async with Scene() as scene:
        with pytest.raises(StateError) as caught:
            scene.lifecycle.request(PAUSE)
        assert caught.value.state == "Creating"


async def test_a_panic_changes_nothing() -> None:
    async with Scene() as scene:
        await scene.running()
        scene.lifecycle.report(GuestEvent.PANIC)
        await scene.rest()
        assert (scene.state, scene.machine.calls) == (State.RUNNING, ["start"])


# -- waiting -----------------------------------------------------------------------------------------------------------


async def test_wait_for_a_generation() -> None:
    """At once for one that is past, later for one to come; a final record answers any."""
    async with Scene() as scene:
        async with asyncio.timeout(TIMEOUT):
            assert (await scene.lifecycle.wait_for(0)).state is State.CREATING
            waiting = asyncio.create_task(scene.lifecycle.wait_for(2))
            far = asyncio.create_task(scene.lifecycle.wait_for(1000))
            await scene.running()
            assert (await waiting).generation >= 2
            scene.lifecycle.request(STOP)
            assert (await far).state.is_final
            assert (await scene.lifecycle.wait_for(1 << 60)).state is State.STOPPED
