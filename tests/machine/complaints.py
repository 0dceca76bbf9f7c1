"""What a Linux guest complains of: its kernel's warnings without those that allowed_complaints.toml excuses."""

import os
import re
import tomllib
from pathlib import Path

import msgspec

from tests.machine.guest import Guest, GuestError

ALLOWED = Path(__file__).with_name("allowed_complaints.toml")
IN_LAB = bool(os.environ.get("KVM_LAB"))

# Warnings and worse, and what is wrong whatever its level says.
SUSPECT = (
    "^<[0-4]>|(BIOS|Firmware|Hardware) [Bb]ug|BUG|WARNING|Call Trace|took [0-9]+ usecs"
    "|[Ff]ail|[Ee]rror|[Ii]nvalid\\b|[Cc]an't|[Cc]annot|[Cc]onflict|[Mm]ismatch|no compatible bridge window"
    "|[Uu]nstable|[Ss]kew|[Ww]atchdog|nobody cared|[Nn]ot responding|[Ll]ost|[Tt]imed out|[Dd]isabling"
)


class Allowed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line that may be there, as a regular expression, and why; `lab` where only the emulated machine excuses it."""

    line: str
    reason: str
    lab: bool = False


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    allow: list[Allowed]


def allowed() -> list[Allowed]:
    """The entries that count on this machine."""
    entries = msgspec.convert(tomllib.loads(ALLOWED.read_text()), _File).allow
    return [entry for entry in entries if IN_LAB or not entry.lab]


async def check_complaints(vm: Guest) -> None:
    """Suspect lines of the kernel's log that no entry allows; searched in the guest, whose console is slow."""
    found = await vm.run(f"dmesg -r | grep -E {_quoted(SUSPECT)}")
    patterns = [re.compile(entry.line) for entry in allowed()]
    lines = found.output.splitlines()
    left = [line for line in lines if not any(pattern.search(line) for pattern in patterns)]
    if left:
        raise GuestError("the guest's kernel complains:\n" + "\n".join(left))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
