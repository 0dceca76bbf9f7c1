"""Threads that run no Python: vCPUs and I/O workers. Each says of what kind it is before it begins its work."""

import threading
from collections.abc import Callable

_before: list[Callable[[str], None]] = []


def before_each(hook: Callable[[str], None]) -> None:
    """From now on each new thread calls `hook(kind)` first, in that thread. Process-wide, and for good."""
    _before.append(hook)


def start(kind: str, name: str, body: Callable[[], None]) -> threading.Thread:
    """Runs `body` in a new thread. Raises RuntimeError where the host gives no thread.

    Daemons: one that hangs in the kernel must not keep the process from ending.
    """
    thread = threading.Thread(target=_run, args=(kind, body), name=name, daemon=True)
    thread.start()
    return thread


def _run(kind: str, body: Callable[[], None]) -> None:
    for hook in _before:
        hook(kind)
    body()
