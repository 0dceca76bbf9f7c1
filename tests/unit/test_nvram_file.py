"""The file of firmware variables: how it is made."""

import os
from pathlib import Path

from propolis.nvram_file import open_nvram


def test_what_a_killed_process_left_is_made_anew(tmp_path: Path) -> None:
    """And nothing but the file is there afterwards."""
    template = tmp_path / "template"
    template.write_bytes(b"variables")
    (tmp_path / "vm.nvram.new").write_bytes(b"vari")
    os.close(open_nvram(str(tmp_path / "vm.nvram"), str(template)))
    assert (tmp_path / "vm.nvram").read_bytes() == b"variables"
    assert sorted(os.listdir(tmp_path)) == ["template", "vm.nvram"]
