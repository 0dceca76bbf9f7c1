"""Asynchronous events (NVMe 1.4 §5.2): requests that wait, and what there is to tell."""

from __future__ import annotations

from typing import TYPE_CHECKING

from propolis.devices.nvme.identify import ASYNC_LIMIT
from propolis.devices.nvme.log_pages import CHANGED_NAMESPACES, ERROR_INFORMATION, SMART

if TYPE_CHECKING:
    from collections.abc import Callable

ERROR, HEALTH, NOTICE = 0, 1, 2  # types, figure 147
INVALID_DOORBELL, INVALID_VALUE = 0, 1  # of ERROR
NAMESPACE_CHANGED = 0  # of NOTICE

_TYPE_OF_PAGE = {ERROR_INFORMATION: ERROR, SMART: HEALTH, CHANGED_NAMESPACES: NOTICE}


class AsyncEvents:
    """One event of each type at a time, reported once until its log page was read; `answer` completes a command."""

    def __init__(self, answer: Callable[[int, int, int], None]) -> None:
        self._answer = answer
        self._waiting: list[int] = []
        self._pending: dict[int, int] = {}  # type: dword 0 of the completion
        self._masked: set[int] = set()
        self.has_changed = False  # the namespace, since its list was read

    def wait(self, cid: int) -> bool:
        """A request that is answered when there is something; False when enough wait already."""
        if len(self._waiting) > ASYNC_LIMIT:
            return False
        self._waiting.append(cid)
        if self._pending:
            self._send()
        return True

    def forget(self, cid: int) -> bool:
        """True when this request waited."""
        if cid not in self._waiting:
            return False
        self._waiting.remove(cid)
        return True

    def report(self, kind: int, information: int, log_page: int) -> None:
        """Tells the host, at once or when it asks next. More of the same type is in the same log page."""
        if kind not in self._masked:
            self._pending.setdefault(kind, kind | information << 8 | log_page << 16)
            self._send()

    def report_namespace(self) -> None:
        self.has_changed = True
        self.report(NOTICE, NAMESPACE_CHANGED, CHANGED_NAMESPACES)

    def was_read(self, log_page: int) -> None:
        """The host knows what the page says, and is told of what comes next."""
        if log_page == CHANGED_NAMESPACES:
            self.has_changed = False
        if (kind := _TYPE_OF_PAGE.get(log_page)) is not None:
            self._masked.discard(kind)

    def _send(self) -> None:
        for kind in list(self._pending):
            if not self._waiting:
                return
            self._masked.add(kind)
            self._answer(self._waiting.pop(0), 0, self._pending.pop(kind))
