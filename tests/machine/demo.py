"""What `make demo` shows: a Linux guest from power-on to power-off, with its console."""

import asyncio
import sys
import tempfile
import time
from pathlib import Path

from tests.machine.guest import GuestError
from tests.machine.linux import linux

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

    vm = linux(directory, name="demo", kernel="vmlinuz", cmdline="console=ttyS0", show=_console)
    print((directory / "vm.toml").read_text())
    step(f"starting: {Path(vm.argv[0]).name} vm.toml; its serial console:")
    async with vm:
        await vm.boot()
        step("the guest is up; logging in as root")
        await vm.login()
        for command in COMMANDS:
            (await vm.run(command)).check()
        step("powering off")
        status = await vm.poweroff()
    if status != 0:
        raise GuestError(f"propolis-standalone ended with status {status}, expected 0")
    step("OK: booted, logged in, ran commands, powered off; propolis-standalone ended with status 0")


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
