"""What a VM boots, as TOML has it: keys of one table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from propolis import spec as model
from propolis.toml_table import text

if TYPE_CHECKING:
    from collections.abc import Callable

    from propolis.toml_table import Table


def take_boot(table: Table, path: Callable[[object], str]) -> model.Boot | None:
    """None where there is neither a bootrom nor a kernel; with both it is the firmware that starts the kernel."""
    bootrom = table.take("bootrom", path, None)
    kernel = table.take("kernel", path, None)
    initrd = table.take("initrd", path, None)
    cmdline = table.take("cmdline", text, "")
    nvram = table.take("nvram", path, None)
    template = table.take("nvram_template", path, None)
    if "kernel" not in table:
        for key in ("initrd", "cmdline"):
            if key in table:
                table.wrong(key, f"{key!r} is given without 'kernel'", is_key=True)
        initrd, cmdline = None, ""
    if "bootrom" in table:
        return model.FirmwareBoot(
            bootrom=bootrom or "?",
            nvram=nvram,
            nvram_template=template,
            kernel=kernel,
            initrd=initrd,
            cmdline=cmdline,
        )
    for key in ("nvram", "nvram_template"):
        if key in table:
            table.wrong(key, f"{key!r} is given without 'bootrom'", is_key=True)
    return model.DirectBoot(kernel=kernel or "?", initrd=initrd, cmdline=cmdline) if "kernel" in table else None
