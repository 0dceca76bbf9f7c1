"""The name of a listening unix socket: taken over where it is stale, refused where another program listens there.

Programs that do this take turns by a lock on the folder, so that none takes a name from under another.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import socket
import stat
import time

from propolis.errors import BackendError, BusyError

_BACKLOG = 128
_FOLDER_LOCK_TRIES = 200
_FOLDER_LOCK_PAUSE = 0.01


class UnixName:
    """One such name; `what` is what messages call the socket."""

    def __init__(self, path: str, what: str) -> None:
        self.path = os.path.abspath(path)
        self._what = what
        self._folder = -1
        self._inode: tuple[int, int] | None = None

    @property
    def is_taken(self) -> bool:
        """Whether it is ours now."""
        return self._folder >= 0

    async def take(self, mode: int, *, group: int = -1, backlog: int = _BACKLOG) -> socket.socket:
        """A listening socket under this name; BusyError where another program listens there."""
        try:
            self._folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            await self._lock_folder(self._folder)
            try:
                return self._listen(mode, group, backlog)
            finally:
                fcntl.flock(self._folder, fcntl.LOCK_UN)
        except OSError as error:
            await self.release()
            raise BackendError(f"open {self._what} {self.path!r}: {error.strerror or error}") from error
        except BaseException:
            await self.release()
            raise

    async def release(self) -> None:
        """Remove the name, if it is still ours; twice is fine."""
        folder, inode = self._folder, self._inode
        if folder < 0:
            return
        self._folder, self._inode = -1, None
        try:
            if inode is not None:
                await self._lock_folder(folder)
                self._remove(folder, inode)
        except (OSError, BusyError):
            pass  # gone already, or left as a stale name that the next one replaces
        finally:
            os.close(folder)

    def take_now(self, mode: int, *, backlog: int = _BACKLOG) -> socket.socket:
        """take() where no loop runs: waits in place while another program has the folder locked."""
        try:
            self._folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._lock_folder_now(self._folder)
            try:
                return self._listen(mode, -1, backlog)
            finally:
                fcntl.flock(self._folder, fcntl.LOCK_UN)
        except OSError as error:
            self.release_now()
            raise BackendError(f"open {self._what} {self.path!r}: {error.strerror or error}") from error
        except BaseException:
            self.release_now()
            raise

    def release_now(self) -> None:
        """release() where no loop runs."""
        folder, inode = self._folder, self._inode
        if folder < 0:
            return
        self._folder, self._inode = -1, None
        try:
            if inode is not None:
                self._lock_folder_now(folder)
                self._remove(folder, inode)
        except (OSError, BusyError):
            pass  # as above
        finally:
            os.close(folder)

    def _remove(self, folder: int, inode: tuple[int, int]) -> None:
        name = os.path.basename(self.path)
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if (status.st_dev, status.st_ino) == inode:
            os.unlink(name, dir_fd=folder)

    def _listen(self, mode: int, group: int, backlog: int) -> socket.socket:
        """The caller holds the folder's lock, so nobody else does this now."""
        name = os.path.basename(self.path)
        self._refuse_live(name)
        made = f".{name}.new"
        with contextlib.suppress(FileNotFoundError):  # left by a program that was killed just here
            os.unlink(made, dir_fd=self._folder)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # Through the folder's descriptor, because a socket's path may be 107 bytes long and folders are longer.
            listener.bind(self._within_folder(made))
            if group >= 0:
                os.chown(made, -1, group, dir_fd=self._folder, follow_symlinks=False)
            os.chmod(made, mode, dir_fd=self._folder)
            listener.listen(backlog)
            os.rename(made, name, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            status = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except BaseException:
            listener.close()
            with contextlib.suppress(OSError):
                os.unlink(made, dir_fd=self._folder)
            raise
        self._inode = (status.st_dev, status.st_ino)
        return listener

    def _refuse_live(self, name: str) -> None:
        try:
            status = os.stat(name, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(status.st_mode):
            raise BusyError(f"open {self._what} {self.path!r}: there is something that is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            result = probe.connect_ex(self._within_folder(name))
        # A full queue is a sign of life too, and so is everything else but a refusal.
        if result not in (errno.ECONNREFUSED, errno.ENOENT):
            raise BusyError(f"open {self._what} {self.path!r}: another program listens there")

    def _within_folder(self, name: str) -> str:
        return f"/proc/self/fd/{self._folder}/{name}"

    async def _lock_folder(self, folder: int) -> None:
        """Take turns with other programs that put a socket into this folder or take one out; none does for long."""
        for _ in range(_FOLDER_LOCK_TRIES):
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                await asyncio.sleep(_FOLDER_LOCK_PAUSE)
            else:
                return
        raise self._locked()

    def _lock_folder_now(self, folder: int) -> None:
        for _ in range(_FOLDER_LOCK_TRIES):
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_FOLDER_LOCK_PAUSE)
            else:
                return
        raise self._locked()

    def _locked(self) -> BusyError:
        return BusyError(f"open {self._what} {self.path!r}: another program keeps its folder locked")
