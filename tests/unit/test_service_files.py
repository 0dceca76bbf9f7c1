"""The service files say what their readers understand: systemd's own checks, SMF's document type, the shell."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from propolis import config
from propolis.install_service import CONFIG, UNITS, Manager, files, install

needs_analyze = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is missing (apt install systemd)"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An image with the files of both service managers; the server's path is that of a program."""
    for manager in Manager:
        list(install(str(tmp_path), files(manager, "/usr/local", sys.executable)))
    return tmp_path


def units(root: Path) -> list[str]:
    """Paths of the installed units."""
    return [str(root / f"usr/local/lib/systemd/system/{name}") for name in UNITS]


def call(*command: str) -> subprocess.CompletedProcess[str]:
    """Run it."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


# -- systemd -----------------------------------------------------------------------------------------------------------


@needs_analyze
def test_systemd_understands_the_units(root: Path) -> None:
    """Not even a warning, of a misspelt setting for instance."""
    result = call("systemd-analyze", "verify", *units(root))
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@needs_analyze
@pytest.mark.parametrize("name", [name for name in UNITS if name.endswith(".service")])
def test_the_units_are_confined(root: Path, name: str) -> None:
    """An exposure of less than 4 of 10, as systemd counts it."""
    path = next(path for path in units(root) if path.endswith(name))
    result = call("systemd-analyze", "security", "--offline=true", "--threshold=40", path)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_analyze
def test_the_calls_of_a_worker_and_its_keeper_are_allowed(root: Path) -> None:
    """What the jail and devices need: without one of them no VM would come to its first instruction."""
    text = Path(units(root)[2]).read_text()
    allowed = {word for line in re.findall(r"^SystemCallFilter=(.*)$", text, re.MULTILINE) for word in line.split()}
    while groups := {word for word in allowed if word.startswith("@")}:
        allowed -= groups
        for group in groups:
            lines = call("systemd-analyze", "syscall-filter", group).stdout.splitlines()[1:]
            allowed |= {line.strip() for line in lines if line.strip() and "#" not in line}
    needed = """chroot seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self setresuid setresgid
        setgroups capset prctl prlimit64 setrlimit ioctl userfaultfd io_uring_setup io_uring_enter io_uring_register
        memfd_create eventfd2 pidfd_open pidfd_send_signal waitid mlock madvise fallocate sendmsg recvmsg
        close_range clone3 sched_setaffinity timerfd_create fchown fchmod"""
    assert set(needed.split()) - allowed == set()


@pytest.mark.skipif(not shutil.which("systemd-sysusers"), reason="systemd-sysusers is missing (apt install systemd)")
def test_groups_and_folders_are_made(root: Path) -> None:
    """By systemd-sysusers and systemd-tmpfiles, which find their entries there; the socket's group is among them."""
    result = call("systemd-sysusers", f"--root={root}")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^propolis:", (root / "etc/group").read_text(), re.MULTILINE)
    if os.geteuid() == 0:
        result = call("systemd-tmpfiles", "--create", f"--root={root}")
        assert result.returncode == 0, result.stderr
        assert (root / "var/lib/propolis").stat().st_mode & 0o777 == 0o700
        assert (root / "run/propolis").stat().st_mode & 0o777 == 0o755


def test_the_vms_have_the_devices_that_the_daemon_has(root: Path) -> None:
    """They are its children in another unit's control group, whose list counts."""

    def devices(unit: str) -> list[str]:
        return re.findall(r"^Device.*$", Path(unit).read_text(), re.MULTILINE)

    vms, _, server = units(root)
    assert devices(vms) == devices(server)
    assert "DevicePolicy=closed" in devices(vms)


def test_the_daemon_is_told_where_the_vms_groups_are(root: Path) -> None:
    """The slice and the name of the other unit, three times."""
    vms, _, server = units(root)
    slice_name = re.findall(r"^Slice=(.*)$", Path(vms).read_text(), re.MULTILINE)[0]
    group = f"/{slice_name}/{Path(vms).name}"
    assert f"\nEnvironment=PROPOLIS_CGROUP={group}\n" in Path(server).read_text()
    assert f"\nReadWritePaths=-/sys/fs/cgroup{group}\n" in Path(server).read_text()


