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


class FieldError(ConfigError):
    """Fields of a request that cannot be used: each by its JSON pointer in the body, and what was expected there."""

    code = "field"

    def __init__(self, problems: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{pointer or 'the body'}: {message}" for pointer, message in problems))
        self.problems = problems

    @property
    def pointer(self) -> str:
        """The place of the first problem."""
        return self.problems[0][0]


class ImageError(PropolisError):
    """A kernel, initrd or disk image that cannot be used: names the file and the field."""

    code = "image"
    status = 400


class StateError(PropolisError):
    """A request that the present state of the VM, which is named in `state` where known, does not admit."""

    code = "state"
    status = 409
    state: str | None = None


class ForbiddenStateError(StateError):
    """The same as Propolis API 5.0.0 reports it."""

    status = 403


class NoInstanceError(PropolisError):
    """There is no VM, or none any more."""

    code = "NoInstance"
    status = 424


class UnreachableGenerationError(PropolisError):
    """A generation that the state of a VM that is over will never reach."""

    code = "NoInstance"
    status = 410


class AlreadyInitializedError(PropolisError):
    """A second VM where there can be one."""

    code = "AlreadyInitialized"
    status = 409


class NotFoundError(PropolisError):
    """Nothing of that name."""

    code = "NotFound"
    status = 404


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
