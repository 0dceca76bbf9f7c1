"""The Linux guest of scripts/guest-image as a virtual machine: its files, its TOML, and a Guest to drive it."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tests.machine.guest import Guest

TREE = Path(__file__).resolve().parents[2]
IMAGES = TREE / "build/guest"

TIMEOUT = 480 + 60 * int(os.environ.get("ROUNDS", "2"))
"""Seconds that a test of a Linux guest may take, its boots included: half a minute each in the lab."""

CONFIG = """\
[main]
name = "{name}"
cpus = {cpus}
memory = {memory_mib}
kernel = "{kernel}"
initrd = "{initrd}"
cmdline = "{cmdline}"
{main}
[block_dev.root]
type = "file"
path = "disk.raw"

[dev.root]
driver = "pci-virtio-block"
block_dev = "root"
pci-path = "0.4.0"
{more}"""


def linux(
    directory: Path,
    *,
    name: str = "linux",
    cpus: int = 1,
    memory_mib: int = 256,
    kernel: str = "vmlinux",
    cmdline: str = "console=ttyS0 quiet",
    main: str = "",
    more: str = "",
    show: Callable[[str], None] | None = None,
) -> Guest:
    """Lay out a VM in `directory`: vm.toml and a disk of its own; `main` and `more` are further lines of TOML.

    `kernel` is vmlinux (entered by PVH, quick) or vmlinuz (Debian's bzImage). A disk that is already there is kept.
    """
    assert (IMAGES / "stamp").exists(), "no guest image: run scripts/guest-image"
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "disk.raw").exists():
        # A plain copy keeps no holes where the file system cannot share the blocks.
        shutil.copyfile(IMAGES / "disk.raw", directory / "disk.raw")
    text = CONFIG.format(
        name=name,
        cpus=cpus,
        memory_mib=memory_mib,
        kernel=IMAGES / kernel,
        initrd=IMAGES / "initrd",
        cmdline=cmdline,
        main=main,
        more=more,
    )
    (directory / "vm.toml").write_text(text)
    return Guest([Path(sys.executable).with_name("propolis-standalone"), "vm.toml"], directory, show=show)
