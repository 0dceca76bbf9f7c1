"""make_rig, as the tests of devices have it."""

from tests.unit.devices.virtio.conftest import make_rig

__all__ = ["make_rig"]
