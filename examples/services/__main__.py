"""The services that the examples call, in one small server with an account of its own.

    python examples/services --port 8090 --at-once email=1

Prints its URL as one line when it is ready, and stops on SIGTERM or Ctrl-C.

    POST /{example}/{step}/{key}    one call; takes `--delay` seconds
    POST /v1/chat/completions       OpenAI's protocol; the key is the prompt
    GET  /account                   what `Account.report` says, for each example that called
    GET  /kept/{example}/{step}     the last body of each key

`--at-once STEP=N` refuses more than N calls of a step at a time, each kind of service in its own way:
`email` with 200 and a word in the body, `chat` with 429 and milliseconds, the others with 429 and
Retry-After.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections import defaultdict
from typing import Any

from account import Account
from aiohttp import web
from answers import LAST, SERVICES

AGAIN_S = 0.25
SHUTDOWN_S = 1.0


def main() -> int:
    options = _options().parse_args()
    try:
        asyncio.run(serve(options))
    except OSError as error:
        print(f"cannot listen on port {options.port} ({error.strerror}); --port 0 takes a free one")
        return 2
    return 0


async def serve(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    app = application(Services(dict(options.at_once), options.delay))
    # a client that goes away ends its call in the account at once
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", options.port).start()
        print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def application(services: Services) -> web.Application:
    app = web.Application()
    app.router.add_post("/v1/chat/completions", services.chat)
    app.router.add_post("/{example}/{step}/{key}", services.call)
    app.router.add_get("/account", services.account)
    app.router.add_get("/kept/{example}/{step}", services.kept)
    return app


class Services:
    """The handlers."""

    def __init__(self, at_once: dict[str, int], delay_s: float) -> None:
        self._delay_s = delay_s
        self._accounts = {name: Account(LAST[name], at_once) for name in SERVICES}
        self._kept: defaultdict[str, dict[str, Any]] = defaultdict(dict)

    async def call(self, request: web.Request) -> web.StreamResponse:
        names = request.match_info
        if names["step"] not in SERVICES.get(names["example"], {}):
            return web.json_response({"error": "no such service"}, status=404)
        return await self._answer(
            request, names["example"], names["step"], names["key"], await request.json()
        )

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await self._answer(request, "llm", "chat", body["messages"][-1]["content"], body)

    async def account(self, request: web.Request) -> web.Response:
        reports = {name: account.report() for name, account in self._accounts.items()}
        return web.json_response({name: report for name, report in reports.items() if report["steps"]})

    async def kept(self, request: web.Request) -> web.Response:
        return web.json_response(self._kept["{example}/{step}".format(**request.match_info)])

    async def _answer(
        self, request: web.Request, example: str, step: str, key: str, body: Any
    ) -> web.StreamResponse:
        account = self._accounts[example]
        if not account.arrive(step, key):
            return refusal(step)
        answered = False
        try:
            await asyncio.sleep(self._delay_s)
            self._kept[f"{example}/{step}"][key] = body
            # Sent here and not by returning it: the account must not run ahead of the answer.
            response = web.json_response(SERVICES[example][step](key, body))
            await response.prepare(request)
            await response.write_eof()
            answered = True
        finally:
            account.leave(step, key, answered=answered)
        return response


def refusal(step: str) -> web.Response:
    """How a service says that it is asked too much."""
    if step == "email":
        return web.json_response({"sent": False, "try_again_in_s": AGAIN_S})
    if step == "chat":
        text = "Rate limit reached for requests"
        error = {"message": text, "type": "requests", "param": None, "code": "rate_limit_exceeded"}
        headers = {"retry-after-ms": str(int(AGAIN_S * 1000))}
        return web.json_response({"error": error}, status=429, headers=headers)
    return web.json_response({"error": "too many requests"}, status=429, headers={"Retry-After": "1"})


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python examples/services")
    add = parser.add_argument
    add("--port", type=int, default=8090, help="0 takes a free one")
    add("--delay", type=float, default=0.1, help="how long a call takes, seconds")
    add(
        "--at-once",
        type=_at_once,
        action="append",
        default=[],
        metavar="STEP=N",
        help="refuse more; may repeat",
    )
    return parser


def _at_once(text: str) -> tuple[str, int]:
    step, _, count = text.partition("=")
    steps = [name for services in SERVICES.values() for name in services]
    if step not in steps or not count.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used: write STEP=N with one of {', '.join(steps)}"
        )
    return step, int(count)


if __name__ == "__main__":
    sys.exit(main())
