"""What it takes to have a VM in processes of its own: until it is made, until its guest runs, and in memory."""

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from propolis.keeper_protocol import StartOptions
from propolis.run_directory import RunDirectory
from propolis.spec import DirectBoot, Spec
from propolis.zygote import Zygote
from propolis.zygote_process import QUIET
from tests.bench.report import show
from tests.machine import kernels
from tests.unit.keepers import ended
from tests.unit.test_zygote import JAIL, PROPERTIES, client

pytestmark = [pytest.mark.bench, pytest.mark.kvm, pytest.mark.program]

ROUNDS = 15
VMS = 4  # that share what they can


@pytest.fixture(autouse=True)
async def _measured() -> None:
    """The loop of tests checks each call, which takes longer than what is measured here."""
    asyncio.get_running_loop().set_debug(False)


async def test_start(tmp_path: Path) -> None:
    """A zygote that is there, a guest of 128 MiB that says when it runs."""
    (tmp_path / "kernel").write_bytes(kernels.monitor())
    spec = Spec(name="bench", cpus=1, memory_mib=128, boot=DirectBoot(kernel=str(tmp_path / "kernel")))
    made, started = [], []
    async with await Zygote.spawn() as zygote:
        for number in range(ROUNDS):
            begin = time.perf_counter()
            with (
                RunDirectory.create(str(tmp_path / f"run{number}")) as directory,
                await zygote.start_vm(directory, spec, PROPERTIES, StartOptions(jail=JAIL)) as vm,
            ):
                made.append(time.perf_counter() - begin)
                async with client(directory) as session:
                    begin = time.perf_counter()
                    async with session.put("/instance/state", json="Run") as reply:
                        assert reply.status == 204
                    with directory.history() as history:
                        while not history.total_bytes:
                            pass
                    started.append(time.perf_counter() - begin)
                vm.terminate()
                await ended(vm)
            await asyncio.sleep(2 * QUIET)  # a daemon that has nothing to do
    show("VM: from asked for to made", [value * 1e3 for value in made], "ms", goal="15")
    show("VM: from Run to the guest's first character", [value * 1e3 for value in started], "ms", goal="15")


async def test_memory(tmp_path: Path) -> None:
    """Of an idle VM beside its guest's: its own pages, and its share of those that several VMs have."""
    (tmp_path / "kernel").write_bytes(kernels.monitor())
    spec = Spec(name="bench", cpus=1, memory_mib=128, boot=DirectBoot(kernel=str(tmp_path / "kernel")))
    async with await Zygote.spawn() as zygote:
        vms = []
        for number in range(VMS):
            directory = RunDirectory.create(str(tmp_path / f"run{number}"))
            vm = await zygote.start_vm(directory, spec, PROPERTIES, StartOptions(jail=JAIL))
            vms.append((directory, vm))
            async with client(directory) as session, session.put("/instance/state", json="Run") as reply:
                assert reply.status == 204
            with directory.history() as history:
                while history.total_bytes < len("ready\r\n"):
                    pass
        keepers = [_kib(vm.keeper_pid, _own) for _, vm in vms]
        workers = [_kib(vm.worker_pid, _own) for _, vm in vms]
        shares = [_kib(vm.keeper_pid, _share) + _kib(vm.worker_pid, _share) for _, vm in vms]
        for directory, vm in vms:
            vm.terminate()
            await ended(vm)
            vm.close()
            directory.close()
    own = [keeper + worker for keeper, worker in zip(keepers, workers, strict=True)]
    show("VM: memory of its keeper", [value / 1024 for value in keepers], "MiB")
    show("VM: memory of its worker", [value / 1024 for value in workers], "MiB")
    show("VM: memory of both", [value / 1024 for value in own], "MiB", goal="12")
    show(f"VM: with its share of what {VMS} VMs and the zygote share", [value / 1024 for value in shares], "MiB")
    assert statistics.median(own) > 0


def _own(fields: dict[str, int]) -> int:
    return fields["Private_Dirty"]


def _share(fields: dict[str, int]) -> int:
    return fields["Pss"]


def _kib(pid: int | None, of: Callable[[dict[str, int]], int]) -> int:
    """Over all mappings but the guest's memory, which is the largest."""
    mappings: list[dict[str, int]] = []
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Size":
            mappings.append({})
        if value.endswith(" kB"):
            mappings[-1][name] = int(value.split()[0])
    return sum(of(fields) for fields in mappings if fields["Size"] < 128 << 10)
