"""Entry point of `propolis-server`."""

import argparse
import sys

from propolis import __version__


def main() -> int:
    """Do what the first word says; the daemon itself does not exist yet."""
    command, *words = sys.argv[1:] or [""]
    if command == "--version":
        sys.stdout.write(f"propolis-server {__version__}\n")
        return 0
    parser = argparse.ArgumentParser(
        prog=f"propolis-server {command}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if command == "doctor":
        from propolis import doctor

        doctor.add_arguments(parser)
        return doctor.run(parser.parse_args(words))
    if command == "install-service":
        from propolis import install_service

        install_service.add_arguments(parser)
        return install_service.run(parser.parse_args(words))
    if command == "power-off":
        from propolis import power_off

        power_off.add_arguments(parser)
        return power_off.run(parser.parse_args(words))
    if command == "open-api":
        from propolis.http import openapi

        parser.description = "Print the API as an OpenAPI document."
        parser.parse_args(words)
        sys.stdout.write(openapi.text())
        return 0
    if command == "run-one":
        from propolis import run_one  # another program: it loads what the daemon never does

        run_one.add_arguments(parser)
        return run_one.run(parser.parse_args(words))
    sys.stderr.write("propolis-server: arrives with the daemon; until then run one VM with propolis-standalone\n")
    return 2
