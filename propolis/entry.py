"""Where the program `propolis-standalone` begins: signals first, then the imports, which take most of its start.

Python's own way with SIGINT is an exception wherever it happens to be: a module that is being imported may swallow it,
or it ends in a traceback. Nothing may be imported here that takes time.
"""

import _signal  # type: ignore[import-not-found]  # what `signal` wraps; that one imports `enum` first
import os
import sys

_ENDING = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP)


def _end(number: int, _frame: object) -> None:
    """There is nothing yet, or nothing any more, that needs to be let go."""
    os._exit(128 + number)


def standalone() -> None:
    """The console script `propolis-standalone`."""
    for number in _ENDING:
        if _signal.getsignal(number) is not _signal.SIG_IGN:  # else whoever started us wants it so
            _signal.signal(number, _end)
    from propolis.standalone import main

    status = main()
    for number in _ENDING:  # the loop gave them back; the VM has ended, and how is known
        _signal.signal(number, _signal.SIG_IGN)
    sys.exit(status)
