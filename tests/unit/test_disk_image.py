"""Opening and locking images (BLK 51): who may share one, and who is named when somebody may not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from propolis.disk_image import lock_image, open_image
from propolis.errors import BackendError, BusyError, ImageError


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    return path


@contextmanager
def held(path: Path, *, read_only: bool = False) -> Iterator[int]:
    fd = open_image(str(path), read_only=read_only)
    try:
        yield fd
    finally:
        os.close(fd)


def test_the_descriptor(image: Path) -> None:
    with held(image) as fd:
        assert os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        os.pwrite(fd, b"x", 0)
    with held(image, read_only=True) as fd, pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(fd, b"x", 0)


@pytest.mark.parametrize(("first", "second"), [(False, False), (False, True), (True, False)])
def test_one_writer_and_nobody_else(image: Path, first: bool, second: bool) -> None:
    with held(image, read_only=first):
        wanted = "reading" if second else "writing"
        with pytest.raises(BusyError, match=rf"disk '.*disk.img' for {wanted}: in use by .*\(pid {os.getpid()}\)"):
            open_image(str(image), read_only=second)
    with held(image, read_only=second):
        pass


def test_many_readers(image: Path) -> None:
    with held(image, read_only=True), held(image, read_only=True):
        pass


def test_the_lock_goes_with_the_open_file(image: Path) -> None:
    with held(image) as fd:
        copy = os.dup(fd)
    with pytest.raises(BusyError):
        open_image(str(image))
    os.close(copy)
    with held(image):
        pass


def test_another_program_is_named(image: Path) -> None:
    program = (
        "import sys; from propolis.disk_image import open_image;"
        "fd = open_image(sys.argv[1]); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(BusyError, match=rf"in use by python[\d.]* \(pid {process.pid}\)"):
            open_image(str(image))
        process.kill()
    with held(image):
        pass


def test_a_lock_of_the_older_kind_is_named(image: Path) -> None:
    program = (
        "import fcntl, sys; file = open(sys.argv[1], 'r+b'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(BusyError, match=rf"\(pid {process.pid}\)"):
            open_image(str(image))
        process.kill()


def test_images_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"open disk '.*/none': No such file or directory"):
        open_image(str(tmp_path / "none"))
    with pytest.raises(ImageError, match="Is a directory"):
        open_image(str(tmp_path))


def test_a_fifo_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    os.close(open_image(str(tmp_path / "fifo"), read_only=True))  # the backend refuses it


def test_a_descriptor_that_cannot_be_locked(image: Path) -> None:
    fd = os.open(image, os.O_RDONLY)
    with pytest.raises(BackendError, match=r"lock x: Bad file descriptor"):
        lock_image(fd, "x", exclusive=True)
    os.close(fd)
