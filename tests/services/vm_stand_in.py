"""A process that looks like a VM from outside: `python -m tests.services.vm_stand_in DIRECTORY obeys|refuses|hangs`.

It keeps the run directory and serves the one route that powers it off. Real VMs are tested elsewhere; this one can also
be out of its mind.
"""

import asyncio
import signal
import sys
import time

from aiohttp import web

from propolis.run_directory import ExitRecord, RunDirectory


async def serve(directory: RunDirectory, manner: str) -> None:
    """Until it is told to end."""
    end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def shutdown(request: web.Request) -> web.Response:
        if manner == "refuses":
            return web.Response(status=409)
        if manner == "obeys":
            end.set_result(f"powered off within {(await request.json())['deadline_seconds']:g} s")
        return web.Response(status=204)

    def terminate() -> None:
        if manner != "hangs":
            end.set_result("stopped")

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, terminate)
    app = web.Application()
    app.router.add_put("/instance/shutdown", shutdown)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.SockSite(runner, directory.listen()).start()
    print("ready", flush=True)
    reason = await end
    await runner.cleanup()
    directory.write_exit(ExitRecord(reason=reason, time=time.time(), status=0))


if __name__ == "__main__":
    with RunDirectory.create(sys.argv[1]) as opened:
        opened.take_lock()
        asyncio.run(serve(opened, sys.argv[2]))
