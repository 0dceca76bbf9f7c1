"""What the machine asks of every device, in the order it asks.

    start -> (pause -> drained -> reset | save -> resume)* -> halt

All of it runs on the loop thread. Guest accesses reach a device's compiled registers on vCPU threads at any time
between start and halt, except while the machine holds the vCPUs: it does so around pause, reset and resume.
"""

import asyncio


class Device:
    """A device of one machine. Subclasses override what they need; each default does nothing.

    `name` is the name in the configuration, or the device's own where it is part of the board.
    """

    name: str

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """The machine is built and its vCPUs are about to run: register descriptors and timers."""

    def pause(self) -> None:
        """Begin no new work. Requests already given to a backend go on; `drained` awaits them."""

    async def drained(self) -> None:
        """Returns once nothing is in flight and every completion is in guest memory."""

    def in_flight(self) -> int:
        """How many operations still use guest memory. After halt() not zero only if the host itself hangs."""
        return 0

    def stats(self) -> dict[str, int]:
        """Counters since it was built, by name."""
        return {}

    def resume(self) -> None:
        """Work again, starting with what the guest asked for in the meantime."""

    def reset(self) -> None:
        """To the state at power-on, drained and with the vCPUs held. Connections to the outside stay."""

    async def halt(self) -> None:
        """Let go of every descriptor, task and file; called once, also when start failed half-way."""
