"""The keeper in the VM's own process: what it opens, and how it says what it cannot."""

import os
from pathlib import Path

import pytest

from propolis.errors import ImageError
from propolis.keeper import LocalKeeper


def test_an_image_is_open_for_reading_and_knows_its_name(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(b"content")
    with LocalKeeper().open_image(str(path), "kernel") as image:
        assert (image.name, image.mode, image.read()) == (str(path), "rb", b"content")
        assert not os.get_inheritable(image.fileno())


def test_what_is_no_file_is_no_image(tmp_path: Path) -> None:
    """And is told at once: a pipe has nobody at its other end."""
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("pipe", "not a file"), (".", "Is a directory"), ("missing", "No such file or directory")):
        with pytest.raises(ImageError) as raised:
            LocalKeeper().open_image(str(tmp_path / name), "initrd")
        assert str(raised.value) == f"open initrd '{tmp_path / name}': {reason}"
    with pytest.raises(ImageError, match="open kernel '/dev/null': not a file"):
        LocalKeeper().open_image("/dev/null", "kernel")
