"""The daemon with many VMs: how fast it makes them, how soon it answers, what they cost while they do nothing."""

import asyncio
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from propolis import threads
from propolis.hypervisor._replay import ReplayVcpu
from tests.bench.report import show
from tests.machine import kernels
from tests.rig import TREE
from tests.unit.daemons import Server, server
from tests.unit.http.serving import one_vm

pytestmark = [pytest.mark.bench, pytest.mark.program]

STARTS, PAUSE = 15, 0.5  # seconds in which a process for the next VM is made
VMS, AT_ONCE = 50, 8
IDLE_VMS, IDLE_SECONDS = 100, 10.0
REQUESTS = 1000
PRINT_SECONDS = 3.0
GREETING = "x"
HALTED = kernels.kernel(kernels.say(GREETING) + kernels.forever(b"\xf4"))
SPINNING = kernels.kernel(kernels.say(GREETING) + kernels.SPIN)
READER = """\
import asyncio, sys, time
import aiohttp

async def main():
    async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(sys.argv[1])) as session:
        async with session.ws_connect("http://vm/instance/serial", max_msg_size=0) as socket:
            await socket.receive()
            size, begin = 0, time.perf_counter()
            while time.perf_counter() < begin + float(sys.argv[2]):
                size += len((await socket.receive()).data)
            print(size / (time.perf_counter() - begin))

asyncio.run(main())
"""


@pytest.fixture(autouse=True)
async def _measured() -> None:
    """The loop of tests checks each call, which takes longer than what is measured here."""
    asyncio.get_running_loop().set_debug(False)


@asynccontextmanager
async def daemon(folder: Path) -> AsyncIterator[Server]:
    """One that jails its VMs and runs them by KVM; it has just started and had time to get ready for the first."""
    async with server(folder, "--hypervisor", "kvm", "--jail", "on") as one:
        await asyncio.sleep(1)
        yield one


async def run(one: Server, name: str, kernel: bytes) -> tuple[float, float]:
    """From nothing until its guest says something. Returns the seconds to the 201, and from Run to a character."""
    path = one.folder / f"kernel-{name}"
    path.write_bytes(kernel)
    body = one.body(name, memory_mb=128)
    body["init"]["value"]["spec"]["extensions"]["boot"]["kernel"] = str(path)
    begin = time.perf_counter()
    reply = await one.ask("PUT", f"/instances/{name}", json=body)
    made = time.perf_counter() - begin
    assert reply.status == 201, reply
    with one.directory(name) as directory, directory.history() as history:
        begin = time.perf_counter()
        reply = await one.ask("PUT", f"/instances/{name}/state", json="Run")
        assert reply.status == 204, reply
        while not history.total_bytes:  # noqa: ASYNC110 -- nobody tells
            await asyncio.sleep(0.0005)
        return made, time.perf_counter() - begin


def cpu_seconds(pids: set[int]) -> float:
    """What all their threads have taken until now."""
    total = 0
    for pid in pids:
        for task in os.listdir(f"/proc/{pid}/task"):
            total += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[0])
    return total / 1e9


@pytest.mark.kvm
async def test_one(tmp_path: Path) -> None:
    """A daemon that is warm and has nothing else to do; 128 MiB; a connection for each request."""
    async with daemon(tmp_path) as one:
        times = []
        for number in range(STARTS):
            times.append(await run(one, f"vm{number}", HALTED))
            await asyncio.sleep(PAUSE)
    show("PUT /instances/{name} to 201", [made * 1e3 for made, _ in times], "ms", goal="15")
    show("PUT its state to Run, to the guest's first character", [ran * 1e3 for _, ran in times], "ms", goal="15")


@pytest.mark.kvm
async def test_many_at_once(tmp_path: Path) -> None:
    async with daemon(tmp_path) as one:
        turns = asyncio.Semaphore(AT_ONCE)

        async def one_of_them(number: int) -> None:
            async with turns:
                await run(one, f"vm{number}", HALTED)

        begin = time.perf_counter()
        await asyncio.gather(*map(one_of_them, range(VMS)))
        rate = VMS / (time.perf_counter() - begin)
    show(f"VMs made and run, {AT_ONCE} at a time", [rate], "1/s", goal=">= 10")


@pytest.mark.kvm
async def test_answers_beside_a_guest_that_spins(tmp_path: Path) -> None:
    async with daemon(tmp_path) as one:
        await run(one, "spinning", SPINNING)
        times = []
        for _ in range(REQUESTS):
            begin = time.perf_counter()
            reply = await one.ask("GET", "/instances/spinning")
            times.append((time.perf_counter() - begin) * 1e3)
            assert reply.status == 200, reply
    show("GET /instances/{name}, a connection each", times, "ms", goal="< 2")
    show("of it the 99th percentile", [statistics.quantiles(times, n=100)[98]], "ms", goal="< 10")


@pytest.mark.kvm
async def test_idle_vms(tmp_path: Path) -> None:
    async with daemon(tmp_path) as one:
        for number in range(IDLE_VMS):
            await run(one, f"vm{number}", HALTED)
        names = [f"vm{number}" for number in range(IDLE_VMS)]
        pids = {one.pid, *map(one.worker, names), *map(one.keeper, names)}
        await asyncio.sleep(1)
        before = cpu_seconds(pids)
        await asyncio.sleep(IDLE_SECONDS)
        share = (cpu_seconds(pids) - before) / IDLE_SECONDS
    show(f"{IDLE_VMS} VMs that do nothing, and the daemon", [share * 100], "% of a CPU", goal="< 3")


async def test_console(tmp_path: Path) -> None:
    """A vCPU that prints without end, faster than anyone reads; a client in a process of its own."""
    async with one_vm(tmp_path) as served:
        await served.running()
        script = [("outs", 0x3F8, 1, b"x" * 64)] * 16
        printer = ReplayVcpu(served.vm._machine.vm, 1, lambda _: None, script=script, rounds=1 << 40)
        thread = threads.start("vcpu", "printer", printer.run)
        printer.release()
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", READER, served.path, str(PRINT_SECONDS), cwd=TREE, stdout=asyncio.subprocess.PIPE
            )
            printed, _ = await process.communicate()
            assert process.returncode == 0
        finally:
            printer.stop()
            await asyncio.to_thread(thread.join)
            printer.close()
    show("console, from UART to websocket", [float(printed) / 1e6], "MB/s", goal=">= 20", at="replay")
