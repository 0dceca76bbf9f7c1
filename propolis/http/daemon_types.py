"""The wire types of the routes that only the daemon has: the set of VMs, and how each is kept."""

from __future__ import annotations

import uuid  # noqa: TC003 -- msgspec reads it
from typing import Annotated

from msgspec import Meta

from propolis.http import v5
from propolis.store import Restart  # noqa: TC001 -- msgspec reads it

MAX_PAGE = 1000


class InstanceEntry(v5.Reply, frozen=True):
    """A VM in the list."""

    name: str
    uuid: uuid.UUID
    state: v5.InstanceState
    paused: bool
    generation: v5.U64
    cpus: int
    memory_mib: int
    created: float
    autostart: bool
    restart: Restart
    detail: str | None = None


class InstanceList(v5.Reply, frozen=True):
    """VMs by name; there are more after `next`, where it is there."""

    instances: tuple[InstanceEntry, ...]
    next: str | None = None


class InstanceReply(v5.Reply, frozen=True):
    """One VM; of one that failed, the end of its log too."""

    instance: v5.Instance
    name: str
    uuid: uuid.UUID
    generation: v5.U64
    created: float
    autostart: bool
    restart: Restart
    restarts: int = 0
    starts_again_in: float | None = None
    log: tuple[str, ...] | None = None


class ListQuery(v5.Wire, frozen=True):
    """A page of the list: the VMs whose names come after this one."""

    after: str = ""
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE)] = MAX_PAGE


class Keeping(v5.Wire, frozen=True):
    """How the daemon is to keep a VM; what is left out stays as it is."""

    autostart: bool | None = None
    restart: Restart | None = None


class DeleteQuery(v5.Wire, frozen=True):
    """With `force` also a VM that runs."""

    force: bool = False


class VersionReply(v5.Reply, frozen=True):
    """What this is, and which versions of the API it serves."""

    name: str
    version: str
    api: tuple[str, ...]


class HealthReply(v5.Reply, frozen=True):
    """Whether the daemon serves."""

    status: str
