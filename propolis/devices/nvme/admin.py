"""Admin commands (NVMe 1.4 §5): what they may ask, and what is answered. All of it runs on the loop."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from propolis.devices.nvme import identify, log_pages, status
from propolis.devices.nvme._queues import CompletionQueue, SubmissionQueue
from propolis.devices.nvme.events import AsyncEvents
from propolis.devices.nvme.features import WRITE_CACHE, Features
from propolis.devices.nvme.status import CommandError

if TYPE_CHECKING:
    from collections.abc import Callable

    from propolis.devices.nvme.nvme import Nvme

BUDGET = 16  # commands before everybody else on the loop has a turn
MAX_TRANSFER = 1 << 20
ENTRY_SIZES = 4 << 20 | 6 << 16  # CC.IOCQES and CC.IOSQES
ENTRY_SIZES_MASK = 0xFF << 16
MIN_ENTRIES = 2


class Command(NamedTuple):
    """A submission queue entry (§4.2)."""

    opcode: int
    flags: int
    cid: int
    nsid: int
    metadata: int
    prp1: int
    prp2: int
    dword10: int
    dword11: int
    dword12: int
    dword13: int
    dword14: int
    dword15: int

    @classmethod
    def parse(cls, raw: bytes) -> Command:
        return cls._make(struct.unpack("<BBHI8xQQQIIIIII", raw))


class Admin:
    """The admin queue of a controller, from its enabling to its reset."""

    def __init__(self, controller: Nvme, features: Features) -> None:
        self._controller = controller
        self._features = features
        self._sq = SubmissionQueue(controller.function.doorbells, 0)
        self._cqs: dict[int, CompletionQueue] = {}  # by number, the admin queue's at 0
        self._held: list[tuple[int, int, int]] = []  # answers for which there was no room
        self._busy: set[int] = set()  # identifiers of commands that are answered later
        self._deleting: dict[int, int] = {}  # submission queue: the command that deletes it
        self._events: AsyncEvents = AsyncEvents(self._answer)
        self._closed_interrupts = 0  # of completion queues that are gone
        self.served = 0

    @property
    def has_changed_namespace(self) -> bool:
        """Since the host read the list of those that did."""
        return self._events.has_changed

    def create(self, sq: tuple[int, int], cq: tuple[int, int]) -> None:
        """Address and entries of each. Raises ValueError where that is no guest RAM."""
        self._cqs[0] = CompletionQueue(self._controller.function.doorbells, 0, *cq)
        try:
            self._sq.create(self._cqs[0], *sq)
        except ValueError:
            self._close(0)
            raise

    def _close(self, number: int) -> None:
        cq = self._cqs.pop(number)
        cq.close()
        self._closed_interrupts += cq.interrupt_count

    def destroy(self) -> None:
        """A controller reset: nothing that waits is answered any more."""
        self._sq.destroy()
        for number in list(self._cqs):
            self._close(number)
        self._held.clear()
        self._busy.clear()
        self._deleting.clear()
        self._events = AsyncEvents(self._answer)

    @property
    def interrupts(self) -> int:
        """Sent since the device was built."""
        return self._closed_interrupts + sum(cq.interrupt_count for cq in self._cqs.values())

    def serve(self) -> bool:
        """Performs some commands; True when there may be more."""
        if not self._sq.exists:
            return False
        budget = BUDGET
        self._deliver()
        while budget and not self._held and (raw := self._sq.take()) is not None:
            budget -= 1
            self.served += 1
            self._perform(Command.parse(raw))
        self._cqs[0].interrupt()
        return not budget or (not self._held and self._sq.watch())

    def report(self, kind: int, information: int, log_page: int) -> None:
        """Something for an Asynchronous Event Request."""
        if self._sq.exists:
            self._events.report(kind, information, log_page)
            self._cqs[0].interrupt()

    def namespace_changed(self) -> None:
        """Its size is another one."""
        if self._sq.exists and self._features.wants_namespace_notices:
            self._events.report_namespace()
            self._cqs[0].interrupt()

    def queue_drained(self, number: int) -> None:
        """Nothing of this submission queue is in flight any more."""
        if (cid := self._deleting.pop(number, None)) is not None:
            self._controller.queues[number - 1].destroy()
            self._answer(cid, 0, 0)
            self._cqs[0].interrupt()

    # -- answers -------------------------------------------------------------------------------------------------------

    def _perform(self, command: Command) -> None:
        if command.cid in self._busy:
            self._answer(command.cid, status.ID_CONFLICT | status.DO_NOT_RETRY, 0, is_new=False)
            return
        self._busy.add(command.cid)
        try:
            handler = _HANDLERS.get(command.opcode)
            if handler is None:
                raise CommandError(status.INVALID_OPCODE)
            if command.flags:  # fused commands and SGLs are for I/O
                raise CommandError(status.INVALID_FIELD)
            result = handler(self, command)
        except CommandError as error:
            self._controller.admin_failed(command.cid, error.status)
            self._answer(command.cid, error.status, 0)
        else:
            if result is not None:  # else it is answered later, or was already
                self._answer(command.cid, 0, result)

    def _answer(self, cid: int, code: int, result: int, *, is_new: bool = True) -> None:
        if is_new:
            self._busy.discard(cid)
        if self._held or not self._cqs[0].answer(self._sq, cid, code, result):
            self._held.append((cid, code, result))

    def _deliver(self) -> None:
        while self._held and self._cqs[0].answer(self._sq, *self._held[0]):
            del self._held[0]

    # -- queues, §5.3 to §5.6 ------------------------------------------------------------------------------------------

    def _create_cq(self, command: Command) -> int:
        number, size = command.dword10 & 0xFFFF, (command.dword10 >> 16) + 1
        vector = command.dword11 >> 16
        if not 1 <= number <= len(self._controller.queues) or number in self._cqs:
            raise CommandError(status.INVALID_QUEUE_ID)
        self._check_queue(command, size)
        if vector >= self._features.vectors:
            raise CommandError(status.INVALID_VECTOR)
        doorbells = self._controller.function.doorbells
        try:
            self._cqs[number] = CompletionQueue(
                doorbells, number, command.prp1, size, vector, bool(command.dword11 & 2)
            )
        except ValueError as error:
            raise CommandError(status.INVALID_FIELD) from error
        return 0

    def _create_sq(self, command: Command) -> int:
        number, size = command.dword10 & 0xFFFF, (command.dword10 >> 16) + 1
        if not 1 <= number <= len(self._controller.queues) or self._controller.queues[number - 1].exists:
            raise CommandError(status.INVALID_QUEUE_ID)
        cq = self._cqs.get(command.dword11 >> 16)
        if cq is None or cq.id == 0:
            raise CommandError(status.INVALID_QUEUE_CQ)
        self._check_queue(command, size)
        try:
            self._controller.queues[number - 1].create(cq, command.prp1, size)
        except ValueError as error:
            raise CommandError(status.INVALID_FIELD) from error
        return 0

    def _check_queue(self, command: Command, size: int) -> None:
        if size < MIN_ENTRIES:
            raise CommandError(status.INVALID_QUEUE_SIZE)
        if command.prp1 & 0xFFF:
            raise CommandError(status.PRP_OFFSET)
        # Contiguous, as CAP.CQR asks, and entries of the sizes that there are.
        if not command.dword11 & 1 or self._controller.entry_sizes != ENTRY_SIZES:
            raise CommandError(status.INVALID_FIELD)

    def _delete_sq(self, command: Command) -> int | None:
        number = command.dword10 & 0xFFFF
        if not 1 <= number <= len(self._controller.queues) or number in self._deleting:
            raise CommandError(status.INVALID_QUEUE_ID)
        queue = self._controller.queues[number - 1]
        if not queue.exists:
            raise CommandError(status.INVALID_QUEUE_ID)
        queue.stop()
        if queue.in_flight:
            self._deleting[number] = command.cid
            return None
        queue.destroy()
        return 0

    def _delete_cq(self, command: Command) -> int:
        number = command.dword10 & 0xFFFF
        if number == 0 or number not in self._cqs:
            raise CommandError(status.INVALID_QUEUE_ID)
        if self._cqs[number].users:
            raise CommandError(status.INVALID_DELETION)
        self._close(number)
        return 0

    def _shadow_doorbells(self, command: Command) -> int:
        if command.prp1 & 0xFFF or command.prp2 & 0xFFF:
            raise CommandError(status.INVALID_FIELD)
        if not self._controller.function.doorbells.cast_shadows(command.prp1, command.prp2):
            raise CommandError(status.INVALID_FIELD)
        self._controller.kick_all()  # what was submitted while the doorbells changed hands
        return 0

    # -- what the host wants to know -----------------------------------------------------------------------------------

    def _identify(self, command: Command) -> int:
        controller, what = self._controller, command.dword10 & 0xFF
        if what == 0:
            self._check_namespace(command)
            data = identify.namespace_data(controller.namespace, controller.granularity)
        elif what == 1:
            data = identify.controller(controller.names, controller.namespace)
        elif what == 2:
            if command.nsid >= identify.EVERY_NSID - 1:
                raise CommandError(status.INVALID_NAMESPACE)
            data = identify.active_namespaces(command.nsid)
        elif what == 3:
            self._check_namespace(command)
            data = identify.descriptors(controller.names)
        else:
            raise CommandError(status.INVALID_FIELD)
        self._sq.put(command.prp1, command.prp2, data)
        return 0

    def _check_namespace(self, command: Command) -> None:
        if command.nsid != identify.NSID:
            raise CommandError(status.INVALID_NAMESPACE)

    def _get_log_page(self, command: Command) -> int:
        page = command.dword10 & 0xFF
        length = 4 * ((command.dword10 >> 16 | (command.dword11 & 0xFFFF) << 16) + 1)
        offset = command.dword12 | command.dword13 << 32
        if page not in _LOG_PAGES:
            raise CommandError(status.INVALID_LOG_PAGE)
        if command.nsid not in (0, identify.NSID, identify.EVERY_NSID):
            raise CommandError(status.INVALID_NAMESPACE)
        if length > MAX_TRANSFER or offset % 4:
            raise CommandError(status.INVALID_FIELD)
        data = _LOG_PAGES[page](self)
        if offset > len(data):
            raise CommandError(status.INVALID_FIELD)
        self._sq.put(command.prp1, command.prp2, data[offset : offset + length].ljust(length, b"\0"))
        if not command.dword10 & 1 << 15:  # RAE, §5.14: the event stays as it is
            self._events.was_read(page)
        return 0

    def _smart(self) -> bytes:
        controller = self._controller
        return log_pages.smart(
            controller.io_counters(),
            started=controller.started,
            power_cycles=controller.power_cycles,
            failures=controller.failure_count,
        )

    def _error_information(self) -> bytes:
        return log_pages.error_information(self._controller.failures(), self._controller.failure_count)

    def _command_effects(self) -> bytes:
        data = identify.controller(self._controller.names, self._controller.namespace)
        return log_pages.command_effects(int.from_bytes(data[520:522], "little"))

    # -- features, events ----------------------------------------------------------------------------------------------

    def _get_features(self, command: Command) -> int:
        return self._features.get(command.dword10, command.dword11)

    def _set_features(self, command: Command) -> int | None:
        result = self._features.set(command.dword10, command.dword11)
        if command.dword10 & 0xFF == WRITE_CACHE:
            namespace = self._controller.namespace
            was_on, namespace.write_cache = namespace.write_cache, self._features.has_write_cache
            if was_on and not namespace.write_cache:
                # What it holds has to be on stable storage before the host hears that it is off.
                self._controller.flush(lambda error: self._flushed(command.cid, error))
                return None
        return result

    def _flushed(self, cid: int, error: int) -> None:
        if cid in self._busy:  # the controller was not reset meanwhile
            self._answer(cid, status.INTERNAL_ERROR if error else 0, 0)
            self._cqs[0].interrupt()

    def _async_event_request(self, command: Command) -> None:
        if not self._events.wait(command.cid):
            raise CommandError(status.ASYNC_LIMIT)

    def _abort(self, command: Command) -> int:
        """Only what waits for an event can be: whatever else is in flight is with the host's kernel."""
        queue, cid = command.dword10 & 0xFFFF, command.dword10 >> 16
        if queue and not (queue <= len(self._controller.queues) and self._controller.queues[queue - 1].exists):
            raise CommandError(status.INVALID_QUEUE_ID)
        if queue == 0 and self._events.forget(cid):
            self._answer(cid, status.ABORTED, 0)
            return 0
        return 1


_HANDLERS: dict[int, Callable[[Admin, Command], int | None]] = {
    0x00: Admin._delete_sq,
    0x01: Admin._create_sq,
    0x02: Admin._get_log_page,
    0x04: Admin._delete_cq,
    0x05: Admin._create_cq,
    0x06: Admin._identify,
    0x08: Admin._abort,
    0x09: Admin._set_features,
    0x0A: Admin._get_features,
    0x0C: Admin._async_event_request,
    0x7C: Admin._shadow_doorbells,
}
_LOG_PAGES: dict[int, Callable[[Admin], bytes]] = {
    log_pages.ERROR_INFORMATION: Admin._error_information,
    log_pages.SMART: Admin._smart,
    log_pages.FIRMWARE_SLOT: lambda _: log_pages.firmware_slot(),
    log_pages.CHANGED_NAMESPACES: lambda admin: log_pages.changed_namespaces(admin.has_changed_namespace),
    log_pages.COMMAND_EFFECTS: Admin._command_effects,
}
