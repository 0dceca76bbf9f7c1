"""Opens what a jailed worker may not: /dev/kvm, images and disks. Hands out descriptors and open files, never paths.

A standalone VM is its own keeper; behind the daemon the keeper is a process of its own with this interface.
"""

import os
import stat
from io import FileIO

from propolis.disk_image import open_image
from propolis.errors import HypervisorError, ImageError
from propolis.host_network import open_network
from propolis.host_sockets import DirectConnector, HostListener
from propolis.nvram_file import open_nvram
from propolis.spec import Network


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe that is named by mistake must not wait for its other end. Of no effect on files."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY)


class LocalKeeper:
    """A keeper in the same process."""

    def open_hypervisor(self) -> int:
        """A descriptor of /dev/kvm, which the caller closes. Raises HypervisorError that says what to do."""
        path = "/dev/kvm"
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise HypervisorError(f"{path} does not exist: load the module kvm_intel or kvm_amd") from None
        except PermissionError:
            raise HypervisorError(f"{path}: permission denied: join the group kvm, or run as root") from None
        except OSError as error:
            raise HypervisorError(f"open {path}: {_reason(error)}") from error

    def open_image(self, path: str, what: str) -> FileIO:
        """A kernel or initrd, open for reading. Raises ImageError."""
        try:
            image = FileIO(path, opener=_open_without_waiting)  # unbuffered: loaders read straight into guest memory
        except OSError as error:
            raise ImageError(f"open {what} '{path}': {_reason(error)}") from error
        if not stat.S_ISREG(os.fstat(image.fileno()).st_mode):
            image.close()
            raise ImageError(f"open {what} '{path}': not a file")
        return image

    def open_disk(self, path: str, *, read_only: bool) -> int:
        """A locked descriptor of a raw file or block device, which the caller closes.

        Raises BusyError naming who holds it, ImageError where there is none, BackendError where it cannot be opened.
        """
        return open_image(path, read_only=read_only)

    def open_listener(self, path: str) -> HostListener:
        """A socket that listens at `path`; closed with the VM. Raises BusyError naming it, BackendError."""
        return HostListener(path)

    def open_connector(self, path: str) -> DirectConnector:
        """Who connects to the sockets at `path`, "_" and a number."""
        return DirectConnector(path)

    def open_nvram(self, path: str, template: str | None) -> int:
        """A locked descriptor of the file of a VM's firmware variables, which the caller closes.

        Raises BusyError naming who holds it, ImageError where there is none to be had, BackendError.
        """
        return open_nvram(path, template)

    def open_network(self, name: str, network: Network, queues: int) -> list[int]:
        """A descriptor for each of a card's pairs of queues, or one for all; the caller closes them.

        Opened again, it is a new one: of a tap by its name, or of another passt. Raises BackendError.
        """
        return open_network(network, queues)
