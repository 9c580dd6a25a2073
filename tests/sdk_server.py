"""A server that speaks enough of each provider's protocol for its real client, and can refuse.

It runs on a loop and thread of its own, so that blocking clients can be tested too.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from aiohttp import web

CHAT = {
    "id": "c1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"},
    ],
}
MESSAGE = {
    "id": "m1",
    "type": "message",
    "role": "assistant",
    "model": "m",
    "content": [{"type": "text", "text": "hello"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 1, "output_tokens": 1},
}
GENERATED = {
    "candidates": [{"content": {"role": "model", "parts": [{"text": "hello"}]}, "finishReason": "STOP"}]
}

GOOD: dict[str, Any] = {
    "/openai/v1/chat/completions": CHAT,
    "/anthropic/v1/messages": MESSAGE,
    "/google/v1/models/m:generateContent": GENERATED,
    "/plain": {"text": "hello"},
}
"""What each path answers when it does not refuse."""


def openai_error(code: str = "rate_limit_exceeded", kind: str = "requests") -> dict[str, Any]:
    return {"error": {"message": "no", "type": kind, "param": None, "code": code}}


def anthropic_error(kind: str = "rate_limit_error") -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": "no"}}


def google_error(retry_delay: str | None = None) -> dict[str, Any]:
    details: list[dict[str, Any]] = [{"@type": "type.googleapis.com/google.rpc.Help", "links": []}]
    if retry_delay is not None:
        info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": retry_delay}
        details.append(info)
    return {"error": {"code": 429, "message": "no", "status": "RESOURCE_EXHAUSTED", "details": details}}


class SdkServer:
    """`with SdkServer() as server:`; `server.url` is its address, `server.seen` the paths asked for."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.url = ""
        self._refusals: list[tuple[int, str, dict[str, str]]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sdk-server", daemon=True)

    def refuse(
        self, body: Any, *, status: int = 429, headers: Mapping[str, str] | None = None, times: int = 1
    ) -> None:
        """Answer the next requests so. A body that is text is sent as a stream of events."""
        kind = "text/event-stream" if isinstance(body, str) else "application/json"
        text = body if isinstance(body, str) else json.dumps(body)
        self._refusals += [(status, text, {"Content-Type": kind, **(headers or {})})] * times

    def reset(self) -> None:
        self.seen.clear()
        self._refusals.clear()

    def __enter__(self) -> SdkServer:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _open(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def _answer(self, request: web.Request) -> web.Response:
        await request.read()
        self.seen.append(request.path)
        if self._refusals:
            status, text, headers = self._refusals.pop(0)
            return web.Response(status=status, text=text, headers=headers)
        if request.path not in GOOD:
            return web.json_response({"error": {"code": 404, "message": "no such path"}}, status=404)
        return web.json_response(GOOD[request.path])
