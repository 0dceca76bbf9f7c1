"""A FUSE file system of one file, which stops to answer when it is told to: `fuse_file.py FUSE CONTROL CONTENT`.

FUSE is an open /dev/fuse (linux/fuse.h), CONTROL a socket that keeps messages apart, CONTENT a file with what it has.
On CONTROL come numbers of requests that are not to be answered from now on, or none: all are, also those that wait. It
says "held" where one waits. It is a process of its own: whoever waits for it may have the interpreter's lock.
"""

import errno
import os
import select
import socket
import struct
import sys
from pathlib import Path

LOOKUP, GETATTR, OPEN, READ, WRITE, FSYNC, INIT = 1, 3, 14, 15, 16, 20, 26
_RELEASE, _FLUSH = 18, 25
_FORGET, _INTERRUPT, _BATCH_FORGET = 2, 36, 42  # which nobody waits for

NAME = "file"
_HEADER = struct.Struct("=IIQQIII4x")  # length, opcode, unique, node; of the caller: uid, gid, pid
_ROOT, _FILE = 1, 2
_MAX_REQUEST = 1 << 20
_DIRECT_IO = 1
_FOR_EVER = 3600


class _Server:
    def __init__(self, fuse: int, control: socket.socket, content: bytes) -> None:
        self._fuse = fuse
        self._control = control
        self._content = bytearray(content)
        self._hanging: tuple[int, ...] = ()
        self._waiting: list[bytes] = []

    def run(self) -> None:
        """Until the other end of the control socket is closed."""
        while True:
            ready, _, _ = select.select([self._fuse, self._control.fileno()], [], [])
            if self._control.fileno() in ready:
                command = self._control.recv(100)
                if not command:
                    return
                self._hanging = tuple(map(int, command.split()))
                while not self._hanging and self._waiting:
                    self._answer(self._waiting.pop())
                self._control.send(b"done")
            else:
                request = os.read(self._fuse, _MAX_REQUEST)
                if _HEADER.unpack_from(request)[1] in self._hanging:
                    self._waiting.append(request)
                    self._control.send(b"held")
                else:
                    self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = _HEADER.unpack_from(request)
        if opcode in (_FORGET, _INTERRUPT, _BATCH_FORGET):
            return
        answer = self._do(opcode, node, request[_HEADER.size :])
        code, body = (answer, b"") if isinstance(answer, int) else (0, answer)
        os.write(self._fuse, struct.pack("=IiQ", 16 + len(body), -code, unique) + body)

    def _do(self, opcode: int, node: int, body: bytes) -> bytes | int:
        """What was asked for, or an error's number."""
        if opcode == INIT:
            return struct.pack("=4I2H2I2H8I", 7, 31, 0, 0, 1, 1, 65536, 1, 16, *[0] * 9)
        if opcode == LOOKUP and body == NAME.encode() + b"\0":
            return struct.pack("=4Q2I", _FILE, 0, _FOR_EVER, _FOR_EVER, 0, 0) + self._attributes(_FILE)
        if opcode == LOOKUP:
            return errno.ENOENT
        if opcode == GETATTR:
            return struct.pack("=QII", _FOR_EVER, 0, 0) + self._attributes(node)
        if opcode == OPEN:
            return struct.pack("=QII", 0, _DIRECT_IO, 0)
        if opcode in (READ, WRITE):
            _, start, size = struct.unpack_from("=QQI", body)
            if opcode == READ:
                return bytes(self._content[start : start + size])
            self._content[start : start + size] = body[40 : 40 + size]
            return struct.pack("=II", size, 0)
        return b"" if opcode in (FSYNC, _FLUSH, _RELEASE) else errno.ENOSYS

    def _attributes(self, node: int) -> bytes:
        mode = 0o040700 if node == _ROOT else 0o100600
        size = 0 if node == _ROOT else len(self._content)
        return struct.pack("=6Q10I", node, size, *[0] * 7, mode, 1, os.getuid(), os.getgid(), 0, 4096, 0)


if __name__ == "__main__":
    _Server(int(sys.argv[1]), socket.socket(fileno=int(sys.argv[2])), Path(sys.argv[3]).read_bytes()).run()
