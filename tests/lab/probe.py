"""Can this host's KVM run an unmodified kernel? One line: full, limited or absent, and why.

    python3 tests/lab/probe.py          prints the line; exit status 0 full, 1 limited, 2 absent

The probe itself is the product's, and needs the standard library only.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from propolis.kvm_probe import Verdict, main, probe

__all__ = ["Verdict", "probe"]

if __name__ == "__main__":
    sys.exit(main())
