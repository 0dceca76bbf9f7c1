"""The volume for cloud-init, as programs that know FAT read it: mtools, fsck.fat and blkid."""

import subprocess
from pathlib import Path

import pytest

from propolis.backends.block import fat, nocloud

USER = "#cloud-config\nusers:\n  - name: jürgen\n"
NETWORK = "version: 2\nethernets:\n  nic0:\n    dhcp4: true\n"


def run(*command: str) -> bytes:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


def read(image: Path, name: str) -> bytes:
    return run("mtype", "-i", str(image), f"::{name}")


def check(image: Path) -> None:
    """fsck.fat finds nothing to mend."""
    result = subprocess.run(["/usr/sbin/fsck.fat", "-n", image], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert len(result.stdout.splitlines()) == 2, result.stdout  # its version, and how full the volume is


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return tmp_path / "image"


def test_the_files_are_there_by_their_names(image: Path) -> None:
    meta = "instance-id: i-1\n" * 100  # more than one cluster, in the middle
    image.write_bytes(nocloud.volume("web", USER, meta, NETWORK))
    check(image)
    listed = run("mdir", "-b", "-i", str(image), "::").decode().split()
    assert listed == ["::/meta-data", "::/user-data", "::/network-config"]
    assert read(image, "user-data") == USER.encode()
    assert read(image, "meta-data") == meta.encode()
    assert read(image, "network-config") == NETWORK.encode()


def test_it_is_found_by_its_label(image: Path) -> None:
    image.write_bytes(nocloud.volume("web", USER))
    tags = run("/usr/sbin/blkid", "-p", "-o", "export", str(image)).decode().splitlines()
    assert {"LABEL=CIDATA", "TYPE=vfat", "VERSION=FAT12"} <= set(tags)


@pytest.mark.parametrize("name", ["web", "1.5", "true"])
def test_without_meta_data_the_guest_is_called_as_its_vm(image: Path, name: str) -> None:
    image.write_bytes(nocloud.volume(name, ""))
    check(image)
    assert read(image, "meta-data").decode() == f'instance-id: "{name}"\nlocal-hostname: "{name}"\n'
    assert read(image, "user-data") == b""
    assert "::/network-config" not in run("mdir", "-b", "-i", str(image), "::").decode()


def test_the_same_texts_make_the_same_volume() -> None:
    assert nocloud.volume("web", USER, "a: 1", NETWORK) == nocloud.volume("web", USER, "a: 1", NETWORK)
    assert nocloud.volume("web", USER, "a: 1") != nocloud.volume("web", USER, "a: 2")


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 340 * 512, 341 * 512, fat.MAX_CLUSTERS * fat.SECTOR])
def test_files_of_any_size(image: Path, size: int) -> None:
    """Up to a full volume; one of 340 clusters has the last FAT that is a single sector."""
    content = bytes(index % 251 for index in range(size))
    image.write_bytes(fat.volume("L", {"a file": content}))
    check(image)
    assert read(image, "a file") == content


def test_what_has_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="a volume has room for 2091008"):
        fat.volume("L", {"a": bytes(fat.MAX_CLUSTERS * fat.SECTOR), "b": b"x"})
    with pytest.raises(ValueError, match="17 directory entries: a volume has room for 16"):
        fat.volume("L", {f"file {number}": b"" for number in range(8)})


@pytest.mark.parametrize("length", [1, 12, 13, 14, 26, 27])
def test_long_names_of_any_length(image: Path, length: int) -> None:
    name = "n" * (length - 1) + "ü"
    image.write_bytes(fat.volume("L", {name: b"x", f"{name}2": b"y"}))
    check(image)
    assert read(image, name) == b"x"
    assert read(image, f"{name}2") == b"y"
