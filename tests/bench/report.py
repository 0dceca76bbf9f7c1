"""How a measurement is printed: one line with name, number, unit, where, commit and spread."""

import functools
import os
import statistics
import subprocess
from collections.abc import Sequence

from tests.rig import TREE


@functools.cache
def commit() -> str:
    """What was measured; + where the tree has changes."""
    command = ["git", "-C", str(TREE), "describe", "--always", "--dirty=+", "--abbrev=9", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def where() -> str:
    """The kind of machine: the emulated one of the lab, or this host."""
    return "lab" if os.environ.get("KVM_LAB") else "host"


def show(name: str, values: Sequence[float], unit: str, *, goal: str = "", at: str | None = None) -> float:
    """Prints the median of the rounds, with their least and greatest."""
    median = statistics.median(values)
    spread = f"{_round(min(values))}..{_round(max(values))} of {len(values)}" if len(values) > 1 else "once"
    print(
        f"\n{name:<58} {_round(median):>9} {unit:<10} {at or where():<6} {commit():<11} {spread}"
        + (f"  (goal {goal})" if goal else ""),
        end="",
        flush=True,
    )
    return median


def _round(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
