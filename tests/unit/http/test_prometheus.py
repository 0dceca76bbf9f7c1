"""Metrics stay few and well-formed, whatever clients ask for and whatever a worker that was taken over says."""

import json
from typing import Any

import msgspec
import pytest
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from propolis.http import prometheus
from propolis.http.prometheus import Numbers, _of_workers

NASTY = 'a"}\nup{vm="other"} 0\n# \x1b[31m'
HUGE = 10**400
LABELS = ("vm", "vcpu", "device", "console", "mode", "kind", "operation", "direction")


def shown(numbers: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """What a scraper finds of a worker that says this."""
    told = {"web": msgspec.json.decode(json.dumps(numbers), type=Numbers)}
    text = "".join(generate_latest(prometheus._Fixed([family])).decode() for family in _of_workers(told))
    return {
        (sample.name, *(sample.labels[label] for label in LABELS if label in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def repr_of(value: object) -> str:
    """Short."""
    return repr(value)[:8]


def test_what_a_worker_counts() -> None:
    found = shown({"vcpus": [{"pio": 3, "seconds": 0.5}], "devices": {"disk": {"reads": 2}}, "reboots": 1})
    assert found["propolis_vm_vcpu_exits_total", "web", "0", "pio"] == 3
    assert found["propolis_vm_vcpu_seconds_total", "web", "0"] == 0.5
    assert found["propolis_vm_block_operations_total", "web", "disk", "reads"] == 2
    assert found["propolis_vm_reboots_total", "web"] == 1


@pytest.mark.parametrize("value", [HUGE, -HUGE, None, "1", [], {}, 1e308], ids=repr_of)
def test_numbers_that_are_none(value: object) -> None:
    """One worker's nonsense leaves the metrics of all others."""
    found = shown({"vcpus": [{"pio": value, "mmio": 7}], "process": {"user_seconds": value}})
    assert found["propolis_vm_vcpu_exits_total", "web", "0", "mmio"] == 7
    assert ("propolis_vm_vcpu_exits_total", "web", "0", "pio") not in found or value == 1e308
    assert shown({"reboots": HUGE})["propolis_vm_reboots_total", "web"] == 0


def test_names_that_are_none() -> None:
    """They make no sample of another name, and a counter has a name of ours."""
    found = shown({"devices": {NASTY: {"reads": 1, NASTY: 2}}, "vcpus": [{NASTY: 1}], "consoles": {NASTY: {}}})
    assert {vm for _, vm, *_ in found} == {"web"}
    assert {name.startswith("propolis_vm_") for name, *_ in found} == {True}
    assert not [key for key in found if key[0] == "propolis_vm_vcpu_exits_total"]


def test_there_is_an_end_of_them() -> None:
    """However many a worker invents."""
    many = {f"x{number}": number for number in range(2000)}
    found = shown({"vcpus": [{}] * 2000, "devices": {f"d{number}": {"reads": 1} for number in range(2000)}})
    assert len(found) < 1000
    assert len(shown({"devices": {"disk": many}, "process": many})) < 1000