def test_the_default_configuration_is_the_default(root: Path, tmp_path: Path) -> None:
    """All of it is comments; with the comments' examples it is a configuration as well."""
    text = (root / CONFIG[1:]).read_text()
    path = tmp_path / "config.toml"
    path.write_text(text)
    assert config.load(path) == config.default_settings()
    path.write_text(re.sub(r"^# (?=\[|\w+ = )", "", text, flags=re.MULTILINE))
    settings = config.load(path)
    assert settings.tls is not None
    assert settings.tokens.full == ("/etc/propolis/tokens",)
    assert settings.allowed_directories == ("/var/lib/libvirt/images", "/srv/vms")
    assert len(settings.listen) == 2


# -- SMF ---------------------------------------------------------------------------------------------------------------

# Of service_bundle.dtd.1, for the elements that are used here: which children, in this order, as a regular expression
# over their names; attributes that must be there; values or None for each attribute that may be.
BOOLEAN = ("true", "false")
VALUE_TYPES = (
    "count", "integer", "opaque", "host", "hostname", "net_address_v4", "net_address_v6", "time", "astring", "ustring",
    "boolean", "fmri", "uri",
)  # fmt: skip
RESTART_ON = ("error", "restart", "refresh", "none")
GROUPING = ("require_all", "require_any", "exclude_all", "optional_all")
_SERVICE = (
    r"(create_default_instance )?(single_instance )?(restarter )?(dependency )*(dependent )*(method_context )?"
    r"(exec_method )*(property_group )*(instance )*(stability )?(template )?"
)
_PROP_PATTERN = (
    r"(common_name )?(description )?(units )?(visibility )?(cardinality )?(internal_separators )?(values )?"
    r"(constraints )?(choices )?"
)
Attributes = dict[str, tuple[str, ...] | None]
RULES: dict[str, tuple[str, set[str], Attributes]] = {
    "service_bundle": (r"(service_bundle )*|(service )*", {"type", "name"}, {"type": None, "name": None}),
    "service": (
        _SERVICE,
        {"name", "version", "type"},
        {"name": None, "version": None, "type": ("service", "restarter", "milestone")},
    ),
    "create_default_instance": ("", {"enabled"}, {"enabled": BOOLEAN}),
    "single_instance": ("", set(), {}),
    "dependency": (
        r"(service_fmri )*(stability )?(propval |property )*",
        {"name", "grouping", "restart_on", "type"},
        {"name": None, "grouping": GROUPING, "restart_on": RESTART_ON, "type": None, "delete": BOOLEAN},
    ),
    "service_fmri": ("", {"value"}, {"value": None}),
    "method_context": (
        r"(method_profile |method_credential )?(method_environment )?",
        set(),
        {"working_directory": None, "project": None, "resource_pool": None},
    ),
    "method_credential": (
        "",
        {"user"},
        {"user": None, "group": None, "supp_groups": None, "privileges": None, "limit_privileges": None},
    ),
    "exec_method": (
        r"(method_context )?(stability )?(propval |property )*",
        {"type", "name", "exec", "timeout_seconds"},
        {"type": ("method", "monitor"), "name": None, "exec": None, "timeout_seconds": None, "delete": BOOLEAN},
    ),
    "property_group": (
        r"(stability )?(propval |property )*",
        {"name", "type"},
        {"name": None, "type": None, "delete": BOOLEAN},
    ),
    "propval": (
        "",
        {"name", "type", "value"},
        {"name": None, "type": VALUE_TYPES, "value": None, "override": BOOLEAN},
    ),
    "stability": (
        "",
        {"value"},
        {"value": ("Standard", "Stable", "Evolving", "Unstable", "External", "Obsolete")},
    ),
    "template": (r"common_name (description )?(documentation )?(pg_pattern )*", set(), {}),
    "common_name": (r"(loctext )+", set(), {}),
    "description": (r"(loctext )+", set(), {}),
    "units": (r"(loctext )+", set(), {}),
    "loctext": ("", {"xml:lang"}, {"xml:lang": None}),
    "pg_pattern": (
        r"(common_name )?(description )?(prop_pattern )*",
        set(),
        {"name": None, "type": None, "required": BOOLEAN, "target": ("this", "instance", "delegate", "all")},
    ),
    "prop_pattern": (
        _PROP_PATTERN,
        {"name"},
        {"name": None, "type": VALUE_TYPES, "required": BOOLEAN},
    ),
    "constraints": (r"(value )*(range )*", set(), {}),
    "range": ("", {"min", "max"}, {"min": None, "max": None}),
}


