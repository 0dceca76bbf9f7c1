"""`propolis-cli screenshot` and `vnc` against a VM that has a screen, and one that has none."""

import asyncio
import io
from pathlib import Path

import asyncvnc
import pytest
from PIL import Image

from tests.unit.cli.program import TIMEOUT, Program, cli
from tests.unit.http.serving import Served, empty, ensure_body, one_vm

pytestmark = pytest.mark.program


async def with_screen(served: Served, tmp_path: Path) -> None:
    body = ensure_body(tmp_path)
    body["init"]["value"]["spec"]["extensions"]["screen"] = {}
    assert (await served.put("/instance", body)).status == 201


async def test_screenshot(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        await with_screen(served, tmp_path)
        path = tmp_path / "shot.png"
        assert await cli("screenshot", "web", "-o", str(path), server=served.path) == (0, f"{path}\n", "")
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert (image.format, image.size) == ("PNG", (640, 480))
        result = await cli("screenshot", "web", "-o", str(tmp_path / "no" / "shot.png"), server=served.path)
        assert result.status == 2
        assert "No such file" in result.err


@pytest.mark.parametrize("command", ["screenshot", "vnc"])
async def test_a_vm_without_a_screen(tmp_path: Path, command: str) -> None:
    async with one_vm(tmp_path) as served:
        result = await cli(command, "web", server=served.path)
        assert "the VM has no screen" in result.err
        assert result.status == 4


async def test_vnc(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        await with_screen(served, tmp_path)
        async with Program("vnc", "web", server=served.path) as program, asyncio.timeout(TIMEOUT):
            assert program.out is not None
            host, _, port = (await program.out.readline()).decode().strip().partition(":")
            assert host == "127.0.0.1"
            for _ in range(2):
                async with asyncvnc.connect(host, int(port)) as client:
                    assert (client.video.width, client.video.height) == (640, 480)
                    client.video.refresh()
                    assert await client.read() is asyncvnc.UpdateType.VIDEO
                    assert client.video.is_complete()
