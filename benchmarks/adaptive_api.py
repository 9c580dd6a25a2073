"""The example API with a capacity that changes while it runs, and a log of what it refused.

`python -m benchmarks.adaptive_api` prints its URL. `POST /begin` starts the clock of the capacity steps,
`GET /log` tells when it began (on the clock that all processes of a machine share) and refused, in
seconds from then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from examples.api.account import Account
from examples.api.server import application

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Steps = list[tuple[float, int]]


class Stepped:
    """The example API over an account whose `concurrent` follows `steps`: (second, capacity), from 0 on."""

    def __init__(self, steps: Steps, account: Account, *, retry_after: bool) -> None:
        self.account = account
        self.refused_at: list[float] = []
        self._steps = steps
        self._retry_after = retry_after
        self._began = time.monotonic()

    def application(self, delay_s: float) -> web.Application:
        app = application(self.account, delay_s)
        app.middlewares.append(self._watch)
        app.router.add_post("/begin", self._begin)
        app.router.add_get("/log", self._log)
        return app

    @web.middleware
    async def _watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        response = await handler(request)
        if response.status == 429:
            self.refused_at.append(time.monotonic() - self._began)
            if not self._retry_after:
                response.headers.popall("Retry-After")
        return response

    async def _begin(self, request: web.Request) -> web.Response:
        self._began = time.monotonic()
        self.refused_at.clear()
        self.account.reset()
        loop = asyncio.get_running_loop()
        for second, capacity in self._steps:
            loop.call_later(second, setattr, self.account, "concurrent", capacity)
        return web.json_response({"steps": self._steps})

    async def _log(self, request: web.Request) -> web.Response:
        return web.json_response({"began": self._began, "refused_at": self.refused_at})


async def serve(api: Stepped, delay_s: float) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    runner = web.AppRunner(api.application(delay_s), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await stop.wait()
    await runner.cleanup()


def main() -> None:
    options = _options().parse_args()
    steps: Steps = json.loads(options.steps)
    account = Account(per_window=options.per_window, window_s=options.window)
    asyncio.run(serve(Stepped(steps, account, retry_after=options.retry_after), options.delay))


def _options() -> Any:
    parser = argparse.ArgumentParser("python -m benchmarks.adaptive_api")
    parser.add_argument("--steps", default="[]", help="JSON: [[second, requests at a time], ...]")
    parser.add_argument("--per-window", type=int, default=0, help="starts per window; 0 means no limit")
    parser.add_argument("--window", type=float, default=60.0, help="seconds")
    parser.add_argument("--delay", type=float, default=1.0, help="seconds a request takes")
    parser.add_argument("--retry-after", action="store_true", help="say Retry-After in a refusal")
    return parser


if __name__ == "__main__":
    main()
