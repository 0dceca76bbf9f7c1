"""A terminal in raw mode, and out of it again however the program ends or stops.

Signals are handled where the program does not do so itself. Against what no program can handle, SIGKILL or a crash of
compiled code, a shell waits at the end of a pipe and restores the mode when that breaks.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import termios
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import FrameType, TracebackType

# Without a handler of the program's own these end it at once, past every `finally`.
_ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
_GUARD = """
trap '' HUP INT QUIT TERM TSTP TTIN TTOU
mode=$(stty -g <&2) || exit
echo; exec >&-
read -r end
stty "$mode" <&2
"""
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6


class RawMode:
    """Every key reaches the reader as it is, Ctrl-C and Ctrl-Z too. Of what is no terminal, it changes nothing."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._owner = os.getpid()
        self._guard: tuple[int, int] | None = None  # its process and the pipe to it, as descriptors

    @property
    def is_raw(self) -> bool:
        return self._before is not None

    @property
    def end_of_line(self) -> str:
        return "\r\n" if self.is_raw else "\n"

    def __enter__(self) -> Self:
        self._owner = os.getpid()
        try:
            self._before = termios.tcgetattr(self._fd)
        except (termios.error, OSError):
            return self
        atexit.register(self.restore)
        self._guard = _start_guard(self._fd)
        self._watch_signals()
        self._make_raw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def restore(self) -> None:
        """The terminal as it was; twice is fine."""
        if self._before is None or os.getpid() != self._owner:  # a forked child has not got the terminal
            return
        self._set(self._before)
        self._before = None
        if self._guard is not None:
            _dismiss_guard(*self._guard)
            self._guard = None
        atexit.unregister(self.restore)
        for number, earlier in self._handlers.items():
            # Unless the program has put its own there since.
            if signal.getsignal(number) in (self._on_end, self._on_stop, self._on_continue):
                signal.signal(number, earlier)
        self._handlers.clear()

    def _make_raw(self) -> None:
        assert self._before is not None
        raw = list(self._before)
        raw[_IFLAG] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        raw[_OFLAG] &= ~termios.OPOST
        raw[_CFLAG] = raw[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        raw[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        raw[_CC] = list(raw[_CC])
        raw[_CC][termios.VMIN], raw[_CC][termios.VTIME] = 1, 0
        self._set(raw)

    def _set(self, mode: list[Any]) -> None:
        # At once: waiting until all output is written would not end on a terminal that is stopped.
        with contextlib.suppress(termios.error, OSError):  # it hung up; there is nothing left to set
            termios.tcsetattr(self._fd, termios.TCSANOW, mode)

    def _watch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python allows handlers there only; atexit and `finally` remain
        handlers = dict.fromkeys(_ENDING, self._on_end)
        handlers |= {signal.SIGTSTP: self._on_stop, signal.SIGCONT: self._on_continue}
        for number, handler in handlers.items():
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._handlers[number] = signal.signal(number, handler)

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        """Restore, then let the signal do what it would have done."""
        earlier = self._handlers.get(signal.Signals(number), signal.SIG_DFL)
        self.restore()
        if callable(earlier):
            earlier(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        """Sent by somebody else: the key for it goes to the guest."""
        assert self._before is not None
        self._set(self._before)
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTSTP)  # to this thread: another might take it once the handler is back
        signal.signal(signal.SIGTSTP, self._on_stop)

    def _on_continue(self, number: int, frame: FrameType | None) -> None:
        """A shell sets its own mode while the program is stopped."""
        if self._before is not None:
            self._make_raw()


def _start_guard(fd: int) -> tuple[int, int] | None:
    """The shell that restores the terminal's mode if we cannot; it has noted the mode when this returns."""
    pipe_out, pipe_in = os.pipe()
    ready_out, ready_in = os.pipe()
    files = [(os.POSIX_SPAWN_DUP2, fd, 2), (os.POSIX_SPAWN_DUP2, pipe_out, 0), (os.POSIX_SPAWN_DUP2, ready_in, 1)]
    process = -1
    try:
        if (
            min(pipe_out, ready_in) > 2
        ):  # else this program has no stdin or stdout, and the shell's would be overwritten
            pid = os.posix_spawn("/bin/sh", ["sh", "-c", _GUARD], os.environ, file_actions=files)
            process = os.pidfd_open(pid)
    except OSError:
        pass  # no shell, no guard
    os.close(pipe_out)
    os.close(ready_in)
    is_ready = process >= 0 and os.read(ready_out, 1) != b""
    os.close(ready_out)
    if is_ready:
        return process, pipe_in
    os.close(pipe_in)
    if process >= 0:
        _bury(process)
    return None


def _dismiss_guard(process: int, pipe: int) -> None:
    # Before the pipe breaks, which it would act upon. Unlike a word through the pipe, this ends a stopped one as well.
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, signal.SIGKILL)
    os.close(pipe)
    _bury(process)


def _bury(process: int) -> None:
    with contextlib.suppress(ChildProcessError):  # somebody else waits for all children
        os.waitid(os.P_PIDFD, process, os.WEXITED)
    os.close(process)
