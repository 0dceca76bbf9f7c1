"""Who may import whom: every import and cimport between the rooms of the package follows an arrow listed here."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.source.tree import TREE, name_of, without_texts

# A room is a module or a package with all below it; the longest name that fits counts. "propolis" itself, the version,
# is open to all. An arrow to `x` covers all of x's room, not the rooms listed below it by a longer name.
ARROWS: dict[str, set[str]] = {
    # entry points
    "cli": {
        "http.client",
        "http.client_console",
        "http.client_replies",
        "http.v5",
        "console",
        "standalone_config",
        "toml_cpuid",
        "toml_devices",
        "toml_table",
        "names",
        "spec",
        "errors",
    },
    # never anything compiled, but for run-one, which is another program
    "daemon": {"serve", "doctor", "install_service", "power_off", "run_one", "config", "errors"},
    "serve": {
        "cgroup",
        "config",
        "http.access",
        "http.door",
        "http.feed",
        "http.forward",
        "http.prometheus",
        "http.router",
        "instance",
        "logs",
        "service_manager",
        "store",
        "supervisor",
        "zygote",
        "errors",
    },
    "supervisor": {
        "background",
        "cgroup",
        "config",
        "host_files",
        "instance",
        "lifecycle",
        "restarts",
        "running_vm",
        "runs",
        "spec",
        "state_file",
        "store",
        "errors",
    },
    "runs": {
        "background",
        "cgroup",
        "config",
        "host_files",
        "http.v5",
        "instance",
        "jail",
        "keeper_protocol",
        "lifecycle",
        "names",
        "run_directory",
        "running_vm",
        "spec",
        "state_file",
        "store",
        "errors",
    },
    "restarts": {"background", "instance", "lifecycle", "state_file", "errors"},
    "instance": {"lifecycle", "names", "run_directory", "running_vm", "state_file", "store", "errors"},
    "host_files": {"spec", "errors"},
    "background": set(),
    "run_one": {
        "virtual_machine",
        "http",
        "http.v5",
        "http.v5_spec",
        "keeper",
        "console",
        "lifecycle",
        "logs",
        "names",
        "spec",
        "errors",
    },
    "store": {"atomic_file", "spec", "errors"},
    "atomic_file": set(),
    "doctor": {"config", "jail", "kvm_probe", "landlock", "errors"},
    "kvm_probe": set(),
    "logs": set(),
    "service_manager": set(),
    "entry": {"standalone"},
    "standalone": {
        "standalone_config",
        "machine",
        "lifecycle",
        "keeper",
        "console",
        "display",
        "logs",
        "names",
        "unix_name",
        "spec",
        "errors",
    },
    "worker": {
        "virtual_machine",
        "http.slot",
        "http",
        "http.v5",
        "lifecycle",
        "jail",
        "console",
        "keeper_process",
        "keeper_protocol",
        "log_tail",
        "practice",
        "state_file",
        "errors",
    },
    "practice": {
        "virtual_machine",
        "http.slot",
        "http",
        "http.v5",
        "lifecycle",
        "console",
        "keeper",
        "log_tail",
        "mapped_file",
        "state_file",
        "spec",
        "errors",
    },
    "zygote": {"keeper_protocol", "running_vm", "run_directory", "spec", "errors"},
    "zygote_process": {"worker", "keeper_process", "keeper_protocol", "errors"},
    # opens files, and nothing compiled for it
    "keeper": {"disk_image", "host_network", "host_sockets", "nvram_file", "config", "spec", "errors"},
    "host_sockets": {"unix_name"},
    "keeper_process": {
        "host_sockets",
        "keeper",
        "keeper_protocol",
        "names",
        "processes",
        "run_directory",
        "spec",
        "errors",
    },
    "keeper_protocol": {"host_sockets", "network_spec", "spec", "errors"},
    "running_vm": {"run_directory", "processes"},
    "log_tail": {"console", "logs"},
    "run_directory": {"atomic_file", "console", "disk_image", "state_file", "mapped_file", "processes", "errors"},
    "state_file": {"lifecycle", "mapped_file"},
    "mapped_file": {"errors"},
    "processes": set(),
    "disk_image": {"errors"},
    "nvram_file": {"atomic_file", "disk_image", "errors"},
    "host_network": {"spec", "errors"},
    # deciding
    # handlers see the VM and its lifecycle, never a device
    "http": {
        "virtual_machine",
        "display",
        "lifecycle",
        "console",
        "event_log",
        "http.codec",
        "http.errors",
        "http.openapi",
        "http.ours",
        "http.serial",
        "http.slot",
        "http.websocket_close",
        "http.v5",
        "http.v5_spec",
        "errors",
    },
    "http.serial": {"console", "http.codec", "http.slot", "http.v5", "http.websocket_close", "errors"},
    "http.websocket_close": set(),
    "http.slot": {"http.v5", "lifecycle", "virtual_machine", "errors"},
    "http.errors": {"http.codec", "http.v5", "errors"},
    "http.codec": {"errors"},
    "http.openapi": {"doctor", "event_log", "http.daemon_types", "http.ours", "http.v5"},
    "http.ours": {"http.v5"},
    "http.v5": {"errors"},
    "http.v5_spec": {"http.v5", "http.v5_devices", "small_devices", "spec", "errors"},
    "http.v5_devices": {"http.v5", "small_devices", "spec"},
    "http.client": {
        "http.client_console",
        "http.client_transport",
        "http.client_replies",
        "http.v5",
        "http.v5_spec",
        "spec",
        "errors",
    },
    "http.client_console": {"http.client_replies", "errors"},
    "http.client_transport": {"http.client_replies", "errors"},
    "http.client_replies": {"http.v5", "errors"},
    "http.router": {
        "http.access",
        "http.codec",
        "http.daemon_types",
        "http.errors",
        "http.forward",
        "http.openapi",
        "http.ours",
        "http.serial",
        "http.v5",
        "http.v5_spec",
        "instance",
        "console",
        "lifecycle",
        "spec",
        "standalone_config",
        "state_file",
        "store",
        "supervisor",
        "errors",
    },
    "http.daemon_types": {"http.v5", "store"},
    "http.feed": {"event_log", "http.codec", "http.forward", "http.ours", "instance", "supervisor", "errors"},
    "http.prometheus": {"http.forward", "instance", "supervisor", "errors"},
    "http.forward": {
        "http.access",
        "http.codec",
        "http.errors",
        "http.websocket_filter",
        "instance",
        "running_vm",
        "errors",
    },
    "http.websocket_filter": set(),
    "http.access": {"config", "errors"},
    "http.door": {"config", "unix_name", "errors"},
    "virtual_machine": {"machine", "lifecycle", "console", "display", "event_log", "http.v5", "spec", "errors"},
    "event_log": set(),
    "machine": {
        "lifecycle",
        "offer",
        "board",
        "hypervisor",
        "hypervisor.state",
        "devices",
        "backends",
        "firmware",
        "console",
        "spec",
        "errors",
        "threads",
        "_vmm",
    },
    "offer": {"devices", "firmware"},
    "small_board": {"devices", "small_devices", "_vmm"},
    "board": {
        "board_network",
        "small_board",
        "hypervisor",
        "hypervisor.state",
        "devices",
        "backends",
        "firmware",
        "spec",
        "errors",
        "_vmm",
    },
    "board_network": {"backends", "spec", "errors"},
    "display": {"_memory", "errors"},
    # confining
    "jail": {"landlock", "syscall_filter", "threads", "errors"},
    "landlock": {"errors"},
    "syscall_filter": {"errors"},
    "threads": set(),
    "lifecycle": {"errors"},  # drives whatever machine it is given
    # the machine's parts
    "devices": {"_interrupts", "_vmm", "_memory", "_bus", "_lock", "_posix", "_atomic", "spec", "backends", "errors"},
    "firmware": {"_memory", "hypervisor.state", "spec", "errors"},
    "hypervisor": {"hypervisor.state", "_vmm", "_memory", "_lock", "_posix", "_atomic", "errors"},
    "hypervisor.state": {"errors"},
    "backends": {"_vmm", "_lock", "_posix", "_atomic", "threads", "errors"},
    "unix_name": {"errors"},
    "console": {"unix_name", "mapped_file", "errors"},
    "_interrupts": {"_vmm", "_bus", "_posix", "_atomic", "errors"},
    "_vmm": {"_memory", "_bus", "_mailbox", "_lock", "_posix", "_atomic", "errors"},
    "_memory": {"_posix", "_atomic", "errors"},
    "_bus": {"_lock", "_posix", "_atomic", "errors"},
    "_mailbox": {"_posix", "_atomic", "errors"},
    "_lock": {"_posix"},
    "_posix": set(),
    "_atomic": set(),
    # reading what the user wrote
    "standalone_config": {"spec", "toml_boot", "toml_cpuid", "toml_devices", "toml_table", "errors"},
    "toml_boot": {"spec", "toml_table"},
    "toml_cpuid": {"spec", "toml_table", "errors"},
    "toml_devices": {"small_devices", "spec", "toml_table", "errors"},
    "toml_table": {"toml_places", "errors"},
    "toml_places": {"errors"},
    "cgroup": {"spec", "errors"},
    "install_service": {"errors"},
    "power_off": {"config", "run_directory", "running_vm", "errors"},
    "config": {"spec", "names", "toml_boot", "toml_devices", "toml_table", "errors"},
    "names": {"spec", "processes", "errors"},
    "spec": {"network_spec", "pci_path", "small_devices", "errors"},
    "network_spec": {"pci_path"},
    "small_devices": {"pci_path"},
    "pci_path": set(),
    "errors": set(),
}

_FROM = re.compile(r"^\s*from\s+(\.*[\w.]*)\s+c?import\s+(\([^)]*\)|[^#\n\\]*(?:\\\n[^#\n\\]*)*)", re.MULTILINE)
_IMPORT = re.compile(r"^\s*c?import\s+([\w.]+)", re.MULTILINE)


def room(name: str) -> str:
    """The listed room that a dotted name below the package belongs to; "" for the package itself."""
    while name and name not in ARROWS:
        name = name.rpartition(".")[0]
    return name


def files() -> list[Path]:
    """All of the product's source."""
    found = [
        path
        for folder in ("propolis", "cli")
        for pattern in ("*.py", "*.pyi", "*.pyx", "*.pxd")
        for path in (TREE / folder).rglob(pattern)
    ]
    return sorted(path for path in found if path != TREE / "propolis/__init__.py")


