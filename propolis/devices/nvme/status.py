"""Status of a completed command, as _status.pxd has it, and the exception that carries one out of a handler."""

INVALID_OPCODE = 0x001
INVALID_FIELD = 0x002
ID_CONFLICT = 0x003
INTERNAL_ERROR = 0x006
ABORTED = 0x007
INVALID_NAMESPACE = 0x00B
COMMAND_SEQUENCE = 0x00C
PRP_OFFSET = 0x013
INVALID_QUEUE_CQ = 0x100  # the completion queue that was named does not exist
INVALID_QUEUE_ID = 0x101
INVALID_QUEUE_SIZE = 0x102
ASYNC_LIMIT = 0x105
INVALID_VECTOR = 0x108
INVALID_LOG_PAGE = 0x109
INVALID_DELETION = 0x10C  # a completion queue that still has submission queues
NOT_SAVEABLE = 0x10D
NOT_CHANGEABLE = 0x10E
DO_NOT_RETRY = 0x4000


class CommandError(Exception):
    """A command that is answered with this status. Most would fail again, so the host is told not to retry."""

    def __init__(self, status: int, *, retry: bool = False) -> None:
        super().__init__(f"status {status:#x}")
        self.status = status if retry else status | DO_NOT_RETRY
