"""A small HTTP API that limits its clients and keeps its own account of them.

    python -m examples.api.server --port 8080 --concurrent 10 --per-minute 500

Prints its URL as one line when it is ready, and stops cleanly on SIGTERM or Ctrl-C.

    GET  /users/{id}/profile    made from the id alone; takes `--delay` seconds
    GET  /users/{id}/orders     likewise
    GET  /account               what `Account.report` says
    POST /account/reset         begin a new account

Above its limits it answers 429 with Retry-After, in whole seconds as HTTP has it, and with the exact
seconds in the body.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import signal
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

from aiohttp import web

from examples.api.account import ORDERS, PROFILE, Account

SHUTDOWN_S = 1.0


def main() -> int:
    options = _options().parse_args()
    if not options.quiet:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    try:
        asyncio.run(serve(options))
    except OSError as error:
        where = f"{options.host} port {options.port}"
        print(f"cannot listen on {where} ({error.strerror}); --port 0 takes a free one", file=sys.stderr)
        return 2
    return 0


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT. Requests still running then have a second to end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    account = Account(concurrent=options.concurrent, per_window=options.per_minute, window_s=options.window)
    runner = web.AppRunner(
        application(account, options.delay),
        access_log=None if options.quiet else logging.getLogger("examples.api"),
        handler_cancellation=True,  # a client that goes away ends its request in the account at once
        shutdown_timeout=SHUTDOWN_S,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, options.host, options.port).start()
        print(f"http://{options.host}:{runner.addresses[0][1]}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def application(account: Account, delay_s: float) -> web.Application:
    """The four routes, over `account`."""
    api = Api(account, delay_s)
    app = web.Application()
    app.router.add_get("/users/{id}/{step:profile|orders}", api.answer)
    app.router.add_get("/account", api.show)
    app.router.add_post("/account/reset", api.reset)
    return app


class Api:
    """The handlers. Times are the server's own monotonic clock."""

    def __init__(self, account: Account, delay_s: float) -> None:
        self._account = account
        self._delay_s = delay_s

    async def answer(self, request: web.Request) -> web.StreamResponse:
        user, step = request.match_info["id"], request.match_info["step"]
        connection = request.transport
        self._account.drop_broken(_is_broken)
        wait_s = self._account.arrive(time.monotonic(), user, step, connection)
        if wait_s > 0:
            return _too_many(wait_s)
        answered = False
        try:
            await asyncio.sleep(self._delay_s)
            # Sent here and not by returning it: the account must not run ahead of the answer.
            response = web.json_response(BODIES[step](user))
            await response.prepare(request)
            await response.write_eof()
            answered = True
        finally:
            self._account.leave(user, step, connection, answered=answered)
        return response

    async def show(self, request: web.Request) -> web.Response:
        self._account.drop_broken(_is_broken)
        return web.json_response(self._account.report())

    async def reset(self, request: web.Request) -> web.Response:
        self._account.drop_broken(_is_broken)
        self._account.reset()
        return web.json_response(self._account.report())


def profile_of(user: str) -> dict[str, Any]:
    """The same for the same id, always."""
    number = zlib.crc32(user.encode())
    return {"user_id": user, "name": f"User {user}", "plan": ("free", "plus", "pro")[number % 3]}


def orders_of(user: str) -> list[dict[str, Any]]:
    """One to four orders, the same for the same id."""
    number = zlib.crc32(user.encode())
    return [
        {"order_id": f"{user}-{place}", "cents": 100 + (number >> place) % 9900}
        for place in range(1, 2 + number % 4)
    ]


BODIES: dict[str, Callable[[str], Any]] = {PROFILE: profile_of, ORDERS: orders_of}


def _is_broken(connection: asyncio.Transport | None) -> bool:
    return connection is None or connection.is_closing()


def _too_many(wait_s: float) -> web.Response:
    return web.json_response(
        {"error": "too many requests", "retry_after_s": wait_s},
        status=429,
        headers={"Retry-After": str(max(1, math.ceil(wait_s)))},
    )


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.api.server")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=_whole(65_535), default=0, help="0 takes a free one")
    add("--concurrent", type=_whole(1_000_000), default=0, help="requests at a time; 0 means no limit")
    add("--per-minute", type=_whole(1_000_000), default=0, help="starts per --window; 0 means no limit")
    add("--delay", type=_seconds(0.0), default=0.5, help="how long a request takes, seconds")
    add("--window", type=_seconds(0.001), default=60.0, help="length of the window, seconds")
    add("--quiet", action="store_true", help="do not log requests to stderr")
    return parser


def _whole(highest: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not (text.isascii() and text.isdigit() and int(text) <= highest):
            raise argparse.ArgumentTypeError(
                f"{text!r} cannot be used: give a whole number from 0 to {highest}"
            )
        return int(text)

    return whole


def _seconds(lowest: float) -> Callable[[str], float]:
    def seconds(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= 86_400:
            raise argparse.ArgumentTypeError(
                f"{text!r} cannot be used: give seconds from {lowest:g} to 86400"
            )
        return value

    return seconds


if __name__ == "__main__":
    sys.exit(main())