def imported(path: Path) -> set[str]:
    """Dotted names of the project that a file imports; for `from a import b`, the name a.b."""
    source = without_texts(path.read_text())
    own = name_of(path).split(".")
    found = set(_IMPORT.findall(source))
    for module, names in _FROM.findall(source):
        base = module
        if module.startswith("."):
            level = len(module) - len(module.lstrip("."))
            package = own if path.name.startswith("__init__.") else own[:-1]
            base = ".".join([*package[: len(package) - level + 1], *filter(None, [module.lstrip(".")])])
        listed = re.sub(r"#.*|[()\\]", "", names).replace("\n", " ").split(",")
        found.update(f"{base}.{entry.split()[0]}" for entry in listed if entry.strip())
    return {name.replace("propolis_cli", "cli") for name in found if name.startswith(("propolis", "cli"))}


def room_of_file(path: Path) -> str:
    """The room that a source file is in."""
    return room(name_of(path).removeprefix("propolis."))


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(TREE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    """Each import stays in its room or follows an arrow."""
    here = room_of_file(path)
    assert here, f"{path.relative_to(TREE)} is in no room of ARROWS: add one, with what it may import"
    for name in sorted(imported(path)):
        there = room(name.removeprefix("propolis").removeprefix("."))
        allowed = there in ("", here) or there in ARROWS[here]
        assert allowed, f"{path.relative_to(TREE)} imports {name}: no arrow {here} -> {there}"


def test_no_circle() -> None:
    """The arrows point downward: nothing reaches itself."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for following in ARROWS.get(todo.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
        return seen

    assert [name for name in ARROWS if name in reach(name)] == []


@pytest.mark.parametrize(
    "module",
    [
        "propolis",
        "propolis.daemon",
        "propolis.keeper",
        "propolis.run_directory",
        "propolis.spec",
        "propolis.http.client",
        "propolis_cli.main",
        "propolis_cli.console",
        "propolis_cli.spec_file",
    ],
)
def test_nothing_compiled_is_loaded(module: str) -> None:
    """The daemon, the keeper and the command-line client start without the compiled core."""
    show = f"import sys, {module}; print([m for m in sys.modules if m.startswith('propolis._')])"
    result = subprocess.run([sys.executable, "-c", show], cwd=TREE, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_signals_are_looked_after_before_anything_is_loaded() -> None:
    """What comes first may not take time."""
    show = "import sys; before = set(sys.modules); import propolis.entry; print(sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", show], cwd=TREE, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['propolis', 'propolis.entry']"


def test_standalone_loads_no_web_framework() -> None:
    """A VM that offers no API does not pay for one."""
    show = "import sys, propolis.standalone; print('aiohttp' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", show], cwd=TREE, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
