"""What every test gets: both event loops, a check that nothing is left behind, and KVM or the reason why not.

An async test runs once on plain asyncio and once on uvloop. After each test there must be no new descriptor, thread or
task; a test that uses something longer-lived (a module's fixture) is marked `shared`.
"""

import asyncio
import contextlib
import functools
import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Generator, Iterator

import pytest
import uvloop

from tests import guard
from tests.lab.probe import Verdict, probe

_loops: "weakref.WeakSet[asyncio.AbstractEventLoop]" = weakref.WeakSet()


def pytest_configure(config: pytest.Config) -> None:
    """Programs end with the tests, and are sent SIGHUP, under nohup too; uvloop opens what it keeps for the process."""
    guard.begin()
    uvloop.new_event_loop().close()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# -- event loops -------------------------------------------------------------------------------------------------------


def _noting(factory: Callable[[], asyncio.AbstractEventLoop]) -> Callable[[], asyncio.AbstractEventLoop]:
    def new_loop() -> asyncio.AbstractEventLoop:
        loop = factory()
        _loops.add(loop)
        return loop

    return new_loop


# Made once: a fixture that several tests share is kept only as long as its loop's factory is the same object.
_ASYNCIO = _noting(asyncio.SelectorEventLoop)
_UVLOOP = _noting(uvloop.new_event_loop)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loops that each async test runs on; one where a program is tested that has a loop of its own."""
    if item.get_closest_marker("os") is not None or item.get_closest_marker("program") is not None:
        return {"asyncio": _ASYNCIO}
    return {"asyncio": _ASYNCIO, "uvloop": _UVLOOP}


# -- leaks -------------------------------------------------------------------------------------------------------------


def descriptors() -> dict[int, str]:
    """Open descriptors of this process and what each refers to."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of the listing itself
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _left_behind(fds: dict[int, str], threads: set[threading.Thread]) -> list[str]:
    for thread in threading.enumerate():
        if thread.name.startswith("waitpid-"):  # asyncio's, for a process: it ends just after that
            thread.join(5)
    now = descriptors()
    left = [f"descriptor {fd}: {now[fd]}" for fd in now if fds.get(fd) != now[fd]]
    return left + [f"thread {thread.name}" for thread in threading.enumerate() if thread not in threads]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Notes what is open before anything of the test is."""
    item.stash[_BEFORE] = descriptors(), set(threading.enumerate())
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Notes a failure: its traceback keeps the test's objects, which is no leak."""
    try:
        return (yield)
    except BaseException:
        item.stash[_FAILED] = True
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Compares once everything of the test is gone."""
    result = yield
    getattr(item, "funcargs", {}).clear()  # pytest keeps the values of fixtures a little longer than the fixtures
    if item.get_closest_marker("shared") is None and not item.stash.get(_FAILED, False):
        left = _left_behind(*item.stash[_BEFORE])
        if left:
            gc.collect()  # what only a cycle keeps is not lost
            left = _left_behind(*item.stash[_BEFORE])
        if left:
            pytest.fail("left behind: " + "; ".join(left), pytrace=False)
    return result


_FAILED = pytest.StashKey[bool]()
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


@functools.cache
def _kvm() -> Verdict:
    return probe()


def pytest_report_header() -> str:
    """Which tests of real guests can run here."""
    return f"kvm: {_kvm()}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what needs more of KVM than this host has."""
    if item.get_closest_marker("os") is not None and not _kvm().is_full:
        pytest.skip(f"no unmodified kernel runs on this host's KVM ({_kvm()}); make test runs this in the lab")
    if item.get_closest_marker("kvm") is not None and not _kvm().is_usable:
        pytest.skip(str(_kvm()))


@pytest.fixture
def rounds() -> int:
    """How often to repeat what must not wear out: the environment's ROUNDS, or 2."""
    return int(os.environ.get("ROUNDS", "2"))


@pytest.fixture
def kvm_fd() -> Iterator[int]:
    """An open /dev/kvm."""
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
