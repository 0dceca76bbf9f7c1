"""Get Features and Set Features (NVMe 1.4 §5.13, §5.21): values that last until the controller is reset."""

from __future__ import annotations

from propolis.devices.nvme.identify import WARNING_KELVIN
from propolis.devices.nvme.status import INVALID_FIELD, NOT_CHANGEABLE, NOT_SAVEABLE, CommandError

(
    ARBITRATION, POWER_MANAGEMENT, TEMPERATURE_THRESHOLD, ERROR_RECOVERY, WRITE_CACHE, QUEUE_COUNT, COALESCING, VECTOR,
    ATOMICITY, ASYNC_EVENTS,
) = (1, 2, 4, 5, 6, 7, 8, 9, 10, 11)  # fmt: skip

CURRENT, DEFAULT, SAVED, CAPABILITIES = range(4)  # §5.13, the field Select
CHANGEABLE = 1 << 2
SAVE = 1 << 31

NO_BURST_LIMIT = 7
NAMESPACE_NOTICE = 1 << 8  # of ASYNC_EVENTS

# Which bits of dword 11 a feature keeps, and its value at reset.
_KEPT = {
    ARBITRATION: (0xFFFF_FF07, NO_BURST_LIMIT),
    POWER_MANAGEMENT: (0xFF, 0),
    TEMPERATURE_THRESHOLD: (0xFFFF, WARNING_KELVIN),
    ERROR_RECOVERY: (0x1_FFFF, 0),
    WRITE_CACHE: (1, 1),
    COALESCING: (0xFFFF, 0),
    ATOMICITY: (1, 0),
    ASYNC_EVENTS: (0x7FFF, 0),
}
_UNDER_THRESHOLD = 1 << 20  # THSEL of TEMPERATURE_THRESHOLD: the lower limit, which is off
_COALESCING_OFF = 1 << 16  # CD of VECTOR


class Features:
    """The features of one controller with this many I/O queues of each direction and interrupt vectors."""

    def __init__(self, queues: int, vectors: int) -> None:
        self.queues = queues
        self.vectors = vectors
        self.reset()

    def reset(self) -> None:
        """As after a controller reset: nothing is saveable."""
        self._values = {feature: value for feature, (_, value) in _KEPT.items()}
        self._under = 0
        self._uncoalesced: set[int] = set()

    @property
    def has_write_cache(self) -> bool:
        return self._values[WRITE_CACHE] == 1

    @property
    def wants_namespace_notices(self) -> bool:
        return bool(self._values[ASYNC_EVENTS] & NAMESPACE_NOTICE)

    def get(self, dword10: int, dword11: int) -> int:
        """Dword 0 of the completion. Raises CommandError."""
        feature, select = dword10 & 0xFF, dword10 >> 8 & 7
        if select > CAPABILITIES or feature not in _KEPT.keys() | {QUEUE_COUNT, VECTOR}:
            raise CommandError(INVALID_FIELD)
        if select == CAPABILITIES:
            return CHANGEABLE
        if feature == QUEUE_COUNT:
            return (self.queues - 1) * 0x1_0001
        if feature == VECTOR:
            vector = self._vector(dword11)
            return vector | (_COALESCING_OFF if select == CURRENT and vector in self._uncoalesced else 0)
        if feature == TEMPERATURE_THRESHOLD and dword11 & _UNDER_THRESHOLD:
            return self._under if select == CURRENT else 0
        return self._values[feature] if select == CURRENT else _KEPT[feature][1]

    def set(self, dword10: int, dword11: int) -> int:
        """Dword 0 of the completion. Raises CommandError; nothing has changed then."""
        feature = dword10 & 0xFF
        if feature not in _KEPT.keys() | {QUEUE_COUNT, VECTOR}:
            raise CommandError(INVALID_FIELD)
        if dword10 & SAVE:
            raise CommandError(NOT_SAVEABLE)
        if feature == QUEUE_COUNT:
            wanted = dword11 & 0xFFFF, dword11 >> 16
            if 0xFFFF in wanted:
                raise CommandError(INVALID_FIELD)
            return min(wanted[0], self.queues - 1) | min(wanted[1], self.queues - 1) << 16
        if feature == VECTOR:
            vector = self._vector(dword11)
            (self._uncoalesced.add if dword11 & _COALESCING_OFF else self._uncoalesced.discard)(vector)
            return 0
        if feature == POWER_MANAGEMENT and dword11 & 0x1F:  # there is one power state
            raise CommandError(INVALID_FIELD)
        if feature == TEMPERATURE_THRESHOLD and dword11 >> 16 & 0xF not in (0, 0xF):  # of a sensor that is not there
            raise CommandError(INVALID_FIELD)
        if feature == TEMPERATURE_THRESHOLD and dword11 >> 20 & 3 > 1:
            raise CommandError(INVALID_FIELD)
        if feature == ERROR_RECOVERY and dword11 & 1 << 16:  # DULBE: no error tells of deallocated blocks
            raise CommandError(NOT_CHANGEABLE)
        if feature == TEMPERATURE_THRESHOLD and dword11 & _UNDER_THRESHOLD:
            self._under = dword11 & 0xFFFF
        else:
            self._values[feature] = dword11 & _KEPT[feature][0]
        return 0

    def _vector(self, dword11: int) -> int:
        if (vector := dword11 & 0xFFFF) >= self.vectors:
            raise CommandError(INVALID_FIELD)
        return vector
