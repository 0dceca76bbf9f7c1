"""The daemon's settings: what a file may say, what holds without one, and one line for each thing that is wrong."""

from pathlib import Path

import pytest

from propolis.config import (
    Jail,
    Limits,
    TcpAddress,
    Tls,
    Tokens,
    UnixAddress,
    default_settings,
    load,
    parse,
    parse_address,
)
from propolis.errors import ConfigError
from propolis.names import default_folder
from propolis.spec import DirectBoot, FileBlock, FirmwareBoot, PciPath, VirtioBlock

SEED = """bootrom = "/path/to/bootrom/OVMF_CODE.fd"

[block_dev.alpine_iso]
type = "file"
path = "/path/to/alpine-extended-3.12.0-x86_64.iso"

[dev.block0]
driver = "pci-virtio-block"
block_dev = "alpine_iso"
pci-path = "0.4.0"
"""


def test_a_whole_file(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(
        SEED
        + """
[chipset]
enable-pcie = false

[server]
listen = ["0.0.0.0:12400", "[::1]:1", "unix:api.sock"]
state_directory = "/state"
run_directory = "run"
allowed_directories = ["/images/", "more"]
allowed_hosts = ["vm.example"]
socket_group = "vms"
allowed_origins = ["https://console.example"]
insecure = true

[tls]
certificate = "server.pem"
key = "/etc/key.pem"
client_ca = "ca.pem"

[tokens]
full = ["tokens"]
read_only = ["/etc/readers"]

[limits]
body_bytes = 5000
header_bytes = 2000
connections = 3
idle_seconds = 4
vms = 5

[log]
level = "debug"
format = "json"

[jail]
mode = "log"
first_uid = 100000
core_bytes = 1000
"""
    )
    settings = load(file)
    assert settings.listen == (
        TcpAddress("0.0.0.0", 12400),
        TcpAddress("::1", 1),
        UnixAddress(f"{tmp_path}/api.sock"),
    )
    assert (settings.state_directory, settings.run_directory) == ("/state", f"{tmp_path}/run")
    assert settings.allowed_directories == ("/images", f"{tmp_path}/more")
    assert (settings.allowed_hosts, settings.allowed_origins) == (("vm.example",), ("https://console.example",))
    assert (settings.insecure, settings.log_level, settings.log_format) == (True, "debug", "json")
    assert settings.jail == Jail(mode="log", first_uid=100000, core_bytes=1000)
    assert settings.socket_group == "vms"
    assert settings.tls == Tls(certificate=f"{tmp_path}/server.pem", key="/etc/key.pem", client_ca=f"{tmp_path}/ca.pem")
    assert settings.tokens == Tokens(full=(f"{tmp_path}/tokens",), read_only=("/etc/readers",))
    assert settings.limits == Limits(body_bytes=5000, header_bytes=2000, connections=3, idle_seconds=4, vms=5)
    assert settings.defaults.boot == FirmwareBoot(bootrom="/path/to/bootrom/OVMF_CODE.fd")
    assert settings.defaults.backends == {"alpine_iso": FileBlock(path="/path/to/alpine-extended-3.12.0-x86_64.iso")}
    assert settings.defaults.devices == (VirtioBlock(name="block0", backend="alpine_iso", pci_path=PciPath(0, 4, 0)),)


def test_without_a_file() -> None:
    settings = default_settings()
    assert settings.listen == (UnixAddress(f"{default_folder()}/propolis.sock"),)
    assert settings.run_directory == default_folder()
    assert settings.state_directory.startswith("/")
    assert not settings.tokens
    assert settings.tls is None
    assert settings.jail == Jail()
    assert settings.jail.mode == "on"
    assert not settings.insecure
    assert settings.defaults.boot is None
    assert settings == parse("", "x", "/somewhere/else")


def test_a_user_keeps_the_state_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1234)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert default_settings().state_directory == "/home/me/.local/state/propolis"
    monkeypatch.setenv("XDG_STATE_HOME", "/elsewhere")
    assert default_settings().state_directory == "/elsewhere/propolis"


def test_a_default_kernel() -> None:
    settings = parse('kernel = "bzImage"\ninitrd = "i"\ncmdline = "quiet"', "x", "/boot")
    assert settings.defaults.boot == DirectBoot(kernel="/boot/bzImage", initrd="/boot/i", cmdline="quiet")