def problems(element: ET.Element, place: str = "") -> list[str]:
    """What the document type does not allow, in an element and below it."""
    place = f"{place}/{element.tag}"
    if element.tag not in RULES:
        return [f"{place}: no rule for it here"]
    children, required, allowed = RULES[element.tag]
    attributes = {
        name.replace("{http://www.w3.org/XML/1998/namespace}", "xml:"): value for name, value in element.items()
    }
    found = [f"{place}: no attribute {name}" for name in sorted(required - attributes.keys())]
    for name, value in attributes.items():
        if name not in allowed:
            found.append(f"{place}: attribute {name}")
        elif value not in (allowed[name] or (value,)):
            found.append(f"{place}: {name}={value}")
    if not re.fullmatch(children, "".join(f"{child.tag} " for child in element)):
        found.append(f"{place}: children {', '.join(child.tag for child in element)}")
    texts = [element.text, *(child.tail for child in element)]
    if element.tag != "loctext" and any(text and text.strip() for text in texts):
        found.append(f"{place}: text")
    return found + [problem for child in element for problem in problems(child, place)]


def manifest(root: Path) -> str:
    """The installed one."""
    return (root / "lib/svc/manifest/site/propolis-server.xml").read_text()


def test_the_manifest_is_of_its_document_type(root: Path) -> None:
    """Elements, their order, attributes, values; and the declaration by which svccfg knows it."""
    text = manifest(root)
    assert text.startswith('<?xml version="1.0"?>\n<!-- Written by ')
    assert '<!DOCTYPE service_bundle SYSTEM "/usr/share/lib/xml/dtd/service_bundle.dtd.1">' in text
    assert problems(ET.fromstring(text)) == []


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ('restart_on="none" ', "", "/service_bundle/service/dependency: no attribute restart_on"),
        ('grouping="require_all"', 'grouping="all"', "/service_bundle/service/dependency: grouping=all"),
        ("<single_instance/>", "", None),
        ("<template>", "<template>x", "/service_bundle/service/template: text"),
        (
            'enabled="false"',
            'enabled="false" name="x"',
            "/service_bundle/service/create_default_instance: attribute name",
        ),
        ("<single_instance/>", "<single_instance/><single_instance/>", "/service_bundle/service: children "),
    ],
)
def test_the_check_of_the_manifest_finds(root: Path, before: str, after: str, expected: str | None) -> None:
    """What it is there for."""
    text = manifest(root)
    assert before in text
    found = problems(ET.fromstring(text.replace(before, after)))
    assert (expected is None and not found) or (expected is not None and found[0].startswith(expected))


