"""One VM in this process: its machine, the task that runs it, its consoles and what happened to it.

The worker and `propolis-server run-one` serve it by HTTP: propolis.http.app.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from propolis.console.history import ConsoleHistory
from propolis.console.hub import ConsoleHub
from propolis.display.screen import Screen
from propolis.errors import NotFoundError, StateError
from propolis.event_log import EventLog
from propolis.lifecycle import GuestEvent, Lifecycle, Record, Request, State
from propolis.machine import Keeper, Machine

if TYPE_CHECKING:
    from collections.abc import Callable

    from propolis.http.v5 import InstanceProperties
    from propolis.spec import Spec

_BEFORE_START = {State.CREATING, State.STARTING}


class VirtualMachine:
    """Built stopped. `run` is the task that everything else needs; every method runs on the loop thread."""

    def __init__(
        self,
        spec: Spec,
        properties: InstanceProperties,
        keeper: Keeper,
        *,
        history: ConsoleHistory | None = None,
        first_generation: int = 0,
        on_record: Callable[[Record], None] | None = None,
        is_destroyed: bool = False,
        hypervisor: str = "kvm",
    ) -> None:
        """`history` is where COM1's output goes; `on_record` and `is_destroyed` are the lifecycle's.

        Raises PropolisError subclasses, having released all it took.
        """
        self.spec = spec
        self.properties = properties
        self.events = EventLog(spec.name, str(properties.id))
        self._tell = on_record
        self._last_call: asyncio.TimerHandle | None = None
        self._machine = Machine(spec, keeper, self._on_guest_event, hypervisor=hypervisor, identity=properties.id)
        self._hubs = {
            number: self._connect(number, (history if number == 1 else None) or ConsoleHistory())
            for number in self._machine.board.serial_ports
        }
        self._screen = self._connect_screen()
        self.lifecycle = Lifecycle(
            self._machine,
            reboot_ends=spec.exit_on_reboot is not None,
            is_destroyed=is_destroyed,
            first_generation=first_generation,
            on_record=self._on_record,
        )

    def _connect(self, number: int, history: ConsoleHistory) -> ConsoleHub:
        serial = self._machine.board.serial_ports[number]
        hub = ConsoleHub(history, serial.feed)
        serial.on_output = hub.feed
        serial.on_input_room = hub.input_ready
        serial.on_reset = hub.discard_input
        return hub

    def _connect_screen(self) -> Screen | None:
        board = self._machine.board
        if board.ramfb is None:
            return None
        return Screen(self.spec.name, board.ramfb, board.keyboard.key, board.keyboard.move)

    def _on_record(self, record: Record) -> None:
        self.events.add("state", record.generation, state=record.state.value, detail=record.detail)
        if self._tell is not None:
            self._tell(record)

    def _on_guest_event(self, event: GuestEvent) -> None:
        if event is GuestEvent.PANIC:
            self._note("guest-panic", "the guest's kernel panicked")
        self.lifecycle.report(event)

    def _note(self, kind: str, detail: str) -> None:
        record = self.lifecycle.record
        self.events.add(kind, record.generation, state=record.state.value, detail=detail)

    @property
    def is_paused(self) -> bool:
        return self.lifecycle.record.state is State.PAUSED

    def hub(self, com: int = 1) -> ConsoleHub:
        """A serial console. Raises NotFoundError where the VM has no such port."""
        hub = self._hubs.get(com)
        if hub is None:
            raise NotFoundError(f"the VM has no COM{com}")
        return hub

    @property
    def screen(self) -> Screen:
        """What the guest shows. Raises NotFoundError where the VM has no screen."""
        if self._screen is None:
            raise NotFoundError("the VM has no screen")
        return self._screen

    async def run(self) -> Record:
        """Runs the VM's life to its end, then lets its watchers go. Nothing runs before Request.RUN is made."""
        try:
            return await self.lifecycle.run()
        finally:
            await self._let_go()  # the machine is halted by then

    async def close(self) -> None:
        """Ends a VM that nobody runs; twice is fine."""
        try:
            await self._machine.halt()
        finally:
            await self._let_go()

    async def _let_go(self) -> None:
        self._cancel_last_call()
        self.events.close()
        if self._screen is not None:
            await self._screen.close()
        await asyncio.gather(*(hub.close() for hub in self._hubs.values()))

    def _cancel_last_call(self) -> None:
        if self._last_call is not None:
            self._last_call.cancel()
            self._last_call = None

    # -- requests that are more than the lifecycle's -------------------------------------------------------------------

    def shutdown(self, deadline: float | None) -> None:
        """Presses the power button; a guest that still runs after `deadline` seconds is stopped.

        Raises StateError where nobody is there to see it. The last deadline given counts.
        """
        self.lifecycle.request(Request.POWER_BUTTON)
        self._note("power-button", "pressed" if deadline is None else f"pressed, stopped after {deadline:g} s")
        self._cancel_last_call()
        if deadline is not None:
            self._last_call = asyncio.get_running_loop().call_later(deadline, self._stop_late, deadline)

    def _stop_late(self, deadline: float) -> None:
        self._last_call = None
        self._note("shutdown-deadline", f"the guest did not power off within {deadline:g} s")
        self.lifecycle.request(Request.STOP)

    def inject_nmi(self) -> None:
        """An NMI for every vCPU of a guest that has started."""
        state = self.lifecycle.record.state
        if state in _BEFORE_START or state.is_final or state is State.STOPPING:
            error = StateError(f"cannot inject an NMI: the VM is {state.value.lower()}")
            error.state = state.value
            raise error
        self._machine.inject_nmi()
        self._note("nmi", "injected")

    def stats(self) -> dict[str, object]:
        """Counters of the machine, its devices and its consoles."""
        consoles = {
            f"com{number}": {
                "output_bytes": hub.history.total_bytes,
                "clients": hub.clients,
                "waiting_input": hub.waiting_input,
            }
            for number, hub in self._hubs.items()
        }
        screen = {} if self._screen is None else {"screen": self._screen.stats()}
        return {**self._machine.stats(), "consoles": consoles, **screen, "reboots": self.lifecycle.reboots}
