"""Events: numbered for good, and the latest of them kept."""

import asyncio

from propolis.event_log import EventLog

TIMEOUT = 5.0


def log(kept: int = 4) -> EventLog:
    return EventLog("vm", "uuid", kept)


def test_numbers_grow_with_generations() -> None:
    """Also over the lives of a VM: a later one begins with a later generation."""
    first, second = log(), log()
    for generation in (0, 0, 1, 1):
        first.add("x", generation)
    second.add("x", 2)
    numbers = [event.id for event in first.after(0).events]
    assert numbers == [1, 2, 1_000_000, 1_000_001]
    assert second.last > numbers[-1]


def test_what_is_no_longer_kept_is_a_gap() -> None:
    events = log()
    for number in range(10):
        events.add("x", 0, detail=str(number))
    batch = events.after(3)
    assert batch.is_gap
    assert [event.detail for event in batch.events] == ["6", "7", "8", "9"]
    assert not events.after(batch.events[0].id - 1).is_gap
    assert events.after(events.last).events == []
    assert not events.after(events.last).is_gap


async def test_waiting() -> None:
    events = log()
    async with asyncio.timeout(TIMEOUT):
        waiting = [asyncio.create_task(events.wait(0)) for _ in range(3)]
        await asyncio.sleep(0)
        events.add("x", 0)
        await asyncio.gather(*waiting)
        waiting = [asyncio.create_task(events.wait(events.last)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        events.close()
        await waiting[1]
        await events.wait(1 << 60)
