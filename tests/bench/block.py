"""Two VMMs, ours and QEMU, that run block_guest.c on the same file: one measures while the other is stopped."""

import ctypes
import mmap
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.machine.tiny import PROGRAM, TREE, disk, write

READY_WITHIN = 60.0  # seconds
BLOCK = 4096


def build_guest(directory: Path) -> Path:
    """The guest's kernel."""
    kernel = directory / "block_guest"
    flags = "-O2 -Wall -Wextra -ffreestanding -fno-pic -no-pie -nostdlib -static -mno-red-zone -mgeneral-regs-only"
    flags += " -fno-stack-protector -fcf-protection=none -fno-asynchronous-unwind-tables"
    flags += " -Wl,-Ttext-segment=0x100000,--build-id=none,-z,noseparate-code"
    source = Path(__file__).with_name("block_guest.c")
    subprocess.run(["cc", *flags.split(), "-o", kernel, source], check=True, stderr=subprocess.DEVNULL)
    return kernel


def make_image(path: Path, size: int, block: int = BLOCK) -> None:
    """A file in which each block begins with its offset; all of it is in the page cache afterwards."""
    with path.open("wb") as file:
        for base in range(0, size, 1 << 20):
            part = bytearray(os.urandom(block) * ((1 << 20) // block))
            for offset in range(0, 1 << 20, block):
                part[offset : offset + 8] = (base + offset).to_bytes(8, "little")
            file.write(part)
        os.fsync(file.fileno())


class Measured(NamedTuple):
    """What the guest saw, and what the host paid."""

    microseconds: float  # of each request, when the whole is divided by their number
    kicks: float  # of each request
    host_cpu: float  # microseconds of the process's CPU time for each request, the guest's own included


class Vmm:
    """A VMM that waits for work, stopped."""

    def __init__(self, argv: list[str], directory: Path, console: str) -> None:
        self._log = (directory / f"{console}.log").open("wb")
        self._process = subprocess.Popen(argv, cwd=directory, stdout=self._log, stderr=self._log)
        self._socket = socket.socket(socket.AF_UNIX)
        self._input = b""
        try:
            self._connect(directory / console)
            greeting = self._line(READY_WITHIN)
            assert greeting == "ready", greeting
            self.stop()
        except BaseException:
            self.close()
            print((directory / f"{console}.log").read_text())
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _connect(self, path: Path) -> None:
        deadline = time.monotonic() + READY_WITHIN
        while self._socket.connect_ex(os.fspath(path)):
            assert time.monotonic() < deadline, f"no {path}"
            assert self._process.poll() is None, "the VMM has ended"
            time.sleep(0.01)

    def _line(self, within: float) -> str:
        self._socket.settimeout(within)
        while b"\n" not in self._input:
            more = self._socket.recv(4096)
            assert more, "the VMM has ended"
            self._input += more
        line, _, self._input = self._input.partition(b"\n")
        return line.decode(errors="replace").strip()

    def stop(self) -> None:
        """Keeps all its threads from running."""
        self._process.send_signal(signal.SIGSTOP)

    def measure(self, kind: str, size: int, depth: int, count: int) -> Measured:
        """Runs `count` requests."""
        self._process.send_signal(signal.SIGCONT)
        before = self._cpu_time()
        self._socket.sendall(f"{kind} {size} {depth} {count}\n".encode())
        ticks, kicks = map(int, self._line(120).split())
        used = self._cpu_time() - before
        self.stop()
        return Measured(ticks / tsc_frequency() * 1e6 / count, kicks / count, used * 1e6 / count)

    def _cpu_time(self) -> float:
        """Seconds, of all its threads."""
        tasks = Path(f"/proc/{self._process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9

    def close(self) -> None:
        """Ends it."""
        self._socket.close()
        self._process.kill()
        self._process.wait()
        self._log.close()


def ours(directory: Path, kernel: Path, image: Path, options: str = "") -> Vmm:
    """propolis-standalone."""
    write(directory, kernel.read_bytes(), name="bench-block", more=disk(str(image), options=options), file="ours.toml")
    (directory / "ours.toml").write_text((directory / "ours.toml").read_text().replace("memory = 64", "memory = 256"))
    return Vmm([*PROGRAM, "ours.toml"], directory, "ttya")


def qemu(directory: Path, kernel: Path, image: Path, options: str = "aio=io_uring") -> Vmm:
    """Debian's QEMU at its best: an I/O thread, io_uring."""
    program = subprocess.run([TREE / "scripts/debian-qemu"], check=True, capture_output=True, text=True).stdout.split()
    words = "-accel kvm -cpu host,-arch-capabilities -M pc -m 256 -nodefaults -display none -no-user-config"
    words += f" -kernel {kernel} -serial unix:qemu.ttya,server=on,wait=on -object iothread,id=io"
    words += f" -drive if=none,id=disk,format=raw,file={image},file.locking=off,{options}"
    words += " -device virtio-blk-pci,drive=disk,iothread=io,num-queues=1,queue-size=256,disable-legacy=on"
    return Vmm([*program, *words.split()], directory, "qemu.ttya")


def tsc_frequency() -> float:
    """Ticks a second, measured once."""
    global _frequency  # noqa: PLW0603 -- measured once
    if not _frequency:
        with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
            page.write(bytes.fromhex("0f 31 48 c1 e2 20 48 09 d0 c3"))  # rdtsc; shl rdx, 32; or rax, rdx; ret
            here = ctypes.c_char.from_buffer(page)
            read = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(here))
            first, then = read(), time.perf_counter()
            time.sleep(0.2)
            _frequency = (read() - first) / (time.perf_counter() - then)
            del here
    return _frequency


_frequency = 0.0
