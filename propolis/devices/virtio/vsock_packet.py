"""The packets of a virtio socket (virtio 1.2 §5.10.6)."""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

HOST_CID = 2  # §5.10.4
STREAM = 1  # VIRTIO_VSOCK_TYPE_STREAM
SHUT_RECEIVE = 1  # who says so receives no more
SHUT_SEND = 2  # or sends no more
SHUT_BOTH = SHUT_RECEIVE | SHUT_SEND

_HEADER = struct.Struct("<QQIIIHHIII")
HEADER_BYTES = _HEADER.size


class Op(enum.IntEnum):
    """VIRTIO_VSOCK_OP_*."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Header(NamedTuple):
    """struct virtio_vsock_hdr; `op` and the rest are as they came, and may be anything."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    kind: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int

    @classmethod
    def parse(cls, data: bytes) -> Header | None:
        """None where it is not all there."""
        return cls(*_HEADER.unpack_from(data)) if len(data) >= HEADER_BYTES else None

    def pack(self) -> bytes:
        return _HEADER.pack(*self)

    def reset(self) -> Header:
        """What answers this one where there is no such connection."""
        return Header(self.dst_cid, self.src_cid, self.dst_port, self.src_port, 0, self.kind, Op.RST, 0, 0, 0)
