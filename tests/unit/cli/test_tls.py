"""The commands across TLS, with tokens: what a person sees who has the right files, and who has not."""

import contextlib
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from propolis.http.client import Client
from tests.unit.cli.program import Ended, cli
from tests.unit.daemons import server

pytestmark = [pytest.mark.program, pytest.mark.timeout(300)]

FULL, READER = "full-" + "x" * 32, "reader-" + "y" * 32


def make_certificate(folder: Path, name: str) -> Path:
    """One that signs itself, with its key beside it, for 127.0.0.1."""
    command = (
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
        *("-subj", "/CN=propolis", "-addext", "subjectAltName=IP:127.0.0.1"),
        *("-keyout", str(folder / f"{name}.key"), "-out", str(folder / f"{name}.pem")),
    )
    subprocess.run(command, check=True, capture_output=True)
    return folder / f"{name}.pem"


class Site:
    """A daemon that other machines could use, and the files of its users."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url

    async def ask(self, *words: str, token: str | None = "full", ca: str | None = "server.pem") -> Ended:
        """A command, with files of these names."""
        files = [] if token is None else ["--token-file", str(self.folder / token)]
        files += [] if ca is None else ["--ca-file", str(self.folder / ca)]
        return await cli("--url", self.url, *files, *words)


@contextlib.asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[Site]:
    make_certificate(folder, "server")
    make_certificate(folder, "other")
    for name, token in (("full", FULL), ("reader", READER), ("stranger", "z" * 32)):
        (folder / name).write_text(token + "\n")
        (folder / name).chmod(0o600)
    config = (
        '[tls]\ncertificate = "server.pem"\nkey = "server.key"\n[tokens]\nfull = ["full"]\nread_only = ["reader"]\n'
    )
    async with server(folder, "127.0.0.1:0", f"unix:{folder}/api", config=config) as one:
        assert (await one.create("web")).status == 201
        port = one.log.partition("127.0.0.1:")[2].split()[0].rstrip('"')
        yield Site(folder, f"https://127.0.0.1:{port}")
        for secret in (FULL, READER, "z" * 32):
            assert secret not in one.log


async def test_who_has_the_right_files(tmp_path: Path) -> None:
    """Given by options, by the environment, or to the client of Python; the console's websocket goes the same way."""
    async with serving(tmp_path) as site:
        ended = await site.ask("state", "web", "run", "--wait")
        assert (ended.status, ended.err) == (0, "")
        environment = {
            "PROPOLIS_URL": site.url,
            "PROPOLIS_CA_FILE": str(tmp_path / "server.pem"),
            "PROPOLIS_TOKEN_FILE": str(tmp_path / "reader"),
        }
        assert await cli("ls", "-q", environment=environment) == (0, "web\n", "")
        ended = await cli("state", "web", "stop", environment=environment)
        assert (ended.status, ended.out) == (1, "")
        assert "read-only" in ended.err
        async with (
            Client(site.url, FULL, ca_file=str(tmp_path / "server.pem")) as client,
            client.serial("web", from_start=0),
        ):
            await client.stop("web")


async def test_who_has_others(tmp_path: Path) -> None:
    """Is told in a line what is wrong, and nothing of any token."""
    async with serving(tmp_path) as site:
        for token, ca, status, words in (
            ("stranger", "server.pem", 1, "token is not known"),
            (None, "server.pem", 1, "needs a token"),
            ("full", "other.pem", 3, "its certificate is not trusted: self-signed certificate\n"),
            ("full", None, 3, "self-signed certificate; --ca-file names"),
            ("missing", "server.pem", 2, "No such file"),
            ("full", "missing.pem", 2, "No such file"),
            ("full", "full", 2, "read certificates"),
        ):
            ended = await site.ask("ls", token=token, ca=ca)
            assert (ended.status, ended.out) == (status, ""), ended
            assert words in ended.err
            assert len(ended.err.splitlines()) == 1
            assert FULL not in ended.err
        ended = await cli("--url", site.url.replace("https", "http"), "ls")
        assert (ended.status, ended.out) == (3, ""), ended
        assert len(ended.err.splitlines()) == 1, ended
