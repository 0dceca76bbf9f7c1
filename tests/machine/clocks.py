"""A Linux guest's clocks against this machine's."""

from collections.abc import Callable

from tests.machine.guest import Guest

TOLERANCE = 1.0  # seconds


async def clocksource(vm: Guest) -> str:
    """What the guest's kernel counts time by."""
    path = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
    return (await vm.run(f"cat {path}")).check().strip()


async def check_clocks(vm: Guest, now: Callable[[], float]) -> None:
    """The system's clock and the RTC are right within a second."""
    before = now()
    system, rtc = (await vm.run("date +%s; cat /sys/class/rtc/rtc0/since_epoch")).check().split()
    after = now()
    for shown in (system, rtc):  # whole seconds: up to one more has passed
        assert before - 1 - TOLERANCE <= int(shown) <= after + TOLERANCE, (before, system, rtc, after)