ONE_WRONG = [
    ("zzz = 1", "1:1", "unknown key 'zzz' in the file"),
    ('listen = ["x"]', "1:1", "unknown key 'listen' in the file: it belongs in [server]"),
    ("server = 3", "1:10", "[server]: expected a table, not 3"),
    ("tls = true", "1:7", "[tls]: expected a table, not true"),
    ("[server]\nlisten = 3", "2:10", "listen: expected an array of strings, not 3"),
    ('[server]\nlisten = ["12400"]', "2:10", "listen: '12400' is no address: expected IP:PORT"),
    ('[server]\nlisten = "example.org:80"', "2:10", "'example.org:80' is no address"),
    ('[server]\nlisten = "unix:"', "2:10", "'unix:' is no address"),
    ('[server]\nlistenn = "unix:x"', "2:1", "unknown key 'listenn' in [server]: did you mean 'listen'?"),
    ("[server]\ninsecure = 1", "2:12", "insecure: expected true or false, not 1"),
    ('[server]\nstate_directory = ""', "2:19", "state_directory: expected the path of a file, not ''"),
    ('[server]\nallowed_directories = "x"', "2:23", "expected an array of strings, not 'x'"),
    ('[log]\nlevel = "loud"', "2:9", "level: expected one of debug, info, warning, error, not 'loud'"),
    ('[log]\nformat = "xml"', "2:10", "format: expected one of text, json, not 'xml'"),
    ('[tls]\ncertificate = "x"', "1:1", "[tls] has no 'key'"),
    ("[limits]\nbody_bytes = 1", "2:14", "body_bytes: expected 4096 to 1073741824, not 1"),
    ("[limits]\nconnections = true", "2:15", "connections: expected a whole number, not true"),
    ('[jail]\nmode = "no"', "2:8", "mode: expected one of on, log, off, not 'no'"),
    ("[jail]\nenabled = true", "2:1", "unknown key 'enabled' in [jail]"),
    ("[jail]\nfirst_uid = 0", "2:13", "first_uid: expected 1 to 2147418112, not 0"),
    ("[tokens]\nfull = [1]", "2:8", "full: expected an array of strings, not an array"),
    ("[chipset]\nenable-pcie = true", "2:1", "enable-pcie = true is known, but not available"),
    ('[[pci_bridge]]\npci-path = "0.9.0"', "1:1", "'pci_bridge' is known, but not available"),
    ('kernel = "a"\nbootrom = ""', "2:11", "[bootrom]: expected the path of a file, not ''"),
    ('cmdline = "a"', "1:1", "'cmdline' is given without 'kernel'"),
    ('kernel = "a"\ncmdline = "a\\nb"', "2:11", "cmdline: expected a kernel command line without"),
    (SEED.replace("0.4.0", "0.1.0"), "10:12", "PCI path 0.1.0 belongs to the ISA bridge"),
    (SEED.replace('block_dev = "alpine_iso"', 'block_dev = "b"'), "9:13", "there is no block backend 'b'"),
]


@pytest.mark.parametrize(("text", "place", "words"), ONE_WRONG, ids=[words for _, _, words in ONE_WRONG])
def test_one_thing_wrong_is_one_line(text: str, place: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "server.toml", "/etc")
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"server.toml:{place}: "), line
    assert words in line


def test_everything_wrong_is_reported() -> None:
    with pytest.raises(ConfigError) as caught:
        parse('[server]\ninsecure = 1\nlisten = ["a", 3]\n[log]\nlevel = 3\n[x]\n', "s", "/")
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == ["s:2:12:", "s:3:10:", "s:5:9:", "s:6:1:"]


@pytest.mark.parametrize(
    ("word", "address", "shown"),
    [
        ("127.0.0.1:80", TcpAddress("127.0.0.1", 80), "127.0.0.1:80"),
        ("localhost:0", TcpAddress("localhost", 0), "localhost:0"),
        ("[::1]:12400", TcpAddress("::1", 12400), "[::1]:12400"),
        ("[0:0:0::1]:12400", TcpAddress("::1", 12400), "[::1]:12400"),
        ("unix:/run/x", UnixAddress("/run/x"), "unix:/run/x"),
        ("unix:/run/../x:1", UnixAddress("/x:1"), "unix:/x:1"),
    ],
)
def test_addresses(word: str, address: TcpAddress | UnixAddress, shown: str) -> None:
    assert parse_address(word) == address
    assert str(address) == shown


@pytest.mark.parametrize(
    "word", ["", ":", ":80", "1.2.3.4", "1.2.3:80", "::1:80", "1.2.3.4:", "1.2.3.4:65536", "1.2.3.4:٣", "unix:a\0"]
)
def test_what_is_no_address(word: str) -> None:
    with pytest.raises(ConfigError, match="is no address: expected IP:PORT"):
        parse_address(word)


@pytest.mark.parametrize(
    ("word", "is_loopback"),
    [("127.0.0.1:1", True), ("127.9.9.9:1", True), ("[::1]:1", True), ("localhost:1", True), ("0.0.0.0:1", False)],
)
def test_what_only_this_machine_reaches(word: str, is_loopback: bool) -> None:
    address = parse_address(word)
    assert isinstance(address, TcpAddress)
    assert address.is_loopback is is_loopback
