"""The console script `propolis-server`: the daemon, and the commands beside it.

Each command is a module of its own, and nothing of the others is loaded for it.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from typing import TYPE_CHECKING, get_args

from propolis import __version__, config
from propolis.errors import ConfigError, PropolisError

if TYPE_CHECKING:
    from propolis.config import Address

USAGE, FAILED = 2, 1  # exit statuses

EPILOG = """\
addresses:
  IP:PORT or unix:PATH; without any, those of the configuration, or what systemd hands over, or the default socket

signals:
  SIGHUP            read configuration, tokens and certificates again
  SIGTERM, SIGINT   end the daemon; its VMs run on and the next one finds them

exit status:
  0  ended by a signal    1  something it needs is missing or busy    2  wrong usage or configuration
"""
_MODULES = {  # with add_arguments() and run()
    "doctor": ("propolis.doctor", "check whether this host can run VMs, and say how to mend it"),
    "install-service": ("propolis.install_service", "put service files in place"),
    "open-api": ("propolis.http.openapi", "print the API as an OpenAPI document"),
    "power-off": ("propolis.power_off", "press the power buttons of all VMs that run"),
    "run-one": ("propolis.run_one", "one VM in this process, by Propolis API 5.0.0"),
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words and words[0] in _MODULES:
            return _run_module(words[0], words[1:])
        if words and words[0] == "run":
            return _run(_arguments().parse_intermixed_args(words[1:]))
        _overview().parse_args(words)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return USAGE
    except PropolisError as error:
        sys.stderr.write(f"propolis-server: {error}\n")
        return FAILED
    return USAGE


def _run_module(command: str, words: list[str]) -> int:
    module = importlib.import_module(_MODULES[command][0])
    parser = argparse.ArgumentParser(
        prog=f"propolis-server {command}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_arguments(parser)
    status: int = module.run(parser.parse_args(words))
    return status


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="propolis-server", description="Run virtual machines, driven by a REST API.")
    parser.add_argument("--version", action="version", version=f"propolis-server {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, what in (("run", "the daemon"), *((name, what) for name, (_, what) in _MODULES.items())):
        commands.add_parser(name, help=what, add_help=False)
    return parser


def _arguments() -> argparse.ArgumentParser:
    run = argparse.ArgumentParser(
        prog="propolis-server run",
        description="Serve many VMs by name.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("words", nargs="*", metavar="CONFIG | ADDRESS", help="a configuration file, and where to listen")
    run.add_argument("--log-level", choices=config.LOG_LEVELS, help="what is logged (info)")
    run.add_argument("--log-format", choices=config.LOG_FORMATS, help="how it is logged (text)")
    run.add_argument("--jail", choices=get_args(config.JailMode), help="whether VMs are confined (on)")
    run.add_argument("--insecure", action="store_true", help="let whoever reaches an address use it")
    run.add_argument("--hypervisor", choices=("kvm", "replay"), default="kvm", help=argparse.SUPPRESS)
    return run


def _run(parsed: argparse.Namespace) -> int:
    from propolis.serve import Options, serve

    file: str | None = None
    addresses: list[Address] = []
    for word in parsed.words:
        try:
            addresses.append(config.parse_address(word))
        except ConfigError:
            # A port at its end is what makes an address of it, and a file is not called so.
            if file is not None or word.startswith("unix:") or word.rpartition(":")[2].isdigit():
                raise
            file = word
    options = Options(
        file=file,
        addresses=tuple(addresses),
        log_level=parsed.log_level,
        log_format=parsed.log_format,
        jail=parsed.jail,
        insecure=parsed.insecure,
        hypervisor=parsed.hypervisor,
    )
    serve(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
