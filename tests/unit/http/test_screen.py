"""The screen by HTTP: where there is none, its picture, and RFB on a websocket until the VM ends."""

import asyncio
from pathlib import Path

import pytest
from aiohttp import WSMsgType

from tests.unit.http.serving import TIMEOUT, URL, Served, empty, ensure_body, one_vm


async def with_screen(served: Served, tmp_path: Path) -> None:
    body = ensure_body(tmp_path)
    body["init"]["value"]["spec"]["extensions"]["screen"] = {"name": "display"}
    assert (await served.put("/instance", body)).status == 201


@pytest.mark.parametrize("path", ["/instance/screenshot", "/instance/vnc"])
async def test_a_vm_without_a_screen(tmp_path: Path, path: str) -> None:
    async with one_vm(tmp_path) as served:
        answer = await served.get(path)
        assert answer.status == 404
        assert "no screen" in answer.body["message"]


async def test_a_picture(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        await with_screen(served, tmp_path)
        answer = await served.get("/instance/screenshot")
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.body.startswith(b"\x89PNG\r\n")
        spec = (await served.get("/instance/spec")).body["spec"]["value"]
        assert spec["extensions"]["screen"] == {"name": "display"}
        metrics = (await served.get("/instance/metrics")).body
        assert metrics["screen"] == {"clients": 0, "width": 640, "height": 480}
        assert metrics["devices"]["ramfb"] == {"refused": 0}


async def test_clients_go_when_the_vm_does(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        await with_screen(served, tmp_path)
        async with asyncio.timeout(TIMEOUT):
            socket = await served.client.ws_connect(URL + "/instance/vnc")
            assert (await socket.receive()).data == b"RFB 003.008\n"
            await served.put("/instance/state", "Stop")
            message = await socket.receive()
        assert message.type is WSMsgType.CLOSE
        assert (message.data, message.extra) == (1001, "the VM's screen is gone")


async def test_a_client_that_speaks_something_else(tmp_path: Path) -> None:
    async with empty(tmp_path) as served:
        await with_screen(served, tmp_path)
        async with asyncio.timeout(TIMEOUT):
            socket = await served.client.ws_connect(URL + "/instance/vnc")
            await socket.receive()
            await socket.send_str("hello")
            assert (await socket.receive()).type is WSMsgType.CLOSE
            socket = await served.client.ws_connect(URL + "/instance/vnc")
            await socket.receive()
            await socket.send_bytes(b"GET / HTTP/1")
            message = await socket.receive()
        assert (message.type, message.data) == (WSMsgType.CLOSE, 1008)
        assert "no version of RFB" in (message.extra or "")
