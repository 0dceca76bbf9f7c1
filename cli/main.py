"""The commands and options of `propolis-cli`. What a command does is in another module, imported once it is needed."""

from __future__ import annotations

import enum
import sys
from pathlib import Path  # noqa: TC003 -- typer looks at it
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID  # noqa: TC003 -- typer looks at it

import typer

from propolis import __version__

if TYPE_CHECKING:
    from .session import Options, Work

HELP = """\
Create, run and watch virtual machines of a propolis-server.

The server is the daemon of this user or of root on this host, unless -s, --url or PROPOLIS_URL name another.
"""
EPILOG = """\
Exit status: 0 done; 1 refused or failed; 2 wrong usage or a wrong file; 3 no server answers; 4 there is no such VM;
124 time ran out; 130 Ctrl-C.
"""

app = typer.Typer(
    name="propolis-cli",
    help=HELP,
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


class Wanted(enum.StrEnum):
    """What a VM's state can be asked to become."""

    RUN = "run"
    STOP = "stop"
    REBOOT = "reboot"
    PAUSE = "pause"
    RESUME = "resume"
    RESET = "reset"
    SHUTDOWN = "shutdown"


class Restart(enum.StrEnum):
    """When the daemon starts a VM again by itself."""

    NEVER = "never"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


class Goal(enum.StrEnum):
    """A state that can be waited for."""

    CREATING = "creating"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    REBOOTING = "rebooting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    DESTROYED = "destroyed"


class Shell(enum.StrEnum):
    """A shell that can complete."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"propolis-cli {__version__}")
        raise typer.Exit


def _complete_name(context: typer.Context, incomplete: str) -> list[str]:
    from .completion import names

    return names(context, incomplete)


Name = Annotated[str, typer.Argument(metavar="NAME", help="The VM's name or UUID.", autocompletion=_complete_name)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print less.")]


@app.callback()
def propolis_cli(
    context: typer.Context,
    server: Annotated[str | None, typer.Option("--server", "-s", metavar="HOST", help="The server's host.")] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", "-p", metavar="PORT", min=1, max=65535, help="The server's port.  [default: 12400]"),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            envvar="PROPOLIS_URL",
            help="The server, as unix:PATH, http://HOST:PORT or https://HOST:PORT.",
        ),
    ] = None,
    token_file: Annotated[
        str | None,
        typer.Option(
            "--token-file", metavar="FILE", envvar="PROPOLIS_TOKEN_FILE", help="A file that begins with the token."
        ),
    ] = None,
    ca_file: Annotated[
        str | None,
        typer.Option(
            "--ca-file", metavar="FILE", envvar="PROPOLIS_CA_FILE", help="Certificates to check the server's with."
        ),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Send the token where others can read it.")] = False,
    json: Json = False,
    quiet: Quiet = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    # An environment variable gives way to what is said on the command line.
    context.obj = {
        "server": server,
        "port": port,
        "url": url,
        "token_file": token_file,
        "ca_file": ca_file,
        "insecure": insecure,
        "is_json": json,
        "is_quiet": quiet,
    }


@app.command()
def new(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the VM is called.")],
    cpus: Annotated[int | None, typer.Option("--cpus", "-c", help="How many CPUs.  [default: 4]")] = None,
    memory: Annotated[
        int | None, typer.Option("--memory", "-m", metavar="MIB", help="Memory in MiB.  [default: 1024]")
    ] = None,
    uuid: Annotated[UUID | None, typer.Option("--uuid", "-u", help="The VM's UUID.  [default: a random one]")] = None,
    toml: Annotated[
        Path | None,
        typer.Option(
            "--config-toml", "-t", metavar="FILE", help="A TOML file: as for propolis-standalone, or of devices alone."
        ),
    ] = None,
    spec: Annotated[Path | None, typer.Option("--spec", "-s", metavar="FILE", help="A spec in JSON.")] = None,
    cpuid_profile: Annotated[
        str | None,
        typer.Option("--cpuid-profile", metavar="NAME", help="With -t: the [cpuid.NAME] that the guest sees."),
    ] = None,
    hyperv: Annotated[bool, typer.Option("--hyperv", help="The guest finds a Hyper-V.")] = False,
    cloud_init: Annotated[
        Path | None,
        typer.Option("--cloud-init", metavar="FILE", help="User-data: adds a disk with it for the guest's cloud-init."),
    ] = None,
    meta_data: Annotated[
        Path | None, typer.Option("--meta-data", metavar="FILE", help="With --cloud-init: its meta-data.")
    ] = None,
    network_config: Annotated[
        Path | None, typer.Option("--network-config", metavar="FILE", help="With --cloud-init: its network-config.")
    ] = None,
    description: Annotated[str, typer.Option("--description", metavar="TEXT", help="What the VM is for.")] = "",
    autostart: Annotated[bool, typer.Option("--autostart", help="Start it when the host starts.")] = False,
    restart: Annotated[
        Restart, typer.Option("--restart", help="Whether it is started again when it has ended.")
    ] = Restart.NEVER,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Create a VM; it does not run yet. One that is there already, and equal, will do.

    Without -t or -s it has a board and serial ports: what it boots, and its devices, are the server's configuration.
    """
    if spec is not None and (hyperv or not (toml is None and cpus is None and memory is None and cloud_init is None)):
        raise typer.BadParameter("-s already says all of this: -t, -c, -m, --hyperv and --cloud-init do not go with it")
    if cpuid_profile is not None and toml is None:
        raise typer.BadParameter("--cpuid-profile goes with -t")
    if cloud_init is None and not (meta_data is None and network_config is None):
        raise typer.BadParameter("--meta-data and --network-config go with --cloud-init")
    from . import instance

    made_of = instance.Made(
        name=name,
        cpus=cpus,
        memory_mib=memory,
        identity=uuid,
        toml=_optional(toml),
        spec=_optional(spec),
        description=description,
        autostart=autostart,
        restart=restart.value,
        cpuid_profile=cpuid_profile,
        hyperv=hyperv,
        cloud_init=None
        if cloud_init is None
        else instance.CloudInit(str(cloud_init), _optional(meta_data), _optional(network_config)),
    )
    _perform(context, instance.new(made_of), json=json, quiet=quiet)


def _optional(path: Path | None) -> str | None:
    return None if path is None else str(path)


@app.command()
def state(
    context: typer.Context,
    name: Name,
    wanted: Annotated[Wanted, typer.Argument(help="What to do.")],
    deadline: Annotated[
        float | None,
        typer.Option(
            "--deadline", metavar="SECONDS", min=0, help="With shutdown: stop it if it has not done so itself by then."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until it is so.")] = False,
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", min=0, help="With --wait: how long at most.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Run, stop, reboot, pause, resume, reset or shut down a VM.

    stop ends it at once, whatever it does; shutdown presses its power button; reset presses its reset button.
    """
    if deadline is not None and wanted is not Wanted.SHUTDOWN:
        raise typer.BadParameter("--deadline goes with shutdown")
    from . import instance

    _perform(context, instance.state(name, wanted.value, deadline, wait, timeout), quiet=quiet)


@app.command()
def serial(
    context: typer.Context,
    name: Name,
    byte_offset: Annotated[
        int | None,
        typer.Option(
            "--byte-offset",
            "-b",
            metavar="N",
            help="Begin at this offset of the output; negative: that many bytes before its end.  [default: -16384]",
        ),
    ] = None,
    escape: Annotated[
        str, typer.Option("--escape", "-e", metavar="KEY", help="The key that leaves: ^], ctrl-a, one character, none.")
    ] = "^]",
    com: Annotated[int, typer.Option("--com", min=1, max=4, help="Which serial port.")] = 1,
) -> None:
    """Attach this terminal to a VM's serial console. Ctrl-], or ~. at the beginning of a line, leaves.

    A connection that is lost is made again, and goes on with the next byte.
    """
    from . import console

    _perform(context, console.serial(name, byte_offset, escape, com))


@app.command()
def screenshot(
    context: typer.Context,
    name: Name,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to; - is standard output.  [default: NAME.png]"),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write what a VM's screen shows into a PNG file."""
    from . import screen

    _perform(context, screen.screenshot(name, output), quiet=quiet)


@app.command()
def vnc(
    context: typer.Context,
    name: Name,
    port: Annotated[
        int, typer.Option("--port", "-p", min=0, max=65535, help="Of this machine; 0 is any free one.")
    ] = 0,
) -> None:
    """Offer a VM's screen, keyboard and mouse to VNC clients on this machine, at the address that is printed.

    Whoever can connect to this machine's 127.0.0.1 can use them. Ctrl-C ends it.
    """
    from . import screen

    _perform(context, screen.vnc(name, port))


@app.command()
def get(context: typer.Context, name: Name, json: Json = False) -> None:
    """Show a VM."""
    from . import instance

    _perform(context, instance.get(name), json=json)


@app.command()
def ls(context: typer.Context, json: Json = False, quiet: Quiet = False) -> None:
    """List the VMs; -q prints names alone."""
    from . import instance

    _perform(context, instance.ls, json=json, quiet=quiet)


@app.command("set")
def set_(
    context: typer.Context,
    name: Name,
    autostart: Annotated[
        bool | None, typer.Option("--autostart/--no-autostart", help="Start it when the host starts.")
    ] = None,
    restart: Annotated[
        Restart | None, typer.Option("--restart", help="Whether it is started again when it has ended.")
    ] = None,
) -> None:
    """Change how the daemon keeps a VM."""
    if autostart is None and restart is None:
        raise typer.BadParameter("nothing to change: give --autostart, --no-autostart or --restart")
    from . import instance

    _perform(context, instance.keep(name, autostart, None if restart is None else restart.value))


@app.command()
def rm(
    context: typer.Context,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="The VMs' names.", autocompletion=_complete_name)
    ],
    force: Annotated[bool, typer.Option("--force", "-f", help="Stop one that runs.")] = False,
    quiet: Quiet = False,
) -> None:
    """Delete VMs; their disks stay."""
    from . import instance

    _perform(context, instance.rm(names, force), quiet=quiet)


@app.command()
def monitor(context: typer.Context, name: Name, json: Json = False) -> None:
    """Print each change of a VM's state."""
    from . import watch

    _perform(context, watch.monitor(name), json=json)


@app.command("inject-nmi")
def inject_nmi(context: typer.Context, name: Name) -> None:
    """Send a non-maskable interrupt to each CPU of a VM."""
    from . import instance

    _perform(context, instance.inject_nmi(name))


@app.command()
def logs(
    context: typer.Context,
    name: Name,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is added.")] = False,
    lines: Annotated[
        int | None, typer.Option("--lines", "-n", metavar="N", min=0, help="Only the last N lines.")
    ] = None,
) -> None:
    """Print what a VM's processes logged."""
    from . import watch

    _perform(context, watch.logs(name, lines, follow))


@app.command()
def events(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only of this VM.", autocompletion=_complete_name)
    ] = None,
    after: Annotated[
        int | None, typer.Option("--after", metavar="ID", min=0, help="Begin after this one, as far as they are kept.")
    ] = None,
    json: Json = False,
) -> None:
    """Print what happens to the VMs, as it happens."""
    from . import watch

    _perform(context, watch.events(name, after), json=json)


@app.command()
def wait(
    context: typer.Context,
    name: Name,
    goal: Annotated[Goal, typer.Argument(metavar="STATE", help="The state to wait for.", case_sensitive=False)],
    timeout: Annotated[
        float | None, typer.Option("--timeout", metavar="SECONDS", min=0, help="How long at most; then exit with 124.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Wait until a VM is in some state."""
    from . import watch

    _perform(context, watch.wait(name, goal.value, timeout), quiet=quiet)


@app.command()
def doctor(context: typer.Context, json: Json = False) -> None:
    """Check the server's host, or this one, for what VMs need."""
    from . import host

    _perform(context, host.doctor(_options(context).is_explicit), json=json)


@app.command()
def completion(shell: Annotated[Shell, typer.Argument(help="The shell.")]) -> None:
    """Print a shell's completion script."""
    from .completion import script

    typer.echo(script(shell.value))


def _options(context: typer.Context, **more: bool) -> Options:
    from .session import Options

    given: dict[str, Any] = context.obj
    for key, value in more.items():
        given[f"is_{key}"] |= value
    return Options(**given)


def _perform(context: typer.Context, work: Work, **more: bool) -> None:
    from .session import perform

    raise typer.Exit(perform(_options(context, **more), work))


def main() -> None:
    """The console script."""
    try:
        app(prog_name="propolis-cli")
    except KeyboardInterrupt:  # before or after a command runs
        sys.exit(130)


if __name__ == "__main__":
    main()