def test_the_service_is_the_seeds(root: Path) -> None:
    """Its name, its properties, and a pattern for each."""
    service = ET.fromstring(manifest(root)).find("service")
    assert service is not None
    assert service.get("name") == "system/illumos/propolis-server"
    properties = {value.get("name"): value.get("value") for value in service.iterfind("property_group/propval")}
    assert (properties["listen_addr"], properties["listen_port"]) == ("127.0.0.1", "12400")
    assert properties["config_file"] == CONFIG
    group = {value.get("name") for value in service.iterfind("property_group[@name='config']/propval")}
    assert group == {pattern.get("name") for pattern in service.iterfind("template/pg_pattern/prop_pattern")}
    methods = {method.get("name"): method.get("exec") for method in service.iterfind("exec_method")}
    assert methods.keys() == {"start", "stop", "refresh"}
    assert methods["start"] == "/usr/local/lib/svc/method/propolis-server start"


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "ksh"])
def test_the_method_is_a_shell_script(root: Path, shell: str) -> None:
    """For any of the shells that may be /bin/sh."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is missing")
    result = call(shell, "-n", str(root / "usr/local/lib/svc/method/propolis-server"))
    assert (result.returncode, result.stderr) == (0, "")


class Method:
    """The method, with illumos's commands and the server played by scripts that write down what they are asked."""

    def __init__(self, root: Path, properties: dict[str, str]) -> None:
        self.calls = root / "calls"
        self.pid_file = root / "pid"
        self.script = root / "usr/local/lib/svc/method/propolis-server"
        text = self.script.read_text()
        include = "SMF_EXIT_OK=0 SMF_EXIT_ERR_FATAL=95 SMF_EXIT_ERR_CONFIG=96\nsmf_clear_env() { unset SMF_FMRI; }\n"
        include += f'smf_kill_contract() {{ echo "kill contract $*" >>{self.calls}; }}\n'
        (root / "include").write_text(include)
        cases = "".join(f"config/{name}) echo '{value}';;\n" for name, value in properties.items())
        self._program(root / "svcprop", f'case "$3" in\n{cases}*) exit 1;; esac\n')
        self._program(root / "server", f'echo "server $* ${{SMF_FMRI-}}" >>{self.calls}\n')
        for old, new in (
            (sys.executable, root / "server"),
            ("/lib/svc/share/smf_include.sh", root / "include"),
            ("/usr/bin/svcprop", root / "svcprop"),
            ("/var/run/propolis-server.pid", self.pid_file),
        ):
            assert old in text
            text = text.replace(old, str(new))
        self.script.write_text(text)

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(f"#!/bin/sh\n{text}")
        path.chmod(0o755)

    def run(self, *arguments: str) -> tuple[int, list[str]]:
        """Its exit status, and the calls that it made."""
        self.calls.write_text("")
        environment = {**os.environ, "SMF_FMRI": "svc:/x"}
        result = subprocess.run(
            ["sh", str(self.script), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )  # returns when the server in the background has closed the pipes too
        return result.returncode, self.calls.read_text().splitlines()


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", "127.0.0.1:12400"), ("fd00::1", "[fd00::1]:12400"), ("unix:/a/b", "unix:/a/b")],
)
def test_the_method_starts_the_server(root: Path, address: str, expected: str) -> None:
    """With the properties' address, the configuration where there is one, and nothing of SMF's in its environment."""
    properties = {"config_file": f"{root}/none", "listen_addr": address, "listen_port": "12400"}
    method = Method(root, properties)
    assert method.run("start") == (0, [f"server run {expected} "])
    assert int(method.pid_file.read_text()) > 1


def test_the_method_wants_its_properties(root: Path) -> None:
    """Without them the service goes to maintenance: SMF_EXIT_ERR_CONFIG."""
    assert Method(root, {}).run("start") == (96, [])


def test_the_method_stops_the_vms_first(root: Path) -> None:
    """In order: the daemon, the VMs with their deadline, what is left of the contract."""
    properties = {"config_file": f"{root}{CONFIG}", "listen_addr": "::1", "listen_port": "1", "shutdown_deadline": "7"}
    method = Method(root, properties)
    daemon = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    with daemon:
        method.pid_file.write_text(str(daemon.pid))
        assert method.run("stop", "42") == (
            0,
            [f"server power-off --deadline 7 {root}{CONFIG} svc:/x", "kill contract 42 TERM 1 20"],
        )
        assert daemon.wait(10) == -15
    assert not method.pid_file.exists()
    assert method.run("refresh") == (0, [])
    assert method.run("other") == (95, [])
