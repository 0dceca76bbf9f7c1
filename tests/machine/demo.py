"""What `make demo` shows, the quick start: the daemon runs, and propolis-cli creates a Linux VM, runs it and attaches
its console, where commands are run until the guest powers off; then the VM is deleted.
"""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.machine.daemon_guest import daemon_linux
from tests.machine.guest import GuestError

COMMANDS = [
    "uname -a",
    "head -n 5 /proc/cpuinfo",
    "mount -t ext4",
    "lspci",
    "date > /root/hello && sync && cat /root/hello",
]


def _console(text: str) -> None:
    sys.stdout.write(text.replace("\r\n", "\n"))
    sys.stdout.flush()


async def demo(directory: Path) -> None:
    """Run it all; a GuestError says what did not happen."""
    started = time.monotonic()

    def step(what: str) -> None:
        print(f"\n[{time.monotonic() - started:6.1f} s] {what}", flush=True)

    vm = daemon_linux(
        directory,
        name="demo",
        kernel="vmlinuz",
        cmdline="console=ttyS0",
        show=_console,
        tell=lambda what: step(f"$ {what}"),
    )
    print((directory / "vm.toml").read_text())
    step("$ propolis-server run server.toml")
    async with vm:
        await vm.boot()
        step("the guest is up; logging in as root")
        await vm.login()
        for command in COMMANDS:
            (await vm.run(command)).check()
        step("powering off")
        status = await vm.poweroff()
        print(await vm.cli("ls"))
        await vm.cli("rm", "demo")
    if status != 0:
        raise GuestError(f"propolis-cli serial ended with status {status}, expected 0")
    step("OK: created, booted, logged in, ran commands, powered off, deleted")


def main() -> int:
    """Run the demo in a folder that goes away."""
    with tempfile.TemporaryDirectory(prefix="propolis-demo-") as folder:
        try:
            asyncio.run(demo(Path(folder)))
        except GuestError as error:
            print(f"\ndemo: FAILED: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
