"""A bootrom of a few instructions: where it begins, what it finds, that it cannot be changed, and a reset from it."""

from pathlib import Path

import pytest

from tests.machine import tiny
from tests.machine.guest import Guest

pytestmark = [pytest.mark.kvm, pytest.mark.program]

SIZE = 0x1_0000
START = 0xE000
CONFIG = """\
[main]
name = "{name}"
cpus = 3
memory = 64
bootrom = "rom"
"""


def rom() -> bytes:
    """Prints, resets the machine once, and powers it off."""
    first = bytes.fromhex(
        "ba f8 03 b0 61 ee"  # print an "a"
        "2e c6 06 00 e0 f4"  # mov byte cs:[START], hlt: the next start would end there
        "ba 10 05 b8 05 00 ef"  # select the number of processors
        "ba 11 05 ec 04 30 ba f8 03 ee"  # and print it
        "b0 50 e6 70 e4 71 3c 07"  # is a byte of the clock's memory, which outlives a reset, 7?
    )
    again = bytes.fromhex("b0 50 e6 70 b0 07 e6 71 ba f9 0c b0 06 ee f4 eb fd")  # make it that, and reset
    end = bytes.fromhex("ba fd 03 ec a8 01 74 fb ba 04 b0 b8 00 20 ef f4 eb fd")  # to S5, once a key was typed
    code = first + b"\x74" + bytes([len(again)]) + again + end
    image = bytearray(b"\xf4" * SIZE)
    image[START : START + len(code)] = code
    image[0xFFF0:0xFFF3] = b"\xe9" + (START - 0xFFF3 & 0xFFFF).to_bytes(2, "little")
    return bytes(image)


async def test_from_the_reset_vector(tmp_path: Path) -> None:
    (tmp_path / "rom").write_bytes(rom())
    (tmp_path / "vm.toml").write_text(CONFIG.format(name=tiny.NAME))
    async with Guest([*tiny.PROGRAM, "vm.toml"], tmp_path) as vm:
        await vm.expect("a3a3", 20, "two lives of the guest")
        await vm.send("x")
        assert await vm.exit_status(20) == 0


def keeping_rom() -> bytes:
    """8 KiB that find the flash below them, erase it, program a letter, and print what they see of each."""
    flash = "2e c6 06 {:02x} d0 {:02x}"  # mov byte cs:[0xD000 + offset], command
    show = "2e a0 {:02x} d0 ba f8 03 {} ee"  # mov al, cs:[0xD000 + offset]; print it
    code = bytes.fromhex(
        " ".join(
            (
                show.format(1, ""),  # what a template left there
                flash.format(0, 0x50) + flash.format(0, 0x70) + show.format(0, "04 30"),  # status 0: "0"
                flash.format(0, 0x20) + flash.format(0, 0xD0) + flash.format(0, 0xFF),
                show.format(1, "2c 80"),  # 0xFF: "\x7f"
                flash.format(1, 0x10) + flash.format(1, ord("k")) + flash.format(1, 0xFF) + show.format(1, ""),
                "ba fd 03 ec a8 01 74 fb ba 04 b0 b8 00 20 ef f4 eb fd",  # to S5, once a key was typed
            )
        )
    )
    image = bytearray(code.ljust(0x2000, b"\xf4"))
    image[0x1FF0:0x1FF3] = b"\xe9" + (START - 0xFFF3 & 0xFFFF).to_bytes(2, "little")
    return bytes(image)


async def test_what_firmware_keeps(tmp_path: Path) -> None:
    """The file is made from its template, and a second life finds what the first one left."""
    (tmp_path / "rom").write_bytes(keeping_rom())
    (tmp_path / "template").write_bytes(b"t" * 4096)
    text = CONFIG.format(name=tiny.NAME) + 'nvram = "vm.nvram"\nnvram_template = "template"\n'
    (tmp_path / "vm.toml").write_text(text)
    for left in ("t", "k"):
        async with Guest([*tiny.PROGRAM, "vm.toml"], tmp_path) as vm:
            await vm.expect(f"{left}0\x7fk", 20, "what the guest sees of its flash")
            assert (tmp_path / "vm.nvram").read_bytes() == b"\xffk" + b"\xff" * 4094
            await vm.send("x")
            assert await vm.exit_status(20) == 0


def test_a_bootrom_that_cannot_be_one(tmp_path: Path) -> None:
    """One line says which file and why."""
    (tmp_path / "rom").write_bytes(bytes(5000))
    (tmp_path / "vm.toml").write_text(CONFIG.format(name=tiny.NAME))
    ended = tiny.run(tmp_path)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].endswith(
        "rom': size: 5000 bytes, expected whole pages of 4 KiB and at most 16 MiB"
    )


def test_a_bootrom_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "vm.toml").write_text(CONFIG.format(name=tiny.NAME))
    ended = tiny.run(tmp_path)
    assert ended.returncode == 1
    assert "open bootrom" in ended.stderr.splitlines()[-1]
    assert "No such file" in ended.stderr.splitlines()[-1]
