"""Files that are replaced as a whole: whoever reads one finds the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import os

HALF_WRITTEN = ".new"  # after the name, while it is written


def replace_file(folder: int, name: str, data: bytes, *, is_lasting: bool = True) -> None:
    """Writes a file of the open folder, for this user alone. If `is_lasting`, it is on the disk when this returns.

    Raises OSError, and what was there before still is.
    """
    new = name + HALF_WRITTEN
    try:
        with contextlib.suppress(FileNotFoundError):  # not opened anew: whatever has that name must not be followed
            os.unlink(new, dir_fd=folder)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        with os.fdopen(fd, "wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            if is_lasting:
                os.fsync(fd)
        os.rename(new, name, src_dir_fd=folder, dst_dir_fd=folder)
        if is_lasting:
            os.fsync(folder)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(new, dir_fd=folder)
        raise
