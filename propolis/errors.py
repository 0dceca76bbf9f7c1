"""The one exception tree.

Every class carries a stable `code` for programs, an HTTP `status` for the API and a message for people: what was
tried, with what, and why it failed, in one line.
"""


class PropolisError(Exception):
    """Base of every error that Propolis raises on purpose."""

    code = "internal"
    status = 500


class ConfigError(PropolisError):
    """A configuration that cannot be used: names the place and what was expected there."""

    code = "config"
    status = 400


class ImageError(PropolisError):
    """A kernel, initrd or disk image that cannot be used: names the file and the field."""

    code = "image"
    status = 400


class StateError(PropolisError):
    """A request that the present state of the VM does not admit."""

    code = "state"
    status = 409


class PauseError(PropolisError):
    """The VM could not be brought to rest in time. It is as it was before, and runs on."""

    code = "not_paused"
    status = 503


class BusyError(PropolisError):
    """A name, socket, file or address that somebody else holds: names the holder."""

    code = "busy"
    status = 409


class HypervisorError(PropolisError):
    """The hypervisor is absent, refused a call or could not run the guest."""

    code = "hypervisor"
    status = 500


class GuestMemoryError(PropolisError):
    """A guest-physical range that is not wholly inside one region of the wanted access."""

    code = "guest_memory"
    status = 500


class BackendError(PropolisError):
    """A host resource behind a device failed: disk file, socket, descriptor."""

    code = "backend"
    status = 500


class JailError(PropolisError):
    """A worker that cannot be confined: names what the host lacks or refused."""

    code = "jail"
    status = 500


class UnauthorizedError(PropolisError):
    """A request without a token that is known."""

    code = "Unauthorized"
    status = 401


class ForbiddenError(PropolisError):
    """A request that this client may not make."""

    code = "Forbidden"
    status = 403
