"""Entry point of `propolis-server`."""

import sys

from propolis import __version__


def main() -> int:
    """Say what is there: the version, and that the daemon does not exist yet."""
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"propolis-server {__version__}\n")
        return 0
    sys.stderr.write("propolis-server: arrives with the daemon; until then run one VM with propolis-standalone\n")
    return 2
