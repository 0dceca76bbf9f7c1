"""The host's files that a VM's spec names: which they are, whether the VM may have them, how far they reach."""

from __future__ import annotations

import contextlib
import functools
import os

from propolis.errors import ConfigError, ForbiddenError
from propolis.spec import (
    CLOUD_INIT_VOLUME_BYTES,
    NVRAM_MAX_BYTES,
    BlobBlock,
    CloudInit,
    FileBlock,
    FirmwareBoot,
    Spec,
    boot_files,
)


def paths_of(spec: Spec) -> list[str]:
    """The files that a VM needs, and the sockets that it has."""
    nvram = [spec.boot.nvram, spec.boot.nvram_template] if isinstance(spec.boot, FirmwareBoot) else []
    return [*boot_files(spec.boot), *filter(None, nvram), *(file.path for file in spec.files()), *spec.sockets()]


def check_paths(spec: Spec, allowed: tuple[str, ...] | None) -> None:
    """Raises ConfigError for a relative path, ForbiddenError for one outside the allowed directories."""
    for path in paths_of(spec):
        if not os.path.isabs(path):
            raise ConfigError(f"path {path[:200]!r}: expected an absolute one")
        if allowed is not None and not any(_is_below(os.path.realpath(path), _real(folder)) for folder in allowed):
            raise ForbiddenError(f"path {path[:200]!r}: it is in none of [server] allowed_directories")


def largest_file(spec: Spec) -> int:
    """How far a file needs to reach that the worker of a VM writes to, in bytes: a disk, or memory with a name.

    Disks that are devices have their size by nature. What is not there is missed by whoever opens it.
    """
    sizes = [0 if spec.memory_backing == "anonymous" else spec.memory_mib << 20]
    if isinstance(spec.boot, FirmwareBoot) and spec.boot.nvram is not None:
        sizes.append(NVRAM_MAX_BYTES)
    for backend in spec.backends.values():
        if isinstance(backend, BlobBlock):
            sizes.append(len(backend.content))
        elif isinstance(backend, CloudInit):
            sizes.append(CLOUD_INIT_VOLUME_BYTES)
        elif isinstance(backend, FileBlock) and not backend.readonly:
            with contextlib.suppress(OSError):
                sizes.append(os.stat(backend.path).st_size)
    return max(sizes)


@functools.cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder
