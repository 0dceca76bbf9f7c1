"""What every test gets: both event loops, a check that nothing is left behind, and KVM or the reason why not.

An async test runs once on plain asyncio and once on uvloop. After each test there must be no new descriptor, thread or
task; a test that uses something longer-lived (a module's fixture) is marked `shared`.
"""

import asyncio
import gc
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterator

import pytest
import uvloop

_loops: "weakref.WeakSet[asyncio.AbstractEventLoop]" = weakref.WeakSet()


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker of this file, and lets uvloop's first loop open what it keeps for the whole process."""
    uvloop.new_event_loop().close()
    config.addinivalue_line("markers", "shared: uses what outlives one test; not checked for leaks")


# -- event loops -------------------------------------------------------------------------------------------------------


def _noting(factory: Callable[[], asyncio.AbstractEventLoop]) -> Callable[[], asyncio.AbstractEventLoop]:
    def new_loop() -> asyncio.AbstractEventLoop:
        loop = factory()
        _loops.add(loop)
        return loop

    return new_loop


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loops that each async test runs on."""
    return {"asyncio": _noting(asyncio.SelectorEventLoop), "uvloop": _noting(uvloop.new_event_loop)}


# -- leaks -------------------------------------------------------------------------------------------------------------


def descriptors() -> dict[int, str]:
    """Open descriptors of this process and what each refers to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            pass  # the descriptor of the listing itself
    return found


def _left_behind(fds: dict[int, str], threads: set[threading.Thread]) -> list[str]:
    now = descriptors()
    left = [f"descriptor {fd}: {now[fd]}" for fd in now if fds.get(fd) != now[fd]]
    return left + [f"thread {thread.name}" for thread in threading.enumerate() if thread not in threads]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Notes what is open before anything of the test is."""
    item.stash[_BEFORE] = descriptors(), set(threading.enumerate())
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Compares once everything of the test is gone."""
    result = yield
    if item.get_closest_marker("shared") is None:
        left = _left_behind(*item.stash[_BEFORE])
        if left:
            gc.collect()  # what only a cycle keeps is not lost
            left = _left_behind(*item.stash[_BEFORE])
        if left:
            pytest.fail("left behind: " + "; ".join(left), pytrace=False)
    return result


_BEFORE = pytest.StashKey[tuple[dict[int, str], set[threading.Thread]]]()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A test ends its own tasks: the runner, which cancels what is left, would hide them."""
    before = _tasks()
    result = yield
    left = _tasks() - before
    if left:
        pytest.fail("tasks left behind: " + "; ".join(sorted(map(repr, left))), pytrace=False)
    return result


def _tasks() -> "set[asyncio.Task[object]]":
    return {task for loop in _loops if not loop.is_closed() for task in asyncio.all_tasks(loop)}


# -- KVM ---------------------------------------------------------------------------------------------------------------


def _no_kvm() -> str | None:
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"open '/dev/kvm': {os.strerror(error.errno or 0)}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs KVM where there is none."""
    if item.get_closest_marker("kvm") is not None and (reason := _no_kvm()) is not None:
        pytest.skip(reason)


@pytest.fixture
def kvm_fd() -> Iterator[int]:
    """An open /dev/kvm."""
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
