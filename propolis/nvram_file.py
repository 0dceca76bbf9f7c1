"""The file of a VM's firmware variables: made from a template at its first start, and then its own."""

import os
from contextlib import suppress

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

    Before that it has none (open(2), O_TMPFILE): where this process is killed, nothing is left to be cleared away.
    """
    try:
        fd = os.open(template, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        with open(fd, "rb") as file:
            content = file.read(MAX_TEMPLATE)
    except OSError as error:
        raise ImageError(f"open nvram_template {template!r}: {error.strerror}") from error
    folder, name = os.path.split(os.path.abspath(path))
    try:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = os.open(".", os.O_WRONLY | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=directory)
            with open(fd, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(fd)
                with suppress(FileExistsError):  # by linkat, as it follows links only where it has a directory
                    os.link(f"/proc/self/fd/{fd}", name, src_dir_fd=directory, dst_dir_fd=directory)
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise BackendError(f"make nvram {path!r}: {error.strerror}") from error
