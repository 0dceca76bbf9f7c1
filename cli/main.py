"""Entry point of `propolis-cli`."""

import sys

from propolis import __version__


def main() -> int:
    """Say what is there: the version, and that the commands talk to a daemon that does not exist yet."""
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"propolis-cli {__version__}\n")
        return 0
    sys.stderr.write("propolis-cli: arrives with the daemon; until then run one VM with propolis-standalone\n")
    return 2
