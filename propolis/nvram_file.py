"""The file of a VM's firmware variables: made from a template at its first start, and then its own."""

import os
from contextlib import suppress

from propolis.atomic_file import HALF_WRITTEN
from propolis.disk_image import open_image
from propolis.errors import BackendError, ImageError

MAX_TEMPLATE = 16 << 20


def open_nvram(path: str, template: str | None) -> int:
    """A descriptor, locked for writing, of a file that is made from the template where it is missing.

    Raises ImageError where there is neither, BusyError where another VM has it, BackendError.
    """
    if template is not None and not os.path.lexists(path):
        _make(path, template)
    return open_image(path, what="nvram")


def _make(path: str, template: str) -> None:
    """Whole and on the disk before it has its name; a file that appears there meanwhile stays.

    Until then it is called NAME.new. One that a process left which was killed is made anew.
    """
    try:
        fd = os.open(template, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(fd, "rb") as file:
            content = file.read(MAX_TEMPLATE)
    except OSError as error:
        raise ImageError(f"open nvram_template {template!r}: {error.strerror}") from error
    folder, name = os.path.split(os.path.abspath(path))
    new = name + HALF_WRITTEN
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(FileNotFoundError):
                os.unlink(new, dir_fd=directory)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            with open(os.open(new, flags, 0o600, dir_fd=directory), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            with suppress(FileExistsError):
                os.link(new, name, src_dir_fd=directory, dst_dir_fd=directory)
            os.unlink(new, dir_fd=directory)
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise BackendError(f"make nvram {path!r}: {error.strerror}") from error
